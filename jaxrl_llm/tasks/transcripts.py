"""What an agent's transcript says in its thoughts, <think>...</think>; tool calls and tool responses are not thoughts."""

import re
from collections.abc import Sequence

from jaxrl_llm.tasks.base import Record, RewardFn

THOUGHT = re.compile(r"<think>(.*?)</think>", re.DOTALL)


def thoughts(text: str) -> list[str]:
    """The closed thoughts of a transcript, in order."""
    return THOUGHT.findall(text)


def match_rate(text: str, entities: Sequence[str]) -> float:
    """Share of the entities that some thought names as an exact string, case included; 0 without entities.

    E-GRPO, arXiv 2510.24694.
    """
    said = thoughts(text)
    return sum(any(entity in thought for thought in said) for entity in entities) / max(len(entities), 1)


def entities(field: str = "entities") -> RewardFn:
    """`match_rate` against the list of strings that the problem has in `field`; unscored when it has none such."""

    def reward(completion: str, record: Record) -> float:
        gold = record[field]
        if not isinstance(gold, list) or not all(isinstance(entity, str) and entity for entity in gold):
            raise ValueError(f"entities: {field}={gold!r}, expected a list of strings that are not empty")
        return match_rate(completion, gold)

    return reward
