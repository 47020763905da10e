"""A value model: a decoder without output matrix and a scalar head, in one tree of its own.

`decoder.forward` and the learner's layouts run it like a policy, given `trunk(spec)`; `values` reads its hidden states.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.models import decoder
from jaxrl_llm.models.attention import accumulator
from jaxrl_llm.models.spec import ModelSpec
from jaxrl_llm.types import Params

HEAD = "value"


def trunk(spec: ModelSpec) -> ModelSpec:
    """The spec whose parameters a critic has: that of the policy without an output matrix."""
    return replace(spec, tied=True)


def init(spec: ModelSpec, key: Array, dtype: Any = jnp.float32, policy: Params | None = None) -> Params:
    """A copy of the policy's decoder (random without one) and a zero head, so values start at 0."""
    params = decoder.init(trunk(spec), key, dtype)
    if policy is not None:
        params = {k: jax.tree.map(partial(jnp.array, dtype=dtype), policy[k]) for k in params}
    return {**params, HEAD: {"weight": jnp.zeros(spec.embed, dtype), "bias": jnp.zeros((), dtype)}}


def logical_axes(spec: ModelSpec) -> Params:
    """Like `decoder.logical_axes`."""
    return {**decoder.logical_axes(trunk(spec)), HEAD: {"weight": (None,), "bias": ()}}


def values(params: Params, hidden: Float[Array, "*N D"]) -> Float[Array, "*N"]:
    """Value of each state from its hidden state after the final norm, float32 (float64 for float64 `hidden`).

    The hidden state that predicts a token is the state before that token.
    """
    head = params[HEAD]
    acc = accumulator(hidden.dtype)
    w = head["weight"].astype(hidden.dtype)
    return jnp.einsum("...d,d->...", hidden, w, preferred_element_type=acc) + head["bias"].astype(acc)
