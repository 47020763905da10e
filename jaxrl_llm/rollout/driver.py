"""Runs a collector: answers its requests with the engine, the reward workers and the prompt stream."""

from collections.abc import Callable, Sequence

import numpy as np

from jaxrl_llm.algorithms.base import Plan
from jaxrl_llm.rollout.collectors import Rows, flat
from jaxrl_llm.rollout.rows import Completion, Draw, Encode, Request, Row, Score
from jaxrl_llm.tasks.base import Prompt, Record, RewardSpec


def collect(
    plan: Plan,
    prompts: Sequence[Prompt],
    *,
    sample: Callable[[Request], list[list[Completion]]],
    score: Callable[[Sequence[Row]], None],
    draw: Callable[[int], list[Prompt]],
    encode: Callable[[Sequence[str]], list[np.ndarray]],
) -> list[Row]:
    """Drive `plan.collector` (the flat one when None) to its end and return its rows."""
    words: Rows = (plan.collector or flat)(plan, prompts)
    answer = None
    while True:
        try:
            ask = words.send(answer)
        except StopIteration as done:
            return done.value
        if isinstance(ask, Request):
            answer = sample(ask)
        elif isinstance(ask, Score):
            answer = score(ask.rows)
        elif isinstance(ask, Draw):
            answer = draw(ask.n)
        elif isinstance(ask, Encode):
            answer = encode(ask.texts)
        else:
            raise TypeError(f"a collector yielded {type(ask).__name__}, expected Request, Score, Draw or Encode")


def reward_rows(
    rows: Sequence[Row],
    rewards: Sequence[RewardSpec],
    decode: Callable[[np.ndarray], str],
    score: Callable[[Sequence[tuple[str, Record]]], list[dict[str, float | None]]],
) -> None:
    """Decode the rows and fill in `text`, `parts`, `reward` (weighted parts) and `scored`.

    A row with any part missing (None: its reward function hung, raised, crashed or returned no number) is unscored.
    """
    for row in rows:
        row.text = decode(row.tokens)
    asked = [(row.text or "", {**row.prompt.record, "completion_tokens": len(row.tokens)}) for row in rows]
    for row, parts in zip(rows, score(asked)):
        row.parts = {name: value for name, value in parts.items() if value is not None}
        row.scored = len(row.parts) == len(rewards)
        row.reward = np.array([r.weight * row.parts.get(r.name, 0.0) for r in rewards], np.float32)
