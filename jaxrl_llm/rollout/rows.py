"""Host-side rows, the words a collector exchanges with its driver, and packing rows into `Rollouts`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from jaxrl_llm.tasks.base import Prompt
from jaxrl_llm.types import CURRENT, ROUTES, Rollouts

STOP_TOKEN, STOP_STRING, STOP_LENGTH = "stop_token", "stop_string", "length"


class Completion(NamedTuple):
    """What the engine says of one sampled item; arrays are [n] in completion coordinates, the stop token included."""

    tokens: np.ndarray  # int32
    sampler_logp: np.ndarray  # float32, under the distribution sampled from
    policy_logp: np.ndarray  # float32, log softmax(logits / score temperature) over the whole vocabulary
    stop: str  # STOP_TOKEN, STOP_STRING or STOP_LENGTH
    version: int  # RL step of the weights
    routes: np.ndarray | None = None  # int16 [S-1, M, k]: experts of context and completion, but for the last token


class Request(NamedTuple):
    """Collector -> driver: sample `n[i]` completions of `contexts[i]`; answered by list[list[Completion]]."""

    contexts: Sequence[np.ndarray]  # int32 token ids
    n: Sequence[int]
    temperature: float | None = None  # None: the plan's
    max_new: int | None = None  # None: the config's
    policy: str = "policy"  # or "ref": who samples


class Score(NamedTuple):
    """Collector -> driver: reward these rows in place (`reward`, `scored`); answered by None."""

    rows: "Sequence[Row]"


class Draw(NamedTuple):
    """Collector -> driver: `n` more prompts of this epoch's order; answered by list[Prompt]."""

    n: int


class Encode(NamedTuple):
    """Collector -> driver: the tokens of these texts as whole completions, the end-of-sequence token included; answered by
    list[np.ndarray]."""

    texts: Sequence[str]


@dataclass
class Row:
    """One training row on the host. `mask` marks the tokens that train."""

    prompt: Prompt
    context: np.ndarray  # int32: what the policy saw before `tokens` (the prompt, or prompt and earlier turns)
    tokens: np.ndarray  # int32
    mask: np.ndarray  # bool
    sampler_logp: np.ndarray  # float32; anything where the policy did not sample
    policy_logp: np.ndarray  # float32
    group: int
    version: int = 0
    truncated: bool = False
    source: int = CURRENT
    reward: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))  # [R] weighted parts
    parts: dict[str, float] = field(default_factory=dict)  # unweighted parts by name, for metrics and samples
    scored: bool = True
    stat: bool = True
    text: str | None = None  # decoded completion, what the reward saw
    routes: np.ndarray | None = None  # experts of context and tokens, as `Completion.routes` has them
    extras: dict[str, Any] = field(default_factory=dict)  # scalars by name, cast to arrays by `pack`


def pack(
    rows: Sequence[Row],
    *,
    contexts: int,
    prompt_len: int,
    size: int,
    length: int,
    parts: int,
    extras: Sequence[str] = (),
    routes: tuple[int, int] | None = None,
) -> Rollouts:
    """Rows as `Rollouts` of numpy arrays with fixed shapes P=contexts, L=prompt_len, B=size, T=length, R=parts.

    routes: `ModelSpec.routes` where recorded experts are kept (`training.routing`).

    Equal contexts of one group are stored once; missing rows are padding (nothing masked, not in statistics, a group of
    their own). Raises ValueError when something does not fit.
    """
    if len(rows) > size:
        raise ValueError(f"{len(rows)} rows do not fit a batch of {size}")
    index: dict[tuple[int, bytes], int] = {}
    prompt_tokens = np.zeros((contexts, prompt_len), np.int32)
    prompt_length = np.ones(contexts, np.int32)  # an unused context is one pad token: no empty softmax anywhere
    b = {
        "prompt": np.zeros(size, np.int32),
        "group": np.full(size, -1, np.int32) - np.arange(size, dtype=np.int32),
        "row_id": np.arange(size, dtype=np.int32),
        "tokens": np.zeros((size, length), np.int32),
        "length": np.zeros(size, np.int32),
        "mask": np.zeros((size, length), bool),
        "stat": np.zeros(size, bool),
        "scored": np.zeros(size, bool),
        "reward": np.zeros((size, parts), np.float32),
        "truncated": np.zeros(size, bool),
        "version": np.zeros((size, length), np.int32),
        "sampler_logp": np.zeros((size, length), np.float32),
        "old_logp": np.zeros((size, length), np.float32),
        "source": np.full(size, CURRENT, np.int32),
        "block": np.arange(size, dtype=np.int32),
    }
    more: dict[str, np.ndarray] = {
        name: np.zeros(size, np.float32 if name in FLOAT_EXTRAS else np.int32) for name in extras
    }
    if routes is not None:
        more[ROUTES] = np.full((size, prompt_len + length, *routes), -1, np.int16)
    for i, r in enumerate(rows):
        n = len(r.tokens)
        if n > length or len(r.context) > prompt_len:
            raise ValueError(
                f"row {i}: context {len(r.context)} and completion {n} do not fit {prompt_len} and {length}"
            )
        if missing := [name for name in extras if name not in r.extras]:
            raise ValueError(
                f"row {i}: the method needs {', '.join(missing)} of a row, expected a collector that says it"
            )
        key = (r.group, r.context.tobytes())
        c = index.setdefault(key, len(index))
        if c >= contexts:
            raise ValueError(f"more than {contexts} distinct contexts in one batch")
        prompt_tokens[c, : len(r.context)] = r.context
        prompt_length[c] = len(r.context)
        b["prompt"][i], b["group"][i], b["length"][i] = c, r.group, n
        b["stat"][i], b["scored"][i], b["truncated"][i], b["source"][i] = r.stat, r.scored, r.truncated, r.source
        b["version"][i] = r.version
        for name in ("tokens", "mask", "sampler_logp"):
            b[name][i, :n] = getattr(r, name)
        b["old_logp"][i, :n] = r.policy_logp
        if r.scored:
            b["reward"][i, : len(r.reward)] = r.reward  # given rows have one part, whatever the task's
        for name in extras:
            more[name][i] = r.extras[name]
        if routes is not None and r.routes is not None:
            if len(r.routes) != (seen := len(r.context) + n - 1):
                raise ValueError(f"row {i}: experts of {len(r.routes)} tokens are recorded, expected {seen}")
            more[ROUTES][i, : len(r.context)] = r.routes[: len(r.context)]
            more[ROUTES][i, prompt_len : prompt_len + n - 1] = r.routes[len(r.context) :]
    return Rollouts(prompt_tokens=prompt_tokens, prompt_length=prompt_length, extras=more, **b)  # type: ignore[arg-type]


FLOAT_EXTRAS = ("step_reward", "invalid", "quality")
