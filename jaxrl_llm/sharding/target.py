"""What a program is compiled for. The devices of the current mesh decide, not those of this process: programs for TPUs are
compiled on machines that have none, too."""

from typing import NamedTuple

import jax
from jax.sharding import Mesh


class Target(NamedTuple):
    platform: str  # "cpu", "gpu" or "tpu"
    kind: str  # `jax.Device.device_kind`


class Chip(NamedTuple):
    """A TPU chip, one JAX device.

    `memory` is what the compiler lets one program have; the other figures are those of the Cloud TPU documentation, but for the
    network of v5p, which is from "How to Scale Your Model" (Austin et al. 2025).
    """

    kind: str
    memory: int  # bytes
    bandwidth: float  # of its memory, bytes/s
    links: float  # to other chips, bytes/s that all its links together carry one way
    network: float  # to other slices, bytes/s: its share of what the pod has


# By the name in topologies such as "v5e:4x4".
CHIPS = {
    "v5e": Chip("TPU v5 lite", int(15.75 * 2**30), 819e9, 200e9, 3.125e9),
    "v5p": Chip("TPU v5", int(95.74 * 2**30), 2765e9, 600e9, 6.25e9),
    "v6e": Chip("TPU v6 lite", int(31.25 * 2**30), 1600e9, 400e9, 12.5e9),
}
SMALL_DEVICE = 2**34  # bytes of a device that does not tell


def of(mesh: Mesh) -> Target:
    device = mesh.devices.flat[0]
    return Target(device.platform, device.device_kind)


def own() -> Target:
    """This process's devices."""
    device = jax.local_devices()[0]
    return Target(device.platform, device.device_kind)


def current() -> Target:
    """Of the program that is being traced: the devices of the current mesh (`jax.set_mesh`), or this process's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return Target(device.platform, device.device_kind) if device else own()


def memory(target: Target) -> int:
    """Bytes of one device's memory, as far as it is known."""
    for chip in CHIPS.values():
        if chip.kind == target.kind:
            return chip.memory
    stats = jax.local_devices()[0].memory_stats() if own() == target else None
    return (stats or {}).get("bytes_limit", SMALL_DEVICE)
