"""RiskPO, arXiv 2510.00911: the known answers of its specification, in float64, its bundles and its tracked quantiles."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from arrays import credit_of, loss_and_grad, rollouts

from jaxrl_llm import algorithms
from jaxrl_llm.advantages import risk
from jaxrl_llm.algorithms.base import Report

REWARD = [1.0, 0, 0, 1, 1, 0, 0, 0, 0]
GROUP = [0, 0, 0, 1, 1, 1, 2, 2, 2]
FIRST = [0, -0.39999893, -1.99999067] * 3
KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def double(x64):
    """Known answers are in float64."""


def batch(reward=REWARD, group=GROUP, **changes):
    return rollouts(np.ones((len(reward), 1)), reward, group, np.full((len(reward), 1), -0.6)).with_(**changes)


def state_of(quantiles):
    return {"quantiles": jnp.array(quantiles, float), "seen": jnp.asarray(True)}


def advantage(rows=None, quantiles=None, **fields):
    alg = algorithms.make("riskpo", **fields)
    state = alg.init() if quantiles is None else state_of(quantiles)
    return np.asarray(alg.credit(state, batch() if rows is None else rows, KEY).advantage)[:, 0]


def close(actual, expected, tol=6e-9):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tol)


def test_a_bundle_sums_the_jth_answers_of_its_prompts():
    b = risk.bundles(jnp.array(REWARD), jnp.array(GROUP), jnp.ones(9, bool), jnp.arange(9), 3)
    np.testing.assert_array_equal(b.score, [2, 1, 0] * 3)
    np.testing.assert_array_equal(b.first, [True] * 3 + [False] * 6)


def test_the_first_step_uses_the_quantiles_of_each_block():
    close(advantage(), FIRST)
    close(advantage(quantiles=(0.5, 1.5), q_source="block"), FIRST)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [0, -0.33333244, -2.16665589] * 3),
        (
            {"credit": "std"},
            [0, -0.57734773, -3.75275158, 0, -0.57734773, -3.75275158, 0, -0.33333211, -2.16665372],
        ),
        (
            {"credit": "sum-mean"},
            [0, -0.11111081, -0.72221863, 0, -0.11111081, -1.44443726, 0, -0.11111081, 0],
        ),
        ({"weighting": "paper"}, [0, -0.4999995, -1.74999825] * 3),
        ({"natural_baseline": False}, [0.66666489, 0.33333244, -1.499991] * 3),
        ({"normalize": False}, np.array([0, -0.33333244, -2.16665589] * 3) * (1 + 1e-6)),  # the block's std is 1
    ],
)
def test_advantages_with_tracked_quantiles(fields, expected):
    close(advantage(quantiles=(0.5, 1.5), **fields), expected)


def observe(state, rows):
    alg = algorithms.make("riskpo")
    state = alg.init() if state is None else state
    return alg.observe(state, {}, rows, credit_of(np.zeros(len(rows.group)), rows), Report({}, {}, 1), None)[0]


def test_the_tracker_starts_at_the_steps_quantiles_and_then_follows_slowly():
    state = observe(None, batch())
    close(state["quantiles"], [0.4, 1.6], 1e-7)
    assert bool(state["seen"])
    state = observe(state, batch())
    close(state["quantiles"], [0.38666667, 1.61333333], 1e-7)
    assert state["quantiles"].dtype == jnp.float32


def test_a_step_without_scores_leaves_the_tracker():
    nothing = batch([np.nan] * 9, scored=jnp.zeros(9, bool))
    assert not bool(observe(None, nothing)["seen"])
    close(observe(state_of([0.5, 1.5]), nothing)["quantiles"], [0.5, 1.5])


@pytest.mark.parametrize(("level", "expected"), [("token", 0.92097147), ("sequence", 0.92097147)])
def test_loss(level, expected):
    rows = batch()
    credit = credit_of([0, -0.33333244, -2.16665589] * 3, rows)
    value, _ = loss_and_grad(algorithms.make("riskpo", level=level), rows, np.full((9, 1), -0.5), credit)
    close(value, expected)


def test_the_sequence_level_has_one_clipped_ratio_for_a_row():
    mask = np.array([[1, 1], [1, 0]], bool)
    rows = rollouts(mask, [0.0, 1], [0, 0], [[-1.0, -1], [-1, 0]])
    logp = [[-0.5, -1.7], [-0.6, 0]]
    value, grad = loss_and_grad(algorithms.make("riskpo", level="sequence"), rows, logp, credit_of([-1.0, -1], rows))
    s = np.exp([-0.1, 0.4])
    close(value, s.mean(), 1e-14)
    close(grad, [[s[0] / 4, s[0] / 4], [s[1] / 2, 0]], 1e-14)


def test_an_all_wrong_prompt_learns_through_its_bundle_and_no_advantage_is_positive():
    a = advantage(quantiles=(0.5, 1.5))
    assert np.all(a <= 0) and np.all(a[7:] < 0)


def test_a_block_whose_scores_agree_is_not_divided_by_nothing():
    close(advantage(batch([1.0] * 4, [0, 0, 1, 1]), quantiles=(0.5, 3.0)), [-(1 / 0.600001) / 2.5] * 4, 1e-5)


def test_the_last_block_may_be_smaller_and_ragged_groups_give_what_the_smallest_has():
    rows = batch([1.0, 0, 2, 5, 7, 1, 4], [3, 3, 3, 8, 8, 11, 11])
    b = risk.bundles(rows.score, rows.group, rows.counted, rows.row_id, 2)
    np.testing.assert_array_equal(b.member, [True, True, False, True, True, True, True])
    np.testing.assert_array_equal(np.asarray(b.score)[np.asarray(b.member)], [6, 7, 6, 7, 1, 4])
    np.testing.assert_array_equal(b.first, [True, True, False, False, False, True, True])


def test_an_unscored_row_leaves_its_place_to_the_next():
    scored = jnp.array([False] + [True] * 8)
    rows = batch([np.nan, *REWARD[1:]], scored=scored)
    b = risk.bundles(rows.score, rows.group, rows.counted, rows.row_id, 3)
    np.testing.assert_array_equal(np.asarray(b.score)[np.asarray(b.first)], [1, 1])
    assert np.all(np.isfinite(advantage(rows)[1:]))


def test_quantiles_within_segments_are_numpys():
    rng = np.random.default_rng(0)
    x, ids, where = rng.normal(size=40), rng.integers(0, 5, 40), rng.random(40) < 0.7
    for level in (0.0, 0.2, 0.8, 1.0):
        got = risk.quantile(jnp.array(np.where(where, x, np.nan)), jnp.array(ids), jnp.array(where), level)
        close(got, [np.quantile(x[where & (ids == i)], level) for i in ids], 1e-14)
    assert not risk.quantile(jnp.array(x), jnp.array(ids), jnp.zeros(40, bool), 0.5).any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bundle": 0}, "algorithm.bundle=0: expected at least 1"),
        ({"lo": 0.9}, "algorithm.lo=0.9: expected more than 0, less than hi=0.8, and that less than 1"),
        ({"credit": "mean"}, "algorithm.credit='mean': expected one of uniform, std, sum-mean"),
    ],
)
def test_contradictory_settings_raise_one_clear_line(fields, message):
    with pytest.raises(ValueError) as error:
        algorithms.make("riskpo", **fields)
    assert str(error.value) == message


def along_rewards(**fields):
    """Cosine of the advantages of a second step and the rewards less their prompts' means, where a fifth of the answers are
    right; and the share of right answers that the advantages push down."""
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(256), 8)
    first, second = (rng.random(2048) < rng.beta(0.6, 2.4, 256)[group] for _ in range(2))
    alg = algorithms.make("riskpo", **fields)
    rows = batch(first.astype(float), group)
    state, _ = alg.observe(alg.init(), {}, rows, alg.credit(alg.init(), rows, KEY), Report({}, {}, 1, ()), None)
    a = np.asarray(alg.credit(state, batch(second.astype(float), group), KEY).advantage)[:, 0]
    d = second - second.reshape(256, 8).mean(1)[group]
    return a @ d / np.sqrt((a @ a) * (d @ d)), np.mean(a[second] < 0)


def test_the_defaults_hardly_follow_binary_rewards_of_hard_problems_and_the_file_does():
    cosine, down = along_rewards()
    assert cosine < 0.2 and down > 0.35
    path = Path(__file__).parents[1] / "configs" / "algorithms" / "riskpo.yaml"
    fields = {k: v for k, v in yaml.safe_load(path.read_text())["algorithm"].items() if k != "name"}
    cosine, down = along_rewards(**fields)
    assert cosine > 0.4 and down < 0.1
