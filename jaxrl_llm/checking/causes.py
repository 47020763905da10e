"""Why a function disagrees with the reference: hypotheses that are computed, and kept where they explain every case."""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxrl_llm.algorithms.base import Algorithm
from jaxrl_llm.checking import mistakes
from jaxrl_llm.checking.cases import Arguments, Case, Outcome, weighed_credit
from jaxrl_llm.checking.mutations import Mutation, outcome
from jaxrl_llm.types import Credit

NUMERIC_RTOL = 1e-6  # of gradients by central differences


class Subject(NamedTuple):
    """A method on its cases, ready to be compared with any number of functions; mutated outcomes are computed once."""

    name: str
    fields: dict[str, Any]
    alg: Algorithm
    cases: list[Case]
    inputs: list[Arguments]
    reference: list[Outcome]
    mistakes: Callable[[], list[Mutation]]
    # (mutations, index of the case, stage, gradients) -> outcome; None where the config refuses them or the case lacks something
    mutated: Callable[..., Outcome | None]


def subject(
    name: str,
    fields: dict[str, Any],
    alg: Algorithm,
    cases: list[Case],
    inputs: list[Arguments],
    reference: list[Outcome],
) -> Subject:
    known: dict[tuple[Any, ...], tuple[Outcome | None, Any]] = {}

    @functools.cache
    def weighed(i: int) -> Credit:
        return weighed_credit(alg, cases[i])

    def mutated(applied: tuple[Mutation, ...], i: int, stage: str, gradients: bool = True) -> Outcome | None:
        key = (tuple(map(id, applied)), i, stage, gradients)
        if key not in known:
            try:
                found = outcome(name, fields, cases[i], stage, applied, gradients, functools.partial(weighed, i))
            except (ValueError, KeyError, ArithmeticError):  # refused, or something is not there
                found = None
            known[key] = found, applied  # kept, so that no other mutation gets its id
        return known[key][0]

    @functools.cache
    def listed() -> list[Mutation]:
        return mistakes.mistakes(alg, fields, cases)

    return Subject(name, fields, alg, cases, inputs, reference, listed, mutated)


class Tolerance(NamedTuple):
    """Numbers agree when |theirs - reference| <= atol + rtol |reference|."""

    rtol: float
    atol: float


class Comparison(NamedTuple):
    """A foreign function's results on a subject's cases, with the reference's."""

    subject: Subject
    stage: str  # "loss", or "credit": advantages are compared
    theirs: list[Outcome]
    reference: list[Outcome]
    tolerance: Tolerance


class Cause(NamedTuple):
    """An explanation under which nothing disagrees any more."""

    name: str
    says: str
    scope: str  # "", or the part that alone it explains, the other agreeing anyway
    residual: float  # largest relative difference that remains


def parts(o: Outcome) -> dict[str, np.ndarray]:
    """What is compared: the value, and the gradient of every view."""
    return {"value": o.value, **o.grads}


def close(theirs: Outcome, other: Outcome, part: str, tolerance: Tolerance) -> np.ndarray:
    """Where a part of two outcomes agrees; what is not a number agrees with itself."""
    gradient = part != "value"
    noise = max(theirs.noise, other.noise) if gradient else 0.0
    if noise and not np.isfinite(theirs.value) and not np.isfinite(other.value):
        return np.ones(parts(theirs)[part].shape, bool)  # there are no differences of such values
    rtol = max(tolerance.rtol, NUMERIC_RTOL) if noise else tolerance.rtol
    return np.isclose(parts(theirs)[part], parts(other)[part], rtol, tolerance.atol + noise, equal_nan=True)


def difference(theirs: Outcome, other: Outcome, part: str) -> float:
    """Largest difference of a part, relative to the largest number in it; not a number where one is not finite."""
    a, b = parts(theirs)[part], parts(other)[part]
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):  # inf - inf, where both are infinite
        gap, size = np.max(np.where(same, 0, np.abs(a - b))), np.max(np.abs(b))
        return float(gap / size) if size > 0 else float(gap)


