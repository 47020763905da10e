"""EPO: Entropy-regularized Policy Optimization for LLM Agents Reinforcement Learning. arXiv 2509.22576.

Axis: the entropy. A bonus, and a penalty for token entropies H_t outside a corridor around what entropy used to be:

    L      = L_base - lam (L_H - beta_k L_smooth)
    L_H    = agg(H),   L_smooth = agg(alpha P)
    P_t    = relu(kappa_l h - H_t) + relu(H_t - kappa_r h)      h: mean over all steps so far of the batch's mean entropy
    beta_k = 1 + exp(-gamma k / floor(K / 2))                   k: RL steps done, K: `steps`

L_base is GRPO's clipped loss with a dual clip and a token mean; PPO with a critic, the paper's other base, is not here. h is of
the policy that sampled, a constant; without a step before there is no penalty. agg is the token mean, or over rows that are
turns the mean over trajectories of the mean over turns of the token mean (`traj-turn-token`; rows then bring "traj").

The released code differs, and each difference is a setting: its penalty is constant outside the corridor (`kind=indicator`: the
value changes, the update never does), its weight falls below 1 in the course (`schedule=code`, with K for its fixed 150
epochs), and it keeps a reference for each turn (`turns`, rows bring "turn"; its references also hold the step under way,
and its penalty leaves out microbatches of early turns: not copied). Equations are those of version 2.
Our choices: GRPO's ddof 1, eps 1e-6 and `spread_tol`; turns past `turns` share the last reference.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrl_llm.advantages import group
from jaxrl_llm.algorithms import Paper
from jaxrl_llm.algorithms.base import (
    Algorithm,
    Needs,
    Report,
    ViewsFn,
    check_clip,
    clipped_metrics,
    expect,
    expect_one_of,
    group_method,
    weigh_by,
)
from jaxrl_llm.objectives import ratios, surrogates, weights
from jaxrl_llm.types import Credit, Memory, Metrics, Rollouts, State, Views, mean_of

PAPER = Paper(
    title="EPO: Entropy-regularized Policy Optimization for LLM Agents Reinforcement Learning",
    arxiv="2509.22576",
    axis="entropy",
    confidence="code",
    cost="entropies of the old and current policy",
    state="sum and number of past mean entropies, steps",
)


@dataclass(frozen=True)
class Config:
    lam: float = 0.001  # weight of bonus and penalty
    alpha: float = 0.05  # of the penalty (ScienceWorld; ALFWorld 0.1)
    kappa_l: float = 0.0  # the corridor, as factors of h
    kappa_r: float = 2.0
    gamma: float = 3.0  # how fast beta_k falls
    steps: int = 125  # K, the RL steps of the run
    kind: Literal["hinge", "indicator"] = "hinge"
    schedule: Literal["paper", "code"] = "paper"
    aggregation: Literal["token-mean", "traj-turn-token"] = "token-mean"  # of bonus and penalty
    turns: int = 1  # references: one for all turns, or one for each turn
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = 3.0
    ddof: int = 1
    eps: float = 1e-6
    spread_tol: float = group.SPREAD_TOL

    def __post_init__(self):
        expect(self.lam >= 0, "lam", self.lam, "at least 0")
        expect(self.alpha >= 0, "alpha", self.alpha, "at least 0")
        expect(0 <= self.kappa_l <= self.kappa_r, "kappa_l", self.kappa_l, f"0 to kappa_r={self.kappa_r}")
        expect(self.gamma >= 0, "gamma", self.gamma, "at least 0")
        expect(self.steps >= 2, "steps", self.steps, "the RL steps of the run, at least 2")
        expect_one_of("kind", self.kind, ("hinge", "indicator"))
        expect_one_of("schedule", self.schedule, ("paper", "code"))
        expect_one_of("aggregation", self.aggregation, ("token-mean", "traj-turn-token"))
        expect(self.turns >= 1, "turns", self.turns, "at least 1")
        check_clip(self.clip_low, self.clip_high, self.dual_clip)


def smoothing_weight(config: Config, step: Array) -> Float[Array, ""]:
    """beta_k after `step` RL steps."""
    half = config.steps // 2
    k = jnp.asarray(step, jnp.result_type(float))
    if config.schedule == "paper":
        return 1 + jnp.exp(-config.gamma * k / half)
    return jnp.where(k <= half, 1 - 0.2 * (1 - jnp.exp(-2 * k / half)), 0.8 * jnp.exp(-3 * (k - half) / half))


def penalty(
    config: Config, entropy: Float[Array, "B T"], h: Float[Array, "B 1"], on: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """alpha P on the tokens that are `on`, 0 elsewhere; the gradient flows through the entropy only."""
    below, above = config.kappa_l * h - jnp.where(on, entropy, h), jnp.where(on, entropy, h) - config.kappa_r * h
    if config.kind == "hinge":
        outside = jax.nn.relu(below) + jax.nn.relu(above)
    else:
        outside = ((below > 0) | (above > 0)).astype(entropy.dtype)
    return config.alpha * jnp.where(on, outside, 0)


def build(config: Config) -> Algorithm:
    nested = config.aggregation == "traj-turn-token"

    def init() -> State:
        def zeros():
            return jnp.zeros(config.turns, jnp.float32)

        return {"sum": zeros(), "count": zeros(), "step": jnp.zeros((), jnp.int32)}

    def turn(rows: Rollouts) -> Array:
        own = jnp.asarray(rows.extras["turn"]) if config.turns > 1 else jnp.zeros_like(rows.group)
        return jnp.clip(own, 0, config.turns - 1)

    def weigh(state: State, rows: Rollouts, credit: Credit) -> Credit:
        mean = weights.token_mean(rows.trained)
        return weigh_by(
            credit, mean, weights.mean_over_groups(rows.trained, rows.extras["traj"], True) if nested else mean
        )

    def loss(state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[jax.Array, Metrics]:
        mask = rows.trained
        ratio = ratios.token(views.logp, rows.old_logp, mask)
        policy = surrogates.clipped(ratio, credit.advantage, mask, config.clip_low, config.clip_high, config.dual_clip)
        total = weights.weighted_sum(policy.loss, credit.weight)
        metrics = clipped_metrics(policy, ratio, mask, credit.weight)
        past = (state["count"] > 0)[turn(rows)][:, None]
        h = (state["sum"] / jnp.maximum(state["count"], 1)).astype(views.entropy.dtype)[turn(rows)][:, None]
        outside = penalty(config, views.entropy, h, mask & past)
        smoothing = smoothing_weight(config, state["step"]) * weights.weighted_sum(outside, credit.reg_weight)
        total -= config.lam * (weights.weighted_sum(views.entropy, credit.reg_weight) - smoothing)
        metrics |= {"entropy": mean_of(views.entropy, mask), "entropy/outside": mean_of(outside > 0, mask)}
        return total, metrics

    def observe(
        state: State, memory: Memory, rows: Rollouts, credit: Credit, report: Report, views: ViewsFn
    ) -> tuple[State, Memory]:
        mask = rows.trained & rows.stat[:, None]
        entropy = jnp.where(mask, rows.extras["old_entropy"], 0).sum(-1)
        total = jax.ops.segment_sum(entropy, turn(rows), config.turns)
        tokens = jax.ops.segment_sum(mask.sum(-1), turn(rows), config.turns)
        return {
            "sum": state["sum"] + (total / jnp.maximum(tokens, 1)).astype(jnp.float32),
            "count": state["count"] + (tokens > 0),
            "step": state["step"] + 1,
        }, memory

    return group_method(
        "epo",
        config,
        loss,
        init=init,
        weigh=weigh,
        observe=observe,
        needs=Needs(
            loss=("logp", "entropy"),
            rescore=("old_entropy",),
            row_extras=(*(("traj",) if nested else ()), *(("turn",) if config.turns > 1 else ())),
            min_group=2,
        ),
    )
