"""Rollout samples for people: what was asked, what came back, what it earned."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxrl_llm.rollout.rows import Row


class Sample(NamedTuple):
    """One completion as shown to people. Numbers that don't apply are None."""

    prompt: str
    completion: str
    reward: float | None  # weighted total; None: unscored
    parts: dict[str, float]  # unweighted, by name
    advantage: float | None
    stop: str
    group: int
    prompt_id: int


def from_rows(
    rows: Sequence[Row],
    advantage: np.ndarray | None,
    decode: Callable[[Sequence[int]], str],
    n: int,
) -> list[Sample]:
    """The first `n` rows as samples, group by group.

    Args:
      advantage: [B, T] of the packed rows in the same order, or None; the first trained token's is shown.
      decode: token ids -> text, special tokens kept.
    """
    samples = []
    for i, row in enumerate(rows[:n]):
        trained = np.flatnonzero(row.mask)
        samples.append(
            Sample(
                prompt=decode(row.context.tolist()),
                completion=row.text if row.text is not None else decode(row.tokens.tolist()),
                reward=float(np.sum(row.reward)) if row.scored else None,
                parts={k: float(v) for k, v in row.parts.items() if v is not None},
                advantage=None if advantage is None or not len(trained) else float(advantage[i, trained[0]]),
                stop="length" if row.truncated else "stop",
                group=int(row.group),
                prompt_id=int(row.prompt.id),
            )
        )
    return samples


def as_text(samples: Sequence[Sample]) -> str:
    """Samples as markdown, for tensorboard."""
    return "\n\n---\n\n".join(_one(s) for s in samples)


def _one(s: Sample) -> str:
    reward = "unscored" if s.reward is None else f"reward {s.reward:.4g}"
    parts = "".join(f", {name} {value:.4g}" for name, value in s.parts.items())
    advantage = "" if s.advantage is None else f", advantage {s.advantage:+.4g}"
    return f"**group {s.group}: {reward}{parts}{advantage}, {s.stop}**\n\n{_quote(s.prompt)}\n\n{_quote(s.completion)}"


def _quote(text: str) -> str:
    # An indented block shows any text literally: no markdown or HTML of a completion is rendered.
    return "\n".join("    " + line for line in text.split("\n"))
