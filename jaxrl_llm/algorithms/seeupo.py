"""SeeUPO: Sequence-Level Agentic-RL with Convergence Guarantees. arXiv 2602.06554.

Changes the training loop: rows are the turns of trajectories, and the policy is updated turn by turn, the last turn
first, one optimizer step each, on the same rollouts. Later updates are corrected by how far the earlier ones moved:

    A_n = clamp(standardised (R_n - mean of the task's trajectories), -3, 3)
    M_n = 1;  for each turn k (reverse):
        old_logp <- current policy
        L_k = 1/N sum_n 1/len_n sum_t [ max(-M A s_nt, -M A clip(s_nt, 1 - low, 1 + high)) + beta k3_nt ],  one step
        q_n = clip(exp(mean_t(logp after - old_logp)), 1 - low, 1 + high)
        M_n <- clip(M_n q_n, 1 - low, 1 + high)

s_nt is GSPO's sequence ratio in its token form, the exponent capped at 10. N counts all trajectories, with turn k or not. The
released configuration misses its switch and runs token ratios (`ratio="token"`, dual clip 3); the paper's sequence level is
the default. Not copied: M kept by position after a shuffle, and copies of the last turn that fill missing turns; here
M belongs to the trajectory and a missing turn changes nothing. Clipping q and M is the code's, the theory has products.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.advantages import group as groups
from jaxrl_llm.advantages.two_level import first_rows
from jaxrl_llm.algorithms import Paper
from jaxrl_llm.algorithms.base import (
    Algorithm,
    Needs,
    Report,
    check_clip,
    clipped_metrics,
    expect_one_of,
    flat_plan,
    no_state,
    per_token,
    weigh_by,
)
from jaxrl_llm.objectives import kl, ratios, surrogates
from jaxrl_llm.objectives.weights import weighted_sum
from jaxrl_llm.types import Credit, Metrics, Rollouts, State, Views, mean_of, merge_metrics, take_rows

PAPER = Paper(
    title="SeeUPO: Sequence-Level Agentic-RL with Convergence Guarantees",
    arxiv="2602.06554",
    axis="training loop",
    confidence="code",
    cost="two forwards per turn, reference log-probs",
)


@dataclass(frozen=True)
class Config:
    order: Literal["reverse", "sequential", "random"] = "reverse"  # of the turns
    ratio: Literal["sequence", "token"] = "sequence"
    correction: bool = True  # false: M = 1
    group_std: bool = False  # also divide by the std of the task's trajectories
    batch_norm: bool = True  # standardise over the batch's trajectories
    advantage_clip: float = 3.0
    clip_low: float = 0.2
    clip_high: float = 0.2
    correction_low: float = 0.2  # bounds of q and M
    correction_high: float = 0.2
    dual_clip: float = 3.0  # with ratio=token
    kl_coef: float = 0.002

    def __post_init__(self):
        check_clip(self.clip_low, self.clip_high, self.dual_clip)
        expect_one_of("order", self.order, ("reverse", "sequential", "random"))
        expect_one_of("ratio", self.ratio, ("sequence", "token"))


def moved(old: jax.Array, new: jax.Array, mask: jax.Array, low: float, high: float) -> jax.Array:
    """q [B]: the clipped sequence ratio of the updated policy to the one before; 1 for rows without tokens."""
    count = jnp.maximum(mask.sum(-1), 1)
    mean = jnp.where(mask, new - old, 0).sum(-1) / count
    return jnp.clip(jnp.exp(jnp.clip(mean, -10, 10)), 1 - low, 1 + high)


def build(config: Config) -> Algorithm:
    def credit(state: State, rows: Rollouts, key: jax.Array) -> Credit:
        """Advantages of trajectories, from the reward that every row of one carries; `first` rows speak for them."""
        first = first_rows(rows.extras["traj"], rows.counted)
        stats = groups.statistics(rows.score, rows.group, first)
        a = jnp.where(stats.count == 1, rows.score, rows.score - stats.mean)
        a = jnp.where(stats.flat & (stats.count > 1), 0, a)
        if config.group_std:
            a = a / (jnp.where(stats.count == 1, 1, stats.std) + 1e-6)
        if config.batch_norm:
            batch = groups.statistics(a, jnp.zeros_like(rows.group), first)
            a = jnp.where(batch.flat, 0, a - batch.mean) / jnp.where(batch.std > 1e-6, batch.std, 1)
        a = jnp.where(rows.counted, jnp.clip(a, -config.advantage_clip, config.advantage_clip), 0)
        trajectories = jnp.full(a.shape, jnp.maximum(jnp.sum(first), 1), a.dtype)
        return Credit(per_token(a, rows), extras={"trajectories": trajectories})

    def weigh(state: State, rows: Rollouts, credit: Credit) -> Credit:
        mask = rows.trained
        length = jnp.maximum(mask.sum(-1), 1)
        return weigh_by(credit, jnp.where(mask, 1 / (length * credit.extras["trajectories"])[:, None], 0))

    def loss(state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[jax.Array, Metrics]:
        mask = rows.trained
        sequence = config.ratio == "sequence"
        if sequence:
            ratio = ratios.sequence_token(views.logp, rows.old_logp, mask, cap=10.0)
        else:
            ratio = ratios.token(views.logp, rows.old_logp, mask)
        dual_clip = None if sequence else config.dual_clip
        clipped = surrogates.clipped(ratio, credit.advantage, mask, config.clip_low, config.clip_high, dual_clip)
        total = weighted_sum(clipped.loss, credit.weight)
        metrics = clipped_metrics(clipped, ratio, mask, credit.weight)
        if config.kl_coef:
            # The code's guards: the log-ratio within 20, the estimate within 10.
            ref_logp = jnp.where(mask, rows.extras["ref_logp"], 0)
            near = jnp.where(mask, jnp.clip(views.logp, ref_logp - 20, ref_logp + 20), 0)
            k3 = jnp.clip(kl.estimate("k3", near, ref_logp, mask), -10, 10)
            total += config.kl_coef * weighted_sum(k3, credit.reg_weight)
            metrics["kl"] = mean_of(k3, mask)
        return total, metrics

    def update(learner: Any, state: State, rows: Rollouts, credit: Credit, key: jax.Array) -> tuple[State, Report]:
        trained = np.asarray(rows.trained).any(1)
        traj = np.unique(np.asarray(rows.extras["traj"]), return_inverse=True)[1].reshape(-1)
        turn = np.asarray(rows.extras["turn"])
        turns = np.unique(turn[trained])
        size = len(np.unique(traj[np.asarray(rows.stat)]))  # one shape for all turns, whoever is missing
        order = {"reverse": turns[::-1], "sequential": turns}.get(config.order)
        if order is None:
            order = turns[np.asarray(jax.random.permutation(key, len(turns)))]
        m = np.ones(traj.max() + 1, np.float32)
        reports: list[Metrics] = []
        for k in order:
            index = np.full(size, -1)
            here = np.flatnonzero(trained & (turn == k))
            index[: len(here)] = here
            part, part_credit = take_rows(rows, credit, jnp.asarray(index))
            scale = np.where(index >= 0, m[traj[index]], 1)[:, None]
            part_credit = replace(part_credit, advantage=part_credit.advantage * scale)
            part = part.with_(old_logp=learner.views(part, ("logp",)).logp)
            state, metrics = learner.step(state, part, part_credit)
            reports.append(metrics)
            if config.correction:
                new = learner.views(part, ("logp",)).logp
                q = np.asarray(moved(part.old_logp, new, part.trained, config.correction_low, config.correction_high))
                m[traj[here]] = np.clip(
                    m[traj[here]] * q[: len(here)], 1 - config.correction_low, 1 + config.correction_high
                )
        merged: Metrics = {}
        for metrics in reports:
            merged = merge_metrics(merged, metrics)
        return state, Report(merged, reports[-1] if reports else {}, len(reports), tuple(reports))

    return Algorithm(
        name="seeupo",
        config=config,
        init=no_state,
        plan=flat_plan,
        credit=credit,
        loss=loss,
        weigh=weigh,
        update=update,
        couples="row",
        needs=Needs(
            rescore=("ref_logp",) if config.kl_coef else (),
            row_extras=("traj", "turn"),
            min_group=2,
        ),
    )
