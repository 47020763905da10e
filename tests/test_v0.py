"""V0, arXiv 2602.03584: predictions from pairs, the adapter's loss, and rollouts where outcomes are mixed."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scripted
from arrays import loss_and_grad, rollouts
from scipy.stats import binom
from test_loop import configured, letters, metrics_of

from jaxrl_llm import algorithms
from jaxrl_llm.algorithms import v0
from jaxrl_llm.algorithms.base import Report
from jaxrl_llm.models import state_zero
from jaxrl_llm.rollout import budget
from jaxrl_llm.rollout.rows import pack
from jaxrl_llm.training import host_state, loop

# The predictor


def test_the_adapters_loss_and_gradient(x64):
    logits, y = jnp.asarray([[0.2, 0.9], [0.1, 0.4], [0.5, -0.3], [1, -1]]), jnp.asarray([1.0, 0, 1, 0])
    value, grad = jax.value_and_grad(state_zero.adapter_loss)(logits, y)
    np.testing.assert_allclose(value, 0.57620658, atol=5e-9)
    expected = [
        [0.11237884, -0.11237884],
        [-0.15787201, 0.15787201],
        [0.15830462, -0.15830462],
        [-0.05128495, 0.05128495],
    ]
    np.testing.assert_allclose(grad, expected, atol=5e-9)


def test_ranking_is_blind_to_a_shift_of_the_whole_context(x64):
    logits, y = jnp.asarray([[0.2, 0.9], [0.1, 0.4]]), jnp.asarray([1.0, 0])
    ranked = [state_zero.adapter_loss(logits + jnp.asarray([0, shift]), y, 1.0) for shift in (0.0, 5.0)]
    np.testing.assert_allclose(ranked[0], ranked[1], rtol=1e-12)


def test_queries_alternate_and_the_shorter_list_comes_again():
    a, b, c, x, y = range(5)
    got = state_zero.alternating(np.array([a, b, c]), np.array([x, y]))
    assert got.tolist() == [a, x, b, y, c, x]
    assert not len(state_zero.alternating(np.array([a]), np.array([], int)))


def test_labels():
    np.testing.assert_allclose(state_zero.label(jnp.asarray([-3.0, -1, 0.5, 1])), [0, 0, 0.75, 1])
    assert state_zero.routing_label(1, 0.3, 0.8) == pytest.approx(0.94)


def test_the_stand_in_head(x64):
    context, query = jnp.asarray([[1.0, 0], [0, 1], [1, 1]]), jnp.asarray([[2.0, 0], [0, 2]])
    p = jax.nn.softmax(state_zero.kernel_head(context, jnp.asarray([1.0, 0, 1]), query))[:, 1]
    np.testing.assert_allclose(p, [0.73496993, 0.53251504], atol=5e-9)


def test_features_do_not_see_padding_and_start_without_a_residual():
    params, rng = state_zero.init(jax.random.key(0), 5), np.random.default_rng(0)
    hidden, mask = rng.normal(size=(2, 4, 5)), np.array([[1, 1, 0, 0], [1, 1, 1, 1]], bool)
    z = state_zero.features(params, jnp.asarray(hidden), jnp.asarray(mask))
    assert z.shape == (2, 48)
    hidden[0, 2:] = np.nan
    np.testing.assert_array_equal(state_zero.features(params, jnp.asarray(hidden), jnp.asarray(mask)), z)
    other = {**params, "w1": params["w1"] + 1.0}
    np.testing.assert_array_equal(state_zero.features(other, jnp.asarray(hidden), jnp.asarray(mask)), z)
    moved = state_zero.features({**params, "b2": params["b2"] + 1.0}, jnp.asarray(hidden), jnp.asarray(mask))
    assert np.isfinite(moved).all()
    grads = jax.grad(lambda p: state_zero.features(p, jnp.asarray(hidden), jnp.asarray(mask))[1, 0])(params)
    assert np.abs(grads["w2"]).max() > 0 and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_the_stand_in_finds_prompts_like_those_that_were_solved():
    config = v0.Config(temperature=0.02)
    known = [np.array([1, 5, 5, 5])] * 8 + [np.array([1, 9, 9, 9])] * 8
    p = v0.stand_in(config)(known, np.repeat([1.0, 0.0], 8), [np.array([1, 5, 5]), np.array([1, 9, 9])])
    assert p[0] > 0.5 > p[1]


# Rollouts


def test_the_utility_of_rollouts():
    p = np.array([0.05, 0.25, 0.5, 0.9, 0, 1])
    np.testing.assert_allclose(v0.utility(8, p), [2.29263655, 5.19909668, 3.96875, 0.79999992, 0, 0], atol=5e-9)
    k = np.arange(9)
    mixed = [np.sum(binom.pmf(k, 8, q) * (8 - k) * ((k > 0) & (k < 8))) for q in p]
    np.testing.assert_allclose(v0.utility(8, p), mixed, atol=1e-12)


P = np.array([0.9, 0.5, 0.1, 0])


@pytest.mark.parametrize(
    ("how", "most", "expected"),
    [
        ("greedy", 128, [2, 18, 2, 2]),
        ("exact", 128, [2, 2, 18, 2]),
        ("greedy", 8, [6, 8, 8, 2]),
        ("exact", 8, [6, 8, 8, 2]),
    ],
)
def test_allocations(how, most, expected):
    assert v0.allocate(P, 24, 2, most, how).tolist() == expected


def test_the_exact_allocation_is_the_best_of_all():
    p = np.array([0.05, 0.3, 0.7])
    best = max(sum(v0.utility(np.array(b), p)) for b in itertools.product(range(2, 8), repeat=3) if sum(b) <= 12)
    got = v0.allocate(p, 12, 2, 7, "exact")
    assert got.sum() <= 12
    np.testing.assert_allclose(v0.utility(got, p).sum(), best, rtol=1e-12)


def test_a_budget_of_nothing_more_than_the_least():
    assert budget.exact(np.ones((2, 3)), 4, 2).tolist() == [2, 2]


PROMPTS = [scripted.prompt(g, [1, 10 + g]) for g in range(4)]


def collected(memory, asked=None, **fields):
    def predict(known, rewards, prompts):
        if asked is not None:
            asked.append(([k.tolist() for k in known], rewards.tolist(), [p.tolist() for p in prompts]))
        return P

    alg = v0.build(v0.Config(context=4, least_context=2, **fields), predict)
    plan = alg.plan(())._replace(group_size=6, memory=memory)
    return alg, scripted.collect(plan, PROMPTS, lambda c, i: scripted.completion([i % 2]), lambda t: float(t[0]))


def test_without_enough_pairs_groups_are_equal_and_then_they_follow_the_prediction():
    alg, (rows, requests) = collected({})
    assert list(requests[0].n) == [6] * 4
    packed = pack(rows, contexts=4, prompt_len=3, size=24, length=1, parts=1)
    _, memory = alg.observe((), {}, jax.tree.map(jnp.asarray, packed), None, Report({}, {}, 1), None)
    memory = host_state.decode(host_state.encode(memory))  # as a resumed run sees it
    assert memory["pool"]["reward"].tolist() == [0.5] * 4
    asked = []
    _, (rows, requests) = collected(memory, asked)
    assert list(requests[0].n) == [2, 18, 2, 2] and len(rows) == 24
    assert asked == [([[1, 10 + g] for g in range(4)], [0.5] * 4, [[1, 10 + g] for g in range(4)])]
    assert list(collected(memory, allocation="exact")[1][1][0].n) == [2, 2, 18, 2]


def test_the_pool_keeps_the_newest_pairs_and_no_unscored_ones():
    alg, (rows, _) = collected({})
    packed = pack(rows, contexts=4, prompt_len=3, size=24, length=1, parts=1)
    old = {"tokens": np.full((3, 3), 7, np.int32), "length": np.full(3, 3, np.int32), "reward": np.ones(3, np.float32)}
    some = packed.with_(scored=packed.group != 2)
    pool = alg.observe((), {"pool": old}, some, None, Report({}, {}, 1), None)[1]["pool"]
    assert pool["tokens"][:, 1].tolist() == [7, 10, 11, 13]
    none = packed.with_(scored=np.zeros(24, bool))
    assert len(alg.observe((), {"pool": old}, none, None, Report({}, {}, 1), None)[1]["pool"]["reward"]) == 3


def test_groups_beyond_the_cap_are_refused():
    with pytest.raises(ValueError, match=r"algorithm\.most=5: expected at least group_size = 6"):
        collected({}, most=5)


def test_the_loss_is_grpos(x64):
    rows = rollouts(np.ones((3, 2)), [1.0, 0, 0], np.zeros(3), -np.ones((3, 2)))
    logp = -np.ones((3, 2)) + np.array([[0.3, 0.1], [-0.1, 0], [0.2, -0.4]])
    ours, plain = (loss_and_grad(algorithms.make(name), rows, logp) for name in ("v0", "grpo"))
    np.testing.assert_array_equal(ours[1], plain[1])


def test_it_trains_in_the_ordinary_loop(tmp_path):
    sizes = []

    def watch(step, rows):
        letters(step, rows)
        sizes.append(np.bincount([r.group for r in rows]))

    algorithm = {"name": "v0", "context": 8, "least_context": 4}
    config = configured(tmp_path, run={"steps": 2}, eval={"size": 0}, learner={"epochs": 1}, algorithm=algorithm)
    assert loop.train(config, on_rows=watch) == 0
    assert [s.sum() for s in sizes] == [16, 16] and sizes[0].tolist() == [4] * 4 and sizes[1].min() >= 2
    assert all(np.isfinite(line["grad_norm"]) for line in metrics_of(tmp_path))


@pytest.mark.parametrize("fields", [{"least": 1}, {"most": 1}, {"least_context": 300}, {"allocation": "even"}])
def test_bad_settings_raise_one_clear_line(fields):
    with pytest.raises(ValueError, match=r"^algorithm\.\w+=.*: expected [^\n]*$"):
        algorithms.make("v0", **fields)
