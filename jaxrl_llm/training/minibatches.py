"""Which rows share an optimizer step: a seeded permutation of blocks."""

from typing import NamedTuple

import numpy as np

from jaxrl_llm.types import Rollouts


class Minibatch(NamedTuple):
    """Rows of the batch by index (-1: a padding row), and for each the first row of the minibatch in its block."""

    index: np.ndarray  # [b]
    block: np.ndarray  # [b]


def minibatches(rows: Rollouts, count: int, rng: np.random.Generator, whole_contexts: bool = False) -> list[Minibatch]:
    """Deal the rows to `count` minibatches of equal size, padded with masked rows; rows of a block stay together.

    whole_contexts: rows of one context stay together too (the shared layout runs a context once for all of them).

    Rows that neither train nor count in statistics are left out. Units (blocks, or contexts) are dealt in a random
    order, each to the least filled minibatch, largest units first: sizes differ by at most one unit, and none is empty
    while another has two. The size depends on the batch's shape and its largest unit only, so programs are reused.
    """
    real = np.flatnonzero(np.asarray(rows.stat) | np.asarray(rows.mask).any(-1))
    unit = _units(np.asarray(rows.block)[real], np.asarray(rows.prompt)[real] if whole_contexts else None)
    sizes = np.bincount(unit)
    order = rng.permutation(len(sizes))
    order = order[np.argsort(-sizes[order], kind="stable")]
    largest = int(sizes.max(initial=1))
    batch_units = -(-len(np.asarray(rows.stat)) // largest)
    size = -(-batch_units // count) * largest
    members = np.split(real[np.argsort(unit, kind="stable")], np.cumsum(sizes)[:-1])
    dealt: list[list[np.ndarray]] = [[] for _ in range(count)]
    filled = np.zeros(count, int)
    for u in order:
        i = int(np.argmin(filled))
        dealt[i].append(members[u])
        filled[i] += len(members[u])
    size = max(size, int(filled.max()))
    return [_minibatch(np.concatenate([*units, np.full(size - n, -1)]), rows) for units, n in zip(dealt, filled)]


def _minibatch(index: np.ndarray, rows: Rollouts) -> Minibatch:
    index = index.astype(np.int32)
    own = np.arange(len(index))
    block = np.where(index >= 0, np.asarray(rows.block)[np.maximum(index, 0)], -1 - own)
    _, first, inverse = np.unique(block, return_index=True, return_inverse=True)
    return Minibatch(index, first[inverse].astype(np.int32))


def _units(block: np.ndarray, context: np.ndarray | None) -> np.ndarray:
    """Number the sets of rows that must stay together: connected by an equal block or an equal context."""
    unit = np.unique(block, return_inverse=True)[1]
    if context is None:
        return unit
    while True:  # lower both to the smallest unit they meet; a few rounds, as blocks rarely span contexts
        before = unit
        for key in (context, block):
            inverse = np.unique(key, return_inverse=True)[1]
            lowest = np.full(inverse.max(initial=-1) + 1, len(unit))
            np.minimum.at(lowest, inverse, unit)
            unit = lowest[inverse]
        if np.array_equal(unit, before):
            return np.unique(unit, return_inverse=True)[1]
