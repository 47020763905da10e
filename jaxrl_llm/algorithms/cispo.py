"""CISPO: clipped importance weights, from MiniMax-M1, arXiv 2506.13585. Axis: the ratio, which weighs and never clips.

    w_t = sg(clip(r_t, cap_low, cap_high)),    r_t = exp(logp_t - old_logp_t)
    L   = token-mean of -w_t A M_t logp_t

A is the group-normalised advantage of GRPO. The weight is capped instead of the surrogate being clipped, so no token loses its
gradient, and a large ratio of a bad completion stays bounded. M_t is 1, or with `clip_low` and `clip_high` (the paper's
unified form) PPO's mask: 0 where A > 0 and r > 1 + clip_high, or A < 0 and r < 1 - clip_low; without caps the gradient is
then that of PPO's clip. The value is a weighted log-likelihood: compare gradients with other methods, not values.

Caps are bounds of the ratio itself. TRL's `epsilon_high` is `cap_high`; verl clips to [1 - clip_ratio_low, 1 + clip_ratio_high],
which is cap_low 0.8 and cap_high 1.2 with its defaults.
Our choices: cap_high 5 (the paper's value is not known; TRL documents this one), no lower cap, ddof 1, eps 1e-6, `spread_tol`.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxrl_llm.advantages import group
from jaxrl_llm.algorithms import Paper
from jaxrl_llm.algorithms.base import Algorithm, check_clip, clipped_metrics, expect, group_method, weigh_by
from jaxrl_llm.objectives import ratios, surrogates, weights
from jaxrl_llm.types import Credit, Metrics, Rollouts, State, Views

PAPER = Paper(
    title="MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention (CISPO)",
    arxiv="2506.13585",
    axis="ratio",
    confidence="code",
)


@dataclass(frozen=True)
class Config:
    cap_low: float | None = None  # least weight; none: no bound
    cap_high: float | None = 5.0  # largest weight; none: no bound
    clip_low: float | None = None  # with clip_high: PPO's mask on top of the caps
    clip_high: float | None = None
    ddof: int = 1
    eps: float = 1e-6
    spread_tol: float = group.SPREAD_TOL

    def __post_init__(self):
        low, high = self.caps
        expect(0 <= low <= 1, "cap_low", self.cap_low, "0 to 1, or null")
        expect(high >= 1, "cap_high", self.cap_high, "at least 1, or null")
        both = (self.clip_low is None) == (self.clip_high is None)
        expect(both, "clip_high", self.clip_high, "both clip_low and clip_high, or neither")
        if self.clip_low is not None and self.clip_high is not None:
            check_clip(self.clip_low, self.clip_high)

    @property
    def caps(self) -> tuple[float, float]:
        return (
            0.0 if self.cap_low is None else self.cap_low,
            float("inf") if self.cap_high is None else self.cap_high,
        )


def build(config: Config) -> Algorithm:
    cap_low, cap_high = config.caps

    def weigh(state: State, rows: Rollouts, credit: Credit) -> Credit:
        return weigh_by(credit, weights.token_mean(rows.trained))

    def loss(state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[jax.Array, Metrics]:
        mask = rows.trained
        ratio = jax.lax.stop_gradient(ratios.token(views.logp, rows.old_logp, mask))
        token = jnp.clip(ratio, cap_low, cap_high) * surrogates.reinforce(views.logp, credit.advantage, mask)
        low, high = ratio < cap_low, ratio > cap_high
        if config.clip_low is not None and config.clip_high is not None:
            ppo = surrogates.clipped(ratio, credit.advantage, mask, config.clip_low, config.clip_high)
            low, high = ppo.low, ppo.high
            token = jnp.where(low | high, 0, token)
        policy = surrogates.Clipped(token, low, high)
        return weights.weighted_sum(token, credit.weight), clipped_metrics(policy, ratio, mask, credit.weight)

    return group_method("cispo", config, loss, weigh=weigh)
