"""Aggregation as weights: `loss = weighted_sum(token_loss, weight)`, with the denominators of the whole minibatch inside.

Splitting a minibatch into microbatches or over devices then never changes the loss. Whether a row without trained
tokens counts in a mean over rows is the explicit `count_empty` (specs differ, peers too).
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
AGGREGATIONS = get_args(Aggregation)


def weighted_sum(x: Float[Array, "B T"], weight: Float[Array, "B T"]) -> Float[Array, ""]:
    """Sum of `weight * x` where the weight is not 0; `x` may be NaN or inf elsewhere."""
    return jnp.sum(jnp.where(weight != 0, weight * jnp.where(weight != 0, x, 0), 0))


def _float(mask: Array) -> Array:
    return mask.astype(jnp.result_type(float))  # float64 when x64 is on


def token_mean(mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """1 / (number of trained tokens of the minibatch). DAPO's aggregation, arXiv 2503.14476."""
    mask = _float(mask)
    return mask / jnp.maximum(mask.sum(), 1)


def _rows(mask: Array, count_empty: bool, rows: Array | None) -> Array:
    """Number of rows in a mean over rows: those with a trained token, or all of `rows`."""
    counted = jnp.any(mask, -1) if not count_empty else (jnp.ones(mask.shape[0], bool) if rows is None else rows)
    return jnp.maximum(_float(jnp.sum(counted)), 1)


def seq_mean_token_mean(
    mask: Bool[Array, "B T"], count_empty: bool = False, rows: Bool[Array, "B"] | None = None
) -> Float[Array, "B T"]:
    """Mean over rows of the mean over a row's trained tokens. GRPO's aggregation, arXiv 2402.03300.

    rows: which rows exist when `count_empty` (padding rows are no rows); all when None.
    """
    m = _float(mask)
    return m / jnp.maximum(m.sum(-1, keepdims=True), 1) / _rows(mask, count_empty, rows)


def seq_mean_token_sum(
    mask: Bool[Array, "B T"],
    divisor: float = 1.0,
    count_empty: bool = False,
    rows: Bool[Array, "B"] | None = None,
) -> Float[Array, "B T"]:
    """Mean over rows of the sum over a row's trained tokens, over a constant. Dr.GRPO with divisor = T_max, 2503.20783."""
    return _float(mask) / divisor / _rows(mask, count_empty, rows)


def mean_over_groups(mask: Bool[Array, "B T"], group: Int[Array, "B"], row_means: bool = False) -> Float[Array, "B T"]:
    """Mean over groups of the mean over a group's trained tokens, or with `row_means` of its rows' token means.

    Groups and rows without trained tokens are not counted; ids are arbitrary integers.
    """
    size = group.shape[0]
    ids = jnp.unique(group, return_inverse=True, size=size)[1].reshape(group.shape)
    votes = _float(mask)
    if row_means:
        votes = votes / jnp.maximum(votes.sum(-1, keepdims=True), 1)
    total = jax.ops.segment_sum(votes.sum(-1), ids, size)
    return votes / jnp.where(total > 0, total, 1)[ids][:, None] / jnp.maximum(jnp.sum(total > 0), 1)


def aggregation(
    name: Aggregation,
    mask: Bool[Array, "B T"],
    divisor: float | None = None,
    count_empty: bool = False,
    rows: Bool[Array, "B"] | None = None,
) -> Float[Array, "B T"]:
    """Weights by the name of the aggregation; `divisor` is the constant of seq-mean-token-sum-norm, T when None."""
    if name == "token-mean":
        return token_mean(mask)
    if name == "seq-mean-token-mean":
        return seq_mean_token_mean(mask, count_empty, rows)
    if name == "seq-mean-token-sum":
        return seq_mean_token_sum(mask, 1.0, count_empty, rows)
    if name == "seq-mean-token-sum-norm":
        return seq_mean_token_sum(mask, mask.shape[-1] if divisor is None else divisor, count_empty, rows)
    raise ValueError(f"aggregation={name!r}: expected one of {', '.join(AGGREGATIONS)}")
