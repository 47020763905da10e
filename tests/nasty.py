"""`jaxrl_llm.checking.nasty` and what only tests do with its rollouts."""

from typing import Any

import jax
import numpy as np

from jaxrl_llm.checking.nasty import (  # noqa: F401 (tests take all of it from here)
    ROWS,
    L,
    T,
    by_row,
    permute,
    poison,
    poison_views,
    rollouts,
    views,
)
from jaxrl_llm.types import Rollouts

REQUIRED = {  # fields without a usable default
    "bupo": {"layer": 0},  # the models of the tests are low
    "dapo_direct": {"delimiter": (2,)},
    "s_grpo": {"marker": (5,), "inducer": (6, 5)},
    "riskpo": {"bundle": 2},  # of five prompts one has a single answer, so bundles of five have one sample
}


def by_token(tree: Any, mask: np.ndarray) -> Any:
    """The entries of every `[B, T]` array where `mask` holds."""
    return jax.tree.map(lambda x: np.asarray(x)[mask], tree)


def pad(rows: Rollouts, count: int) -> Rollouts:
    """`count` more padding rows, full of NaN."""
    index = np.concatenate([np.arange(len(rows.group)), np.zeros(count, int)])
    padding = np.arange(len(index)) >= len(rows.group)
    out = permute(rows, index)
    return poison(
        out.with_(
            mask=out.mask & ~padding[:, None],
            stat=out.stat & ~padding,
            scored=out.scored & ~padding,
            group=np.where(padding, -100 - np.arange(len(index)), out.group),
            block=np.arange(len(index)),
        ),
        np.nan,
    )
