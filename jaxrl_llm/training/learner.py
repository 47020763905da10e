"""From a batch of rollouts to a gradient, and from a gradient to the next parameters.

The gradient never depends on how a minibatch is split. The *joint* route computes the views of the whole minibatch without
gradient, differentiates the loss on those small arrays, and pulls the cotangents back through the model, one microbatch
after another: exact for every loss, and the model's programs contain no algorithm. The *fused* route differentiates
loss∘views on each microbatch and adds up: the same gradient when the loss couples nothing across microbatches, and one
forward less.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

from jaxrl_llm.algorithms.base import Algorithm, Key, Report, keep
from jaxrl_llm.config import Config, Importance
from jaxrl_llm.models import critic as critics
from jaxrl_llm.models import decoder, scorers
from jaxrl_llm.models.spec import ModelSpec
from jaxrl_llm.sharding import rules
from jaxrl_llm.training import layouts, optim
from jaxrl_llm.training.layouts import HostRows, Layout, Piece
from jaxrl_llm.training.minibatches import minibatches
from jaxrl_llm.training.state import CRITIC, POLICY, TrainState
from jaxrl_llm.types import (
    CURRENT,
    REPLAY,
    Credit,
    Max,
    Mean,
    Metric,
    Metrics,
    Params,
    Rollouts,
    State,
    Views,
    mean_of,
    merge_metrics,
    metric_value,
    take_rows,
)

logger = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """`learner.max_nonfinite` updates in a row were skipped; parameters are those of the last finite update."""


class NoGradientError(RuntimeError):
    """Tokens with a weight and an advantage gave a gradient of exactly zero."""


class Loss(NamedTuple):
    """What one evaluation of a loss says; adds over microbatches."""

    value: Float[Array, ""]
    metrics: Metrics
    bad: dict[str, Bool[Array, ""]]  # which views were not finite where they train


class Health(NamedTuple):
    """What the host checks after an update."""

    update: Array
    finite: Bool[Array, ""]
    in_row: Array  # skipped updates in a row
    bad: dict[str, dict[str, Bool[Array, ""]]]  # by "view", "metric", "gradient": what was not finite
    signal: Bool[Array, ""]  # some token has an advantage and a weight
    moved: Bool[Array, ""]  # some gradient is not 0


class Learner:
    """Owns `train` and the compiled programs that change it.

    Rows, credit and algorithm state are small and replicated; parameters follow the sharding rules; microbatches are
    split over (dp, fsdp).
    """

    train: TrainState
    version: int  # optimizer steps taken since the run began, skipped ones included

    def __init__(self, config: Config, spec: ModelSpec, alg: Algorithm, mesh: Mesh):
        """Raises ValueError when the config contradicts the method: a fused route for a loss that couples the minibatch,
        importance weights for a loss that has no place for them, a reference policy that is needed and not kept.
        """
        settings = config.learner
        if settings.route == "fused" and alg.couples == "minibatch":
            raise ValueError(
                f"learner.route=fused: the loss of {alg.name} couples the minibatch, expected auto or joint"
            )
        if settings.importance.mode != "none" and not alg.needs.importance:
            raise ValueError(
                f"learner.importance.mode={settings.importance.mode}: the loss of {alg.name} has no place for "
                "importance weights, expected none"
            )
        self.config, self.spec, self.alg, self.mesh = config, spec, alg, mesh
        self.dtype = jnp.dtype(config.model.dtype)
        self.wide = jnp.promote_types(self.dtype, jnp.float32)  # of views, losses and metrics
        self.temperature = config.rollout.temperature or 1.0
        self.labels = (POLICY, CRITIC) if alg.needs.critic else (POLICY,)
        self.group_size = alg.plan(alg.init()).group_size or config.rollout.group_size
        self.shards = int(np.prod([mesh.shape[axis] for axis in rules.RULES["batch"]]))
        self._everywhere = NamedSharding(mesh, PartitionSpec())
        self._split = Piece(*(rules.batch_sharding(mesh),) * 6, rows=self._everywhere)
        param_dtype = jnp.dtype(config.model.param_dtype)
        shapes = {POLICY: decoder.abstract(spec, param_dtype)}
        axes = {POLICY: decoder.logical_axes(spec)}
        if alg.needs.critic:
            shapes[CRITIC] = jax.eval_shape(lambda key: critics.init(spec, key, param_dtype), jax.random.key(0))
            axes[CRITIC] = critics.logical_axes(spec)
        self.shapes, self.shardings = shapes, rules.shardings(axes, shapes, mesh)
        total = config.run.steps * settings.epochs * settings.minibatches
        optimizers = {POLICY: config.optimizer, CRITIC: config.critic or config.optimizer}
        self._tx = {label: optim.make(optimizers[label], total) for label in self.labels}
        self._rate = {label: optim.schedule(optimizers[label], total) for label in self.labels}
        self._compile()
        self._health: list[Health] = []
        self._saw_signal = False

    def init(self, policy: Params, critic: Params | None = None) -> None:
        """Begin from these parameters; they are the learner's from here on, as updates donate them.

        critic: None makes one from the policy's decoder, with a head of zeros.
        """
        params = {POLICY: policy}
        if self.alg.needs.critic:
            if critic is None:
                seed, dtype = jax.random.key(self.config.run.seed), jnp.dtype(self.config.model.param_dtype)
                critic = jax.jit(partial(critics.init, self.spec, dtype=dtype))(seed, policy=policy)
            params[CRITIC] = critic
        zero = partial(jnp.zeros, (), jnp.int32)
        counts = {label: zero() for label in params}
        params = jax.device_put(params, self.shardings)
        self.load(TrainState(params, self._init_optimizers(params), counts, zero(), zero()))
        if self.config.reference.mode != "none":
            self.sync_reference()

    def load(self, train: TrainState) -> None:
        """Go on from this state, on this learner's mesh."""
        opt = jax.eval_shape(self._new_optimizers, self.shapes)
        placed = TrainState(self.shardings, self._opt_shardings(opt), *(self._everywhere,) * 3)
        reference, train = train.reference, replace(train, reference=None)
        train = jax.device_put(train, placed)
        if reference is not None:
            reference = jax.device_put(reference, self._reference_shardings())
        self.train = replace(train, reference=reference)
        self.version = int(train.count[POLICY]) + int(train.skipped)

    @property
    def parameters(self) -> int:
        """Parameters of the policy."""
        return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(self.shapes[POLICY]))

    def numbers(self, report: Report) -> dict[str, float]:
        """What an update measured, as numbers for people; checks the health of the updates it reports."""
        self._check()
        return {name: metric_value(m) for name, m in jax.device_get(report.metrics).items()}

    # ------------------------------------------------------------------------------------------------ the three verbs

    def views(
        self,
        rows: Rollouts,
        names: tuple[str, ...],
        policy: str = "policy",
        temperature: Float[Array, ""] | None = None,
    ) -> Views:
        """What a policy says about every completion token of `rows`, without gradient; 0 behind a completion's end.

        Args:
          names: of "logp", "entropy", "logsumexp", "tempered_logp", and "values" of the critic.
          policy: "policy" (the trained trees as they are now) or "ref".
          temperature: of "tempered_logp".
        Raises ValueError for a policy that is not kept, or "tempered_logp" without its temperature.
        """
        if policy not in ("policy", "ref"):
            raise ValueError(f"policy={policy!r}: expected 'policy' or 'ref'")
        if policy == "ref" and self.train.reference is None:
            raise ValueError("reference.mode=none: views of the reference are asked for, expected resident or host")
        if "tempered_logp" in names and temperature is None:
            raise ValueError("views: 'tempered_logp' needs a temperature")
        layout = self._layout(rows, -(-len(rows.tokens) // self.config.learner.minibatches))
        pieces, _ = self._arrange(layout, layouts.host_rows(rows))
        with jax.set_mesh(self.mesh):
            params = self.train.params
            if policy == "ref":
                params = {POLICY: jax.device_put(self.train.reference, self.shardings[POLICY])}
            return self._views(params, layout, pieces, rows.tokens.shape, names, self._heat(temperature))

    def step(
        self,
        state: State,
        rows: Rollouts,
        credit: Credit,
        *,
        active: Mapping[str, bool] | None = None,
        current: Views | None = None,
    ) -> tuple[State, Metrics]:
        """One optimizer step on one minibatch; the metrics stay on the device.

        Args:
          credit: weighed by the method unless it has weights.
          active: labels of trainables to update; all by default. An inactive tree gets no decay and no momentum.
          current: views of these rows at the present parameters, when known: saves the joint route its first forward.
        """
        return self._step(state, layouts.host_rows(rows), rows, credit, active, current)

    def update(
        self,
        state: State,
        rows: Rollouts,
        credit: Credit,
        key: Key,
        *,
        active: Mapping[str, bool] | None = None,
        current: Views | None = None,
    ) -> tuple[State, Report]:
        """All optimizer steps on a batch: `epochs` passes over `minibatches` of fresh permutations, or the method's own.

        `active` and `current` (views of the whole batch) are as in `step`; a method's own update ignores them.

        Returns: the method's state, and the metrics on the host.
        Raises:
          NonFiniteError: too many updates in a row were not finite.
          NoGradientError: the first update with a signal had a gradient of zero.
        """
        if self.alg.update is not None:
            state, report = self.alg.update(self, state, rows, credit, key)
        else:
            settings, host = self.config.learner, layouts.host_rows(rows)
            rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
            batch = jax.device_put((rows, credit, current), self._everywhere)
            steps: list[Metrics] = []
            for _ in range(settings.epochs):
                for part in minibatches(rows, settings.minibatches, rng, settings.layout == "shared"):
                    some = host.take(part.index, part.block)
                    some_rows, some_credit, views = self._take(*batch, part.index, part.block)
                    state, metrics = self._step(state, some, some_rows, some_credit, active, views)
                    batch = (*batch[:2], None)  # the parameters have moved: the views are no longer current
                    steps.append(metrics)
            steps = jax.device_get(steps)
            report = Report(reduce(merge_metrics, steps), steps[-1], len(steps), tuple(steps))
        self._check()
        return state, report

    def sync_reference(self) -> None:
        """Copy the policy into the frozen reference, on the devices or in host memory as `reference.mode` says."""
        copy = jax.jit(partial(jax.tree.map, jnp.copy), out_shardings=self.shardings[POLICY])(self.train.params[POLICY])
        self.train = replace(self.train, reference=jax.device_put(copy, self._reference_shardings()))

    # --------------------------------------------------------------------------------------------------- on the host

    def _layout(self, rows: Rollouts, at_once: int) -> Layout:
        settings = self.config.learner
        return layouts.choose(
            settings.layout,
            rows=at_once,
            microbatch_rows=settings.microbatch_rows,
            context=rows.prompt_tokens.shape[1],
            completion=rows.tokens.shape[1],
            group_size=self.group_size,
            shards=self.shards,
        )

    def _arrange(self, layout: Layout, host: HostRows) -> tuple[list[Piece], np.ndarray]:
        """`layouts.arrange` with the pieces on the devices."""
        pieces, piece_of = layouts.arrange(layout, host)
        return jax.device_put(pieces, [self._split] * len(pieces)), piece_of

    def _heat(self, temperature: Any) -> Array:
        """A temperature as a replicated array, so that its value never recompiles; unused where it is None."""
        return jax.device_put(jnp.asarray(1.0 if temperature is None else temperature, jnp.float32), self._everywhere)

    def _step(
        self,
        state: State,
        host: HostRows,
        rows: Rollouts,
        credit: Credit,
        active: Mapping[str, bool] | None,
        current: Views | None,
    ) -> tuple[State, Metrics]:
        layout = self._layout(rows, len(host.tokens))
        pieces, piece_of = self._arrange(layout, host)
        names, train = self.alg.needs.loss, self.train
        heat = self._heat(self.alg.plan(state).score_temperature if "tempered_logp" in names else None)
        on = {label: active is None or active[label] for label in train.params}
        with jax.set_mesh(self.mesh):
            state, rows, credit, on = jax.device_put((state, rows, credit, on), self._everywhere)
            credit, sampling, signal = self._weigh(state, rows, credit)
            grads, loss = self._zeros(), None
            if self._fuses(piece_of, host.block):
                for piece in pieces:
                    grads, part = self._fused_piece(layout, train.params, grads, state, piece, rows, credit, heat)
                    loss = part if loss is None else self._add(loss, part)
            else:
                if current is None:
                    current = self._views(train.params, layout, pieces, host.tokens.shape, names, heat)
                loss, cotangents = self._loss_and_cotangents(state, current, rows, credit)
                for piece in pieces:
                    grads = self._pull(layout, train.params, grads, piece, cotangents, heat)
            moved, metrics, health = self._apply(replace(train, reference=None), grads, loss, on, signal)
            self.train = replace(moved, reference=train.reference)
            metrics |= sampling
            if self.alg.tune is not keep:
                state = self._tune(state, metrics, health.finite)
        self._health.append(health)
        self.version += 1
        return state, metrics

    def _fuses(self, piece_of: np.ndarray, block: np.ndarray) -> bool:
        """Whether this minibatch takes the fused route: the loss must not couple rows of different pieces."""
        route, couples = self.config.learner.route, self.alg.couples
        split = len(np.unique(np.stack([block, piece_of]), axis=1).T) > len(np.unique(block))
        exact = piece_of.max() == 0 or couples == "row" or (couples == "block" and not split)
        if route == "fused" and not exact:
            raise ValueError(
                f"learner.route=fused: these microbatches split the blocks of {self.alg.name}, expected auto or joint"
            )
        return exact and route != "joint"

    def _views(
        self,
        params: dict[str, Params],
        layout: Layout,
        pieces: list[Piece],
        shape: tuple[int, ...],
        names: tuple[str, ...],
        heat: Array,
    ) -> Views:
        out = jax.device_put(_no_views(names, shape, self.wide), self._everywhere)
        for piece in pieces:
            out = self._score_piece(layout, names, {k: params[k] for k in _labels(names)}, out, piece, heat)
        return out

    def _check(self) -> None:
        """Read the health of the updates since the last call; report what was skipped, raise what must stop a run."""
        health, self._health = jax.device_get(self._health), []
        for h in health:
            if not h.finite:
                first = next((f"{kind} {name}" for kind in h.bad for name, bad in h.bad[kind].items() if bad), "loss")
                message = f"update {h.update} skipped ({h.in_row} in a row): {first} is not finite"
                logger.warning(message)
                if h.in_row >= self.config.learner.max_nonfinite:
                    raise NonFiniteError(f"{message}; learner.max_nonfinite={self.config.learner.max_nonfinite}")
            elif h.signal and not self._saw_signal:
                self._saw_signal = True
                if not h.moved:
                    raise NoGradientError(
                        f"update {h.update}: tokens with a weight and a non-zero advantage, but the gradient of "
                        f"{self.alg.name} is exactly zero"
                    )

    # ------------------------------------------------------------------------------------------------- on the devices

    def _compile(self) -> None:
        """The device programs. Layouts and names of views are static; whatever else changes does not recompile."""
        here, grads = self._everywhere, self.shardings
        opt = self._opt_shardings(jax.eval_shape(self._new_optimizers, self.shapes))
        train = TrainState(grads, opt, *(here,) * 3)
        self._score_piece = jax.jit(self._score, static_argnums=(0, 1), donate_argnums=3, out_shardings=here)
        self._pull = jax.jit(self._pull_back, static_argnums=0, donate_argnums=2, out_shardings=grads)
        self._fused_piece = jax.jit(
            self._fused_gradient, static_argnums=0, donate_argnums=2, out_shardings=(grads, here)
        )
        self._loss_and_cotangents = jax.jit(self._differentiate, out_shardings=here)
        self._weigh = jax.jit(self._weighed, out_shardings=here)
        self._take = jax.jit(_take, out_shardings=here)
        self._add = jax.jit(_add_losses, out_shardings=here)
        self._zeros = jax.jit(partial(_zeros, self.shapes), out_shardings=grads)
        self._init_optimizers = jax.jit(self._new_optimizers, out_shardings=opt)
        self._apply = jax.jit(self._update_parameters, donate_argnums=0, out_shardings=(train, here, here))
        self._tune = jax.jit(self._tuned, out_shardings=here)

    def _model_views(
        self,
        layout: Layout,
        names: tuple[str, ...],
        params: dict[str, Params],
        out: Views,
        piece: Piece,
        heat: Array,
    ) -> Views:
        """`out` with the views of the piece's rows written into it."""
        run = partial(layouts.hidden, layout=layout, piece=piece, dtype=self.dtype, remat=self.config.model.remat)
        flat: dict[str, Array] = {}
        if POLICY in _labels(names):
            hidden = run(self.spec, params[POLICY])
            flat = scorers.token_views(
                hidden.reshape(-1, hidden.shape[-1]),
                decoder.unembed(self.spec, params[POLICY]),
                piece.target.reshape(-1),
                [name for name in names if name != "values"],
                self.temperature,
                heat,
                self.config.model.head_chunk,
            )
        if "values" in names:
            flat["values"] = critics.values(params[CRITIC], run(critics.trunk(self.spec), params[CRITIC])).reshape(-1)

        def place(old: Array, new: Array) -> Array:
            new = jax.lax.with_sharding_constraint(new.astype(old.dtype), self._everywhere)
            return old.reshape(-1).at[piece.slot.reshape(-1)].set(new, mode="drop").reshape(old.shape)

        return replace(out, **{name: place(getattr(out, name), flat[name]) for name in names})

    def _score(self, layout, names, params, out: Views, piece: Piece, heat: Array) -> Views:
        return self._model_views(layout, names, params, out, piece, heat)

    def _pull_back(self, layout, params, grads, piece: Piece, cotangents: Views, heat: Array) -> dict[str, Params]:
        """`grads` plus the piece's share of the pulled back cotangents."""
        names, empty = self.alg.needs.loss, jax.tree.map(jnp.zeros_like, cotangents)
        _, pull = jax.vjp(lambda p: self._model_views(layout, names, p, empty, piece, heat), params)
        return jax.tree.map(jnp.add, grads, pull(cotangents)[0])

    def _fused_gradient(self, layout, params, grads, state, piece: Piece, rows: Rollouts, credit: Credit, heat: Array):
        """`grads` plus the gradient of loss∘views on the piece's rows, and what their loss says."""
        names = self.alg.needs.loss
        empty = _no_views(names, rows.mask.shape, self.wide)
        rows, credit = _restrict(rows, credit, piece.rows)

        def objective(p: dict[str, Params]) -> tuple[Array, Loss]:
            return self._loss(state, self._model_views(layout, names, p, empty, piece, heat), rows, credit)

        (_, loss), own = jax.value_and_grad(objective, has_aux=True)(params)
        return jax.tree.map(jnp.add, grads, own), loss

    def _differentiate(self, state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[Loss, Views]:
        """The loss of the whole minibatch and its gradient with respect to the views."""
        objective = lambda v: self._loss(state, v, rows, credit)  # noqa: E731
        (_, loss), cotangents = jax.value_and_grad(objective, has_aux=True)(views)
        return loss, cotangents

    def _loss(self, state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[Array, Loss]:
        trained = rows.trained
        # Whatever a loss does, prompts, padding and tool output get no gradient.
        views = jax.tree.map(lambda v: jnp.where(trained, v, jax.lax.stop_gradient(v)), views)
        value, metrics = self.alg.loss(state, views, rows, credit)
        names = self.alg.needs.loss
        return value, Loss(value, metrics, {n: jnp.any(trained & ~jnp.isfinite(getattr(views, n))) for n in names})

    def _weighed(self, state: State, rows: Rollouts, credit: Credit) -> tuple[Credit, Metrics, Array]:
        """Credit with aggregation and importance weights, metrics of the latter, whether any token has a signal."""
        if credit.weight is None:
            credit = self.alg.weigh(state, rows, credit)
        credit, metrics = importance_weighted(self.config.learner.importance, rows, credit)
        signal = jnp.any(rows.trained & (credit.weight != 0) & (credit.advantage != 0))
        return credit, metrics, signal

    def _update_parameters(
        self, train: TrainState, grads: dict[str, Params], loss: Loss, on: dict[str, Array], signal: Array
    ) -> tuple[TrainState, Metrics, Health]:
        """The next train state: the old one, bitwise, if the loss or any gradient is not finite."""
        bad = {
            f"{label}{jax.tree_util.keystr(path)}": ~jnp.all(jnp.isfinite(leaf))
            for label, tree in grads.items()
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        finite = jnp.isfinite(loss.value) & ~jnp.any(jnp.stack(list(bad.values())))
        params, opt, count, metrics = {}, {}, {}, {k: _if(finite, m) for k, m in loss.metrics.items()}
        once = finite.astype(self.wide)
        moved = jnp.zeros((), bool)
        for label in self.labels:
            go = finite & on[label]
            params[label], opt[label] = optim.apply(
                self._tx[label], grads[label], train.opt[label], train.params[label], go
            )
            count[label] = train.count[label] + go
            prefix = "" if label == POLICY else f"{label}/"
            norm = optax.tree.norm(grads[label])
            moved |= norm > 0
            metrics[f"{prefix}grad_norm"] = Mean(jnp.where(finite, norm, 0), once)
            rate = jnp.asarray(self._rate[label](train.count[label]), self.wide)
            metrics[f"{prefix}lr"] = Mean(rate, jnp.ones_like(rate))
        metrics["loss"] = Mean(jnp.where(finite, loss.value, 0), once)
        metrics["update/skipped"] = Mean(1 - once, jnp.ones_like(once))
        in_row = jnp.where(finite, 0, train.skipped_in_row + 1)
        skipped = train.skipped + ~finite
        causes = {"view": loss.bad, "metric": {k: _is_bad(m) for k, m in loss.metrics.items()}, "gradient": bad}
        health = Health(count[POLICY] + skipped, finite, in_row, causes, signal, moved)
        return TrainState(params, opt, count, skipped, in_row), metrics, health

    def _tuned(self, state: State, metrics: Metrics, finite: Array) -> State:
        return jax.tree.map(lambda new, old: jnp.where(finite, new, old), self.alg.tune(state, metrics), state)

    def _new_optimizers(self, params: dict[str, Params]) -> dict[str, Any]:
        return {label: optim.init(self._tx[label], params[label]) for label in self.labels}

    def _opt_shardings(self, opt: dict[str, Any]) -> dict[str, Any]:
        """Moments are sharded like their parameters, counters are everywhere."""
        return {
            label: optax.tree.map_params(
                self._tx[label],
                lambda _, sharding: sharding,
                opt[label],
                self.shardings[label],
                transform_non_params=lambda _: self._everywhere,
            )
            for label in self.labels
        }

    def _reference_shardings(self) -> Params:
        place = self.shardings[POLICY]
        if self.config.reference.mode == "host":
            return jax.tree.map(lambda s: s.with_memory_kind("pinned_host"), place)
        return place


def importance_weighted(settings: Importance, rows: Rollouts, credit: Credit) -> tuple[Credit, Metrics]:
    """Multiply w = exp(old_logp - sampler_logp) into the policy weight of tokens this run's policies sampled.

    truncate: min(w, cap) (truncated importance sampling, Yao et al. 2025). mask: 0 outside [1/cap, cap]. The weights
    correct the difference between the sampler's and the learner's log-probs, truncated sampling included.
    """
    if settings.mode == "none":
        return credit, {}
    sampled = rows.trained & ((rows.source == CURRENT) | (rows.source == REPLAY))[:, None]
    w = jnp.exp(jnp.where(sampled, rows.old_logp - rows.sampler_logp, 0))
    if settings.mode == "truncate":
        used = jnp.minimum(w, settings.cap)
    else:
        used = jnp.where((w >= 1 / settings.cap) & (w <= settings.cap), w, 0)
    metrics = {
        "sampling/importance_mean": mean_of(used, sampled),
        "sampling/importance_max": Max(jnp.max(jnp.where(sampled, w, 0))),
        "sampling/importance_clipped": mean_of(used != w, sampled),
    }
    return replace(credit, weight=jnp.where(sampled, credit.weight * used, credit.weight)), metrics


def _labels(names: tuple[str, ...]) -> tuple[str, ...]:
    """Trainables that provide these views."""
    policy = (POLICY,) if any(name != "values" for name in names) else ()
    return policy + ((CRITIC,) if "values" in names else ())


def _no_views(names: tuple[str, ...], shape: tuple[int, ...], dtype: Any) -> Views:
    return Views(**{name: jnp.zeros(shape, dtype) for name in names})


def _take(rows: Rollouts, credit: Credit, views: Views | None, index: Array, block: Array):
    """A minibatch of rows, credit and views by index."""
    rows, credit = take_rows(rows, credit, index)
    return rows.with_(block=block), credit, jax.tree.map(lambda v: v[jnp.maximum(index, 0)], views)


def _restrict(rows: Rollouts, credit: Credit, on: Bool[Array, "B"]) -> tuple[Rollouts, Credit]:
    """Other rows train nothing, have no weight and are in no statistic."""
    keep = lambda w: jnp.where(on[:, None], w, 0)  # noqa: E731
    rows = rows.with_(mask=rows.mask & on[:, None], stat=rows.stat & on, scored=rows.scored & on)
    return rows, replace(credit, weight=keep(credit.weight), reg_weight=keep(credit.reg_weight))


def _zeros(shapes: dict[str, Params]) -> dict[str, Params]:
    """Gradients of nothing, in at least float32."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), shapes)


def _add_losses(a: Loss, b: Loss) -> Loss:
    return Loss(a.value + b.value, merge_metrics(a.metrics, b.metrics), {k: a.bad[k] | b.bad[k] for k in a.bad})


def _if(finite: Array, m: Metric) -> Metric:
    """A metric as it is, or of nothing when the update was skipped."""
    return jax.tree.map(lambda x: jnp.where(finite, x, 0), m)


def _is_bad(m: Metric) -> Array:
    """Not finite; an extreme over nothing may be infinite the harmless way."""
    if isinstance(m, Mean):
        return ~jnp.isfinite(m.sum)
    return jnp.isnan(m.value) | (m.value == (jnp.inf if isinstance(m, Max) else -jnp.inf))
