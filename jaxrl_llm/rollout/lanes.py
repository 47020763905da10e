"""Attention in the decode loop: slots of one context read it together, each its own tokens apart.

Letters: S slots, W lanes, G places of a lane, L context columns, T own columns, H query heads, K key/value heads, R query heads per
key/value head, hd head width.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.models.attention import accumulator


class Cache(NamedTuple):
    """Keys and values of one layer, for contexts (rows P), lanes (rows W) or own tokens (rows S)."""

    k: Float[Array, "rows K hd columns"]
    v: Float[Array, "rows K columns hd"]


def joined(
    q: Float[Array, "S H hd"],
    seat: tuple[Int[Array, "W G"], Int[Array, "S"], Int[Array, "S"]],
    context: Cache,
    context_seen: Bool[Array, "W G L"],
    own: Cache,
    own_seen: Bool[Array, "S T"],
    scale: float,
) -> Float[Array, "S H hd"]:
    """Attention of one query per slot over its lane's context and its own tokens, the two softmaxes joined exactly.

    The same as `models.attention.joined`, for the decode loop's cache layout. `seat`: the slots of every lane, and
    lane and place of every slot. A slot sees at least its own newest column.
    """
    size, heads, hd = q.shape
    occupant, lane, place = seat
    kv = own.v.shape[1]
    acc = accumulator(q.dtype)
    q = q.reshape(size, kv, heads // kv, hd)

    def part(q: Array, cache: Cache, seen: Array) -> tuple[Array, Array, Array]:
        """Of queries [rows, K, n, hd]: maximum and mass of the exponentials [rows, K, n, 1], weighted values."""
        raw = jnp.einsum("bknh,bkhl->bknl", q, cache.k, preferred_element_type=acc) * scale
        raw = jnp.where(seen[:, None], raw, jnp.finfo(acc).min)
        top = raw.max(-1, keepdims=True)
        mass = jnp.exp(raw - top)
        out = jnp.einsum("bknl,bklh->bknh", mass.astype(cache.v.dtype), cache.v, preferred_element_type=acc)
        return top, mass.sum(-1, keepdims=True), out

    together = q[occupant].swapaxes(1, 2)  # [W, K, G, R, hd]
    lanes, _, places, repeats, _ = together.shape
    seen = jnp.repeat(context_seen, repeats, axis=1)
    parts = part(together.reshape(lanes, kv, places * repeats, hd), context, seen)
    top_c, mass_c, out_c = (x.reshape(lanes, kv, places, repeats, -1)[lane, :, place] for x in parts)
    top_o, mass_o, out_o = part(q, own, own_seen[:, None])
    top = jnp.maximum(top_c, top_o)
    a, b = jnp.exp(top_c - top), jnp.exp(top_o - top)
    out = (a * out_c + b * out_o) / (a * mass_c + b * mass_o)
    return out.astype(q.dtype).reshape(size, heads, hd)
