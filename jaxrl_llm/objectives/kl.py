"""Per-token estimators of KL(pi || ref) from sampled tokens, as loss terms. With d = logp - ref_logp (Schulman, 2020):

| kind | value           | mean gradient, samples from pi                 | unbiased gradient of KL(pi || ref)? |
|------|-----------------|------------------------------------------------|-------------------------------------|
| k1   | d               | 0                                              | no: it does nothing on average      |
| k2   | d^2 / 2         | E[d grad logp]                                 | yes (but the value is biased)       |
| k3   | exp(-d) - 1 + d | -E_ref[grad logp] = grad KL(ref || pi)         | no: the gradient of the other KL    |
| k1+  | k1              | k2's, by a straight-through term               | yes                                 |
| k3+  | k3              | k2's, by a straight-through term               | yes                                 |

When the samples come from an older policy, all gradients are biased unless `ratio` = pi / pi_old is given; then all five
are unbiased (k1 and k3 because the gradient also flows through the ratio, the others because it is held constant).
These statements are about the distribution of one token given its prefix; how earlier tokens change later prefixes is
left out, as everywhere in this field.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Kind = Literal["k1", "k2", "k3", "k1+", "k3+"]
KINDS = get_args(Kind)


def estimate(
    kind: Kind,
    logp: Float[Array, "B T"],
    ref_logp: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    ratio: Float[Array, "B T"] | None = None,
) -> Float[Array, "B T"]:
    """Token KL of the given kind, 0 where masked; multiplied by `ratio` when given (TRL's bias correction for k3)."""
    stop = jax.lax.stop_gradient
    d = jnp.where(mask, logp - ref_logp, 0)
    k1, k2, k3 = d, d**2 / 2, jnp.expm1(-d) + d
    if kind == "k1":
        value = k1
    elif kind == "k2":
        value = k2
    elif kind == "k3":
        value = k3
    elif kind == "k1+":
        value = k2 - stop(k2) + stop(k1)
    elif kind == "k3+":
        value = k2 - stop(k2) + stop(k3)
    else:
        raise ValueError(f"kl={kind!r}: expected one of {', '.join(KINDS)}")
    if ratio is None:
        return value
    # k1 and k3 are unbiased as values, so differentiating E_old[r k] is right; k2's gradient is right only at constant r.
    return jnp.where(mask, ratio if kind in ("k1", "k3") else stop(ratio), 0) * value
