"""How alike the answers to differently phrased, equivalent requests are, judged by one number of each (its entropy).
Information-consistent GRPO, arXiv 2512.12858. Only `counted` rows take part; the others get anything."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.advantages.group import SPREAD_TOL, statistics


def helpfulness(
    entropy: Float[Array, "B"],
    counted: Bool[Array, "B"],
    low: float | None = None,
    high: float | None = None,
    spread_tol: float = SPREAD_TOL,
) -> Float[Array, "B"]:
    """(H - low) / (high - low) clipped to [0, 1]; a bound that is None is the batch's. 1 where the bounds agree."""
    some = jnp.any(counted)
    least = jnp.where(some, jnp.min(jnp.where(counted, entropy, jnp.inf)), 0) if low is None else jnp.asarray(low)
    most = jnp.where(some, jnp.max(jnp.where(counted, entropy, -jnp.inf)), 0) if high is None else jnp.asarray(high)
    spread = most - least
    some = spread > spread_tol * (1 + jnp.abs(most))
    return jnp.where(some, jnp.clip((entropy - least) / jnp.where(some, spread, 1), 0, 1), 1)


def stability(
    entropy: Float[Array, "B"], intent: Int[Array, "B"], counted: Bool[Array, "B"], spread_tol: float = SPREAD_TOL
) -> Float[Array, "B"]:
    """1 - the mean distance of each row's entropy to those of the other rows of its intent, over the batch's largest within an
    intent; 1 for a row alone, and where all agree."""
    stats = statistics(entropy, intent, counted, spread_tol=spread_tol)
    largest = jnp.max(jnp.where(counted & ~stats.flat, stats.spread, 0))
    safe = jnp.where(counted, entropy, 0)
    others = (stats.id[:, None] == stats.id) & counted
    distance = jnp.where(others, jnp.abs(safe[:, None] - safe), 0).sum(-1) / jnp.maximum(stats.count - 1, 1)
    return 1 - jnp.where(largest > 0, distance / jnp.where(largest > 0, largest, 1), 0)


def aggregate_stability(first: Float[Array, "K"], second: Float[Array, "K"]) -> Float[Array, ""]:
    """1 - the mean distance between the entropies of K answers under two phrasings, over the largest; 1 when all agree."""
    gap = jnp.abs(first - second)
    return 1 - jnp.mean(gap) / jnp.where(jnp.max(gap) > 0, jnp.max(gap), 1)
