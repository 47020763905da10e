"""Statistics of next-token distributions from hidden states, without the [N,V] array of logits.

Letters: N tokens (any batch flattened), D embed, V vocabulary. Above `CHUNK_ELEMENTS` logits, tokens are handled in chunks
whose logits are computed again in the backward pass from the saved log-normalizers, as in fused cross entropies; below
it there is one chunk, whose logits are kept.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.models.attention import accumulator
from jaxrl_llm.sharding import target
from jaxrl_llm.sharding.rules import constrain, ways

VIEWS = ("logp", "entropy", "logsumexp", "tempered_logp", "collision")
CHUNK_ELEMENTS = 2**26  # logits of one chunk on one device: 256 MB in float32

Stats = dict[str, Array]


def logits(hidden: Float[Array, "*N D"], unembed: Float[Array, "D V"]) -> Float[Array, "*N V"]:
    """Logits in float32 (float64 for float64 `hidden`) of a matrix product in the dtype of `hidden`."""
    w = unembed.astype(hidden.dtype)
    return jnp.einsum("...d,dv->...v", hidden, w, preferred_element_type=accumulator(hidden.dtype))


def token_views(
    hidden: Float[Array, "N D"],
    unembed: Float[Array, "D V"],
    targets: Int[Array, "N"],
    names: Sequence[str] = ("logp",),
    temperature: float | Float[Array, ""] = 1.0,
    tempered_temperature: float | Float[Array, ""] | None = None,
    chunk: int = 0,
) -> dict[str, Float[Array, "N"]]:
    """Views of softmax(logits / temperature) at each token, float32 (float64 for float64 `hidden`).

    `logp` of the target, `entropy` in nats, `logsumexp` of logits / temperature, `collision`: the sum of squared
    probabilities (that two draws agree), and `tempered_logp`: the target's log-probability at `tempered_temperature`
    instead. Differentiable in `hidden` and `unembed`, not in temperatures.

    Args:
      chunk: tokens handled at once; 0 chooses by size.
    Raises:
      ValueError: an unknown name, or `tempered_logp` without its temperature.
    """
    if unknown := [n for n in names if n not in VIEWS]:
        raise ValueError(f"view {unknown[0]!r} is unknown, expected some of {', '.join(VIEWS)}")
    if "tempered_logp" in names and tempered_temperature is None:
        raise ValueError("view 'tempered_logp' needs a tempered_temperature")
    acc = accumulator(hidden.dtype)
    heat = jnp.asarray(temperature, acc)
    tempered = jnp.asarray(1.0 if tempered_temperature is None else tempered_temperature, acc)
    chunks = _chunks(hidden.shape[0], unembed.shape[1], chunk)
    return _views(hidden, unembed, targets, heat, tempered, tuple(sorted(set(names))), chunks)


def _chunks(tokens: int, vocab: int, chunk: int) -> int:
    """Number of chunks. Every device holds its share of a chunk's tokens and vocabulary."""
    chunk = chunk or max(CHUNK_ELEMENTS * ways("batch", "vocab") // vocab, ways("batch"))
    return max(-(-tokens // chunk), 1)


def _split(x: Array, chunks: int) -> Array:
    """[N,...] as [chunks, rows, ...], padded with zeros; chunk i takes every chunks-th token from i, so that a batch
    sharded over devices leaves each device a share of every chunk."""
    rows = -(-x.shape[0] // chunks)
    rows += -rows % ways("batch")
    x = jnp.pad(x, [(0, rows * chunks - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(rows, chunks, *x.shape[1:]).swapaxes(0, 1)


def _join(x: Array, tokens: int) -> Array:
    """Inverse of `_split`."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])[:tokens]


def _stats(z: Array, targets: Array, heat: Array, tempered: Array, names: tuple[str, ...]) -> Stats:
    """The named views of logits z [n,V], and what the backward pass needs besides: all [n]."""

    def at_target(a: Array) -> Array:
        return jnp.take_along_axis(a, targets[:, None], axis=1)[:, 0]

    a = z / heat
    lse = jax.nn.logsumexp(a, axis=1)
    stats = {"logsumexp": lse}
    if "logp" in names:
        stats["logp"] = at_target(a) - lse
    if "entropy" in names:
        stats["entropy"] = lse - jnp.sum(jnp.exp(a - lse[:, None]) * a, axis=1)
    if "collision" in names:
        stats["collision"] = jnp.sum(jnp.exp(2 * (a - lse[:, None])), axis=1)
    if "tempered_logp" in names:
        b = z / tempered
        stats["tempered_logsumexp"] = jax.nn.logsumexp(b, axis=1)
        stats["tempered_logp"] = at_target(b) - stats["tempered_logsumexp"]
    return stats


def _logit_gradient(z: Array, targets: Array, heat: Array, tempered: Array, stats: Stats, g: Stats) -> Array:
    """Pull cotangents [n] of the views back to logits z [n,V].

    With p = softmax(a), a = z / heat: d logp = onehot - p; d logsumexp = p; d entropy = -p (a - lse + entropy);
    d collision = 2 p (p - collision).
    """
    a = z / heat
    hit = jnp.arange(z.shape[1]) == targets[:, None]
    centred = a - stats["logsumexp"][:, None]
    p = jnp.exp(centred)
    zero = jnp.zeros_like(stats["logsumexp"])
    g_logp, g_lse = g.get("logp", zero), g.get("logsumexp", zero)
    factor = (g_lse - g_logp)[:, None]
    if "entropy" in g:
        factor = factor - g["entropy"][:, None] * (centred + stats["entropy"][:, None])
    if "collision" in g:
        factor = factor + 2 * g["collision"][:, None] * (p - stats["collision"][:, None])
    dz = (p * factor + jnp.where(hit, g_logp[:, None], 0)) / heat
    if "tempered_logp" in g:
        p = jnp.exp(z / tempered - stats["tempered_logsumexp"][:, None])
        dz = dz + g["tempered_logp"][:, None] * (hit - p) / tempered
    return dz


def _gathered(unembed: Array, dtype: Any) -> Array:
    """The output matrix in the compute dtype, whole along D and sharded along V, fetched once for all chunks."""
    return constrain(unembed.astype(dtype), None, "vocab")


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _views(hidden, unembed, targets, heat, tempered, names, chunks):
    return _views_fwd(hidden, unembed, targets, heat, tempered, names, chunks)[0]


def _views_fwd(hidden, unembed, targets, heat, tempered, names, chunks):
    w = _gathered(unembed, hidden.dtype)
    if chunks == 1:
        z = logits(hidden, w)
        stats = _stats(z, targets, heat, tempered, names)
    else:
        z = None

        def one(_, part):
            h, t = part
            return None, _stats(logits(constrain(h, "batch", None), w), t, heat, tempered, names)

        _, stats = jax.lax.scan(one, None, (_split(hidden, chunks), _split(targets, chunks)))
        stats = {k: _join(v, hidden.shape[0]) for k, v in stats.items()}
    kept = {k: v for k, v in stats.items() if k not in ("logp", "tempered_logp")}
    return {k: stats[k] for k in names}, (hidden, unembed, targets, heat, tempered, kept, z)


def _views_bwd(names, chunks, residuals, g):
    hidden, unembed, targets, heat, tempered, stats, z = residuals
    w = _gathered(unembed, hidden.dtype)
    acc = accumulator(hidden.dtype)

    def one(part, shards):
        """Gradients of the output matrix [shards,D,V], from each shard of the tokens, and of the hidden states."""
        h, t, s, g, z = part
        h = constrain(h, "batch", None)
        dz = _logit_gradient(logits(h, w) if z is None else z, t, heat, tempered, s, g).astype(hidden.dtype)
        dh = jnp.einsum("nv,dv->nd", dz, w, preferred_element_type=acc).astype(hidden.dtype)
        h, dz = (x.reshape(shards, -1, x.shape[1]) for x in (h, dz))
        return jnp.einsum("snd,snv->sdv", h, dz, preferred_element_type=acc), dh

    if chunks == 1:
        dw, dh = one((hidden, targets, stats, g, z), 1)
    else:
        # Devices sum over their own tokens of all chunks, then over devices: once, not for every chunk. For that each
        # holds a sum that is not sharded along D: D V / tp numbers in at least float32.
        shards = ways("batch")

        def add(dw, part):
            dw_part, dh = one(part, shards)
            return constrain(dw + dw_part, "batch", None, "vocab"), dh

        parts = jax.tree.map(partial(_split, chunks=chunks), (hidden, targets, stats, g))
        dw, dh = jax.lax.scan(add, jnp.zeros((shards, *unembed.shape), acc), (*parts, None))
        dh = _join(dh, hidden.shape[0])
    dw = constrain(dw.sum(0), "embed", "vocab")
    if ways("batch") > 1 or target.current().platform == "cpu":
        # Every device may have the whole sum before it takes its part. A tied matrix's part is first needed at the end of the
        # backward pass, and XLA would keep the whole until then. On a CPU it would compute the transpose, half as fast.
        dw = jax.lax.optimization_barrier(dw)
    return dh, dw.astype(unembed.dtype), None, None, None


_views.defvjp(_views_fwd, _views_bwd)
