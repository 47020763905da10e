"""From logical axis names to mesh axes: the one table, and what it says of parameters, batches and activations."""

import logging
import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

Axes = tuple[str | None, ...]  # logical names of an array's dimensions; None is never sharded

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("dp", "fsdp"),
    "seq": ("sp",),
    "stream": ("sp", "tp"),  # positions of the residual stream between layers, where nothing else is split over tp
    "vocab": ("tp",),
    "embed": ("fsdp",),
    "heads": ("tp",),
    "kv_heads": ("tp",),
    "mlp": ("tp",),
    "experts": ("ep",),
    "layers": (),
}

logger = logging.getLogger(__name__)


def partition(axes: Axes, shape: tuple[int, ...], sizes: dict[str, int]) -> tuple[PartitionSpec, list[str]]:
    """Mesh axes of an array with logical `axes`, and the logical names dropped because they do not divide `shape`.

    Raises:
      ValueError: rank mismatch, an unknown name, or two dimensions on one mesh axis.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{len(axes)} axis names {axes} for an array of shape {shape}")
    if unknown := [a for a in axes if a is not None and a not in RULES]:
        raise ValueError(f"{unknown[0]!r} is not a logical axis, expected one of {', '.join(RULES)}")
    spec, dropped, seen = [], [], set()
    for name, n in zip(axes, shape):
        mesh_axes = tuple(a for a in RULES[name] if sizes.get(a, 1) > 1) if name is not None else ()
        if mesh_axes and n % math.prod(sizes[a] for a in mesh_axes):
            dropped.append(str(name))
            mesh_axes = ()
        if seen & set(mesh_axes):
            raise ValueError(f"two dimensions of {axes} map to the mesh axis {(seen & set(mesh_axes)).pop()!r}")
        seen |= set(mesh_axes)
        spec.append(None if not mesh_axes else mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes)
    return PartitionSpec(*spec), dropped


def shardings(logical_axes: Any, shapes: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every leaf of a tree of arrays (or ShapeDtypeStructs) with a like tree of logical axes.

    An axis that does not divide a dimension (kv heads under tensor parallelism, an odd vocabulary) is dropped for that
    array, which is then replicated over it; one warning lists them all.
    """
    dropped: list[str] = []

    def one(path: Any, leaf: Any, axes: Axes) -> NamedSharding:
        spec, lost = partition(axes, leaf.shape, dict(mesh.shape))
        dropped.extend(f"{jax.tree_util.keystr(path, simple=True, separator='.')}.{a}" for a in lost)
        return NamedSharding(mesh, spec)

    tree = jax.tree_util.tree_map_with_path(one, shapes, logical_axes)
    if dropped:
        logger.warning("replicated, because the mesh %s does not divide them: %s", dict(mesh.shape), ", ".join(dropped))
    return tree


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading dimension over dp and fsdp."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def constrain(x: Array, *axes: str | None) -> Array:
    """Pin an activation to the current mesh (`jax.set_mesh`) by logical names; nothing without a mesh.

    Inside `jax.shard_map` only the mesh axes left to the compiler are pinned.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition(axes, x.shape, _managed())[0])


def ways(*axes: str) -> int:
    """How many shards the compiler makes of these logical axes together on the current mesh; 1 without a mesh."""
    sizes = _managed()
    return math.prod(sizes.get(a, 1) for name in axes for a in RULES[name])


def _managed() -> dict[str, int]:
    """Sizes of the current mesh's axes that are not split by hand (`jax.shard_map`)."""
    mesh = jax.sharding.get_abstract_mesh()
    return {a: n for a, n in mesh.shape.items() if a not in mesh.manual_axes}
