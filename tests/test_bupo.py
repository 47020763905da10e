"""BuPO: the internal policy's known answer, what its updates move, and the change of phase."""

import jax
import jax.numpy as jnp
import learning
import nasty
import numpy as np
import pytest
import tiny

from jaxrl_llm import algorithms
from jaxrl_llm.algorithms import value_and_grad
from jaxrl_llm.algorithms.base import Inner
from jaxrl_llm.models import attention, decoder, scorers
from jaxrl_llm.sharding.mesh import make_mesh
from jaxrl_llm.training.learner import Learner
from jaxrl_llm.types import Views, rollouts_of

HIDDEN = jnp.array([[[1.0, 0.0], [0.5, -0.5]], [[0.0, 2.0], [-1.0, 1.0]]])
UNEMBED = jnp.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.5]])
TOKENS = jnp.array([[0, 2], [1, 0]])
FAMILIES = ["llama", "qwen3", "qwen3_moe"]  # tied, untied, with experts in some layers
FULL = {"step": jnp.array(30, jnp.int32)}  # a state of the second phase
DECAY = {"optimizer": {"lr": 1e-2, "weight_decay": 0.1}}


def said(hidden):
    """What hidden states say of the tokens and of all others."""
    views = scorers.token_views(hidden.reshape(-1, 2), UNEMBED.T, TOKENS.reshape(-1), ["logp", "entropy"], 1.0)
    return {name: x.reshape(2, 2) for name, x in views.items()}


@pytest.mark.usefixtures("x64")
def test_the_known_answer_of_the_paper_s_code():
    hidden = HIDDEN.astype(float)
    internal = said(hidden)
    expected = [[-0.40760596, -1.75342888], [-0.40760596, -3.02390906]]
    np.testing.assert_allclose(internal["logp"], expected, atol=1e-8)
    entropy = [[0.83239558, 0.94226915], [0.83239558, 0.82503017]]
    np.testing.assert_allclose(internal["entropy"], entropy, atol=1e-8)
    normed = said(decoder.rms_norm(hidden, jnp.ones(2), 1e-6))["logp"]
    np.testing.assert_allclose(normed, [[-0.26407280, -2.69672988], [-0.55169052, -3.02390796]], atol=1e-8)

    alg = algorithms.make("bupo")
    old = internal["logp"] + jnp.array([[0.1, -0.1], [0.0, -0.05]])
    ones = jnp.ones((2, 2))
    rows = rollouts_of(ones > 0, jnp.array([1.0, 0.0]), jnp.array([0, 0]), jnp.nan * ones, {"old_inner_logp": old})
    credit = alg.credit(alg.init(), rows, jax.random.key(0))
    np.testing.assert_allclose(credit.advantage[:, 0], [0.7071057811879616, -0.7071057811879616], rtol=1e-12)

    def loss(hidden):
        views = Views(inner_logp=said(hidden)["logp"])
        return alg.loss(alg.init(), views, rows, alg.weigh(alg.init(), rows, credit))[0]

    value, grad = jax.value_and_grad(loss)(hidden)
    assert float(value) == pytest.approx(0.00729428, abs=1e-8)
    expected = [
        [[-0.06794677, 0.04634566], [0.27962568, -0.03732393]],
        [[0.02734694, 0.03754640], [0.28686076, -0.12177882]],
    ]
    np.testing.assert_allclose(grad, expected, atol=1e-8)


@pytest.mark.parametrize("step, views", [(1, ("inner_logp",)), (30, ("inner_logp",)), (31, ("logp",))])
def test_steps_1_to_s_inter_are_on_the_internal_policy(step, views):
    alg = algorithms.make("bupo", s_inter=30)
    state = alg.init()
    for _ in range(step - 1):
        state, _ = alg.observe(state, {}, None, None, None, None)
    plan = alg.plan(state)
    assert (plan.loss or alg.needs.loss) == views
    rescored = alg.needs.rescore if plan.rescore is None else plan.rescore
    assert rescored == tuple(f"old_{name}" for name in views if name == "inner_logp")


@pytest.mark.usefixtures("x64")
def test_the_second_phase_is_grpo():
    grpo = algorithms.make("grpo", aggregation="token-mean", dual_clip=10.0)
    alg = algorithms.make("bupo")
    rows = nasty.rollouts(0, grpo.needs)
    views = nasty.views(0, rows, ("logp",))
    expected, theirs = value_and_grad(grpo, (), rows, views)
    value, grads = value_and_grad(alg, FULL, rows, views)
    assert float(value) == float(expected)
    np.testing.assert_array_equal(grads.logp, theirs.logp)
    with pytest.raises(ValueError, match=r"bupo with these settings needs .*'old_inner_logp'.*views.inner_logp"):
        value_and_grad(alg, alg.init(), rows, views)


# ------------------------------------------------------------------------------------------------------- the model


def inner_of(spec, params, layer):
    tokens = tiny.tokens(2, 7)
    at = jnp.broadcast_to(jnp.arange(7), (2, 7))
    states, kept = decoder.forward(spec, params, tokens, at, attention.causal(), inner=layer)
    return states, kept.inner


