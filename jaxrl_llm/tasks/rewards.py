"""Reward functions by name. `resolve` runs inside a worker process; every function is (completion, record) -> number."""

import logging
import math as numbers
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Literal

from jaxrl_llm.tasks import bleu, code, grounding, spans, transcripts
from jaxrl_llm.tasks.base import Record, RewardFn, import_function


def resolve(spec: str, options: Mapping[str, Any] | None = None) -> RewardFn:
    """The reward a string names: math, exact, code, preferred, gym, letter:<c>, bleu, answer_format, span_iou, entities,
    grounding (or grounding:<measure>), text_entropy, length_penalty, overlong, or module:function.

    `options` are keyword arguments: of the built-in below, or given to the user's function after (completion, record).
    Raises ValueError for an unknown name or option.
    """
    options = dict(options or {})
    kind, colon, rest = spec.partition(":")
    if kind == "letter":
        if len(rest) != 1:
            raise ValueError(f"reward: {spec!r}, expected letter:<one character>")
        return letter(rest)
    if kind == "grounding" and colon:
        options = {"measure": rest, **options}
    elif colon:
        function = import_function("reward", spec)
        return (lambda completion, record: function(completion, record, **options)) if options else function
    built_in = BUILT_IN.get(kind)
    if built_in is None:
        raise ValueError(
            f"reward: {spec!r}, expected math, exact, code, preferred, gym, letter:<c>, bleu, answer_format, span_iou, "
            "entities, grounding, text_entropy, judge, length_penalty, overlong or module:function"
        )
    try:
        return built_in(**options)
    except TypeError as error:
        raise ValueError(f"reward: {spec!r} with options {sorted(options)}: {error}") from None


def exact(answer_pattern: str | None = None, ignore_case: bool = False) -> RewardFn:
    """1 when the completion, or the first group of the last match of `answer_pattern` in it, is the answer; else 0."""
    pick = last_match(answer_pattern)

    def reward(completion: str, record: Record) -> float:
        said, right = pick(completion), str(record["answer"]).strip()
        return float(said.casefold() == right.casefold() if ignore_case else said == right)

    return reward


def math(answer_pattern: str | None = None) -> RewardFn:
    """1 when the completion's final answer equals the reference mathematically (`math-verify`), else 0.

    The answer is looked for in the whole completion, or in the first group of the last match of `answer_pattern`.
    math-verify's own alarms are off: the worker's time limit stops an endless simplification, and the row is unscored, not
    wrong. A reference that cannot be read raises ValueError (unscored too); a completion without an answer is wrong.
    """
    for name in ("math_verify.parser", "math_verify.grader"):  # they warn that the time limit is ours
        logging.getLogger(name).setLevel(logging.ERROR)
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    pick = last_match(answer_pattern)
    # Boxed LaTeX first, where it is expected; thousands separators are dropped on both sides, LaTeX would see a pair.
    kinds = (LatexExtractionConfig(), ExprExtractionConfig())

    def read(text: str) -> list[Any]:
        return parse(re.sub(r"(?<=\d),(?:\\!)?(?=\d{3}(?!\d))", "", text), kinds, parsing_timeout=None)  # type: ignore[arg-type]

    def reward(completion: str, record: Record) -> float:
        answer = str(record["answer"]).strip()
        gold = read(answer if "\\boxed" in answer else f"\\boxed{{{answer}}}")
        if not gold:
            raise ValueError(f"math-verify cannot read the reference answer {answer!r}")
        said = pick(completion)
        parsed = read(f"\\boxed{{{said}}}" if answer_pattern and said else said)
        return float(bool(parsed) and verify(gold, parsed, timeout_seconds=None))

    return reward


def last_match(pattern: str | None) -> Callable[[str], str]:
    """Text -> the first group of the pattern's last match in it, "" when there is none; all of it without a pattern."""
    if pattern is None:
        return str.strip
    compiled = re.compile(pattern, re.DOTALL)

    def pick(text: str) -> str:
        groups = [match.group(1) for match in compiled.finditer(text)]
        return (groups[-1] or "").strip() if groups else ""

    return pick


def letter(character: str) -> RewardFn:
    """Share of the character in the completion, 0 when that is empty."""
    return lambda completion, record: completion.count(character) / len(completion) if completion else 0.0


def preferred() -> RewardFn:
    """1 when the completion is one of the record's chosen ones, else 0."""
    return lambda completion, record: float(completion.strip() in [text.strip() for text in record["chosen"]])


def text_entropy(unit: Literal["character", "word"] = "word") -> RewardFn:
    """Entropy of the completion's own characters or words, nats: -sum p ln p of their relative frequencies; 0 of nothing."""
    if unit not in ("character", "word"):
        raise ValueError(f"text_entropy: unit={unit!r}, expected character or word")

    def reward(completion: str, record: Record) -> float:
        counts = Counter(completion if unit == "character" else completion.split()).values()
        total = sum(counts)
        return sum(n / total * numbers.log(total / n) for n in counts)

    return reward


def length_penalty(max_new: int) -> RewardFn:
    """Minus the share of the token limit `max_new` that the completion used, in [-1, 0]."""
    if max_new < 1:
        raise ValueError(f"length_penalty: max_new={max_new}, expected at least 1")
    return lambda completion, record: -_tokens(record) / max_new


def overlong(max_new: int, cache: int) -> RewardFn:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13): 0 up to max_new - cache tokens, then linear to -1."""
    if not 0 < cache <= max_new:
        raise ValueError(f"rewards.overlong_cache: {cache}, expected 1 to rollout.max_new={max_new}")
    return lambda completion, record: min(0.0, max(-1.0, (max_new - cache - _tokens(record)) / cache))


def gym(answer_pattern: str | None = None) -> RewardFn:
    """The score that the reasoning-gym generator of the problem gives the completion, or the last match in it."""
    from jaxrl_llm.tasks.gym import score

    pick = last_match(answer_pattern)
    return lambda completion, record: score(pick(completion), record)


BUILT_IN = {
    "math": math,
    "exact": exact,
    "code": code.code,
    "gym": gym,
    "bleu": bleu.reward,
    "answer_format": bleu.answer_format,
    "span_iou": spans.span_iou,
    "entities": transcripts.entities,
    "grounding": grounding.grounding,
    "preferred": preferred,
    "text_entropy": text_entropy,
    "length_penalty": length_penalty,
    "overlong": overlong,
}


def _tokens(record: Record) -> int:
    return int(record["completion_tokens"])
