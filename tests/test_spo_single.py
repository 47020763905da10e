"""SPO (single-stream), arXiv 2509.13232: the tracker's known answers, and `observe` with views of the updated policy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import credit_of, loss_and_grad, rollouts

from jaxrl_llm import algorithms
from jaxrl_llm.advantages import trackers
from jaxrl_llm.algorithms.base import Report
from jaxrl_llm.types import Views

SUCCESSES = (0, 2, 6, 8)
ALPHA = [0.44444444, 2.22222222, 5.77777778, 7.55555556]
BETA = [7.55555556, 5.77777778, 2.22222222, 0.44444444]
REWARD = [0.0, 1, 1, 1]
ADVANTAGE = [-0.88833011, 1.37287381, 0.08075728, -0.56530098]
PREVIOUS = [[-1, -0.5, -2], [-0.3, -0.7, 0], [-1.2, 0, 0], [0, 0, 0]]
NOW = [[-1.01, -0.49, -2], [-0.33, -0.68, 5], [-1, 0, 0], [9, 9, 9]]
PREVIOUS_MASK = [[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]]
RHO = [0.92587471, 0.875, 0.875, 0.96]
KEY = jax.random.key(0)

pytestmark = pytest.mark.usefixtures("x64")


def make(**fields):
    return algorithms.make("spo_single", pool=4, successes=SUCCESSES, **fields)


def batch(prompts=(0, 1, 2, 3), reward=REWARD, mask=None):
    mask = np.ones((len(prompts), 3)) if mask is None else mask
    return rollouts(mask, reward, prompts, extras={"prompt_id": np.asarray(prompts, np.int32)})


def test_initial_tracker_from_an_offline_pass():
    alpha, beta = trackers.initial(jnp.asarray(SUCCESSES, float), 8)
    np.testing.assert_allclose(alpha, ALPHA, atol=5e-9)
    np.testing.assert_allclose(beta, BETA, atol=5e-9)
    rate = trackers.value(alpha, beta)
    np.testing.assert_allclose(rate, [0.05555556, 0.27777778, 0.72222222, 0.94444444], atol=5e-9)
    weights = trackers.draw_weights(alpha, beta)
    expected = [0.17958438, 0.32041562, 0.32041562, 0.17958438]
    np.testing.assert_allclose(weights / weights.sum(), expected, atol=5e-9)


def test_without_an_offline_pass_every_rate_is_a_half():
    state = algorithms.make("spo_single", pool=3).init()
    np.testing.assert_array_equal(state["alpha"], [0.5] * 3)
    np.testing.assert_array_equal(state["beta"], [0.5] * 3)


def test_one_completion_of_prompts_drawn_by_the_tracker():
    alg = make()
    plan = alg.plan(alg.init())
    assert plan.group_size == 1
    expected = np.sqrt(np.array([1, 5, 13, 17]) * np.array([17, 13, 5, 1])) / 18 + 0.05
    np.testing.assert_allclose(plan.prompt_weights, expected, rtol=1e-6)
    certain = make(draw_gamma=1.0).plan(alg.init()).prompt_weights
    np.testing.assert_allclose(certain, (expected - 0.05) / 8 + 0.05, rtol=1e-6)


def credit(rows, alg=None):
    alg = alg or make()
    state = jax.tree.map(lambda x: x.astype(float), alg.init())
    return np.asarray(alg.credit(state, rows, KEY).advantage[:, 0])


def test_advantage_against_the_tracked_rate_whitened_over_rows():
    np.testing.assert_allclose(credit(batch()), ADVANTAGE, atol=1e-7)  # the tracker itself is float32


def test_rows_weigh_the_same_whatever_their_length():
    short = batch(mask=[[1, 0, 0], [1, 1, 1], [1, 1, 0], [1, 1, 1]])
    np.testing.assert_allclose(credit(short), ADVANTAGE, atol=1e-7)


def test_a_batch_of_one_and_a_batch_that_agrees_have_no_advantage():
    np.testing.assert_array_equal(credit(batch([1], [1.0])), 0)
    np.testing.assert_array_equal(credit(batch([1, 1], [1.0, 1.0])), 0)


def test_unscored_rows_are_out_of_the_whitening():
    rows = batch([0, 1, 2, 3, 0], [*REWARD, np.nan]).with_(scored=jnp.arange(5) < 4)
    got = credit(rows)
    np.testing.assert_allclose(got[:4], ADVANTAGE, atol=1e-7)
    assert got[4] == 0


def test_forgetting_follows_the_drift_of_the_previous_completion():
    drift = trackers.drift(jnp.asarray(PREVIOUS), jnp.asarray(NOW, float), jnp.asarray(PREVIOUS_MASK, bool))
    np.testing.assert_allclose(drift, [0.00666667, 0.025, 0.2, 0], atol=5e-9)
    np.testing.assert_allclose(trackers.forgetting(drift), RHO, atol=5e-9)


NEW_ALPHA = [0.41149987, 2.94444444, 6.05555556, 8.25333333]
NEW_BETA = [7.99549783, 5.05555556, 1.94444444, 0.42666667]


def test_tracker_after_a_step():
    alpha, beta = trackers.initial(jnp.asarray(SUCCESSES, float), 8)
    rho = trackers.forgetting(
        trackers.drift(jnp.asarray(PREVIOUS), jnp.asarray(NOW, float), jnp.asarray(PREVIOUS_MASK, bool))
    )
    reward = jnp.asarray(REWARD)
    new = trackers.refresh(alpha, beta, reward, rho)
    np.testing.assert_allclose(new, [NEW_ALPHA, NEW_BETA], atol=5e-9)
    rate = trackers.value(*new)
    np.testing.assert_allclose(rate, [0.04894730, 0.36805556, 0.75694444, 0.95084485], atol=5e-9)
    before = trackers.value(alpha, beta)
    np.testing.assert_allclose(rate, before + (reward - before) / (rho * (alpha + beta) + 1), rtol=1e-12)


def test_the_trackers_memory_is_bounded():
    alpha, beta = jnp.full(2, 0.5), jnp.full(2, 0.5)
    for _ in range(500):
        alpha, beta = trackers.refresh(alpha, beta, jnp.ones(2), jnp.array([0.875, 0.96]))
    np.testing.assert_allclose(alpha + beta, [8, 25], rtol=1e-6)


def test_loss_and_gradient():
    old = [[-1, -0.5, -2], [-0.3, -0.7, 0], [-1.2, 0, 0], [-0.4, -0.9, -0.1]]
    logp = [[-0.9, -0.6, 0.5], [-0.1, -0.3, 0], [-1.9, 0, 0], [-0.4, -0.8, -0.1]]
    rows = rollouts([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]], REWARD, range(4), old)
    value, grad = loss_and_grad(make(), rows, logp, credit_of(ADVANTAGE, rows, expected=np.zeros(4)))
    np.testing.assert_allclose(value, 0.99444389, atol=1e-8)
    expected = [
        [0.10908407, 0.08931048, 0],
        [-0.18631465, 0, 0],
        [-0.00445588, 0, 0],
        [0.06281122, 0.06941713, 0.06281122],
    ]
    np.testing.assert_allclose(grad, expected, atol=1e-8)


class Policy:
    """Views of a policy that gives token v of a completion the log-prob `table[v]`, and counts how often it is asked."""

    def __init__(self, table):
        self.table, self.asked = np.asarray(table, float), 0

    def __call__(self, rows, names, policy):
        assert (names, policy) == (("logp",), "policy")
        self.asked += 1
        return Views(logp=jnp.asarray(self.table[np.asarray(rows.tokens)]))


def observe(alg, state, memory, rows, policy):
    return alg.observe(state, memory, rows, credit_of(np.zeros(rows.tokens.shape[0]), rows), Report({}, {}, 1), policy)


def test_the_previous_completion_is_scored_by_the_policy_after_the_step():
    alg = make()
    first = batch(mask=PREVIOUS_MASK).with_(tokens=jnp.asarray([[0, 1, 2], [3, 4, 9], [5, 9, 9], [9, 9, 9]]))
    state, memory = observe(alg, alg.init(), {}, first, Policy([-1, -0.5, -2, -0.3, -0.7, -1.2, 0, 0, 0, 0]))
    # A first visit forgets as little as possible.
    np.testing.assert_allclose(state["alpha"], 0.96 * np.array(ALPHA) + REWARD, rtol=1e-6)
    np.testing.assert_array_equal(state["visits"], 1)

    again = batch([3, 2, 1, 0], [1.0, 1, 1, 0])  # other completions of the same prompts, in another order
    moved = Policy([-1.01, -0.49, -2, -0.33, -0.68, -1, 0, 0, 0, 9])
    before = np.asarray(state["alpha"])
    state, memory = observe(alg, state, memory, again, moved)
    np.testing.assert_allclose(state["alpha"], RHO * before + np.array(REWARD), rtol=1e-6)
    np.testing.assert_array_equal(memory["last"]["0"]["tokens"], [1, 1, 1])
    np.testing.assert_allclose(memory["last"]["0"]["logp"], -0.49)


def test_a_constant_rate_needs_no_scoring_and_no_memory():
    alg, policy = make(rho="constant"), Policy(np.zeros(4))
    state, memory = observe(alg, alg.init(), {}, batch(), policy)
    np.testing.assert_allclose(state["alpha"], 0.875 * np.array(ALPHA) + REWARD, rtol=1e-6)
    assert memory == {} and policy.asked == 0


def test_copies_of_a_prompt_start_from_the_tracker_before_the_step_and_the_last_one_wins():
    alg = make(rho="constant")
    state, _ = observe(alg, alg.init(), {}, batch([1, 1], [1.0, 0.0]), Policy(np.zeros(4)))
    np.testing.assert_allclose(state["alpha"][1], 0.875 * ALPHA[1], rtol=1e-6)
    assert state["visits"].tolist() == [0, 2, 0, 0]


def test_unscored_and_padding_rows_leave_the_tracker_alone():
    alg = make()
    rows = batch(reward=[np.nan] * 4).with_(scored=jnp.array([False, False, True, True]), stat=jnp.arange(4) < 2)
    state, memory = observe(alg, alg.init(), {}, rows, Policy(np.zeros(4)))
    for name, value in alg.init().items():
        np.testing.assert_array_equal(state[name], value)
    assert memory["last"] == {}


@pytest.mark.parametrize("fields", [{"pool": 0}, {"pool": 3, "successes": (1, 2)}, {"rho_min": 0.97}])
def test_settings_that_contradict_are_refused(fields):
    with pytest.raises(ValueError, match="expected"):
        algorithms.make("spo_single", **fields)
