"""GTPO: Group-relative Trajectory-based Policy Optimization. arXiv 2508.03772. (Not Group Token Policy Optimization, 2508.04349.)

Axis: token weights. Openings and endings that right and wrong answers share are not pushed down by the wrong ones, and
answers of high entropy are dropped; no ratio, clip or reference:

    A_i = R_i - mean_g                          without division by the std
    C_i = the leading and the trailing run of tokens that some right (A > 0) and some wrong (A < 0) answer of the group both
          have there, counted from the beginning and from the own end      (`advantages.conflicts`)
    lambda_it = w if t in C_i and A_i > 0, 0 if t in C_i and A_i < 0, else 1
    delta_i   = 1 if h_init > ln 2, else [H_i <= ln 2]       H_i: the completion's mean entropy, current policy, a constant
    L = -1/B sum_i delta_i (A_i - gamma H_i) / len_i sum_t lambda_it r_it,   r = exp(logp - sg(logp))

r is 1, with the gradient of logp. Groups that agree have A = 0 and are still pushed down by gamma H. h_init is the mean H_i of
the first batch before any update. gamma fits the paper's rewards of up to 20; choose it by the scale of yours.

`divide_by_conflicts` is the released code's division by max(1, longest of the two runs), which the paper has not. Also of the
code and not here: weight w^2 where the runs overlap, and a filter without the h_init test.
Our choices: h_init from the first batch, a tolerance for A = 0 (`spread_tol`), and a token that is not trained ends a run.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrl_llm.advantages import group
from jaxrl_llm.advantages.conflicts import conflicts
from jaxrl_llm.algorithms import Paper
from jaxrl_llm.algorithms.base import (
    Algorithm,
    Needs,
    Report,
    ViewsFn,
    expect,
    flat_plan,
    per_token,
    weigh_by,
    weighted_mean_of,
)
from jaxrl_llm.objectives import ratios, surrogates, weights
from jaxrl_llm.types import Credit, Memory, Metrics, Rollouts, State, Views, mean_of

PAPER = Paper(
    title="GTPO: Stabilizing Group Relative Policy Optimization via Gradient and Entropy Control",
    arxiv="2508.03772",
    axis="token weights",
    confidence="code",
    cost="entropies of the old and current policy",
    state="mean entropy of the first batch",
)


@dataclass(frozen=True)
class Config:
    gamma: float = 0.1  # weight of the completion's mean entropy in its advantage
    w: float = 2.0  # weight of conflict tokens in right answers
    threshold: float = math.log(2)  # nats
    divide_by_conflicts: bool = False
    spread_tol: float = group.SPREAD_TOL

    def __post_init__(self):
        expect(self.gamma >= 0, "gamma", self.gamma, "at least 0")
        expect(self.w >= 0, "w", self.w, "at least 0")
        expect(self.threshold >= 0, "threshold", self.threshold, "at least 0")


def row_means(x: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B"]:
    """Mean over each row's trained tokens; 0 without any."""
    return jnp.where(mask, x, 0).sum(-1) / jnp.maximum(mask.sum(-1), 1)


def initial_entropy(state: State, rows: Rollouts) -> tuple[Float[Array, ""], Bool[Array, ""]]:
    """h_init, from these rows when no earlier ones said it, and whether it is known."""
    mask = rows.trained & rows.stat[:, None]
    some = jnp.any(mask, -1)
    entropy = jnp.where(some, row_means(rows.extras["old_entropy"], mask), 0)
    here = jnp.sum(entropy) / jnp.maximum(jnp.sum(some), 1)
    return jnp.where(state["seen"], state["h_init"].astype(here.dtype), here), state["seen"] | jnp.any(some)


def build(config: Config) -> Algorithm:
    def init() -> State:
        return {"h_init": jnp.zeros((), jnp.float32), "seen": jnp.zeros((), bool)}

    def credit(state: State, rows: Rollouts, key: jax.Array) -> Credit:
        advantage = group.normalized(
            rows.score, rows.group, rows.counted, scale="none", eps=0.0, spread_tol=config.spread_tol
        )
        largest = jnp.where(rows.counted, jnp.abs(rows.score), 0)
        sign = jnp.where(jnp.abs(advantage) > config.spread_tol * (1 + largest), advantage, 0)
        runs = conflicts(rows.tokens, rows.trained, rows.group, sign)
        weight = jnp.where(runs.leading | runs.trailing, jnp.where(sign > 0, config.w, 0)[:, None], 1).astype(
            advantage.dtype
        )
        if config.divide_by_conflicts:
            longest = jnp.maximum(runs.leading.sum(-1), runs.trailing.sum(-1))
            weight = weight / jnp.maximum(longest, 1)[:, None]
        h_init, _ = initial_entropy(state, rows)
        extras = {
            "lambda": jnp.where(rows.trained, weight, 0),
            "conflict": (runs.leading | runs.trailing).astype(advantage.dtype),
            "h_init": jnp.full(advantage.shape, h_init),
        }
        return Credit(per_token(advantage, rows), extras=extras)

    def weigh(state: State, rows: Rollouts, credit: Credit) -> Credit:
        return weigh_by(credit, weights.seq_mean_token_mean(rows.trained, count_empty=True, rows=rows.counted))

    def loss(state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[jax.Array, Metrics]:
        mask = rows.trained
        entropy = jax.lax.stop_gradient(row_means(views.entropy, mask))
        kept = (credit.extras["h_init"] > config.threshold) | (entropy <= config.threshold)
        advantage = jnp.where(kept[:, None], credit.advantage - config.gamma * entropy[:, None], 0)
        ratio = ratios.token(views.logp, jax.lax.stop_gradient(views.logp), mask)
        token = surrogates.unclipped(ratio, credit.extras["lambda"] * advantage, mask)
        some = jnp.any(mask, -1)
        metrics: Metrics = {
            "policy_loss": weighted_mean_of(token, credit.weight),
            "conflicts": mean_of(credit.extras["conflict"], mask),
            "filtered": mean_of(~kept, some),
            "entropy/completion": mean_of(entropy, some),
        }
        return weights.weighted_sum(token, credit.weight), metrics

    def observe(
        state: State, memory: Memory, rows: Rollouts, credit: Credit, report: Report, views: ViewsFn
    ) -> tuple[State, Memory]:
        h_init, seen = initial_entropy(state, jax.tree.map(jnp.asarray, rows))
        return {"h_init": h_init.astype(jnp.float32), "seen": seen}, memory

    return Algorithm(
        name="gtpo",
        config=config,
        init=init,
        plan=flat_plan,
        credit=credit,
        loss=loss,
        weigh=weigh,
        observe=observe,
        couples="row",
        needs=Needs(loss=("logp", "entropy"), rescore=("old_entropy",), min_group=2),
    )
