"""`jaxrl_llm check`: a foreign loss against the reference on seeded cases, and the cases as a file for other languages."""

import dataclasses
import json
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrl_llm import algorithms
from jaxrl_llm.checking import callables, causes, mutations, report
from jaxrl_llm.checking import cases as drawing
from jaxrl_llm.checking.callables import Foreign
from jaxrl_llm.checking.cases import Case, Outcome
from jaxrl_llm.checking.causes import Comparison, Subject, Tolerance

TOLERANCES = {"float64": Tolerance(1e-7, 1e-9), "float32": Tolerance(1e-4, 1e-6)}
UNSCORED = ("scored", "counted", "stat")  # a function that takes one of these is shown rows that do not count


def run(
    name: str,
    fields: dict[str, Any],
    against: str | None = None,
    export: str | None = None,
    framework: str = "auto",
    count: int = 8,
    seed: int = 0,
    dtype: str = "float64",
    padding: str = "finite",
    rtol: float | None = None,
    atol: float | None = None,
) -> tuple[str, int]:
    """Compare, export, or both.

    Args:
      name, fields: the method and its config.
      against: MODULE:FUNCTION.
      export: path of an .npz file to write.
      framework: "auto", "numpy", "jax" or "torch".
      count: number of cases.
      dtype: of the arrays the function is given; the reference computes in float64 on the same numbers.
      padding: what untrained positions hold, "finite" or "nan".
    Returns: what to print, and the exit code: 1 on disagreement.
    Raises ValueError of one line.
    """
    if not (against or export):
        raise ValueError("nothing to do, expected --against MODULE:FUNCTION, --export FILE.npz, or both")
    if count < 1:
        raise ValueError(f"--cases {count}: expected at least 1")
    tolerance = TOLERANCES[dtype]._replace(**{k: v for k, v in {"rtol": rtol, "atol": atol}.items() if v is not None})
    lines, code = [], 0
    with jax.enable_x64(True):
        function = callables.load(against) if against else None
        asked = callables.parameters(function) if function else {}
        subject = prepare(name, fields, count, seed, dtype, padding, unscored=not asked.keys().isdisjoint(UNSCORED))
        if against and function:
            compared, foreign = compare(subject, function, against, framework, dtype, tolerance)
            who = f"{against} ({foreign.framework}, {dtype})"
            code = int(bool(causes.disagreeing(compared)))
            if code:
                lines.append(report.disagreement(compared, who, foreign.takes, causes.explain(compared)))
            else:
                lines.append(report.agreement(compared, who))
        if export:
            about = {"seed": seed, "dtype": dtype, "padding": padding, "tolerance": tolerance._asdict()}
            write(Path(export), subject, about)
            lines.append(f"wrote {count} cases to {export}")
    return "\n".join(lines), code


def prepare(
    name: str,
    fields: dict[str, Any],
    count: int = 8,
    seed: int = 0,
    dtype: str = "float64",
    padding: str = "finite",
    unscored: bool = False,
) -> Subject:
    """A method on seeded cases; in float64 (`jax.enable_x64`), as everything here. Arguments as in `cases.draw`."""
    alg = algorithms.make(name, **fields)
    cases = [drawing.draw(alg, i, seed, dtype, padding, unscored) for i in range(count)]
    inputs = [drawing.arguments(alg, case) for case in cases]
    return causes.subject(name, fields, alg, cases, inputs, [drawing.reference(alg, case) for case in cases])


def compare(
    subject: Subject,
    function: Callable[..., Any],
    name: str,
    framework: str = "auto",
    dtype: str = "float64",
    tolerance: Tolerance | None = None,
) -> tuple[Comparison, Foreign]:
    """A function's results on all cases beside the reference's; and the function with its framework, found out when "auto".

    name: of the function, for errors. Raises ValueError of one line for what it asks, raises or returns.
    """
    foreign = callables.matched(name, function, subject.inputs[0], "" if framework == "auto" else framework)
    theirs, views = [], list(drawing.of_views(subject.cases[0].views))
    for given in subject.inputs:
        found, framework = callables.call(foreign, given, views, dtype)
        foreign = foreign._replace(framework=framework)
        theirs.append(found)
    stage, reference = "loss", subject.reference
    if theirs[0].value.ndim:
        stage = "credit"
        theirs = [_per_token(found, case) for found, case in zip(theirs, subject.cases)]
        reference = [mutations.outcome(subject.name, subject.fields, case, stage) for case in subject.cases]
    return Comparison(subject, stage, theirs, reference, tolerance or TOLERANCES[dtype]), foreign


def _per_token(found: Outcome, case: Case) -> Outcome:
    """Advantages on every trained token, 0 elsewhere."""
    value = found.value[:, None] if found.value.ndim == 1 else found.value
    return found._replace(value=np.where(case.rows.trained, value, 0))


def write(path: Path, subject: Subject, about: dict[str, Any]) -> None:
    """Inputs, losses and gradients as `<case>/input/<name>`, `<case>/loss` and `<case>/grad/<view>`; `meta` is JSON text."""
    cases, inputs = subject.cases, subject.inputs
    meta = {
        "method": subject.name,
        "config": dataclasses.asdict(subject.alg.config),
        "cases": [{"kind": case.kind.says, "settings": given.settings} for case, given in zip(cases, inputs)],
        "differentiable": list(subject.reference[0].grads),
        **about,
        "versions": {**{p: version(p) for p in ("jaxrl_llm", "jax", "numpy")}, "python": platform.python_version()},
    }
    arrays: dict[str, Any] = {"meta": np.array(json.dumps(meta))}
    for case, given, found in zip(cases, inputs, subject.reference):
        arrays |= {f"{case.number}/input/{n}": x for n, x in given.arrays.items()}
        arrays |= {f"{case.number}/grad/{n}": g for n, g in found.grads.items()}
        arrays[f"{case.number}/loss"] = found.value
    with path.open("wb") as file:  # np.savez would add .npz to a name without it
        np.savez_compressed(file, **arrays)
