"""Losses on pairs of completions and the pairs themselves. DPO, arXiv 2305.18290, with the IPO, SLiC and cDPO losses."""

from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

PairLoss = Literal["sigmoid", "robust", "hinge", "ipo"]
Pairing = Literal["best_worst", "all"]


def sequence_score(
    logp: Float[Array, "B T"], ref_logp: Float[Array, "B T"] | None, mask: Bool[Array, "B T"], length_norm: bool
) -> Float[Array, "B"]:
    """s_i: sum over trained tokens of logp - ref_logp (of logp when reference-free), over max(len, 1) with `length_norm`."""
    ref_logp = jnp.zeros_like(logp) if ref_logp is None else jax.lax.stop_gradient(ref_logp)
    score = jnp.where(mask, logp - jnp.where(mask, ref_logp, 0), 0).sum(-1)
    return score / jnp.maximum(mask.sum(-1), 1) if length_norm else score


def pair_difference(score: Float[Array, "B"], role: Float[Array, "B"], block: Int[Array, "B"]) -> Float[Array, "B"]:
    """delta = s_chosen - s_rejected, repeated for both rows of a pair; rows with role 0 belong to no pair."""
    ids = jnp.unique(block, return_inverse=True, size=block.shape[0])[1].reshape(block.shape)
    return jax.ops.segment_sum(jnp.where(role != 0, role * score, 0), ids, block.shape[0])[ids]


def pair_loss(
    difference: Float[Array, "n"], kind: PairLoss, beta: float | Float[Array, ""], smoothing: float = 0.0
) -> Float[Array, "n"]:
    """Loss of each pair from delta.

    Args:
      kind: "sigmoid" (DPO; smoothing > 0 is conservative DPO), "robust" (unbiased when a share `smoothing` of the labels is
        flipped), "hinge" (SLiC), "ipo" (arXiv 2310.12036).
    """
    margin = beta * difference
    win, lose = jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)
    if kind == "sigmoid":
        return -(1 - smoothing) * win - smoothing * lose
    if kind == "robust":
        return (-(1 - smoothing) * win + smoothing * lose) / (1 - 2 * smoothing)
    if kind == "hinge":
        return jnp.maximum(0, 1 - margin)
    if kind == "ipo":
        return (difference - 1 / (2 * beta)) ** 2
    raise ValueError(f"loss={kind!r}: expected one of {', '.join(get_args(PairLoss))}")


def reward_pairs(
    reward: Sequence[float] | np.ndarray,
    group: Sequence[int] | np.ndarray,
    counted: Sequence[bool] | np.ndarray,
    pairing: Pairing = "best_worst",
    drop_ties: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """(chosen, rejected) row indices, groups in the order of their first row. On the host; online DPO, arXiv 2402.04792.

    best_worst: the highest reward against the lowest of the other rows, lowest index on ties; when all rewards of a group
    agree the pair is still its first two rows unless `drop_ties`. all: every ordered pair of rows with different rewards.
    """
    reward, group = np.asarray(reward), np.asarray(group)
    pairs: list[tuple[int, int]] = []
    for g in dict.fromkeys(group[np.asarray(counted, bool)].tolist()):
        rows = np.flatnonzero((group == g) & np.asarray(counted, bool))
        if pairing == "all":
            pairs += [(int(i), int(j)) for i in rows for j in rows if reward[i] > reward[j]]
        elif len(rows) >= 2:
            best = int(rows[np.argmax(reward[rows])])
            others = rows[rows != best]
            worst = int(others[np.argmin(reward[others])])
            if not (drop_ties and reward[best] == reward[worst]):
                pairs.append((best, worst))
    chosen, rejected = np.array(pairs, np.int64).reshape(-1, 2).T
    return chosen, rejected
