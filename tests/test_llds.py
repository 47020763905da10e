"""LLDS: the known answers of its specification, in float64 to the printed digits, and what it leaves alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import credit_of, loss_and_grad, rollouts

from jaxrl_llm import algorithms
from jaxrl_llm.algorithms import llds
from jaxrl_llm.objectives import ratios
from jaxrl_llm.objectives.weights import weighted_sum

MASK = np.array([[1, 1, 0, 1, 1], [1, 1, 0, 1, 0], [1, 0, 1, 1, 1]], bool)
OLD = np.array([[-1.0, -0.7, -9.0, -2.0, -0.5], [-0.5, -1.5, -9.0, -0.3, 0.0], [-1.0, -9.0, -0.4, -0.8, -1.1]])
CHANGE = np.array([[0.1, -0.3, 5.0, 0.4, -0.1], [-0.2, 0.3, 5.0, -0.5, 0.0], [-0.4, 5.0, -0.3, -0.2, -0.1]])
ADVANTAGE = np.array([1.0, 0.0, -1.0])
ANSWER = np.array([[0, 0, 0, 1, 1], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]], float)


@pytest.fixture(autouse=True)
def double(x64):
    """Known answers are in float64."""


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=6e-9)


def penalty(**fields):
    """L_LLDS alone and its gradient in logp."""
    alg = algorithms.make("llds", **fields)
    rows = rollouts(MASK, old_logp=OLD, extras={"answer_mask": ANSWER})
    keep = alg.weigh((), rows, credit_of(ADVANTAGE, rows)).extras["keep"]

    def value(logp):
        return weighted_sum(llds.displacement(logp, jnp.asarray(OLD), jnp.asarray(MASK), alg.config.gate), keep)

    return jax.value_and_grad(value)(jnp.asarray(OLD + CHANGE))


def test_a_turn_is_a_run_of_trained_tokens():
    np.testing.assert_array_equal(ratios.turns(MASK), [[1, 1, 0, 2, 2], [1, 1, 0, 2, 0], [1, 0, 2, 2, 2]])


@pytest.mark.parametrize(
    ("fields", "value"),
    [
        ({"gate": "action"}, 0.11428571),
        ({"gate": "response"}, 0.10000000),
        ({"gate": "token"}, 0.15714286),
        ({"gate": "action", "denominator": "all"}, 0.07272727),
        ({"gate": "action", "answer_weight": 0.25}, 0.06071429),
        ({"gate": "token", "answer_weight": 0.25}, 0.09285714),
    ],
)
def test_penalties(fields, value):
    close(penalty(**fields)[0], value)


@pytest.mark.parametrize(
    ("gate", "held"),
    [
        ("action", [(0, 1), (1, 3)]),
        ("response", [(1, 0), (1, 3)]),
        ("token", [(0, 1), (0, 4), (1, 0), (1, 3)]),
    ],
)
def test_the_penalty_pulls_fallen_tokens_of_kept_rows_back_up(gate, held):
    expected = np.zeros(MASK.shape)
    for at in held:
        expected[at] = -0.14285714
    close(penalty(gate=gate)[1], expected)


def test_total_loss():
    rows = rollouts(MASK, old_logp=OLD)
    value, grad = loss_and_grad(algorithms.make("llds"), rows, OLD + CHANGE, credit_of(ADVANTAGE, rows))
    close(value, -0.03416635)
    expected = [
        [-0.10047008, -0.09591854, 0, 0, -0.08225795],
        [0, 0, 0, -0.02857143, 0],
        [0, 0, 0, 0.07443007, 0.08225795],
    ]
    close(grad, expected)


@pytest.mark.parametrize("gate", ["action", "response", "token"])
def test_on_policy_it_is_grpo(gate):
    rows = rollouts(MASK, old_logp=OLD)
    ours = loss_and_grad(algorithms.make("llds", gate=gate), rows, OLD, credit_of(ADVANTAGE, rows))
    plain = loss_and_grad(algorithms.make("grpo", aggregation="token-mean"), rows, OLD, credit_of(ADVANTAGE, rows))
    for a, b in zip(ours, plain):
        close(a, b)


def test_without_a_kept_row_there_is_no_penalty():
    rows = rollouts(MASK, old_logp=OLD)
    credit = credit_of(-np.ones(3), rows)
    ours = loss_and_grad(algorithms.make("llds"), rows, OLD + CHANGE, credit)
    none = loss_and_grad(algorithms.make("llds", lam=0.0), rows, OLD + CHANGE, credit)
    for a, b in zip(ours, none):
        close(a, b)
