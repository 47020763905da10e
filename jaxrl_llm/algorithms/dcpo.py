"""Distribution-Centric Policy Optimization, arXiv 2601.12730. Axis: entropy, through the advantage.

(Not "Dynamic Clipping Policy Optimization", arXiv 2509.02333, which shares the acronym.)

    T      = t_high if H <= h0 else t_low                              H: measured entropy of the last step
    rho_it = exp(old_logp_it at temperature T - old_logp_it)           constant; its mean under the policy is 1
    b_i    = 1[R_i > reward_threshold],  p = mean b,  c = min(|h0 - H|, cap)
    alpha  = c / (c + p)
    A'_it  = (1 - alpha) A_i + alpha b_i rho_it                        A_i: GRPO's advantage
    L      = token mean of PPO's clipped loss (dual clip) with A'
    H      <- mean over the step's updates of -mean logp of the sampled tokens

A correct completion of a solved prompt still trains (A_i = 0, alpha b rho > 0). H = h0 gives alpha = 0, exactly GRPO.
Sampling stays at the configured temperature. Our choices: alpha = 1 when nothing was correct (the code divides by zero there;
A' is 0 then unless a group has a spread below the threshold), 0 when c is 0 too; advantage 0 in a group of one; one token mean
per minibatch (the code averages microbatch means); h0 0.5 (the authors' script; 0.25 was best in their sweep).
"""

from dataclasses import dataclass
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.advantages import group
from jaxrl_llm.algorithms import Paper
from jaxrl_llm.algorithms.base import (
    Algorithm,
    Needs,
    Plan,
    Report,
    ViewsFn,
    check_clip,
    clipped_metrics,
    expect,
    per_token,
)
from jaxrl_llm.objectives import ratios, surrogates, weights
from jaxrl_llm.types import Credit, Mean, Memory, Metrics, Rollouts, State, Views, mean_of, metric_value

PAPER = Paper(
    title="DCPO: Distribution-Centric Policy Optimization Dominates Exploration-Exploitation Trade-off",
    arxiv="2601.12730",
    axis="entropy",
    confidence="code",
    cost="a forward at another temperature",
    state="measured entropy",
)


@dataclass(frozen=True)
class Config:
    h0: float = 0.5  # entropy to hold, nats per sampled token
    t_high: float = 1.2
    t_low: float = 0.8
    cap: float = 0.1
    reward_threshold: float = 0.05  # a reward above it is a correct answer
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = 3.0
    ddof: int = 1
    eps: float = 1e-6
    spread_tol: float = group.SPREAD_TOL

    def __post_init__(self):
        check_clip(self.clip_low, self.clip_high, self.dual_clip)
        expect(self.h0 >= 0, "h0", self.h0, "at least 0")
        expect(self.cap >= 0, "cap", self.cap, "at least 0")
        expect(self.t_low > 0, "t_low", self.t_low, "more than 0")
        expect(self.t_high >= self.t_low, "t_high", self.t_high, f"at least t_low = {self.t_low}")


def temperature(config: Config, entropy: jax.Array) -> jax.Array:
    return jnp.where(entropy <= config.h0, config.t_high, config.t_low).astype(jnp.float32)


def mixing_weight(config: Config, entropy: jax.Array, correct: jax.Array) -> jax.Array:
    """alpha, from the measured entropy and the share of correct completions; no division by zero."""
    c = jnp.minimum(jnp.abs(config.h0 - entropy), config.cap)
    return jnp.where(c > 0, c / jnp.where(c > 0, c + correct, 1), 0)


def build(config: Config) -> Algorithm:
    def init() -> State:
        return {"entropy": jnp.zeros((), jnp.float32)}

    def plan(state: State) -> Plan:
        return Plan(score_temperature=temperature(config, state["entropy"]))

    def credit(state: State, rows: Rollouts, key: jax.Array) -> Credit:
        advantage = group.normalized(
            rows.score,
            rows.group,
            rows.counted,
            ddof=config.ddof,
            eps=config.eps,
            spread_tol=config.spread_tol,
        )
        correct = rows.counted & (rows.score > config.reward_threshold)
        share = jnp.sum(correct) / jnp.maximum(jnp.sum(rows.counted), 1)
        alpha = mixing_weight(config, state["entropy"], share)
        rho = ratios.token(rows.extras["old_tempered_logp"], rows.old_logp, rows.trained)
        bonus = jnp.where(rows.trained & correct[:, None], alpha * rho, 0)
        return Credit((1 - alpha) * per_token(advantage, rows) + bonus)

    def loss(state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[jax.Array, Metrics]:
        mask = rows.trained
        ratio = ratios.token(views.logp, rows.old_logp, mask)
        policy = surrogates.clipped(ratio, credit.advantage, mask, config.clip_low, config.clip_high, config.dual_clip)
        metrics = {
            **clipped_metrics(policy, ratio, mask, credit.weight),
            "sampled_entropy": mean_of(-views.logp, mask),
            "measured_entropy": mean_of(state["entropy"]),
        }
        return weights.weighted_sum(policy.loss, credit.weight), metrics

    def observe(
        state: State, memory: Memory, rows: Rollouts, credit: Credit, report: Report, views: ViewsFn
    ) -> tuple[State, Memory]:
        measured = [cast(Mean, m["sampled_entropy"]) for m in report.per_update or (report.metrics,)]
        values = [metric_value(m) for m in measured if float(m.count) > 0]
        if not values:  # nothing trained, nothing measured
            return state, memory
        return {"entropy": jnp.asarray(np.mean(values), jnp.float32)}, memory

    return Algorithm(
        name="dcpo",
        config=config,
        init=init,
        plan=plan,
        credit=credit,
        loss=loss,
        observe=observe,
        needs=Needs(rescore=("old_tempered_logp",), min_group=2),
        couples="row",
    )
