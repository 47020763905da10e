"""Smoothed sentence BLEU as a reward. BLEUBERI, arXiv 2505.11080: the BLEU of TensorFlow's NMT script.

It is not sacrebleu's: one is added to every n-gram count, unigrams included, and the brevity penalty compares with the shortest
reference, not the closest. Words are split by the rules of mteval-v13a.
"""

import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

from jaxrl_llm.tasks.base import Record, RewardFn

ORDER = 4
# What becomes a word of its own: ASCII punctuation and symbols but ' - , . ; then . and , unless between digits; - after a digit.
_APART = (
    (re.compile(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])"), r" \1 "),
    (re.compile(r"([^0-9])([\.,])"), r"\1 \2 "),
    (re.compile(r"([\.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)
_ESCAPES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))

How = Literal["hard", "easy", "medium", "random"]


class Bleu(NamedTuple):
    score: float
    precisions: tuple[float, ...]  # of n-grams of 1 to ORDER words
    brevity: float  # penalty, 1 for completions longer than the shortest reference


def tokenize_13a(text: str) -> list[str]:
    """Words by mteval-v13a; case is kept, ' stays inside words."""
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for escaped, character in _ESCAPES:
        text = text.replace(escaped, character)
    text = f" {text} "
    for pattern, apart in _APART:
        text = pattern.sub(apart, text)
    return text.split()


def bleu(text: str, references: Sequence[str]) -> Bleu:
    """BLEU-4 in (0, 1] of a text against at least one reference; 0 for a text without words."""
    words, known = tokenize_13a(text), [tokenize_13a(r) for r in references]
    if not known:
        raise ValueError("bleu: no references, expected at least one")
    if not words:
        return Bleu(0.0, (0.0,) * ORDER, 0.0)
    precisions = tuple(_precision(words, known, n) for n in range(1, ORDER + 1))
    shortest = min(map(len, known))
    brevity = 1.0 if len(words) > shortest else math.exp(1 - shortest / len(words))
    return Bleu(brevity * math.exp(sum(map(math.log, precisions)) / ORDER), precisions, brevity)


def _precision(words: list[str], references: list[list[str]], n: int) -> float:
    """(matches + 1) / (n-grams + 1), each n-gram matched as often as it is in the reference that has it most."""
    most: Counter[tuple[str, ...]] = Counter()
    for reference in references:
        most |= _ngrams(reference, n)
    own = _ngrams(words, n)
    return (sum((own & most).values()) + 1) / (sum(own.values()) + 1)


def _ngrams(words: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def answer_of(text: str) -> str:
    """What follows the first <answer>, up to </answer>, another <answer> or the end; all of a text without one."""
    _, tag, rest = text.partition("<answer>")
    return re.split("</?answer>", rest, maxsplit=1)[0].strip() if tag else text.strip()


def reward(field: str = "references") -> RewardFn:
    """BLEU of the completion's answer against the problem's references: a list of texts in `field`, else its "answer"."""

    def score(completion: str, record: Record) -> float:
        references = record[field] if field in record else [str(record["answer"])]
        return bleu(answer_of(completion), [references] if isinstance(references, str) else references).score

    return score


def answer_format() -> RewardFn:
    """1 when the completion is exactly <think>..</think><answer>..</answer>, else 0."""
    pattern = re.compile(
        r"<think>(?:(?!</?think>|</?answer>).)*</think>\s*<answer>(?:(?!</?answer>).)*</answer>", re.DOTALL
    )
    return lambda completion, record: float(pattern.fullmatch(completion.strip()) is not None)


def select(scores: Sequence[float], n: int, how: How = "hard", seed: int = 0) -> list[int]:
    """Indices of `n` problems, ascending, by the BLEU of the base model's own answers: those of the lowest scores (hard), the
    highest (easy), around the median (medium), or any. Ties go to the first."""
    if not 0 < n <= len(scores):
        raise ValueError(f"n={n}: expected 1 to the {len(scores)} problems")
    if how == "random":
        return sorted(random.Random(seed).sample(range(len(scores)), n))
    if how == "easy":
        return sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:n])
    ascending = sorted(range(len(scores)), key=lambda i: scores[i])
    first = {"hard": 0, "medium": (len(scores) - n) // 2}.get(how)
    if first is None:
        raise ValueError(f"how={how!r}: expected hard, easy, medium or random")
    return sorted(ascending[first : first + n])
