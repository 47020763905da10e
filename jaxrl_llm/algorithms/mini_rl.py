"""MiniRL: Stabilizing Reinforcement Learning with LLMs, arXiv 2512.01374. Axis: the ratio, as two factors treated apart.

    pi_theta / mu = (pi_old / mu) * (pi_theta / pi_old)               sampler's mismatch, times staleness
    w_t = min(exp(old_logp_t - sampler_logp_t), is_cap)               corrects the first
    r_t = exp(logp_t - old_logp_t)
    M_t = 0 where A > 0 and r_t > 1 + clip_high, or A < 0 and r_t < 1 - clip_low, else 1     bounds the second
    A   = score - mean of the group
    L   = -mean over rows of sum_t M_t w_t r_t A logp_t               M, w and r are constants

Why the token sum, without a division by the length: the true objective weighs a completion's reward by prod_t pi_theta / mu. With
pi_theta / mu = 1 + d_t the gradient of that product is, to first order in d, the gradient of sum_t (pi_theta / mu)_t. So the
loss is right as long as both factors stay near 1. With experts, `learner.routing_replay` keeps them there (training/routing.py): "old"
(R2) changes nothing in the first minibatch of a batch and holds staleness down, "rollout" (R3) holds down both, but
trains another policy from the start. The paper's advice: one minibatch per batch: as it is; two: with clip and R2; four or
more: with clip and R3.

On the first minibatch r = 1, and where the sampler equals the learner too, L is REINFORCE with a mean baseline. Without `clip_low` and
`clip_high`, M is 1; `use_is=false` has w = 1, `length_norm=true` divides a row's sum by its length (the paper's ablations).
form=ratio: -M w exp(logp - old_logp) A, which has the same gradient and another value.
w is 1 for tokens nobody sampled here (given completions) or whose sampler_logp is not a number; rows without trained tokens are not
counted. With learner.old_logp=sampler w knows of truncated sampling only.
Our choices: is_cap 5 (recalled, not checked against the paper), A without a standard deviation (likewise), `spread_tol`.
"""

import warnings
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from jaxrl_llm.advantages import group
from jaxrl_llm.algorithms import Paper
from jaxrl_llm.algorithms.base import (
    Algorithm,
    Needs,
    check_clip,
    clipped_metrics,
    expect,
    expect_one_of,
    flat_plan,
    no_state,
    per_token,
    weigh_by,
)
from jaxrl_llm.objectives import ratios, surrogates, weights
from jaxrl_llm.types import CURRENT, REPLAY, Credit, Metrics, Rollouts, State, Views, mean_of

PAPER = Paper(
    title="Stabilizing Reinforcement Learning with LLMs: Formulation and Practices (MiniRL)",
    arxiv="2512.01374",
    axis="ratio",
    confidence="paper",
)


@dataclass(frozen=True)
class Config:
    clip_low: float | None = 0.2  # of the staleness ratio; none, with clip_high: no mask
    clip_high: float | None = 0.27
    use_is: bool = True  # weigh by the sampler's mismatch
    is_cap: float = 5.0  # largest such weight
    length_norm: bool = False  # mean over a row's tokens instead of their sum
    form: Literal["logp", "ratio"] = "logp"  # what is differentiated: logp, or the ratio itself
    spread_tol: float = group.SPREAD_TOL

    def __post_init__(self):
        both = (self.clip_low is None) == (self.clip_high is None)
        expect(both, "clip_high", self.clip_high, "both clip_low and clip_high, or neither")
        if self.clip_low is not None and self.clip_high is not None:
            check_clip(self.clip_low, self.clip_high)
        expect(self.is_cap >= 1, "is_cap", self.is_cap, "at least 1")
        expect_one_of("form", self.form, ("logp", "ratio"))


def mismatch(rows: Rollouts) -> jax.Array:
    """[B, T] pi_old / mu of the tokens this run's policies sampled; 1 for others and where sampler_logp is unknown."""
    if rows.sampler_logp is None:
        warnings.warn("mini_rl: rows have no sampler_logp; they are taken to be sampled by the learner", stacklevel=2)
        return jnp.ones_like(rows.old_logp)
    sampled = rows.trained & ((rows.source == CURRENT) | (rows.source == REPLAY))[:, None]
    return ratios.token(rows.old_logp, rows.sampler_logp, sampled & jnp.isfinite(rows.sampler_logp))


def build(config: Config) -> Algorithm:
    def credit(state: State, rows: Rollouts, key: jax.Array) -> Credit:
        advantage = group.normalized(rows.score, rows.group, rows.counted, "none", spread_tol=config.spread_tol)
        return Credit(per_token(advantage, rows))

    def weigh(state: State, rows: Rollouts, credit: Credit) -> Credit:
        rule = weights.seq_mean_token_mean if config.length_norm else weights.seq_mean_token_sum
        return weigh_by(credit, rule(rows.trained))

    def loss(state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[jax.Array, Metrics]:
        mask, advantage = rows.trained, credit.advantage
        ratio = ratios.token(views.logp, rows.old_logp, mask)
        stale = jax.lax.stop_gradient(ratio)
        if config.form == "ratio":
            token = surrogates.unclipped(ratio, advantage, mask)
        else:
            token = stale * surrogates.reinforce(views.logp, advantage, mask)
        raw = mismatch(rows) if config.use_is else jnp.ones_like(rows.old_logp)
        w = jnp.minimum(raw, config.is_cap)
        low = high = jnp.zeros_like(mask)
        if config.clip_low is not None and config.clip_high is not None:
            _, low, high = surrogates.clipped(stale, advantage, mask, config.clip_low, config.clip_high)
        token = jnp.where(low | high, 0, w * token)
        metrics = clipped_metrics(surrogates.Clipped(token, low, high), stale, mask, credit.weight)
        if config.use_is:
            metrics |= {
                "sampling/importance_mean": mean_of(w, mask),
                "sampling/importance_clipped": mean_of(raw > config.is_cap, mask),
            }
        return weights.weighted_sum(token, credit.weight), metrics

    return Algorithm(
        name="mini_rl",
        config=config,
        init=no_state,
        plan=flat_plan,
        credit=credit,
        loss=loss,
        weigh=weigh,
        needs=Needs(min_group=2, importance=not config.use_is),
        couples="row",
    )
