"""Group Relative Policy Optimization and its variants as settings of one method.

GRPO (DeepSeekMath), arXiv 2402.03300; Dr.GRPO, 2503.20783; DAPO, 2503.14476; BNPO, 2506.02864.
Axis: the baseline. The mean (and std) of the rewards of one prompt's completions replaces a critic.

    A_i = (R_i - mean_g) / (std_g + eps)                                 the same on every token of row i
    r_t = exp(logp_t - old_logp_t)
    l_t = -min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A) + beta KL_t(pi || ref)
    L   = aggregate(l_t)

| variant | settings |
|---|---|
| GRPO    | the defaults (the paper adds beta=0.04 with k3) |
| Dr.GRPO | scale=none, aggregation=seq-mean-token-sum-norm |
| DAPO    | clip_high=0.28, aggregation=token-mean, dynamic_sampling=true; `rewards.overlong_cache` for its length penalty |
| BNPO    | scale=bnpo, clip_high=0.28, dual_clip=10, aggregation=seq-mean-token-sum |

A group without a reward spread has advantage exactly 0, so a batch of solved prompts leaves the KL term only. Rows whose reward
could not be computed leave both statistics and loss. TRL's `bnpo` loss is not here: it depends on how a batch is split.
Our choices: ddof 1 and eps 1e-6 (verl; the papers do not say), rows without trained tokens are not counted in row
means (`count_empty` counts them, as TRL does), `spread_tol`.
"""

from dataclasses import dataclass
from typing import Literal

import jax

from jaxrl_llm.advantages import group, overlong
from jaxrl_llm.algorithms import Paper
from jaxrl_llm.algorithms.base import (
    Algorithm,
    Needs,
    Plan,
    check_clip,
    clipped_metrics,
    expect,
    expect_one_of,
    no_state,
    per_token,
    weigh_by,
)
from jaxrl_llm.objectives import kl, ratios, surrogates, weights
from jaxrl_llm.types import Credit, Metrics, Rollouts, State, Views, mean_of

PAPER = Paper(
    title="DeepSeekMath: Group Relative Policy Optimization (with Dr.GRPO, DAPO, BNPO)",
    arxiv="2402.03300",
    axis="advantage",
    confidence="code",
    cost="a forward of the reference when beta > 0",
)


@dataclass(frozen=True)
class Config:
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None  # c > 1: the loss of a token with A < 0 is at most -c A
    delta: float | None = None  # two-sided clip of the unclipped ratio, > 1 + clip_high
    log_ratio_limit: float | None = None  # clamp of logp - old_logp (verl: 20), not in the papers
    scale: Literal["group", "batch", "none", "bnpo"] = "group"
    ddof: int = 1
    eps: float = 1e-6
    spread_tol: float = group.SPREAD_TOL
    singleton: Literal["zero", "raw"] = "zero"  # a group of one: advantage 0, or its reward (verl)
    reward_low: float = 0.0  # bnpo: the rewards' range
    reward_high: float = 1.0
    aggregation: weights.Aggregation = "seq-mean-token-mean"
    max_length: int | None = None  # divisor of seq-mean-token-sum-norm; none: rollout.max_new
    count_empty: bool = False
    beta: float = 0.0  # KL to the reference in the loss
    kl_kind: kl.Kind = "k3"
    kl_ratio: bool = False  # multiply the KL estimate by the ratio (TRL's bias correction)
    overlong_filter: bool = False  # truncated rows leave the loss
    dynamic_sampling: bool = False  # replace prompts whose rewards all agree
    max_draws: int = 10  # batches of prompts to try before giving up

    def __post_init__(self):
        check_clip(self.clip_low, self.clip_high, self.dual_clip, self.delta)
        expect_one_of("scale", self.scale, ("group", "batch", "none", "bnpo"))
        expect_one_of("singleton", self.singleton, ("zero", "raw"))
        expect_one_of("aggregation", self.aggregation, weights.AGGREGATIONS)
        expect_one_of("kl_kind", self.kl_kind, kl.KINDS)
        expect(self.beta >= 0, "beta", self.beta, "at least 0")
        expect(self.beta > 0 or not self.kl_ratio, "kl_ratio", self.kl_ratio, "false without a KL term (beta=0)")
        constant = self.aggregation == "seq-mean-token-sum-norm"
        expect(constant or self.max_length is None, "max_length", self.max_length, f"none with {self.aggregation}")
        expect(self.reward_high > self.reward_low, "reward_high", self.reward_high, f"more than {self.reward_low}")
        expect(self.max_draws >= 1, "max_draws", self.max_draws, "at least 1")


def advantage(config: Config, rows: Rollouts):
    """[B] advantages by the configured scale."""
    if config.scale == "bnpo":
        return group.bnpo(
            rows.score, rows.group, rows.counted, config.reward_low, config.reward_high, config.spread_tol
        )
    return group.normalized(
        rows.score,
        rows.group,
        rows.counted,
        config.scale,
        config.ddof,
        config.eps,
        config.spread_tol,
        config.singleton,
    )


def build(config: Config) -> Algorithm:
    def plan(state: State) -> Plan:
        if not config.dynamic_sampling:
            return Plan()
        from jaxrl_llm.rollout import collectors  # the host side of the house is needed only here

        return Plan(collector=collectors.dynamic(config.max_draws))

    def credit(state: State, rows: Rollouts, key: jax.Array) -> Credit:
        return Credit(per_token(advantage(config, rows), rows))

    def trained(rows: Rollouts):
        return overlong.without_truncated(rows.trained, rows.truncated) if config.overlong_filter else rows.trained

    def weigh(state: State, rows: Rollouts, credit: Credit) -> Credit:
        return weigh_by(
            credit,
            weights.aggregation(config.aggregation, trained(rows), config.max_length, config.count_empty, rows.counted),
        )

    def loss(state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[jax.Array, Metrics]:
        mask = trained(rows)
        ratio = ratios.token(views.logp, rows.old_logp, mask, config.log_ratio_limit)
        policy = surrogates.clipped(
            ratio, credit.advantage, mask, config.clip_low, config.clip_high, config.dual_clip, config.delta
        )
        total = weights.weighted_sum(policy.loss, credit.weight)
        metrics = clipped_metrics(policy, ratio, mask, credit.weight)
        if config.beta:
            token_kl = kl.estimate(
                config.kl_kind, views.logp, rows.extras["ref_logp"], mask, ratio if config.kl_ratio else None
            )
            total += config.beta * weights.weighted_sum(token_kl, credit.reg_weight)
            metrics["kl"] = mean_of(token_kl, mask)
        return total, metrics

    return Algorithm(
        name="grpo",
        config=config,
        init=no_state,
        plan=plan,
        credit=credit,
        loss=loss,
        weigh=weigh,
        needs=Needs(
            rescore=("ref_logp",) if config.beta else (),
            min_group=1 if config.singleton == "raw" else 2,
        ),
        couples="row",
    )
