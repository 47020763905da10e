"""Optimizers from config: one optax chain for each trainable."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from jaxrl_llm import config
from jaxrl_llm.types import Params


def schedule(optimizer: config.Optimizer, total_steps: int | None) -> optax.Schedule:
    """Learning rate at a number of applied updates: linear warm-up to `lr`, then `schedule` down to `final` of it.

    total_steps: where the schedule ends when the config's `total` is none; None: not known ahead.
    Raises ValueError when the end of a schedule that falls is not known, or warm-up leaves no room for it.
    """
    total = total_steps if optimizer.total is None else optimizer.total
    warm, peak, rest = optimizer.warmup, optimizer.lr, (total or 0) - optimizer.warmup
    if optimizer.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif total is None:
        raise ValueError(
            f"optimizer.schedule={optimizer.schedule}: the method takes a number of optimizer steps that is not known "
            "ahead, expected that number as optimizer.total, or schedule constant"
        )
    elif rest <= 0:
        raise ValueError(f"optimizer.warmup={warm}: expected fewer than the {total} optimizer steps of the schedule")
    elif optimizer.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=optimizer.final)
    else:
        after = optax.linear_schedule(peak, peak * optimizer.final, rest)
    if warm == 0:
        return after
    # The first update already moves: step i of warm-up has rate peak * (i + 1) / warm.
    up = optax.linear_schedule(peak / warm, peak, max(warm - 1, 1))
    return optax.join_schedules([up, after], [warm])


def matrices(params: Params) -> Params:
    """Which leaves weight decay applies to: matrices, not norms, biases or other vectors.

    Decoder layers are stacked on a leading axis, so inside `layers` a vector per layer has two axes; a bias of heads has
    one more.
    """

    def is_matrix(path: tuple, leaf: Array) -> bool:
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        return jnp.ndim(leaf) - ("layers" in names) >= 2 and not str(names[-1]).endswith("bias")

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def make(optimizer: config.Optimizer, total_steps: int | None) -> optax.GradientTransformation:
    """Clip by global norm, AdamW (decoupled decay on matrices only, arXiv 1711.05101) or SGD, at the scheduled rate."""
    rate = schedule(optimizer, total_steps)
    clip = optax.clip_by_global_norm(optimizer.clip_norm) if optimizer.clip_norm else optax.identity()
    if optimizer.name == "adamw":
        scale = optax.scale_by_adam(optimizer.b1, optimizer.b2, optimizer.eps, mu_dtype=optimizer.moment_dtype)
    else:
        scale = optax.identity()
    decay = optax.add_decayed_weights(optimizer.weight_decay, matrices) if optimizer.weight_decay else optax.identity()
    return optax.chain(clip, scale, decay, optax.scale_by_learning_rate(rate))


def wide(tree: Params) -> Params:
    """Leaves in at least float32: what gradients are accumulated in and optimizers compute in."""
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def init(tx: optax.GradientTransformation, params: Params) -> optax.OptState:
    """Optimizer state whose moments have at least float32 whatever the dtype of the master parameters."""
    return tx.init(wide(params))


def apply(
    tx: optax.GradientTransformation,
    grads: Params,
    opt: optax.OptState,
    params: Params,
    on: Bool[Array, ""] | Params,
    rate: float | Float[Array, ""] = 1.0,
) -> tuple[Params, optax.OptState]:
    """One update; where `on` is False both trees come back bitwise as they were (no decay, no momentum).

    on: also a tree of masks that broadcast against `params`; counters go on where any of it is True.
    rate: factor of the learning rate.
    """
    updates, new_opt = tx.update(grads, opt, wide(params))
    rate = jnp.asarray(rate)  # the last of the chain is the learning rate, so the update is proportional to it
    new_params = jax.tree.map(
        lambda p, u: (p.astype(u.dtype) + rate.astype(u.dtype) * u).astype(p.dtype), params, updates
    )
    masks = on if isinstance(on, dict) else jax.tree.map(lambda _: on, params)
    moments = optax.tree.map_params(
        tx, lambda _, mask: mask, opt, masks, transform_non_params=lambda _: somewhere(masks)
    )
    return jax.tree.map(jnp.where, masks, new_params, params), jax.tree.map(jnp.where, moments, new_opt, opt)


def somewhere(masks: Params) -> Bool[Array, ""]:
    """Whether any entry of a tree of masks is True."""
    return jnp.any(jnp.stack([jnp.any(mask) for mask in jax.tree.leaves(masks)]))
