"""Where prompts and rewards come from, as data. A reward is named by a string so that a worker process can load it."""

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# One problem: JSON-able; at least "prompt", and "answer"/"target" where the task has them. When a completion is scored, the
# record also holds its length: "completion_tokens". "phrasings" may hold other prompts that ask for the same.
Record = dict[str, Any]

# (completion text, record) -> reward. Runs in a killable worker; None or NaN or an exception leaves the row unscored.
RewardFn = Callable[[str, Record], float | None]


class RewardSpec(NamedTuple):
    """One part of the total reward. `spec` is resolved by `tasks.rewards.resolve` inside the worker."""

    name: str
    spec: str  # "math", "exact", "letter:e", "gym", "judge", "module:function", ...
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
    phrasings: tuple[np.ndarray, ...] = ()  # other ways to ask for the same, from the record's "phrasings"


def import_function(key: str, path: str) -> Callable[..., Any]:
    """The function `module:function` names; the working directory is searched too.

    Raises ValueError that starts with the config key when it cannot be imported.
    """
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise ValueError(f"{key}: {path!r}, expected module:function")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the user's module raises when imported
        raise ValueError(f"{key}: {path!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise ValueError(f"{key}: {path!r} is {type(function).__name__}, expected a function")
    return function


def reward_name(spec: str) -> str:
    """The name of a reward part in metrics: "letter:e" is letter_e, "my.module:fn" is fn."""
    kind, _, rest = spec.partition(":")
    return f"letter_{rest}" if kind == "letter" else rest or kind


def fill(key: str, template: str, fields: Mapping[str, Any]) -> str:
    """A template with its {fields} filled in. Raises ValueError that starts with the config key for an unknown field."""
    try:
        return template.format_map(fields)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise ValueError(f"{key}: {template!r} fails with {error!r}, expected fields among {sorted(fields)}") from None
