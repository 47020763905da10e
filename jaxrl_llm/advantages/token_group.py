"""HAPO's token-level group average (arXiv 2509.16591, part B): every token votes with its row's reward."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.advantages import group as groups


def token_group(
    score: Float[Array, "B"],
    mask: Bool[Array, "B T"],
    group: Int[Array, "B"],
    eps: float = 1e-6,
    cap: float | None = 5.0,
) -> Float[Array, "B T"]:
    """(R_i - mu_g) / (sigma_g + eps) with mean and population std over the tokens of the group, 0 where masked.

    Long rows weigh more, so a group's token advantages sum to 0. A group with some |A| >= `cap` uses the sequence-level
    advantage instead (ddof 1), as in the released code; None never does.
    """
    rows = jnp.any(mask, -1)
    length = jnp.sum(mask, -1).astype(score.dtype)
    score = jnp.where(rows, score, 0)
    ids = groups.dense_ids(group)
    tokens = jnp.maximum(groups.segment(length, ids, rows), 1)
    mean = groups.segment(length * score, ids, rows) / tokens
    deviation = jnp.sqrt(groups.segment(length * (score - mean) ** 2, ids, rows) / tokens)
    advantage = (score - mean) / (deviation + eps)
    flat = groups.statistics(score, group, rows).flat
    advantage = jnp.where(flat, 0, advantage)
    if cap is not None:
        peak = jax.ops.segment_max(jnp.where(rows, jnp.abs(advantage), 0), ids, score.shape[0])[ids]
        advantage = jnp.where(peak >= cap, groups.normalized(score, group, rows), advantage)
    return jnp.where(mask, advantage[:, None], 0)
