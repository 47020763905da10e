"""Ratio-Variance Regularized Policy Optimization, arXiv 2601.03320 (follow-up 2605.26784). Axis: the trust region.

No clipping: the variance of the ratio, E[(r - 1)^2] (the chi-square divergence, about twice the KL), is constrained to be at
most delta by a Lagrange multiplier.

    r_t    = exp(logp_t - old_logp_t)          against the policy that generated the token, also when replayed
    V      = agg((r - 1)^2)                    center=true: agg(r^2) - agg(r)^2
    L      = -agg(r A) + lam (V - delta)       minimised in the policy
    lam   <- clip(lam + eta (V - delta), lam_min, lam_max)        after every optimizer step

The gradient is that of the effective advantage A - 2 lam (r - 1): it vanishes at r = 1 + A / (2 lam) and turns the ratio back
beyond. Tokens of a group without reward spread have A = 0 and still enter V (`drop_zero_advantage` removes them).

replay > 0 is the off-policy version: each step also trains on `replay` times as many rows from earlier steps, in whole groups
drawn uniformly without replacement from a buffer, with the advantage and old_logp they were collected with. Groups older than
`max_age` steps, then the oldest over `capacity` batches, are evicted. While the buffer is short, padding takes the place.

Only the abstract was available. Chosen by us: the dual step, delta (0.2^2, the variance a PPO clip of 0.2 would allow), lam0,
eta, the bounds of lam, the aggregation, the whole replay protocol with its sizes. eta=0 keeps lam fixed.
"""

from dataclasses import dataclass
from typing import Literal, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import replay
from jaxrl_llm.advantages import group
from jaxrl_llm.algorithms import Paper
from jaxrl_llm.algorithms.base import (
    Algorithm,
    Key,
    Needs,
    Selection,
    expect,
    expect_one_of,
    flat_plan,
    per_token,
    ratio_metrics,
    weigh_by,
    weighted_mean_of,
)
from jaxrl_llm.objectives import ratios, surrogates, weights
from jaxrl_llm.types import REPLAY, Credit, Mean, Memory, Metrics, Rollouts, State, Views, mean_of

PAPER = Paper(
    title="Ratio-Variance Regularized Policy Optimization",
    arxiv="2601.03320",
    axis="trust region",
    confidence="abstract",
    state="multiplier; off-policy: replay buffer",
)


@dataclass(frozen=True)
class Config:
    delta: float = 0.04  # constraint on the ratio's variance
    lam0: float = 1.0
    eta: float = 1.0  # step of the multiplier; 0: fixed
    lam_min: float = 0.0
    lam_max: float = 100.0
    center: bool = False
    aggregation: Literal["token-mean", "seq-mean-token-mean"] = "token-mean"
    drop_zero_advantage: bool = False
    log_ratio_limit: float | None = None  # numerical guard on |log r|; the spec allows 20
    replay: float = 0.0  # replayed rows per fresh row; 0: on-policy
    max_age: int = 4  # steps
    capacity: float = 4.0  # of the buffer, in batches
    ddof: int = 1
    eps: float = 1e-6
    spread_tol: float = group.SPREAD_TOL

    def __post_init__(self):
        expect_one_of("aggregation", self.aggregation, ("token-mean", "seq-mean-token-mean"))
        expect(self.delta >= 0, "delta", self.delta, "at least 0")
        expect(self.eta >= 0, "eta", self.eta, "at least 0")
        expect(0 <= self.lam_min <= self.lam0, "lam_min", self.lam_min, f"0 to lam0 = {self.lam0}")
        expect(self.lam_max >= self.lam0, "lam_max", self.lam_max, f"at least lam0 = {self.lam0}")
        expect(self.replay >= 0, "replay", self.replay, "at least 0")
        expect(self.max_age >= 1, "max_age", self.max_age, "at least 1")
        expect(self.capacity >= self.replay, "capacity", self.capacity, f"at least replay = {self.replay}")


