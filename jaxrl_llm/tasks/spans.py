"""Spans of time in text, and how well they agree: the reward of temporal grounding. TempSamp-R1, arXiv 2509.18056."""

import re
from typing import NamedTuple

from jaxrl_llm.tasks.base import Record, RewardFn

NUMBER = r"(\d+(?:\.\d+)?)"
PAIR = re.compile(NUMBER + r"\s*(?:s|sec|seconds)?\s*(?:to|and|,|-|–)\s*" + NUMBER)


class Span(NamedTuple):
    start: float
    end: float


def parse(text: str) -> Span | None:
    """The last "start to end" of a text (also "start - end", "start, end"; seconds may be named); None without one."""
    found = PAIR.findall(text)
    return Span(*map(float, found[-1])) if found else None


def iou(a: Span | None, b: Span | None) -> float:
    """Intersection over the hull of both, which is their union where they overlap; 0 for a hull of nothing or no span."""
    if a is None or b is None:
        return 0.0
    hull = max(a.end, b.end) - min(a.start, b.start)
    return max(0.0, min(a.end, b.end) - max(a.start, b.start)) / hull if hull > 0 else 0.0


def span_iou(answer_pattern: str | None = None) -> RewardFn:
    """Agreement of the completion's span with the answer's, in [0, 1]; of the first group of the last match of
    `answer_pattern`, or of all of it. An answer without a span raises ValueError."""
    from jaxrl_llm.tasks.rewards import last_match

    pick = last_match(answer_pattern)

    def reward(completion: str, record: Record) -> float:
        right = parse(str(record["answer"]))
        if right is None:
            raise ValueError(f"span_iou finds no span in the reference answer {record['answer']!r}")
        return iou(parse(pick(completion)), right)

    return reward
