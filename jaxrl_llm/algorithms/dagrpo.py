"""DaGRPO: distinctiveness-aware GRPO. arXiv 2512.06337. Axis: which rows of a group train, and an answer given to hard prompts.

Only the abstract could be read; it fixes the two pieces, the formulas are our reconstruction.

    hard:    fewer than min_correct completions with a reward over 0: the worked answer joins the group, reward 1, score 1
    A_i    = (R_i - mean_g) / (std_g + eps)                            the given row included
    m_i    = 1 if some j of the group has A_i A_j < 0 and |score_i - score_j| >= tau, else 0
    l_it   = PPO's clipped loss of A_i;  -A_i exp(logp - sg(logp)) of a given row, whose policy is unknown
    L      = 1 / B sum_i m_i mean_t l_it                               B counts every row, masked and empty ones too

A row that is too like everything of the other sign is left out, so near-identical completions do not pull both ways; the rest
keeps its step size. The score is a finer judgement than the reward: a reward part (`quality`, a judge of weight 0 in
`rewards.parts`), or the reward itself. Anchors are the problems' worked answers, at most `rollout.max_new` tokens long.

Our choices: all of the above where the abstract is silent: appending, min_correct 1, tau 0.1, pairs reduced to rows by "any", no clip
for given rows, B, ddof 0, eps 1e-6, `spread_tol`. With tau 0 and no anchors the loss is GRPO's.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.advantages import group
from jaxrl_llm.algorithms import Paper
from jaxrl_llm.algorithms.base import (
    Algorithm,
    Key,
    Needs,
    Plan,
    check_clip,
    clipped_metrics,
    expect,
    no_state,
    per_token,
    weigh_by,
)
from jaxrl_llm.objectives import ratios, surrogates, weights
from jaxrl_llm.types import GIVEN, Credit, Metrics, Rollouts, State, Views, mean_of

PAPER = Paper(
    title="DaGRPO: Rectifying Gradient Conflict in Reasoning via Distinctiveness-Aware Group Relative Policy Optimization",
    arxiv="2512.06337",
    axis="selection",
    confidence="abstract",
)


@dataclass(frozen=True)
class Config:
    quality: str | None = None  # name of the reward part that grades finely; none: the reward
    tau: float = 0.1  # least distance of scores between rows of opposite sign
    anchors: bool = True
    min_correct: int = 1  # prompts with fewer correct completions get the worked answer
    render: str = "{target}"  # text of the worked answer, from the problem's fields
    clip_low: float = 0.2
    clip_high: float = 0.2
    ddof: int = 0
    eps: float = 1e-6
    spread_tol: float = group.SPREAD_TOL

    def __post_init__(self):
        check_clip(self.clip_low, self.clip_high)
        expect(self.tau >= 0, "tau", self.tau, "at least 0")
        expect(self.min_correct >= 1, "min_correct", self.min_correct, "at least 1")


def anchored(config: Config) -> Callable[..., Generator[Any, Any, Any]]:
    """Collector: groups of every prompt, and a worked answer in those of hard ones."""

    def collect(plan: Plan, prompts: Sequence[Any]):
        from jaxrl_llm.rollout.collectors import given_rows, sample_groups

        rows = yield from sample_groups(prompts, plan.group_size)
        correct = [
            sum(bool(r.scored and r.reward.sum() > 0) for r in rows if r.group == g) for g in range(len(prompts))
        ]
        hard = [g for g, n in enumerate(correct) if n < config.min_correct] if config.anchors else []
        anchors = yield from given_rows([prompts[g] for g in hard], hard, config.render)
        for row in rows:
            row.extras["quality"] = _quality(row, config.quality)
        for row in anchors:
            row.extras["quality"] = 1.0
        return sorted(rows + anchors, key=lambda r: r.group)

    return collect


def _quality(row: Any, part: str | None) -> float:
    """The score of a completion; unscored rows have any."""
    if part is None or not row.scored:
        return float(row.reward.sum()) if row.scored else 0.0
    expect(part in row.parts, "quality", part, f"one of the reward parts {', '.join(row.parts)}")
    return row.parts[part]


def distinct(
    advantage: Float[Array, "B"], score: Float[Array, "B"], ids: Int[Array, "B"], tau: float
) -> Bool[Array, "B"]:
    """Which rows have one of the other sign in their group (`ids` 0..B-1) whose score is at least `tau` away."""
    size = score.shape[0]

    def farthest(others: Bool[Array, "B"]) -> Float[Array, "B"]:
        """The largest distance to the scores of `others` in the group, -inf without any."""
        high = jax.ops.segment_max(jnp.where(others, score, -jnp.inf), ids, size)[ids]
        low = jax.ops.segment_min(jnp.where(others, score, jnp.inf), ids, size)[ids]
        return jnp.maximum(high - score, score - low)

    up, down = advantage > 0, advantage < 0
    return jnp.where(up, farthest(down) >= tau, down & (farthest(up) >= tau))


def build(config: Config) -> Algorithm:
    def plan(state: State) -> Plan:
        return Plan(
            collector=anchored(config), capacity=lambda prompts, size: (prompts, prompts * (size + config.anchors))
        )

    def credit(state: State, rows: Rollouts, key: Key) -> Credit:
        advantage = group.normalized(
            rows.score, rows.group, rows.counted, ddof=config.ddof, eps=config.eps, spread_tol=config.spread_tol
        )
        score = jnp.where(rows.counted, rows.extras["quality"], 0)
        kept = distinct(advantage, score, group.dense_ids(rows.group), config.tau)
        return Credit(per_token(advantage, rows), extras={"distinct": kept})

    def weigh(state: State, rows: Rollouts, credit: Credit) -> Credit:
        weight = weights.seq_mean_token_mean(rows.trained, count_empty=True, rows=rows.counted)
        return weigh_by(credit, jnp.where(credit.extras["distinct"][:, None], weight, 0))

    def loss(state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[jax.Array, Metrics]:
        mask, given = rows.trained, (rows.source == GIVEN)[:, None]
        ratio = ratios.token(views.logp, rows.old_logp, mask & ~given)
        policy = surrogates.clipped(ratio, credit.advantage, mask & ~given, config.clip_low, config.clip_high)
        answer = surrogates.unclipped(ratios.on_policy(views.logp, mask & given), credit.advantage, mask & given)
        metrics = clipped_metrics(policy, ratio, mask & ~given, jnp.where(given, 0, credit.weight))
        metrics["rows/distinct"] = mean_of(credit.extras["distinct"], rows.counted)
        metrics["rows/given"] = mean_of(given[:, 0], rows.counted)
        return weights.weighted_sum(policy.loss + answer, credit.weight), metrics

    return Algorithm(
        name="dagrpo",
        config=config,
        init=no_state,
        plan=plan,
        credit=credit,
        loss=loss,
        weigh=weigh,
        couples="row",
        needs=Needs(row_extras=("quality",), min_group=2),
    )
