"""Group statistics over ragged groups, leave-one-out, GAE, whitening, overlong penalties, replay."""

import jax
import jax.numpy as jnp
import nasty
import numpy as np
import pytest

from jaxrl_llm import replay
from jaxrl_llm.advantages import gae, group, overlong
from jaxrl_llm.advantages.whiten import whiten
from jaxrl_llm.algorithms.base import Needs
from jaxrl_llm.types import REPLAY, Credit

SCORE = np.array([1.0, 5.0, 0.0, 2.0, 4.0, 9.0, 7.0])
GROUP = np.array([-7, 100, -7, 3, 100, 3, 55])
ALL = np.ones(7, bool)


@pytest.fixture(autouse=True)
def double(x64):
    """Everything here is exact mathematics, so in float64."""


def test_statistics_are_those_of_each_rows_group():
    stats = group.statistics(SCORE, GROUP, ALL)
    for i in range(7):
        own = SCORE[GROUP[i] == GROUP]
        assert (stats.count[i], stats.mean[i], stats.spread[i]) == (len(own), own.mean(), np.ptp(own))
        np.testing.assert_allclose(stats.std[i], own.std(ddof=1) if len(own) > 1 else 0)


def test_uncounted_rows_leave_no_trace():
    counted = np.array([1, 1, 1, 0, 1, 1, 1], bool)
    score = np.where(counted, SCORE, np.nan)
    advantage = group.normalized(score, GROUP, counted, scale="none")
    assert advantage[3] == 0
    assert advantage[5] == 0  # alone in its group now
    np.testing.assert_allclose(advantage[:3:2], [0.5, -0.5])


def test_dense_ids_number_the_groups():
    ids = np.asarray(group.dense_ids(GROUP))
    assert np.array_equal(ids[:, None] == ids, GROUP[:, None] == GROUP)
    assert set(ids) == {0, 1, 2, 3}


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_group_without_spread_has_exactly_no_advantage(scale):
    score = np.array([0.1 + 0.2, 0.3, 0.3, 1.0, 0.0])
    advantage = np.asarray(group.normalized(score, np.array([1, 1, 1, 2, 2]), np.ones(5, bool), scale=scale))
    assert np.all(advantage[:3] == 0) and np.all(advantage[3:] != 0)


@pytest.mark.parametrize("base", [0.5, 1000.0])
def test_a_spread_of_1e_7_is_not_blown_up(base):
    score = base * (1 + 1e-7 * np.array([0, 1, -1, 0.5]))
    zeros = np.zeros(4, int)
    assert not np.any(group.normalized(score, zeros, np.ones(4, bool)))
    assert not np.any(group.leave_one_out(score, zeros, np.ones(4, bool)))
    assert np.any(group.normalized(score, zeros, np.ones(4, bool), spread_tol=0.0))


@pytest.mark.parametrize(("singleton", "expected"), [("zero", 0.0), ("raw", 7 / (1 + 1e-6))])
def test_a_group_of_one(singleton, expected):
    advantage = group.normalized(SCORE, GROUP, ALL, singleton=singleton)
    np.testing.assert_allclose(advantage[6], expected)
    assert group.leave_one_out(SCORE, GROUP, ALL)[6] == 0


def test_leave_one_out_subtracts_the_mean_of_the_others_and_sums_to_zero():
    advantage = group.leave_one_out(SCORE, GROUP, ALL)
    np.testing.assert_allclose(advantage[1], 5.0 - 4.0)
    for g in set(GROUP.tolist()):
        np.testing.assert_allclose(np.asarray(advantage)[g == GROUP].sum(), 0, atol=1e-12)


def test_the_same_rewards_in_two_groups_are_compared_within_each():
    score = np.array([0.0, 1.0, 10.0, 11.0])
    advantage = group.normalized(score, np.array([1, 1, 2, 2]), np.ones(4, bool))
    np.testing.assert_allclose(advantage[:2], advantage[2:])


def test_bnpo_with_one_group_or_equal_means_is_reinforce_with_baseline():
    score = np.array([1.0, 0, 0, 1.0])
    one = group.bnpo(score, np.zeros(4, int), np.ones(4, bool))
    equal = group.bnpo(score, np.array([1, 1, 2, 2]), np.ones(4, bool))
    np.testing.assert_allclose(one, score - 0.5)
    np.testing.assert_allclose(equal, score - 0.5)


