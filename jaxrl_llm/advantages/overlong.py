"""DAPO's two answers to completions that run into the length limit, arXiv 2503.14476."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def soft_penalty(length: Int[Array, "B"], max_length: int, cache: int, factor: float = 1.0) -> Float[Array, "B"]:
    """Reward added to long completions: 0 up to max_length - cache tokens, then linear down to -factor at max_length.

    Never below -factor. Raises ValueError unless 0 < cache <= max_length.
    """
    if not 0 < cache <= max_length:
        raise ValueError(f"overlong cache={cache}: expected 1 to max_length={max_length} tokens")
    return factor * jnp.clip((max_length - cache - length) / cache, -1.0, 0.0)


def without_truncated(mask: Bool[Array, "B T"], truncated: Bool[Array, "B"]) -> Bool[Array, "B T"]:
    """Overlong filter: truncated rows leave the loss. They stay in the statistics of their group."""
    return mask & ~truncated[:, None]
