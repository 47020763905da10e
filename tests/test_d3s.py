"""D3S, arXiv 2509.22115: both selections, their schedule, and the loss on what is left."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import loss_and_grad, rollouts

from jaxrl_llm import algorithms
from jaxrl_llm.advantages import group
from jaxrl_llm.algorithms import d3s
from jaxrl_llm.algorithms.base import Report

KEY = jax.random.key(0)
REWARD, GROUP = [1.0, 0, 0, 0, 1, 1, 1, 1], [0] * 4 + [1] * 4
A = [1.73204681, -0.57734894, -0.57734894, -0.57734894, 0, 0, 0, 0]
OLD = np.full((8, 2), -1.0)
LOGP = OLD + np.array([[0.5, 0.1], [-0.1, -0.4], *[[0.3, -0.2]] * 6])
ENTROPY = np.array([[0.1, 0.9], [0.8, 0.3], *[[1.0, 2.0]] * 6])
SPEC = {"rows_init": 0.5, "rows_final": 0.5, "tokens_init": 0.5, "tokens_final": 0.5}  # N = 2 of 4, K = 0.5

pytestmark = pytest.mark.usefixtures("x64")


def batch(mask=None, entropy=ENTROPY):
    return rollouts(np.ones((8, 2)) if mask is None else mask, REWARD, GROUP, OLD, {"old_entropy": entropy})


def chosen(alg, rows=None, step=0):
    rows = batch() if rows is None else rows
    state = {"step": jnp.asarray(step, jnp.int32)}
    return alg.select(state, {}, rows, alg.credit(state, rows, KEY), KEY)


def test_advantages_are_of_the_whole_group():
    alg = algorithms.make("d3s")
    np.testing.assert_allclose(alg.credit(alg.init(), batch(), KEY).score, A, atol=5e-9)


@pytest.mark.parametrize(("p", "expected"), [(0, (4, 0.2)), (0.5, (6, 0.35)), (1, (8, 0.5)), (7, (8, 0.5))])
def test_both_amounts_grow_with_progress(p, expected):
    rows, tokens = d3s.shares(d3s.Config(steps=100), round(100 * p))
    np.testing.assert_allclose((rows * 16, tokens), expected, rtol=1e-12)


def test_rows_and_tokens_that_survive():
    selected = chosen(algorithms.make("d3s", **SPEC))
    assert np.asarray(selected.rows.counted).tolist() == [True, True] + [False] * 6
    assert np.asarray(selected.credit.extras["kept"])[:2].tolist() == [[False, True], [True, False]]
    assert not selected.credit.extras["kept"][2:].any() and not selected.credit.advantage[2:].any()


def test_loss_and_gradient():
    alg = algorithms.make("d3s", **SPEC)
    selected = chosen(alg)
    value, grad = loss_and_grad(alg, selected.rows, LOGP, selected.credit)
    np.testing.assert_allclose(value, -0.69590042, atol=5e-9)
    np.testing.assert_allclose(grad, [[0, -0.95710388], [0.26120346, 0], *[[0, 0]] * 6], atol=5e-9)


def test_the_sequence_ratio_is_of_all_tokens_of_the_row():
    alg = algorithms.make("d3s", ratio="sequence", clip_low=0.9, clip_high=9.0, **SPEC)
    selected = chosen(alg)
    value, grad = loss_and_grad(alg, selected.rows, LOGP, selected.credit)
    s = np.exp([0.3, -0.25])
    np.testing.assert_allclose(value, -(s * A[:2]).sum() / 2, rtol=1e-7)
    np.testing.assert_allclose(grad[:2], np.repeat(-(s * A[:2])[:, None] / 4, 2, 1), rtol=1e-7)


def test_the_most_varied_subset_is_the_best_of_all_subsets():
    rng = np.random.default_rng(0)
    for n, size in [(6, 3), (7, 2), (8, 5), (5, 5), (4, 6)]:
        for _ in range(5):
            values = np.round(rng.normal(size=n), 1)
            got = d3s.most_varied(values, size)
            best = max(np.var(values[list(s)]) for s in itertools.combinations(range(n), min(n, size)))
            assert len(set(got.tolist())) == min(n, size)
            np.testing.assert_allclose(np.var(values[got]), best, rtol=1e-12)


def test_ties_go_to_the_first_rows():
    assert d3s.most_varied(np.zeros(5), 3).tolist() == [0, 1, 2]
    assert d3s.most_varied(np.array([1.0, 0, 1, 0]), 2).tolist() == [0, 1]


def test_of_a_standardised_set_some_subset_of_any_size_has_a_variance_of_at_least_1():
    rng = np.random.default_rng(1)
    for _ in range(30):
        reward = rng.normal(size=8)
        a = np.asarray(group.normalized(jnp.asarray(reward), jnp.zeros(8, int), jnp.ones(8, bool), ddof=0, eps=0.0))
        assert all(np.var(a[d3s.most_varied(a, size)]) >= 1 - 1e-12 for size in range(2, 9))


def test_groups_that_agree_survive_only_where_nothing_better_fills_the_budget():
    a = np.array([1.0, -1.0, 0, 0, 0, 0])
    groups, counted = np.array([0, 0, 1, 1, 2, 2]), np.ones(6, bool)
    assert d3s.keep_rows(a, groups, counted, 1.0, 0.3).tolist() == [True, True, False, False, False, False]
    assert d3s.keep_rows(a, groups, counted, 1.0, 0.5).sum() == 3
    assert d3s.keep_rows(a, groups, counted & (groups > 0), 1.0, 1.0).tolist() == [False, False, *[True] * 4]


def test_tokens_are_ranked_over_the_selection_or_inside_each_completion():
    rank, mask = np.array([[5.0, 4, 3], [2, 1, 2]]), np.array([[1, 1, 1], [1, 1, 1]], bool)
    assert d3s.keep_tokens(rank, mask, 0.5, "batch").tolist() == [[True, True, True], [False, False, False]]
    assert d3s.keep_tokens(rank, mask, 0.34, "response").tolist() == [[True, True, False], [True, False, True]]
    assert d3s.keep_tokens(rank, mask, 1 / 3, "response").tolist() == [[True, False, False], [True, False, False]]


def test_a_kept_row_without_tokens_counts_in_the_mean():
    mask = np.ones((8, 2))
    mask[1] = 0
    alg = algorithms.make("d3s", **{**SPEC, "tokens_init": 1.0, "tokens_final": 1.0})
    selected = chosen(alg, batch(mask))
    value, _ = loss_and_grad(alg, selected.rows, OLD, selected.credit)
    np.testing.assert_allclose(value, -A[0] / 2, atol=5e-9)  # rows 0 and 1 are kept, row 1 is empty


def test_keeping_everything_is_grpo():
    whole = dict.fromkeys(["rows_init", "rows_final", "tokens_init", "tokens_final", "batch_keep"], 1.0)
    alg = algorithms.make("d3s", **whole)
    selected = chosen(alg)
    ours = loss_and_grad(alg, selected.rows, LOGP, selected.credit)
    plain = loss_and_grad(algorithms.make("grpo", ddof=0), batch(), LOGP)
    for x, y in zip(ours, plain):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-15)


def test_the_step_is_counted():
    alg = algorithms.make("d3s")
    state, _ = alg.observe(alg.init(), {}, batch(), None, Report({}, {}, 1), None)
    assert int(state["step"]) == 1 and state["step"].dtype == jnp.int32


@pytest.mark.parametrize("fields", [{"rows_init": 0.0}, {"batch_keep": 1.5}, {"steps": 0}, {"scope": "row"}])
def test_bad_settings_raise_one_clear_line(fields):
    with pytest.raises(ValueError, match=r"^algorithm\.\w+=.*: expected [^\n]*$"):
        algorithms.make("d3s", **fields)
