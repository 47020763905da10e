"""A replay buffer of whole groups on the host: plain functions of a dict of numpy arrays, so it is checkpointed as it is.

A buffer holds rows (`[n, ...]`, each with its context, advantage, `old_logp`, mask) and for each row `group`, a number that grows
with every group pushed, and `step`, the step it was sampled at. Rows keep the advantage and old_logp they were pushed with.
"""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from jaxrl_llm.types import REPLAY, Credit, Rollouts

Buffer = dict[str, np.ndarray]

_ROW_FIELDS = ("tokens", "length", "scored", "mask", "reward", "truncated", "version", "sampler_logp", "old_logp")


def candidates(buffer: Buffer) -> np.ndarray:
    """Numbers of the groups in the buffer, oldest first."""
    return np.unique(buffer["group"]) if buffer else np.zeros(0, np.int64)


def push(buffer: Buffer, rows: Rollouts, credit: Credit, step: int, capacity: int, max_age: int) -> Buffer:
    """The buffer after adding the fresh groups of `step` and evicting what will be too old at the next step.

    Groups older than `max_age` steps go first, then the oldest over `capacity` groups. Rows that are padding, replayed or
    unscored are not stored.
    """
    at = np.flatnonzero(np.asarray(rows.counted))
    prompt = np.asarray(rows.prompt)[at]
    fresh = {name: np.asarray(getattr(rows, name))[at] for name in _ROW_FIELDS}
    fresh |= {f"extras.{name}": np.asarray(x)[at] for name, x in rows.extras.items()}
    first = int(buffer["group"].max()) + 1 if buffer else 0
    fresh |= {
        "prompt_tokens": np.asarray(rows.prompt_tokens)[prompt],
        "prompt_length": np.asarray(rows.prompt_length)[prompt],
        "advantage": np.asarray(credit.advantage)[at],
        "group": first + np.unique(np.asarray(rows.group)[at], return_inverse=True)[1].reshape(-1).astype(np.int64),
        "step": np.full(len(at), step, np.int64),
    }
    both = {k: np.concatenate([buffer[k], v]) for k, v in fresh.items()} if buffer else fresh
    young = step + 1 - both["step"] <= max_age
    newest = np.unique(both["group"][young])[-capacity:]
    kept = np.isin(both["group"], newest)
    return {k: v[kept] for k, v in both.items()} if kept.any() else {}


def draw(buffer: Buffer, rng: np.random.Generator, rows: int, contexts: int) -> list[np.ndarray]:
    """Row indices of groups drawn uniformly without replacement, as many as fit `rows` rows and `contexts` contexts."""
    drawn: list[np.ndarray] = []
    for number in rng.permutation(candidates(buffer)):
        at = np.flatnonzero(buffer["group"] == number)
        needed = len(np.unique(_contexts(buffer, at), axis=0))
        if len(at) > rows or needed > contexts:
            break
        drawn.append(at)
        rows, contexts = rows - len(at), contexts - needed
    return drawn


def _contexts(buffer: Buffer, at: np.ndarray) -> np.ndarray:
    """[n, L + 1] context tokens with their length in front, padding zeroed: equal rows are equal contexts."""
    length = buffer["prompt_length"][at, None]
    tokens = buffer["prompt_tokens"][at]
    return np.concatenate([length, np.where(np.arange(tokens.shape[1]) < length, tokens, 0)], 1)


def mix(
    rows: Rollouts, credit: Credit, buffer: Buffer, drawn: list[np.ndarray], size: int, contexts: int
) -> tuple[Rollouts, Credit]:
    """Rows and credit with the drawn groups appended in `size` rows and `contexts` contexts; what is left over is padding.

    Replayed rows are out of statistics, have source REPLAY and bring their advantage, also in `extras["advantage"]`.
    """
    at = np.concatenate([*drawn, np.zeros(0, np.int64)]).astype(np.int64)
    n, fresh_rows, fresh_contexts = len(at), len(rows.group), len(rows.prompt_length)

    def followed_by(like, name: str) -> np.ndarray:
        """`like` with `size` more rows: the stored ones, then zeros (nothing masked, not scored)."""
        tail = np.zeros((size, *np.shape(like)[1:]), np.asarray(like).dtype)
        if n:
            tail[:n] = buffer[name][at]
        return np.concatenate([np.asarray(like), tail])

    prompt_tokens = np.zeros((contexts, np.shape(rows.prompt_tokens)[1]), np.int32)
    prompt_length = np.ones(contexts, np.int32)  # an unused context is one pad token
    prompt = np.zeros(size, np.int32)
    group = np.arange(size)  # padding rows are groups of their own
    if n:
        unique, index = np.unique(_contexts(buffer, at), axis=0, return_inverse=True)
        prompt_length[: len(unique)], prompt_tokens[: len(unique)] = unique[:, 0], unique[:, 1:]
        prompt[:n] = fresh_contexts + index.reshape(-1)
        group[:n] = np.repeat(np.arange(len(drawn)), [len(d) for d in drawn])

    def numbered_after(x, tail: np.ndarray) -> np.ndarray:
        return np.concatenate([np.asarray(x), max(int(np.max(x)), -1) + 1 + tail]).astype(np.int32)

    advantage = followed_by(credit.advantage, "advantage")
    mixed = replace(
        rows,
        **{name: followed_by(getattr(rows, name), name) for name in _ROW_FIELDS},
        prompt_tokens=np.concatenate([np.asarray(rows.prompt_tokens), prompt_tokens]),
        prompt_length=np.concatenate([np.asarray(rows.prompt_length), prompt_length]),
        prompt=np.concatenate([np.asarray(rows.prompt), prompt]),
        group=numbered_after(rows.group, group),
        row_id=numbered_after(rows.row_id, np.arange(size)),
        stat=np.concatenate([np.asarray(rows.stat), np.zeros(size, bool)]),
        source=np.concatenate([np.asarray(rows.source), np.full(size, REPLAY, np.int32)]),
        block=np.concatenate([np.asarray(rows.block), np.arange(fresh_rows, fresh_rows + size, dtype=np.int32)]),
        extras={name: followed_by(x, f"extras.{name}") for name, x in rows.extras.items()} | {"advantage": advantage},
    )
    return mixed, Credit(jnp.asarray(advantage))
