"""Tokens that right and wrong answers of a prompt share at their beginnings and ends. GTPO, arXiv 2508.03772."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.advantages.group import dense_ids


class Conflicts(NamedTuple):
    leading: Bool[Array, "B T"]  # in the run at the beginning
    trailing: Bool[Array, "B T"]  # in the run at the end


def shared(
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    group: Int[Array, "B"],
    right: Bool[Array, "B"],
    wrong: Bool[Array, "B"],
) -> Bool[Array, "B T"]:
    """Tokens of right and wrong rows that, in the same column, some right and some wrong row of the group has too."""
    b, ids = tokens.shape[0], dense_ids(group)
    active = right | wrong

    def column(token: Int[Array, "B"], on: Bool[Array, "B"]) -> Bool[Array, "B"]:
        on = on & active
        order = jnp.lexsort((token, ids, ~on))
        keys = jnp.stack([token[order], ids[order], on[order].astype(token.dtype)])
        begins = jnp.any(keys[:, 1:] != keys[:, :-1], axis=0)
        equal = jnp.zeros(b, jnp.int32).at[order].set(jnp.cumsum(jnp.pad(begins, (1, 0))).astype(jnp.int32))
        some_right, some_wrong = (
            jax.ops.segment_max((on & kind).astype(jnp.int32), equal, b) for kind in (right, wrong)
        )
        return on & (some_right[equal] > 0) & (some_wrong[equal] > 0)

    return jax.vmap(column, in_axes=1, out_axes=1)(tokens, mask)


def conflicts(
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    group: Int[Array, "B"],
    advantage: Float[Array, "B"],
) -> Conflicts:
    """The longest runs of `shared` tokens from each completion's beginning, and from its last trained token backwards.

    Right rows have advantage > 0, wrong ones < 0; rows with 0 take no part. A token that is not trained ends a run.
    """
    right, wrong = advantage > 0, advantage < 0
    t = mask.shape[1]
    # Column u of the reversed rows is the u-th trained place from the end; the map is its own inverse.
    back = jnp.max(jnp.where(mask, jnp.arange(t), -1), -1, keepdims=True) - jnp.arange(t)
    inside, back = back >= 0, jnp.maximum(back, 0)
    turned = jnp.take_along_axis(tokens, back, 1), inside & jnp.take_along_axis(mask, back, 1)

    def run(tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
        return jnp.cumsum(~shared(tokens, mask, group, right, wrong), -1) == 0

    return Conflicts(run(tokens, mask), inside & jnp.take_along_axis(run(*turned), back, 1))
