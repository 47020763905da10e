"""Compiling the update while the first completions are sampled.

XLA compiles without Python's lock, so the learner's programs can be ready when the first batch is. What shapes that batch
will have is known but for the lengths of its completions: they are taken to run to the limit, as those of untrained
policies do. Where they do not, the update is compiled when it is needed.
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from jaxrl_llm.algorithms.base import Algorithm
from jaxrl_llm.rollout.rows import Row
from jaxrl_llm.sharding import processes
from jaxrl_llm.tasks.base import Prompt
from jaxrl_llm.training.learner import Learner
from jaxrl_llm.types import Rollouts, State

logger = logging.getLogger(__name__)


def start(learner: Learner, state: State, credit: Callable[..., Any], batch: Rollouts) -> Future[None] | None:
    """Begin to compile what credit and update need for batches like this one; None where that cannot be foreseen:
    for methods that choose rows by what happened, update in their own way, or take the gradient in parts. Nor are several
    processes served: a thread may not run what all devices must run in the same order.
    """
    if processes.count() > 1 or learner.alg.select or learner.alg.update or learner.alg.rate:
        return None

    def compile_() -> None:
        try:
            learner.compile_ahead(state, batch, credit(state, batch, jax.random.key(0)))
        except Exception as error:  # whatever is wrong will be said better where it matters
            logger.debug("compiling ahead: %s", error)

    threads = ThreadPoolExecutor(1, "compile ahead")
    future = threads.submit(compile_)
    threads.shutdown(wait=False)
    return future


def likely_rows(alg: Algorithm, group_size: int, prompts: Sequence[Prompt], max_new: int) -> list[Row]:
    """Rows as the first batch may have them: full groups of these prompts, whose completions run to the limit."""
    tokens, numbers = np.zeros(max_new, np.int32), np.zeros(max_new, np.float32)
    return [
        Row(
            prompt=prompt,
            context=prompt.tokens,
            tokens=tokens,
            mask=np.ones(max_new, bool),
            sampler_logp=numbers,
            policy_logp=numbers,
            group=group,
            scored=False,
            extras=dict.fromkeys(alg.needs.row_extras, 0),
        )
        for group, prompt in enumerate(prompts)
        for _ in range(group_size)
    ]
