"""A synthetic task of exact shapes: random prompts of one length, and a reward that costs nothing and is rarely constant."""

import random

from jaxrl_llm.tasks.base import Record, RewardSpec, Task

FIRST = 0x20000  # from here on Unicode has room for any vocabulary


def alphabet(n: int) -> str:
    """`n` distinct characters, one token each of a character tokenizer."""
    return "".join(map(chr, range(FIRST, FIRST + n)))


def problems(letters: int, length: int, size: int, seed: int = 0) -> Task:
    """`size` prompts of `length` tokens (bos and random letters out of the first `letters` of the alphabet)."""
    chars, rng = alphabet(letters), random.Random(seed)
    train = [{"prompt": "".join(rng.choices(chars, k=length - 1))} for _ in range(size)]
    return Task("bench", train, [], (RewardSpec("variety", f"{__name__}:variety"),))


def variety(completion: str, record: Record) -> float:
    """Different characters per character: differs between random completions of any length."""
    return len(set(completion)) / (1 + len(completion))
