"""From gradients to the next parameters, or to none when a number is not finite, and what the host must hear about it."""

import logging
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.training import optim
from jaxrl_llm.training.gradients import Loss
from jaxrl_llm.training.state import POLICY, TrainState
from jaxrl_llm.types import Max, Mean, Metric, Metrics, Params

logger = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """`learner.max_nonfinite` updates in a row were skipped; parameters are those of the last finite update."""


class NoGradientError(RuntimeError):
    """Tokens with a weight and an advantage gave a gradient of exactly zero."""


class Health(NamedTuple):
    """What the host checks of an update."""

    update: Int[Array, ""]  # its number, from 1
    finite: Bool[Array, ""]
    in_row: Int[Array, ""]  # skipped updates up to this one
    bad: dict[str, dict[str, Bool[Array, ""]]]  # what was not finite, by "view", "metric", "loss" and "gradient"
    signal: Bool[Array, ""]  # some token has an advantage and a weight
    moved: Bool[Array, ""]  # some gradient is not 0


def apply(
    optimizers: dict[str, optax.GradientTransformation],
    rates: dict[str, optax.Schedule],
    train: TrainState,
    grads: dict[str, Params],
    loss: Loss,
    on: dict[str, Bool[Array, ""] | Params],
    signal: Bool[Array, ""],
    rate: float | Float[Array, ""] = 1.0,
) -> tuple[TrainState, Metrics, Health]:
    """The next train state. If the loss or any gradient is not finite it is the old one, bitwise, but for its counters.

    on: which trainables to update, or which entries of one (`optim.apply`); the others get no decay and no momentum.
    rate: factor of the policy's learning rate.
    Returns also the metrics of the loss with `loss`, `grad_norm`, `lr` (prefixed by the label for trainables other than the
    policy) and `update/skipped`; a skipped update reports its metrics as means over nothing.
    """
    # The squares are summed for the norm anyway; a sum that overflows would make an update of nothing.
    bad = {
        f"{label}.{jax.tree_util.keystr(path, simple=True, separator='.')}": ~jnp.isfinite(jnp.sum(leaf * leaf))
        for label, tree in grads.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    finite = jnp.isfinite(loss.value) & ~jnp.any(jnp.stack(list(bad.values())))
    one = finite.astype(loss.value.dtype)
    params, opt, count, moved = {}, {}, {}, jnp.zeros((), bool)
    metrics: Metrics = {name: jax.tree.map(lambda x: jnp.where(finite, x, 0), m) for name, m in loss.metrics.items()}
    for label in train.params:
        go = jax.tree.map(partial(jnp.logical_and, finite), on[label])
        factor = jnp.asarray(rate if label == POLICY else 1.0, one.dtype)
        params[label], opt[label] = optim.apply(
            optimizers[label], grads[label], train.opt[label], train.params[label], go, factor
        )
        count[label] = train.count[label] + optim.somewhere(go)
        norm = optax.tree.norm(grads[label])
        moved |= norm > 0
        prefix = "" if label == POLICY else f"{label}/"
        metrics[f"{prefix}grad_norm"] = Mean(jnp.where(finite, norm, 0), one)
        scheduled = jnp.asarray(rates[label](train.count[label]), one.dtype)
        metrics[f"{prefix}lr"] = Mean(scheduled * factor, jnp.ones_like(one))
    metrics["loss"] = Mean(jnp.where(finite, loss.value, 0), one)
    metrics["update/skipped"] = Mean(1 - one, jnp.ones_like(one))
    in_row = jnp.where(finite, 0, train.skipped_in_row + 1)
    skipped = train.skipped + ~finite
    causes = {
        "view": loss.bad,
        "metric": {name: _is_bad(m) for name, m in loss.metrics.items()},
        "loss": {"value": ~jnp.isfinite(loss.value)},
        "gradient": bad,
    }
    health = Health(train.count[POLICY] + train.skipped + 1, finite, in_row, causes, signal, moved)
    return TrainState(params, opt, count, skipped, in_row), metrics, health


def _is_bad(m: Metric) -> Bool[Array, ""]:
    """Not finite, but for the extreme of nothing."""
    if isinstance(m, Mean):
        return ~jnp.isfinite(m.sum)
    return jnp.isnan(m.value) | (m.value == (jnp.inf if isinstance(m, Max) else -jnp.inf))


@dataclass
class Watch:
    """Checks the health of updates on the host, some time after they were dispatched."""

    method: str
    max_nonfinite: int
    seen: list[Health] = field(default_factory=list)
    saw_signal: bool = False

    def check(self) -> None:
        """Look at the updates since the last call; log those that were skipped.

        Raises:
          NonFiniteError: `max_nonfinite` updates in a row were skipped.
          NoGradientError: the first update whose advantages have a weight had a gradient of zero.
        """
        seen, self.seen = jax.device_get(self.seen), []
        for health in seen:
            if not health.finite:
                self._skipped(health)
            elif health.signal and not self.saw_signal:
                self.saw_signal = True
                if not health.moved:
                    raise NoGradientError(
                        f"update {health.update}: tokens have a weight and an advantage, but the gradient of "
                        f"{self.method} is exactly zero"
                    )

    def _skipped(self, health: Health) -> None:
        message = f"update {health.update} skipped ({health.in_row} in a row): {first_bad(health)} is not finite"
        logger.warning(message)
        if health.in_row >= self.max_nonfinite:
            raise NonFiniteError(f"{message}; learner.max_nonfinite={self.max_nonfinite}")


def first_bad(health: Health) -> str:
    """The first thing that was not finite on the way from views to gradients, e.g. "metric ratio/max"."""
    kinds = ("view", "metric", "loss", "gradient")
    return next(f"{kind} {name}" for kind in kinds for name, bad in health.bad[kind].items() if bad)
