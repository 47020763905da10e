"""Losses on pairs of completions and the pairs themselves. DPO, arXiv 2305.18290, with the IPO, SLiC and cDPO losses."""

import math
from collections.abc import Iterator, Sequence
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
        return jax.nn.relu(1 - margin)  # at the kink the gradient is 0
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


def round_pairs(
    reward: Sequence[float] | np.ndarray, order: Sequence[int], tournament: bool = False
) -> list[tuple[int, int]]:
    """(winner, loser) of rows meeting two by two in this order; the larger reward wins, the first on ties. On the host.

    With `tournament` the winners meet again until one is left: len(order) - 1 pairs; an odd one out passes to the next round.
    RSO, arXiv 2309.06657.
    """
    pairs: list[tuple[int, int]] = []
    left = list(order)
    while len(left) > 1:
        met = [(a, b) if reward[a] >= reward[b] else (b, a) for a, b in zip(left[::2], left[1::2])]
        pairs += met
        left = [winner for winner, _ in met] + left[len(left) // 2 * 2 :]
        if not tournament:
            break
    return pairs


def rejection_sample(reward: Sequence[float], num: int, beta: float, uniforms: Iterator[float]) -> list[int]:
    """`num` of the candidates that follow pi proportional to pi_0 exp(reward / beta) when they were drawn from pi_0.

    Statistical rejection sampling, RSO, arXiv 2309.06657, algorithm 1: candidates are passed in order, each accepted with
    probability exp((reward - M) / beta), M being the largest reward left at the beginning of the pass. beta = 0 takes the best
    ones, a large beta the first ones.

    Args:
      reward: of different candidates (repeats would be accepted twice).
      uniforms: random numbers in [0, 1), one for each candidate looked at.
    Returns: indices in the order of acceptance. Raises ValueError when there are fewer than `num` candidates.
    """
    if num > len(reward):
        raise ValueError(f"num={num}: expected at most the {len(reward)} different candidates")
    left, accepted = list(range(len(reward))), []
    while len(accepted) < num:
        best, taken = max(reward[c] for c in left), set()
        for c in left:
            short = reward[c] - best  # 0 for the best
            chance = math.exp(short / beta) if beta > 0 else float(short == 0)
            if next(uniforms) < chance:
                accepted.append(c)
                taken.add(c)
                if len(accepted) == num:
                    break
        left = [c for c in left if c not in taken]
    return accepted


def pairwise_reward(preference: Float[Array, "n"]) -> Float[Array, "n"]:
    """The reward a pairwise model gives against a fixed baseline completion: logit of P(completion > baseline). RSO."""
    preference = jnp.asarray(preference)
    return jnp.log(preference) - jnp.log1p(-preference)
