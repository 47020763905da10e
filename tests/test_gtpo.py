"""GTPO, arXiv 2508.03772: the known answers of its specification, in float64, conflict runs, and the remembered entropy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import credit_of, loss_and_grad, rollouts

from jaxrl_llm import algorithms
from jaxrl_llm.advantages.conflicts import conflicts
from jaxrl_llm.algorithms.base import Report

TOKENS = [[5, 6, 1, 9], [5, 6, 2, 9], [5, 7, 9, 0], [4, 6, 3, 8]]
MASK = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]], bool)
REWARD = [2.0, 0, 1, 1]
ENTROPY = [[0.5, 0.5, 0.6, 0.4], [0.2, 0.3, 0.1, 0.2], [0.3, 0.3, 0.3, 0], [1.0, 0.9, 0.8, 0.7]]
LOGP = [[-0.5, -0.4, -0.9, -0.1], [-0.6, -0.2, -1.1, -0.3], [-0.4, -0.7, -0.2, 0], [-1.0, -0.9, -0.5, -0.6]]
LAMBDA = [[2, 2, 1, 2], [0, 0, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def double(x64):
    """Known answers are in float64."""


def close(actual, expected, tol=6e-9):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tol)


def batch(reward=REWARD, old_entropy=ENTROPY):
    return rollouts(MASK, reward, extras={"old_entropy": old_entropy}).with_(tokens=jnp.array(TOKENS, jnp.int32))


def known(h_init):
    return {"h_init": jnp.array(h_init), "seen": jnp.asarray(True)}


def result(h_init=0.5, rows=None, logp=LOGP, **fields):
    alg, rows = algorithms.make("gtpo", **fields), batch() if rows is None else rows
    credit = alg.credit(known(h_init), rows, KEY)
    return loss_and_grad(alg, rows, logp, credit, state=known(h_init), entropy=ENTROPY)


def test_advantage_and_token_weights():
    credit = algorithms.make("gtpo").credit(known(0.5), batch(), KEY)
    close(credit.advantage, np.where(MASK, np.array([[1.0], [-1], [0], [0]]), 0), 1e-14)
    np.testing.assert_array_equal(credit.extras["lambda"], LAMBDA)


def test_loss_and_gradient():
    value, grad = result()
    close(value, -0.34437500)
    expected = [
        [-0.11875000, -0.11875000, -0.05937500, -0.11875000],
        [0, 0, 0.06375000, 0],
        [0.00250000, 0.00250000, 0.00250000, 0],
        [0, 0, 0, 0],
    ]
    close(grad, expected)


def test_a_policy_that_began_above_ln_2_is_not_filtered():
    close(result(h_init=0.9)[0], -0.32312500)


def test_the_codes_division_by_conflicts():
    close(result(divide_by_conflicts=True)[0], -0.16843750)


def test_a_wrong_answer_never_pushes_down_what_a_right_one_shares():
    _, grad = result(gamma=0.0)
    shared = np.array(LAMBDA) == 0
    assert not grad[shared].any()


def test_a_group_that_agrees_has_no_conflict_and_is_pushed_down_by_its_entropy():
    value, grad = result(rows=batch(reward=[1.0] * 4), h_init=0.9)
    entropy = np.where(MASK, ENTROPY, 0).sum(1) / MASK.sum(1)
    close(value, 0.1 * entropy.mean(), 1e-14)
    close(grad, np.where(MASK, (0.1 * entropy / MASK.sum(1) / 4)[:, None], 0), 1e-14)


def naive(tokens, mask, group, advantage):
    """Runs by the definition, one row and offset after another; masks are prefixes."""
    rows = [list(np.array(t)[m]) for t, m in zip(tokens, mask)]
    leading, trailing = np.zeros(mask.shape, bool), np.zeros(mask.shape, bool)
    for out, sequences in ((leading, rows), (trailing, [r[::-1] for r in rows])):
        for i, row in enumerate(sequences):
            for t, token in enumerate(row):
                same = [
                    advantage[j] for j, o in enumerate(sequences) if group[j] == group[i] and o[t : t + 1] == [token]
                ]
                if advantage[i] == 0 or not (max(same) > 0 > min(same)):
                    break
                out[i, t if out is leading else len(row) - 1 - t] = True
    return leading, trailing


@pytest.mark.parametrize("seed", range(5))
def test_runs_are_those_of_the_definition(seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 2, (24, 6))
    mask = np.arange(6) < rng.integers(0, 7, 24)[:, None]
    group, advantage = rng.integers(0, 3, 24), rng.choice([-1.0, 0, 1], 24)
    got = conflicts(jnp.array(tokens), jnp.array(mask), jnp.array(group), jnp.array(advantage))
    for one, expected in zip(got, naive(tokens, mask, group, advantage)):
        np.testing.assert_array_equal(one, expected)


def test_equal_completions_of_opposite_reward_are_one_conflict():
    same = jnp.array([[3, 4, 5], [3, 4, 5]])
    runs = conflicts(same, jnp.ones((2, 3), bool), jnp.zeros(2, int), jnp.array([1.0, -1]))
    assert np.all(runs.leading) and np.all(runs.trailing)
    rows = rollouts(np.ones((2, 3)), [1.0, 0], extras={"old_entropy": np.zeros((2, 3))}).with_(tokens=same)
    weight = algorithms.make("gtpo").credit(known(0.5), rows, KEY).extras["lambda"]
    np.testing.assert_array_equal(weight, [[2, 2, 2], [0, 0, 0]])


def test_a_token_that_is_not_trained_ends_a_run():
    mask = jnp.array([[1, 0, 1, 1], [1, 1, 1, 1]], bool)
    runs = conflicts(jnp.full((2, 4), 7), mask, jnp.zeros(2, int), jnp.array([1.0, -1]))
    np.testing.assert_array_equal(runs.leading, [[1, 0, 0, 0], [1, 0, 0, 0]])
    np.testing.assert_array_equal(runs.trailing, [[0, 0, 1, 1], [0, 0, 1, 1]])


def observe(state, entropy):
    alg, rows = algorithms.make("gtpo"), batch(old_entropy=entropy)
    return alg.observe(state, {}, rows, credit_of(np.zeros(4), rows), Report({}, {}, 1), None)[0]


def test_h_init_is_the_mean_over_the_first_batchs_completions_and_stays():
    alg = algorithms.make("gtpo")
    mean = (0.5 + 0.2 + 0.3 + 0.85) / 4
    close(alg.credit(alg.init(), batch(), KEY).extras["h_init"], mean, 1e-14)
    state = observe(alg.init(), ENTROPY)
    assert bool(state["seen"]) and state["h_init"].dtype == jnp.float32
    later = observe(state, np.full((4, 4), 3.0))
    close(later["h_init"], mean, 1e-7)
    close(alg.credit(later, batch(old_entropy=np.full((4, 4), 3.0)), KEY).extras["h_init"], mean, 1e-7)


def test_a_first_batch_without_tokens_says_nothing():
    alg = algorithms.make("gtpo")
    rows = batch().with_(mask=jnp.zeros((4, 4), bool))
    state, _ = alg.observe(alg.init(), {}, rows, credit_of(np.zeros(4), rows), Report({}, {}, 1), None)
    assert not bool(state["seen"])


@pytest.mark.parametrize(("field", "value"), [("gamma", -0.1), ("w", -1.0), ("threshold", -1.0)])
def test_contradictory_settings_raise_one_clear_line(field, value):
    with pytest.raises(ValueError, match=rf"^algorithm\.{field}={value}: expected at least 0$"):
        algorithms.make("gtpo", **{field: value})
