"""Soft Adaptive Policy Optimization, arXiv 2511.20347. Axis: the trust region, a smooth gate instead of a clip.

    f(r; tau) = (4 / tau) sigmoid(tau (r - 1)),    tau = tau_pos where A > 0, else tau_neg
    L         = mean_i mean_t -f(r_t; tau) A

df/dr = sech^2(tau (r - 1) / 2) is 1 on policy, falls off on both sides of it and is never 0; faster where A < 0, as tau_neg is larger.
So the gradient is that of unclipped GRPO on policy, and a discounted one off policy. f(1) = 2 / tau: the value at r = 1 is not
-mean A, only the gradient is normalised. f is a function of r already; it is not multiplied by r again.

A is the group-normalised advantage of GRPO. Completions without trained tokens are not counted in the mean.
Our choices: ddof 1, eps 1e-6, `spread_tol`; log ratios are clamped to +-20 as in verl, where the gate is flat in any case.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.advantages import group
from jaxrl_llm.algorithms import Paper
from jaxrl_llm.algorithms.base import Algorithm, expect, group_method
from jaxrl_llm.objectives import ratios, weights
from jaxrl_llm.types import Credit, Metrics, Rollouts, State, Views, mean_of

LOG_RATIO_LIMIT = 20.0

PAPER = Paper(
    title="Soft Adaptive Policy Optimization",
    arxiv="2511.20347",
    axis="trust region",
    confidence="code",
)


@dataclass(frozen=True)
class Config:
    tau_pos: float = 1.0
    tau_neg: float = 1.05
    ddof: int = 1
    eps: float = 1e-6
    spread_tol: float = group.SPREAD_TOL

    def __post_init__(self):
        expect(self.tau_pos > 0, "tau_pos", self.tau_pos, "more than 0")
        expect(self.tau_neg > 0, "tau_neg", self.tau_neg, "more than 0")


def gate(ratio: Float[Array, "*B"], tau: float | Float[Array, "*B"]) -> Float[Array, "*B"]:
    """f(r; tau) = (4 / tau) sigmoid(tau (r - 1))."""
    return 4 / tau * jax.nn.sigmoid(tau * (ratio - 1))


def gate_weight(ratio: Float[Array, "*B"], tau: float | Float[Array, "*B"]) -> Float[Array, "*B"]:
    """df/dr = sech^2(tau (r - 1) / 2), what multiplies r A grad logp."""
    p = jax.nn.sigmoid(tau * (ratio - 1))
    return 4 * p * (1 - p)


def build(config: Config) -> Algorithm:
    def loss(state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[jax.Array, Metrics]:
        mask = rows.trained
        advantage = jnp.where(mask, credit.advantage, 0)
        ratio = ratios.token(views.logp, rows.old_logp, mask, LOG_RATIO_LIMIT)
        tau = jnp.where(advantage > 0, config.tau_pos, config.tau_neg)
        total = weights.weighted_sum(-gate(ratio, tau) * advantage, credit.weight)
        return total, {
            "ratio/mean": mean_of(ratio, mask),
            "gate/positive": mean_of(gate_weight(ratio, tau), mask & (advantage > 0)),
            "gate/negative": mean_of(gate_weight(ratio, tau), mask & (advantage < 0)),
        }

    return group_method("sapo", config, loss)
