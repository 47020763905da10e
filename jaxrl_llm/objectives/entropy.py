"""Signals and controls made of token entropies."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

FLOOR = 1e-8


class LogEntropyScale(NamedTuple):
    """Where the log-entropies of a batch lie: HAPO's statistics, arXiv 2509.16591."""

    pivot: Float[Array, ""]  # Q, a quantile
    spread: Float[Array, ""]  # root mean square distance from Q
    highest: Float[Array, ""]  # largest (x - Q) / spread, at least 1e-8
    lowest: Float[Array, ""]  # |smallest|, at least 1e-8


def log_entropy_scale(entropy: Float[Array, "B T"], mask: Bool[Array, "B T"], quantile: float) -> LogEntropyScale:
    """Statistics of x = log max(entropy, 1e-8) over the masked-in tokens; Q is the element of sorted x at index
    round(quantile (n - 1)), half to even, without interpolation. With no token: Q = 0, spread as small as it gets."""
    x = jnp.log(jnp.maximum(jnp.where(mask, entropy, 1), FLOOR))
    n = jnp.sum(mask)
    index = jnp.round(quantile * jnp.maximum(n - 1, 0).astype(x.dtype)).astype(jnp.int32)
    pivot = jnp.where(n > 0, jnp.sort(jnp.where(mask, x, jnp.inf).ravel())[index], 0)
    mean_square = jnp.sum(jnp.where(mask, (x - pivot) ** 2, 0)) / jnp.maximum(n, 1)
    spread = jnp.sqrt(jnp.maximum(mean_square, FLOOR))
    h = jnp.where(mask, (x - pivot) / spread, 0)
    return LogEntropyScale(pivot, spread, jnp.maximum(h.max(), FLOOR), jnp.maximum(-h.min(), FLOOR))


def relative_log_entropy(
    log_entropy: Float[Array, "*n"], scale: LogEntropyScale, signed: bool = True
) -> Float[Array, "*n"]:
    """h~ in [-1, 1] on the tokens `scale` was taken from: 0 at the pivot, 1 at the highest, -1 at the lowest entropy.

    signed=False is the released code's slip: it divides the negative side by a negative number, so h~ >= 0 everywhere.
    """
    h = (log_entropy - scale.pivot) / scale.spread
    return jnp.where(h > 0, h / scale.highest, h / (scale.lowest if signed else -scale.lowest))


def token_signal(
    entropy: Float[Array, "B T"], mask: Bool[Array, "B T"], quantile: float, signed: bool = True
) -> Float[Array, "B T"]:
    """HAPO's h~ of every token against the batch it is in, constant in the loss; 0 where masked."""
    entropy = jax.lax.stop_gradient(jnp.where(mask, entropy, 1))
    scale = log_entropy_scale(entropy, mask, quantile)
    return jnp.where(mask, relative_log_entropy(jnp.log(jnp.maximum(entropy, FLOOR)), scale, signed), 0)


def of_logits(logits: Float[Array, "*n V"]) -> Float[Array, "*n"]:
    """Entropy of softmax(logits), nats; logits of -inf are impossible tokens."""
    logp = jax.nn.log_softmax(logits)
    return -jnp.sum(jnp.where(jnp.isneginf(logp), 0, jnp.exp(logp) * logp), -1)
