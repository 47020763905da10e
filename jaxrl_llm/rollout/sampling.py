"""Choosing the next token: temperature, top-k, top-p and min-p as arrays, one uniform number per row.

The distribution sampled from is `softmax(truncate(logits, ...))`: logits divided by the temperature, then top-k, then
top-p over what top-k left, then min-p. Every rule keeps all tokens at or above a threshold, so equal logits are kept or
dropped together. `truncate` is the reference for whoever recomputes a sampler's log-probs.

Letters in shapes: S slots (rows), V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

BLOCK = 128  # tokens per block of the two-level inverse CDF


class Sampling(NamedTuple):
    """How each row samples. Temperature 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 keep everything."""

    temperature: Float[Array, "S"]
    top_k: Int[Array, "S"]
    top_p: Float[Array, "S"]
    min_p: Float[Array, "S"]


class Choice(NamedTuple):
    """The chosen tokens and what the sampler says of them.

    margin: how far the choice was from being another one, never negative: the distance of the uniform number from
      the edges of the token's interval (as a probability), or for greedy rows the lead over the runner-up (in logits);
      with truncation also the distance of its thresholds from the nearest token.
    """

    token: Int[Array, "S"]
    sampler_logp: Float[Array, "S"]  # under the distribution sampled from; 0 for greedy rows
    policy_logp: Float[Array, "S"]  # log softmax(logits / score temperature), whole vocabulary
    margin: Float[Array, "S"]


def item_keys(seed: int | Array, step: int | Array, items: Int[Array, "N"]) -> UInt[Array, "N 2"]:
    """Threefry key data of each item: a function of (seed, step, item) only."""
    base = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
    return jax.random.key_data(jax.vmap(lambda i: jax.random.fold_in(base, i))(items))


def uniforms(keys: UInt[Array, "S 2"], position: Int[Array, "S"]) -> Float[Array, "S"]:
    """One number in [0, 1) per row: a function of the item's key and the position in its completion."""

    def one(key, t):
        key = jax.random.wrap_key_data(key, impl="threefry2x32")
        return jax.random.uniform(jax.random.fold_in(key, t), dtype=jnp.float32)

    return jax.vmap(one)(keys, position)


def choose(
    logits: Float[Array, "S V"],
    uniform: Float[Array, "S"],
    sampling: Sampling,
    *,
    score_temperature: float,
    truncated: bool,
) -> Choice:
    """Sample one token per row by inverse CDF, or take the most likely one where the temperature is 0.

    Args:
      uniform: numbers in [0, 1), one per row.
      score_temperature: of `policy_logp`; static.
      truncated: static; False promises that no row truncates and skips that work.
    """
    greedy = sampling.temperature <= 0
    tau = jnp.where(greedy, score_temperature, sampling.temperature).astype(logits.dtype)
    scaled = logits / tau[:, None]
    top = scaled.max(-1)
    if truncated:
        keep, edge = _keep(scaled, sampling.top_k, sampling.top_p, sampling.min_p)
        kept = jnp.where(keep, scaled, -jnp.inf)
    else:
        kept, edge = scaled, jnp.full(top.shape, jnp.inf, logits.dtype)
    drawn, total, margin = lax.cond(
        jnp.all(greedy),
        lambda: (jnp.zeros(top.shape, jnp.int32), jnp.ones_like(top), jnp.zeros_like(top)),
        lambda: _inverse_cdf(kept, top, uniform.astype(logits.dtype)),
    )
    margin = jnp.minimum(margin, edge)
    best, lead = lax.cond(
        jnp.any(greedy), lambda: _best(logits), lambda: (jnp.zeros(top.shape, jnp.int32), jnp.zeros_like(top))
    )
    token = jnp.where(greedy, best, drawn)

    def at(x: Float[Array, "S V"]) -> Float[Array, "S"]:
        return jnp.take_along_axis(x, token[:, None], -1)[:, 0]

    sampler_logp = jnp.where(greedy, 0.0, at(scaled) - top - jnp.log(total))
    if truncated:  # `total` misses what was dropped
        logsumexp = jax.nn.logsumexp(logits / score_temperature, -1)
    else:
        logsumexp = lax.cond(
            jnp.all(~greedy & (tau == score_temperature)),
            lambda: top + jnp.log(total),
            lambda: jax.nn.logsumexp(logits / score_temperature, -1),
        )
    policy_logp = at(logits) / score_temperature - logsumexp
    return Choice(token, sampler_logp, policy_logp, jnp.where(greedy, lead, margin))


def truncate(
    logits: Float[Array, "S V"],
    temperature: Float[Array, "S"],
    top_k: Int[Array, "S"],
    top_p: Float[Array, "S"],
    min_p: Float[Array, "S"],
) -> Float[Array, "S V"]:
    """Logits divided by the (positive) temperature, -inf outside the kept set: its softmax is what is sampled from.

    top_k keeps the k most likely tokens (0: all). top_p then keeps the smallest set of most likely tokens whose share
    of the remaining mass is at least p (Holtzman et al. 2020, arXiv:1904.09751). min_p then drops tokens below this
    share of the most likely token's probability (Nguyen et al. 2024, arXiv:2407.01082). The most likely token stays.
    """
    scaled = logits / temperature[:, None]
    return jnp.where(_keep(scaled, top_k, top_p, min_p)[0], scaled, -jnp.inf)


