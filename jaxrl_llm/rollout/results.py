"""What came of the decode loops: their logs, sorted into completions."""

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

import jax
import numpy as np

from jaxrl_llm.rollout import decode
from jaxrl_llm.rollout.rows import STOP_LENGTH, STOP_STRING, STOP_TOKEN, Completion

CLOSE = 1e-5  # a choice with a smaller margin may differ between compiled sizes
STOP_NAMES = {decode.ON_TOKEN: STOP_TOKEN, decode.ON_STRING: STOP_STRING, decode.ON_LENGTH: STOP_LENGTH}


class Results:
    """Logs of decode loops, sorted into completions; several may add theirs at a time."""

    def __init__(
        self,
        items: int,
        max_new: int,
        version: int,
        on_finished: Callable[[int, Completion], None] | None,
        went: Sequence[np.ndarray] | None = None,
    ):
        """went: the experts of each item's cached context, where they are recorded."""
        self.tokens = np.zeros((items, max_new), np.int32)
        self.sampler_logp = np.zeros((items, max_new), np.float32)
        self.policy_logp = np.zeros((items, max_new), np.float32)
        self.margins = np.full(items, np.inf, np.float32)  # smallest choice margin of each item
        self.completions: list[Completion | None] = [None] * items
        self.version, self.on_finished, self.went = version, on_finished, went
        self.routes = None if went is None else np.zeros((items, max_new, *went[0].shape[1:]), went[0].dtype)
        self.steps = self.slot_steps = self.new_tokens = self.close = 0
        self._adding = Lock()

    def add(self, log: decode.Log, steps: np.ndarray, first: np.ndarray, size: int) -> None:
        """One log [D, C, S] of which each shard wrote `steps` rows; `first` is each shard's first item of the call."""
        host = jax.device_get(log)
        with self._adding:
            self._add(host, steps, first, size)

    def _add(self, host: decode.Log, steps: np.ndarray, first: np.ndarray, size: int) -> None:
        at = host.item >= 0
        item, age = (host.item + first[:, None, None])[at], host.age[at]
        self.tokens[item, age] = host.token[at]
        self.sampler_logp[item, age] = host.sampler_logp[at]
        self.policy_logp[item, age] = host.policy_logp[at]
        if self.routes is not None and host.routes is not None:
            self.routes[item, age] = host.routes[at]
        np.minimum.at(self.margins, item, host.margin[at])
        self.close += int(np.sum(host.margin[at] < CLOSE))
        self.new_tokens += len(item)
        self.steps += int(steps.max())
        self.slot_steps += int(steps.max()) * size * len(steps)
        reason = host.reason[at]
        ended = reason != decode.GOING
        for i, n, why in zip(item[ended], age[ended] + 1, reason[ended]):
            arrays = (x[i, :n].copy() for x in (self.tokens, self.sampler_logp, self.policy_logp))
            routes = None
            if self.routes is not None and self.went is not None:
                routes = np.concatenate([self.went[i], self.routes[i, :n]])
            self.completions[i] = Completion(*arrays, stop=STOP_NAMES[int(why)], version=self.version, routes=routes)
            if self.on_finished is not None:
                self.on_finished(int(i), self.completions[i])  # type: ignore[arg-type]

    def stats(self) -> dict[str, Any]:
        return {
            "tokens": self.new_tokens,
            "steps": self.steps,
            "slot_utilisation": self.new_tokens / max(self.slot_steps, 1),
            "min_margin": float(self.margins.min()),
            "close_choices": self.close,
            "item_margins": self.margins,
        }
