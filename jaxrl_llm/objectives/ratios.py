"""Likelihood ratios of the current policy to the one that sampled. At masked positions the inputs may be anything and the
ratio is 1 (log ratio 0), in value and gradient."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def log_ratio(
    logp: Float[Array, "B T"], old_logp: Float[Array, "B T"], mask: Bool[Array, "B T"], limit: float | None = None
) -> Float[Array, "B T"]:
    """`logp - old_logp`, 0 where masked; `limit` clamps it to [-limit, limit] (a numerical guard, not in the papers)."""
    difference = jnp.where(mask, logp - old_logp, 0)
    return difference if limit is None else jnp.clip(difference, -limit, limit)


def token(
    logp: Float[Array, "B T"], old_logp: Float[Array, "B T"], mask: Bool[Array, "B T"], limit: float | None = None
) -> Float[Array, "B T"]:
    """r_t = pi(token) / pi_old(token). PPO, arXiv 1707.06347."""
    return jnp.exp(log_ratio(logp, old_logp, mask, limit))


def on_policy(logp: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """pi / sg(pi): 1, with the gradient of logp; where the policy that wrote the token is the current one, or unknown."""
    return token(logp, jax.lax.stop_gradient(logp), mask)


def sequence(logp: Float[Array, "B T"], old_logp: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B 1"]:
    """Length-normalised s = exp(mean_t log r_t), the geometric mean of the token ratios. GSPO, arXiv 2507.18071."""
    count = jnp.maximum(jnp.sum(mask, -1, keepdims=True), 1)
    return jnp.exp(jnp.sum(log_ratio(logp, old_logp, mask), -1, keepdims=True) / count)


def sequence_token(
    logp: Float[Array, "B T"], old_logp: Float[Array, "B T"], mask: Bool[Array, "B T"], cap: float | None = None
) -> Float[Array, "B T"]:
    """GSPO-token: value `sequence`, derivative s on the own token only: sg(s) * exp(logp_t - sg(logp_t)).

    cap: log s is at most this (verl: 10), without a gradient beyond; a numerical guard, not in the paper.
    """
    count = jnp.maximum(jnp.sum(mask, -1, keepdims=True), 1)
    log_s = jax.lax.stop_gradient(jnp.sum(log_ratio(logp, old_logp, mask), -1, keepdims=True) / count)
    log_s = log_s + log_ratio(logp, jax.lax.stop_gradient(logp), mask)
    return jnp.exp(log_s if cap is None else jnp.minimum(log_s, cap))


def product(logp: Float[Array, "B T"], old_logp: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B 1"]:
    """rho = prod_t r_t: the completion is one action, no length normalisation. RLOO, arXiv 2402.14740.

    Not clamped: infinite in float32 when log rho exceeds 88, with a gradient that is not finite.
    """
    return jnp.exp(jnp.sum(log_ratio(logp, old_logp, mask), -1, keepdims=True))


def turns(mask: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """The number of the turn a trained token belongs to, from 1 in every row; 0 elsewhere. A turn is a run of trained tokens:
    tool output ends one."""
    before = jnp.pad(mask[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(mask, jnp.cumsum(mask & ~before, -1, dtype=jnp.int32), 0)


def over_turns(x: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """Sum of `x` over the tokens of each token's turn; 0 where masked."""
    b, t = mask.shape
    ids = turns(mask) + (t + 1) * jnp.arange(b)[:, None]
    total = jax.ops.segment_sum(jnp.where(mask, x, 0).reshape(-1), ids.reshape(-1), b * (t + 1))
    return jnp.where(mask, total[ids], 0)


def turn(logp: Float[Array, "B T"], old_logp: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """The product of a turn's token ratios, on each of its tokens. LOOP, arXiv 2502.01600."""
    return jnp.exp(over_turns(log_ratio(logp, old_logp, mask), mask))
