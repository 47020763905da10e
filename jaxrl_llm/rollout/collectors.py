"""Collectors: host coroutines that say what to sample and which rows come of it.

A collector is a generator `collector(plan, prompts)`. It yields `Request` and is sent `list[list[Completion]]`, yields
`Score(rows)` (rewarded in place), yields `Draw(n)` and is sent more prompts, yields `Encode(texts)` and is sent their tokens, and
returns the step's rows. Trees, drafts, refills and tool calls are ordinary Python here, and are tested with a scripted engine.
"""

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from jaxrl_llm.algorithms.base import Collector, Plan
from jaxrl_llm.rollout.rows import STOP_LENGTH, Completion, Draw, Encode, Request, Row, Score
from jaxrl_llm.tasks.base import Prompt, Record, fill
from jaxrl_llm.types import GIVEN, REFERENCE

Rows = Generator[Any, Any, list[Row]]


class CollectError(RuntimeError):
    """A batch that cannot be made of what the policy samples."""


def row_of(prompt: Prompt, completion: Completion, group: int, **extras: Any) -> Row:
    """A row that trains every token of one completion of a prompt; `extras` and "prompt_id" are data methods may need."""
    return Row(
        prompt=prompt,
        context=prompt.tokens,
        tokens=completion.tokens,
        mask=np.ones(len(completion.tokens), bool),
        sampler_logp=completion.sampler_logp,
        policy_logp=completion.policy_logp,
        group=group,
        version=completion.version,
        truncated=completion.stop == STOP_LENGTH,
        routes=completion.routes,
        extras={"prompt_id": prompt.id, **extras},
    )


def sample_groups(prompts: Sequence[Prompt], size: int, first_group: int = 0, **request: Any) -> Rows:
    """Sample and score one group of `size` completions per prompt; groups are numbered from `first_group`."""
    answers = yield Request([p.tokens for p in prompts], [size] * len(prompts), **request)
    rows = [row_of(p, c, first_group + g) for g, (p, cs) in enumerate(zip(prompts, answers)) for c in cs]
    yield Score(rows)
    return rows


def given_rows(prompts: Sequence[Prompt], groups: Sequence[int], template: str = "{target}") -> Rows:
    """A row of the worked answer of each prompt, which joins a group: source GIVEN, no log-probs.

    It is rewarded like a completion, but that the task's own reward, the first part, is 1: it is the answer.

    Args:
      template: the text from the problem's fields; {target} is its worked answer, or its answer where it has none.
    """
    if not prompts:
        return []
    tokens = yield Encode([fill("algorithm.render", template, _with_target(p.record)) for p in prompts])
    rows = [_given(prompt, group, ids) for prompt, group, ids in zip(prompts, groups, tokens)]
    yield Score(rows)
    for row in rows:
        row.reward[:1], row.scored = 1.0, True
    return rows


def _given(prompt: Prompt, group: int, tokens: np.ndarray, **fields: Any) -> Row:
    """A row that trains every token of a completion no policy sampled."""
    unknown = np.zeros(len(tokens), np.float32)
    return Row(
        prompt=prompt,
        context=prompt.tokens,
        tokens=tokens,
        mask=np.ones(len(tokens), bool),
        sampler_logp=unknown,
        policy_logp=unknown,
        group=group,
        source=GIVEN,
        extras={"prompt_id": prompt.id},
        **fields,
    )


def _with_target(record: Record) -> Record:
    target = record.get("target", record.get("answer"))
    return record if target is None else {**record, "target": target}


def preference_rows(prompts: Sequence[Prompt], first_group: int = 0) -> Rows:
    """A group for each prompt of the completions that came with it: source GIVEN, no log-probs, reward 1 for each of
    record["chosen"] and 0 for each of record["rejected"]."""
    sides = ((1, "chosen"), (0, "rejected"))
    said = [(p, g, reward, text) for g, p in enumerate(prompts) for reward, side in sides for text in p.record[side]]
    if not said:
        return []
    encoded = yield Encode([text for *_, text in said])
    return [
        _given(prompt, first_group + group, tokens, reward=np.array([reward], np.float32), text=text)
        for (prompt, group, reward, text), tokens in zip(said, encoded)
    ]


def preferences(plan: Plan, prompts: Sequence[Prompt]) -> Rows:
    """No sampling: the chosen and rejected completions that every prompt came with."""
    return (yield from preference_rows(prompts))


def flat(plan: Plan, prompts: Sequence[Prompt]) -> Rows:
    """`plan.group_size` completions of every prompt."""
    return (yield from sample_groups(prompts, plan.group_size))


def against_reference(plan: Plan, prompts: Sequence[Prompt]) -> Rows:
    """One completion of every prompt by the policy and one by the reference, in this order; XPO, arXiv 2405.21046."""
    contexts, once = [p.tokens for p in prompts], [1] * len(prompts)
    own = yield Request(contexts, once)
    reference = yield Request(contexts, once, policy="ref")
    rows = [row_of(p, c, g) for g, (p, *cs) in enumerate(zip(prompts, *zip(*own), *zip(*reference))) for c in cs]
    for row in rows[1::2]:
        row.source = REFERENCE
    yield Score(rows)
    return rows


def dynamic(max_draws: int) -> Collector:
    """DAPO's dynamic sampling (arXiv 2503.14476): groups whose rewards all agree are replaced by fresh prompts.

    A group is judged by the task's own reward, `Row.reward[0]`, before shaping parts such as the overlong penalty.
    Raises CollectError when `max_draws` batches did not yield enough groups.
    """

    def collect(plan: Plan, prompts: Sequence[Prompt]) -> Rows:
        wanted, kept, drawn = len(prompts), [], 0
        for _ in range(max_draws):
            rows = yield from sample_groups(prompts, plan.group_size, first_group=drawn)
            for g in range(drawn, drawn + len(prompts)):
                group = [r for r in rows if r.group == g]
                if len({float(r.reward[0]) for r in group if r.scored}) > 1:
                    kept.append(group)
            drawn += len(prompts)
            if len(kept) >= wanted:
                return [r for group in kept[:wanted] for r in group]
            prompts = yield Draw(wanted)
        raise CollectError(
            f"algorithm.max_draws={max_draws}: only {len(kept)} of {wanted} groups had rewards that differ; "
            "raise it, or choose easier or harder prompts"
        )

    return collect
