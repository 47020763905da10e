"""EPO, arXiv 2509.22576: the known answers of its specification, in float64, and the entropies it remembers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import credit_of, rollouts

from jaxrl_llm import algorithms
from jaxrl_llm.algorithms import epo
from jaxrl_llm.algorithms.base import Report, value_and_grad
from jaxrl_llm.objectives import weights
from jaxrl_llm.types import Views

LOGP = [[-0.9, -0.5], [-1.2, -0.3]]
OLD = [[-1.0, -0.5], [-1.0, -0.3]]
MASK = np.array([[1, 1], [1, 0]], bool)
ADVANTAGE = [1.0, -0.5]
ENTROPY = [[0.2, 1.5], [0.9, 0.4]]
SHOWN = {"lam": 0.1, "alpha": 0.05, "kappa_l": 0.8, "kappa_r": 2.0, "steps": 120}
D_LOGP = [[-0.36839031, -0.33333333], [0.13645513, 0]]


@pytest.fixture(autouse=True)
def double(x64):
    """Known answers are in float64."""


def close(actual, expected, tol=6e-9):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tol)


def past(sums, counts, step=30):
    return {"sum": jnp.array(sums, float), "count": jnp.array(counts, float), "step": jnp.array(step, jnp.int32)}


def result(state, turn=(0, 1), entropy=ENTROPY, **fields):
    """Loss, and its gradients in logp and entropy."""
    alg = algorithms.make("epo", **{**SHOWN, **fields})
    rows = rollouts(MASK, old_logp=OLD).with_(extras={"traj": jnp.array([0, 1]), "turn": jnp.array(turn)})
    views = Views(logp=jnp.array(LOGP), entropy=jnp.array(entropy))
    value, grads = value_and_grad(alg, state, rows, views, credit=credit_of(ADVANTAGE, rows))
    return float(value), np.asarray(grads.logp), np.asarray(grads.entropy)


def test_smoothing_weights():
    close(epo.smoothing_weight(epo.Config(steps=120), jnp.array(30)), 1.22313016)
    code = epo.Config(steps=150, schedule="code")
    close(epo.smoothing_weight(code, jnp.array(30)), 0.88986579)
    close(epo.smoothing_weight(code, jnp.array(100)), 0.29430355)


def test_penalty_is_a_hinge_outside_the_corridor():
    got = epo.penalty(epo.Config(**SHOWN), jnp.array(ENTROPY), jnp.full((2, 1), 0.4), jnp.asarray(MASK))
    close(got, [[0.006, 0.035], [0.005, 0]])


@pytest.mark.parametrize(
    ("aggregation", "value", "d_entropy"),
    [
        ("token-mean", -0.65005971, [[-0.03537188, -0.03129478], [-0.03129478, 0]]),
        ("traj-turn-token", -0.65120902, [[-0.02652891, -0.02347109], [-0.04694217, 0]]),
    ],
)
def test_loss_and_gradients(aggregation, value, d_entropy):
    loss, by_logp, by_entropy = result(past([0.8], [2]), aggregation=aggregation)
    close(loss, value)
    close(by_logp, D_LOGP)
    close(by_entropy, d_entropy)


def test_the_codes_indicator_changes_the_loss_and_not_the_update():
    loss, by_logp, by_entropy = result(past([0.8], [2]), kind="indicator")
    close(loss, -0.64581953)
    close(by_logp, D_LOGP)
    close(by_entropy, np.where(MASK, -0.1 / 3, 0))


def test_the_gradient_of_the_hinge_agrees_with_central_differences():
    def value(change):
        return result(past([0.8], [2]), entropy=np.array(ENTROPY) + change)[0]

    _, _, by_entropy = result(past([0.8], [2]))
    for at in np.argwhere(MASK):
        step = np.zeros((2, 2))
        step[tuple(at)] = 1e-6
        close((value(step) - value(-step)) / 2e-6, by_entropy[tuple(at)], 1e-9)


def test_before_the_first_step_is_remembered_only_the_bonus_acts():
    loss, by_logp, by_entropy = result(past([0], [0], 0))
    plain, _, _ = result(past([0], [0], 0), lam=0.0)
    close(loss, plain - 0.1 * (0.2 + 1.5 + 0.9) / 3)
    close(by_logp, D_LOGP)
    close(by_entropy, np.where(MASK, -0.1 / 3, 0))


def test_without_lam_it_is_grpo_with_a_dual_clip():
    rows = rollouts(MASK, old_logp=OLD)
    alg = algorithms.make("grpo", aggregation="token-mean", dual_clip=3.0)
    value, grads = value_and_grad(alg, (), rows, Views(logp=jnp.array(LOGP)), credit=credit_of(ADVANTAGE, rows))
    loss, by_logp, by_entropy = result(past([0.8], [2]), lam=0.0)
    close(loss, value)
    close(by_logp, grads.logp)
    assert not by_entropy.any()


def test_each_turn_has_its_own_corridor():
    both = result(past([0.8], [2]))
    for same, one in zip(result(past([0.8, 0.8], [2, 2]), turns=2), both):
        close(same, one)
    first = result(past([0.8, 0], [2, 0]), turns=2)
    close(first[2][1, 0], -0.1 / 3)  # the second turn has no past: bonus only
    close(first[2][0], both[2][0])


def observed(state, entropy, mask=MASK, turn=(0, 1), **fields):
    rows = rollouts(mask, extras={"old_entropy": entropy}).with_(extras={"turn": jnp.array(turn)})
    alg = algorithms.make("epo", **fields)
    state = alg.init() if state is None else state
    return jax.device_get(alg.observe(state, {}, rows, credit_of([0, 0], rows), Report({}, {}, 1), None)[0])


def test_the_reference_is_the_mean_over_all_steps_of_mean_entropies():
    state = observed(None, [[0.2, 0.9], [0.4, np.nan]])
    state = observed(state, [[0.3, 0.3], [0.3, np.nan]])
    close(state["sum"] / state["count"], [0.4], 1e-7)
    assert state["step"] == 2 and all(x.dtype == np.float32 for x in (state["sum"], state["count"]))


def test_a_step_or_turn_without_tokens_says_nothing():
    state = observed(None, [[0.2, 0.9], [0.4, 0.1]], mask=np.zeros((2, 2)))
    assert state["count"] == 0 and state["sum"] == 0 and state["step"] == 1
    state = observed(None, [[0.2, 0.4], [0.9, 0.1]], turn=(0, 7), turns=3)
    close(state["sum"], [0.3, 0, 0.9], 1e-7)
    np.testing.assert_array_equal(state["count"], [1, 0, 1])


def test_mean_over_groups_skips_empty_rows_and_groups():
    mask = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1], [0, 0, 0]], bool)
    group = jnp.array([7, 7, 7, -3, 5])
    close(weights.mean_over_groups(mask, group), np.where(mask, np.array([1, 1, 1, 1, 1])[:, None] / 6, 0))
    by_row = np.array([1 / 8, 1 / 4, 0, 1 / 6, 0])[:, None]
    close(weights.mean_over_groups(mask, group, row_means=True), np.where(mask, by_row, 0))
    assert not weights.mean_over_groups(np.zeros((2, 2), bool), jnp.array([0, 1])).any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kappa_l": 3.0}, "algorithm.kappa_l=3.0: expected 0 to kappa_r=2.0"),
        ({"steps": 1}, "algorithm.steps=1: expected the RL steps of the run, at least 2"),
        ({"aggregation": "row"}, "algorithm.aggregation='row': expected one of token-mean, traj-turn-token"),
    ],
)
def test_contradictory_settings_raise_one_clear_line(fields, message):
    with pytest.raises(ValueError) as error:
        algorithms.make("epo", **fields)
    assert str(error.value) == message