def test_bnpo_maps_rewards_to_the_unit_interval():
    score = np.array([1.0, 0, 0, 0, 1, 1])
    ids = np.array([0, 0, 0, 1, 1, 1])
    a = group.bnpo(score, ids, np.ones(6, bool))
    np.testing.assert_allclose(a, group.bnpo(4 * score - 2, ids, np.ones(6, bool), low=-2, high=2))


def test_an_unknown_scale_lists_the_known_ones():
    with pytest.raises(ValueError, match="expected one of group, batch, none"):
        group.normalized(SCORE, GROUP, ALL, scale="std")  # type: ignore[arg-type]


# Tokens

MASK = np.array([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], bool)


def test_the_score_is_paid_on_the_last_trained_token():
    rewards = gae.token_rewards(np.array([2.0, 3.0, np.nan]), MASK)
    np.testing.assert_array_equal(rewards, [[0, 0, 0, 2, 0], [0, 0, 0, 0, 3], [0, 0, 0, 0, 0]])


def test_gae_with_lambda_one_is_reward_to_go_minus_value():
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=MASK.shape), rng.normal(size=MASK.shape)
    advantage = gae.gae(rewards, values, MASK, gamma=0.9, lam=1.0)
    expected = gae.rewards_to_go(rewards, MASK, 0.9) - values
    np.testing.assert_allclose(advantage, np.where(MASK, expected, 0), atol=1e-12)


def test_gae_with_lambda_zero_is_the_one_step_error():
    rewards, values = np.array([[1.0, 2.0]]), np.array([[0.5, 0.25]])
    advantage = gae.gae(rewards, values, np.ones((1, 2), bool), 0.9, 0.0, bootstrap=np.array([4.0]))
    np.testing.assert_allclose(advantage, [[1 + 0.9 * 0.25 - 0.5, 2 + 0.9 * 4 - 0.25]])


def test_masked_positions_are_no_time_steps():
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(1, 5)), rng.normal(size=(1, 5))
    holes = gae.gae(*(np.where(MASK[:1], x, np.nan) for x in (rewards, values)), MASK[:1], 0.9, 0.8)
    dense = gae.gae(rewards[:, MASK[0]], values[:, MASK[0]], np.ones((1, 3), bool), 0.9, 0.8)
    np.testing.assert_allclose(holes[MASK[:1]], dense[0])


def test_whitened_tokens_have_mean_zero_and_variance_one():
    x = np.where(MASK, np.random.default_rng(0).normal(3, 2, MASK.shape), np.nan)
    white = np.asarray(whiten(x, MASK))
    np.testing.assert_allclose([white[MASK].mean(), white[MASK].std(ddof=1)], [0, 1], atol=1e-7)
    assert np.all(white[~MASK] == 0)


def test_whitening_needs_two_entries():
    one = np.array([[True, False]])
    np.testing.assert_array_equal(whiten(np.array([[3.0, np.nan]]), one), [[3.0, 0.0]])
    np.testing.assert_array_equal(whiten(np.array([[3.0, np.nan]]), one, too_few="zero"), [[0.0, 0.0]])


def test_whitening_equal_values_gives_zero():
    assert not np.any(whiten(np.full((2, 3), 0.7), np.ones((2, 3), bool)) > 1e-6)


def test_overlong_penalty_falls_linearly_over_the_cache():
    penalty = overlong.soft_penalty(np.array([10, 16, 18, 20, 25]), 20, 4)
    np.testing.assert_allclose(penalty, [0, 0, -0.5, -1, -1])
    with pytest.raises(ValueError, match="overlong cache=30"):
        overlong.soft_penalty(np.array([1]), 20, 30)


def test_overlong_filter_drops_truncated_rows():
    kept = overlong.without_truncated(MASK, np.array([True, False, False]))
    np.testing.assert_array_equal(kept, [[0] * 5, MASK[1], MASK[2]])


# Replay


def batch(step: int):
    """A batch whose advantages say where they come from: 1000 * step + row."""
    rows = nasty.rollouts(step, Needs(rescore=("ref_logp",)))
    mark = 1000 * step + np.arange(nasty.ROWS)[:, None] + np.zeros(rows.mask.shape)
    return rows, Credit(jnp.where(rows.trained, mark, 0))


