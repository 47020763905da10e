"""LOOP: leave-one-out PPO for long-horizon interactive agents. arXiv 2502.01600. Axis: the training loop.

No critic, no reference; a row is an episode whose tool output is masked out, and a turn is a run of its trained tokens.

    A_k = R_k - mean_{j != k} R_j                                          no std
    o   = min(rho A, g(A)),   g(A) = (1 + clip) A  if A >= 0,  A / (1 + clip)  if A < 0
    rho = exp(logp_t - old_logp_t), or of the log-ratio's sum over the turn, or over the trajectory
    L   = -1 / minibatch sum_rows mean_t o_t                               a constant divisor; of turns: the mean over turns

Rows with |A| under `threshold` are dropped, their number rounded up to a multiple of `workers` by the next largest. A batch then
trains for `epochs` of shuffled minibatches, and stops before an update when the policy has drifted:
|mean over rows of sum_t (logp - old_logp)| > max_drift. `minibatch=null` with epochs 1 is strictly on-policy: one update on
all rows over their number, which is RLOO.

The code's range of ratios is the default; the paper's is 1 - clip to 1 + clip (`bounds=paper`). For runs of episodes in parallel:
`enough` is the straggler rule, `episode_return` the reward.
Our choices: the mean over turns (not in the released code), `spread_tol`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.advantages import group
from jaxrl_llm.algorithms import Paper
from jaxrl_llm.algorithms.base import (
    Algorithm,
    Key,
    Needs,
    Report,
    Selection,
    clipped_metrics,
    expect,
    expect_one_of,
    flat_plan,
    no_state,
    per_token,
    ratio_metrics,
    weigh_by,
    weighted_mean_of,
)
from jaxrl_llm.objectives import ratios, surrogates, weights
from jaxrl_llm.types import Credit, Memory, Metrics, Rollouts, State, Views, merge_metrics, take_rows

PAPER = Paper(
    title="Reinforcement Learning for Long-Horizon Interactive LLM Agents",
    arxiv="2502.01600",
    axis="training loop",
    confidence="code",
    cost="a forward before each update",
)


@dataclass(frozen=True)
class Config:
    ratio: Literal["token", "turn", "trajectory"] = "token"
    clip: float = 0.1
    bounds: Literal["code", "paper"] = "code"  # of the ratio: from 1 / (1 + clip), or from 1 - clip
    clipped: bool = True  # false: REINFORCE, -A logp
    baseline: Literal["leave_one_out", "mean"] = "leave_one_out"
    std: bool = False  # divide by the group's population std, at least 1e-7
    threshold: float = 0.01  # least |A| that trains
    workers: int = 1  # the rows that train are a multiple of it
    positive_only: bool = False  # rank and filter by A instead of |A|
    minibatch: int | None = 32  # rows of an update and divisor of its loss; none: all rows, over their number
    epochs: int = 2
    max_drift: float | None = 20.0  # none: no check, and no forward for it
    spread_tol: float = group.SPREAD_TOL

    def __post_init__(self):
        expect_one_of("ratio", self.ratio, ("token", "turn", "trajectory"))
        expect_one_of("bounds", self.bounds, ("code", "paper"))
        expect_one_of("baseline", self.baseline, ("leave_one_out", "mean"))
        expect(0 <= self.clip < 1, "clip", self.clip, "0 to under 1")
        expect(self.threshold >= 0, "threshold", self.threshold, "at least 0")
        expect(self.workers >= 1, "workers", self.workers, "at least 1")
        expect(self.minibatch is None or self.minibatch >= 1, "minibatch", self.minibatch, "at least 1, or null")
        expect(self.epochs >= 1, "epochs", self.epochs, "at least 1")
        expect(self.max_drift is None or self.max_drift > 0, "max_drift", self.max_drift, "more than 0, or null")


def enough(finished: Sequence[int], episodes: int, share: float = 0.9, of_task: float = 0.75) -> bool:
    """The straggler rule: whether to stop collecting with `finished[i]` of task i's `episodes` episodes at their end.

    Yes when `share` of all episodes is (rounded up), and of every task `of_task` of its own (rounded half to even).
    """
    return sum(finished) >= math.ceil(share * episodes * len(finished)) and min(finished) >= round(of_task * episodes)


def episode_return(
    passed: int,
    tests: int,
    failed_executions: int = 0,
    turns_without_code: int = 0,
    *,
    execution_penalty: float = 0.0,
    code_penalty: float = 0.0,
    sparse: bool = False,
) -> float:
    """Share of the task's tests that pass (sparse: 1 when all do), less penalties, at least 0."""
    score = float(passed == tests) if sparse else passed / tests
    return max(score - execution_penalty * failed_executions - code_penalty * turns_without_code, 0.0)


