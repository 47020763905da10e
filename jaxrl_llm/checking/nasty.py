"""Random rollouts with everything that goes wrong in practice, for checks that hold for every method.

Ragged groups in random order and a padding row: rewards that vary, rewards that all agree, an unscored row, groups of one, an
empty truncated completion, masks with holes, log ratios up to 3, a prompt that is drawn twice. Untrained positions of `rollouts` hold 0; `poison` puts
something else there.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.types import CURRENT, GIVEN, REFERENCE, Rollouts, Views

T, L, R = 5, 3, 2
GROUPS = {40: 4, 7: 3, 3: 3, 12: 1, 9: 2, 21: 8, 30: 1, 31: 1, -1: 1}  # id -> rows; a negative id is padding
PROMPT = {40: 0, 7: 0, 3: 1, 12: 2, 9: 3, 21: 4, 30: 5, 31: 6, -1: 0}  # 40 and 7 are the same prompt, drawn twice
AGREE, UNSCORED, EMPTY, EXTRA = 7, 3, 9, 21  # groups with a peculiarity
ROWS = sum(GROUPS.values())
VIEWS = ("logp", "entropy", "logsumexp", "tempered_logp", "collision", "inner_logp", "values")


def rollouts(seed: int, needs: Any) -> Rollouts:
    """Rollouts with the extras that `needs` names, in the default float dtype; 0 where it does not matter."""
    return poison(drawn(seed, needs), 0.0)


def drawn(seed: int, needs: Any) -> Rollouts:
    """`rollouts` with random numbers also where they do not matter."""
    rng = np.random.default_rng(seed)
    group = np.repeat(list(GROUPS), list(GROUPS.values()))
    nth = np.concatenate([np.arange(n) for n in GROUPS.values()])  # within its group
    real = group >= 0
    length = np.where(real, rng.integers(1, T + 1, ROWS), 0)
    length[(group == 40) & (nth == 0)] = T
    empty = (group == EMPTY) & (nth == 1)
    length[empty] = 0
    mask = (np.arange(T) < length[:, None]) & (rng.random((ROWS, T)) < 0.8)
    mask[(group == 40) & (nth == 0), 0] = True
    scored = real & ~((group == UNSCORED) & (nth == 1))
    traj = group * 10 + nth // 2
    reward = rng.normal(size=(ROWS, R))
    if "traj" in needs.row_extras:  # a reward is the trajectory's
        reward = reward[[np.flatnonzero(traj == t)[0] for t in traj]]
    reward[group == AGREE] = [0.1, 0.2]
    extra = (group == EXTRA) & ("extra" in needs.row_extras)
    given = np.isin(group, (40, 21)) & (needs.given != "none")
    row_extras = {
        "prompt_id": np.searchsorted(np.unique(group), group),
        "traj": traj,
        "turn": nth % 2,
        "step_index": nth % 2,
        "step": np.tile(np.arange(T) // 2, (ROWS, 1)),
        "anchor_id": group * 10 + rng.integers(0, 2, ROWS),
        "step_reward": rng.normal(size=ROWS),
        "invalid": (rng.random(ROWS) < 0.2).astype(float),
        "extra": extra.astype(int),
        "exit_order": nth + 1,
        "step_length": nth % 3 + 1,
        "action_id": nth % 3,
        "mask_key": rng.integers(0, 2**31 - 1, ROWS),
        "grad_square": 0.1 + nth * 7 % 5 / 3,
        "quality": nth * 3 % 8 / 8,
        "prompt_size": np.ones(ROWS),
    }
    old_logp = -rng.exponential(size=(ROWS, T))

    def rescored(name: str) -> np.ndarray:
        view = name.split("_", 1)[1]
        if view == "prompt_logp":
            return -rng.exponential(size=(len(PROMPT), L))[[PROMPT[g] for g in group]]
        if view in ("logp", "tempered_logp", "inner_logp"):
            return old_logp + 0.5 * rng.normal(size=(ROWS, T))
        if view == "collision":  # at least the square of the sampled token's probability
            return np.exp(2 * old_logp) + 0.1 * rng.random((ROWS, T))
        return rng.uniform(0.1, 2, (ROWS, T)) if view == "entropy" else rng.normal(size=(ROWS, T))

    extras = {name: rescored(name) for name in needs.rescore} | {name: row_extras[name] for name in needs.row_extras}
    fields: dict[str, Any] = {
        "prompt_tokens": rng.integers(0, 9, (7, L)),
        "prompt_length": rng.integers(1, L + 1, 7),
        "prompt": np.array([PROMPT[g] for g in group]),
        "group": group,
        "row_id": np.arange(ROWS),
        "tokens": rng.integers(0, 9, (ROWS, T)),
        "length": length,
        "mask": mask,
        "stat": real & ~extra,
        "scored": scored,
        "reward": reward,
        "truncated": empty,
        "version": np.zeros((ROWS, T), int),
        "sampler_logp": old_logp + 0.01 * rng.normal(size=(ROWS, T)),
        "old_logp": old_logp,
        "source": np.select([given, nth % 2 == 1, nth == 2], [GIVEN, REFERENCE, GIVEN], CURRENT),
        "block": np.arange(ROWS),
        "extras": extras,
    }
    rows = Rollouts(**fields)
    rows = permute(rows, rng.permutation(ROWS))
    return jax.tree.map(narrow, replace(rows, block=np.arange(ROWS)))


def narrow(x: np.ndarray) -> np.ndarray:
    """The dtype arrays have in a run: int32, and float64 only where jax is set to it."""
    kinds = {"f": jnp.result_type(float), "i": np.int32, "b": bool}
    return x.astype(kinds[x.dtype.kind])


def views(seed: int, rows: Rollouts, names: tuple[str, ...], spread: float | None = None) -> Views:
    """Random views of the current policy, log ratios within 3 of `old_logp`, or with standard deviation `spread`."""
    rng = np.random.default_rng(seed + 1000)
    shape = rows.mask.shape
    noise = rng.normal(size=shape) * (rng.choice([0.05, 0.5, 2.0], shape) if spread is None else spread)
    made = {
        "logp": rows.old_logp + np.clip(noise, -3, 3),
        "inner_logp": rows.extras.get("old_inner_logp", rows.old_logp) + np.clip(noise, -3, 3),
        "entropy": rng.uniform(0.1, 2, shape),
    }
    arrays: dict[str, Any] = {name: narrow(made.get(name, rng.normal(size=shape))) for name in names}
    return Views(
        **{n: x for n, x in arrays.items() if n in VIEWS}, extras={n: x for n, x in arrays.items() if n not in VIEWS}
    )


def by_row(tree: Any, index: Any) -> Any:
    """Every array of a pytree indexed by row, as numpy."""
    return jax.tree.map(lambda x: np.asarray(x)[index], tree)


def permute(rows: Rollouts, index: Any) -> Rollouts:
    """Rows by index; contexts stay."""
    contexts = {"prompt_tokens": rows.prompt_tokens, "prompt_length": rows.prompt_length}
    return replace(by_row(replace(rows, prompt_tokens=rows.prompt, prompt_length=rows.prompt), index), **contexts)


def poison(rows: Rollouts, value: float) -> Rollouts:
    """`value` wherever a float input does not matter: untrained tokens, and rewards and row data of unscored rows."""

    def spoil(x: Any) -> Any:
        if x.dtype.kind != "f":
            return x
        matters = rows.trained if x.shape == rows.mask.shape else rows.scored.reshape(-1, *[1] * (x.ndim - 1))
        return np.where(matters, x, x.dtype.type(value))

    names = ("reward", "sampler_logp", "old_logp")
    return rows.with_(
        extras={k: spoil(x) for k, x in rows.extras.items()}, **{n: spoil(getattr(rows, n)) for n in names}
    )


def poison_views(v: Any, trained: np.ndarray, value: float) -> Any:
    """`value` in the views of untrained positions."""
    return jax.tree.map(lambda x: np.where(trained, x, x.dtype.type(value)), v)