@pytest.mark.parametrize("family", FAMILIES)
def test_the_inner_states_are_those_between_layers_run_one_by_one(family):
    spec = tiny.spec(family)
    params = tiny.params(spec)
    x = decoder.embed(spec, params, tiny.tokens(2, 7), jnp.float32)
    cos, sin = decoder.rope(spec, jnp.broadcast_to(jnp.arange(7), (2, 7)), jnp.float32)
    layers = zip(tiny.unstack(spec, params), decoder.layer_infos(spec))
    for i, (own, info) in enumerate(layers):
        x, _ = decoder.block(spec, own, info, x, cos, sin, attention.causal())
        states, inner = inner_of(spec, params, i)
        np.testing.assert_allclose(inner, x, atol=1e-5)
    np.testing.assert_allclose(states, decoder.final_norm(spec, params, x), atol=1e-5)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_is_zero_exactly_where_nothing_is_reached(family, norm):
    spec = tiny.spec(family, num_hidden_layers=3)
    params = tiny.params(spec)

    def total(params):
        inner = inner_of(spec, params, 1)[1]
        logits = (decoder.final_norm(spec, params, inner) if norm else inner) @ decoder.unembed(spec, params)
        return jnp.sum(jnp.sin(logits))

    grads, masks = jax.grad(total)(params), decoder.reached(spec, params, 1, norm)
    for (path, grad), mask in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(masks), strict=True):
        moves = np.any(grad != 0, axis=tuple(range(1, grad.ndim)) if mask.ndim else None)
        np.testing.assert_array_equal(moves, mask.reshape(np.shape(moves)), err_msg=jax.tree_util.keystr(path))


# ---------------------------------------------------------------------------------------------------- the learner


def learner(family="qwen3", sections=DECAY, layer=0, **fields):
    """A learner of three layers at its beginning, and rows with the internal policy's old log-probs."""
    spec, alg = tiny.spec(family, num_hidden_layers=3), algorithms.make("bupo", layer=layer, **fields)
    made = Learner(learning.config(**sections), spec, alg, make_mesh(learning.config().mesh))
    made.init(tiny.params(spec))
    rows = learning.rollouts()
    seen = made.views(rows, ("logp", "inner_logp"))
    return made, rows.with_(old_logp=seen.logp, extras={"old_inner_logp": seen.inner_logp})


def step(made, state, rows):
    made.step(state, rows, learning.credit(rows))
    made._watch.check()
    return jax.device_get(made.train)


@pytest.mark.parametrize("family, norm", [("llama", False), ("qwen3", True), ("qwen3_moe", False)])
def test_the_first_phase_moves_what_is_below_and_leaves_the_rest_bitwise(family, norm):
    made, rows = learner(family, apply_final_norm=norm)
    before = step(made, FULL, rows)  # every moment is there from now on
    after = step(made, made.alg.init(), rows)
    moments = before.opt["policy"], after.opt["policy"]
    masks = decoder.reached(made.spec, made.shapes["policy"], 0, norm)

    def check(path, mask, old, new):
        same = np.where(mask, 0, new - old)
        np.testing.assert_array_equal(same, 0, err_msg=jax.tree_util.keystr(path))
        if mask.any():
            assert np.any(np.where(mask, new != old, False)), jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(check, masks, before.params["policy"], after.params["policy"])
    for name in ("mu", "nu"):
        old, new = (getattr(opt[1], name) for opt in moments)
        jax.tree_util.tree_map_with_path(check, masks, old, new)
    assert int(after.count["policy"]) == 2 and int(moments[1][1].count) == 2
    last = step(made, FULL, rows)
    moved = jax.tree.map(lambda a, b: np.any(a != b), after.params["policy"], last.params["policy"])
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize("route", ["fused", "joint"])
def test_the_first_phase_runs_no_layer_above(route):
    made, rows = learner(sections={**DECAY, "learner": {"route": route}})
    policy = made.train.params["policy"]
    masks = decoder.reached(made.spec, policy, 0, False)
    broken = jax.tree.map(lambda x, mask: jnp.where(mask, x, jnp.nan), policy, masks)
    made.init(broken)
    after = step(made, made.alg.init(), rows)
    assert int(after.count["policy"]) == 1
    reached = jax.tree.map(lambda x, mask: np.isfinite(np.where(mask, x, 0)).all(), after.params["policy"], masks)
    assert all(jax.tree.leaves(reached))


def test_the_last_layer_s_policy_is_the_policy_only_by_way_of_the_norm():
    made, rows = learner(layer=2)
    plain = made.views(rows, ("logp", "inner_logp"))
    assert np.abs(plain.logp - plain.inner_logp)[rows.mask].max() > 1e-2
    made, rows = learner(layer=2, apply_final_norm=True)
    assert made.alg.needs.inner == Inner(2, True)
    normed = made.views(rows, ("logp", "inner_logp"))
    np.testing.assert_allclose(normed.logp, normed.inner_logp, atol=1e-6)


def test_a_layer_the_model_has_not_is_refused():
    with pytest.raises(ValueError, match=r"algorithm.layer=3: expected 0 to 2, the model's layers"):
        learner(layer=3)
