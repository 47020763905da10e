"""The host side of generation: what to decode, on which shards, at which compiled sizes, and what came of it.

Every context is prefilled once. Items (context, sample) wait in a queue on the device and are decoded by a fixed number of
slots; the host looks only every `chunk` steps. When the queue is empty and at most half of the slots are live, the live ones
are gathered and decoding goes on at the next power of two. Counts and lengths are rounded up to powers of two, so a run
compiles a few programs at its start and none later; temperatures, limits and truncation are arrays.

On a mesh the items are dealt out over (dp, fsdp) in equal runs, and every shard works off its own queue without talking to
the others; weights are replicated over those axes and split over tp. A CPU that is one device has two
such loops side by side (streams).
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Lock
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxrl_llm.algorithms.base import SamplerHook
from jaxrl_llm.models import decoder
from jaxrl_llm.models.spec import ModelSpec
from jaxrl_llm.rollout import decode, programs
from jaxrl_llm.rollout.programs import SHARDED
from jaxrl_llm.rollout.results import Results
from jaxrl_llm.rollout.rows import Completion
from jaxrl_llm.rollout.sampling import Sampling
from jaxrl_llm.rollout.stops import stop_table
from jaxrl_llm.sharding import target
from jaxrl_llm.sharding.processes import put
from jaxrl_llm.types import Params

MIN_SLOTS = 8  # per shard; below this a smaller program is not worth its compilation
MIN_PLACES = 4  # a lane shared by fewer is not worth the detour
MIN_COLUMNS = 16  # shortest compiled context
PREFILL_TOKENS = 8192  # per shard, at once

PerContext = float | Sequence[float] | None  # one number for all contexts, one for each, or the engine's default


def most_slots(platform: str) -> int:
    """Rows decoded at once per shard when the caller leaves the choice. A CPU is busy with 32; more only wait longer."""
    return 32 if platform == "cpu" else 512


def turns(platform: str) -> bool:
    """Whether decoding has its weights turned (`decode.Settings`), and so no copy of a tied embedding."""
    return platform == "cpu"


def prefill_batch(contexts: int, columns: int) -> int:
    """Contexts of so many tokens prefilled at once per shard."""
    return _power(min(contexts, max(PREFILL_TOKENS // columns, 1)))


class Engine:
    """Samples completions with the weights it was last given.

    Args:
      mesh: its dp and fsdp axes deal out items, tp splits weights.
      max_prompt, max_new: tokens; limits of every call, and what caches are sized for.
      slots: items decoded at once over the whole mesh; 0 chooses from the number of items.
      stop_strings: end a completion with the token in which one completes; need `pieces`.
      pieces: the bytes every token writes (`tasks.text.Text.token_bytes`).
      temperature, top_k, top_p, min_p: defaults of `generate`. The default temperature, 1 when it is 0, is also that of
        `Completion.policy_logp`.
      hook: changes the temperature of every choice from the logits (`algorithms.base.SamplerHook`).
      batch_invariant: one compiled size, for bitwise replays; slower tails.
      record: keep the experts every token went to (`Completion.routes`).
      chunk: steps between two looks of the host.
    Raises:
      ValueError: lengths beyond the model's positions, stop strings without `pieces`, or a record of experts of a model
        without.
    """

    def __init__(
        self,
        spec: ModelSpec,
        mesh: Mesh,
        *,
        max_prompt: int,
        max_new: int,
        slots: int = 0,
        eos_ids: Sequence[int] = (),
        stop_strings: Sequence[str] = (),
        pieces: Sequence[bytes] | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        dtype: Any = jnp.float32,
        hook: SamplerHook | None = None,
        batch_invariant: bool = False,
        record: bool = False,
        chunk: int = 64,
    ):
        if max_prompt + max_new > spec.max_positions:
            raise ValueError(
                f"rollout.max_prompt + max_new: {max_prompt + max_new}, expected at most the model's "
                f"{spec.max_positions} positions"
            )
        if record and spec.experts is None:
            raise ValueError(f"record=True: {spec.family} has no experts to record")
        self.spec, self.mesh, self.dtype = spec, mesh, jnp.dtype(dtype)
        self.max_prompt, self.max_new, self.slots = max_prompt, max_new, slots
        self.defaults = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        self.batch_invariant = batch_invariant
        self.stats: dict[str, Any] = {}  # of the last call
        self.compilations = 0
        self._shards = int(np.prod([mesh.shape[a] for a in SHARDED]))
        turned = turns(target.of(mesh).platform)
        self._place = programs.placement(spec, mesh, turned)
        self._params = self._weights = self.version = None
        self._compiling = Lock()  # two loops need the same programs: one compiles, the other waits for it
        table = None
        if stop_strings:
            if pieces is None:
                raise ValueError(f"rollout.stop: {list(stop_strings)} without the tokens' bytes, expected `pieces`")
            table = stop_table(stop_strings, _pad(pieces, spec.vocab))
        self._stop_table = put(table, self._place.everywhere)
        # With tp the devices of a step communicate, and the compiler may let all of them take part.
        lockstep = SHARDED if mesh.shape["tp"] > 1 else ()
        self.settings = decode.Settings(
            spec, self.dtype, max_new, chunk, tuple(eos_ids), temperature or 1.0, hook, lockstep, record, turned
        )
        self._run = programs.make(self.settings, mesh, self._place, self._count)

    def _count(self) -> None:
        self.compilations += 1

    def set_weights(self, params: Params, version: int) -> None:
        """Use these parameters (laid out as `models.decoder.init`'s) from now on; nothing computed before is kept.

        The engine keeps a reference to `params` for prefill: give new ones before the old are donated away.
        """
        self._params, self.version = params, version
        self._weights = None  # the old ones make room
        with jax.set_mesh(self.mesh):
            self._weights = self._prepared(params)

    def _prepared(self, params: Params, run: Callable[..., Params] = lambda f, *args: f(*args)) -> Params:
        spec, layers = self.spec, []
        for i, kind in enumerate(spec.sparse):
            parts = decoder.own_parts(spec, params["layers"], i)
            layers.append(run(self._run.prepare_layer[kind], parts, i, spec.sparse[:i].count(kind)))
        return run(self._run.prepare, params) | {"layers": layers}

    def drop_weights(self) -> None:
        """Hold none until the next `set_weights`, so that what runs meanwhile has their memory."""
        self._params = self._weights = None

    def generate(
        self,
        contexts: Sequence[np.ndarray],
        n: Sequence[int],
        *,
        seed: int,
        step: int,
        temperature: PerContext = None,
        top_k: PerContext = None,
        top_p: PerContext = None,
        min_p: PerContext = None,
        max_new: PerContext = None,
        first_item: int = 0,
        hook_state: Any = (),
        on_finished: Callable[[int, Completion], None] | None = None,
    ) -> list[list[Completion]]:
        """`n[i]` completions of `contexts[i]` (token ids, at least one).

        Item j of context i draws its random numbers from (seed, step, first_item + n[0] + .. + n[i-1] + j, position).

        Args:
          max_new: most new tokens, at least 1; the engine's by default.
          on_finished: called with (index of the item in this call, completion) while others are still decoded.
        Raises:
          ValueError: an empty or too long context, a limit outside 1..max_new, or a bad sampling parameter.
          RuntimeError: no weights yet.
        """
        if self._weights is None:
            raise RuntimeError("Engine.generate before Engine.set_weights")
        limits, sampling = self._check(contexts, n, max_new, temperature, top_k, top_p, min_p)
        owner = np.repeat(np.arange(len(contexts)), n)
        if not len(owner):
            return [[] for _ in contexts]
        streams = self._streams(len(owner))
        size, lanes = self._shape(contexts, owner, len(streams), max(len(items) for items in streams[0]))
        with jax.set_mesh(self.mesh):
            keys = np.asarray(self._run.keys(seed, step, first_item + np.arange(_power(len(owner)), dtype=np.int32)))
            begun, went = [], []
            for shards in streams:
                pool, queue, routes = self._upload(contexts, owner, shards, lanes[1], keys, limits, sampling)
                begun.append((shards, self._run.idle(size, lanes, pool[0].v.shape[-2], queue), pool, queue))
                went += routes or []
            done = Results(len(owner), self.max_new, int(self.version or 0), on_finished, went or None)
            loop = partial(self._loop, _truncated(sampling), size, put(hook_state, self._place.everywhere), done)
        with ThreadPoolExecutor(1, "rollout") as thread:
            beside = [thread.submit(loop, *stream) for stream in begun[1:]]
            loop(*begun[0])
            for stream in beside:
                stream.result()
        self.stats = done.stats() | {"compilations": self.compilations, "contexts": len(contexts)}
        completions = iter(done.completions)
        return [[next(completions) for _ in range(k)] for k in n]  # type: ignore[misc]

    def _check(self, contexts, n, max_new, temperature, top_k, top_p, min_p) -> tuple[np.ndarray, Sampling]:
        """Per-context limits and sampling parameters as arrays."""
        lengths = np.array([len(c) for c in contexts], int)
        if len(n) != len(contexts):
            raise ValueError(f"n: {len(n)} counts for {len(contexts)} contexts")
        if len(lengths) and (lengths.min() < 1 or lengths.max() > self.max_prompt):
            raise ValueError(f"contexts: {lengths.min()} to {lengths.max()} tokens, expected 1 to {self.max_prompt}")

        def full(name: str, given: PerContext, dtype: Any) -> Any:
            value = self.defaults[name] if given is None else given
            array = np.broadcast_to(np.asarray(value, dtype), lengths.shape)
            low, high = {"temperature": (0, np.inf), "top_k": (0, np.inf), "top_p": (0, 1), "min_p": (0, 1)}[name]
            bad = ~((array >= low) & (array <= high)) | ((array == 0) & (name == "top_p"))
            if bad.any():
                raise ValueError(f"rollout.{name}: {array[bad][0]}, expected {low} to {high}")
            return array

        limits = np.broadcast_to(np.asarray(self.max_new if max_new is None else max_new, np.int32), lengths.shape)
        if len(limits) and (limits.min() < 1 or limits.max() > self.max_new):
            raise ValueError(f"rollout.max_new: {limits.min()} to {limits.max()}, expected 1 to {self.max_new}")
        return limits, Sampling(
            full("temperature", temperature, np.float32),
            full("top_k", top_k, np.int32),
            full("top_p", top_p, np.float32),
            full("min_p", min_p, np.float32),
        )

    def _streams(self, items: int) -> list[list[np.ndarray]]:
        """The items of every shard of every stream, equal runs. Two streams keep a CPU's cores busy: what one does on a single
        core the other need not wait for. Several devices must meet in one order, which two threads would not keep."""
        alone = self.mesh.size > 1 or self.batch_invariant or min(items, self.slots or items) < 2 * MIN_SLOTS
        count = 1 if alone or target.of(self.mesh).platform != "cpu" else 2
        runs = np.array_split(np.arange(items), count * self._shards)
        return [runs[i * self._shards : (i + 1) * self._shards] for i in range(count)]

    def _shape(self, contexts, owner, streams: int, items: int) -> tuple[int, tuple[int, int]]:
        """Slots of a shard of a stream for so many items, and its lanes with their places.

        Lanes are shared where a step reads more of contexts than of own tokens. There are twice as many as full ones
        would do, so that stragglers seldom keep an idle slot from the queue (measured: 2 against 3, 4 and 8).
        """
        size = self.slots or most_slots(target.of(self.mesh).platform) * self._shards
        size = -(-size // (self._shards * streams))
        if self.batch_invariant:
            return size, (size, 1)
        size = min(size, _power(items))
        samples = len(owner) // len(np.unique(owner))  # of a context, on average
        places = min(_power(samples + 1) // 2, size)
        if places < MIN_PLACES or max(len(c) for c in contexts) < self.max_new:
            return size, (size, 1)
        return size, (min(size, 2 * -(-size // places)), places)

    def weight_shapes(self, params: Params) -> Params:
        """What `set_weights` makes of parameters of these shapes, with shardings."""
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            self._prepared(params, jax.eval_shape),
            self._place.weights,
        )

    def lower(self, params: Params, contexts: int, n: int, hook_state: Any = ()) -> dict[str, jax.stages.Lowered]:
        """The programs of a call with `n` completions of each of so many contexts of `max_prompt` tokens: "prepare" and
        "prepare_layer" (of `set_weights`), "prefill" and, while there is a queue, "decode".

        params: shapes with shardings. Without weights or devices, but for stop strings, whose table is on them.
        """
        prompts, owner = [np.zeros(self.max_prompt, np.int32)] * contexts, np.repeat(np.arange(contexts), n)
        limits, sampling = self._check(prompts, [n] * contexts, None, None, None, None, None)
        streams = self._streams(len(owner))
        size, lanes = self._shape(prompts, owner, len(streams), max(len(items) for items in streams[0]))
        keys = np.zeros((len(owner), 2), np.uint32)
        tokens, queue, batch, held = self._deal(prompts, owner, streams[0], lanes[1], keys, limits, sampling)

        def shaped(tree: Any, sharding: Any) -> Any:
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

        counts, queue = (shaped(x, self._place.shard) for x in (np.zeros(self._shards, np.int32), queue))
        with jax.set_mesh(self.mesh):
            prepare, layer = self._run.prepare.lower(params), self.spec.sparse.index(max(self.spec.sparse))
            parts = decoder.own_parts(self.spec, params["layers"], layer)
            prepare_layer = self._run.prepare_layer[self.spec.sparse[layer]].lower(parts, layer, 0)
            weights = self.weight_shapes(params)
            prefill = self._run.prefill.lower(batch, params, shaped(tokens, self._place.shard), held)
            pool = shaped(prefill.out_info[0], self._place.cached)
            idle = partial(self._run.idle, size, lanes, pool[0].v.shape[-2])
            slots = jax.tree.map(
                lambda sharding, part: shaped(part, sharding), self._place.slots, jax.eval_shape(idle, queue)
            )
            rest = self._stop_table, shaped(hook_state, self._place.everywhere), slots
            decode_ = self._run.decode.lower(_truncated(sampling), weights, pool, queue, counts, 0, *rest)
        return {"prepare": prepare, "prepare_layer": prepare_layer, "prefill": prefill, "decode": decode_}

    def _upload(self, contexts, owner, shards, places, keys, limits, sampling) -> tuple[Any, decode.Job, Any]:
        """Prefilled contexts and queues, for every shard; and the recorded experts of each item's cached tokens, or None."""
        tokens, queue, batch, held = self._deal(contexts, owner, shards, places, keys, limits, sampling)
        pool, routes = self._run.prefill(batch, self._params, put(tokens, self._place.shard), held)
        if routes is not None:
            went, at = jax.device_get(routes), [(d, i) for d, items in enumerate(shards) for i in range(len(items))]
            routes = [went[d, queue.context[d, i], : queue.length[d, i]] for d, i in at]
        return pool, put(queue, self._place.shard), routes

    def _deal(self, contexts, owner, shards, places, keys, limits, sampling) -> tuple[Any, decode.Job, int, int]:
        """Contexts and queues of every shard on the host, how many contexts are prefilled at once, and of how many."""
        local = [np.unique(owner[items]) for items in shards]  # a group that straddles shards is prefilled in both
        rows = _power(max(len(c) for c in local))
        lengths: Any = np.array([len(c) - 1 for c in contexts], np.int32)  # of what is cached
        columns = min(_power(max(int(lengths.max()), MIN_COLUMNS)), self.max_prompt)
        tokens = np.zeros((self._shards, rows, columns), np.int32)
        size = _power(max(len(items) for items in shards))
        pick = np.zeros((self._shards, size), int)  # items of the call; beyond a shard's count never taken
        context: Any = np.zeros((self._shards, size), np.int32)
        place: Any = np.zeros((self._shards, size), np.int32)
        for d, (mine, items) in enumerate(zip(local, shards)):
            for row, c in enumerate(mine):
                tokens[d, row, : lengths[c]] = contexts[c][:-1]
            pick[d, : len(items)] = items
            context[d, : len(items)] = np.searchsorted(mine, owner[items])
            first = np.searchsorted(owner[items], owner[items])  # of the same context
            place[d, : len(items)] = (np.arange(len(items)) - first) % places
        last: Any = np.array([c[-1] for c in contexts], np.int32)
        whose = owner[pick]
        queue = decode.Job(
            context=context,
            place=place,
            length=lengths[whose],
            token=last[whose],
            limit=limits[whose],
            key=keys[pick],
            sampling=jax.tree.map(lambda x: x[whose], sampling),
        )
        return tokens, queue, prefill_batch(rows, columns), max(len(c) for c in local)

    def _loop(self, truncated, size, hook_state, done: Results, shards, slots, pool, queue) -> None:
        """Decode until every shard has emptied its queue; sort logs into completions while the device goes on."""
        total = np.array([len(items) for items in shards], np.int32)
        first = np.array([items[0] if len(items) else 0 for items in shards])
        last = None
        with jax.set_mesh(self.mesh):
            counts = put(total, self._place.shard)
            while True:
                smaller = 0 if self.batch_invariant or size <= MIN_SLOTS else size // 2
                # Alone, a shard may stop as soon as half its slots suffice; with others it would only wait for them.
                shrink_at = smaller if self._shards == 1 else 0
                with self._compiling:
                    slots, log, status = self._run.decode(
                        truncated, self._weights, pool, queue, counts, shrink_at, self._stop_table, hook_state, slots
                    )
                if last is not None:
                    done.add(*last)  # while the device is busy
                live, taken, steps = np.asarray(status).T
                last = (log, steps, first, size)
                if (taken >= total).all():
                    if live.max() == 0:
                        return done.add(*last)
                    if live.max() <= smaller:
                        size = min(smaller, max(MIN_SLOTS, _power(int(live.max()))))
                        with self._compiling:
                            slots, pool, queue = self._run.compact(size, slots), None, None


def _truncated(sampling: Sampling) -> bool:
    """Whether any item leaves out unlikely tokens."""
    return bool((sampling.top_k > 0).any() or (sampling.top_p < 1).any() or (sampling.min_p > 0).any())


def _power(n: int) -> int:
    """The power of two at or above n."""
    return 1 << max(n - 1, 0).bit_length()


def _pad(pieces: Sequence[bytes], vocab: int) -> list[bytes]:
    """Pieces for every row of the vocabulary; rows without a token write nothing."""
    return [*pieces, *[b""] * (vocab - len(pieces))]
