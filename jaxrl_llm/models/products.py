"""Products of tokens with a layer's weights, as they lie in training and, on a CPU, in decoding.

XLA's CPU library rearranges the right side of every product anew. So for few tokens weights on the left, a row for each
output, are up to 1.7 times as fast; barriers keep XLA from swapping the sides back.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.sharding import target
from jaxrl_llm.sharding.rules import constrain
from jaxrl_llm.types import Params

# The weights, and over how many of their axes, the first, a product sums.
SUMS = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1}
Activation = Callable[[Array], Array]


class Products(NamedTuple):
    """How a layer multiplies by its weights, as they lie."""

    project: Callable[[Array, Array, int], Array]
    mlp: Callable[[Activation, Params, Array], Array]


def project(x: Array, w: Array, sums: int) -> Array:
    """x [*rows,*in] times w [*in,*out], with `sums` axes in, as one product of matrices: with batch or output axes apart,
    XLA's CPU backend takes 3 times as long for the gradient, and copies the weight."""
    width = math.prod(w.shape[:sums])
    sides = x.reshape(-1, width), w.reshape(width, -1)
    narrows = width > sides[1].shape[1] and target.current().platform == "cpu"
    flat = (_narrowed if narrows else jnp.matmul)(*sides)
    return flat.reshape(*x.shape[: x.ndim - sums], *w.shape[sums:])


@jax.custom_vjp
def _narrowed(x: Float[Array, "N D"], w: Float[Array, "D O"]) -> Float[Array, "N O"]:
    """x w with fewer outputs than inputs, on a CPU: a product that sums over the rows of both sides, as the gradient of w,
    is up to 1.5 times as fast there with the shorter rows on its left. The barrier keeps XLA from swapping the sides."""
    return x @ w


def _narrowed_bwd(kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = kept
    return g @ w.T, jax.lax.optimization_barrier(g.T @ x).T


_narrowed.defvjp(lambda x, w: (x @ w, (x, w)), _narrowed_bwd)


def mlp(act: Activation, p: Params, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    """(act(x gate) * x up) down."""
    h = act(project(x, p["gate"], 1)) * project(x, p["up"], 1)
    return project(constrain(h, "batch", "seq", "mlp"), p["down"], 1)


def turn(w: Array, sums: int) -> Array:
    """Weights [*in,*out] of `project` as [*out,*in]."""
    return jnp.moveaxis(w, range(sums), range(-sums, 0))


def project_turned(x: Array, w: Array, sums: int, dtype: Any = None) -> Array:
    """`project` by turned weights. `dtype`: of the result; that of `x` by default."""
    width = math.prod(w.shape[-sums:])
    flat = jax.lax.optimization_barrier(_columns(w.reshape(-1, width), x.reshape(-1, width), dtype)).T
    return flat.reshape(*x.shape[: x.ndim - sums], *w.shape[: w.ndim - sums])


def mlp_turned(act: Activation, p: Params, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    """`mlp` by turned weights; tokens are columns until the end, as turning the wide middle costs what was won."""
    flat = x.reshape(-1, x.shape[-1])
    gate, up = (jax.lax.optimization_barrier(_columns(p[name], flat)) for name in ("gate", "up"))
    out = p["down"] @ constrain(act(gate) * up, "mlp", None)
    return jax.lax.optimization_barrier(out).T.reshape(x.shape)


def _columns(w: Float[Array, "O D"], x: Float[Array, "N D"], dtype: Any = None) -> Float[Array, "O N"]:
    return jax.lax.dot_general(w, x, (((1,), (1,)), ((), ())), preferred_element_type=dtype)


PLAIN, TURNED = Products(project, mlp), Products(project_turned, mlp_turned)
