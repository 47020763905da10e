"""Attention as plain functions. Softmax in float32 (float64 for float64 inputs); grouped queries read head h // (H/K).

Letters: B batch, Sq queries, Sk keys, H query heads, K key/value heads, R = H/K, hd head width, C contexts, G rows of one
context, L context length, T own length.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class LayerInfo(NamedTuple):
    """What differs between layers. `window`: keys a query sees including its own, 0 for all; traced inside a scan."""

    window: int | Int[Array, ""]
    scale: float


# (info, q [B,S,H,hd], k [B,S,K,hd], v [B,S,K,hd]) -> (out [B,S,H,hd], y): how a block attends; k is roped, y is kept.
Attend = Callable[[LayerInfo, Array, Array, Array], tuple[Array, Any]]


def attention(
    q: Float[Array, "B Sq H hd"],
    k: Float[Array, "B Sk K hd"],
    v: Float[Array, "B Sk K hd"],
    mask: Bool[Array, "B #H Sq Sk"] | None,
    scale: float,
) -> Float[Array, "B Sq H hd"]:
    """softmax(q k^T scale) v over the keys where `mask` (broadcastable). A query that sees no key gets a finite value."""
    b, s, h, hd = q.shape
    kv = k.shape[2]
    acc = accumulator(q.dtype)
    scores = jnp.einsum("bqkrd,bskd->bkrqs", q.reshape(b, s, kv, h // kv, hd), k, preferred_element_type=acc) * scale
    if mask is not None:
        mask = mask[:, :, None] if mask.shape[1] == 1 else mask.reshape(*mask.shape[:1], kv, h // kv, *mask.shape[2:])
        scores = jnp.where(mask, scores, jnp.finfo(acc).min)
    p = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkrqs,bskd->bqkrd", p, v, preferred_element_type=acc).astype(q.dtype).reshape(b, s, h, hd)


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
        mask = visible(at[:, None], at[None, :], info.window)[None, None]
        if segment is not None:
            mask = mask & (segment[:, None, :, None] == segment[:, None, None, :])
        return attention(q, k, v, mask, info.scale), (k, v) if keep_kv else None

    return attend


def two_part(
    q: Float[Array, "C G S H hd"],
    k_ctx: Float[Array, "C L K hd"],
    v_ctx: Float[Array, "C L K hd"],
    ctx_mask: Bool[Array, "#C #G #S L"],
    k_own: Float[Array, "C G T K hd"],
    v_own: Float[Array, "C G T K hd"],
    own_mask: Bool[Array, "#C #G #S T"],
    scale: float,
) -> Float[Array, "C G S H hd"]:
    """Attention over the concatenation of a context and own tokens, without concatenating: G rows read one context.

    The two softmaxes are joined exactly by their common maximum and the sum of their masses (as in flash attention,
    Dao et al. 2022). Either part may be empty for a query; where both are, the output is 0. Masks broadcast.
    """
    c, g, s, h, hd = q.shape
    kv = k_ctx.shape[2]
    acc = accumulator(q.dtype)
    q = q.reshape(c, g, s, kv, h // kv, hd)
    ctx_mask, own_mask = ctx_mask[:, None, None], own_mask[:, None, None]
    low = jnp.finfo(acc).min
    ctx = jnp.einsum("cgskrd,clkd->ckrgsl", q, k_ctx, preferred_element_type=acc) * scale
    own = jnp.einsum("cgskrd,cgtkd->ckrgst", q, k_own, preferred_element_type=acc) * scale
    ctx, own = jnp.where(ctx_mask, ctx, low), jnp.where(own_mask, own, low)
    top = jax.lax.stop_gradient(jnp.maximum(ctx.max(-1, keepdims=True), own.max(-1, keepdims=True)))
    ctx, own = jnp.where(ctx_mask, jnp.exp(ctx - top), 0), jnp.where(own_mask, jnp.exp(own - top), 0)
    mass = ctx.sum(-1) + own.sum(-1)
    out = jnp.einsum("ckrgsl,clkd->cgskrd", ctx.astype(v_ctx.dtype), v_ctx, preferred_element_type=acc)
    out = out + jnp.einsum("ckrgst,cgtkd->cgskrd", own.astype(v_own.dtype), v_own, preferred_element_type=acc)
    mass = jnp.moveaxis(jnp.where(mass == 0, 1, mass), (1, 2), (3, 4))  # [C,K,R,G,S] -> [C,G,S,K,R]
    return (out / mass[..., None]).astype(v_own.dtype).reshape(c, g, s, h, hd)


def accumulator(dtype: Any) -> jnp.dtype:
    """Dtype of softmax, norms and matrix accumulation for a compute dtype: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)
