"""Success-rate trackers that persist across steps. SPO (single-stream), arXiv 2509.13232: a Beta distribution per prompt
with a forgetting factor, alpha and beta counting discounted successes and failures."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def initial(
    successes: Float[Array, "P"], samples: int, rho_min: float = 0.875
) -> tuple[Float[Array, "P"], Float[Array, "P"]]:
    """(alpha, beta) from `successes` out of `samples` offline completions per prompt, with N0 = 1 / (1 - rho_min) counts.

    v0 = (s + 0.5) / (n0 + 1) keeps the rate off 0 and 1; without samples alpha = beta = 0.5.
    """
    if samples == 0:
        half = jnp.full_like(successes, 0.5)
        return half, half
    rate = (successes + 0.5) / (samples + 1)
    return rate / (1 - rho_min), (1 - rate) / (1 - rho_min)


def value(alpha: Float[Array, "*n"], beta: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """The tracked success rate v = alpha / (alpha + beta)."""
    return alpha / (alpha + beta)


def draw_weights(
    alpha: Float[Array, "P"], beta: Float[Array, "P"], gamma: float = 0.0, floor: float = 0.05
) -> Float[Array, "P"]:
    """Weights to draw prompts by: the Bernoulli std over N^gamma, plus a floor. gamma = 0 is the code, > 0 the paper."""
    v = value(alpha, beta)
    return jnp.sqrt(v * (1 - v)) / (alpha + beta) ** gamma + floor


def drift(old_logp: Float[Array, "B T"], new_logp: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B"]:
    """D: mean absolute log-ratio over the tokens of a row; 0 for a row without tokens."""
    change = jnp.abs(jnp.where(mask, old_logp - new_logp, 0))
    return change.sum(-1) / jnp.maximum(mask.sum(-1), 1)


def forgetting(
    drift: Float[Array, "B"], half: float = 0.06, low: float = 0.875, high: float = 0.96
) -> Float[Array, "B"]:
    """rho = clamp(2^(-D / half), low, high): what share of the past still counts after the policy moved by D."""
    return jnp.clip(jnp.exp2(-drift / half), low, high)


def refresh(
    alpha: Float[Array, "B"], beta: Float[Array, "B"], reward: Float[Array, "B"], rho: Float[Array, "B"]
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """(alpha, beta) after a reward in [0, 1]: v moves by (r - v) / (rho N + 1), N becomes rho N + 1 <= 1 / (1 - rho)."""
    return rho * alpha + reward, rho * beta + (1 - reward)
