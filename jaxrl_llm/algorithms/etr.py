"""Outcome-Guided Elastic Trust Regions, arXiv 2601.03723. Axis: the trust region, a clip radius of its own for every token.

    v_g      = 4 Var_pop(R in its group, scaled to 0..1)
    radius_t = min(radius (1 + micro |A_t|) (1 + macro v_g), cap)          for the lower and the upper radius each
    L        = mean_i mean_t -min(r_t A_t, clip(r_t, 1 - radius_low_t, 1 + radius_high_t) A_t)

Wider where an outcome says more: for a large advantage, and for prompts solved about half the time (v_g is 4 p (1 - p) for binary
rewards). The rest is GRPO; with micro = macro = 0 it is GRPO. macro = 0 alone is a fair reading of the abstract, as normalised
advantages are largest on average at p = 1/2. A is group-normalised; completions without trained tokens are not counted.

Only the abstract could be read. Our choices: both scaling functions and every default but GRPO's radii; ddof 1, eps 1e-6,
`spread_tol`.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.advantages import group
from jaxrl_llm.algorithms import Paper
from jaxrl_llm.algorithms.base import Algorithm, check_clip, clipped_metrics, expect, group_credit, group_method
from jaxrl_llm.objectives import ratios, surrogates, weights
from jaxrl_llm.types import Credit, Metrics, Rollouts, State, Views, mean_of

PAPER = Paper(
    title="Outcome-Guided Elastic Trust Regions", arxiv="2601.03723", axis="trust region", confidence="abstract"
)


@dataclass(frozen=True)
class Config:
    clip_low: float = 0.2
    clip_high: float = 0.2
    micro: float = 0.5  # growth of the radius with |A|
    macro: float = 0.5  # growth of the radius with the group's reward variance
    cap: float = 0.5  # largest radius
    reward_low: float = 0.0  # the rewards' range
    reward_high: float = 1.0
    ddof: int = 1
    eps: float = 1e-6
    spread_tol: float = group.SPREAD_TOL

    def __post_init__(self):
        check_clip(self.clip_low, self.clip_high)
        expect(self.micro >= 0, "micro", self.micro, "at least 0")
        expect(self.macro >= 0, "macro", self.macro, "at least 0")
        least = max(self.clip_low, self.clip_high)
        expect(least <= self.cap < 1, "cap", self.cap, f"at least clip_low and clip_high, {least}, and less than 1")
        expect(self.reward_high > self.reward_low, "reward_high", self.reward_high, f"more than {self.reward_low}")


def learnability(config: Config, rows: Rollouts) -> Float[Array, "B"]:
    """v_g of each row's group: 0 where all rewards agree, 1 where half of them are the lowest and half the highest."""
    scaled = (rows.score - config.reward_low) / (config.reward_high - config.reward_low)
    found = group.statistics(scaled, rows.group, rows.counted, ddof=0, spread_tol=config.spread_tol)
    return jnp.where(rows.counted & ~found.flat, 4 * found.std**2, 0)


def radius(config: Config, base: float, advantage: Float[Array, "B T"], v: Float[Array, "B"]) -> Float[Array, "B T"]:
    """The clip radius of every token."""
    grown = base * (1 + config.micro * jnp.abs(advantage)) * (1 + config.macro * v[:, None])
    return jnp.minimum(grown, config.cap)


def build(config: Config) -> Algorithm:
    normalized = group_credit(config.ddof, config.eps, config.spread_tol)

    def credit(state: State, rows: Rollouts, key: jax.Array) -> Credit:
        return replace(normalized(state, rows, key), extras={"learnability": learnability(config, rows)})

    def loss(state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[jax.Array, Metrics]:
        mask, v = rows.trained, credit.extras["learnability"]
        advantage = jnp.where(mask, credit.advantage, 0)
        low, high = (radius(config, base, advantage, v) for base in (config.clip_low, config.clip_high))
        ratio = ratios.token(views.logp, rows.old_logp, mask)
        policy = surrogates.clipped(ratio, advantage, mask, low, high)
        return weights.weighted_sum(policy.loss, credit.weight), {
            **clipped_metrics(policy, ratio, mask, credit.weight),
            "clip_radius/low": mean_of(low, mask),
            "clip_radius/high": mean_of(high, mask),
        }

    return group_method("etr", config, loss, credit=credit)
