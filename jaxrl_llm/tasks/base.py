"""Where prompts and rewards come from, as data. A reward is named by a string so that a worker process can load it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Record = Mapping[str, Any]  # one problem: JSON-able; at least "prompt", and "answer"/"target" where the task has them

# (completion text, record) -> reward. Runs in a killable worker; None or NaN or an exception leaves the row unscored.
RewardFn = Callable[[str, Record], float | None]


class RewardSpec(NamedTuple):
    """One part of the total reward. `spec` is resolved by `tasks.rewards.resolve` inside the worker."""

    name: str
    spec: str  # "math", "exact", "letter:e", "gym", "judge", "length_penalty", "module:function"
    weight: float = 1.0
    options: Mapping[str, Any] = {}


class Task(NamedTuple):
    """Problems and how to score them. `train` and `eval` share no problem."""

    name: str
    train: Sequence[Record]
    eval: Sequence[Record]
    rewards: tuple[RewardSpec, ...]
    correct_at: float = 1.0  # a score of at least this counts as correct in accuracy, pass@k, maj@k


class Prompt(NamedTuple):
    """A problem drawn for a step, tokenized."""

    id: int  # index into Task.train (or .eval)
    tokens: np.ndarray  # int32 [n]
    record: Record
