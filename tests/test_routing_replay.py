"""Routing replay in the learner and the loop: recorded by the old policy's forward, or by the engine."""

import functools
import json

import jax
import jax.numpy as jnp
import learning
import numpy as np
import pytest
import tiny
from learning import APART, COUPLED, GROUP, PROMPTS, ROWS, L, T, assert_close, assert_same

from jaxrl_llm import types
from jaxrl_llm.algorithms.base import Plan
from jaxrl_llm.models import attention, decoder, scorers
from jaxrl_llm.rollout.collectors import row_of
from jaxrl_llm.rollout.engine import Engine
from jaxrl_llm.rollout.rows import pack
from jaxrl_llm.sharding.mesh import make_mesh
from jaxrl_llm.tasks.base import Prompt
from jaxrl_llm.training import loop
from jaxrl_llm.training.learner import Learner
from jaxrl_llm.types import ROUTES

SPEC = tiny.spec("qwen3_moe")
LAYOUTS = ["padded", "packed", "shared"]
SGD = {"name": "sgd", "lr": 1.0, "clip_norm": 0.0}

pytestmark = pytest.mark.usefixtures("x64")


@functools.cache
def _learner(settings, sizes):
    model = {"dtype": "float64", "param_dtype": "float64"}
    config = learning.config(optimizer=SGD, model=model, learner=json.loads(settings), reference={"mode": "resident"})
    mesh = config.mesh.model_copy(update=dict(sizes))
    return Learner(
        config, SPEC, learning.algorithm(), make_mesh(mesh, jax.devices()[: int(np.prod([*dict(sizes).values()]))])
    )


def learner(sizes=(("fsdp", 1),), seed=0, by=0.0, **settings):
    """A learner of the tiny model with experts, `by` away from its first parameters."""
    made = _learner(json.dumps(settings, sort_keys=True), sizes)
    made.init(params(by))
    return made


def params(by=0.0):
    first, other = (tiny.params(SPEC, seed, np.float64) for seed in (0, 5))
    return jax.tree.map(lambda a, b: a + by * b, first, other)


def rows():
    return learning.rollouts(dtype=np.float64)


def recorded(**settings):
    batch = rows()
    return batch.with_(extras=learner(**settings).views(batch, ("logp", ROUTES)).extras)


def one_row(batch, i, by=0.0, replay=None):
    """Completion log-probs, recorded experts [S, M, k] of a row run on its own."""
    prompt, length = batch.prompt[i], batch.length[i]
    start = batch.prompt_length[prompt]
    tokens = np.concatenate([batch.prompt_tokens[prompt, :start], batch.tokens[i, :length]])[None]
    at = jnp.arange(tokens.shape[1])[None]
    weights = params(by)
    replay = None if replay is None else jnp.moveaxis(replay, 0, 1)[:, None]
    hidden, kept = decoder.forward(SPEC, weights, tokens, at, attention.causal(), dtype=jnp.float64, replay=replay)
    logp = jax.nn.log_softmax(scorers.logits(hidden, decoder.unembed(SPEC, weights)))[0]
    return logp[np.arange(start - 1, start + length - 1), tokens[0, start:]], jnp.moveaxis(kept.routes[:, 0], 0, 1)


def in_order(routes, batch, i):
    """The recorded experts of a row's positions, without padding."""
    return np.concatenate([routes[i, : batch.prompt_length[batch.prompt[i]]], routes[i, L : L + batch.length[i]]])


def gradient(made, batch, state=COUPLED):
    before = jax.device_get(made.train.params)
    made.step(state, batch, learning.credit(batch))
    return jax.tree.map(np.subtract, before, jax.device_get(made.train.params))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_old_forward_records_the_experts_of_every_context_and_completion_token(layout):
    batch = recorded(layout=layout, microbatch_rows=2)
    routes = np.asarray(batch.extras[ROUTES])
    assert routes.shape == (ROWS, L + T, 2, 2) and routes.dtype == np.int16
    for i in range(ROWS):
        if batch.length[i]:
            np.testing.assert_array_equal(in_order(routes, batch, i), one_row(batch, i)[1])
        assert (routes[i, batch.prompt_length[batch.prompt[i]] : L] == -1).all()
        assert (routes[i, L + batch.length[i] :] == -1).all()


