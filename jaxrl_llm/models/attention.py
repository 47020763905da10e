"""Attention as plain functions. Softmax in float32 (float64 for float64 inputs); grouped queries read head h // (H/K).

Letters: B batch, Sq queries, Sk keys, H query heads, K key/value heads, R = H/K, hd head width, C contexts, G rows of one
context, L context length, T own length.
"""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.sharding import target

OUT, LSE = "attention", "attention logsumexp"  # names of what the backward pass is kept from computing again
QUERIES = 256  # of a block of causal attention, at least
MOST_BLOCKS = 8  # as each is compiled


class LayerInfo(NamedTuple):
    """What differs between layers. `window`: keys a query sees including its own, 0 for all; traced inside a scan."""

    window: int | Int[Array, ""]
    scale: float


# (info, q [B,S,H,hd], k [B,S,K,hd], v [B,S,K,hd]) -> (out [B,S,H,hd], y): how a block attends; k is roped, y is kept.
Attend = Callable[[LayerInfo, Array, Array, Array], tuple[Array, Any]]


class Part(NamedTuple):
    """Keys that queries may see: of a context, for all its rows, or of each row (with G)."""

    k: Float[Array, "C *G L K hd"]
    v: Float[Array, "C *G L K hd"]
    mask: Bool[Array, "#C #G #S L"]


def attention(
    q: Float[Array, "B Sq H hd"],
    k: Float[Array, "B Sk K hd"],
    v: Float[Array, "B Sk K hd"],
    mask: Bool[Array, "#B #Sq Sk"],
    scale: float,
) -> Float[Array, "B Sq H hd"]:
    """softmax(q k^T scale) v over the keys where `mask`. The output of a query that sees no key is 0."""
    return joined(q[:, None], [Part(k, v, mask[:, None])], scale)[:, 0]


def visible(query: Int[Array, "..."], key: Int[Array, "..."], window: int | Int[Array, ""] = 0) -> Bool[Array, "..."]:
    """Causal mask, with a sliding window: a query at position i sees keys j with i - window < j <= i."""
    causal = key <= query
    if isinstance(window, int):
        return causal & (key > query - window) if window else causal
    return causal & ((key > query - window) | (window == 0))


def causal(segment: Int[Array, "B S"] | None = None, keep_kv: bool = False) -> Attend:
    """Self-attention over whole sequences. With `segment`, only positions of the same segment see each other: packed
    rows by number, or padding on either side by validity (0 and 1). With `keep_kv`, y = (k, v).
    """

    def attend(info: LayerInfo, q: Array, k: Array, v: Array) -> tuple[Array, Any]:
        at = jnp.arange(q.shape[1])
        out = []
        for queries, keys in causal_blocks(q.shape[1], info.window):
            mask = visible(at[queries, None], at[None, keys], info.window)[None]
            if segment is not None:
                mask = mask & (segment[:, queries, None] == segment[:, None, keys])
            out.append(attention(q[:, queries], k[:, keys], v[:, keys], mask, info.scale))
        return jnp.concatenate(out, axis=1), (k, v) if keep_kv else None

    return attend