def keep_rows(
    advantage: np.ndarray, counted: np.ndarray, threshold: float, workers: int, positive_only: bool
) -> np.ndarray:
    """Which rows [B] train: those over the threshold, and the next largest up to a multiple of `workers`, at least one each."""
    rank = np.where(counted, advantage if positive_only else np.abs(advantage), -np.inf)
    wanted = max(math.ceil(np.sum(rank >= threshold) / workers), 1) * workers
    kept = np.zeros(len(rank), bool)
    kept[np.argsort(-rank, kind="stable")[:wanted]] = True
    return kept & counted


def build(config: Config) -> Algorithm:
    low = config.clip if config.bounds == "paper" else 1 - 1 / (1 + config.clip)
    likelihood_ratio = {"token": ratios.token, "turn": ratios.turn, "trajectory": ratios.product}[config.ratio]

    def credit(state: State, rows: Rollouts, key: Key) -> Credit:
        counted = rows.counted
        if config.baseline == "leave_one_out":
            advantage = group.leave_one_out(rows.score, rows.group, counted, config.spread_tol)
        else:
            advantage = group.normalized(rows.score, rows.group, counted, "none", spread_tol=config.spread_tol)
        if config.std:
            spread = group.statistics(rows.score, rows.group, counted, ddof=0, spread_tol=config.spread_tol).std
            advantage = jnp.where(advantage != 0, advantage / jnp.maximum(spread, 1e-7), 0)
        return Credit(per_token(advantage, rows), score=advantage)

    def select(state: State, memory: Memory, rows: Rollouts, credit: Credit, key: Key) -> Selection:
        kept = keep_rows(
            *(np.asarray(credit.score), np.asarray(rows.counted), config.threshold),
            *(config.workers, config.positive_only),
        )
        return Selection(*take_rows(rows, credit, jnp.asarray(np.where(kept, np.arange(len(kept)), -1))), memory)

    def weigh(state: State, rows: Rollouts, credit: Credit) -> Credit:
        mask, one = rows.trained, rows.trained.astype(rows.old_logp.dtype)
        units = one / jnp.maximum(ratios.over_turns(one, mask), 1) if config.ratio == "turn" else one
        of_row = units / jnp.maximum(jnp.sum(units, -1, keepdims=True), 1)
        return weigh_by(credit, of_row / (config.minibatch or jnp.maximum(jnp.sum(rows.counted), 1)))

    def loss(state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[jax.Array, Metrics]:
        mask = rows.trained
        ratio = likelihood_ratio(views.logp, rows.old_logp, mask)
        if not config.clipped:
            policy_loss = surrogates.reinforce(views.logp, credit.advantage, mask)
            metrics = {"policy_loss": weighted_mean_of(policy_loss, credit.weight), **ratio_metrics(ratio, mask)}
            return weights.weighted_sum(policy_loss, credit.weight), metrics
        policy = surrogates.clipped(ratio, credit.advantage, mask, low, config.clip)
        return weights.weighted_sum(policy.loss, credit.weight), clipped_metrics(policy, ratio, mask, credit.weight)

    def update(learner: Any, state: State, rows: Rollouts, credit: Credit, key: Key) -> tuple[State, Report]:
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        kept, size = np.flatnonzero(np.asarray(rows.counted)), config.minibatch or len(rows.group)
        orders = [rng.permutation(kept) for _ in range(config.epochs)]
        parts = [order[first : first + size] for order in orders for first in range(0, len(kept), size)]
        steps: list[Metrics] = []
        for part in parts:
            index = np.concatenate([part, np.full(size - len(part), -1)])
            some, some_credit = take_rows(rows, credit, jnp.asarray(index))
            now = None
            if config.max_drift is not None:
                now = learner.views(some, ("logp",))
                drift = float(jnp.sum(ratios.log_ratio(now.logp, some.old_logp, some.trained))) / len(part)
                if abs(drift) > config.max_drift:
                    break
            state, metrics = learner.step(state, some, some_credit, current=now)
            steps.append(metrics)
        steps = jax.device_get(steps)
        return state, Report(reduce(merge_metrics, steps, {}), steps[-1] if steps else {}, len(steps), tuple(steps))

    return Algorithm(
        name="loop",
        config=config,
        init=no_state,
        plan=flat_plan,
        credit=credit,
        loss=loss,
        select=select,
        weigh=weigh,
        update=update,
        couples="row",
        needs=Needs(min_group=2),
    )
