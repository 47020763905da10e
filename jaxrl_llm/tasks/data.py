"""The order in which prompts are drawn: deterministic, shuffled anew every epoch, sharded by process, saved as numbers."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrl_llm.tasks.base import Prompt, Record
from jaxrl_llm.tasks.text import Text


class Tokenized(NamedTuple):
    prompts: list[Prompt]
    dropped: int  # prompts longer than the limit


def tokenize(records: Sequence[Record], text: Text, max_prompt: int, overlong: str = "drop") -> Tokenized:
    """Encode every problem's prompt once; `Prompt.id` is its index in `records`.

    Prompts of more than `max_prompt` tokens, in any of their phrasings, are dropped and counted, or with overlong="error"
    refused. Raises ValueError then, and when nothing is left.
    """
    prompts = [_prompt(i, record, text) for i, record in enumerate(records)]
    lengths = [max(len(tokens) for tokens in (p.tokens, *p.phrasings)) for p in prompts]
    short = [p for p, length in zip(prompts, lengths) if length <= max_prompt]
    dropped = len(prompts) - len(short)
    longest = max(lengths, default=0)
    if dropped and overlong == "error":
        raise ValueError(
            f"rollout.max_prompt: {max_prompt}, but {dropped} of {len(prompts)} prompts are longer (up to {longest} tokens)"
        )
    if records and not short:
        raise ValueError(f"rollout.max_prompt: {max_prompt}, but every prompt is longer (up to {longest} tokens)")
    return Tokenized(short, dropped)


def _prompt(number: int, record: Record, text: Text) -> Prompt:
    others = record.get("phrasings", [])
    if not isinstance(others, list) or not all(isinstance(other, str) for other in others):
        raise ValueError(f"task: problem {number + 1} has phrasings={others!r}, expected a list of prompts")
    return Prompt(number, text.encode_prompt(record), record, tuple(map(text.encode_prompt, others)))


def without_long_completions(found: Tokenized, text: Text, max_new: int, overlong: str = "drop") -> Tokenized:
    """The prompts whose given completions (record["chosen"], record["rejected"]) fit `max_new` tokens with the
    end-of-sequence token; the others are dropped and counted, or with overlong="error" refused.

    Raises ValueError then, and when nothing is left.
    """

    def longest(prompt: Prompt) -> int:
        given = [*prompt.record.get("chosen", []), *prompt.record.get("rejected", [])]
        return max((len(text.encode(one)) + 1 for one in given), default=0)

    lengths = [longest(p) for p in found.prompts]
    fit = [p for p, n in zip(found.prompts, lengths) if n <= max_new]
    long = len(lengths) - len(fit)
    if long and (overlong == "error" or not fit):
        raise ValueError(
            f"rollout.max_new: {max_new}, but given completions of {long} of {len(lengths)} problems are longer (up to "
            f"{max(lengths)} tokens)"
        )
    return Tokenized(fit, found.dropped + long)


class Stream:
    """An endless order over prompts. Equal (prompts, seed, state) give equal draws; the same prompt may come twice.

    Each of `processes` gets every processes-th element of one global order, so the order does not depend on their number.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, process: int = 0, processes: int = 1):
        import grain

        if not prompts:
            raise ValueError("task: has no prompts to draw from")
        self._prompts = prompts
        self._seed = seed
        self._process, self._processes = process, processes
        self._order = grain.MapDataset.source(prompts).seed(seed).shuffle().repeat()
        self._drawn = 0  # of the epochs' order, by this process
        self._weighted = 0  # weighted draws made

    def draw(self, n: int) -> list[Prompt]:
        """The next `n` prompts of this process; epochs follow each other without a seam."""
        first = self._drawn
        self._drawn += n
        mine = range(first * self._processes + self._process, (first + n) * self._processes, self._processes)
        return [prompt for i in mine if (prompt := self._order[i]) is not None]

    def draw_weighted(self, n: int, weights: np.ndarray) -> list[Prompt]:
        """`n` different prompts, drawn without replacement in proportion to `weights` [ids], indexed by `Prompt.id`.

        Over all processes together no prompt comes twice in a draw. Efraimidis and Spirakis 2006: the largest of
        log(u) / weight are such a sample. Raises ValueError for a bad weight or fewer drawable prompts than asked for.
        """
        w = np.asarray(weights, np.float64)[[p.id for p in self._prompts]]
        total = n * self._processes
        if not np.isfinite(w).all() or (w < 0).any():
            raise ValueError("prompt_weights: negative or not finite, expected weights of at least 0")
        if (w > 0).sum() < total:
            raise ValueError(
                f"prompt_weights: {(w > 0).sum()} prompts have weight, expected at least the {total} drawn"
            )
        u = np.random.default_rng([self._seed, self._weighted]).random(len(w))
        self._weighted += 1
        with np.errstate(divide="ignore"):
            keys = np.where(w > 0, np.log1p(-u) / np.where(w > 0, w, 1.0), -np.inf)
        chosen = np.argsort(-keys, kind="stable")[:total]
        return [self._prompts[i] for i in chosen[self._process :: self._processes]]

    def longest(self, n: int) -> list[Prompt]:
        """The `n` longest prompts; fewer when there are fewer."""
        return sorted(self._prompts, key=lambda p: -len(p.tokens))[:n]

    @property
    def epoch(self) -> float:
        """Passes over the prompts drawn so far by all processes, weighted draws not counted."""
        return self._drawn * self._processes / len(self._prompts)

    def state(self) -> dict[str, int]:
        """Where the order stands, for a checkpoint."""
        return {"prompts": len(self._prompts), "drawn": self._drawn, "weighted": self._weighted}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`. Raises ValueError when it was of another set of prompts."""
        if int(state["prompts"]) != len(self._prompts):
            raise ValueError(
                f"task: has {len(self._prompts)} prompts, but the checkpoint was made with {state['prompts']}; "
                "resume with the same task, tokenizer and rollout.max_prompt"
            )
        self._drawn, self._weighted = int(state["drawn"]), int(state["weighted"])
