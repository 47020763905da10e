"""What the learner trains and a checkpoint keeps: parameters by label, optimizer states, counters."""

from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, Int

from jaxrl_llm.types import Params

POLICY, CRITIC = "policy", "critic"  # labels of trainables


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """A pytree of arrays. Trees by label have the keys "policy" and, with a value model, "critic"."""

    params: dict[str, Params]
    opt: dict[str, Any]
    count: dict[str, Int[Array, ""]]  # updates applied to each label; learning rates are read at it
    skipped: Int[Array, ""]  # updates not applied because the loss or a gradient was not finite
    skipped_in_row: Int[Array, ""]  # of these, since the last applied one
    reference: Params | None = None  # frozen policy; numpy arrays when it lives on the host
