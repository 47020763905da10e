"""The joint route, for every method by being registered: its gradient is autograd's of loss∘views on the whole minibatch,
computed plainly, however the minibatch is split. Float64, a tiny model, rows with everything that goes wrong.

The model's programs contain no method, so one learner's serve all methods that differentiate the same views.
"""

import copy
import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import learning
import nasty
import numpy as np
import pytest
import tiny
from test_every_algorithm import DEFAULTS, label

from jaxrl_llm import algorithms
from jaxrl_llm.algorithms import gdpo
from jaxrl_llm.algorithms.base import Algorithm
from jaxrl_llm.models import attention, critic, decoder
from jaxrl_llm.sharding.mesh import make_mesh
from jaxrl_llm.training import gradients
from jaxrl_llm.training.learner import Learner
from jaxrl_llm.types import Credit, Params, Rollouts, Views, take_rows

SPEC, KEY = learning.SPEC, jax.random.key(3)
METHODS = [*DEFAULTS, ("r2vpo", {"center": True}), ("grpo", {"beta": 0.04, "kl_kind": "k3+"})]
MASK_ID = 31
CONFIG = learning.config(
    optimizer={"name": "sgd", "lr": 1.0, "clip_norm": 0.0},  # a step subtracts the gradient
    model={"dtype": "float64", "param_dtype": "float64"},
)

pytestmark = pytest.mark.usefixtures("x64")


class Case(NamedTuple):
    alg: Algorithm
    state: Any
    rows: Rollouts
    credit: Credit  # of all rows, not weighed yet


def params(seed: int) -> dict[str, Params]:
    """A policy and a critic; `seed` moves them a little."""
    trees = {"policy": tiny.params(SPEC, 0, np.float64), "critic": tiny.params(critic.trunk(SPEC), 1, np.float64)}
    trees["critic"][critic.HEAD] = {"weight": jnp.linspace(-0.5, 0.5, SPEC.embed), "bias": jnp.array(0.3)}
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.01 * seed * rng.standard_normal(x.shape), trees)


@jax.jit
def plain(params: dict[str, Params], rows: Rollouts) -> Views:
    """Every view of every completion token, one row a sequence, from whole logits."""
    n, s = rows.prompt_length[rows.prompt][:, None], jnp.arange(rows.prompt_tokens.shape[1] + rows.tokens.shape[1])
    context = jnp.take_along_axis(rows.prompt_tokens[rows.prompt], jnp.minimum(s, n - 1), 1)
    completion = jnp.take_along_axis(rows.tokens, jnp.clip(s - n, 0, rows.tokens.shape[1] - 1), 1)
    tokens, at = jnp.where(s < n, context, completion), n - 1 + jnp.arange(rows.tokens.shape[1])

    def hidden(spec: Any, tree: Params) -> tuple[jax.Array, jax.Array]:
        positions = jnp.broadcast_to(s, tokens.shape)
        states, kept = decoder.forward(spec, tree, tokens, positions, attention.causal(), dtype=jnp.float64, inner=0)
        return tuple(jnp.take_along_axis(x, at[..., None], 1) for x in (states, kept.inner))

    states = hidden(SPEC, params["policy"])
    logp, inner = (jax.nn.log_softmax(x @ decoder.unembed(SPEC, params["policy"])) for x in states)
    chosen, inside = (jnp.take_along_axis(x, rows.tokens[..., None], -1)[..., 0] for x in (logp, inner))
    values = critic.values(params["critic"], hidden(critic.trunk(SPEC), params["critic"])[0])
    probability = jnp.exp(logp)
    entropy, collision = -(probability * logp).sum(-1), (probability**2).sum(-1)
    return Views(
        logp=chosen, tempered_logp=chosen, entropy=entropy, collision=collision, inner_logp=inside, values=values
    )


def network(params: Params, rows: Rollouts, ids: jax.Array) -> jax.Array:
    """A masked diffusion model in one line: every position sees the bag of all words."""
    words = params["embed"][ids]
    return (words + words.mean(1, keepdims=True)) @ params["embed"].T


ELBO = gdpo.scorer(gdpo.Config(), network, MASK_ID)


def views(alg: Algorithm, params: dict[str, Params], rows: Rollouts) -> Views:
    return plain(params, rows) if alg.needs.scorer == "causal" else ELBO(params["policy"], rows)


def near(alg: Algorithm, rows: Rollouts, seed: int) -> dict[str, jax.Array]:
    """Views of a policy a little away from the current one."""
    seen = views(alg, params(seed), rows)
    return {**vars(seen), **seen.extras}


