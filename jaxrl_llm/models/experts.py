"""Sparse layers: a router sends every token to a few of many small MLPs (Shazeer et al. 2017; Qwen3-MoE).

No token is ever dropped. `replay` sets the router's choice aside for a recorded one, while weights still come from the
current logits (routing replay, arXiv 2512.01374).

Letters: N tokens, D embed, E experts, k experts of a token, F width of an expert.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.models.attention import accumulator
from jaxrl_llm.models.spec import Experts
from jaxrl_llm.sharding import target
from jaxrl_llm.types import Params

ROUTE = jnp.int16  # expert ids as they are recorded; -1 where there are none
Act = Callable[[Array], Array]


def choose(logits: Float[Array, "N E"], per_token: int, replay: Int[Array, "N k"] | None = None) -> Int[Array, "N k"]:
    """The experts with the largest logits; those of `replay` where it has ids (-1: none)."""
    natural = jax.lax.top_k(logits, per_token)[1]
    if replay is None:
        return natural
    return jnp.where((replay >= 0).all(-1, keepdims=True), replay.astype(natural.dtype), natural)


def gates(logits: Float[Array, "N E"], chosen: Int[Array, "N k"], norm_topk: bool) -> Float[Array, "N k"]:
    """Weights of the chosen experts: exp(z_i) over the sum of exp(z) of all experts, or with `norm_topk` of the chosen.

    The latter is a softmax over all, divided by its sum over the chosen, and equals a softmax over the chosen.
    """
    z = jnp.take_along_axis(logits, chosen, axis=-1)
    return jnp.exp(z - jax.nn.logsumexp(z if norm_topk else logits, axis=-1, keepdims=True))


def mix(
    experts: Experts, p: Params, x: Float[Array, "*N D"], act: Act, replay: Int[Array, "*N k"] | None = None
) -> tuple[Float[Array, "*N D"], Int[Array, "*N k"]]:
    """The weighted outputs of each token's experts, and their ids; `p` in the dtype of `x`, router scores in float32.

    Devices with a kernel for products of ragged groups compute what is needed; on a CPU, where there is none, running
    every expert on all tokens is 2 to 5 times as fast as XLA's replacement.
    """
    flat = x.reshape(-1, x.shape[-1])
    logits = jnp.matmul(flat, p["router"], preferred_element_type=accumulator(x.dtype))
    replayed = None if replay is None else replay.reshape(-1, experts.per_token)
    chosen = choose(logits, experts.per_token, replayed)
    weight = gates(logits, chosen, experts.norm_topk).astype(x.dtype)
    y = (one_by_one if _one_by_one(target.current().platform) else by_groups)(p, flat, chosen, weight, act)
    return y.reshape(x.shape), chosen.astype(ROUTE).reshape(*x.shape[:-1], -1)


def one_by_one(
    p: Params, x: Float[Array, "N D"], chosen: Int[Array, "N k"], weight: Float[Array, "N k"], act: Act
) -> Float[Array, "N D"]:
    """Every expert on every token; of those a token has not chosen nothing is kept."""

    def add(y: Array, part: tuple[Any, ...]) -> tuple[Array, None]:
        expert, gate, up, down = part
        mine = chosen == expert
        own = jnp.where(mine, weight, 0).sum(-1, keepdims=True)
        h = jnp.where(mine.any(-1, keepdims=True), act(x @ gate) * (x @ up) * own, 0)
        return y + h @ down, None

    ids = jnp.arange(p["gate"].shape[0])
    return jax.lax.scan(add, jnp.zeros_like(x), (ids, p["gate"], p["up"], p["down"]))[0]


def by_groups(
    p: Params, x: Float[Array, "N D"], chosen: Int[Array, "N k"], weight: Float[Array, "N k"], act: Act
) -> Float[Array, "N D"]:
    """Tokens sorted by expert, each expert on its own."""
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    token = order // chosen.shape[1]
    sizes = jnp.bincount(flat, length=p["gate"].shape[0]).astype(jnp.int32)
    rows = x[token]
    h = act(jax.lax.ragged_dot(rows, p["gate"], sizes)) * jax.lax.ragged_dot(rows, p["up"], sizes)
    out = jax.lax.ragged_dot(h, p["down"], sizes) * weight.reshape(-1)[order][:, None]
    return jnp.zeros_like(x).at[token].add(out)


def kept_products(experts: Experts, embed: int, platform: str) -> int:
    """Numbers of one token that matrix products with weights make in a sparse layer: the router's logits and, where they
    run one by one, every expert's."""
    return experts.count + (experts.count * (2 * experts.mlp + embed) if _one_by_one(platform) else 0)


def _one_by_one(platform: str) -> bool:
    return platform == "cpu"
