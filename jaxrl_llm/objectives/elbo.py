"""The sequence bound (ELBO) of a masked diffusion language model by fixed time nodes and random masks: GDPO's
semi-deterministic Monte Carlo, arXiv 2510.08554; the bound itself is LLaDA's, arXiv 2502.09992:

    log p(y | prompt) >= E_{t ~ U(0,1)} E_{masks} [ (1/t) sum over hidden i of log p(y_i | y with hidden positions masked) ]

Letters: N time nodes, K masks per node, T completion length, V vocabulary.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Quadrature = Literal["gauss", "simpson"]
MaskMode = Literal["count", "iid"]


class Nodes(NamedTuple):
    """Time nodes in (0, 1] and weights that sum to 1; plain numbers, so counts are exact whatever the device's floats."""

    t: tuple[float, ...]
    w: tuple[float, ...]


def nodes(quadrature: Quadrature = "gauss", n: int = 3) -> Nodes:
    """Gauss-Legendre on [0, 1] (exact for polynomials of degree 2n - 1), or the reference code's Simpson preset (n = 3)."""
    if quadrature == "gauss":
        x, w = np.polynomial.legendre.leggauss(n)
        return Nodes(tuple(((x + 1) / 2).tolist()), tuple((w / 2).tolist()))
    if quadrature == "simpson" and n == 3:
        return Nodes((0.1, 0.5, 1.0), (1 / 6, 4 / 6, 1 / 6))
    raise ValueError(
        f"quadrature={quadrature!r} with {n} nodes: expected one of {', '.join(get_args(Quadrature))}, simpson with 3"
    )


def hidden_counts(t: tuple[float, ...], length: int) -> np.ndarray:
    """Positions to hide at every node for rows of 0..length tokens: clip(floor(t len + 1e-9), 1, len), int32 [N, length+1].

    The floor and the minimum of 1 make (k / len) / t differ from 1, so "count" masks are biased, strongly for short rows.
    """
    lengths = np.arange(length + 1, dtype=np.float64)
    counts = np.floor(np.asarray(t)[:, None] * lengths + 1e-9)
    return np.minimum(np.maximum(counts, 1), lengths).astype(np.int32)


def draw_masks(
    mask_key: Int[Array, "B"], mask: Bool[Array, "B T"], t: tuple[float, ...], samples: int, mode: MaskMode = "count"
) -> Bool[Array, "B N K T"]:
    """Hidden positions, a function of each row's own key only: current, old and reference policies see the same draws.

    Args:
      mask: real completion tokens; nothing else is ever hidden.
      mode: "count" hides exactly `hidden_counts` positions, uniformly without replacement; "iid" each with probability t.
    """
    length, n = mask.shape[1], len(t)

    def one(key: Array, real: Bool[Array, "T"]) -> Bool[Array, "N K T"]:
        u = jax.random.uniform(jax.random.key(key), (n, samples, length))
        if mode == "iid":
            return real & (u < jnp.asarray(t, u.dtype)[:, None, None])
        rank = jnp.argsort(jnp.argsort(jnp.where(real, u, 2.0), -1), -1)
        counts = jnp.asarray(hidden_counts(t, length))[:, jnp.sum(real)]
        return real & (rank < counts[:, None, None])

    if mode not in get_args(MaskMode):
        raise ValueError(f"mask_mode={mode!r}: expected one of {', '.join(get_args(MaskMode))}")
    return jax.vmap(one)(mask_key, mask)


def contributions(logp: Float[Array, "B N K T"], hidden: Bool[Array, "B N K T"], grid: Nodes) -> Float[Array, "B T"]:
    """c[b, i] = sum_n sum_k w_n / (K t_n) hidden logp; the bound's estimate is S_b = sum_i c[b, i]."""
    scale = jnp.asarray(np.asarray(grid.w) / np.asarray(grid.t) / hidden.shape[2], logp.dtype)
    return jnp.sum(scale[:, None, None] * jnp.where(hidden, logp, 0), (1, 2))


def score(
    logits: Callable[[Int[Array, "B T"]], Float[Array, "B T V"]],
    tokens: Int[Array, "B T"],
    hidden: Bool[Array, "B N K T"],
    grid: Nodes,
    mask_id: int,
    two_pass: bool = True,
) -> Float[Array, "B T"]:
    """`contributions` of a network by N K forward passes.

    Args:
      logits: maps completions with hidden tokens replaced by `mask_id` to logits at the same positions (no shift).
      two_pass: run the passes one after another and rerun each in the backward pass, so memory is that of a single pass;
        else all at once. The gradient is the same.
    """

    def one(masks: Bool[Array, "B T"], scale: Float[Array, ""]) -> Float[Array, "B T"]:
        logp = jax.nn.log_softmax(logits(jnp.where(masks, mask_id, tokens)))
        logp = jnp.take_along_axis(logp, tokens[..., None], -1)[..., 0]
        return jnp.where(masks, scale * logp, 0)

    b, n, k, t = hidden.shape
    masks = jnp.moveaxis(hidden, 0, 2).reshape(n * k, b, t)
    scales = jnp.repeat(jnp.asarray(np.asarray(grid.w) / np.asarray(grid.t) / k), k)
    if not two_pass:
        return jax.vmap(one)(masks, scales).sum(0)
    again = jax.checkpoint(one)
    shape = jax.eval_shape(one, masks[0], scales[0])
    total, _ = jax.lax.scan(lambda c, x: (c + again(*x), None), jnp.zeros(shape.shape, shape.dtype), (masks, scales))
    return total


def sequence_bound(contribution: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B"]:
    """S_b: the estimate of log p(completion), 0 for an empty row."""
    return jnp.where(mask, contribution, 0).sum(-1)
