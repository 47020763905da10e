"""The device mesh. All five axes always exist, most of them of size 1, so that sharding rules never change."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from jaxrl_llm import config

AXES = ("dp", "fsdp", "tp", "ep", "sp")  # slowest link first

logger = logging.getLogger(__name__)


def shape_over(sizes: config.Mesh | None, devices: int) -> list[int]:
    """Sizes of dp, fsdp, tp, ep, sp with -1 resolved for a number of devices; None: 1 each.

    Raises:
      ValueError: a 0, more than one -1, or fixed sizes that do not divide the devices.
    """
    shape = [getattr(sizes, a) if sizes else 1 for a in AXES]
    if bad := [a for a, n in zip(AXES, shape) if n == 0]:
        raise ValueError(f"mesh.{bad[0]}: 0, expected -1 or at least 1")
    free = [i for i, n in enumerate(shape) if n == -1]
    if len(free) > 1:
        raise ValueError(f"mesh: {' and '.join(AXES[i] for i in free)} are both -1, expected at most one")
    fixed = math.prod(n for n in shape if n != -1)
    if free:
        shape[free[0]] = devices // fixed
        if fixed * shape[free[0]] != devices:
            raise ValueError(f"mesh.{AXES[free[0]]}: -1, but the other sizes ({fixed}) do not divide {devices} devices")
    return shape


def make_mesh(sizes: config.Mesh | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with axes dp, fsdp, tp, ep, sp over `devices` (all of them by default); None: one device.

    A size of -1 takes the devices the others leave. Fewer devices than there are is allowed in a single process. Where the
    devices are in several slices, dp goes across them and the other axes stay inside.

    Raises:
      ValueError: more than one -1, or sizes that do not fit the devices or their slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = shape_over(sizes, len(devices))
    used = math.prod(shape)
    if used > len(devices) or (used < len(devices) and jax.process_count() > 1):
        raise ValueError(
            f"mesh: {' x '.join(f'{a}={n}' for a, n in zip(AXES, shape))} needs {used} devices, there are {len(devices)}"
        )
    if sizes and used < len(devices):
        logger.warning("the mesh uses %d of %d devices", used, len(devices))
    slices = len({getattr(d, "slice_index", 0) for d in devices[:used]})
    if shape[0] % slices:
        raise ValueError(f"mesh.dp={shape[0]}: the devices are in {slices} slices, expected a multiple of that")
    inside = (shape[0] // slices, *shape[1:])
    # `jax.make_mesh` refuses an axis that is neither a side of a TPU slice nor several whole ones, such as tp 2 on 4 x 4.
    if slices == 1:
        grid = mesh_utils.create_device_mesh(inside, devices[:used], allow_split_physical_axes=True)
    else:
        across = (slices, *[1] * (len(AXES) - 1))
        grid = mesh_utils.create_hybrid_device_mesh(inside, across, devices[:used], allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
