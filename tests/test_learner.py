"""The learner: one gradient whatever the split, route, layout and mesh; and what it does when numbers go wrong."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.algorithms.base import Algorithm, Needs, flat_plan, no_state
from jaxrl_llm.config import Config
from jaxrl_llm.objectives.weights import weighted_sum
from jaxrl_llm.sharding.mesh import make_mesh
from jaxrl_llm.training.learner import Learner
from jaxrl_llm.types import GIVEN, Credit, Rollouts, mean_of
import tiny

PROMPTS, GROUP, L, T = 4, 2, 5, 6
ROWS = PROMPTS * GROUP
SPEC = tiny.spec("qwen3")


def rollouts(seed: int = 0, dtype: Any = np.float32) -> Rollouts:
    """Eight rows of four contexts: all lengths differ, one row has tool output, one is empty, one is unscored."""
    rng = np.random.default_rng(seed)
    length = np.array([6, 3, 4, 1, 5, 0, 2, 6], np.int32)
    mask = np.arange(T) < length[:, None]
    mask[0, 2:4] = False  # tool output
    logp = lambda: (-3 + rng.standard_normal((ROWS, T))).astype(dtype)  # noqa: E731
    return Rollouts(
        prompt_tokens=tiny.tokens(PROMPTS, L, seed=seed),
        prompt_length=np.array([5, 2, 1, 3], np.int32),
        prompt=np.repeat(np.arange(PROMPTS, dtype=np.int32), GROUP),
        group=np.repeat(np.arange(PROMPTS, dtype=np.int32), GROUP),
        row_id=np.arange(ROWS, dtype=np.int32),
        tokens=tiny.tokens(ROWS, T, seed=seed + 1),
        length=length,
        mask=mask,
        stat=np.ones(ROWS, bool),
        scored=np.arange(ROWS) != 6,
        reward=rng.standard_normal((ROWS, 1)).astype(dtype),
        truncated=np.zeros(ROWS, bool),
        version=np.zeros((ROWS, T), np.int32),
        sampler_logp=logp(),
        old_logp=logp(),
        source=np.zeros(ROWS, np.int32),
        block=np.arange(ROWS, dtype=np.int32) // 2,
    )


def credit(rows: Rollouts) -> Credit:
    return Credit(np.where(rows.mask, rows.reward, 0).astype(rows.reward.dtype))


def row_loss(state, views, rows, credit):
    """A clipped surrogate: couples nothing."""
    ratio = jnp.exp(jnp.where(rows.trained, views.logp - rows.old_logp, 0))
    token = -jnp.minimum(ratio * credit.advantage, jnp.clip(ratio, 0.8, 1.2) * credit.advantage)
    return weighted_sum(token, credit.weight), {"ratio": mean_of(ratio, rows.trained)}


def coupled_loss(state, views, rows, credit):
    """Centred variance, a quantile and entropy over the minibatch: no split of it adds up."""
    on = rows.trained
    n = jnp.maximum(on.sum(), 1)
    logp = jnp.where(on, views.logp, 0)
    centred = jnp.where(on, logp - logp.sum() / n, 0)
    edge = jnp.nanquantile(jnp.where(on, logp, jnp.nan), 0.3)
    low = on & (logp <= jnp.where(jnp.isnan(edge), 0, edge))
    loss = (centred**2).sum() / n + jnp.where(low, logp * credit.advantage, 0).sum()
    loss += 0.1 * (jnp.where(on, views.entropy, 0).sum() / n) ** 2
    return loss, {"variance": mean_of(centred**2, on)}


def algorithm(loss=row_loss, **fields: Any) -> Algorithm:
    fields = {"couples": "row" if loss is row_loss else "minibatch", **fields}
    fields = {"needs": Needs(loss=("logp",) if loss is row_loss else ("logp", "entropy")), **fields}
    return Algorithm(
        name="test",
        config=None,
        init=no_state,
        plan=flat_plan,
        credit=lambda state, rows, key: credit(rows),
        loss=loss,
        **fields,
    )


def config(**sections: Any) -> Config:
    sections.setdefault("optimizer", {"lr": 1e-2, "clip_norm": 0.0})
    fields = {
        "task": {"kind": "custom", "function": "a:b"},
        "rollout": {"prompts": PROMPTS, "group_size": GROUP, "max_prompt": L, "max_new": T},
        "run": {"steps": 10},
        **sections,
    }
    return Config.model_validate(fields)


def learner(alg: Algorithm | None = None, mesh: Any = None, **sections: Any) -> Learner:
    made = Learner(config(**sections), SPEC, alg or algorithm(), mesh or make_mesh(None))
    made.init(tiny.params(SPEC, dtype=made.dtype))
    return made


def gradient(alg: Algorithm, rows: Rollouts, **settings: Any) -> tuple[Any, float]:
    """The whole gradient of one step, read off a step of plain SGD, and the loss."""
    precise = rows.reward.dtype == np.float64
    dtype = "float64" if precise else "float32"
    made = learner(
        alg,
        learner=settings,
        optimizer={"name": "sgd", "lr": 1.0, "clip_norm": 0.0},
        model={"dtype": dtype, "param_dtype": dtype},
    )
    before = jax.device_get(made.train.params)
    _, metrics = made.step((), rows, credit(rows))
    return jax.tree.map(np.subtract, before, jax.device_get(made.train.params)), float(metrics["loss"].sum)


def close(a: Any, b: Any, tol: float) -> None:
    scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(b))
    assert scale > 0
    for path, x in jax.tree_util.tree_leaves_with_path(a):
        y = dict(jax.tree_util.tree_leaves_with_path(b))[path]
        np.testing.assert_allclose(x, y, atol=tol * scale, rtol=0, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("loss", [row_loss, coupled_loss])
def test_gradient_is_independent_of_microbatch_split_and_route(loss, x64):
    rows = rollouts(dtype=np.float64)
    whole, value = gradient(algorithm(loss), rows, route="joint")
    for rows_at_once in (8, 4, 2):
        for route in ("joint", "fused") if loss is row_loss else ("joint",):
            split, same = gradient(algorithm(loss), rows, route=route, microbatch_rows=rows_at_once)
            close(split, whole, 1e-10)
            assert same == pytest.approx(value, rel=1e-10)


@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_layouts_have_the_same_gradient(layout, x64):
    rows = rollouts(dtype=np.float64)
    for loss in (row_loss, coupled_loss):
        padded, value = gradient(algorithm(loss), rows)
        other, same = gradient(algorithm(loss), rows, layout=layout, microbatch_rows=4)
        close(other, padded, 1e-10)
        assert same == pytest.approx(value, rel=1e-10)
