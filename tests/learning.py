"""A tiny learner for tests: eight nasty rows, and a loss that couples nothing or a whole minibatch."""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from jaxrl_llm.algorithms.base import Algorithm, Needs, flat_plan
from jaxrl_llm.config import Config
from jaxrl_llm.objectives.weights import weighted_sum
from jaxrl_llm.sharding.mesh import make_mesh
from jaxrl_llm.training.learner import Learner
from jaxrl_llm.training.updates import Watch
from jaxrl_llm.types import Credit, Rollouts, mean_of

PROMPTS, GROUP, L, T = 4, 2, 5, 6
ROWS = PROMPTS * GROUP
SPEC = tiny.spec("llama", rope_scaling=None, hidden_size=16)
KEY = jax.random.key(0)


def rollouts(seed: int = 0, dtype: Any = np.float32) -> Rollouts:
    """Eight rows of four contexts: all lengths differ, one row has tool output, one is empty, one is unscored."""
    rng = np.random.default_rng(seed)
    length = np.array([6, 3, 4, 1, 5, 0, 2, 6], np.int32)
    mask = np.arange(T) < length[:, None]
    mask[0, 2:4] = False  # tool output
    old_logp = -3 + 0.1 * rng.standard_normal((ROWS, T))
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
        sampler_logp=(old_logp + rng.standard_normal((ROWS, T))).astype(dtype),
        old_logp=old_logp.astype(dtype),
        source=np.zeros(ROWS, np.int32),
        block=np.arange(ROWS, dtype=np.int32) // 2,
    )


def credit(rows: Rollouts) -> Credit:
    """Each row's reward is its advantage."""
    return Credit(np.where(rows.mask, rows.reward, 0).astype(rows.reward.dtype))


def loss(state, views, rows, credit):
    """A clipped surrogate, which couples nothing, plus `state` times what no split of a minibatch adds up to: a centred
    variance, a quantile, the square of a mean. One method for both, so that tests share its compiled programs.
    """
    on, n = rows.trained, jnp.maximum(rows.trained.sum(), 1)
    logp = jnp.where(on, views.logp, 0)
    ratio = jnp.exp(jnp.where(on, logp - rows.old_logp, 0))
    token = -jnp.minimum(ratio * credit.advantage, jnp.clip(ratio, 0.2, 5) * credit.advantage)
    centred = jnp.where(on, logp - logp.sum() / n, 0)
    edge = jnp.nanquantile(jnp.where(on, logp, jnp.nan), 0.3)
    low = on & (logp <= jnp.where(jnp.isnan(edge), 0, edge))
    coupled = (centred**2).sum() / n + jnp.where(low, logp * credit.advantage, 0).sum()
    coupled += 0.1 * (jnp.where(on, views.entropy, 0).sum() / n) ** 2
    return weighted_sum(token, credit.weight) + state * coupled, {"ratio": mean_of(ratio, on)}


APART, COUPLED = np.float32(0), np.float32(1)  # states


@functools.cache
def algorithm(loss=loss, **fields: Any) -> Algorithm:
    """A method around a loss; the same arguments give the same object."""
    fields = {
        "couples": "row",
        "init": lambda: APART,
        "plan": flat_plan,
        "needs": Needs(loss=("logp", "entropy")),
    } | fields
    return Algorithm(name="test", config=None, credit=lambda state, rows, key: credit(rows), loss=loss, **fields)


def config(**sections: Any) -> Config:
    sections = {"optimizer": {"lr": 1e-2, "clip_norm": 0.0}, "run": {"steps": 10}, **sections}
    rollout = {"prompts": PROMPTS, "group_size": GROUP, "max_prompt": L, "max_new": T}
    return Config.model_validate({"task": {"kind": "custom", "function": "a:b"}, "rollout": rollout, **sections})


@functools.cache
def _compiled(alg: Algorithm, sections: str, devices: tuple[int, ...]) -> Learner:
    settings = config(**json.loads(sections))
    names = ("dp", "fsdp", "tp")[: len(devices)]
    sizes = settings.mesh.model_copy(update=dict(zip(names, devices))) if devices else None
    return Learner(settings, SPEC, alg, make_mesh(sizes))


def learner(alg: Algorithm | None = None, devices: tuple[int, ...] = (), seed: int = 0, **sections: Any) -> Learner:
    """A learner at its beginning. Compiled programs are shared: `learner` settings may differ, other sections may not."""
    settings = sections.pop("learner", {})
    made = _compiled(alg or algorithm(), json.dumps(sections, sort_keys=True), devices)
    made.config = made.config.model_copy(update={"learner": config(learner=settings).learner})
    made.init(tiny.params(SPEC, seed, made.model.dtype))
    made._watch = Watch(made.alg.name, made.config.learner.max_nonfinite)
    return made


def gradient(rows: Rollouts, state=APART, **settings: Any) -> tuple[Any, float]:
    """The whole gradient of one step, read off a step of plain SGD at rate 1, and the loss."""
    dtype = str(rows.reward.dtype)
    sgd = {"name": "sgd", "lr": 1.0, "clip_norm": 0.0}
    made = learner(optimizer=sgd, model={"dtype": dtype, "param_dtype": dtype}, learner=settings)
    before = jax.device_get(made.train.params)
    _, metrics = made.step(state, rows, credit(rows))
    return jax.tree.map(np.subtract, before, jax.device_get(made.train.params)), float(metrics["loss"].sum)


def assert_close(a: Any, b: Any, tol: float) -> None:
    """Trees agree to `tol` of the largest entry of `b`, which is not 0."""
    scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(b))
    assert scale > 0
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=tol * scale, rtol=0, err_msg=jax.tree_util.keystr(path))


def assert_same(a: Any, b: Any) -> None:
    """Trees agree bitwise."""
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=jax.tree_util.keystr(path))