@functools.cache
def case(index: int) -> Case:
    """A minibatch of a method: credited, selected, padded to one size for all."""
    alg = algorithms.make(METHODS[index][0], **METHODS[index][1])
    rows = jax.tree.map(jnp.asarray, nasty.rollouts(0, alg.needs))
    old, ref = near(alg, rows, 1), near(alg, rows, 2)
    rescored = {
        name: (ref if name.startswith("ref_") else old)[name.split("_", 1)[1]]
        for name in alg.needs.rescore
        if not name.endswith("prompt_logp")
    }
    if alg.needs.scorer == "causal":
        rows = rows.with_(old_logp=old["logp"])
    rows = rows.with_(extras=rescored)
    state = alg.init()
    given = jax.jit(alg.credit)(state, rows, KEY)
    if alg.select is not None:
        rows, given, _ = alg.select(state, {}, rows, given, KEY)
    own, n = np.arange(nasty.ROWS), len(rows.block)
    block = np.append(rows.block, own[n:]).astype(np.int32)
    rows, given = take_rows(rows, given, jnp.asarray(np.where(own < n, own, -1)))
    return Case(alg, state, jax.device_get(rows.with_(block=block)), jax.device_get(given))


@functools.cache
def programs(loss: tuple[str, ...], devices: tuple[int, ...]) -> Learner:
    """A learner for all methods that differentiate these views."""
    alg = next(a for a in (algorithms.make(name, **fields) for name, fields in METHODS) if a.needs.loss == loss)
    sizes = CONFIG.mesh.model_copy(update=dict(zip(("dp", "fsdp"), devices)))
    return Learner(CONFIG, SPEC, alg, make_mesh(sizes), None if alg.needs.scorer == "causal" else ELBO)


def learner(alg: Algorithm, splits: int, devices: tuple[int, ...] = (1, 1)) -> Learner:
    """A learner at its beginning, with the method's own programs beside shared ones of the model."""
    made = copy.copy(programs(alg.needs.loss, devices))
    made.alg = alg._replace(rate=None)  # a step is the gradient itself
    made._run = made._run._replace(
        differentiate=jax.jit(partial(gradients.differentiate, alg)),
        weigh=jax.jit(partial(gradients.weigh, alg, CONFIG.learner.importance)),
        tune=lambda state, metrics, finite: state,
    )
    settings = learning.config(learner={"route": "joint", "microbatch_rows": nasty.ROWS // splits}).learner
    made.config = CONFIG.model_copy(update={"learner": settings})
    made.init(**{name: tree for name, tree in params(0).items() if name in made.labels})
    return made


def moved(made: Learner, change: Callable[[], Any]) -> Any:
    """How much `change` takes off the parameters: a step's gradient."""
    before = jax.device_get(made.train.params)
    change()
    return jax.tree.map(np.subtract, before, jax.device_get(made.train.params))


def joint(case: Case, splits: int, devices: tuple[int, ...] = (1, 1)) -> tuple[Any, float]:
    """The gradient of a step, and the loss."""
    made, losses = learner(case.alg, splits, devices), []
    grads = moved(made, lambda: losses.append(made.step(case.state, case.rows, case.credit)[1]["loss"]))
    return grads, float(losses[0].sum)


def autograd(case: Case) -> tuple[Any, float]:
    """The gradient of loss∘views, and the loss."""
    alg, state, rows = case.alg, case.state, jax.tree.map(jnp.asarray, case.rows)
    value = jax.jit(lambda views: alg.loss(state, views, rows, alg.weigh(state, rows, case.credit))[0])
    loss, grads = jax.value_and_grad(lambda p: value(views(alg, p, rows)))(params(0))
    labels = ("policy", "critic") if alg.needs.critic else ("policy",)
    return {name: grads[name] for name in labels}, float(loss)


@pytest.mark.parametrize("index", range(len(METHODS)), ids=map(label, METHODS))
def test_joint_gradient_is_autograd_of_the_whole_minibatch_for_any_split(index):
    expected, value = autograd(case(index))
    for splits in (1, 2, 4):
        got, same = joint(case(index), splits)
        learning.assert_close(got, expected, 1e-10)
        assert same == pytest.approx(value, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("name", ["seeupo", "gdpo", "loop"])
def test_updates_of_a_method_s_own_are_independent_of_the_split(name):
    alg, state, rows, credit = case(METHODS.index((name, {})))
    made = [learner(alg, splits) for splits in (1, 4)]
    whole, split = [moved(one, lambda one=one: one.update(state, rows, credit, KEY)) for one in made]
    assert made[0].version > 1
    learning.assert_close(split, whole, 1e-10)


@pytest.mark.parametrize("method", [("dpo", {}), ("r2vpo", {"center": True})], ids=label)  # pairs; the whole minibatch
def test_joint_gradient_is_the_same_on_four_devices(method):
    index = METHODS.index(method)
    alone, value = joint(case(index), 1)
    spread, same = joint(case(index), 2, devices=(2, 2))
    learning.assert_close(spread, alone, 1e-10)
    assert same == pytest.approx(value, rel=1e-10)