def ratio_variance(ratio: jax.Array, weight: jax.Array, center: bool) -> Mean:
    """V under aggregation weights that sum to 1. Adds over microbatches unless centred."""
    if not center:
        return weighted_mean_of((ratio - 1) ** 2, weight)
    mean, total = weights.weighted_sum(ratio, weight), jnp.sum(weight)
    return Mean(weights.weighted_sum(ratio**2, weight) - mean**2, total)


def build(config: Config) -> Algorithm:
    def init() -> State:
        return {"lam": jnp.asarray(config.lam0, jnp.float32)}

    def credit(state: State, rows: Rollouts, key: Key) -> Credit:
        fresh = group.normalized(
            rows.score,
            rows.group,
            rows.counted,
            ddof=config.ddof,
            eps=config.eps,
            spread_tol=config.spread_tol,
        )
        advantage = per_token(fresh, rows)
        if "advantage" in rows.extras:  # replayed rows bring theirs
            advantage = jnp.where(rows.trained & (rows.source == REPLAY)[:, None], rows.extras["advantage"], advantage)
        return Credit(advantage)

    def trained(rows: Rollouts, credit: Credit) -> jax.Array:
        return rows.trained & (credit.advantage != 0) if config.drop_zero_advantage else rows.trained

    def weigh(state: State, rows: Rollouts, credit: Credit) -> Credit:
        return weigh_by(credit, weights.aggregation(config.aggregation, trained(rows, credit)))

    def loss(state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[jax.Array, Metrics]:
        mask, lam = trained(rows, credit), state["lam"]
        ratio = ratios.token(views.logp, rows.old_logp, mask, config.log_ratio_limit)
        policy_loss = surrogates.unclipped(ratio, credit.advantage, mask)
        variance = ratio_variance(ratio, credit.reg_weight, config.center)
        # variance.count is agg(1): 1 for a whole minibatch, its share for a microbatch, so that splits add up.
        total = weights.weighted_sum(policy_loss, credit.weight) + lam * (variance.sum - config.delta * variance.count)
        turned = credit.advantage * surrogates.effective_advantage(ratio, credit.advantage, lam) < 0
        metrics = {
            "policy_loss": weighted_mean_of(policy_loss, credit.weight),
            "ratio/variance": variance,
            "ratio/turned": mean_of(turned, mask),
            "lam": mean_of(lam),
            **ratio_metrics(ratio, mask),
        }
        return total, metrics

    def tune(state: State, metrics: Metrics) -> State:
        variance = cast(Mean, metrics["ratio/variance"])
        measured = variance.count > 0  # no trained token: no step
        ascent = config.eta * (variance.sum / jnp.where(measured, variance.count, 1) - config.delta)
        lam = jnp.clip(state["lam"] + jnp.where(measured, ascent, 0), config.lam_min, config.lam_max)
        return {"lam": lam.astype(jnp.float32)}

    def select(state: State, memory: Memory, rows: Rollouts, credit: Credit, key: Key) -> Selection:
        step, buffer = int(memory.get("step", 0)), memory.get("replay", {})
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        size, contexts = round(config.replay * len(rows.group)), round(config.replay * len(rows.prompt_length))
        capacity = round(config.capacity * len(rows.prompt_length))
        drawn = replay.draw(buffer, rng, size, contexts)
        mixed, mixed_credit = replay.mix(rows, credit, buffer, drawn, size, contexts)
        buffer = replay.push(buffer, rows, credit, step, capacity, config.max_age)
        return Selection(mixed, mixed_credit, {**memory, "step": np.asarray(step + 1), "replay": buffer})

    return Algorithm(
        name="r2vpo",
        config=config,
        init=init,
        plan=flat_plan,
        credit=credit,
        loss=loss,
        weigh=weigh,
        tune=tune,
        select=select if config.replay else None,
        needs=Needs(min_group=2),
        couples="minibatch" if config.center else "row",
    )
