"""Losses on plain arrays, written as a stranger would, in NumPy, JAX and torch, with the mistakes people make as arguments."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import torch


def group_advantage(reward, group, ddof=1, eps=1e-6, std="group", mean="group", inside=False, bare=False):
    """(R - mean) / (std + eps) by group; 0 for one alone and where all agree, unless `bare`."""
    same = group[:, None] == group
    n = same.sum(1)
    center = same @ reward / n
    var = (same * (reward - center[:, None]) ** 2).sum(1) / (n - ddof if bare else np.maximum(n - ddof, 1))
    top = reward - (center if mean == "group" else 0)
    if std == "none":
        return top
    bottom = reward.std(ddof=ddof) if std == "batch" else np.sqrt(var)
    advantage = top / (np.sqrt(var + eps) if inside else bottom + eps)
    return advantage if bare else np.where(var > 0, advantage, 0)


def aggregate(token_loss, mask, how):
    total, count = np.where(mask, token_loss, 0).sum(1), mask.sum(1)
    means, full = total / np.maximum(count, 1), np.maximum((count > 0).sum(), 1)
    return {
        "token-mean": total.sum() / np.maximum(mask.sum(), 1),
        "row means": means.sum() / full,
        "row means, empty rows too": means.mean(),
        "row sums": total.sum() / full,
        "sum": total.sum(),
        "all positions": np.where(mask, token_loss, 0).mean(),
    }[how]


def surrogate(ratio, advantage, low, high, rule="min"):
    clipped = np.clip(ratio, 1 - low, 1 + high)
    if rule == "clip only":
        return -clipped * advantage
    pick = np.maximum if rule == "max" else np.minimum
    return -pick(ratio * advantage, clipped * advantage)


def clipped_loss(
    logp,
    old_logp,
    mask,
    reward,
    group,
    *,
    low,
    high,
    how,
    sequence=False,
    rule="min",
    sign=1,
    a_sign=1,
    ignore="",
    **adv,
):
    """GRPO, DAPO and GSPO. ignore: where the mask is forgotten, "all" or "ratio"."""
    mask = np.ones_like(mask) if ignore == "all" else mask
    advantage = a_sign * group_advantage(reward, group, **adv)[:, None]
    log_ratio = np.where(np.ones_like(mask) if ignore == "ratio" else mask, logp - old_logp, 0)
    if sequence:
        n = mask.shape[1] if ignore == "ratio" else np.maximum(mask.sum(1, keepdims=True), 1)
        log_ratio = log_ratio.sum(1, keepdims=True) / n
    token_loss = surrogate(np.exp(log_ratio), advantage, low, high, rule)
    return sign * aggregate(np.broadcast_to(token_loss, mask.shape), mask, how)


SETTINGS = {
    "grpo": {"low": 0.2, "high": 0.2, "how": "row means"},
    "dapo": {"low": 0.2, "high": 0.28, "how": "token-mean"},
    "gspo": {"low": 3e-4, "high": 4e-4, "how": "row means", "sequence": True},
    "sums": {"low": 0.2, "high": 0.2, "how": "row sums"},
}


def _named(wrong, settings):
    def loss(logp, old_logp, mask, reward, group):
        return clipped_loss(logp, old_logp, mask, reward, group, **(settings | wrong))

    return loss


def numpy_loss(name, **wrong):
    """GRPO, DAPO or GSPO in NumPy, with mistakes."""
    return _named(wrong, SETTINGS[name])


grpo, gspo, wrong_grpo = numpy_loss("grpo"), numpy_loss("gspo"), numpy_loss("grpo", ddof=0)


def grpo_jax(logp, old_logp, mask, reward, group, own=False):
    """own: the current log-probs, held constant, stand for the old ones."""
    old_logp = jax.lax.stop_gradient(logp) if own else old_logp
    member = group[:, None] == group[None, :]
    n = member.sum(1)
    mean = (member * reward).sum(1) / n
    var = (member * (reward[None, :] - mean[:, None]) ** 2).sum(1) / jnp.maximum(n - 1, 1)
    a = ((reward - mean) / (jnp.sqrt(var) + 1e-6))[:, None]
    r = jnp.exp(jnp.where(mask, logp - old_logp, 0))
    token = jnp.where(mask, jnp.maximum(-r * a, -jnp.clip(r, 0.8, 1.2) * a), 0)
    rows = token.sum(1) / jnp.maximum(mask.sum(1), 1)
    return rows.sum() / (mask.sum(1) > 0).sum()


def grpo_with_gradient(logp, old_logp, mask, reward, group):
    """The gradient by hand."""
    a = group_advantage(reward, group)[:, None]
    r = np.exp(np.where(mask, logp - old_logp, 0))
    free = mask & ~((r > 1.2) & (a > 0)) & ~((r < 0.8) & (a < 0))
    weight = mask / np.maximum(mask.sum(1, keepdims=True), 1) / (mask.sum(1) > 0).sum()
    return grpo(logp, old_logp, mask, reward, group), np.where(free, -r * a * weight, 0)


def gspo_torch(logp, old_logp, mask, reward, group, detach=False, own=False):
    """detach: the ratio is detached; own: the current log-probs stand for the old ones."""
    a = torch.from_numpy(group_advantage(reward.numpy(), group.numpy()))
    n = mask.sum(1).clamp(min=1)
    log_ratio = torch.where(mask, logp - (logp if own else old_logp), torch.zeros(())).sum(1) / n
    s = torch.exp(log_ratio.detach() if detach else log_ratio)
    rows = -torch.minimum(s * a, s.clamp(1 - 3e-4, 1 + 4e-4) * a)
    filled = mask.any(1)
    return rows[filled].sum() / filled.sum()


gspo_torch_detached, gspo_torch_own = partial(gspo_torch, detach=True), partial(gspo_torch, own=True)


def cispo_jax(logp, old_logp, mask, reward, group, hold=jax.lax.stop_gradient):
    a = jnp.asarray(group_advantage(np.asarray(reward), np.asarray(group)))[:, None]
    ratio = hold(jnp.exp(jnp.where(mask, logp - old_logp, 0)))
    token = -jnp.minimum(ratio, 5.0) * a * jnp.where(mask, logp, 0)
    return token.sum() / mask.sum()


def ppo_torch(
    logp,
    old_logp,
    mask,
    reward,
    values,
    old_values,
    ref_logp,
    *,
    leak=False,
    how="token-mean",
    sign=1,
    low=0.2,
    ddof=1,
    value_gradient=True,
    ignore=False,
):
    """PPO with a critic. leak: advantages from the current values, not detached; ignore: every token counts."""
    mask = torch.ones_like(mask) if ignore else mask
    baseline = values if leak else old_values
    advantage = torch.zeros_like(logp)
    for b in range(len(mask)):
        at = torch.nonzero(mask[b])[:, 0].tolist()
        following, later = 0.0, 0.0
        for t in reversed(at):
            step = -0.001 * (old_logp[b, t] - ref_logp[b, t]) + (reward[b] if t == at[-1] else 0.0)
            later = step + following - baseline[b, t] + 0.95 * later
            following = baseline[b, t]
            advantage = advantage.index_put((torch.tensor(b), torch.tensor(t)), later)
    returns = (advantage + baseline).detach()
    flat = advantage[mask]
    advantage = (advantage - flat.mean()) / torch.sqrt(flat.var(correction=ddof) + 1e-8)
    r = torch.exp((logp - old_logp)[mask])
    a = sign * advantage[mask]
    policy = torch.maximum(-r * a, -r.clamp(1 - low, 1.2) * a)
    policy = torch.where(a < 0, torch.minimum(policy, -3 * a), policy)
    v, v_old, ret = (values if value_gradient else values.detach())[mask], old_values[mask], returns[mask]
    near = v_old + (v - v_old).clamp(-0.5, 0.5)
    value = 0.5 * torch.maximum((v - ret) ** 2, (near - ret) ** 2)
    loss, row = policy + value, torch.nonzero(mask)[:, 0]
    if how == "row means":
        return torch.stack([loss[row == b].mean() for b in row.unique()]).mean()
    return loss.sum() if how == "sum" else loss.mean()


def dpo(logp, ref_logp, mask, role, block, beta=0.1, reference=True):
    """The rows of a block are a chosen (role 1) and a rejected one (-1); blocks without roles are padding."""
    score = np.where(mask, logp - (ref_logp if reference else 0), 0).sum(1)
    margins = [(score * role)[block == b].sum() for b in np.unique(block[role != 0])]
    return np.mean(np.log1p(np.exp(-beta * np.array(margins))))


def dapo_of_the_settings(logp, old_logp, mask, reward, group, clip_low, clip_high, eps, ddof=1):
    return numpy_loss("dapo", low=clip_low, high=clip_high, eps=eps, ddof=ddof)(logp, old_logp, mask, reward, group)


def group_advantages_only(reward, group):
    return group_advantage(reward, group)


def asks_for_too_much(logp, temperature_of_the_room):
    return logp.sum()


def fails(logp):
    raise RuntimeError("it is broken")


def returns_a_matrix(logp):
    return np.zeros((2, 2))