@pytest.mark.parametrize(
    "settings", [{"layout": name} for name in LAYOUTS] + [{"microbatch_rows": 2, "route": "joint"}]
)
def test_replay_of_the_old_forward_changes_nothing_before_the_first_update(settings):
    batch = recorded(**settings)
    bare = types.replace(batch, extras={})
    np.testing.assert_array_equal(
        learner(**settings).views(batch, ("logp",)).logp, learner(**settings).views(bare, ("logp",)).logp
    )
    state = APART if settings.get("route") != "joint" else COUPLED
    assert_same(gradient(learner(**settings), batch, state), gradient(learner(**settings), bare, state))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_later_parameters_replay_the_recorded_experts(layout):
    batch = recorded(layout="shared")
    made = learner(layout=layout, by=0.5)
    seen = made.views(batch, ("logp", ROUTES))
    np.testing.assert_array_equal(seen.extras[ROUTES], batch.extras[ROUTES])
    natural = made.views(types.replace(batch, extras={}), ("logp", ROUTES))
    assert (natural.extras[ROUTES] != batch.extras[ROUTES]).any()
    for i in np.flatnonzero(batch.length):
        n = batch.length[i]
        replayed, _ = one_row(batch, i, 0.5, in_order(batch.extras[ROUTES], batch, i))
        np.testing.assert_allclose(seen.logp[i, :n], replayed, atol=1e-10)
        np.testing.assert_allclose(natural.logp[i, :n], one_row(batch, i, 0.5)[0], atol=1e-10)
    assert np.abs(seen.logp - natural.logp).max() > 1e-3


def test_the_gradient_under_replay_does_not_depend_on_layout_split_route_or_mesh():
    batch = recorded()
    expected = gradient(learner(layout="padded", route="joint", by=0.5), batch)
    for settings in (
        {"layout": "shared", "route": "joint", "microbatch_rows": 2},
        {"layout": "packed", "route": "joint", "microbatch_rows": 2},
        {"layout": "shared", "route": "joint", "sizes": (("fsdp", 2), ("ep", 2))},
    ):
        assert_close(gradient(learner(**settings, by=0.5), batch), expected, 1e-10)
    bare = types.replace(batch, extras={})
    with pytest.raises(AssertionError):
        assert_close(gradient(learner(layout="padded", route="joint", by=0.5), bare), expected, 1e-3)


def test_rows_keep_their_context_s_experts_when_others_of_the_group_are_gone():
    batch = recorded(layout="shared")
    made = learner(by=0.5)
    expected = made.views(batch, ("logp",)).logp
    some = np.array([7, 3, 1, -1])
    taken = types.take(batch, some)
    np.testing.assert_allclose(made.views(taken, ("logp",)).logp[:3], expected[some[:3]], atol=1e-10)


def test_other_policies_choose_experts_of_their_own():
    batch = recorded()
    moved = learner(by=0.5)
    moved.init(params(0.0))  # the reference
    moved.load(types.replace(moved.train, params={"policy": jax.device_put(params(0.5), moved.shardings["policy"])}))
    wrong = batch.with_(extras={ROUTES: np.full_like(batch.extras[ROUTES], 1)})
    reference = moved.views(wrong, ("logp",), "ref").logp
    np.testing.assert_array_equal(reference, moved.views(types.replace(batch, extras={}), ("logp",), "ref").logp)


def test_unrecorded_positions_are_routed_as_ever():
    batch = recorded()
    made = learner(by=0.5)
    nothing = batch.with_(extras={ROUTES: np.full_like(batch.extras[ROUTES], -1)})
    bare = made.views(types.replace(batch, extras={}), ("logp",)).logp
    np.testing.assert_array_equal(made.views(nothing, ("logp",)).logp, bare)


