"""The device side of a gradient: views of a microbatch, the loss on them, and the two ways back to the parameters.

Pure functions; the learner compiles them. B rows and T completion tokens of a minibatch, b rows of a microbatch.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from jaxtyping import Array, Bool, Float

from jaxrl_llm.algorithms.base import INNER, Algorithm, Inner
from jaxrl_llm.config import Importance
from jaxrl_llm.models import critic as critics
from jaxrl_llm.models import decoder, scorers
from jaxrl_llm.models.spec import ModelSpec
from jaxrl_llm.training import layouts, routing
from jaxrl_llm.training.layouts import Layout, Piece, RowPiece
from jaxrl_llm.training.state import CRITIC, POLICY
from jaxrl_llm.types import (
    CURRENT,
    REPLAY,
    ROUTES,
    Credit,
    Max,
    Metrics,
    Params,
    Rollouts,
    State,
    Views,
    credit_where,
    mean_of,
    merge_metrics,
    take,
)

# A plug-in scorer: (policy parameters, b rows) -> Views of [b, T]; random ones draw from keys in the rows' extras.
PlugIn = Callable[[Params, Rollouts], Views]


class Model(NamedTuple):
    """How views are computed; closed over by the programs.

    everywhere: sharding of small arrays. wide: dtype of views.
    """

    spec: ModelSpec
    dtype: Any
    wide: Any
    temperature: float
    remat: decoder.Remat
    head_chunk: int
    plug_in: PlugIn | None
    everywhere: Sharding
    inner: Inner | None = None


class Loss(NamedTuple):
    """What one evaluation of a loss says; adds over microbatches."""

    value: Float[Array, ""]
    metrics: Metrics
    bad: dict[str, Bool[Array, ""]]  # which views were not finite where they train


def labels(names: tuple[str, ...]) -> tuple[str, ...]:
    """Trainables that provide these views."""
    policy = (POLICY,) if any(name != "values" for name in names) else ()
    return policy + ((CRITIC,) if "values" in names else ())


def get(views: Views, name: str) -> Array:
    """A view by name: a field, or an extra."""
    return views.extras[name] if name in views.extras else getattr(views, name)


def present(views: Views) -> tuple[str, ...]:
    """Names of the views that are there."""
    known = [f.name for f in fields(Views) if f.name != "extras" and getattr(views, f.name) is not None]
    return (*known, *views.extras)


def no_views(model: Model, names: tuple[str, ...], rows: Rollouts) -> Views:
    """Views of zeros, and of no routes."""
    zeros = {name: jnp.zeros(rows.mask.shape, model.wide) for name in names if name != ROUTES}
    return _as_views(zeros | ({ROUTES: routing.empty(model.spec, rows)} if ROUTES in names else {}))


def _as_views(named: dict[str, Array]) -> Views:
    known = {f.name for f in fields(Views)}
    extras = {name: x for name, x in named.items() if name not in known}
    return Views(**{name: x for name, x in named.items() if name in known}, extras=extras)


def score(
    model: Model,
    layout: Layout,
    names: tuple[str, ...],
    params: dict[str, Params],
    out: Views,
    piece: Piece | RowPiece,
    heat: Float[Array, ""],
    rows: Rollouts | None,
) -> Views:
    """`out` with the views of a piece written where they belong; `rows` are read by a plug-in, or for routes to replay."""
    if isinstance(piece, RowPiece):
        assert model.plug_in is not None and rows is not None
        seen = model.plug_in(params[POLICY], take(rows, piece.index))
        slot, own = jnp.where(piece.index < 0, rows.mask.shape[0], piece.index), {n: get(seen, n) for n in names}
        slots = dict.fromkeys(names, slot)
    else:
        own = _causal(model, layout, names, params, piece, heat, rows)
        slots = dict.fromkeys(names, piece.slot.reshape(-1)) | {ROUTES: piece.origin.reshape(-1)}

    def place(old: Array, new: Array, slot: Array) -> Array:
        new = jax.lax.with_sharding_constraint(new.astype(old.dtype), model.everywhere)
        return old.reshape(-1, *new.shape[1:]).at[slot].set(new, mode="drop").reshape(old.shape)

    return _as_views({name: place(get(out, name), own[name], slots[name]) for name in names})


def _causal(
    model: Model,
    layout: Layout,
    names: tuple[str, ...],
    params: dict[str, Params],
    piece: Piece,
    heat: Array,
    rows: Rollouts | None,
) -> dict[str, Array]:
    """Views [n*K] of a piece's completion tokens by the decoder and the critic, and routes [n*S, M, k] of its places."""
    hidden = partial(layouts.hidden, layout=layout, piece=piece, dtype=model.dtype, remat=model.remat)
    own: dict[str, Array] = {}

    def said(states: Array, names: list[str]) -> dict[str, Array]:
        return scorers.token_views(
            states.reshape(-1, states.shape[-1]),
            decoder.unembed(model.spec, params[POLICY]),
            piece.target.reshape(-1),
            names,
            model.temperature,
            heat,
            model.head_chunk,
        )

    if POLICY in labels(names):
        layer = model.inner.layer if model.inner else None
        states, beside = hidden(model.spec, params[POLICY], replay=routing.replayed(rows, piece), inner=layer)
        if INNER in names and beside.inner is not None and model.inner:
            inside = beside.inner
            if model.inner.norm:
                inside = decoder.final_norm(model.spec, params[POLICY], inside)
            own[INNER] = said(inside, ["logp"])["logp"]
        if outer := [name for name in names if name not in ("values", ROUTES, INNER)]:
            own |= said(states, outer)
        if beside.routes is not None and ROUTES in names:
            own[ROUTES] = beside.routes.reshape(-1, *beside.routes.shape[2:])
    if "values" in names:
        states, _ = hidden(critics.trunk(model.spec), params[CRITIC])
        own["values"] = critics.values(params[CRITIC], states).reshape(-1)
    return own


