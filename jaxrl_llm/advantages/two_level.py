"""GiGPO's two-level credit for agents (arXiv 2505.10978): how good was the episode, and how good was this step among the steps
that started from the same state. Rows are steps; `counted` rows enter statistics, the others get 0 and may hold anything."""

import difflib
from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.advantages import group as groups


def anchor_ids(group: Sequence[int], anchors: Sequence[Hashable], threshold: float | None = None) -> np.ndarray:
    """Ids of the states that steps started from: equal for equal (group, anchor). On the host.

    Args:
      group: id of the initial state or task of each row; ids are never shared between groups.
      anchors: the raw observation before the action, without history or admissible actions.
      threshold: 0 < threshold < 1 joins texts instead: in batch order, a row joins the first cluster of its group whose
        first member has `difflib.SequenceMatcher(None, anchor, member).ratio() >= threshold`.
    Returns: int32 [B], numbered in the order of first appearance.
    """
    if threshold is None:
        seen: dict[tuple[int, Hashable], int] = {}
        return np.array([seen.setdefault((int(g), a), len(seen)) for g, a in zip(group, anchors)], np.int32)
    if not 0 < threshold < 1:
        raise ValueError(f"threshold={threshold}: expected more than 0 and less than 1")
    if any(not isinstance(a, str) for a in anchors):
        raise ValueError("anchors: similarity compares texts, expected only strings")
    clusters: dict[int, list[tuple[str, int]]] = {}
    ids: list[int] = []
    for g, anchor in zip(group, anchors):
        known = clusters.setdefault(int(g), [])
        for member, cluster in known:
            if difflib.SequenceMatcher(None, str(anchor), member).ratio() >= threshold:
                ids.append(cluster)
                break
        else:
            known.append((str(anchor), max(ids, default=-1) + 1))
            ids.append(known[-1][1])
    return np.array(ids, np.int32)


def step_returns(
    reward: Float[Array, "B"], traj: Int[Array, "B"], index: Int[Array, "B"], counted: Bool[Array, "B"], gamma: float
) -> Float[Array, "B"]:
    """R_t = r_t + gamma R_{t+1} backwards along each trajectory, rows in any order; rows not counted reward 0."""
    order = jnp.lexsort((index, traj))
    traj, index, reward = traj[order], index[order], jnp.where(counted, reward, 0)[order]
    follows = jnp.append(traj[1:] == traj[:-1], False)
    gap = jnp.where(follows, jnp.append(index[1:], 0) - index, 0)
    decay = jnp.where(follows, jnp.asarray(gamma, reward.dtype) ** gap, 0)

    def chain(later, earlier):  # R = r + decay * R_next is an affine map of what follows; maps compose associatively
        return earlier[0] * later[0], earlier[1] + earlier[0] * later[1]

    returns = jax.lax.associative_scan(chain, (decay, reward), reverse=True)[1]
    return jnp.zeros_like(returns).at[order].set(returns)


def first_rows(traj: Int[Array, "B"], counted: Bool[Array, "B"]) -> Bool[Array, "B"]:
    """The first counted row of each trajectory, in batch order."""
    row = jnp.arange(traj.shape[0])
    first = jax.ops.segment_min(jnp.where(counted, row, row.size), ids := groups.dense_ids(traj), row.size)[ids]
    return counted & (row == first)


def relative(
    score: Float[Array, "B"],
    group: Int[Array, "B"],
    counted: Bool[Array, "B"],
    voters: Bool[Array, "B"],
    *,
    std: bool,
    alone_raw: bool,
) -> Float[Array, "B"]:
    """(score - mean) / F for counted rows; the group's mean and std are over its `voters` only.

    Args:
      std: F = std (ddof 1) + 1e-6 (mean_std_norm), else 1 (mean_norm).
      alone_raw: with a single voter, mean 0 and std 1 (episode level: the raw score), else mean the score itself (0).
    """
    stats = groups.statistics(score, group, voters)
    alone = stats.count == 1
    centred = jnp.where(alone & alone_raw, score, score - stats.mean)
    flat = groups.statistics(score, group, counted).flat
    if std:  # voters may agree where penalised rows do not: nothing to divide by
        centred, flat = centred / (jnp.where(alone, 1, stats.std) + 1e-6), flat | stats.flat
    return jnp.where(counted & (alone | ~flat), centred, 0)


def advantage(
    score: Float[Array, "B"],
    step_score: Float[Array, "B"],
    group: Int[Array, "B"],
    traj: Int[Array, "B"],
    anchor: Int[Array, "B"],
    counted: Bool[Array, "B"],
    *,
    omega: float = 1.0,
    std: bool = False,
    cross_steps: bool = True,
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Episode and step advantages, to be added: A^E and omega A^S.

    Args:
      score: e_b, the episode's return less this row's own penalty; step_score: s_b, the discounted return from this step.
      cross_steps: episode statistics over all rows of a group (the code: long trajectories count more), else over one row
        per trajectory, its first (the paper).
    """
    voters = counted if cross_steps else first_rows(traj, counted)
    episode = relative(score, group, counted, voters, std=std, alone_raw=True)
    return episode, omega * relative(step_score, anchor, counted, counted, std=std, alone_raw=False)
