"""RiskPO's credit (arXiv 2510.00911): prompts are bundled, and a bundle's score is judged by its place in the distribution of
scores. Only `counted` rows take part; the others may hold anything and get 0."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.advantages import group as groups

Share = Literal["uniform", "std", "sum-mean"]
Weighting = Literal["code", "paper"]
FLAT = 1e-3  # standard deviations up to this count as 1


class Bundles(NamedTuple):
    """Samples of blocks of prompts: sample j of a block has the j-th answer of each of its prompts."""

    block: Int[Array, "B"]
    sample: Int[Array, "B"]  # id of the row's sample, below B
    member: Bool[Array, "B"]  # rows that are in a sample
    first: Bool[Array, "B"]  # one row of every sample, which speaks for it
    size: Float[Array, "B"]  # rows in the row's sample
    score: Float[Array, "B"]  # sum of the rewards of the row's sample


def bundles(
    score: Float[Array, "B"],
    group: Int[Array, "B"],
    counted: Bool[Array, "B"],
    order: Int[Array, "B"],
    prompts: int,
) -> Bundles:
    """Blocks of `prompts` consecutive groups (by id; the last may be smaller), answers of a group in the order of `order`.

    A block has as many samples as its smallest group has counted rows; further rows are in none.
    """
    b = score.shape[0]
    last = jnp.iinfo(group.dtype).max  # rows that do not count come behind all prompts
    ids = groups.dense_ids(jnp.where(counted, group, last))
    position = jnp.zeros(b, jnp.int32).at[jnp.lexsort((order, ids))].set(jnp.arange(b, dtype=jnp.int32))
    start = jax.ops.segment_min(position, ids, b)
    block = ids // prompts
    nth = position - start[ids]
    answers = groups.segment(jnp.ones_like(score), ids, counted)
    smallest = jax.ops.segment_min(jnp.where(counted, answers, b), block, b)[block]
    member = counted & (nth < smallest)
    sample = jnp.where(member, start[block * prompts] + nth, b - 1)
    total = groups.segment(score, sample, member)
    size = groups.segment(jnp.ones_like(score), sample, member)
    return Bundles(block, sample, member, member & (ids == block * prompts), size, total)


def quantile(x: Float[Array, "B"], ids: Int[Array, "B"], where: Bool[Array, "B"], level: float) -> Float[Array, "B"]:
    """Quantile of `x` within each row's segment (dense ids), over the rows in `where`, linearly interpolated; 0 of nothing."""
    b = x.shape[0]
    x = jnp.where(where, x, 0)
    ordered = x[jnp.lexsort((x, ids, ~where))]
    count = jax.ops.segment_sum(where.astype(jnp.int32), ids, b)
    start = jnp.cumsum(count) - count
    place = level * jnp.maximum(count[ids] - 1, 0).astype(x.dtype)
    below = jnp.floor(place)
    low = start[ids] + below.astype(jnp.int32)
    high = jnp.minimum(low + 1, start[ids] + jnp.maximum(count[ids] - 1, 0))
    fraction = place - below
    found = (1 - fraction) * ordered[jnp.minimum(low, b - 1)] + fraction * ordered[jnp.minimum(high, b - 1)]
    return jnp.where(count[ids] > 0, found, 0)


def mixed_value(
    score: Float[Array, "*n"],
    q_low: Float[Array, "*n"],
    q_high: Float[Array, "*n"],
    low: float,
    high: float,
    *,
    w: float = 1.5,
    omega: float = 0.5,
    weighting: Weighting = "code",
    natural_baseline: bool = True,
) -> Float[Array, "*n"]:
    """Mixed value at risk of scores against two quantiles, of levels `low` and `high`.

    rvar = (R - q_low)^+ - (R - q_high)^+ + (q_low - q_high), the last bracket with the natural baseline only;
    cvar = -(q_low - R)^+. "code": (w cvar / (low + 1e-6) + rvar / (high - low + 1e-6)) / (w + 1). "paper":
    (1 + omega) cvar + rvar.
    """
    rvar = jax.nn.relu(score - q_low) - jax.nn.relu(score - q_high)
    rvar = rvar + (q_low - q_high) if natural_baseline else rvar
    cvar = -jax.nn.relu(q_low - score)
    if weighting == "paper":
        return (1 + omega) * cvar + rvar
    return (w * cvar / (low + 1e-6) + rvar / (high - low + 1e-6)) / (w + 1)


def divisor(std: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """std + 1e-6, with 1 in place of a standard deviation of at most 1e-3."""
    return jnp.where(std <= FLAT, 1, std) + 1e-6


def to_rows(
    value: Float[Array, "B"],
    bundled: Bundles,
    score: Float[Array, "B"],
    group: Int[Array, "B"],
    counted: Bool[Array, "B"],
    share: Share,
) -> Float[Array, "B"]:
    """What each row gets of its sample's `value`: all of it (uniform), all over the std of its prompt's rewards (std), or the
    part that R_i minus the mean of its prompt is of that sum over the sample (sum-mean; equal parts when the sum is 0)."""
    stats = groups.statistics(score, group, counted)
    if share == "std":
        value = value / divisor(stats.std)
    elif share == "sum-mean":
        above = jnp.where(counted, score - stats.mean, 0)
        total = groups.segment(above, bundled.sample, bundled.member)
        none = jnp.abs(total) <= 1e-6
        value = value * jnp.where(none, 1 / jnp.maximum(bundled.size, 1), above / jnp.where(none, 1, total))
    return jnp.where(bundled.member, value, 0)
