"""Credit for the steps of an agent by how certain the policy was in them. EMPG, arXiv 2509.09265.

A step is one "reason and act" turn. A batch has N places for steps, most of which may be empty: `on` says which are there.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.advantages.group import SPREAD_TOL


class Steps(NamedTuple):
    """The agent steps of a batch."""

    of_token: Int[Array, "B T"]  # the step of each trained token; anything elsewhere
    on: Bool[Array, "N"]
    row: Int[Array, "N"]  # the row the step is in
    following: Int[Array, "N"]  # the next step of the trajectory; -1 after the last


def numbered(step: Int[Array, "B T"], mask: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Steps counted from 1 in every row, 0 where masked. Trained tokens of equal `step` in a row are one step, whatever is
    between them; a step without a trained token is not counted."""
    last = jax.lax.cummax(jnp.where(mask, jnp.arange(mask.shape[1]), -1), axis=1)
    before = jnp.pad(last[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    differs = step != jnp.take_along_axis(step, jnp.maximum(before, 0), 1)
    return jnp.where(mask, jnp.cumsum(mask & ((before < 0) | differs), -1, dtype=jnp.int32), 0)


def in_rows(number: Int[Array, "B T"]) -> Steps:
    """Steps of rows that hold whole trajectories, as `numbered` counts them; N = B T."""
    b, t = number.shape
    steps = jnp.max(number, -1, keepdims=True)
    nth = jnp.arange(t)[None]
    place = jnp.arange(b)[:, None] * t + nth
    following = jnp.where(nth + 1 < steps, place + 1, -1)
    of_token = place[:, :1] + jnp.maximum(number - 1, 0)
    row = jnp.broadcast_to(jnp.arange(b)[:, None], (b, t))
    return Steps(of_token, (nth < steps).reshape(-1), row.reshape(-1), following.reshape(-1))


def of_rows(traj: Int[Array, "B"], turn: Int[Array, "B"], mask: Bool[Array, "B T"]) -> Steps:
    """Steps that are rows, in the order of `turn` within a trajectory; rows without trained tokens are none. N = B."""
    own, on = jnp.arange(traj.shape[0]), jnp.any(mask, -1)
    order = jnp.lexsort((turn, traj, ~on))
    follows = (traj[order][1:] == traj[order][:-1]) & on[order][1:]
    following = jnp.full_like(own, -1).at[order[:-1]].set(jnp.where(follows, order[1:], -1))
    return Steps(jnp.broadcast_to(own[:, None], mask.shape), on, own, following)


def mean(x: Float[Array, "B T"], mask: Bool[Array, "B T"], steps: Steps) -> Float[Array, "N"]:
    """Mean of `x` over the trained tokens of each step; 0 in empty places."""
    n, ids = steps.on.shape[0], steps.of_token.reshape(-1)
    total = jax.ops.segment_sum(jnp.where(mask, x, 0).reshape(-1), ids, n)
    return total / jnp.maximum(jax.ops.segment_sum(mask.reshape(-1).astype(total.dtype), ids, n), 1)


def modulated(
    advantage: Float[Array, "B"],
    entropy: Float[Array, "N"],
    steps: Steps,
    k: float = 1.0,
    k_f: float = 1.0,
    zeta: float = 0.1,
    spread_tol: float = SPREAD_TOL,
) -> Float[Array, "N"]:
    """A g_s + zeta f_next, less its mean over all steps; 0 in empty places.

    g = exp(-k h) over its mean, f = exp(-k_f h), with h the step's entropy between the batch's lowest (0) and highest (1).
    Entropies that differ by at most `spread_tol` of 1 + the highest are equal: h = 0.
    """
    on, count = steps.on, jnp.maximum(jnp.sum(steps.on), 1)
    some = jnp.any(on)
    low = jnp.where(some, jnp.min(jnp.where(on, entropy, jnp.inf)), 0)
    high = jnp.where(some, jnp.max(jnp.where(on, entropy, -jnp.inf)), 0)
    equal = high - low <= spread_tol * (1 + jnp.abs(high))
    h = jnp.where(on & ~equal, (entropy - low) / (high - low + 1e-8), 0)
    confident = jnp.exp(-k * h)
    g = confident / (jnp.sum(jnp.where(on, confident, 0)) / count + 1e-8)
    bonus = jnp.where(steps.following >= 0, zeta * jnp.exp(-k_f * h)[jnp.maximum(steps.following, 0)], 0)
    a = jnp.where(on, advantage[steps.row] * g + bonus, 0)
    return jnp.where(on, a - jnp.sum(a) / count, 0)
