"""EMPG, arXiv 2509.09265: the known answers of its specification, in float64, and what a step is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import credit_of, loss_and_grad, rollouts

from jaxrl_llm import algorithms
from jaxrl_llm.advantages import agent_steps
from jaxrl_llm.objectives import ratios

ADVANTAGE = [1.0, -0.5]
ENTROPY = [[0.2, 0.4, 0, 1.0, 1.2], [0.6, 0, 0.1, 0.3, 0.2]]
STEP = [[0, 0, -1, 1, 1], [0, -1, 1, 1, 2]]
MASK = np.array(STEP) >= 0
OLD = [[-1.0, -0.5, -0.3, -0.7, -0.2], [-0.4, -0.6, -0.8, -0.1, -0.9]]
TOKENS = [
    [1.15033841, 1.15033841, 0, 0.43863566, 0.43863566],
    [-0.34313613, 0, -0.57291897, -0.57291897, -0.67291897],
]
KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def double(x64):
    """Known answers are in float64."""


def close(actual, expected, tol=6e-9):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tol)


def by_token(entropy=ENTROPY, step=STEP, mask=MASK, advantage=ADVANTAGE, **fields):
    steps = agent_steps.in_rows(agent_steps.numbered(jnp.array(step), jnp.asarray(mask)))
    of_step = agent_steps.modulated(
        jnp.array(advantage), agent_steps.mean(jnp.array(entropy), jnp.asarray(mask), steps), steps, **fields
    )
    return np.where(mask, of_step[steps.of_token], 0)


def test_mean_entropy_of_each_step():
    mask = jnp.asarray(MASK)
    steps = agent_steps.in_rows(agent_steps.numbered(jnp.array(STEP), mask))
    close(agent_steps.mean(jnp.array(ENTROPY), mask, steps)[steps.on], [0.3, 1.1, 0.6, 0.2, 0.2], 1e-14)


def test_token_advantages():
    close(by_token(), TOKENS)


def test_without_modulation_it_is_the_advantage_less_its_mean_over_steps():
    close(by_token(k=0.0, zeta=0.0), np.where(MASK, np.array([[0.89999999], [-0.59999999]]), 0), 1e-8)


def test_loss_and_gradient():
    rows = rollouts(MASK, old_logp=OLD)
    value, grad = loss_and_grad(algorithms.make("empg"), rows, OLD, credit_of(by_token(), rows, entropy=ENTROPY))
    close(value, -0.12700689)
    expected = [
        [-0.14379230, -0.14379230, 0, -0.05482946, -0.05482946],
        [0.04289202, 0, 0.07161487, 0.07161487, 0.08411487],
    ]
    close(grad, expected)


def test_equal_entropies_give_every_step_but_the_last_the_bonus():
    a = by_token(entropy=np.full((2, 5), 0.7), advantage=[0.0, 0.0], zeta=1.0)
    share = 3 / 5  # steps that are not the last
    close(a, np.where(MASK, np.array([[1, 1, 0, 0, 0], [1, 0, 1, 1, 0]]) - share, 0))
    noise = np.full((2, 5), 0.7) + 1e-9 * np.arange(10).reshape(2, 5)
    close(by_token(entropy=noise, advantage=[0.0, 0.0], zeta=1.0), a)


def test_a_row_without_steps_is_in_no_mean():
    with_empty = by_token(
        np.vstack([ENTROPY, np.full((1, 5), np.nan)]),
        np.vstack([STEP, np.zeros((1, 5), int)]),
        np.vstack([MASK, np.zeros((1, 5), bool)]),
        [*ADVANTAGE, 9.0],
    )
    close(with_empty[:2], TOKENS)


def test_steps_of_one_number_go_on_behind_tool_output_and_gaps_are_no_steps():
    mask = jnp.array([[1, 0, 1, 1, 0, 1]], bool)
    np.testing.assert_array_equal(agent_steps.numbered(jnp.array([[3, 3, 3, 7, 8, 9]]), mask), [[1, 0, 1, 2, 0, 3]])


def credit(rows, **fields):
    return np.asarray(algorithms.make("empg", **fields).credit((), rows, KEY).advantage)


def trajectories(extras=None):
    return rollouts(MASK, [1.0, 0], [0, 0], OLD, {"old_entropy": ENTROPY}).with_(extras=extras)


def test_credit_modulates_grpos_advantage():
    a = 0.5 / (np.sqrt(0.5) + 1e-6)
    got = credit(trajectories({"step": jnp.array(STEP)}), steps="given")
    close(got, by_token(advantage=[a, -a]), 1e-14)
    runs = np.asarray(ratios.turns(jnp.asarray(MASK)))
    close(credit(trajectories()), by_token(advantage=[a, -a], step=runs), 1e-14)


def test_rows_that_are_turns_have_the_same_credit_as_a_row_with_the_trajectory():
    """The two trajectories of the example, one step a row, in a random order, with an empty turn."""
    turns = [(0, 0, [0.2, 0.4]), (0, 1, [1.0, 1.2]), (1, 0, [0.6]), (1, 1, [0.1, 0.3]), (1, 4, [0.2]), (1, 2, [])]
    expected = [1.15033841, 0.43863566, -0.34313613, -0.57291897, -0.67291897, 0]
    order = np.array([4, 0, 5, 3, 1, 2])
    mask = np.array([[i < len(turns[o][2]) for i in range(2)] for o in order])
    entropy = np.array([(turns[o][2] + [np.nan, np.nan])[:2] for o in order])
    traj, turn = (jnp.array([turns[o][i] for o in order]) for i in (0, 1))
    steps = agent_steps.of_rows(traj, turn, jnp.asarray(mask))
    own = agent_steps.mean(jnp.array(entropy), jnp.asarray(mask), steps)
    got = agent_steps.modulated(jnp.array(ADVANTAGE)[traj], own, steps)
    close(got, np.array(expected)[order])


def test_the_gradient_of_a_softmax_policy_is_larger_where_it_is_uncertain():
    """The paper's theory: E |grad_z log pi|^2 = 1 - sum pi^2, with z the logits."""
    z = jnp.array([2.0, 0.3, -1.0, 0.5])
    pi, jacobian = jax.nn.softmax(z), jax.jacobian(jax.nn.log_softmax)(z)
    close(jnp.sum(pi * jnp.sum(jacobian**2, -1)), 1 - jnp.sum(pi**2), 1e-14)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": -1.0}, "algorithm.k=-1.0: expected at least 0"),
        ({"steps": "turns"}, "algorithm.steps='turns': expected one of runs, given, rows"),
    ],
)
def test_contradictory_settings_raise_one_clear_line(fields, message):
    with pytest.raises(ValueError) as error:
        algorithms.make("empg", **fields)
    assert str(error.value) == message
