"""A method with something different: its config, the rows that a stage sees, the credit, or the result."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrl_llm import algorithms
from jaxrl_llm.checking.callables import central_differences
from jaxrl_llm.checking.cases import KEY, Case, Outcome, of_views, to_views
from jaxrl_llm.types import Credit, Rollouts, Views

STAGES = ("credit", "weigh", "loss")


class Mutation(NamedTuple):
    """One thing different from the method."""

    cause: str  # "sign", "ddof", ...
    says: str  # what the foreign function then does
    fields: Mapping[str, Any] = {}  # of the method's config
    rows: Callable[[Rollouts, Views], Rollouts] | None = None
    stages: tuple[str, ...] = STAGES  # those that see the changed rows
    credit: Callable[[Credit, Rollouts], Credit] | None = None  # weighed
    result: Callable[[Outcome], Outcome] | None = None
    # The gradient is the derivative of the value, that of the advantage included, with nothing held constant.
    whole: bool = False
    # A weighted sum of other outcomes, or another method with its defaults, instead of all this.
    terms: tuple[tuple[float, tuple["Mutation", ...]], ...] = ()
    method: str = ""


def outcome(
    name: str,
    fields: Mapping[str, Any],
    case: Case,
    stage: str,
    applied: tuple[Mutation, ...] = (),
    gradients: bool = True,
    weighed: Callable[[], Credit] | None = None,
) -> Outcome:
    """Loss and gradients (stage "loss") or advantages (stage "credit") of a method under mutations, in their order.

    Without `gradients` the loss alone, which is quicker. `weighed` gives the unmutated method's weighed credit, which need not
    be computed again for mutations that come after it.
    Raises ValueError where the mutated config is refused or needs what the case lacks.
    """
    if any(m.terms for m in applied):
        parts = [(f, outcome(name, fields, case, stage, inner, gradients, weighed)) for f, inner in applied[0].terms]
        grads = {v: np.sum([f * part.grads[v] for f, part in parts], axis=0) for v in parts[0][1].grads}
        return Outcome(np.sum([f * part.value for f, part in parts], axis=0), grads)
    for m in applied:
        name, fields = (m.method, {}) if m.method else (name, {**fields, **m.fields})
    alg = algorithms.make(name, **fields)
    lacking = [n for n in (*alg.needs.rescore, *alg.needs.row_extras) if n not in case.rows.extras]
    lacking += [n for n in alg.needs.loss if n not in of_views(case.views)]
    if lacking:
        raise ValueError(f"the case has no {', '.join(lacking)}")
    if alg.select and case.credit is None:
        raise ValueError(f"{name} selects what it trains on")
    state = alg.init()

    def rows_of(at: str, views: Views) -> Rollouts:
        rows = case.rows
        for m in applied:
            rows = m.rows(rows, views) if m.rows and at in m.stages else rows
        return rows

    def credit_of(views: Views) -> Credit:
        rows = rows_of("weigh", views)
        if weighed and not any(m.fields or m.rows or m.method for m in applied):
            credit = weighed()
        else:
            credit = alg.credit(state, rows_of("credit", views), KEY) if case.credit is None else case.credit
            credit = alg.weigh(state, rows, credit) if credit.weight is None else credit
        for m in applied:
            credit = m.credit(credit, rows) if m.credit else credit
        return credit

    def loss(views: Views, credit: Credit, at: Views) -> jax.Array:
        return alg.loss(state, views, rows_of("loss", at), credit)[0]

    if stage == "credit":
        found = Outcome(np.asarray(credit_of(case.views).advantage), {})
    elif not gradients:
        found = Outcome(np.asarray(loss(case.views, credit_of(case.views), case.views)), {})
    elif any(m.whole for m in applied):
        held = credit_of(case.views)

        @jax.jit
        def value_of(arrays: dict[str, Any]) -> jax.Array:
            views = to_views(arrays)
            return loss(views, with_advantage(held, credit_of(views).advantage), views)

        arrays = {n: np.asarray(x) for n, x in of_views(case.views).items()}
        found = Outcome(np.asarray(value_of(arrays)), *central_differences(lambda x: float(value_of(x)), arrays))
    else:
        value, grads = jax.value_and_grad(loss)(case.views, credit_of(case.views), case.views)
        found = Outcome(np.asarray(value), {n: np.asarray(x) for n, x in of_views(grads).items()})
    for m in applied:
        found = m.result(found) if m.result else found
    return found


def with_advantage(credit: Credit, advantage: jax.Array) -> Credit:
    """Credit with another advantage."""
    return dataclasses.replace(credit, advantage=advantage)