def test_the_loop_records_with_old_logp():
    made = learner(routing_replay="old", old_logp="rescore")
    batch = loop.rescore(made, made.alg, Plan(), rows(), old_logp=True)
    views = made.views(rows(), ("logp", ROUTES))
    np.testing.assert_array_equal(batch.extras[ROUTES], views.extras[ROUTES])
    np.testing.assert_array_equal(batch.old_logp, views.logp)
    assert set(batch.extras) == {ROUTES}


# recorded by the engine


def sampled(rounded=None):
    """Rows of an engine that records experts, its weights rounded to so many bits of mantissa."""
    engine = Engine(
        SPEC, make_mesh(), max_prompt=L, max_new=T, slots=4, eos_ids=(1, 2, 3), record=True, dtype=jnp.float64
    )
    weights = params()
    if rounded is not None:
        weights = jax.tree.map(lambda x: jax.lax.reduce_precision(x, 11, rounded), weights)
    engine.set_weights(weights, version=0)
    batch = rows()
    prompts = [Prompt(id=i, tokens=batch.prompt_tokens[i, : batch.prompt_length[i]], record={}) for i in range(PROMPTS)]
    answers = engine.generate([p.tokens for p in prompts], [GROUP] * PROMPTS, seed=3, step=0)
    made = [row_of(p, c, g) for g, (p, cs) in enumerate(zip(prompts, answers)) for c in cs]
    for i, row in enumerate(made):
        row.reward = np.array([float(i % 3)])
    return made


def packed(made, routes=SPEC.routes):
    return pack(made, contexts=PROMPTS, prompt_len=L, size=ROWS, length=T, parts=1, routes=routes)


def test_replay_of_an_engine_that_equals_the_trainer_changes_nothing():
    made = sampled()
    batch, bare = packed(made), packed(made, routes=None)
    assert ROUTES not in bare.extras
    seen = learner().views(bare, ("logp", ROUTES))
    last = L + np.maximum(batch.length - 1, 0)  # of the last token the engine has not seen, and nothing depends on it
    expected = np.array(seen.extras[ROUTES])
    expected[np.arange(ROWS), last] = -1
    np.testing.assert_array_equal(batch.extras[ROUTES], expected)
    np.testing.assert_array_equal(learner().views(batch, ("logp",)).logp, seen.logp)
    np.testing.assert_allclose(np.where(batch.mask, seen.logp - batch.sampler_logp, 0), 0, atol=1e-5)
    assert_close(gradient(learner(), batch), gradient(learner(), bare), 1e-12)  # float64, two programs


def test_replay_of_an_engine_that_differs_brings_the_trainer_closer_to_it():
    """Engine weights rounded to 3 bits choose other experts; the trainer that replays them is nearer to what was sampled."""

    def gap(batch, **settings):
        logp = learner(**settings).views(batch, ("logp",)).logp
        return float(np.abs(np.where(batch.mask, logp - batch.sampler_logp, 0)).sum() / batch.mask.sum())

    coarse = sampled(rounded=3)
    assert (packed(coarse).extras[ROUTES] != packed(sampled()).extras[ROUTES]).any()
    assert 0 < gap(packed(coarse)) < gap(packed(coarse, routes=None))


def test_old_logp_is_rescored_under_the_engine_s_experts():
    batch, made = packed(sampled(rounded=3)), learner(routing_replay="rollout")
    scored = loop.rescore(made, made.alg, Plan(), batch, old_logp=True)
    np.testing.assert_array_equal(scored.extras[ROUTES], batch.extras[ROUTES])
    np.testing.assert_array_equal(scored.old_logp, made.views(batch, ("logp",)).logp)
    natural = made.views(packed(sampled(rounded=3), routes=None), ("logp",)).logp
    assert np.abs(np.where(batch.mask, scored.old_logp - natural, 0)).max() > 1e-4


def test_rows_without_recorded_experts_and_mismatched_ones():
    made = sampled()
    made[2].routes = None
    routes = packed(made).extras[ROUTES]
    assert (routes[2] == -1).all() and (routes[3] >= 0).any()
    made[1].routes = made[1].routes[:-1]
    with pytest.raises(ValueError, match=r"row 1: experts of \d+ tokens are recorded, expected \d+"):
        packed(made)
