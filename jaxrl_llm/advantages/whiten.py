"""Zero mean and unit variance over the trained tokens of a batch."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def whiten(
    x: Float[Array, "..."],
    mask: Bool[Array, "..."],
    ddof: int = 1,
    eps: float = 1e-8,
    too_few: Literal["keep", "zero"] = "keep",
) -> Float[Array, "..."]:
    """(x - mean) / sqrt(var + eps) over all masked-in entries, 0 elsewhere.

    A variance needs two entries: with fewer, "keep" returns x unchanged (PPO) and "zero" returns 0 (REINFORCE++).
    """
    x = jnp.where(mask, x, 0)
    count = jnp.sum(mask)
    mean = jnp.sum(x) / jnp.maximum(count, 1)
    variance = jnp.sum(jnp.where(mask, (x - mean) ** 2, 0)) / jnp.maximum(count - ddof, 1)
    few = x if too_few == "keep" else jnp.zeros_like(x)
    return jnp.where(count >= 2, jnp.where(mask, (x - mean) / jnp.sqrt(variance + eps), 0), few)
