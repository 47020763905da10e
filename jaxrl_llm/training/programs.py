"""The learner's device programs. Layouts and names of views are static; whatever else changes does not recompile."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Sharding
from jaxtyping import Array, Bool

from jaxrl_llm.algorithms.base import Algorithm, keep
from jaxrl_llm.compile_cache import in_place, quickly, well
from jaxrl_llm.config import Importance
from jaxrl_llm.training import gradients, noise, optim, routing, updates
from jaxrl_llm.training.gradients import Model
from jaxrl_llm.training.state import POLICY, TrainState
from jaxrl_llm.types import Credit, Metrics, Params, Rollouts, State, Views, take_rows


class Programs(NamedTuple):
    """Compiled on first use. Small arrays come out replicated, parameters and gradients sharded."""

    score: Any  # gradients.score
    differentiate: Any  # gradients.differentiate
    pull: Any  # gradients.pull
    fused: Any  # gradients.fused
    weigh: Any  # gradients.weigh
    add: Any  # gradients.add
    zeros: Any  # gradients.zeros
    sum: Any  # gradients + gradients
    square: Any  # squared norm of gradients
    noise: Any  # noise.measure
    rate: Any  # Algorithm.rate
    tune: Any  # Algorithm.tune, where the update was finite
    pick: Any  # one of two states
    share: Any  # routing.shared
    take: Any  # a minibatch of rows, credit and views by index
    start: Any  # optimizer states of parameters
    apply: Any  # updates.apply
    copy: Any  # of the policy's parameters


def make(
    model: Model,
    alg: Algorithm,
    importance: Importance,
    optimizers: dict[str, optax.GradientTransformation],
    rates: dict[str, optax.Schedule],
    shapes: dict[str, Params],
    place: TrainState,
) -> Programs:
    """The programs of one run; optimizers, rates and shapes by label, `place` the shardings of its train state."""
    everywhere, params = model.everywhere, place.params
    platform = next(iter(everywhere.device_set)).platform
    quick, main = (partial(jax.jit, compiler_options=options(platform)) for options in (quickly, well))
    small = partial(quick, out_shardings=everywhere)
    pull, fused = partial(gradients.pull, model), partial(gradients.fused, model, alg)
    return Programs(
        score=main(partial(gradients.score, model), static_argnums=(0, 1), donate_argnums=3, out_shardings=everywhere),
        differentiate=small(partial(gradients.differentiate, alg)),
        pull=main(pull, static_argnums=0, donate_argnums=2, out_shardings=params),
        fused=main(fused, static_argnums=(0, 1), donate_argnums=3, out_shardings=(params, everywhere)),
        weigh=small(partial(gradients.weigh, alg, importance)),
        add=small(gradients.add),
        zeros=quick(partial(gradients.zeros, shapes), out_shardings=params),
        sum=quick(partial(jax.tree.map, jnp.add), donate_argnums=0, out_shardings=params),
        square=small(noise.squared_norm),
        noise=small(noise.measure),
        rate=small(alg.rate or keep),
        tune=small(partial(_tuned, alg.tune)),
        pick=small(_pick),
        share=small(routing.shared),
        take=small(_take),
        start=quick(partial(start, optimizers), out_shardings=place.opt),
        apply=jax.jit(
            partial(updates.apply, optimizers, rates),
            donate_argnums=0,
            out_shardings=(place, everywhere, everywhere),
            compiler_options=in_place(platform),
        ),
        copy=quick(partial(jax.tree.map, jnp.copy), out_shardings=params[POLICY]),
    )


def start(optimizers: dict[str, optax.GradientTransformation], params: dict[str, Params]) -> dict[str, Any]:
    """Optimizer states by label."""
    return {label: optim.init(tx, params[label]) for label, tx in optimizers.items()}


def placement(
    optimizers: dict[str, optax.GradientTransformation],
    shapes: dict[str, Params],
    shardings: dict[str, Params],
    everywhere: Sharding,
) -> TrainState:
    """Where a train state lies: moments are sharded like their parameters, counters are everywhere."""

    def place(label: str, opt: Any) -> Any:
        moment, rest = lambda _, sharding: sharding, lambda _: everywhere
        return optax.tree.map_params(optimizers[label], moment, opt, shardings[label], transform_non_params=rest)

    opt = {label: place(label, shape) for label, shape in jax.eval_shape(partial(start, optimizers), shapes).items()}
    count: Any = everywhere
    return TrainState(shardings, opt, count, count, count)


def _take(
    rows: Rollouts, credit: Credit, views: Views | None, index: Array, block: Array
) -> tuple[Rollouts, Credit, Views | None]:
    rows, credit = take_rows(rows, credit, index)
    return rows.with_(block=block), credit, jax.tree.map(lambda v: v[jnp.maximum(index, 0)], views)


def _pick(on: Bool[Array, ""], new: State, old: State) -> State:
    return jax.tree.map(lambda a, b: jnp.where(on, a, b), new, old)


def _tuned(tune: Callable[[State, Metrics], State], state: State, metrics: Metrics, finite: Bool[Array, ""]) -> State:
    return _pick(finite, tune(state, metrics), state)
