"""Gradient noise: what the gradients of parts of a minibatch, whole groups each, say of the gradient of all of it."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxrl_llm.algorithms.base import Noise
from jaxrl_llm.training.layouts import HostRows
from jaxrl_llm.types import Params


def parts(rows: HostRows, group: np.ndarray, count: int) -> list[HostRows]:
    """The rows with their groups dealt in turn to `count` parts, fewer when there are fewer groups: in a part the other rows
    are empty, so they are not executed."""
    runs = rows.length > 0
    if not runs.any():
        return [rows]
    of = np.full(len(group), -1)
    of[runs] = np.unique(group[runs], return_inverse=True)[1].reshape(-1) % count
    return [rows._replace(length=np.where(of == i, rows.length, 0)) for i in range(of.max() + 1)]


def squared_norm(grads: Params) -> Float[Array, ""]:
    return sum((jnp.sum(leaf**2) for leaf in jax.tree.leaves(grads)), start=jnp.zeros(()))


def measure(square: Float[Array, ""], squares: Float[Array, "M"]) -> Noise:
    """Noise of a gradient that is the sum of those of M parts, from its squared norm and theirs.

    M times a part's gradient, g_m, estimates the same as their mean: variance = sum_m |g_m - mean|^2 / (M (M - 1)). A
    single part says nothing of it: then the variance is the square, as if the gradient were all noise.
    """
    m = squares.shape[0]
    if m == 1:
        return Noise(square, square)
    return Noise(square, jnp.maximum(m * jnp.sum(squares) - square, 0) / (m - 1))
