"""RiskPO: Risk-based Policy Optimization via Verifiable Reward for LLM Post-Training. arXiv 2510.00911.

Axis: the baseline. Consecutive prompts are bundled; R_j sums one answer's reward from each, and is judged against two tracked
quantiles of such scores instead of a group's mean (`advantages.risk`):

    rvar_j = (R_j - q_lo)^+ - (R_j - q_hi)^+ + (q_lo - q_hi),    cvar_j = -(q_lo - R_j)^+
    a_j    = (w cvar_j / lo + rvar_j / (hi - lo)) / (w + 1)      over the std of the block's scores
    q     <- q + lr_q (level - share of R_j < q)                 after a step; at first that step's quantiles
    L      = token-mean of PPO's clipped loss, dual clip 3       or `level=sequence`: mean over rows, s = exp(mean_t log r_t)

With the natural baseline no advantage is positive: good bundles get 0, which is intended. An all-wrong prompt still learns through
its bundle. The first step uses each block's own quantiles.

The code is followed where the paper differs, but for one thing: its tracked quantiles never reach the next step, so it always uses
the block's (`q_source=block`); the default is the paper's tracking. `weighting=paper` is a = (1 + omega) cvar + rvar.
The paper shuffles the answers of each prompt; they are exchangeable, so here the j-th is the j-th sampled.
Our choices: a std of at most 1e-3 counts as 1 (the code has the rule for prompts only), `row_id` orders the answers.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.advantages import group, risk
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
    flat_plan,
    per_token,
    row_mean,
    token_mean,
)
from jaxrl_llm.objectives import ratios, surrogates
from jaxrl_llm.objectives.weights import weighted_sum
from jaxrl_llm.types import Credit, Memory, Metrics, Rollouts, State, Views, mean_of

PAPER = Paper(
    title="RiskPO: Risk-based Policy Optimization via Verifiable Reward for LLM Post-Training",
    arxiv="2510.00911",
    axis="advantage",
    confidence="code",
    state="two quantiles of bundle scores",
)


@dataclass(frozen=True)
class Config:
    bundle: int = 5  # prompts of a bundle
    lo: float = 0.2  # levels of the quantiles
    hi: float = 0.8
    w: float = 1.5  # tail weight with weighting=code
    omega: float = 0.5  # tail weight with weighting=paper
    weighting: risk.Weighting = "code"
    natural_baseline: bool = True  # false (the preset for DAPO-Math): without + (q_lo - q_hi)
    normalize: bool = True
    credit: risk.Share = "uniform"  # what a row gets of its bundle's advantage
    q_source: Literal["tracked", "block"] = "tracked"
    lr_q: float = 0.1
    level: Literal["token", "sequence"] = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = 3.0  # of level=token

    def __post_init__(self):
        expect(self.bundle >= 1, "bundle", self.bundle, "at least 1")
        expect(0 < self.lo < self.hi < 1, "lo", self.lo, f"more than 0, less than hi={self.hi}, and that less than 1")
        expect(self.w >= 0, "w", self.w, "at least 0")
        expect(self.omega >= 0, "omega", self.omega, "at least 0")
        expect_one_of("weighting", self.weighting, ("code", "paper"))
        expect_one_of("credit", self.credit, ("uniform", "std", "sum-mean"))
        expect_one_of("q_source", self.q_source, ("tracked", "block"))
        expect(0 < self.lr_q <= 1, "lr_q", self.lr_q, "more than 0, at most 1")
        expect_one_of("level", self.level, ("token", "sequence"))
        check_clip(self.clip_low, self.clip_high, self.dual_clip)


def bundled(config: Config, rows: Rollouts) -> risk.Bundles:
    return risk.bundles(rows.score, rows.group, rows.counted, rows.row_id, config.bundle)


def advantage(config: Config, state: State, rows: Rollouts) -> Float[Array, "B"]:
    """Each row's share of its bundle's advantage."""
    b = bundled(config, rows)
    own = jnp.stack([risk.quantile(b.score, b.block, b.first, level) for level in (config.lo, config.hi)])
    tracked = state["quantiles"].astype(own.dtype)[:, None]
    q_low, q_high = own if config.q_source == "block" else jnp.where(state["seen"], tracked, own)
    value = risk.mixed_value(
        *(b.score, q_low, q_high, config.lo, config.hi),
        w=config.w,
        omega=config.omega,
        weighting=config.weighting,
        natural_baseline=config.natural_baseline,
    )
    if config.normalize:
        value = value / risk.divisor(group.statistics(b.score, b.block, b.first).std)
    return risk.to_rows(value, b, rows.score, rows.group, rows.counted, config.credit)


def tracked(config: Config, state: State, rows: Rollouts) -> State:
    """The state after a step with these rows; that of before when none counts."""
    b = bundled(config, rows)
    one = jnp.zeros_like(b.block)  # all scores of the step are one segment
    levels = jnp.array([config.lo, config.hi], b.score.dtype)
    first = jnp.stack([risk.quantile(b.score, one, b.first, level)[0] for level in (config.lo, config.hi)])
    old = state["quantiles"].astype(b.score.dtype)
    below = jnp.where(b.first, b.score < old[:, None], 0).sum(-1) / jnp.maximum(b.first.sum(), 1)
    quantiles = jnp.where(state["seen"], old + config.lr_q * (levels - below), first)
    new = {"quantiles": quantiles.astype(jnp.float32), "seen": jnp.ones((), bool)}
    return jax.tree.map(lambda x, y: jnp.where(jnp.any(b.first), x, y), new, state)


def build(config: Config) -> Algorithm:
    tokens = config.level == "token"

    def init() -> State:
        return {"quantiles": jnp.zeros(2, jnp.float32), "seen": jnp.zeros((), bool)}

    def credit(state: State, rows: Rollouts, key: jax.Array) -> Credit:
        return Credit(per_token(advantage(config, state, rows), rows))

    def loss(state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[jax.Array, Metrics]:
        mask = rows.trained
        ratio = (ratios.token if tokens else ratios.sequence)(views.logp, rows.old_logp, mask)
        policy = surrogates.clipped(
            *(ratio, credit.advantage, mask, config.clip_low, config.clip_high),
            dual_clip=config.dual_clip if tokens else None,
        )
        metrics = clipped_metrics(policy, ratio, mask, credit.weight)
        for name, q in zip(("low", "high"), state["quantiles"]):
            metrics[f"quantile/{name}"] = mean_of(jnp.broadcast_to(q, rows.counted.shape), rows.counted)
        return weighted_sum(policy.loss, credit.weight), metrics

    def observe(
        state: State, memory: Memory, rows: Rollouts, credit: Credit, report: Report, views: ViewsFn
    ) -> tuple[State, Memory]:
        return tracked(config, state, jax.tree.map(jnp.asarray, rows)), memory

    return Algorithm(
        name="riskpo",
        config=config,
        init=init,
        plan=flat_plan,
        credit=credit,
        loss=loss,
        weigh=token_mean if tokens else row_mean,
        observe=observe,
        needs=Needs(min_group=2),
        couples="row",
    )
