"""Advantages from comparing the rewards of one group (usually one prompt). Groups are ragged, ids are arbitrary integers.

Only rows with `counted` (in statistics and scored) enter a statistic or get an advantage; the others may hold NaN rewards and
get exactly 0. A group whose rewards spread (max - min) by at most `spread_tol * (1 + max |reward|)` has advantage exactly 0,
so rounding noise is never divided by its own tiny standard deviation.
"""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.scipy.special import betaln, xlog1py, xlogy
from jaxtyping import Array, Bool, Float, Int

SPREAD_TOL = 1e-6
Scale = Literal["group", "batch", "none"]
Singleton = Literal["zero", "raw"]


class GroupStats(NamedTuple):
    """Statistics of each row's group, repeated for its rows; groups without counted rows have count 0 and mean 0."""

    id: Int[Array, "B"]  # dense ids 0..B-1
    count: Float[Array, "B"]  # counted rows
    mean: Float[Array, "B"]
    std: Float[Array, "B"]
    spread: Float[Array, "B"]  # max - min
    flat: Bool[Array, "B"]  # the spread is within the tolerance; true for groups of one


def dense_ids(group: Int[Array, "B"]) -> Int[Array, "B"]:
    """Group ids renumbered 0..(number of groups - 1), fit for segment sums of size B."""
    return jnp.unique(group, return_inverse=True, size=group.shape[0])[1].reshape(group.shape)


def segment(x: Float[Array, "B"], ids: Int[Array, "B"], where: Bool[Array, "B"]) -> Float[Array, "B"]:
    """Sum of `x` over each row's segment, rows outside `where` left out, repeated for its rows."""
    return jax.ops.segment_sum(jnp.where(where, x, 0), ids, x.shape[0])[ids]


def statistics(
    score: Float[Array, "B"],
    group: Int[Array, "B"],
    counted: Bool[Array, "B"],
    ddof: int = 1,
    spread_tol: float = SPREAD_TOL,
) -> GroupStats:
    """Mean, standard deviation (`ddof` degrees of freedom taken) and spread of each row's group."""
    ids, size = dense_ids(group), group.shape[0]
    count = segment(jnp.ones_like(score), ids, counted)
    mean = segment(score, ids, counted) / jnp.maximum(count, 1)
    variance = segment((score - mean) ** 2, ids, counted) / jnp.maximum(count - ddof, 1)
    highest = jax.ops.segment_max(jnp.where(counted, score, -jnp.inf), ids, size)[ids]
    lowest = jax.ops.segment_min(jnp.where(counted, score, jnp.inf), ids, size)[ids]
    spread = jnp.where(count > 0, highest - lowest, 0)
    largest = jnp.where(count > 0, jnp.maximum(jnp.abs(highest), jnp.abs(lowest)), 0)
    return GroupStats(ids, count, mean, jnp.sqrt(variance), spread, spread <= spread_tol * (1 + largest))


def normalized(
    score: Float[Array, "B"],
    group: Int[Array, "B"],
    counted: Bool[Array, "B"],
    scale: Scale = "group",
    ddof: int = 1,
    eps: float = 1e-6,
    spread_tol: float = SPREAD_TOL,
    singleton: Singleton = "zero",
) -> Float[Array, "B"]:
    """(R - group mean) / (std + eps). GRPO, arXiv 2402.03300.

    Args:
      scale: "group" divides by the group's std, "batch" by the std of all counted rewards, "none" by nothing (Dr.GRPO).
      ddof: 1 as in verl and TRL, 0 for the population std.
      singleton: a group of one counted row gets 0 ("zero", TRL), or keeps its reward with mean 0 and std 1 ("raw", verl).
    """
    if scale not in get_args(Scale):
        raise ValueError(f"scale={scale!r}: expected one of {', '.join(get_args(Scale))}")
    stats = statistics(score, group, counted, ddof, spread_tol)
    alone, keep_alone = stats.count == 1, singleton == "raw"
    if scale == "batch":
        total = jnp.sum(counted)
        mean = jnp.sum(jnp.where(counted, score, 0)) / jnp.maximum(total, 1)
        variance = jnp.sum(jnp.where(counted, (score - mean) ** 2, 0)) / jnp.maximum(total - ddof, 1)
        std = jnp.sqrt(variance)
    else:
        std = stats.std
    divisor = 1.0 if scale == "none" else jnp.where(alone, 1, std) + eps
    centred = jnp.where(alone, score, score - stats.mean)
    return jnp.where(counted & jnp.where(alone, keep_alone, ~stats.flat), centred / divisor, 0)


