"""What `jaxrl_llm check` prints: one line of agreement, or the first disagreement as its reader wants it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxrl_llm.checking import causes
from jaxrl_llm.checking.causes import Cause, Comparison


def agreement(c: Comparison, who: str) -> str:
    """One line: cases, and the largest differences relative to the largest number of an array."""
    value, gradient = _largest(c)
    what = "the advantages" if c.stage == "credit" else "the value"
    more = "" if gradient is None else f", of the gradient {gradient:.2g}"
    return f"{c.subject.name}: {who} agrees in {len(c.theirs)} cases; largest relative difference of {what} {value:.2g}{more}"


def disagreement(c: Comparison, who: str, takes: Sequence[str], found: Sequence[Cause]) -> str:
    """The first disagreement: case, value, the first token of a gradient, inputs there, and the likely cause.

    takes: names of the function's inputs, shown beside the usual ones.
    """
    wrong = causes.disagreeing(c)
    first = next(iter(wrong))
    case, theirs, reference = c.subject.cases[first], c.theirs[first], c.reference[first]
    lines = [
        f"{c.subject.name}: {who} disagrees with the reference in {len(wrong)} of {len(c.theirs)} cases",
        f"  first in case {case.number}: {case.kind.says}",
    ]
    if c.stage == "loss":
        verdict = "" if "value" in wrong[first] else "  (agrees)"
        lines.append(f"  loss: {_two(theirs.value[()], reference.value[()])}{verdict}")
    for part in wrong[first]:
        if part == "value" and c.stage == "loss":
            continue
        b, t = np.argwhere(~causes.close(theirs, reference, part, c.tolerance))[0]
        what = "advantage" if part == "value" else f"gradient of {part}"
        numbers = _two(causes.parts(theirs)[part][b, t], causes.parts(reference)[part][b, t])
        lines.append(f"  {what}, row {b}, token {t}: {numbers}")
        lines.append(f"    inputs there: {_inputs(c.subject.inputs[first].arrays, takes, b, t)}")
    value, gradient = _largest(c)
    more = "" if gradient is None else f", gradient {gradient:.2g}"
    lines.append(f"  largest relative difference over all cases: value {value:.2g}{more}")
    return "\n".join([*lines, *_not_finite(c), *_causes(found)])


def _two(theirs: Any, reference: Any) -> str:
    ratio = f", ratio {theirs / reference:.6g}" if reference != 0 else ""
    return f"yours {theirs:.9g}, reference {reference:.9g}{ratio}"


def _largest(c: Comparison) -> tuple[float, float | None]:
    each = [{part: causes.difference(a, b, part) for part in causes.parts(a)} for a, b in zip(c.theirs, c.reference)]
    gradients = [x for found in each for part, x in found.items() if part != "value"]
    return float(np.max([found["value"] for found in each])), float(np.max(gradients)) if gradients else None


_SHOWN = ("logp", "old_logp", "mask", "reward", "group", "length", "advantage")


def _inputs(arrays: Mapping[str, np.ndarray], takes: Sequence[str], b: int, t: int) -> str:
    """The inputs at a token: the usual ones and those the function takes."""
    texts, shape = [], arrays["mask"].shape
    for name in dict.fromkeys([*_SHOWN, *takes]):
        if name in arrays and arrays[name].shape in (shape, shape[:1]):
            x = arrays[name][(b, t)[: arrays[name].ndim]]
            texts.append(f"{name} {x:.6g}" if arrays[name].dtype.kind == "f" else f"{name} {x}")
    if "logp" in arrays:
        texts.append(f"ratio {np.exp(arrays['logp'][b, t] - arrays['old_logp'][b, t]):.6g}")
    return ", ".join(texts)


def _not_finite(c: Comparison) -> list[str]:
    """Where yours is not finite, and what only those cases have."""
    bad = [i for i, o in enumerate(c.theirs) if not all(np.isfinite(x).all() for x in causes.parts(o).values())]
    if not bad:
        return []
    empty = [i for i, case in enumerate(c.subject.cases) if not case.rows.trained.any(-1).all()]
    reason = (
        ", exactly those with a row without trained tokens (0/0?)" if bad == empty and len(bad) < len(c.theirs) else ""
    )
    return [f"  yours is not finite in {len(bad)} of {len(c.theirs)} cases{reason}"]


def _causes(found: Sequence[Cause]) -> list[str]:
    if not found:
        return ["  cause not recognised: no single known mistake explains every case"]
    lines = [f"{one.name}{f', {one.scope}' if one.scope else ''}: {one.says}" for one in found]
    if len(lines) == 1:
        return [f"  likely cause: {lines[0]}"]
    return [f"  likely cause, one of {len(lines)} that explain every case alike:", *(f"    {line}" for line in lines)]
