"""The device side of generation: prefill of contexts, and a decode loop that feeds itself from a queue of items.

A context is stored without its last token, which is the first input of every item sampled from it: an item of n tokens
takes n steps of a slot and needs at most `max_new` cache columns. All slots write step `clock` into the same cache column
`clock % max_new`; a slot that took an item `age` steps ago sees the newest `age + 1` columns. So a refill resets one
number, nothing is ever moved, and a write is one slice, not a scatter.

Slots that continue one context read it together: a lane holds a context, and has places for the queries of as many slots.
Every item knows its place; the item in place 0 opens a lane, which is free again when none of its items is live or waiting.
With long prompts this is most of what a step reads.

Keys are stored `[.., hd, columns]`: queries times keys is then a plain row-major matrix product (twice as fast on CPU).

Letters: S slots, N items in the queue, P contexts, L context columns, T own columns (max_new), W lanes, G places of a lane,
K key/value heads, R query heads per key/value head, hd head width, V vocabulary, C steps between two looks of the host,
M layers with experts, k experts of a token.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

from jaxrl_llm.algorithms.base import SamplerHook
from jaxrl_llm.models import decoder
from jaxrl_llm.models.attention import LayerInfo, accumulator, causal
from jaxrl_llm.models.experts import ROUTE
from jaxrl_llm.models.products import PLAIN, SUMS, TURNED, project_turned, turn
from jaxrl_llm.models.spec import ModelSpec
from jaxrl_llm.rollout.lanes import Cache, joined
from jaxrl_llm.rollout.sampling import Sampling, choose, uniforms
from jaxrl_llm.sharding.rules import constrain
from jaxrl_llm.types import Params

GOING, ON_TOKEN, ON_STRING, ON_LENGTH = range(4)  # why an item stopped


class Settings(NamedTuple):
    """What a compiled decode program is made for."""

    spec: ModelSpec
    dtype: Any
    max_new: int
    chunk: int
    eos_ids: tuple[int, ...]
    score_temperature: float
    hook: SamplerHook | None
    lockstep: tuple[str, ...]  # mesh axes whose shards take the same number of steps
    record: bool  # keep the experts that tokens go to
    turned: bool  # weights of products have outputs as rows (`products.turn`); of a tied embedding there is one copy


class Job(NamedTuple):
    """An item of the queue [N], or what a slot works on [S]."""

    context: Int[Array, "N"]  # row of the pool
    place: Int[Array, "N"]  # within its lane; items of a lane follow each other, from place 0
    length: Int[Array, "N"]  # cached context tokens
    token: Int[Array, "N"]  # the context's last token, the first input
    limit: Int[Array, "N"]  # most new tokens, at least 1
    key: UInt[Array, "N 2"]
    sampling: Sampling


class Slots(NamedTuple):
    """State of the decode loop; donated from call to call."""

    clock: Int[Array, ""]  # steps done
    next: Int[Array, ""]  # first item of the queue not yet taken
    item: Int[Array, "S"]  # -1: idle
    age: Int[Array, "S"]  # tokens generated for the item
    token: Int[Array, "S"]  # next input
    stop: Int[Array, "S"]  # state of the stop-string automaton
    job: Job
    lane: Int[Array, "S"]
    open: Int[Array, ""]  # lane of the item taken last
    occupant: Int[Array, "W G"]  # the slot that last took this place; what it reads there matters only while it has it
    context: tuple[Cache, ...]  # per layer, of every lane
    own: tuple[Cache, ...]  # per layer


class Log(NamedTuple):
    """What every step produced; the host sorts it into completions. Row i is meaningful where item >= 0."""

    item: Int[Array, "C S"]
    age: Int[Array, "C S"]
    token: Int[Array, "C S"]
    reason: Int[Array, "C S"]
    sampler_logp: Float[Array, "C S"]
    policy_logp: Float[Array, "C S"]
    margin: Float[Array, "C S"]
    routes: Int[Array, "C S M k"] | None = None  # experts the step's input went to, where they are recorded


def prepare(spec: ModelSpec, dtype: Any, turned: bool, params: Params) -> Params:
    """Parameters outside the layers as the decode loop wants them: in its dtype, the output matrix row-major."""
    out = {"embed": params["embed"], "norm": params["norm"]}
    if not (turned and spec.tied):
        unembed = decoder.unembed(spec, params)
        out["unembed"] = turn(unembed, 1) if turned else unembed
    return jax.tree.map(lambda w: w.astype(dtype), out)


def prepare_layer(dtype: Any, turned: bool, layers: Params, at: Int[Array, ""], alike: Int[Array, ""]) -> Params:
    """Parameters of one layer as the decode loop wants them, of the stacks that layers like it have a part in: layer `at`,
    with `alike` of its kind, experts or an MLP, before it.

    A program for each layer: where they are gathered, one program for all would hold every layer twice.
    """

    def cut(name: str, part: Params) -> Params:
        index = alike if name in (*decoder.DENSE, decoder.EXPERTS) else at
        own = jax.tree.map(lambda w: lax.dynamic_index_in_dim(w, index, keepdims=False).astype(dtype), part)
        return turn(own, SUMS[name]) if turned and name in SUMS else own

    return {name: cut(name, part) for name, part in layers.items()}


def prefill(
    spec: ModelSpec,
    dtype: Any,
    record: bool,
    batch: int,
    params: Params,
    tokens: Int[Array, "D P L"],
    count: Int[Array, ""],
) -> tuple[tuple[Cache, ...], Int[Array, "D P L M k"] | None]:
    """Keys and values of the first `count` contexts of each of D shards, `batch` contexts of a shard at a time; and, to
    `record`, the experts their tokens went to.

    Contexts are right-padded: with causal attention no cached token sees padding, and the mask of the decode loop ends
    at the context's length.
    """
    shards, contexts, length = tokens.shape
    shape = (shards, contexts, spec.kv_heads)
    pool = tuple(
        Cache(jnp.zeros((*shape, spec.head_dim, length), dtype), jnp.zeros((*shape, length, spec.head_dim), dtype))
        for _ in range(spec.layers)
    )
    routes = jnp.zeros((*tokens.shape, *spec.routes), ROUTE) if record else None

    def some(i: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        part = lax.dynamic_slice_in_dim(tokens, i * batch, batch, 1).reshape(shards * batch, length)
        positions = jnp.broadcast_to(jnp.arange(length), part.shape)
        _, kept = decoder.forward(spec, params, part, positions, causal(keep_kv=True), dtype=dtype)
        k, v = kept.attend
        k = k.transpose(0, 1, 3, 4, 2).reshape(spec.layers, shards, batch, *pool[0].k.shape[2:])
        v = v.transpose(0, 1, 3, 2, 4).reshape(spec.layers, shards, batch, *pool[0].v.shape[2:])
        new = tuple(Cache(k[n], v[n]) for n in range(spec.layers)), None
        if record:
            went = jnp.moveaxis(kept.routes, 0, 2)  # type: ignore[arg-type]
            new = new[0], went.reshape(shards, batch, *went.shape[1:])
        return jax.tree.map(lambda old, x: lax.dynamic_update_slice_in_dim(old, x, i * batch, 1), carry, new)

    return lax.fori_loop(0, -(-count // batch), some, (pool, routes))


def idle_slots(
    spec: ModelSpec, dtype: Any, size: int, lanes: tuple[int, int], max_new: int, length: int, queue: Job
) -> Slots:
    """`size` slots before the first step. `lanes`: how many, and places of each; with room for `length` cached tokens."""

    def caches(rows: int, columns: int) -> tuple[Cache, ...]:
        k = jnp.zeros((rows, spec.kv_heads, spec.head_dim, columns), dtype)
        return tuple(Cache(k, k.swapaxes(2, 3)) for _ in range(spec.layers))

    zero, zeros = jnp.zeros((), jnp.int32), jnp.zeros(size, jnp.int32)
    return Slots(
        clock=zero,
        next=zero,
        item=zeros - 1,
        age=zeros,
        token=zeros,
        stop=zeros,
        job=jax.tree.map(lambda x: jnp.broadcast_to(x[:1], (size, *x.shape[1:])), queue),  # idle, but like the others
        lane=zeros,
        open=zero,
        occupant=jnp.zeros(lanes, jnp.int32),
        context=caches(lanes[0], length),
        own=caches(size, max_new),
    )


def decode(
    settings: Settings,
    truncated: bool,
    weights: Params,
    pool: tuple[Cache, ...] | None,
    queue: Job | None,
    count: Int[Array, ""],
    shrink_at: Int[Array, ""],
    stop_table: Int[Array, "states V"] | None,
    hook_state: Any,
    slots: Slots,
) -> tuple[Slots, Log, Int[Array, "3"]]:
    """Decode until the log is full, or the queue is empty and at most `shrink_at` slots are live.

    Without `pool` and `queue`, whose `count` items are all taken, the program is the same for any number of contexts and
    items. With `settings.lockstep` a shard goes on idly until the others are done, too.

    Returns: the slots, the log, and (live slots, items taken, steps done in this call).
    """
    size = slots.item.shape[0]
    ints, floats = jnp.zeros((settings.chunk, size), jnp.int32), jnp.zeros((settings.chunk, size), jnp.float32)
    routes = jnp.zeros((*ints.shape, *settings.spec.routes), ROUTE) if settings.record else None
    log = Log(ints - 1, ints, ints, ints, floats, floats, floats, routes)

    def busy(slots: Slots) -> Bool[Array, ""]:
        mine = (slots.next < count) | (jnp.sum(slots.item >= 0) > shrink_at)
        return lax.psum(mine.astype(jnp.int32), settings.lockstep) > 0 if settings.lockstep else mine

    def going(carry: tuple[Slots, Log, Array, Array]) -> Bool[Array, ""]:
        _, _, steps, more = carry
        return more & (steps < settings.chunk)

    def body(carry: tuple[Slots, Log, Array, Array]) -> tuple[Slots, Log, Array, Array]:
        slots, log, steps, _ = carry
        if pool is not None and queue is not None:
            slots = refill(pool, queue, count, slots)
        slots, row = step(settings, truncated, weights, stop_table, hook_state, slots)
        log = jax.tree.map(lambda x, r: lax.dynamic_update_slice_in_dim(x, r[None].astype(x.dtype), steps, 0), log, row)
        return slots, log, steps + 1, busy(slots)

    slots, log, steps, _ = lax.while_loop(going, body, (slots, log, jnp.zeros((), jnp.int32), busy(slots)))
    return slots, log, jnp.stack([jnp.sum(slots.item >= 0), slots.next, steps]).astype(jnp.int32)


def refill(pool: tuple[Cache, ...], queue: Job, count: Int[Array, ""], slots: Slots) -> Slots:
    """Idle slots take the next items of the queue, as far as there are lanes; a new lane gets its context's cache."""
    lanes, last = slots.occupant.shape[0], queue.token.shape[0] - 1
    idle = slots.item < 0
    new = slots.next + jnp.cumsum(idle, dtype=jnp.int32) - 1
    mine = jax.tree.map(lambda q: q[jnp.minimum(new, last)], queue)
    wanted = idle & (new < count)
    opening = jnp.cumsum(wanted & (mine.place == 0), dtype=jnp.int32)  # lanes opened up to and with this slot
    held = jnp.zeros(lanes, bool).at[jnp.where(idle, lanes, slots.lane)].set(True, mode="drop")
    to_come = queue.place[jnp.minimum(slots.next, last)] > 0
    held = held.at[slots.open].set(held[slots.open] | to_come)
    (free,) = jnp.nonzero(~held, size=lanes, fill_value=0)
    take = wanted & (opening <= jnp.sum(~held))
    taken = jnp.sum(take, dtype=jnp.int32)

    job = jax.tree.map(lambda a, b: jnp.where(take.reshape(-1, *[1] * (a.ndim - 1)), a, b), mine, slots.job)
    lane = jnp.where(opening > 0, free[jnp.clip(opening - 1, 0, lanes - 1)], slots.open).astype(jnp.int32)
    lane = jnp.where(take, lane, slots.lane)
    opens = take & (mine.place == 0)
    (openers,) = jnp.nonzero(opens, size=opens.shape[0], fill_value=0)

    def load(i: Array, context: tuple[Cache, ...]) -> tuple[Cache, ...]:
        to, source = lane[openers[i]], job.context[openers[i]]
        return jax.tree.map(
            lambda kept, all_: lax.dynamic_update_slice_in_dim(kept, lax.dynamic_slice_in_dim(all_, source, 1), to, 0),
            context,
            pool,
        )

    slot = jnp.arange(idle.shape[0], dtype=jnp.int32)
    return slots._replace(
        next=slots.next + taken,
        item=jnp.where(take, new, slots.item),
        age=jnp.where(take, 0, slots.age),
        token=jnp.where(take, job.token, slots.token),
        stop=jnp.where(take, 0, slots.stop),
        job=job,
        lane=lane,
        open=jnp.where(taken > 0, lane[jnp.argmax(jnp.where(take, new, -1))], slots.open),
        occupant=slots.occupant.at[jnp.where(take, lane, lanes), job.place].set(slot, mode="drop"),
        context=lax.fori_loop(0, jnp.sum(opens), load, slots.context),
    )


