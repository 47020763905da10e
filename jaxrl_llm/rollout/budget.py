"""How many completions each prompt gets: the hand-out of a number of rollouts by what the next one is worth."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int


def greedy(
    counts: Int[np.ndarray, "P"],
    budget: int,
    worth: Callable[[Int[np.ndarray, "P"]], Float[np.ndarray, "P"]],
    most: int | None = None,
) -> Int[np.ndarray, "P"]:
    """Counts after `budget` more rollouts, one at a time to the prompt where the next is worth most; ties to the first.

    Args:
      worth: counts -> what one more rollout of each prompt is worth.
      most: no prompt gets more; what is left of the budget then is not spent.
    """
    counts = np.array(counts)
    for _ in range(budget):
        value = worth(counts)
        if most is not None:
            value = np.where(counts < most, value, -np.inf)
        best = int(np.argmax(value))
        if value[best] == -np.inf:
            break
        counts[best] += 1
    return counts


def exact(worth: Float[np.ndarray, "P C"], total: int, least: int = 0) -> Int[np.ndarray, "P"]:
    """Counts that are worth most together, at most `total`, by dynamic programming; the fewest for the first prompts on ties.

    worth: of each prompt at `least`, least + 1, ... rollouts.
    """
    prompts, choices = worth.shape
    room = total - least * prompts
    best, choice = np.zeros(room + 1), np.zeros((prompts, room + 1), int)
    for i in range(prompts):  # best[r]: worth of the prompts so far with r rollouts beyond the least
        options = np.full((min(choices, room + 1), room + 1), -np.inf)
        for extra in range(len(options)):
            options[extra, extra:] = best[: room + 1 - extra] + worth[i, extra]
        choice[i], best = options.argmax(0), options.max(0)
    counts, left = np.zeros(prompts, int), int(best.argmax())
    for i in reversed(range(prompts)):
        counts[i] = choice[i, left]
        left -= counts[i]
    return counts + least
