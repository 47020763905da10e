"""From a batch of rollouts to a gradient, and from a gradient to the next parameters.

The gradient never depends on how a minibatch is split. The *joint* route computes the views of the whole minibatch without
gradient, differentiates the loss on those small arrays, and pulls the cotangents back through the model, one microbatch
after another: exact for every loss, and the model's programs contain no algorithm. The *fused* route differentiates
loss∘views on each microbatch and adds up: the same gradient when the loss couples nothing across microbatches, and one
forward less.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial, reduce
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxrl_llm.algorithms.base import INNER, Algorithm, Key, Noise, Report, check_inner, keep, views_in
from jaxrl_llm.config import Config
from jaxrl_llm.models import critic as critics
from jaxrl_llm.models import decoder
from jaxrl_llm.models.spec import ModelSpec
from jaxrl_llm.sharding import rules, target
from jaxrl_llm.sharding.processes import put
from jaxrl_llm.training import gradients, layouts, noise, optim, programs, updates
from jaxrl_llm.training.gradients import Model, PlugIn
from jaxrl_llm.training.layouts import HostRows, Layout
from jaxrl_llm.training.minibatches import minibatches
from jaxrl_llm.training.state import CRITIC, POLICY, TrainState
from jaxrl_llm.training.updates import NoGradientError, NonFiniteError
from jaxrl_llm.types import ROUTES, Credit, Metrics, Params, Rollouts, State, Views, merge_metrics

__all__ = ["Learner", "NoGradientError", "NonFiniteError"]

T = TypeVar("T")
MOST_TWICE = 2**26  # parameters whose gradient a CPU may hold twice: 256 MiB in float32
CAUSAL = "causal"  # `Needs.scorer` of a method whose views come from the decoder


class Learner:
    """Owns `train` and the compiled programs that change it.

    Rows, credit and algorithm state are small and replicated; parameters follow the sharding rules; microbatches are
    split over (dp, fsdp).
    """

    train: TrainState
    guide: Params | None  # a frozen model that scores rows
    version: int  # optimizer steps since the run began, skipped ones included

    def __init__(self, config: Config, spec: ModelSpec, alg: Algorithm, mesh: Mesh, plug_in: PlugIn | None = None):
        """plug_in: computes the views of a method that names a scorer other than "causal", from the policy's parameters.

        Raises ValueError when the config contradicts the method: a fused route for a loss that couples the minibatch,
        importance weights for a loss that has no place for them, a scorer that is not given, a learning rate that falls
        over an unknown number of updates.
        """
        settings, needs = config.learner, alg.needs
        if settings.route == "fused" and alg.couples == "minibatch":
            raise ValueError(
                f"learner.route=fused: the loss of {alg.name} couples the minibatch, expected auto or joint"
            )
        if settings.route == "fused" and alg.rate is not None:
            raise ValueError(f"learner.route=fused: {alg.name} takes its gradient in parts, expected auto or joint")
        if settings.importance.mode != "none" and not needs.importance:
            raise ValueError(
                f"learner.importance.mode={settings.importance.mode}: the loss of {alg.name} has no place for "
                "importance weights, expected none"
            )
        check_inner(needs.inner, spec.layers)
        if (needs.scorer != CAUSAL) != (plug_in is not None):
            raise ValueError(
                f"algorithm.name={alg.name!r}: its views come from scorer {needs.scorer!r}, expected that as plug_in"
            )
        self.config, self.spec, self.alg, self.mesh = config, spec, alg, mesh
        self.labels = (POLICY, CRITIC) if needs.critic else (POLICY,)
        self.group_size = alg.plan(alg.init()).group_size or config.rollout.group_size
        self.shards = int(np.prod([mesh.shape[axis] for axis in rules.RULES["batch"]]))
        self._everywhere, self._split = NamedSharding(mesh, PartitionSpec()), rules.batch_sharding(mesh)
        dtype = jnp.dtype(config.model.dtype)
        self.model = Model(
            spec=spec,
            dtype=dtype,
            wide=jnp.promote_types(dtype, jnp.float32),
            temperature=config.rollout.temperature or 1.0,
            remat=config.model.remat,
            head_chunk=config.model.head_chunk,
            plug_in=plug_in,
            everywhere=self._everywhere,
            inner=needs.inner,
        )
        param_dtype = jnp.dtype(config.model.param_dtype)
        self.shapes, axes = {POLICY: decoder.abstract(spec, param_dtype)}, {POLICY: decoder.logical_axes(spec)}
        if needs.critic:
            self.shapes[CRITIC] = jax.eval_shape(partial(critics.init, spec, dtype=param_dtype), jax.random.key(0))
            axes[CRITIC] = critics.logical_axes(spec)
        self._reached = decoder.reached(spec, self.shapes[POLICY], *needs.inner) if needs.inner else None
        self.shardings = rules.shardings(axes, self.shapes, mesh)
        per_step = alg.updates if alg.update else settings.epochs * settings.minibatches
        total = None if per_step is None else config.run.steps * per_step
        chosen = {POLICY: config.optimizer, CRITIC: config.critic or config.optimizer}
        optimizers = {label: optim.make(chosen[label], total) for label in self.labels}
        self._watch = updates.Watch(alg.name, settings.max_nonfinite)
        rates = {label: optim.schedule(chosen[label], total) for label in self.labels}
        self._placement = programs.placement(optimizers, self.shapes, self.shardings, self._everywhere)
        self._run = programs.make(self.model, alg, settings.importance, optimizers, rates, self.shapes, self._placement)

    def init(self, policy: Params, critic: Params | None = None, guide: Params | None = None) -> None:
        """Begin from these parameters; they are the learner's from here on, as updates donate them.

        Args:
          critic: None makes one from the policy's decoder, with a head of zeros.
          guide: frozen, of the policy's shapes; scores rows as policy "guide" and is in no checkpoint.
        """
        self.guide = None if guide is None else put(guide, self.shardings[POLICY])
        params = {POLICY: policy}
        if CRITIC in self.labels:
            dtype = jnp.dtype(self.config.model.param_dtype)
            make = jax.jit(partial(critics.init, self.spec, dtype=dtype), out_shardings=self.shardings[CRITIC])
            params[CRITIC] = make(jax.random.key(self.config.run.seed), policy=policy) if critic is None else critic
        params = put(params, self.shardings)
        zero = partial(jnp.zeros, (), jnp.int32)
        counts = {label: zero() for label in self.labels}
        self.load(TrainState(params, self._run.start(params), counts, zero(), zero()))
        if self.config.reference.mode != "none":
            self.sync_reference()

    def load(self, train: TrainState) -> None:
        """Go on from this state, placed on this learner's mesh."""
        reference = train.reference
        if reference is not None:
            reference = put(reference, self._reference_placement())
        self.train = replace(put(replace(train, reference=None), self._placement), reference=reference)
        self.version = int(train.count[POLICY]) + int(train.skipped)

    @property
    def parameters(self) -> int:
        """How many numbers the policy has."""
        return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(self.shapes[POLICY]))

    def policy(self, name: str) -> Params:
        """Parameters of a policy by name, on the devices: "policy" (as it is now), "ref" or "guide".

        Raises ValueError for a policy that is not kept.
        """
        if name == "policy":
            return self.train.params[POLICY]
        if name == "guide" and self.guide is not None:
            return self.guide
        if name != "ref":
            raise ValueError(f"policy={name!r}: expected 'policy', 'ref', or 'guide' where there is one")
        if self.train.reference is None:
            raise ValueError("reference.mode=none: the reference policy is asked for, expected resident or host")
        return put(self.train.reference, self.shardings[POLICY])

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
          names: of "logp", "entropy", "logsumexp", "tempered_logp", "inner_logp", and "values" of the critic; or a plug-in's. "routes": the
            experts of every position.
          policy: "policy" (the trained trees as they are now; it replays the rows' routes), "ref" or "guide".
          temperature: of "tempered_logp".
        Raises ValueError for a policy that is not kept, or "tempered_logp" without its temperature.
        """
        params = self.train.params if policy == "policy" else {POLICY: self.policy(policy)}
        if "tempered_logp" in names and temperature is None:
            raise ValueError("views: 'tempered_logp' needs a temperature")
        if policy != "policy":
            rows = replace(rows, extras={name: x for name, x in rows.extras.items() if name != ROUTES})
        at_once = -(-len(rows.tokens) // self.config.learner.minibatches)
        layout, pieces, _ = self._arrange(rows, layouts.host_rows(rows), at_once)
        with jax.set_mesh(self.mesh):
            seen = self._views(params, layout, pieces, rows, names, self._heat(temperature))
            if ROUTES in names:
                routes = self._run.share(seen.extras[ROUTES], rows)
                seen = replace(seen, extras={**seen.extras, ROUTES: routes})
        return seen

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

        `active` and `current` (views of the whole batch) are as in `step`; a method's own update has no use for them.

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
            batch = put((rows, credit, current), self._everywhere)
            steps: list[Metrics] = []
            for _ in range(settings.epochs):
                for part in minibatches(rows, settings.minibatches, rng, settings.layout == "shared"):
                    some = host.take(part.index, part.block)
                    some_rows, some_credit, views = self._run.take(*batch, part.index, part.block)
                    state, metrics = self._step(state, some, some_rows, some_credit, active, views)
                    batch = (*batch[:2], None)  # the parameters have moved: the views are no longer current
                    steps.append(metrics)
            steps = jax.device_get(steps)
            report = Report(reduce(merge_metrics, steps), steps[-1], len(steps), tuple(steps))
        self._watch.check()
        return state, report

    def compile_ahead(self, state: State, rows: Rollouts, credit: Credit) -> None:
        """Compile what `update` runs on batches of this shape and these lengths. Nothing of the learner changes, and another
        thread may use it meanwhile.
        """
        settings, host = self.config.learner, layouts.host_rows(rows)
        part, *_ = minibatches(rows, settings.minibatches, np.random.default_rng(0), settings.layout == "shared")
        rows, credit, _ = self._run.take(*put((rows, credit, None), self._everywhere), part.index, part.block)
        host = host.take(part.index, part.block)
        layout, (piece, *_), piece_of = self._arrange(rows, host, len(host.tokens))
        for program in self.lower(layout, piece, state, rows, credit, self._fuses(piece_of, host.block)).values():
            program.compile()

    def lower(
        self, layout: Layout, piece: Any, state: State, rows: Rollouts, credit: Credit, fused: bool
    ) -> dict[str, jax.stages.Lowered]:
        """The programs of `step` on a minibatch of these shapes, in pieces like `piece` and on one of the two routes.

        `piece`, `rows` and `credit` may be shapes; the learner need not have been given parameters.
        """
        run, names = self._run, views_in(self.alg, state)[0]
        heat, train = self._like(np.float32(1)), self.train_shapes()
        on, state, rows, credit = (self._like(x) for x in (self._on(names, None), state, rows, credit))
        with jax.set_mesh(self.mesh):
            ahead = {"weigh": run.weigh.lower(state, rows, credit), "zeros": run.zeros.lower()}
            credit, _, signal = self._like(ahead["weigh"].out_info)
            grads = _shaped(ahead["zeros"].out_info, self._placement.params)
            if fused:
                args = layout, names, train.params, grads, piece, state, rows, credit, heat
                ahead["fused"] = run.fused.lower(*args)
                loss = self._like(ahead["fused"].out_info[1])
            else:
                ahead["score"] = self.lower_views(layout, piece, rows, names)
                views = self._like(ahead["score"].out_info)
                ahead["differentiate"] = run.differentiate.lower(state, views, rows, credit)
                loss, cotangents = self._like(ahead["differentiate"].out_info)
                read = rows if self._reads(rows) else None
                ahead["pull"] = run.pull.lower(layout, train.params, grads, piece, cotangents, heat, read)
            ahead["apply"] = run.apply.lower(train, grads, loss, on, signal, heat)
        return ahead

    def lower_views(self, layout: Layout, piece: Any, rows: Rollouts, names: tuple[str, ...]) -> jax.stages.Lowered:
        """The program of `views`; its arguments as those of `lower`."""
        params, rows = self.train_shapes().params, self._like(rows)
        params = {label: params[label] for label in gradients.labels(names)}
        out = self._like(jax.eval_shape(lambda: gradients.no_views(self.model, names, rows)))
        read = rows if self._reads(rows) else None
        with jax.set_mesh(self.mesh):
            return self._run.score.lower(layout, names, params, out, piece, self._like(np.float32(1)), read)

    def sync_reference(self) -> None:
        """Copy the policy into the frozen reference, on the devices or in host memory as `reference.mode` says."""
        copy = put(self._run.copy(self.train.params[POLICY]), self._reference_placement())
        self.train = replace(self.train, reference=copy)

    # -------------------------------------------------------------------------------------------------- how it is done

    def _step(
        self,
        state: State,
        host: HostRows,
        rows: Rollouts,
        credit: Credit,
        active: Mapping[str, bool] | None,
        current: Views | None,
    ) -> tuple[State, Metrics]:
        train, (names, _) = self.train, views_in(self.alg, state)
        layout, pieces, piece_of = self._arrange(rows, host, len(host.tokens))
        heat = self._heat(self.alg.plan(state).score_temperature if "tempered_logp" in names else None)
        on = self._on(names, active)
        state, rows, credit, on = put((state, rows, credit, on), self._everywhere)
        with jax.set_mesh(self.mesh):
            credit, sampling, signal = self._run.weigh(state, rows, credit)
            rate, rated = self._heat(None), state
            if self._fuses(piece_of, host.block):
                grads, losses = self._summed(
                    lambda grads, piece: self._run.fused(
                        layout, names, train.params, grads, piece, state, rows, credit, heat
                    ),
                    pieces,
                )
                loss = reduce(self._run.add, losses)
            else:
                if current is None:
                    current = self._views(train.params, layout, pieces, rows, names, heat)
                loss, cotangents = self._run.differentiate(state, current, rows, credit)
                read = self._read(rows)

                def pull(layout: Layout, pieces: list[Any]) -> dict[str, Params]:
                    def one(grads: dict[str, Params], piece: Any) -> tuple[dict[str, Params], None]:
                        return self._run.pull(layout, train.params, grads, piece, cotangents, heat, read), None

                    return self._summed(one, pieces)[0]

                if self.alg.rate is None:
                    grads = pull(layout, pieces)
                else:
                    grads, measured = self._in_parts(rows, host, pull)
                    rate, rated = self._run.rate(state, measured)
            moved, metrics, health = self._run.apply(replace(train, reference=None), grads, loss, on, signal, rate)
            self.train = replace(moved, reference=train.reference)
            metrics |= sampling
            if self.alg.rate is not None:
                state = self._run.pick(health.finite, rated, state)
            if self.alg.tune is not keep:
                state = self._run.tune(state, metrics, health.finite)
        self._watch.seen.append(health)
        self.version += 1
        return state, metrics

    def _on(self, names: tuple[str, ...], active: Mapping[str, bool] | None) -> dict[str, Any]:
        """What an update moves: the active trainables, and of the policy only what has a part in these views."""
        on: dict[str, Any] = {label: np.bool_(active is None or active[label]) for label in self.labels}
        if self._reached is not None and names == (INNER,) and on[POLICY]:
            on[POLICY] = self._reached
        return on

    def _fuses(self, piece_of: np.ndarray, block: np.ndarray) -> bool:
        """Whether a minibatch takes the fused route: the loss must not couple rows of different pieces."""
        route, couples = self.config.learner.route, self.alg.couples
        whole = len({*zip(block.tolist(), piece_of.tolist())}) == len(np.unique(block))
        exact = couples == "row" or (couples == "block" and whole) or piece_of.max() == 0
        if self.alg.rate is not None:  # parts of a gradient are pulled back from one evaluation of the loss
            return False
        if route == "fused" and not exact:
            raise ValueError(
                f"learner.route=fused: these microbatches split blocks of {self.alg.name}, expected auto or joint"
            )
        return exact and route != "joint"

    def _summed(
        self, add: Callable[[dict[str, Params], Any], tuple[dict[str, Params], T]], pieces: list[Any]
    ) -> tuple[dict[str, Params], list[T]]:
        """Gradients to which `add` has added every piece, and what it said of each.

        A CPU runs what two threads ask for at the same time: what one piece does on a single core the other need not
        wait for. Gradients are there twice then, so only small ones. Several devices must meet in one order, which two
        threads would not keep.
        """

        def run(some: list[Any]) -> tuple[dict[str, Params], list[T]]:
            said = []
            with jax.set_mesh(self.mesh), jax.enable_x64(x64):  # both belong to a thread
                grads = self._run.zeros()
                for piece in some:
                    grads, one = add(grads, piece)
                    said.append(one)
            return grads, said

        x64 = jax.config.read("jax_enable_x64")
        alone = self.mesh.size > 1 or self.parameters > MOST_TWICE or len(pieces) == 1
        if alone or target.of(self.mesh).platform != "cpu":
            return run(pieces)
        grads, said = run(pieces[::2])  # compiles; returns before the pieces have run
        with ThreadPoolExecutor(1, "gradient") as thread:
            beside, more = thread.submit(run, pieces[1::2]).result()
        return self._run.sum(grads, beside), said + more

    def _in_parts(self, rows: Rollouts, host: HostRows, pull: Callable[..., Any]) -> tuple[dict[str, Params], Noise]:
        """The gradient, pulled back for one part of the groups after another, and how noisy it is."""
        grads, squares = self._run.zeros(), []
        for part in noise.parts(host, np.asarray(rows.group), self.alg.needs.noise):
            layout, pieces, _ = self._arrange(rows, part, len(host.tokens))
            own = pull(layout, pieces)
            squares.append(self._run.square(own))
            grads = self._run.sum(grads, own)
        return grads, self._run.noise(self._run.square(grads), jnp.stack(squares))

    def _views(
        self,
        params: dict[str, Params],
        layout: Layout,
        pieces: list[Any],
        rows: Rollouts,
        names: tuple[str, ...],
        heat: Array,
    ) -> Views:
        params = {label: params[label] for label in gradients.labels(names)}
        out = put(gradients.no_views(self.model, names, rows), self._everywhere)
        read = self._read(rows)
        for piece in pieces:
            out = self._run.score(layout, names, params, out, piece, heat, read)
        return out

    def _read(self, rows: Rollouts) -> Rollouts | None:
        """Rows where a plug-in scorer reads them, or the decoder routes to replay; else it reads pieces only."""
        return put(rows, self._everywhere) if self._reads(rows) else None

    def _reads(self, rows: Rollouts) -> bool:
        return self.model.plug_in is not None or ROUTES in rows.extras

    def _like(self, tree: Any) -> Any:
        """Shapes of small arrays, which are on every device."""
        shapes = jax.eval_shape(lambda x: x, tree)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._everywhere), shapes)

    def train_shapes(self) -> TrainState:
        """Shapes and shardings of `train`, without a reference."""
        opt = _shaped(jax.eval_shape(self._run.start, self.shapes), self._placement.opt)
        count = self._like(jnp.zeros((), jnp.int32))
        return TrainState(_shaped(self.shapes, self.shardings), opt, dict.fromkeys(self.labels, count), count, count)

    def _arrange(self, rows: Rollouts, host: HostRows, at_once: int) -> tuple[Layout, list[Any], np.ndarray]:
        """The layout, the pieces on the devices, and the piece of each row."""
        settings, completion = self.config.learner, rows.tokens.shape[1]
        platform = self.mesh.devices.flat[0].platform
        layout = layouts.choose(
            settings.layout,
            rows=at_once,
            microbatch_rows=settings.microbatch_rows,
            most=layouts.most_rows(completion, self.alg.couples, platform),
            context=rows.prompt_tokens.shape[1],
            completion=completion,
            group_size=self.group_size,
            shards=self.shards,
        )
        if self.model.plug_in is None:
            layout = layouts.fit(layout, host, self.shards, whole=self.alg.couples != "row")
            pieces, piece_of = layouts.arrange(layout, host)
        else:
            pieces, piece_of = layouts.arrange_rows(layout.sequences * layout.slots, host)
        places = [jax.tree.map(lambda _: self._split, piece)._replace(rows=self._everywhere) for piece in pieces]
        return layout, put(pieces, places), piece_of

    def _heat(self, temperature: Any) -> Array:
        """A temperature as a replicated array, so that its value never recompiles; any where it is not used."""
        return put(jnp.asarray(1.0 if temperature is None else temperature, jnp.float32), self._everywhere)

    def _reference_placement(self) -> Params:
        place = self.shardings[POLICY]
        if self.config.reference.mode == "host":
            return jax.tree.map(lambda s: s.with_memory_kind("pinned_host"), place)
        return place


def _shaped(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