def step(
    settings: Settings,
    truncated: bool,
    weights: Params,
    stop_table: Int[Array, "states V"] | None,
    hook_state: Any,
    slots: Slots,
) -> tuple[Slots, Log]:
    """One token for every slot; idle slots compute along and are ignored."""
    job, live = slots.job, slots.item >= 0
    logits, own, routes = token_logits(settings, weights, slots)
    sampling = job.sampling
    if settings.hook is not None:
        sampling = sampling._replace(temperature=settings.hook(logits, sampling.temperature, hook_state))
    choice = choose(
        logits,
        uniforms(job.key, slots.age),
        sampling,
        score_temperature=settings.score_temperature,
        truncated=truncated,
    )
    age = slots.age + live
    reason = jnp.where(age >= job.limit, ON_LENGTH, GOING)
    stop = slots.stop
    if stop_table is not None:
        stop = stop_table[stop, choice.token]
        reason = jnp.where(stop == stop_table.shape[0] - 1, ON_STRING, reason)
    if settings.eos_ids:
        eos = jnp.asarray(settings.eos_ids, jnp.int32)
        reason = jnp.where((choice.token[:, None] == eos).any(-1), ON_TOKEN, reason)
    said = (choice.sampler_logp, choice.policy_logp, choice.margin)
    row = Log(slots.item, slots.age, choice.token, reason, *said, routes if settings.record else None)
    slots = slots._replace(
        clock=slots.clock + 1,
        item=jnp.where(reason == GOING, slots.item, -1),
        age=age,
        token=choice.token,
        stop=stop,
        own=own,
    )
    return slots, row


