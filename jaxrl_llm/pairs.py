"""Preference pairs in a batch: two rows of one `block`, with a role of +1 for the chosen and -1 for the rejected one in
`Credit.extras`. A row in several pairs is repeated, so that every pair is a block of its own.
"""

from collections.abc import Callable
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxrl_llm.algorithms.base import Key, Selection, weigh_by
from jaxrl_llm.types import Credit, Memory, Metrics, Rollouts, State, mean_of, take_rows

Pairs = tuple[np.ndarray, np.ndarray]  # row indices of the chosen and of the rejected, on the host


def unpaired(rows: Rollouts, score: Float[Array, "B"]) -> Credit:
    """Credit of rows that `select` has not paired yet: a score to compare them by, and nothing to train."""
    none = jnp.zeros(rows.length.shape, score.dtype)
    return Credit(jnp.zeros_like(rows.old_logp), score=score, extras={"role": none})


def most(rows: Rollouts, of_group: Callable[[int], int]) -> int:
    """Most pairs the groups can give, from the size of each: does not depend on rewards, so nothing recompiles."""
    sizes = np.unique(np.asarray(rows.group)[np.asarray(rows.stat)], return_counts=True)[1]
    return sum(of_group(int(n)) for n in sizes)


def paired(rows: Rollouts, credit: Credit, pairs: Pairs, slots: int) -> tuple[Rollouts, Credit]:
    """The rows of the pairs, chosen before rejected, in `slots` blocks of two; what is left over is padding."""
    index = np.full((slots, 2), -1)
    index[: len(pairs[0])] = np.stack(pairs, 1)
    rows, credit = take_rows(rows, credit, jnp.asarray(index.ravel()))
    role = jnp.where(index >= 0, np.array([1, -1]), 0).ravel().astype(credit.advantage.dtype)
    credit = Credit(jnp.where(rows.trained, role[:, None], 0), score=credit.score, extras={"role": role})
    return rows.with_(block=jnp.arange(index.size, dtype=jnp.int32) // 2), credit


def without_ties(pairs: Pairs, score: np.ndarray) -> Pairs:
    """The pairs whose scores differ; in the others who is chosen says nothing about quality."""
    differ = score[pairs[0]] != score[pairs[1]]
    return pairs[0][differ], pairs[1][differ]


def selecting(
    pairs_of: Callable[[np.ndarray, Rollouts], Pairs], slots: Callable[[Rollouts], int]
) -> Callable[[State, Memory, Rollouts, Credit, Key], Selection]:
    """A method's `select`.

    Args:
      pairs_of: (score [B], rows) -> pairs.
      slots: rows -> the most pairs any rewards could give.
    """

    def select(state: State, memory: Memory, rows: Rollouts, credit: Credit, key: Key) -> Selection:
        pairs = pairs_of(np.asarray(credit.score), rows)
        return Selection(*paired(rows, credit, pairs, slots(rows)), memory)

    return select


def mean_over_pairs(state: State, rows: Rollouts, credit: Credit) -> Credit:
    """`weigh` by the mean over pairs. `Credit.extras["share"]` is 1 / pairs on both rows of a pair: a pair counts even when a
    row of it trains no token, so its share is kept apart from the token weights."""
    role = credit.extras["role"]
    pairs = jnp.maximum(jnp.sum(role > 0), 1).astype(role.dtype)
    weighed = weigh_by(credit, jnp.where(rows.trained & (role != 0)[:, None], 1 / pairs, 0))
    return replace(weighed, extras={**credit.extras, "share": jnp.where(role != 0, 1 / pairs, 0)})


def weighted(each: Float[Array, "B"], credit: Credit) -> Float[Array, ""]:
    """The loss: the sum over pairs of `each`, which is stated on the chosen row, times the pair's share."""
    share = credit.extras["share"]
    return jnp.sum(jnp.where((credit.extras["role"] > 0) & (share > 0), share * each, 0))


def metrics(reward: Float[Array, "B"], margin: Float[Array, "B"], role: Float[Array, "B"]) -> Metrics:
    """What every pairwise loss reports: implicit rewards of chosen and rejected rows, their margin and its sign."""
    return {
        "rewards/accuracy": mean_of(margin > 0, role > 0),
        "rewards/margin": mean_of(margin, role > 0),
        "rewards/chosen": mean_of(reward, role > 0),
        "rewards/rejected": mean_of(reward, role < 0),
    }
