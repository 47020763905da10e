"""Self-attention by JAX's splash kernel (`jax.experimental.pallas.ops.tpu.splash_attention`), for programs for TPUs.

No scores reach main memory, and blocks of keys that no query of a block sees are not run. Never run on a TPU: compiled for
them, and compared with `models.attention` in Pallas's interpreter.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.models.attention import OUT, Attend, LayerInfo
from jaxrl_llm.sharding import rules

LANES = 128  # blocks are a multiple of it, and so are the kernel's statistics of a query
BLOCK = 4 * LANES  # queries, and keys, of a block at most
BITS = 15  # of a position: a query's own and that of the first key it sees share an int32


def instead_of(plain: Attend, segment: Int[Array, "B S"], context: int = 0, slot: int = 0) -> Attend:
    """`plain`, which keeps nothing, with the kernel in its place where it `suits`, the batch divides by the devices it is
    split over, and sequences are not split. For programs for TPUs.

    Args:
      segment: positions see those of their own segment, which is contiguous, up to themselves; 0 is padding.
      context: positions 1 to this many that all others see too, where they are no padding.
      slot: room behind the context that no segment leaves; 0: all of it.
    """

    def either(info: LayerInfo, q: Array, k: Array, v: Array) -> tuple[Array, Any]:
        batch, length, heads, _ = q.shape
        split = {name: rules.ways(name) for name in ("batch", "seq", "heads")}
        window = None if isinstance(info.window, jax.Array) else info.window
        if (
            batch % split["batch"]
            or split["seq"] > 1
            or not suits(length, heads, k.shape[2], split["heads"], window, context, slot)
        ):
            return plain(info, q, k, v)
        return attend(info, q, k, v, segment, context, slot), None

    return either


def suits(length: int, heads: int, kv_heads: int, tp: int, window: int | None, context: int = 0, slot: int = 0) -> bool:
    """Whether the kernel does for sequences of `length`: no more than 2^15 tokens, query and key heads that divide by the
    devices `tp` they are split over, and, behind a `context`, no window narrower than it with a slot. window: None when
    only the running program knows it."""
    narrow = window is None or 0 < window < context + slot
    return length <= 2**BITS and heads % tp == 0 and kv_heads % tp == 0 and not (context and narrow)


def attend(
    info: LayerInfo,
    q: Float[Array, "B S H hd"],
    k: Float[Array, "B S K hd"],
    v: Float[Array, "B S K hd"],
    segment: Int[Array, "B S"],
    context: int = 0,
    slot: int = 0,
    interpret: bool = False,
) -> Float[Array, "B S H hd"]:
    """Attention as `instead_of` describes it. Padding sees padding, so that every softmax has a key.

    interpret: run by Pallas's interpreter, on any device.
    """
    length = q.shape[1]
    q = (q * jnp.asarray(info.scale, jnp.float32)).astype(q.dtype)
    size = -(-length // -(-length // BLOCK))
    size += -size % LANES
    fill = -length % size
    q, k, v, segment = (jnp.pad(x, [(0, 0), (0, fill)] + [(0, 0)] * (x.ndim - 2)) for x in (q, k, v, segment))
    at = jnp.arange(length + fill, dtype=jnp.int32)
    first = jax.lax.cummax(jnp.where(jnp.diff(segment, axis=1, prepend=-1) != 0, at, 0), axis=1)
    reach = info.window if isinstance(info.window, int) else 0
    if not isinstance(info.window, int) or info.window:
        first = jnp.maximum(first, jnp.where(info.window == 0, 0, at - info.window + 1))
    run = partial(_run, Visible(length + fill, context, slot, reach), size, interpret)
    if not jax.sharding.get_abstract_mesh().empty:  # the compiler does not split a kernel
        batch, (heads,) = rules.RULES["batch"], rules.RULES["heads"]
        many, each = PartitionSpec(batch, None, heads, None), PartitionSpec(batch, None)
        run = jax.shard_map(run, in_specs=(many, many, many, each, each), out_specs=many, check_vma=False)
    return run(q, k, v, segment > 0, (first << BITS) | at)[:, :length]


def _run(
    mask: "Visible",
    size: int,
    interpret: bool,
    q: Float[Array, "B S H hd"],
    k: Float[Array, "B S K hd"],
    v: Float[Array, "B S K hd"],
    valid: Bool[Array, "B S"],
    seen: Int[Array, "B S"],
) -> Float[Array, "B S H hd"]:
    """The kernel on one device, in blocks of `size`."""
    blocks = ("block_q", "block_kv", "block_q_dq", "block_kv_dq", "block_q_dkv", "block_kv_dkv")
    kernel: Any = splash_attention_kernel.make_splash_mha_single_device(
        splash_attention_mask.MultiHeadMask([mask] * q.shape[2]),
        block_sizes=splash_attention_kernel.BlockSizes(**dict.fromkeys(blocks, size)),
        residual_checkpoint_name=OUT,
        interpret=interpret,
    )
    infos, settings = kernel.tree_flatten()

    def one(q: Array, k: Array, v: Array, valid: Array, seen: Array) -> Any:
        told = [info._replace(q_sequence=seen) for info in infos]
        own = splash_attention_kernel.SplashAttentionKernel(*told, **settings)
        return own(q, k, v, splash_attention_kernel.SegmentIds(valid, valid))

    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return jax.vmap(one)(q, k, v, valid.astype(jnp.int32), seen).swapaxes(1, 2)


class Visible(splash_attention_mask.Mask):
    """Query i sees keys j <= i of the first `context` ones, and from its own first key on.

    The kernel is told i and the first key while it runs, for each sequence (`q_sequence`, both in one number). What is known
    before says which blocks of keys are never run: a query sees none more than `reach` back, nor before its slot.
    """

    def __init__(self, length: int, context: int, slot: int, reach: int):
        self.known = (length, context, slot, reach)
        self.q_sequence = np.arange(length, dtype=np.int32)  # of the right shape; `_run` has the numbers

    @property
    def shape(self) -> tuple[int, ...]:
        return self.known[0], self.known[0]

    def __getitem__(self, idx: tuple[slice, slice]) -> np.ndarray:
        length, context, slot, reach = self.known
        i, j = np.arange(length)[idx[0], None], np.arange(length)[None, idx[1]]
        first = i - reach + 1 if reach else np.zeros_like(i)
        if slot:
            first = np.where(i < context, first, context + (i - context) // slot * slot)
        return (j <= i) & ((j < context) | (j >= first))

    def mask_function(self, seen: Array, j: Array) -> Array:
        i, first = seen & (2**BITS - 1), seen >> BITS
        return (j <= i) & ((j < self.known[1]) | (j >= first))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Visible) and self.known == other.known

    def __hash__(self) -> int:
        return hash(self.known)
