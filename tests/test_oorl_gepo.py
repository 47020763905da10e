"""OORL with GEPO, arXiv 2505.12723: known answers of both losses and their sum, the limits, the mixed batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scripted
from arrays import rollouts

from jaxrl_llm import algorithms
from jaxrl_llm.algorithms.base import value_and_grad
from jaxrl_llm.types import CURRENT, GIVEN, Views

PREFERENCE = [[-0.8, -0.7, -1.0], [-0.9, -1.0, -0.6], [-1.2, -0.5, -0.9], [-0.5, -1.0, -1.4]]
REF = [[-1.0, -0.5, -2.0], [-0.7, -1.1, -0.3], [-2.0, -0.4, -0.9], [-0.6, -0.8, -1.5]]
MASK = [[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1]]
SAMPLED = [[-0.5, -1.0, 0], [-0.7, -0.2, 0], [-1.2, -0.4, 0]]
OLD = [[-0.6, -1.3, 0], [-0.7, -0.3, 0], [-0.8, -0.4, 0]]
OLD_MASK = [[1, 1, 0], [1, 0, 0], [1, 1, 0]]
KEY = jax.random.key(0)
ALONE = {"w_rl": 0.0, "w_gepo": 1.0}

pytestmark = pytest.mark.usefixtures("x64")


def groups_of(winner=(1, 1, 0, 0), group=(0, 0, 0, 0), logp=PREFERENCE, mask=MASK):
    rows = rollouts(mask, winner, group, logp, extras={"ref_logp": np.asarray(REF)[: len(winner)]})
    return rows.with_(source=jnp.full(len(winner), GIVEN)), logp


def sampled(group=(1, 2, 3)):
    rows = rollouts(OLD_MASK, [1.0, 0, 0], group, OLD, extras={"ref_logp": np.zeros((3, 3))})
    return rows.with_(source=jnp.full(3, CURRENT)), SAMPLED


def both():
    rows = rollouts(
        MASK + OLD_MASK,
        [1.0, 1, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 2, 3],
        PREFERENCE + OLD,
        extras={"ref_logp": np.concatenate([REF, np.full((3, 3), np.nan)])},
    )
    return rows.with_(source=jnp.array([GIVEN] * 4 + [CURRENT] * 3)), PREFERENCE + SAMPLED


def run(rows, logp, name="oorl_gepo", **fields):
    alg = algorithms.make(name, **fields)
    chosen = alg.select((), {}, rows, alg.credit((), rows, KEY), KEY)
    value, grads = value_and_grad(alg, (), chosen.rows, Views(jnp.asarray(logp)), credit=chosen.credit)
    return float(value), np.asarray(grads.logp)


def test_group_preference_loss_and_gradient():
    value, grad = run(*groups_of(), **ALONE)
    np.testing.assert_allclose(value, 0.99065968, atol=5e-9)
    a, b, c = 0.525125, -0.574875, 0.024875
    np.testing.assert_allclose(grad, [[a] * 3, [b, b, 0], [c] * 3, [c] * 3], atol=5e-7)
    np.testing.assert_allclose(run(*groups_of(), **ALONE, lam=0.0)[0], 0.68815968, atol=5e-9)


def test_on_policy_loss_and_advantages():
    rows, logp = sampled()
    advantage = algorithms.make("oorl_gepo").credit((), rows, KEY).advantage
    expected = [[1.0954451, 1.0954451, 0], [-0.73029673, 0, 0], [-0.73029673, -0.73029673, 0]]
    np.testing.assert_allclose(advantage, expected, atol=5e-9)
    np.testing.assert_allclose(run(rows, logp)[0], -0.09607147, atol=5e-9)


def test_the_whole_loss():
    np.testing.assert_allclose(run(*both())[0], -0.08616487, atol=5e-9)


def test_each_loss_trains_its_own_rows_only():
    rows, logp = both()
    assert not run(rows, logp, w_gepo=0.0)[1][:4].any() and not run(rows, logp, w_rl=0.0)[1][4:].any()


def test_one_winner_and_one_loser_are_dpo():
    rows, logp = groups_of((1, 0, 1, 0), (0, 0, 1, 1))
    value, grad = run(rows, logp, **ALONE)
    same, same_grad = run(rows, logp, name="dpo")
    np.testing.assert_allclose(value, same, rtol=1e-12)
    np.testing.assert_allclose(grad, same_grad, rtol=1e-12)


def test_without_groups_it_is_reinforce_pp():
    rows, logp = sampled()
    alg = algorithms.make("reinforce_pp", beta=0.0)
    value, grads = value_and_grad(alg, (), rows, Views(jnp.asarray(logp)))
    ours, grad = run(rows, logp)
    np.testing.assert_allclose(ours, value, rtol=1e-12)
    np.testing.assert_allclose(grad, grads.logp, rtol=1e-12)


def test_groups_without_winners_or_losers_are_skipped():
    rows, logp = groups_of((1, 0, 1, 1), (0, 0, 1, 1))
    value, grad = run(rows, logp, **ALONE)
    np.testing.assert_allclose(value, np.log1p(np.exp(-0.1 * 1.1)), rtol=1e-9)
    assert not grad[2:].any()


def test_an_empty_row_counts_in_the_means():
    mask = [MASK[0], [0, 0, 0], *MASK[2:]]
    value, grad = run(*groups_of(mask=mask), **ALONE, lam=0.0)
    np.testing.assert_allclose(value, np.log1p(np.exp(-0.1 * (0.5 - 0.35))), rtol=1e-9)
    assert not grad[1].any()


def test_equal_rewards_leave_the_on_policy_loss_without_gradient():
    rows, logp = sampled()
    value, grad = run(rows.with_(reward=jnp.ones((3, 1))), logp)
    assert value == 0 and not grad.any()


def test_the_order_of_rows_does_not_matter():
    rows, logp = both()
    order = jnp.array([5, 2, 0, 6, 3, 1, 4])
    contexts = ("prompt_tokens", "prompt_length", "extras")
    moved = {n: getattr(rows, n)[order] for n in vars(rows) if n not in contexts}
    mixed = rows.with_(**moved, extras={"ref_logp": rows.extras["ref_logp"][order]})
    value, grad = run(mixed, np.asarray(logp)[order])
    same, same_grad = run(rows, logp)
    np.testing.assert_allclose(value, same, rtol=1e-12)
    np.testing.assert_allclose(grad, same_grad[order], rtol=1e-12)


def test_a_batch_mixes_sampled_and_given_completions():
    prompts = [
        scripted.prompt(0, [5], chosen=["12", "34"], rejected=["56"]),
        scripted.prompt(1, [6]),
    ]
    plan = algorithms.make("oorl_gepo").plan(())._replace(group_size=3)
    rows, requests = scripted.collect(plan, prompts, lambda c, i: scripted.completion([i]), lambda t: 0.5)
    assert [(list(r.contexts[0]), r.n) for r in requests] == [([6], [3])]
    assert [(r.prompt.id, r.group, r.source) for r in rows] == [(1, 0, CURRENT)] * 3 + [(0, 1, GIVEN)] * 3
    given = [(r.tokens.tolist(), r.reward.tolist()) for r in rows[3:]]
    assert given == [([1, 2, scripted.EOS], [1]), ([3, 4, scripted.EOS], [1]), ([5, 6, scripted.EOS], [0])]


def test_a_batch_may_hold_one_kind_only():
    plan = algorithms.make("oorl_gepo").plan(())._replace(group_size=2)
    given = [scripted.prompt(0, [5], chosen=["1"], rejected=["2"])]
    rows, requests = scripted.collect(plan, given, lambda c, i: scripted.completion([i]), lambda t: 0.5)
    assert not requests and [r.source for r in rows] == [GIVEN] * 2
    rows, _ = scripted.collect(plan, [scripted.prompt(0, [5])], lambda c, i: scripted.completion([i]), lambda t: 0.5)
    assert [r.source for r in rows] == [CURRENT] * 2
