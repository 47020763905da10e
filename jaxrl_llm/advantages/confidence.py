"""How sure a policy was of a text it wrote or read."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


def of_least_likely(logp: Float[Array, "B T"], mask: Bool[Array, "B T"], share: float) -> Float[Array, "B"]:
    """exp of the mean of the smallest log-probs of each row, in (0, 1]: of max(1, ceil(share n)) of its n tokens.

    Near-certain tokens would drown the signal of the others. A row without tokens has 1. ProGRPO, arXiv 2602.05281.
    """
    lengths = np.arange(mask.shape[-1] + 1)
    # The numbers of tokens are exact, whatever the dtype of `logp`: 0.2 * 15 is 3.
    tail = jnp.asarray(np.maximum(1, np.ceil(share * lengths - 1e-9)), jnp.int32)[mask.sum(-1)][:, None]
    smallest = jnp.sort(jnp.where(mask, logp, jnp.inf), axis=-1)
    on = (jnp.arange(mask.shape[-1]) < tail) & jnp.any(mask, -1, keepdims=True)
    return jnp.exp(jnp.where(on, smallest, 0).sum(-1) / tail[:, 0])
