"""Small rollouts made from the lists in which specs print their examples."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxrl_llm.algorithms.base import value_and_grad
from jaxrl_llm.types import CURRENT, Credit, Rollouts, Views


def rollouts(
    mask: Any, reward: Any = None, group: Any = None, old_logp: Any = None, extras: dict[str, Any] | None = None
) -> Rollouts:
    """Rows with these masks [B, T], one reward part, everything scored and counted; one context per group."""
    mask = np.asarray(mask, bool)
    b, t = mask.shape
    reward = np.zeros(b) if reward is None else np.asarray(reward, float)
    group = np.zeros(b, np.int32) if group is None else np.asarray(group, np.int32)
    old_logp = np.zeros((b, t)) if old_logp is None else np.asarray(old_logp, float)
    contexts, prompt = np.unique(group, return_inverse=True)
    floats = {k: jnp.asarray(v) for k, v in (extras or {}).items()}
    return Rollouts(
        prompt_tokens=jnp.ones((len(contexts), 2), jnp.int32),
        prompt_length=jnp.full(len(contexts), 2, jnp.int32),
        prompt=jnp.asarray(prompt, jnp.int32),
        group=jnp.asarray(group),
        row_id=jnp.arange(b, dtype=jnp.int32),
        tokens=jnp.ones((b, t), jnp.int32),
        length=jnp.asarray(np.where(mask.any(1), t - mask[:, ::-1].argmax(1), 0), jnp.int32),
        mask=jnp.asarray(mask),
        stat=jnp.ones(b, bool),
        scored=jnp.ones(b, bool),
        reward=jnp.asarray(reward)[:, None],
        truncated=jnp.zeros(b, bool),
        version=jnp.zeros((b, t), jnp.int32),
        sampler_logp=jnp.asarray(old_logp),
        old_logp=jnp.asarray(old_logp),
        source=jnp.full(b, CURRENT, jnp.int32),
        block=jnp.arange(b, dtype=jnp.int32),
        extras=floats,
    )


def credit_of(advantage: Any, rows: Rollouts, **extras: Any) -> Credit:
    """Given advantages, [B] or [B, T], not weighed yet."""
    a = jnp.asarray(advantage, float)
    a = a[:, None] * jnp.ones(rows.mask.shape) if a.ndim == 1 else a
    return Credit(a, extras={k: jnp.asarray(v) for k, v in extras.items()})


def loss_and_grad(alg: Any, rows: Rollouts, logp: Any, credit: Credit | None = None, state: Any = None, **views: Any):
    """Loss and d loss / d logp as a float and a numpy array."""
    seen = Views(logp=jnp.asarray(logp, float), **{k: jnp.asarray(v, float) for k, v in views.items()})
    value, grads = value_and_grad(alg, alg.init() if state is None else state, rows, seen, credit=credit)
    return float(value), np.asarray(grads.logp)
