"""What people get wrong, as mutations of a method: those it has a place for."""

import dataclasses
import functools
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import algorithms
from jaxrl_llm.advantages import group
from jaxrl_llm.algorithms.base import Algorithm, per_token, weigh_by
from jaxrl_llm.checking.cases import KEY, Case, Outcome, of_views, weighed_credit
from jaxrl_llm.checking.mutations import STAGES, Mutation, with_advantage
from jaxrl_llm.objectives import weights
from jaxrl_llm.types import Credit, Rollouts, Views

EPS = (0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
CLIPS = ((0.2, 0.2), (0.2, 0.28), (0.1, 0.1), (0.2, 0.3), (3e-4, 4e-4))  # common (low, high)
OPEN = 1e30  # an upper clip that no ratio reaches


def mistakes(alg: Algorithm, fields: Mapping[str, Any], cases: list[Case]) -> list[Mutation]:
    """Those the method has a place for; what changes nothing there is found out by computing it."""
    found = [*_SIGNS, *_MASKS, *_clips(alg.config), *_aggregations(alg, cases), *_constants(alg), *_numbers(alg.config)]
    if cases[0].credit is None:
        advantage, trained = alg.credit(alg.init(), cases[-1].rows, KEY).advantage, cases[-1].rows.trained
        if _is_group_normalized(alg.config, advantage, cases[-1].rows):
            found += _group_advantages(alg.config)
        elif np.allclose([np.mean(advantage[trained]), np.std(advantage[trained], ddof=1)], [0, 1], atol=1e-6):
            found.append(_WHITENED_WITH_N)
    return [*found, *_settings(alg.config, fields)]


@functools.cache
def other_methods(name: str) -> tuple[Mutation, ...]:
    """Every other method with its defaults; the same objects each time."""
    others = (n for n in algorithms.names() if n != name)
    return tuple(Mutation("another method", f"what `{n}` computes", method=n) for n in others)


# ------------------------------------------------------------------------------------------------------ sign, mask


def _scaled(factor: float) -> Callable[[Outcome], Outcome]:
    return lambda o: Outcome(factor * o.value, {n: factor * g for n, g in o.grads.items()}, o.noise)


_LOSS_SIGN = Mutation("sign", "the opposite sign", result=_scaled(-1.0))
_ADVANTAGE_SIGN = Mutation(
    "sign", "the advantage has the opposite sign", credit=lambda c, rows: with_advantage(c, -c.advantage)
)
_SIGNS = (_LOSS_SIGN, _ADVANTAGE_SIGN)


def _every_token(rows: Rollouts, views: Views) -> Rollouts:
    return rows.with_(mask=jnp.ones_like(rows.mask))


def _without_holes(rows: Rollouts, views: Views) -> Rollouts:
    return rows.with_(mask=jnp.arange(rows.mask.shape[1]) < rows.length[:, None])


_MASKS = tuple(
    Mutation("missing mask", f"{who} {where}", rows=change, stages=stages)
    for change, who in (
        (_every_token, "padding and other untrained tokens count"),
        (_without_holes, "tokens within `length` that the mask leaves out count"),
    )
    for stages, where in ((STAGES, "everywhere"), (("loss",), "in the loss"), (("weigh",), "in the denominators"))
)


# ------------------------------------------------------------------------------------------------------ clip


def _clips(config: Any) -> list[Mutation]:
    names = [f.name for f in dataclasses.fields(config)]
    found = []
    for low in (n for n in names if n.endswith("clip_low")):
        high = low.removesuffix("low") + "high"
        a, b = getattr(config, low), getattr(config, high, None)
        default = tuple(getattr(type(config), n, None) for n in (low, high))
        if a is None or b is None:
            continue
        unclipped = Mutation("clip side", "nothing is clipped", fields={low: 1.0, high: OPEN})
        optimistic = Mutation(
            "clip side",
            "max of the clipped and the unclipped objective, the reference takes min",
            credit=_ADVANTAGE_SIGN.credit,
            result=_scaled(-1.0),
        )
        found += [
            Mutation("clip side", f"`{low}` and `{high}` are swapped", fields={low: b, high: a}),
            Mutation("clip side", f"the lower side (1 - `{low}`) is not clipped", fields={low: 1.0}),
            Mutation("clip side", f"the upper side (1 + `{high}`) is not clipped", fields={high: OPEN}),
            unclipped,
            Mutation("clip side", f"`{low}`={a:g} bounds both sides, the reference has `{high}`={b:g}", {high: a}),
            Mutation("clip side", f"`{high}`={b:g} bounds both sides, the reference has `{low}`={a:g}", {low: b}),
            optimistic,
            Mutation(
                "clip side",
                "the clipped objective alone, without the min with the unclipped one",
                terms=((1.0, ()), (-1.0, (_ADVANTAGE_SIGN,)), (-1.0, (unclipped,))),
            ),
        ]
        found += [
            Mutation(
                "clip width",
                f"`{low}` is {x:g} and `{high}` {y:g}, the reference has {a:g} and {b:g}",
                {low: x, high: y},
            )
            for x, y in dict.fromkeys([*CLIPS, default])
            if None not in (x, y) and (x, y) not in ((a, b), (b, a), (a, a), (b, b))
        ]
    return found


# ------------------------------------------------------------------------------------------------------ aggregation


class _Aggregation(NamedTuple):
    says: str
    sums: bool  # tokens are added, not averaged
    weight: Callable[[jax.Array, Rollouts], jax.Array]  # of the mask and the rows


_AGGREGATIONS = (
    _Aggregation("the mean over tokens", False, lambda m, rows: weights.token_mean(m)),
    _Aggregation("the mean over rows of token means", False, lambda m, rows: weights.seq_mean_token_mean(m)),
    _Aggregation(
        "the mean over all rows, also those without tokens, of token means",
        False,
        lambda m, rows: weights.seq_mean_token_mean(m, True, rows.counted),
    ),
    _Aggregation("the mean over rows of token sums", True, lambda m, rows: weights.seq_mean_token_sum(m)),
    _Aggregation(
        "the mean over all rows, also those without tokens, of token sums",
        True,
        lambda m, rows: weights.seq_mean_token_sum(m, 1.0, True, rows.counted),
    ),
    _Aggregation(
        "the mean over rows of token sums divided by T",
        False,
        lambda m, rows: weights.seq_mean_token_sum(m, m.shape[1]),
    ),
    _Aggregation(
        "the mean over all B x T positions, padding included",
        False,
        lambda m, rows: weights.seq_mean_token_sum(m, m.shape[1], True, rows.counted),
    ),
    _Aggregation("the sum over tokens", True, lambda m, rows: m.astype(float)),
    _Aggregation(
        "the sum over rows of token means", False, lambda m, rows: m / jnp.maximum(m.sum(-1, keepdims=True), 1)
    ),
    _Aggregation("the mean over groups of token means", False, lambda m, rows: weights.mean_over_groups(m, rows.group)),
)


def _aggregations(alg: Algorithm, cases: list[Case]) -> list[Mutation]:
    own = next((a for a in _AGGREGATIONS if all(_aggregates_so(alg, a, case) for case in cases)), None)
    found = []
    for a in _AGGREGATIONS:
        cause = "wrong aggregation"
        if own and own.sums != a.sums:
            cause = "sum for mean" if a.sums else "mean for sum"

        def credit(c: Credit, rows: Rollouts, weight=a.weight) -> Credit:
            return weigh_by(c, weight(c.weight != 0, rows), weight(c.reg_weight != 0, rows))

        of_reference = own.says if own else "weights of its own"
        found.append(Mutation(cause, f"{a.says}, the reference takes {of_reference}", credit=credit))
    return found


def _aggregates_so(alg: Algorithm, a: _Aggregation, case: Case) -> bool:
    weight = weighed_credit(alg, case).weight
    return bool(np.allclose(weight, a.weight(weight != 0, case.rows), rtol=1e-9, atol=0))


# ------------------------------------------------------------------------------------------------------ what is constant


def _constants(alg: Algorithm) -> list[Mutation]:
    """Wrong beliefs about what a gradient flows through, and about which policy is the old one."""

    def current(names: tuple[str, ...]) -> Callable[[Rollouts, Views], Rollouts]:
        def change(rows: Rollouts, views: Views) -> Rollouts:
            now = of_views(views)
            old = {f"old_{n}": now[n] for n in names if f"old_{n}" in rows.extras}
            return rows.with_(extras=old, old_logp=now["logp"] if "logp" in names else rows.old_logp)

        return change

    def zero(names: tuple[str, ...]) -> Callable[[Outcome], Outcome]:
        return lambda o: o._replace(grads={n: 0 * g if n in names else g for n, g in o.grads.items()})

    views = alg.needs.loss
    found = [
        Mutation(
            "stop-gradient",
            "the derivative of the whole value, parts of which the reference holds constant on purpose"
            " (a function that returns its own gradient, (loss, gradient), can do so too)",
            whole=True,
        )
    ]
    for names in dict.fromkeys([*((n,) for n in views), views]):
        these, change = " and ".join(names), current(names)
        found += [
            Mutation(
                "stop-gradient",
                f"no gradient reaches {these}: what the reference differentiates is detached",
                result=zero(names),
            ),
            Mutation(
                "stop-gradient",
                f"the advantage comes from the current {these}, and the gradient flows through it",
                rows=change,
                stages=("credit",),
                whole=True,
            ),
            Mutation("old policy", f"the advantage comes from the current {these}", rows=change, stages=("credit",)),
            Mutation(
                "old policy",
                f"the current {these}, detached, stands for the old one in the loss",
                rows=change,
                stages=("loss",),
            ),
            Mutation(
                "stop-gradient",
                f"the current {these}, not detached, stands for the old one in the loss",
                rows=change,
                stages=("loss",),
                whole=True,
            ),
        ]
    return found


# ------------------------------------------------------------------------------------------------------ advantages


def _is_group_normalized(config: Any, advantage: jax.Array, rows: Rollouts) -> bool:
    """Whether the advantage is (R - group mean) / (group std + eps), with the config's ddof and eps."""
    if not all(hasattr(config, name) for name in ("ddof", "eps", "spread_tol")):
        return False
    plain = group.normalized(rows.score, rows.group, rows.counted, "group", config.ddof, config.eps, config.spread_tol)
    return bool(np.allclose(advantage, per_token(plain, rows), rtol=1e-9, atol=1e-12))


def _whitened_with_n(c: Credit, rows: Rollouts) -> Credit:
    n = jnp.maximum(jnp.sum(rows.trained), 2)
    return with_advantage(c, c.advantage * jnp.sqrt(n / (n - 1)))


_WHITENED_WITH_N = Mutation(
    "ddof",
    "whitening divides the variance by the number of tokens n (ddof=0), the reference by n - 1 (ddof=1)",
    credit=_whitened_with_n,
)


def _group_advantages(config: Any) -> list[Mutation]:
    ddof, eps = config.ddof, config.eps

    def by(rule: Callable[[jax.Array, group.GroupStats, Rollouts], jax.Array]) -> Callable[[Credit, Rollouts], Credit]:
        def credit(c: Credit, rows: Rollouts) -> Credit:
            stats = group.statistics(rows.score, rows.group, rows.counted, ddof, config.spread_tol)
            return with_advantage(c, per_token(rule(rows.score, stats, rows), rows))

        return credit

    def bare(least: float) -> Callable[[jax.Array, group.GroupStats, Rollouts], jax.Array]:
        """The formula without rules for groups of one and groups that agree."""

        def rule(score: jax.Array, s: group.GroupStats, rows: Rollouts) -> jax.Array:
            freedom = s.count - ddof
            std = jnp.where(freedom > 0, s.std, jnp.nan)
            centred = jnp.where(s.flat, 0, score - s.mean)
            return centred / (jnp.where(s.flat & (freedom > 0), 0, std) + least)

        return rule

    def batch(rows: Rollouts) -> group.GroupStats:
        return group.statistics(rows.score, jnp.zeros_like(rows.group), rows.counted, ddof)

    rules = [
        ("std", "the advantage is not divided by the standard deviation", lambda r, s, rows: r - s.mean),
        (
            "std",
            "the advantage is divided by the standard deviation of the whole batch",
            lambda r, s, rows: jnp.where(s.flat, 0, (r - s.mean) / (batch(rows).std + eps)),
        ),
        ("baseline", "no group mean is subtracted", lambda r, s, rows: jnp.where(s.flat, 0, r / (s.std + eps))),
        (
            "baseline",
            "the mean and the standard deviation are those of the whole batch, not of the group",
            lambda r, s, rows: (r - batch(rows).mean) / (batch(rows).std + eps),
        ),
        (
            "baseline",
            "the mean is that of the other rows of the group (leave one out)",
            lambda r, s, rows: jnp.where(
                s.flat, 0, s.count / jnp.maximum(s.count - 1, 1) * (r - s.mean) / (s.std + eps)
            ),
        ),
        (
            "group of one",
            f"the standard deviation of a group of one is not a number with ddof={ddof}; its advantage is 0 in the reference",
            bare(eps),
        ),
        ("eps", "eps is 0, and a group whose rewards agree is 0/0; its advantage is 0 in the reference", bare(0.0)),
    ]
    rules += [
        (
            "eps",
            f"eps is inside the square root, sqrt(var + {e:g}), the reference has std + {eps:g}",
            lambda r, s, rows, e=e: jnp.where(s.flat, 0, (r - s.mean) / jnp.sqrt(s.std**2 + e)),
        )
        for e in EPS[1:]
    ]
    return [Mutation(cause, says, credit=by(rule)) for cause, says, rule in rules]


# ------------------------------------------------------------------------------------------------------ config fields


def _numbers(config: Any) -> list[Mutation]:
    """Other values of `ddof` and of every eps the config has."""
    found = []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.name == "ddof":
            says = {0: "n (ddof=0)", 1: "n - 1 (ddof=1)"}
            found += [
                Mutation("ddof", f"the variance divides by {says[d]}, the reference by {says[value]}", {f.name: d})
                for d in (0, 1)
                if d != value and value in says
            ]
        elif f.name == "eps" or f.name.endswith("_eps"):
            found += [
                Mutation("eps", f"{f.name} is about {e:g}, the reference has {value:g}", {f.name: e})
                for e in EPS
                if e != value
            ]
    return found


_ELSEWHERE = ("aggregation", "count_empty", "max_length", "ddof", "spread_tol")


def _settings(config: Any, fields: Mapping[str, Any]) -> list[Mutation]:
    """Other settings of the method: every choice and flag, terms left out, optional rules left out, the defaults."""
    hints = typing.get_type_hints(type(config))
    found = []
    for f in dataclasses.fields(config):
        value, hint = getattr(config, f.name), hints[f.name]
        if f.name in _ELSEWHERE or "eps" in f.name or f.name.endswith(("clip_low", "clip_high")):
            continue
        others: list[Any] = []
        if typing.get_origin(hint) is typing.Literal:
            others = list(typing.get_args(hint))
        elif isinstance(value, bool):
            others = [not value]
        elif isinstance(value, float):
            others = [0.0, 1.0]
        if type(None) in typing.get_args(hint):
            others.append(None)
        if f.name in fields and f.default is not dataclasses.MISSING:
            others.append(f.default)
        cause = "std" if f.name == "scale" else f.name
        found += [
            Mutation(cause, f"as with `{f.name}={other}`, the reference has `{f.name}={value}`", {f.name: other})
            for other in dict.fromkeys(others)
            if other != value
        ]
    return found