def _keep(
    scaled: Float[Array, "S V"], top_k: Int[Array, "S"], top_p: Float[Array, "S"], min_p: Float[Array, "S"]
) -> tuple[Bool[Array, "S V"], Float[Array, "S"]]:
    """The kept set, and how near its thresholds came to including or excluding another token."""
    vocab = scaled.shape[-1]
    top = scaled.max(-1, keepdims=True)
    order = _ordered_bits(scaled)
    lowest = jnp.zeros(order.shape[0], order.dtype)  # a threshold that keeps everything
    # The largest threshold that still leaves enough tokens, then enough mass, found bit by bit: no sort.
    k = jnp.where(top_k > 0, jnp.minimum(top_k, vocab), vocab)
    most_likely = lax.cond(
        jnp.any(k < vocab), lambda: _largest(order, lambda above: above.sum(-1) >= k), lambda: lowest
    )
    keep = order >= most_likely[:, None]
    mass = jnp.where(keep, jnp.exp(scaled - top), 0)
    enough = jnp.where(top_p < 1, top_p, 0).astype(scaled.dtype) * mass.sum(-1)
    nucleus = lax.cond(
        jnp.any(top_p < 1),
        lambda: _largest(order, lambda above: jnp.where(above, mass, 0).sum(-1) >= enough),
        lambda: lowest,
    )
    keep_p = keep & ((order >= nucleus[:, None]) | (top_p >= 1)[:, None])
    floor = jnp.log(min_p).astype(scaled.dtype)[:, None]  # -inf keeps everything
    final = (keep_p & (scaled - top >= floor)) | (scaled == top)

    def gap(kept: Bool[Array, "S V"], among: Bool[Array, "S V"]) -> Float[Array, "S"]:
        lowest = jnp.min(jnp.where(kept, scaled, jnp.inf), -1)
        return lowest - jnp.max(jnp.where(among & ~kept, scaled, -jnp.inf), -1)

    inside = jnp.where(keep_p, mass, 0).sum(-1)
    edge_mass = jnp.where(order == nucleus[:, None], mass, 0).sum(-1)
    slack = jnp.minimum(jnp.abs(inside - enough), jnp.abs(inside - edge_mass - enough)) / mass.sum(-1)
    edge = jnp.minimum(
        gap(keep, jnp.ones_like(keep)),
        jnp.minimum(
            jnp.where(top_p >= 1, jnp.inf, slack),
            jnp.min(jnp.where(keep_p, jnp.abs(scaled - top - floor), jnp.inf), -1),
        ),
    )
    return final, edge


def _ordered_bits(x: Float[Array, "S V"]) -> UInt[Array, "S V"]:
    """Unsigned integers in the order of the floats."""
    uint = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    bits = lax.bitcast_convert_type(x, uint)
    sign = jnp.asarray(1 << (8 * x.dtype.itemsize - 1), uint)
    return jnp.where(bits & sign, ~bits, bits | sign)


def _largest(order: UInt[Array, "S V"], enough) -> UInt[Array, "S"]:
    """Per row the largest threshold for which `enough(order >= threshold)` holds; it must hold for 0."""
    width = 8 * order.dtype.itemsize

    def bit(i, threshold):
        trial = threshold | (jnp.asarray(1, order.dtype) << (width - 1 - i).astype(order.dtype))
        return jnp.where(enough(order >= trial[:, None]), trial, threshold)

    return lax.fori_loop(0, width, bit, jnp.zeros(order.shape[0], order.dtype))


def _inverse_cdf(
    kept: Float[Array, "S V"], top: Float[Array, "S"], uniform: Float[Array, "S"]
) -> tuple[Int[Array, "S"], Float[Array, "S"], Float[Array, "S"]]:
    """Token whose interval of the CDF holds `uniform`, the total of exp(kept - top), and the distance to the edges.

    Two levels: the block by the running sum of block masses, then the token inside that block.
    """
    rows, vocab = kept.shape
    block = BLOCK if vocab > 2 * BLOCK else vocab
    blocks = -(-vocab // block)
    if blocks * block != vocab:
        kept = jnp.pad(kept, ((0, 0), (0, blocks * block - vocab)), constant_values=-jnp.inf)
    kept = kept.reshape(rows, blocks, block)
    upper = jnp.cumsum(jnp.exp(kept - top[:, None, None]).sum(-1), -1)
    total = upper[:, -1]
    target = uniform * total
    which = _first_above(upper, target)
    below = jnp.where(which > 0, _pick(upper, jnp.maximum(which - 1, 0)), 0)
    inside = jnp.exp(jnp.take_along_axis(kept, which[:, None, None], 1)[:, 0] - top[:, None])
    edges = below[:, None] + jnp.cumsum(inside, -1)
    index = _first_above(edges, target)
    high = _pick(edges, index)
    margin = jnp.minimum(target - (high - _pick(inside, index)), high - target) / total
    return which * block + index, total, jnp.maximum(margin, 0)


def _first_above(cdf: Float[Array, "S n"], target: Float[Array, "S"]) -> Int[Array, "S"]:
    """First index whose running sum exceeds the target; rounding at the end never yields an index without mass."""
    count = jnp.sum(cdf <= target[:, None], -1)
    last = jnp.sum(cdf < cdf[:, -1:], -1)  # first index that reaches the total: the last one with mass
    return jnp.minimum(count, last).astype(jnp.int32)


def _pick(x: Float[Array, "S n"], index: Int[Array, "S"]) -> Float[Array, "S"]:
    return jnp.take_along_axis(x, index[:, None], -1)[:, 0]


def _best(logits: Float[Array, "S V"]) -> tuple[Int[Array, "S"], Float[Array, "S"]]:
    """The most likely token (the first of equals) and its lead over the runner-up."""
    best = jnp.argmax(logits, -1).astype(jnp.int32)
    others = jnp.where(jnp.arange(logits.shape[-1]) == best[:, None], -jnp.inf, logits)
    return best, logits.max(-1) - others.max(-1)
