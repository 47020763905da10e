"""Policy losses per token, to be minimised: functions of a ratio and a constant advantage.

Ratios may be `[B, 1]` (one per row). Masked positions give 0 whatever the inputs hold; the gradient flows through the
ratio (or log-prob) only. `weights.weighted_sum` turns the token losses into the loss.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Clipped(NamedTuple):
    """Token losses and where the clip removed the gradient."""

    loss: Float[Array, "B T"]
    low: Bool[Array, "B T"]  # negative advantage, ratio under the lower bound
    high: Bool[Array, "B T"]  # positive advantage, ratio over the upper bound


def clipped(
    ratio: Float[Array, "B #T"],
    advantage: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    clip_low: float | Array,
    clip_high: float | Array,
    dual_clip: float | None = None,
    delta: float | None = None,
) -> Clipped:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A). PPO, arXiv 1707.06347.

    Args:
      dual_clip: c > 1; where A < 0 the loss is at most -c A (arXiv 1912.09729).
      delta: two-sided clip; the unclipped ratio is at most delta > 1 + clip_high, which bounds the loss where A < 0.
    """
    ratio = jnp.where(mask, ratio, 1)
    advantage = jax.lax.stop_gradient(jnp.where(mask, advantage, 0))
    free = ratio if delta is None else jnp.minimum(ratio, delta)
    loss = -jnp.minimum(free * advantage, jnp.clip(ratio, 1 - clip_low, 1 + clip_high) * advantage)
    if dual_clip is not None:
        loss = jnp.where(advantage < 0, jnp.minimum(loss, -dual_clip * advantage), loss)
    return Clipped(loss, (ratio < 1 - clip_low) & (advantage < 0), (ratio > 1 + clip_high) & (advantage > 0))


def unclipped(
    ratio: Float[Array, "B #T"], advantage: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """-r A, importance sampling without a trust region."""
    return -jnp.where(mask, ratio, 0) * jax.lax.stop_gradient(jnp.where(mask, advantage, 0))


def reinforce(
    logp: Float[Array, "B T"], advantage: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """-A log pi, the score-function estimator (Williams, 1992)."""
    return -jnp.where(mask, logp, 0) * jax.lax.stop_gradient(jnp.where(mask, advantage, 0))


def effective_advantage(
    ratio: Float[Array, "B #T"], advantage: Float[Array, "B T"], penalty: float | Array
) -> Float[Array, "B T"]:
    """A - 2 lambda (r - 1): what multiplies -r grad log pi in `-r A + lambda (r - 1)^2`. R2VPO, arXiv 2601.03320."""
    return advantage - 2 * penalty * (ratio - 1)


def clipped_value(
    values: Float[Array, "B T"],
    old_values: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    clip: float,
) -> Float[Array, "B T"]:
    """0.5 max((v - ret)^2, (clip(v, old - clip, old + clip) - ret)^2), the value loss that goes with PPO's clip."""
    old_values = jax.lax.stop_gradient(jnp.where(mask, old_values, 0))
    error = jnp.where(mask, values, 0) - jax.lax.stop_gradient(jnp.where(mask, returns, 0))
    near = jnp.clip(jnp.where(mask, values, 0), old_values - clip, old_values + clip)
    near_error = near - jax.lax.stop_gradient(jnp.where(mask, returns, 0))
    return jnp.where(mask, 0.5 * jnp.maximum(error**2, near_error**2), 0)
