"""A scripted engine for collectors: answers requests from a function of the context, rewards rows from a function of tokens."""

from collections.abc import Callable, Sequence

import numpy as np

from jaxrl_llm.algorithms.base import Plan
from jaxrl_llm.rollout import driver
from jaxrl_llm.rollout.rows import STOP_TOKEN, Completion, Request, Row
from jaxrl_llm.tasks.base import Prompt

EOS = 99  # ends an encoded text, whose tokens are its digits


def prompt(number: int, tokens: Sequence[int], **record: str) -> Prompt:
    return Prompt(number, np.asarray(tokens, np.int32), {"prompt": str(number), **record})


def completion(tokens: Sequence[int], stop: str = STOP_TOKEN, first_logp: float = 0.0) -> Completion:
    """Log-probs count down from `first_logp`, so that a slice of them can be recognised."""
    logp = (first_logp - np.arange(len(tokens))).astype(np.float32)
    return Completion(np.asarray(tokens, np.int32), logp - 0.5, logp, stop, version=3)


def collect(
    plan: Plan,
    prompts: Sequence[Prompt],
    answer: Callable[[list[int], int], Completion],
    reward: Callable[[list[int]], float],
) -> tuple[list[Row], list[Request]]:
    """The rows of a plan and the requests it made; `answer` maps a context and the number of its sample to a completion."""
    requests: list[Request] = []

    def sample(ask: Request) -> list[list[Completion]]:
        requests.append(ask)
        return [[answer(list(map(int, c)), i) for i in range(n)] for c, n in zip(ask.contexts, ask.n)]

    def score(rows: Sequence[Row]) -> None:
        for row in rows:
            row.reward = np.array([reward(list(map(int, row.tokens)))], np.float32)

    def draw(n: int) -> list[Prompt]:
        raise AssertionError("no collector here draws more prompts")

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array([*(int(c) for c in text if c.isdigit()), EOS], np.int32) for text in texts]

    return driver.collect(plan, prompts, sample=sample, score=score, draw=draw, encode=encode), requests
