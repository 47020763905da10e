"""The engine's device programs, and where their arrays lie.

Items are dealt out over (dp, fsdp): what shards do alone has a leading axis of shards, of which every shard sees only its
own index, dropped.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl_llm.compile_cache import quickly, well
from jaxrl_llm.models import decoder
from jaxrl_llm.models.products import SUMS
from jaxrl_llm.models.spec import ModelSpec
from jaxrl_llm.rollout import decode
from jaxrl_llm.rollout.sampling import item_keys
from jaxrl_llm.sharding import target
from jaxrl_llm.sharding.rules import partition
from jaxrl_llm.types import Params

SHARDED = ("dp", "fsdp")  # mesh axes over which items are dealt out
EVERYWHERE, SHARD = PartitionSpec(), PartitionSpec(SHARDED)


class Placement(NamedTuple):
    """Shardings."""

    everywhere: NamedSharding
    shard: NamedSharding  # of what has a leading axis of shards
    cached: NamedSharding  # of keys and values
    slots: decode.Slots
    weights: Params  # as decoding wants them: over tp only


class Programs(NamedTuple):
    """Compiled on first use."""

    prepare: Any  # decode.prepare
    prepare_layer: dict[bool, Any]  # decode.prepare_layer, of layers with experts (True) and without
    prefill: Any  # decode.prefill
    idle: Any  # decode.idle_slots
    decode: Any  # decode.decode
    compact: Any  # decode.compact
    keys: Any  # sampling.item_keys


def placement(spec: ModelSpec, mesh: Mesh, turned: bool) -> Placement:
    """turned: as in `decode.Settings`."""

    def at(*axes: Any) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*axes))

    sizes = {"tp": mesh.shape["tp"]}
    layout = jax.tree.map(
        lambda leaf, axes: partition(axes, leaf.shape, sizes)[0], decoder.abstract(spec), decoder.logical_axes(spec)
    )

    def own(name: str, axes: PartitionSpec) -> PartitionSpec:
        """Of one layer, what `axes` are of the stack."""
        sums = SUMS.get(name, 0) if turned else 0
        return PartitionSpec(*axes[1 + sums :], *axes[1 : 1 + sums])

    one_by_one = [decoder.own_parts(spec, layout["layers"], i) for i in range(spec.layers)]
    weights = {
        "embed": layout["embed"],
        "norm": layout["norm"],
        "layers": [{name: jax.tree.map(partial(own, name), s) for name, s in p.items()} for p in one_by_one],
    }
    if not (turned and spec.tied):
        rows = PartitionSpec(*layout["embed"][::-1]) if spec.tied else layout["unembed"]
        weights["unembed"] = PartitionSpec(*rows[::-1]) if turned else rows
    # Whole caches on every device of tp would be gathered after every call.
    cached = at(SHARDED, None, "tp" if spec.kv_heads % sizes["tp"] == 0 else None)
    shard_of_each: Any = [at(SHARDED)] * len(decode.Slots._fields)
    slots = decode.Slots(*shard_of_each)._replace(context=cached, own=cached)  # type: ignore[arg-type]
    return Placement(at(), at(SHARDED), cached, slots, jax.tree.map(lambda s: NamedSharding(mesh, s), weights))


def make(settings: decode.Settings, mesh: Mesh, place: Placement, on_compile: Callable[[], None]) -> Programs:
    """The programs of one engine. `on_compile` is called for each that is compiled."""
    spec = settings.spec

    def counted(f: Callable, name: str) -> Callable:
        def traced(*args):
            on_compile()  # the body runs once per compiled program
            return f(*args)

        traced.__name__ = name  # what profiles and logs of compilations show
        return traced

    def per_shard(f: Callable, in_specs: tuple) -> Callable:
        def local(*args):
            args = [jax.tree.map(lambda x: x[0], a) if s == SHARD else a for a, s in zip(args, in_specs)]
            return jax.tree.map(lambda x: x[None], f(*args))

        return jax.shard_map(
            local, mesh=mesh, in_specs=in_specs, out_specs=SHARD, axis_names=set(SHARDED), check_vma=False
        )

    def prefill(batch, params, tokens, count):
        return decode.prefill(spec, settings.dtype, settings.record, batch, params, tokens, count)

    def idle(size, lanes, length, queue):
        f = partial(decode.idle_slots, spec, settings.dtype, size, lanes, settings.max_new, length)
        return per_shard(f, (SHARD,))(queue)

    def decode_(truncated, weights, pool, queue, count, shrink_at, table, hook_state, slots):
        specs = (EVERYWHERE, SHARD, SHARD, SHARD, EVERYWHERE, EVERYWHERE, EVERYWHERE, SHARD)
        f = per_shard(partial(decode.decode, settings, truncated), specs)
        return f(weights, pool, queue, count, shrink_at, table, hook_state, slots)

    def compact(size, slots):
        return per_shard(partial(decode.compact, size), (SHARD,))(slots)

    platform = target.of(mesh).platform
    quick, main = (partial(jax.jit, compiler_options=options(platform)) for options in (quickly, well))
    ends = {name: part for name, part in place.weights.items() if name != "layers"}
    return Programs(
        prepare=quick(
            counted(partial(decode.prepare, spec, settings.dtype, settings.turned), "prepare"), out_shardings=ends
        ),
        prepare_layer={
            kind: quick(
                counted(partial(decode.prepare_layer, settings.dtype, settings.turned), "prepare_layer"),
                out_shardings=place.weights["layers"][spec.sparse.index(kind)],
            )
            for kind in set(spec.sparse)
        },
        prefill=main(counted(prefill, "prefill"), static_argnums=0, out_shardings=(place.cached, place.everywhere)),
        idle=quick(counted(idle, "idle"), static_argnums=(0, 1, 2), out_shardings=place.slots),
        # Every process reads the whole log, so that all of them take the same decisions.
        decode=main(
            counted(decode_, "decode"),
            static_argnums=0,
            donate_argnums=8,
            out_shardings=(place.slots, place.everywhere, place.everywhere),
        ),
        compact=quick(counted(compact, "compact"), static_argnums=0, out_shardings=place.slots),
        keys=quick(counted(item_keys, "item_keys")),
    )
