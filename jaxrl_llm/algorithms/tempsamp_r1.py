"""TempSamp-R1: the answer in the group, with soft advantage shaping. arXiv 2509.18056. Axis: a given row, and the advantage.

Of a group's G rows G - 1 are sampled and one is the worked answer, whose own reward is 1. With r the task's own reward in [0, 1]:

    shape(r) = tau + a1 ln(r - tau + 1)                                   r >= tau
             = tau - (exp(a2 (tau - r)) - 1) / (exp(a2) - 1)              r <  tau
    A_i = (R_i - mean_g) / (std_g + eps),   R = shape(r) + other reward parts,   over all G rows
    L   = mean over all rows of mean_t [-A exp(logp - sg(logp)) + beta k3(ref)]

The ratio is 1: old and current policy are one, so take one update a batch; the given row is advantage-weighted supervised learning.
What shaping is compared with (`mode`): "none"; "scale", the given row's own reward times `scale`; "anchor", sampled rows
normalised among themselves and 1.2 times their largest advantage for the given row.

Two stages are two runs: answers only, then with reasoning and a format reward in `rewards.parts`, which is added after shaping. In the
second `render` puts the answer in its tags, without reasoning, and the format reward judges that text. The task's own reward is
taken to have weight 1. `task.reward: span_iou` is the temporal grounding reward (`tasks.spans`).
Our choices: scale 0.8, ddof 1, eps 1e-4, beta 0.04, `render` without an empty reasoning block, `spread_tol`. Not here: the
highlight task's reward (its weights are not known) and scores that take the better of two modes by the label.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.advantages import group
from jaxrl_llm.algorithms import Paper
from jaxrl_llm.algorithms.base import (
    Algorithm,
    Key,
    Needs,
    Plan,
    expect,
    expect_one_of,
    no_state,
    per_token,
    weigh_by,
    weighted_mean_of,
)
from jaxrl_llm.objectives import kl, ratios, surrogates, weights
from jaxrl_llm.types import GIVEN, Credit, Metrics, Rollouts, State, Views, mean_of

PAPER = Paper(
    title="TempSamp-R1: Effective Temporal Sampling with Reinforcement Fine-Tuning for Video LLMs",
    arxiv="2509.18056",
    axis="advantage",
    confidence="paper",
    cost="a forward of the reference when beta > 0",
)


@dataclass(frozen=True)
class Config:
    mode: Literal["shape", "none", "scale", "anchor"] = "shape"
    tau: float = 0.8  # where shaping turns from steep to flat
    a1: float = 0.01
    a2: float = 1.0
    scale: float = 0.8  # mode=scale: factor of the given row's own reward
    anchor: float = 1.2  # mode=anchor: times the largest advantage of the sampled rows
    render: str = "{target}"  # text of the given row, from the problem's fields
    beta: float = 0.04  # KL to the reference (k3)
    ddof: int = 1
    eps: float = 1e-4
    spread_tol: float = group.SPREAD_TOL

    def __post_init__(self):
        expect_one_of("mode", self.mode, ("shape", "none", "scale", "anchor"))
        expect(0 < self.tau <= 1, "tau", self.tau, "over 0, at most 1")
        expect(self.a1 >= 0, "a1", self.a1, "at least 0")
        expect(self.a2 > 0, "a2", self.a2, "more than 0")
        expect(self.scale > 0, "scale", self.scale, "more than 0")
        expect(self.beta >= 0, "beta", self.beta, "at least 0")


def shape(reward: Float[Array, "B"], tau: float, a1: float, a2: float) -> Float[Array, "B"]:
    """Steep below tau, almost flat above; continuous and increasing."""
    high = tau + a1 * jnp.log1p(jnp.maximum(reward - tau, 0))
    low = tau - jnp.expm1(a2 * jnp.maximum(tau - reward, 0)) / jnp.expm1(a2)
    return jnp.where(reward >= tau, high, low)


def with_answer(render: str):
    """Collector: all rows of a group but one are sampled, the last is the worked answer."""

    def collect(plan: Plan, prompts: Sequence[Any]) -> Generator[Any, Any, Any]:
        from jaxrl_llm.rollout.collectors import given_rows, sample_groups

        rows = yield from sample_groups(prompts, plan.group_size - 1)
        answers = yield from given_rows(prompts, range(len(prompts)), render)
        return sorted(rows + answers, key=lambda r: r.group)

    return collect


def build(config: Config) -> Algorithm:
    def normalized(score: jax.Array, rows: Rollouts, among: jax.Array) -> jax.Array:
        return group.normalized(
            score, rows.group, among, ddof=config.ddof, eps=config.eps, spread_tol=config.spread_tol
        )

    def credit(state: State, rows: Rollouts, key: Key) -> Credit:
        given, own = rows.source == GIVEN, rows.reward[:, 0]
        rest = rows.score - own
        if config.mode == "anchor":
            sampled = rows.counted & ~given
            advantage = normalized(rows.score, rows, sampled)
            ids, size = group.dense_ids(rows.group), rows.group.shape[0]
            best = jax.ops.segment_max(jnp.where(sampled, advantage, -jnp.inf), ids, size)[ids]
            anchored = rows.counted & given & jnp.isfinite(best)
            return Credit(per_token(jnp.where(anchored, config.anchor * best, advantage), rows))
        if config.mode == "shape":
            own = shape(own, config.tau, config.a1, config.a2)
        elif config.mode == "scale":
            own = jnp.where(given, config.scale * own, own)
        return Credit(per_token(normalized(own + rest, rows, rows.counted), rows))

    def weigh(state: State, rows: Rollouts, credit: Credit) -> Credit:
        return weigh_by(credit, weights.seq_mean_token_mean(rows.trained, count_empty=True, rows=rows.counted))

    def loss(state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[jax.Array, Metrics]:
        mask, given = rows.trained, (rows.source == GIVEN)[:, None]
        policy_loss = surrogates.unclipped(ratios.on_policy(views.logp, mask), credit.advantage, mask)
        total = weights.weighted_sum(policy_loss, credit.weight)
        metrics: Metrics = {
            "policy_loss": weighted_mean_of(policy_loss, credit.weight),
            "given/advantage": mean_of(credit.advantage, mask & given),
            "given/logp": mean_of(views.logp, mask & given),
        }
        if config.beta:
            token_kl = kl.estimate("k3", views.logp, rows.extras["ref_logp"], mask)
            total += config.beta * weights.weighted_sum(token_kl, credit.reg_weight)
            metrics["kl"] = mean_of(token_kl, mask)
        return total, metrics

    return Algorithm(
        name="tempsamp_r1",
        config=config,
        init=no_state,
        plan=lambda state: Plan(collector=with_answer(config.render)),
        credit=credit,
        loss=loss,
        weigh=weigh,
        couples="row",
        needs=Needs(rescore=("ref_logp",) if config.beta else (), min_group=2),
    )
