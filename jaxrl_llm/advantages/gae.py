"""Returns and advantages over the tokens of a completion. Masked positions (tool output, padding) are skipped: they
are no time steps, so nothing is discounted across them, and whatever they hold does not matter."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def last_trained(mask: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
    """True at the last trained token of each row, nowhere in a row without one."""
    later = jnp.cumsum(mask[:, ::-1], axis=-1)[:, ::-1]
    return mask & (later == 1)


def token_rewards(
    score: Float[Array, "B"],
    mask: Bool[Array, "B T"],
    kl: Float[Array, "B T"] | None = None,
    beta: float | Array = 0.0,
) -> Float[Array, "B T"]:
    """-beta * kl on every trained token, plus the score on the last one; rows without a trained token have none."""
    end = jnp.where(last_trained(mask), score[:, None], 0)
    return end if kl is None else end - jnp.where(mask, beta * kl, 0)


def rewards_to_go(rewards: Float[Array, "B T"], mask: Bool[Array, "B T"], gamma: float = 1.0) -> Float[Array, "B T"]:
    """G_t = sum over trained k >= t of gamma^(k - t) rewards_k, counting trained tokens only; 0 where masked."""

    def back(later, column):
        reward, on = column
        here = jnp.where(on, reward + gamma * later, later)
        return here, jnp.where(on, here, 0)

    start = jnp.zeros(rewards.shape[0], rewards.dtype)
    return jax.lax.scan(back, start, (rewards.T, mask.T), reverse=True)[1].T


def gae(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: Float[Array, "B"] | None = None,
) -> Float[Array, "B T"]:
    """Generalized advantage estimation, arXiv 1506.02438: A_t = delta_t + gamma lam A_next, 0 where masked.

    `delta_t = rewards_t + gamma V_next - V_t`, with "next" the next trained token and `bootstrap` (0 when None) the
    value after the last one. The targets of the critic are `gae + values`.
    """

    def back(carry, column):
        next_value, next_advantage = carry
        reward, value, on = column
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        carry = jnp.where(on, value, next_value), jnp.where(on, advantage, next_advantage)
        return carry, jnp.where(on, advantage, 0)

    dtype = jnp.result_type(rewards, values)
    end = jnp.zeros(rewards.shape[0], dtype) if bootstrap is None else bootstrap.astype(dtype)
    columns = (rewards.astype(dtype).T, values.astype(dtype).T, mask.T)
    return jax.lax.scan(back, (end, jnp.zeros_like(end)), columns, reverse=True)[1].T
