"""Rules for Knights and Knaves puzzles: a preference level (TRPA, arXiv 2504.04524), and the score they give GRPO.

The completion thinks in <think>...</think> and answers in <answer>...</answer>; record["answer"] says "Zoey is a knight, and Sam
is a knave." in any wording with "<name> is a <role>". `rewards.parts` and `task.reward` name these functions:
`jaxrl_llm.tasks.knights:preference` with algorithm.levels=[-1, -2, -3] for TRPA, `jaxrl_llm.tasks.knights:score` for others.
"""

import re

from jaxrl_llm.tasks.base import Record

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
RIGHT, WRONG, UNREADABLE, MALFORMED = 1, 2, 3, 4


def roles(text: str) -> dict[str, str]:
    """Who is said to be what, in lower case; the last word on a person counts."""
    return {name.lower(): role.lower() for name, role in re.findall(r"\b(\w+)\s+is\s+an?\s+(\w+)", text)}


def answer(completion: str) -> str | None:
    """The stripped answer block; None when a tag is missing, repeated, or out of order."""
    places = [completion.find(tag) for tag in TAGS]
    if any(completion.count(tag) != 1 for tag in TAGS) or places != sorted(places):
        return None
    return completion[places[2] + len(TAGS[2]) : places[3]].strip()


def level(completion: str, record: Record) -> int:
    """1 right, 2 wrong, 3 not a role for everyone, 4 malformed or without an answer."""
    said = answer(completion)
    if not said:
        return MALFORMED
    right, claimed = roles(str(record["answer"])), roles(said)
    if not right:
        raise ValueError(f"knights: no '<name> is a <role>' in the reference answer {record['answer']!r}")
    if not right.keys() <= claimed.keys() or not set(claimed.values()) <= {"knight", "knave", *right.values()}:
        return UNREADABLE
    return RIGHT if all(claimed[name] == role for name, role in right.items()) else WRONG


def preference(completion: str, record: Record) -> float:
    """Minus the level."""
    return -float(level(completion, record))


def score(completion: str, record: Record) -> float:
    """3 right, -0.5 wrong, -1 unreadable or an empty answer, -3 malformed."""
    if answer(completion) == "":
        return -1.0
    return {RIGHT: 3.0, WRONG: -0.5, UNREADABLE: -1.0, MALFORMED: -3.0}[level(completion, record)]