def leave_one_out(
    score: Float[Array, "B"],
    group: Int[Array, "B"],
    counted: Bool[Array, "B"],
    spread_tol: float = SPREAD_TOL,
    singleton: Singleton = "zero",
) -> Float[Array, "B"]:
    """R minus the mean of the *other* rows of the group, G/(G-1) (R - mean). RLOO, arXiv 2402.14740.

    singleton: a group of one gets 0 ("zero"), or keeps its reward ("raw").
    """
    stats = statistics(score, group, counted, spread_tol=spread_tol)
    factor = stats.count / jnp.maximum(stats.count - 1, 1)
    alone = score if singleton == "raw" else jnp.zeros_like(score)
    compared = jnp.where(stats.flat, 0, factor * (score - stats.mean))
    return jnp.where(counted, jnp.where(stats.count == 1, alone, compared), 0)


def weighted_baseline(
    score: Float[Array, "B"],
    weight: Float[Array, "B"],
    group: Int[Array, "B"],
    counted: Bool[Array, "B"],
    leave_one_out: bool = False,
    spread_tol: float = SPREAD_TOL,
) -> Float[Array, "B"]:
    """R - sum_j w_j R_j / sum_j w_j over the group, or over the other rows with `leave_one_out`.

    With w the squared norm of a row's score function the baseline has least variance. Where all weights are 0 it is the plain
    mean, so equal weights give R - mean, or G/(G-1) times that.
    """
    stats = statistics(score, group, counted, spread_tol=spread_tol)
    safe = jnp.where(counted, score, 0)

    def mean(w: Float[Array, "B"]) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
        """(weighted sum of scores, sum of weights) of what a row is compared with."""
        own = jnp.where(counted & leave_one_out, w, 0)
        return segment(w * safe, stats.id, counted) - own * safe, segment(w, stats.id, counted) - own

    total, mass = mean(jnp.where(counted, weight, 0))
    plain, others = mean(jnp.ones_like(score))
    weighed = mass > 1e-12 * segment(jnp.where(counted, weight, 0), stats.id, counted)  # more than rounding is left
    baseline = jnp.where(weighed, total / jnp.where(weighed, mass, 1), plain / jnp.maximum(others, 1))
    return jnp.where(counted & ~stats.flat, score - baseline, 0)


def bnpo(
    score: Float[Array, "B"],
    group: Int[Array, "B"],
    counted: Bool[Array, "B"],
    low: float = 0.0,
    high: float = 1.0,
    spread_tol: float = SPREAD_TOL,
) -> Float[Array, "B"]:
    """(R - p) / BetaPDF(p; alpha, beta) with rewards mapped from [low, high] to [0, 1]. BNPO, arXiv 2506.02864.

    alpha and beta follow from the mean and variance (ddof 1) of the group means p over the batch's groups; the factor is at
    most 1e6. With one group, or equal means in all groups (our choice), alpha = beta = 1.
    """
    score = (score - low) / (high - low)
    stats = statistics(score, group, counted, spread_tol=spread_tol)
    # One vote per group: each counted row carries 1 / (counted rows of its group).
    vote = jnp.where(counted, 1 / jnp.maximum(stats.count, 1), 0)
    groups = jnp.sum(vote)
    mean = jnp.sum(vote * stats.mean) / jnp.maximum(groups, 1)
    variance = jnp.sum(vote * (stats.mean - mean) ** 2) / jnp.maximum(groups - 1, 1)
    shaped = (groups > 1.5) & (variance > spread_tol**2)
    mean, variance = jnp.where(shaped, mean, 0), jnp.where(shaped, variance, 1)
    strength = mean * (1 - mean) / variance - 1
    alpha = jnp.maximum(1, 1 + strength * mean / 3)
    beta = jnp.maximum(1, 1 + strength * (1 - mean) / 3)
    p = jnp.clip(stats.mean, 0, 1)
    log_pdf = xlogy(alpha - 1, p) + xlog1py(beta - 1, -p) - betaln(alpha, beta)
    factor = jnp.minimum(jnp.exp(-log_pdf), 1e6)
    return jnp.where(counted & ~stats.flat, factor * (score - stats.mean), 0)