def causal_blocks(length: int, window: int | Int[Array, ""] = 0) -> list[tuple[slice, slice]]:
    """Queries to handle at once, and the keys some of them may see: near half the scores of a long sequence are masked."""
    size = max(QUERIES, -(-length // MOST_BLOCKS))
    starts = range(0, length, size)
    first = [max(0, i - window + 1) if isinstance(window, int) and window else 0 for i in starts]
    return [(slice(i, min(i + size, length)), slice(lo, min(i + size, length))) for i, lo in zip(starts, first)]


def joined(q: Float[Array, "C G S H hd"], parts: Sequence[Part], scale: float) -> Float[Array, "C G S H hd"]:
    """Attention over the concatenation of the parts' keys, without concatenating: G rows read one context.

    Their softmaxes are joined exactly by the common maximum and the sum of their masses. As in flash attention (Dao et al.
    2022) the backward pass computes scores again, from the logarithm of that sum. Any part may be empty for a query; where all
    are, the output is 0.
    """
    c, g, s, h, hd = q.shape
    kv = parts[0].k.shape[-2]
    heads = q.reshape(c, g, s, kv, h // kv, hd).transpose(0, 3, 1, 4, 2, 5)
    first = [Part(jnp.moveaxis(k, -2, 1), jnp.moveaxis(v, -2, 1), mask[:, None, :, None]) for k, v, mask in parts]
    out: Array = _joined(heads, *map(tuple, zip(*first)), scale)
    return out.transpose(0, 2, 4, 1, 3, 5).reshape(c, g, s, h, hd)


# Below, heads come first: q [C,K,G,R,S,hd], k and v [C,K,(G,)L,hd], masks [C,1,G,1,S,L].


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _joined(q: Array, ks: tuple[Array, ...], vs: tuple[Array, ...], masks: tuple[Array, ...], scale: float) -> Array:
    return _joined_fwd(q, ks, vs, masks, scale)[0]


def _joined_fwd(q, ks, vs, masks, scale):
    low = jnp.finfo(accumulator(q.dtype)).min
    scores = [jnp.where(mask, _over(q, k) * scale, low) for k, mask in zip(ks, masks)]
    top = reduce(jnp.maximum, [z.max(-1, keepdims=True) for z in scores])
    p = [jnp.where(mask, jnp.exp(z - top), 0) for z, mask in zip(scores, masks)]
    mass = sum(x.sum(-1, keepdims=True) for x in p)
    mass = jnp.where(mass == 0, 1, mass)
    out = sum(_read(x.astype(v.dtype), v) for x, v in zip(p, vs)) / mass
    out = checkpoint_name(out.astype(q.dtype), OUT)
    lse = checkpoint_name(top + jnp.log(mass), LSE)
    return out, (q, ks, vs, masks, out, lse)


def _joined_bwd(scale, kept, g):
    q, ks, vs, masks, out, lse = kept
    acc = accumulator(q.dtype)
    drift = jnp.sum(g.astype(acc) * out.astype(acc), axis=-1, keepdims=True)
    dq, dks, dvs = jnp.zeros(q.shape, acc), [], []
    for k, v, mask in zip(ks, vs, masks):
        p = jnp.where(mask, jnp.exp(_over(q, k) * scale - lse), 0)
        dz = (p * (_over(g, v) - drift) * scale).astype(q.dtype)
        dvs.append(_into(p.astype(g.dtype), g, v))
        dks.append(_into(dz, q, k))
        dq = dq + _read(dz, k)
    return dq.astype(q.dtype), tuple(dks), tuple(dvs), None


_joined.defvjp(_joined_fwd, _joined_bwd)


def _over(q: Array, k: Array) -> Array:
    """Products of queries with keys, [C,K,G,R,S,L]."""
    keys = "ckld" if k.ndim == 4 else "ckgld"
    return jnp.einsum(f"ckgrsd,{keys}->ckgrsl", q, k, preferred_element_type=accumulator(q.dtype))


def _read(p: Array, v: Array) -> Array:
    """Weighted sums of values, [C,K,G,R,S,hd]."""
    keys = "ckld" if v.ndim == 4 else "ckgld"
    return jnp.einsum(f"ckgrsl,{keys}->ckgrsd", p, v, preferred_element_type=accumulator(v.dtype))


def _into(p: Array, g: Array, like: Array) -> Array:
    """Transpose of `_read`: what values get, in the shape and dtype of `like`."""
    keys, acc = "ckld" if like.ndim == 4 else "ckgld", accumulator(p.dtype)
    if target.current().platform != "cpu":
        return jnp.einsum(f"ckgrsl,ckgrsd->{keys}", p, g, preferred_element_type=acc).astype(like.dtype)
    # A CPU turns the left side of such a product round in memory: not p, which has a column for every key.
    turned = keys.replace("ld", "dl")
    out = jnp.einsum(f"ckgrsd,ckgrsl->{turned}", g, p, preferred_element_type=acc)
    return jax.lax.optimization_barrier(out).swapaxes(-1, -2).astype(like.dtype)


def accumulator(dtype: Any) -> jnp.dtype:
    """Dtype of softmax, norms and matrix accumulation for a compute dtype: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)