def token_logits(
    settings: Settings, weights: Params, slots: Slots
) -> tuple[Float[Array, "S V"], tuple[Cache, ...], Int[Array, "S M k"] | None]:
    """Logits after every slot's next input, the own caches with that input added, and the experts it went to."""
    spec, job = settings.spec, slots.job
    position = job.length + slots.age
    columns = slots.own[0].v.shape[2]
    column = slots.clock % columns
    past = (slots.clock - jnp.arange(columns)) % columns  # steps since a column was written
    own_seen = past <= slots.age[:, None]
    at = jnp.arange(slots.context[0].v.shape[2])
    context_seen = at < job.length[slots.occupant][..., None]

    x = decoder.embed(spec, weights, slots.token[:, None], settings.dtype)
    cos, sin = decoder.rope(spec, position[:, None], settings.dtype)
    products = TURNED if settings.turned else PLAIN

    @partial(jax.jit, static_argnums=0)  # layers of a kind are traced and lowered once
    def layer(info: LayerInfo, p: Params, context: Cache, own: Cache, x: Array) -> tuple[Array, decoder.Kept]:
        def attend(info: LayerInfo, q: Array, k: Array, v: Array) -> tuple[Array, Cache]:
            assert isinstance(info.window, int)
            cache = Cache(
                lax.dynamic_update_slice_in_dim(own.k, k[:, 0, :, :, None], column, 3),
                lax.dynamic_update_slice_in_dim(own.v, v[:, 0, :, None], column, 2),
            )
            seen_c, seen_o = context_seen, own_seen
            if info.window:
                seen_c = seen_c & (at > position[slots.occupant][..., None] - info.window)
                seen_o = seen_o & (past < info.window)
            seat = (slots.occupant, slots.lane, job.place)
            return joined(q[:, 0], seat, context, seen_c, cache, seen_o, info.scale)[:, None], cache

        return decoder.block(spec, p, info, x, cos, sin, attend, products=products)

    own: list[Cache] = []
    routes: list[Array] = []
    for info, p, *caches in zip(decoder.layer_infos(spec), weights["layers"], slots.context, slots.own):
        x, kept = layer(info, p, *caches, x)
        own.append(kept.attend)
        routes += [] if kept.routes is None else [kept.routes[:, 0]]
    hidden = decoder.final_norm(spec, weights, x)[:, 0]
    acc = accumulator(settings.dtype)
    if settings.turned:
        logits = project_turned(hidden, weights["embed" if spec.tied else "unembed"], 1, acc)
    else:
        logits = jnp.matmul(hidden, weights["unembed"], preferred_element_type=acc)
    # Whole on every device: shards branch differently when they choose tokens, and must not communicate there.
    return constrain(logits, None, None), tuple(own), jnp.stack(routes, 1) if routes else None


def compact(size: int, slots: Slots) -> Slots:
    """The live slots gathered into `size` (at least as many), the rest idle; each with a lane of its own, as slots left
    over at the end seldom share one."""
    order = jnp.argsort(slots.item < 0, stable=True)[:size]
    at = jnp.arange(size, dtype=jnp.int32)
    per_slot = jax.tree.map(lambda x: x[order], slots._replace(context=(), occupant=(), clock=(), next=(), open=()))
    return per_slot._replace(
        clock=slots.clock,
        next=slots.next,
        job=per_slot.job._replace(place=jnp.zeros_like(at)),
        lane=at,
        open=slots.open,
        occupant=at[:, None],
        context=jax.tree.map(lambda x: x[slots.lane[order]], slots.context),
    )
