"""Seeded cases of a method: rows and views, away from kinks, and the plain arrays a foreign function may ask for by name."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrl_llm.algorithms.base import Algorithm, value_and_grad
from jaxrl_llm.checking import nasty
from jaxrl_llm.types import Credit, Rollouts, Views

KEY = jax.random.key(0)
MARGIN = 2e-6  # nothing has a kink within this distance of a case's views, so central differences are defined
GRID = 64  # rewards are multiples of 1/64: a mean of equal rewards is exact


class Kind(NamedTuple):
    says: str
    spread: float | None  # standard deviation of the log ratios; None: from 0.05 to 2, at most 3
    whole: bool = False  # every token trains


KINDS = (
    Kind("every token trains, log ratios about 0.1", 0.1, whole=True),
    Kind("ragged rows with holes and without tokens, log ratios about 3e-4", 3e-4),
    Kind("ragged rows with holes and without tokens, log ratios about 0.3", 0.3),
    Kind("ragged rows with holes and without tokens, log ratios up to 3", None),
)


class Case(NamedTuple):
    """Inputs of one comparison; numpy arrays, float64."""

    number: int
    kind: Kind
    rows: Rollouts
    views: Views
    credit: Credit | None  # unweighed, of a method that selects what it trains on; else the method gives it


class Outcome(NamedTuple):
    """A loss with its gradients, or advantages without."""

    value: np.ndarray  # [], or advantages [B, T]
    grads: dict[str, np.ndarray]  # by view, [B, T]
    noise: float = 0.0  # absolute error of gradients that were differenced


class Arguments(NamedTuple):
    """What a function may ask for by name."""

    arrays: dict[str, np.ndarray]
    settings: dict[str, Any]  # config and numbers of the state; a parameter with a default of its own keeps that


def of_views(views: Views) -> dict[str, Any]:
    """The views that are there, by name."""
    named = {f.name: getattr(views, f.name) for f in fields(Views) if f.name != "extras"}
    return {name: x for name, x in named.items() if x is not None} | views.extras


def to_views(arrays: Mapping[str, Any]) -> Views:
    return Views(
        **{name: x for name, x in arrays.items() if name in nasty.VIEWS},
        extras={name: x for name, x in arrays.items() if name not in nasty.VIEWS},
    )


def reference(alg: Algorithm, case: Case) -> Outcome:
    """`value_and_grad` of a case."""
    value, grads = value_and_grad(alg, alg.init(), case.rows, case.views, KEY, case.credit)
    return Outcome(np.asarray(value), {name: np.asarray(x) for name, x in of_views(grads).items()})


def draw(
    alg: Algorithm,
    number: int,
    seed: int = 0,
    dtype: str = "float64",
    padding: str = "finite",
    unscored: bool = False,
) -> Case:
    """Case `number` of a seed; the kinds take turns.

    Args:
      dtype: inputs are numbers of this dtype.
      padding: what untrained positions hold: "finite" random numbers, or "nan".
      unscored: some rows have no reward that counts, and one is padding (`scored`, `counted`, `stat` tell).
    """
    kind, own = KINDS[number % len(KINDS)], 1000 * seed + number
    rows = jax.tree.map(lambda x: _rounded(x, dtype), _rows(alg, kind, own, unscored))
    rows, credit = _selected(alg, nasty.poison(rows, np.nan) if padding == "nan" else rows)

    def views(attempt: int) -> Views:
        drawn = nasty.views(own + 100_000 * attempt, rows, alg.needs.loss, kind.spread)
        drawn = jax.tree.map(lambda x: _rounded(x, dtype), drawn)
        return nasty.poison_views(drawn, np.asarray(rows.trained), np.nan) if padding == "nan" else drawn

    case = Case(number, kind, rows, views(0), credit)
    for attempt in range(1, 20):
        again = _kinked(alg, case)[:, None]
        if not again.any():
            break
        pairs = zip(jax.tree.leaves(case.views), jax.tree.leaves(views(attempt)))
        leaves = [np.where(again, new, old) for old, new in pairs]
        case = case._replace(views=jax.tree.unflatten(jax.tree.structure(case.views), leaves))
    return case


def _rows(alg: Algorithm, kind: Kind, seed: int, unscored: bool) -> Rollouts:
    rows = nasty.drawn(seed, alg.needs)
    if not unscored:
        extra = rows.extras.get("extra", np.zeros_like(rows.group))
        rows = rows.with_(scored=np.ones_like(rows.scored), stat=extra == 0)
    if kind.whole:
        mask = np.ones_like(rows.mask) & (rows.stat | rows.scored)[:, None]
        rows = rows.with_(mask=mask, length=mask.sum(-1, dtype=np.int32), truncated=np.zeros_like(rows.truncated))
    dense = np.unique(rows.group, return_inverse=True)[1]
    return rows.with_(reward=np.round(rows.reward * GRID) / GRID, group=dense.astype(np.int32))


def _rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    return x.astype(dtype).astype(np.float64) if x.dtype.kind == "f" else x


def _selected(alg: Algorithm, rows: Rollouts) -> tuple[Rollouts, Credit | None]:
    """What trains, and its credit where a method chooses; one with a memory has seen an earlier batch."""
    if alg.select is None:
        return rows, None
    state, earlier = alg.init(), _rows(alg, KINDS[-1], 77, unscored=False)
    first = alg.select(state, {}, earlier, alg.credit(state, earlier, KEY), KEY)
    chosen = alg.select(state, first.memory, rows, alg.credit(state, rows, KEY), KEY)
    return jax.tree.map(np.asarray, chosen[:2])


def _kinked(alg: Algorithm, case: Case) -> np.ndarray:
    """[B] rows whose gradient is another one `MARGIN` further up or down."""
    here, kinked = reference(alg, case).grads, np.zeros(len(case.rows.group), bool)
    for step in (MARGIN, -MARGIN):
        moved = jax.tree.map(lambda x: x + step, case.views)  # noqa: B023
        there = reference(alg, case._replace(views=moved)).grads
        for name, x in here.items():
            size = np.maximum(np.abs(x), np.abs(there[name]))
            kinked |= (np.abs(there[name] - x) > 1e-3 * size + 1e-12).any(-1)
    return kinked


def weighed_credit(alg: Algorithm, case: Case) -> Credit:
    """The method's credit of a case, with its weights."""
    state = alg.init()
    credit = alg.credit(state, case.rows, KEY) if case.credit is None else case.credit
    return alg.weigh(state, case.rows, credit) if credit.weight is None else credit


