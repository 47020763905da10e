"""E-GRPO: entity-aware GRPO for search agents (Repurposing Synthetic Data for Fine-grained Search Agent Supervision).
arXiv 2510.24694.

Axis: the reward. A wrong answer has partial credit for the gold entities its thoughts name, relative to the best of its group:

    gamma_i = share of the problem's entities that a thought of rollout i names       (the reward part `entities`)
    R_i     = 0 with an error (bad format, or cut off at the length limit), 1 when correct, else
              alpha gamma_i / max_j gamma_j                   the maximum over all rollouts of the group; 0 when that is 0
    A_i     = (R_i - mean_g) / (std_g + eps)                  over all rollouts, those cut off included
    L       = mean over groups of the token mean of -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)    of those not cut off

Rewards have two parts: the task's own, which says whether the answer is correct (at least `correct_at`), and `entities`; with
`format_part` a third of the user's own, above 0 where the format is right. In a config: `task.reward: exact` with an answer
pattern, and `entities` in `rewards.parts`, both of weight 1; problems have a field "entities". alpha = 0 is GRPO on outcomes. Only
thoughts count: entities in tool responses do not, and tool responses are masked as everywhere. A limit on tool calls is the
environment's: let its format part say so.

Our choices: clip 0.2/0.28 (not given; the recipe it cites), std with ddof 1, a row's own minibatch makes the mean over groups.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.advantages import group, overlong
from jaxrl_llm.algorithms import Paper
from jaxrl_llm.algorithms.base import (
    Algorithm,
    check_clip,
    clipped_metrics,
    expect,
    expect_one_of,
    group_method,
    per_token,
    weigh_by,
)
from jaxrl_llm.objectives import ratios, surrogates, weights
from jaxrl_llm.types import Credit, Metrics, Rollouts, State, Views, mean_of

PAPER = Paper(
    title="Repurposing Synthetic Data for Fine-grained Search Agent Supervision (E-GRPO)",
    arxiv="2510.24694",
    axis="reward",
    confidence="paper",
)


@dataclass(frozen=True)
class Config:
    alpha: float = 0.3  # the most a wrong answer can get
    correct_at: float = 1.0  # the task's own reward part at which an answer is correct
    format_part: bool = False  # a third reward part is above 0 where the format is right
    agg: Literal["group", "batch"] = "group"  # mean over groups of token means (paper), or one token mean
    clip_low: float = 0.2
    clip_high: float = 0.28
    ddof: int = 1
    eps: float = 1e-6
    spread_tol: float = group.SPREAD_TOL

    def __post_init__(self):
        expect(0 <= self.alpha <= 1, "alpha", self.alpha, "0 to 1")
        expect_one_of("agg", self.agg, ("group", "batch"))
        check_clip(self.clip_low, self.clip_high)


def shaped(config: Config, rows: Rollouts) -> Float[Array, "B"]:
    """R of each row; rows that do not count may have anything. Raises ValueError unless rewards have the parts it needs."""
    needed = 3 if config.format_part else 2
    if rows.reward.shape[1] != needed:
        parts = "the task's own (correct), `entities`" + (", and the format" if config.format_part else "")
        raise ValueError(f"rewards.parts: e_grpo was given {rows.reward.shape[1]} reward parts, expected {parts}")
    correct, match = rows.reward[:, 0] >= config.correct_at, rows.reward[:, 1]
    ids = group.dense_ids(rows.group)
    best = jax.ops.segment_max(jnp.where(rows.counted, match, 0), ids, match.shape[0])[ids]
    relative = jnp.where(best > 0, match / jnp.where(best > 0, best, 1), 0)
    error = rows.truncated | (rows.reward[:, 2] <= 0) if config.format_part else rows.truncated
    return jnp.where(error, 0, jnp.where(correct, 1, config.alpha * relative))


def build(config: Config) -> Algorithm:
    def credit(state: State, rows: Rollouts, key: jax.Array) -> Credit:
        reward = shaped(config, rows)
        advantage = group.normalized(
            reward, rows.group, rows.counted, ddof=config.ddof, eps=config.eps, spread_tol=config.spread_tol
        )
        return Credit(per_token(advantage, rows), extras={"reward": jnp.where(rows.counted, reward, 0)})

    def weigh(state: State, rows: Rollouts, credit: Credit) -> Credit:
        mask = overlong.without_truncated(rows.trained, rows.truncated)
        return weigh_by(
            credit, weights.mean_over_groups(mask, rows.group) if config.agg == "group" else weights.token_mean(mask)
        )

    def loss(state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[jax.Array, Metrics]:
        mask = overlong.without_truncated(rows.trained, rows.truncated)
        ratio = ratios.token(views.logp, rows.old_logp, mask)
        policy = surrogates.clipped(ratio, credit.advantage, mask, config.clip_low, config.clip_high)
        metrics = clipped_metrics(policy, ratio, mask, credit.weight)
        metrics["reward/shaped"] = mean_of(credit.extras["reward"], rows.counted)
        return weights.weighted_sum(policy.loss, credit.weight), metrics

    return group_method("e_grpo", config, loss, credit=credit, weigh=weigh)
