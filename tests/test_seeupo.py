"""SeeUPO, arXiv 2602.06554: known answers, and its turn-by-turn update over a learner with two verbs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import credit_of, loss_and_grad, rollouts

from jaxrl_llm import algorithms
from jaxrl_llm.algorithms.base import value_and_grad
from jaxrl_llm.algorithms.seeupo import moved
from jaxrl_llm.types import Mean, Views

REWARD = [1.0, 0, 0, 1, 1.5, 0]
GROUP = [0, 0, 0, 1, 1, 1]
A = [1.10096377, -0.55048188, -0.55048188, 0.27524094, 1.10096377, -1.37620471]
M = [1.16183424, 0.8, 1, 1.2, 0.98511194, 1]
BEFORE2 = [[-1, -1], [-0.5, -2], [0, 0], [-1, 0], [-0.3, -0.3], [-2, -1]]
AFTER2 = [[-0.8, -0.9], [-0.6, -2.6], [0, 0], [-0.7, 0], [-0.31, -0.32], [-2, -1]]
MASK2 = [[1, 1], [1, 1], [0, 0], [1, 0], [1, 1], [1, 1]]
LOGP1 = [[-0.9, -1.2], [-1, -1], [-0.2, -0.4], [-0.6, -0.6], [-1.5, 0], [-0.1, -0.7]]
OLD1 = [[-1, -1], [-1, -1], [-0.5, -0.5], [-0.5, -0.5], [-1.4, 0], [-0.3, -0.3]]
MASK1 = [[1, 1], [1, 1], [1, 1], [1, 1], [1, 0], [1, 1]]
GRAD1 = [
    [-0.101380234, -0.101432995],
    [0.036698792, 0.036698792],
    [0.056073204, 0.056045868],
    [-0.024922359, -0.024922359],
    [-0.163595361, 0],
    [0.103800338, 0.103688155],
]
KEY = jax.random.key(0)

pytestmark = pytest.mark.usefixtures("x64")


def turns(order=None):
    """The twelve turns of six trajectories; row i of trajectory i in turn 1, row 6 + i in turn 2."""
    order = np.arange(12) if order is None else np.asarray(order)
    mask = np.concatenate([MASK1, MASK2])[order]
    extras = {"traj": np.tile(np.arange(6), 2)[order], "turn": np.repeat([1, 2], 6)[order]}
    ref = np.concatenate([OLD1, np.zeros((6, 2))])[order]
    return rollouts(mask, np.tile(REWARD, 2)[order], np.tile(GROUP, 2)[order], extras={**extras, "ref_logp": ref})


def test_advantage_is_that_of_the_trajectory_however_many_turns_it_has():
    alg = algorithms.make("seeupo")
    rows = turns()
    credit = alg.credit((), rows, KEY)
    np.testing.assert_allclose(credit.advantage[:6, 0], A, atol=5e-9)
    trained = np.asarray(MASK2).any(1)
    np.testing.assert_allclose(credit.advantage[6:, 0][trained], np.array(A)[trained], atol=5e-9)
    np.testing.assert_array_equal(credit.extras["trajectories"], 6)


def test_equal_rewards_and_equal_groups_have_no_advantage():
    alg = algorithms.make("seeupo")
    credit = alg.credit((), turns().with_(reward=jnp.ones((12, 1))), KEY)
    np.testing.assert_array_equal(credit.advantage, 0)


def test_a_group_of_one_keeps_its_reward():
    rows = rollouts(np.ones((3, 1)), [0.0, 1, 5], [0, 0, 1], extras={"traj": [0, 1, 2], "turn": [0, 0, 0]})
    alg = algorithms.make("seeupo", batch_norm=False)
    np.testing.assert_allclose(alg.credit((), rows, KEY).advantage[:, 0], [-0.5, 0.5, 3])  # 5 at the clamp


def test_group_std_can_be_switched_on():
    rows = rollouts(np.ones((2, 1)), [0.0, 4], [0, 0], extras={"traj": [0, 1], "turn": [0, 0]})
    alg = algorithms.make("seeupo", batch_norm=False, group_std=True)
    np.testing.assert_allclose(alg.credit((), rows, KEY).advantage[:, 0], np.array([-1, 1]) / np.sqrt(2), atol=1e-6)


def test_how_far_a_turn_moved():
    q = moved(*(jnp.asarray(x, float) for x in (BEFORE2, AFTER2)), jnp.asarray(MASK2, bool), 0.2, 0.2)
    np.testing.assert_allclose(q, M, atol=5e-9)


def test_loss_and_gradient_of_a_turn():
    rows = rollouts(MASK1, REWARD, GROUP, OLD1, {"ref_logp": np.asarray(OLD1)})
    credit = credit_of(np.array(A) * M, rows, trajectories=np.full(6, 6.0))
    value, grad = loss_and_grad(algorithms.make("seeupo"), rows, LOGP1, credit)
    np.testing.assert_allclose(value, -0.0231304467, atol=5e-10)
    np.testing.assert_allclose(grad, GRAD1, atol=5e-9)


class ScriptedLearner:
    """Two verbs over a recorded policy: `step` moves it from the log-probs before a turn's update to those after."""

    def __init__(self, alg, before, after):
        self.alg, self.logp, self.after = alg, dict(before), after
        self.turns, self.losses, self.grads, self.advantages = [], [], [], []

    def _logp(self, rows):
        keys = zip(np.asarray(rows.extras["traj"]).tolist(), np.asarray(rows.extras["turn"]).tolist())
        return jnp.asarray([self.logp[key] for key in keys])

    def views(self, rows, names, policy="policy"):
        return Views(logp=self._logp(rows))

    def step(self, state, rows, credit):
        turn = int(np.asarray(rows.extras["turn"])[np.asarray(rows.stat)][0])
        value, grads = value_and_grad(self.alg, state, rows, self.views(rows, ("logp",)), credit=credit)
        self.turns.append(turn)
        self.losses.append(float(value))
        self.grads.append(np.asarray(grads.logp))
        self.advantages.append(np.asarray(credit.advantage))
        self.logp.update(self.after.get(turn, {}))
        return state, {"loss": Mean(value, jnp.ones(()))}


