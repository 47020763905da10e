"""REINFORCE++, arXiv 2501.03262. Axis: the baseline, taken over the whole batch instead of per prompt; no critic.

Plain (a group may have one completion):
    rew_t = -beta (old_logp_t - ref_logp_t), plus the score on the last trained token
    G_t   = sum_{k >= t} gamma^(k-t) rew_k                     trained tokens only
    A     = (G - mean) / sqrt(var + eps)                       over all trained tokens of the batch, ddof 1
    L     = token mean of PPO's clipped loss

baseline=true (REINFORCE++-baseline):
    a_i = score_i - group mean (score_i when alone in its group), on every trained token; A = whitened a
    L   = token mean of PPO's clipped loss + beta * k2(pi || ref)

Whitening is over tokens, so long completions weigh more in mean and std (verl; the paper's text normalises over
completions). With fewer than two trained tokens advantages are 0; so they are when all returns are equal.
Our choices: the default beta (the spec gives 1e-3 to 1e-2 for the baseline version), `spread_tol`.
"""

from dataclasses import dataclass

import jax

from jaxrl_llm.advantages import gae, group
from jaxrl_llm.advantages.whiten import whiten
from jaxrl_llm.algorithms import Paper
from jaxrl_llm.algorithms.base import (
    Algorithm,
    Needs,
    check_clip,
    clipped_metrics,
    expect,
    flat_plan,
    no_state,
    per_token,
)
from jaxrl_llm.objectives import kl, ratios, surrogates, weights
from jaxrl_llm.types import Credit, Metrics, Rollouts, State, Views, mean_of

PAPER = Paper(
    title="REINFORCE++: Stabilizing Critic-Free Policy Optimization with Global Advantage Normalization",
    arxiv="2501.03262",
    axis="advantage",
    confidence="code",
    cost="a forward of the reference when beta > 0",
)


@dataclass(frozen=True)
class Config:
    baseline: bool = False  # subtract the group mean first; KL moves from the reward to the loss
    beta: float = 0.01  # KL to the reference
    gamma: float = 1.0
    clip_low: float = 0.2
    clip_high: float = 0.2
    eps: float = 1e-8  # inside the square root of the whitening
    spread_tol: float = group.SPREAD_TOL

    def __post_init__(self):
        check_clip(self.clip_low, self.clip_high)
        expect(self.beta >= 0, "beta", self.beta, "at least 0")
        expect(0 < self.gamma <= 1, "gamma", self.gamma, "more than 0, at most 1")
        expect(
            not self.baseline or self.gamma == 1, "gamma", self.gamma, "1 with baseline=true, which discounts nothing"
        )


def returns(config: Config, rows: Rollouts) -> jax.Array:
    """[B, T] rewards-to-go of the plain version, before whitening."""
    mask = rows.trained
    token_kl = ratios.log_ratio(rows.old_logp, rows.extras["ref_logp"], mask) if config.beta else None
    return gae.rewards_to_go(gae.token_rewards(rows.score, mask, token_kl, config.beta), mask, config.gamma)


def build(config: Config) -> Algorithm:
    def credit(state: State, rows: Rollouts, key: jax.Array) -> Credit:
        if config.baseline:
            centred = group.normalized(
                rows.score,
                rows.group,
                rows.counted,
                scale="none",
                spread_tol=config.spread_tol,
                singleton="raw",
            )
            raw = per_token(centred, rows)
        else:
            raw = returns(config, rows)
        return Credit(whiten(raw, rows.trained & rows.stat[:, None], eps=config.eps, too_few="zero"))

    def loss(state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[jax.Array, Metrics]:
        mask = rows.trained
        ratio = ratios.token(views.logp, rows.old_logp, mask)
        policy = surrogates.clipped(ratio, credit.advantage, mask, config.clip_low, config.clip_high)
        total = weights.weighted_sum(policy.loss, credit.weight)
        metrics = clipped_metrics(policy, ratio, mask, credit.weight)
        if config.beta:
            token_kl = kl.estimate("k2", views.logp, rows.extras["ref_logp"], mask)
            metrics["kl"] = mean_of(token_kl, mask)
            if config.baseline:
                total += config.beta * weights.weighted_sum(token_kl, credit.reg_weight)
        return total, metrics

    return Algorithm(
        name="reinforce_pp",
        config=config,
        init=no_state,
        plan=flat_plan,
        credit=credit,
        loss=loss,
        needs=Needs(rescore=("ref_logp",) if config.beta else ()),
        couples="row",
    )
