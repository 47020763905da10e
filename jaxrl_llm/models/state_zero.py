"""A value at state zero: will this policy solve this prompt, given (prompt, outcome) pairs of it? V0, arXiv 2602.03584.

A frozen text encoder's hidden states become features by a residual query adapter, and an in-context head compares them with those
of the pairs: a new policy needs new pairs, no gradient step. The paper's head is a pretrained tabular foundation model, which
cannot be bundled; `kernel_head` stands in for it, and any function of its signature may.

Letters: N prompts, S tokens, D width of the encoder, K queries of E numbers, F = K E features, M prompts asked about.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxrl_llm.types import Params

HIDDEN_FLOOR = 1e-5  # of layer norms


def init(key: Array, width: int, queries: int = 8, size: int = 6, bottleneck: int = 128) -> Params:
    """An adapter for an encoder of this width. Its queries do not depend on the prompt until it is trained: w2, b2 are 0."""
    keys = iter(jax.random.split(key, 7))

    def matrix(rows: int, columns: int) -> Array:
        return jax.random.normal(next(keys), (rows, columns)) / np.sqrt(rows)

    norm = lambda n: {"scale": jnp.ones(n), "bias": jnp.zeros(n)}  # noqa: E731
    return {
        "static": jax.random.normal(next(keys), (queries, size)),
        "w1": matrix(width, bottleneck),
        "b1": jnp.zeros(bottleneck),
        "norm": norm(bottleneck),
        "w2": jnp.zeros((bottleneck, queries * size)),
        "b2": jnp.zeros(queries * size),
        "kv": matrix(width, size),
        "kv_bias": jnp.zeros(size),
        "query_norm": norm(size),
        "key_norm": norm(size),
        **{name: matrix(size, size) for name in ("q", "k", "v", "o")},
    }


def features(
    params: Params, hidden: Float[Array, "N S D"], mask: Bool[Array, "N S"], heads: int = 3
) -> Float[Array, "N F"]:
    """Features of prompts from the encoder's hidden states; every row of `mask` has a token, at its start.

    Q = static + W2 gelu(LN(W1 h_last + b1)) + b2, attention of LN(Q) over keys LN(kv) and values kv = Wkv h + bkv.
    """
    n, queries, size = hidden.shape[0], *params["static"].shape
    hidden = jnp.where(mask[..., None], hidden, 0)
    last = hidden[jnp.arange(n), jnp.sum(mask, -1) - 1]
    inner = jax.nn.gelu(_layer_norm(last @ params["w1"] + params["b1"], params["norm"]), approximate=False)
    query = params["static"] + (inner @ params["w2"] + params["b2"]).reshape(n, queries, size)
    kv = hidden @ params["kv"] + params["kv_bias"]

    def split(x: Array) -> Array:
        return x.reshape(*x.shape[:2], heads, size // heads)

    q = split(_layer_norm(query, params["query_norm"]) @ params["q"])
    k = split(_layer_norm(kv, params["key_norm"]) @ params["k"])
    scores = jnp.einsum("nqhd,nshd->nhqs", q, k) / np.sqrt(size // heads)
    weight = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -jnp.inf), -1)
    out = jnp.einsum("nhqs,nshd->nqhd", weight, split(kv @ params["v"])).reshape(n, queries, size)
    return (out @ params["o"]).reshape(n, -1)


def _layer_norm(x: Array, norm: Params) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred * jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + HIDDEN_FLOOR)
    return scaled * norm["scale"] + norm["bias"]


def kernel_head(
    context: Float[Array, "N F"],
    solved: Float[Array, "N"],
    query: Float[Array, "M F"],
    temperature: float = 1.0,
    prior: float = 1.0,
) -> Float[Array, "M 2"]:
    """Log-probabilities of (unsolved, solved) by a softmax-weighted vote of the pairs, with `prior` votes for each.

    w = N softmax(zq zc^T / (temperature sqrt(F))),  p = (w . y + prior) / (sum w + 2 prior).
    """
    scale = temperature * np.sqrt(context.shape[1])
    w = context.shape[0] * jax.nn.softmax(query @ context.T / scale, -1)
    p = (w @ solved + prior) / (jnp.sum(w, -1) + 2 * prior)
    return jnp.stack([jnp.log1p(-p), jnp.log(p)], -1)


def label(score: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """The soft label of a score in [-1, 1]: 0 to 1. Labels of context pairs are hardened at 0.5."""
    return (jnp.clip(score, -1, 1) + 1) / 2


def routing_label(reward: float, cost: float, beta: float) -> float:
    """A context label that weighs a model's reward against its cost, both in [0, 1]; route to the model of the highest
    prediction."""
    return beta * reward + (1 - beta) * (1 - cost)


def alternating(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Training queries as pos, neg, pos, neg: the i-th with the i-th, the shorter list over again; none without both."""
    if not (len(positive) and len(negative)):
        return positive[:0]
    n = max(len(positive), len(negative))
    return np.stack([np.resize(positive, n), np.resize(negative, n)], 1).ravel()


def adapter_loss(logits: Float[Array, "2n 2"], labels: Float[Array, "2n"], ranking: float = 0.25) -> Float[Array, ""]:
    """`ranking` of the mean -log sigma(s_pos - s_neg) over the alternating pairs, s = z1 - z0, and the rest of the soft cross
    entropy. The first part is blind to what depends on the context only, such as the policy's mean success."""
    s = logits[:, 1] - logits[:, 0]
    pairs = -jax.nn.log_sigmoid(s[0::2] - s[1::2])
    entropy = -(labels * jax.nn.log_sigmoid(s) + (1 - labels) * jax.nn.log_sigmoid(-s))
    return ranking * jnp.mean(pairs) + (1 - ranking) * jnp.mean(entropy)