def filled(steps: int, capacity: int = 100, max_age: int = 100):
    buffer = {}
    for step in range(steps):
        buffer = replay.push(buffer, *batch(step), step, capacity, max_age)
    return buffer


def test_the_buffer_evicts_by_age_then_over_capacity():
    def push(buffer, step):
        two = np.flatnonzero(np.isin(rows.group, [40, 9]))
        return replay.push(buffer, nasty.permute(rows, two), nasty.by_row(credit, two), step, 3, 2)

    rows, credit = batch(0)
    buffer, seen = {}, []
    for step in range(5):
        groups = {g: "ab"[i % 2] for i, g in enumerate(range(2 * step + 2))}
        seen.append([f"g{int(g) // 2}{groups[int(g)]}" for g in replay.candidates(buffer)])
        buffer = push(buffer, step)
    assert seen == [
        [],
        ["g0a", "g0b"],
        ["g0b", "g1a", "g1b"],
        ["g1b", "g2a", "g2b"],
        ["g2b", "g3a", "g3b"],
    ]


def test_groups_older_than_the_limit_are_gone_even_when_there_is_room():
    buffer = filled(steps=6, max_age=2)
    assert set(buffer["step"].tolist()) == {4, 5}


def test_a_draw_takes_whole_groups_without_repeating_one():
    buffer = filled(steps=3)
    drawn = replay.draw(buffer, np.random.default_rng(0), rows=24, contexts=8)
    numbers = [set(buffer["group"][at].tolist()) for at in drawn]
    assert all(len(n) == 1 for n in numbers) and len(set.union(*numbers)) == len(drawn) > 2
    assert all(np.array_equal(at, np.flatnonzero(buffer["group"] == buffer["group"][at[0]])) for at in drawn)
    assert sum(len(at) for at in drawn) <= 24


@pytest.mark.parametrize("steps", [0, 2])
def test_a_mixed_batch_has_a_fixed_size_and_keeps_what_replayed_rows_were_collected_with(steps):
    buffer = filled(steps)
    rows, credit = batch(9)
    drawn = replay.draw(buffer, np.random.default_rng(0), rows=16, contexts=5) if steps else []
    mixed, mixed_credit = replay.mix(rows, credit, buffer, drawn, 16, 5)
    fresh, n = nasty.ROWS, sum(len(at) for at in drawn)
    assert mixed.mask.shape == (fresh + 16, nasty.T) and mixed.prompt_length.shape == (7 + 5,)
    assert jax.tree.all(jax.tree.map(np.array_equal, nasty.permute(mixed, slice(fresh)).tokens, rows.tokens))
    assert not mixed.stat[fresh:].any() and np.all(mixed.source[fresh:] == REPLAY)
    assert not mixed.trained[fresh + n :].any()
    np.testing.assert_array_equal(mixed_credit.advantage[:fresh], credit.advantage)
    assert len(np.unique(mixed.group[fresh:])) == len(drawn) + 16 - n
    assert not set(mixed.group[fresh:].tolist()) & set(rows.group.tolist())
    for i, at in zip(range(fresh, fresh + n), np.concatenate([*drawn, []]).astype(int)):
        mark = int(np.max(buffer["advantage"][at]))
        source, source_row = batch(mark // 1000)[0], mark % 1000
        np.testing.assert_array_equal(mixed_credit.advantage[i], buffer["advantage"][at])
        if mark:  # a row that trains something says where it came from
            np.testing.assert_array_equal(mixed.old_logp[i], source.old_logp[source_row])
            np.testing.assert_array_equal(mixed.extras["ref_logp"][i], source.extras["ref_logp"][source_row])
            context, length = source.prompt[source_row], mixed.prompt_length[mixed.prompt[i]]
            assert length == source.prompt_length[context]
            np.testing.assert_array_equal(
                mixed.prompt_tokens[mixed.prompt[i], :length], source.prompt_tokens[context, :length]
            )


def test_unscored_and_padding_rows_are_not_stored():
    buffer = filled(1)
    assert len(buffer["group"]) == nasty.ROWS - 2 and buffer["scored"].all()