def arguments(alg: Algorithm, case: Case) -> Arguments:
    """What functions may ask for: the views, the rows' arrays, the reference's credit and state, the method's config."""
    rows, state, credit = case.rows, alg.init(), weighed_credit(alg, case)
    named = {
        **{name: getattr(rows, name) for name in _ROW_FIELDS},
        **rows.extras,
        **credit.extras,
        "reward": rows.score,
        "reward_parts": rows.reward,
        "mask": rows.trained,
        "counted": rows.counted,
        "advantage": credit.advantage,
        "weight": credit.weight,
        "reg_weight": credit.reg_weight,
        **of_views(case.views),
    }
    arrays = {name: np.asarray(x) for name, x in named.items()}
    settings = (
        {f.name: getattr(alg.config, f.name) for f in fields(alg.config)} | _numbers(state) | _numbers(credit.extras)
    )
    return Arguments(
        {name: x for name, x in arrays.items() if x.ndim},
        {name: value for name, value in settings.items() if np.ndim(arrays.get(name, 0)) == 0},
    )


def _numbers(tree: Any) -> dict[str, Any]:
    """The scalars of a dict of arrays as plain numbers."""
    return {name: np.asarray(x).item() for name, x in tree.items() if np.ndim(x) == 0} if isinstance(tree, dict) else {}


_OFFERED_APART = ("prompt_tokens", "prompt_length", "mask", "reward", "extras")  # renamed, or by context
_ROW_FIELDS = tuple(f.name for f in fields(Rollouts) if f.name not in _OFFERED_APART)