def evaluate(alg: Algorithm, state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[Array, Loss]:
    """The loss; whatever the method does, prompts, padding and tool output get no gradient."""
    trained = rows.trained
    views = jax.tree.map(lambda v: jnp.where(trained, v, jax.lax.stop_gradient(v)), views)
    value, metrics = alg.loss(state, views, rows, credit)
    bad = {name: jnp.any(trained & ~jnp.isfinite(get(views, name))) for name in present(views)}
    return value, Loss(value, metrics, bad)


def differentiate(alg: Algorithm, state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[Loss, Views]:
    """Joint route, first half: the loss of the whole minibatch and its gradient with respect to the views."""

    def objective(views: Views) -> tuple[Array, Loss]:
        return evaluate(alg, state, views, rows, credit)

    (_, loss), cotangents = jax.value_and_grad(objective, has_aux=True)(views)
    return loss, cotangents


def pull(
    model: Model,
    layout: Layout,
    params: dict[str, Params],
    grads: dict[str, Params],
    piece: Piece | RowPiece,
    cotangents: Views,
    heat: Float[Array, ""],
    rows: Rollouts | None,
) -> dict[str, Params]:
    """Joint route, second half: `grads` plus a piece's share of the cotangents pulled back through the model."""
    empty = jax.tree.map(jnp.zeros_like, cotangents)
    _, back = jax.vjp(lambda p: score(model, layout, present(cotangents), p, empty, piece, heat, rows), params)
    return jax.tree.map(jnp.add, grads, back(cotangents)[0])


def fused(
    model: Model,
    alg: Algorithm,
    layout: Layout,
    names: tuple[str, ...],
    params: dict[str, Params],
    grads: dict[str, Params],
    piece: Piece | RowPiece,
    state: State,
    rows: Rollouts,
    credit: Credit,
    heat: Float[Array, ""],
) -> tuple[dict[str, Params], Loss]:
    """Fused route: `grads` plus the gradient of loss∘views on the rows of a piece, and what the loss says of them."""
    empty = no_views(model, names, rows)
    own_rows, own_credit = restrict(rows, credit, piece.rows)

    def objective(params: dict[str, Params]) -> tuple[Array, Loss]:
        views = score(model, layout, names, params, empty, piece, heat, rows)
        return evaluate(alg, state, views, own_rows, own_credit)

    (_, loss), own = jax.value_and_grad(objective, has_aux=True)(params)
    return jax.tree.map(jnp.add, grads, own), loss


def restrict(rows: Rollouts, credit: Credit, on: Bool[Array, "B"]) -> tuple[Rollouts, Credit]:
    """Rows that are not `on` train nothing, are in no statistic, and have no credit."""
    rows = rows.with_(mask=rows.mask & on[:, None], stat=rows.stat & on, scored=rows.scored & on)
    return rows, credit_where(on, credit)


def add(a: Loss, b: Loss) -> Loss:
    """The loss of two pieces together."""
    return Loss(a.value + b.value, merge_metrics(a.metrics, b.metrics), {k: a.bad[k] | b.bad[k] for k in a.bad})


def weigh(
    alg: Algorithm, importance: Importance, state: State, rows: Rollouts, credit: Credit
) -> tuple[Credit, Metrics, Bool[Array, ""]]:
    """Credit with aggregation and importance weights, metrics of the latter, whether any token has a signal."""
    if credit.weight is None:
        credit = alg.weigh(state, rows, credit)
    credit, metrics = importance_weighted(importance, rows, credit)
    return credit, metrics, jnp.any(rows.trained & (credit.weight != 0) & (credit.advantage != 0))


def importance_weighted(importance: Importance, rows: Rollouts, credit: Credit) -> tuple[Credit, Metrics]:
    """Multiply w = exp(old_logp - sampler_logp) into the policy weight of tokens that this run's policies sampled.

    truncate: min(w, cap), as in truncated importance sampling (Ionides 2008). mask: 0 outside [1/cap, cap]. The weights
    correct for whatever the sampler did differently from the learner, truncated sampling included.
    """
    if importance.mode == "none":
        return credit, {}
    sampled = rows.trained & ((rows.source == CURRENT) | (rows.source == REPLAY))[:, None]
    w = jnp.exp(jnp.where(sampled, rows.old_logp - rows.sampler_logp, 0))
    if importance.mode == "truncate":
        used = jnp.minimum(w, importance.cap)
    else:
        used = jnp.where((w >= 1 / importance.cap) & (w <= importance.cap), w, 0)
    metrics: Metrics = {
        "sampling/importance_mean": mean_of(used, sampled),
        "sampling/importance_max": Max(jnp.max(jnp.where(sampled, w, 0))),
        "sampling/importance_clipped": mean_of(used != w, sampled),
    }
    return replace(credit, weight=jnp.where(sampled, credit.weight * used, credit.weight)), metrics


def zeros(shapes: Params) -> Params:
    """Gradients of nothing, in at least float32."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), shapes)