def trajectories(values, turn):
    return {(n, turn): row for n, row in enumerate(values)}


def scripted(**fields):
    alg = algorithms.make("seeupo", **fields)
    before = {**trajectories(LOGP1, 1), **trajectories(BEFORE2, 2)}
    return alg, ScriptedLearner(alg, before, {2: trajectories(AFTER2, 2)})


def run(rows=None, **fields):
    alg, learner = scripted(**fields)
    rows = turns() if rows is None else rows
    _, report = alg.update(learner, (), rows, alg.credit((), rows, KEY), KEY)
    return learner, report


def test_the_last_turn_is_updated_first_and_corrects_the_others():
    learner, report = run()
    assert learner.turns == [2, 1] and report.updates == 2 and len(report.per_update) == 2
    np.testing.assert_allclose(learner.advantages[1][:, 0], np.array(A) * M, atol=1e-7)
    present = [0, 1, 3, 4, 5]  # trajectory 2 has no turn 2 and is not in that update
    np.testing.assert_allclose(learner.advantages[0][:5, 0], np.array(A)[present], atol=1e-7)
    np.testing.assert_array_equal(learner.advantages[0][5], 0)


def test_corrections_follow_the_trajectory_when_rows_are_shuffled():
    order = np.random.default_rng(0).permutation(12)
    learner, _ = run(turns(order))
    got = dict(zip(np.asarray(turns(order).extras["traj"])[order < 6].tolist(), learner.advantages[1][:, 0]))
    np.testing.assert_allclose([got[n] for n in range(6)], np.array(A) * M, atol=1e-7)


def test_trajectories_without_the_turn_still_divide_its_loss():
    learner, _ = run(kl_coef=0.0)
    np.testing.assert_allclose(learner.losses[0], -np.sum(np.delete(A, 2)) / 6, atol=1e-7)


def test_all_turns_have_one_shape():
    learner, _ = run()
    assert {g.shape for g in learner.grads} == {(6, 2)}


def test_a_turn_nobody_took_is_skipped():
    rows = turns()
    learner, report = run(rows.with_(mask=rows.mask & (rows.extras["turn"] == 1)[:, None]))
    assert learner.turns == [1] and report.updates == 1
    np.testing.assert_allclose(learner.advantages[0][:, 0], A, atol=1e-7)


def test_orders_and_the_switch_of_the_correction():
    assert run(order="sequential")[0].turns == [1, 2]
    assert sorted(run(order="random")[0].turns) == [1, 2]
    np.testing.assert_allclose(run(correction=False)[0].advantages[1][:, 0], A, atol=1e-7)


def test_one_turn_is_gspo_with_standardised_advantages():
    rows = rollouts(MASK1, REWARD, GROUP, OLD1, {"ref_logp": np.asarray(OLD1)})
    credit = credit_of(A, rows, trajectories=np.full(6, 6.0))
    got = loss_and_grad(algorithms.make("seeupo", kl_coef=0.0), rows, LOGP1, credit)
    same = loss_and_grad(algorithms.make("gspo", clip_low=0.2, clip_high=0.2), rows, LOGP1, credit_of(A, rows))
    np.testing.assert_allclose(got[0], same[0], rtol=1e-12)
    np.testing.assert_allclose(got[1], same[1], rtol=1e-12)


def test_token_ratios_reproduce_the_release():
    rows = rollouts(MASK1, REWARD, GROUP, OLD1)
    credit = credit_of(A, rows, trajectories=np.full(6, 6.0))
    value, _ = loss_and_grad(algorithms.make("seeupo", kl_coef=0.0, ratio="token"), rows, LOGP1, credit)
    r, a, mask = np.exp(np.array(LOGP1) - OLD1), np.array(A)[:, None], np.array(MASK1)
    loss = np.maximum(-a * r, -a * np.clip(r, 0.8, 1.2))
    np.testing.assert_allclose(value, np.mean((loss * mask).sum(1) / mask.sum(1)), rtol=1e-7)


def test_extreme_ratios_stay_finite():
    rows = rollouts(np.ones((2, 2)), extras={"ref_logp": np.full((2, 2), -1.0)})
    credit = credit_of([1.0, -1.0], rows, trajectories=np.full(2, 2.0))
    value, grad = loss_and_grad(algorithms.make("seeupo"), rows, np.full((2, 2), 1e4), credit)
    assert np.isfinite(value) and np.isfinite(grad).all()