def disagreeing(c: Comparison) -> dict[int, list[str]]:
    """Indices of the cases that disagree, with the parts that do."""
    found = {}
    for i, (a, b) in enumerate(zip(c.theirs, c.reference)):
        wrong = [part for part in parts(a) if not close(a, b, part, c.tolerance).all()]
        if wrong:
            found[i] = wrong
    return found


def explain(c: Comparison) -> list[Cause]:
    """The likely causes, the closest first. Several are indistinguishable on these cases; none means not recognised."""
    wrong = disagreeing(c)
    if not wrong:
        return []
    everything = list(parts(c.theirs[0]))
    bad = [part for part in everything if any(part in found for found in wrong.values())]
    order = [*wrong, *(i for i in range(len(c.theirs)) if i not in wrong)]
    single = c.subject.mistakes()
    found = _explaining(c, [(m,) for m in single], order, everything, "")
    if not found and bad != everything:
        found = _explaining(c, [(m,) for m in single], order, bad, f"in {_named(bad)} only")
    return (
        found
        or _factor(c, everything)
        or _explaining(c, [(m,) for m in mistakes.other_methods(c.subject.name)], order, everything, "")
        or _pairs(c, single, order, everything)
    )


def _named(some: Sequence[str]) -> str:
    return " and ".join("the value" if part == "value" else f"the gradient of {part}" for part in some)


def _explaining(
    c: Comparison, candidates: Iterable[tuple[Mutation, ...]], order: list[int], compared: list[str], scope: str
) -> list[Cause]:
    best: dict[str, Cause] = {}
    for applied in candidates:
        residual = _residual(c, applied, order, compared)
        name = " and ".join(m.cause for m in applied)
        if residual is not None and (name not in best or residual < best[name].residual):
            best[name] = Cause(name, "; ".join(m.says for m in applied), scope, residual)
    return sorted(best.values(), key=lambda cause: cause.residual)


def _residual(c: Comparison, applied: tuple[Mutation, ...], order: list[int], compared: list[str]) -> float | None:
    """What remains of the disagreement under mutations, or None where it remains beyond the tolerance."""
    largest = 0.0
    for i in order:
        if "value" in compared:  # it decides most, and costs least
            alone = c.subject.mutated(applied, i, c.stage, False)
            if alone is None or not close(c.theirs[i], alone, "value", c.tolerance).all():
                return None
        mutated = c.subject.mutated(applied, i, c.stage)
        if mutated is None or not all(close(c.theirs[i], mutated, part, c.tolerance).all() for part in compared):
            return None
        largest = max(largest, *(difference(c.theirs[i], mutated, part) for part in compared))
    return largest


def _factor(c: Comparison, compared: list[str]) -> list[Cause]:
    """One constant factor between all numbers of all cases."""
    value, other = c.theirs[0].value, c.reference[0].value
    at = np.unravel_index(np.argmax(np.abs(other)), other.shape)
    factor = float(value[at] / other[at]) if other[at] != 0 else np.nan
    if not np.isfinite(factor) or factor == 0:
        return []
    scaled = [
        o._replace(value=factor * o.value, grads={n: factor * g for n, g in o.grads.items()}) for o in c.reference
    ]
    if all(close(a, b, part, c.tolerance).all() for a, b in zip(c.theirs, scaled) for part in compared):
        return [Cause("factor", f"every number is {factor:.6g} times the reference's", "", 0.0)]
    return []


_PAIRED = ("sign", "ddof", "eps", "std", "baseline", "clip side", "wrong aggregation", "sum for mean", "mean for sum")


def _pairs(c: Comparison, single: list[Mutation], order: list[int], compared: list[str]) -> list[Cause]:
    """Two causes at once, of the kinds that often come together; found by the value of one case, then verified."""
    some = [m for m in single if m.cause in _PAIRED and not m.terms]
    both = [(a, b) for a, b in itertools.permutations(some, 2) if a.cause < b.cause]
    return _explaining(c, both, order, compared, "")
