"""The known answers of LUSPO, DHPO and ETR, in float64 to the printed digits, and the limits they claim."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import credit_of, loss_and_grad, rollouts

from jaxrl_llm import algorithms
from jaxrl_llm.algorithms import dhpo, etr
from jaxrl_llm.objectives import ratios

MASK = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]], bool)
OLD = np.array([[-1.0, -0.7, -2.0], [-0.5, -1.5, 0], [-0.3, 0, 0], [-2.2, -1.1, -0.9]])
LOGP = OLD + np.array([[0.1, 0.5, -0.4], [0.3, -0.6, 0], [0.05, 0, 0], [-0.02, 0.9, -1.2]])
ADVANTAGE = np.array([1.0, -1.0, 0.5, -0.5])
ENTROPY = np.array([[0.2, 1.0, 0.6], [0.9, 0.9, 0], [0.4, 0, 0], [0.1, 2.1, 0.6]])


@pytest.fixture(autouse=True)
def double(x64):
    """Known answers are in float64."""


def result(name, logp=LOGP, credit=None, **fields):
    rows = rollouts(MASK, old_logp=OLD)
    credit = credit_of(ADVANTAGE, rows) if credit is None else credit
    return loss_and_grad(algorithms.make(name, **fields), rows, logp, credit, entropy=ENTROPY)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=6e-9)


# LUSPO


def test_luspo():
    value, grad = result("luspo")
    close(value, -0.00393750)
    assert not np.any(grad)  # every row is clipped
    value, grad = result("luspo", clip_low=0.1, clip_high=0.1)
    close(value, -0.14561322)
    close(grad, [[-0.26723478] * 3, [0] * 3, [-0.13140889, 0, 0], [0] * 3])


def test_luspo_on_policy_is_reinforce_on_whole_completions():
    _, grad = result("luspo", logp=OLD)
    close(grad, np.where(MASK, -ADVANTAGE[:, None] / 4, 0))


def test_luspo_by_the_mean_length_keeps_the_scale_of_gspo():
    wide = {"clip_low": 0.9, "clip_high": 9.0}
    _, plain = result("luspo", **wide)
    _, scaled = result("luspo", batch_mean_length=True, **wide)
    close(scaled, plain / (MASK.sum() / 4))


# DHPO


def test_dhpo_entropy_weights():
    by_row = [[0, 1, 0.5], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5], [0, 1, 0.25]]
    close(jnp.where(MASK, dhpo.entropy_weight(ENTROPY, MASK), 0.5), np.where(MASK, by_row, 0.5))
    by_batch = [[0.05, 0.45, 0.25], [0.4, 0.4, 0], [0.15, 0, 0], [0, 1, 0.25]]
    close(jnp.where(MASK, dhpo.entropy_weight(ENTROPY, MASK, "batch"), 0), by_batch)


@pytest.mark.parametrize(
    ("mix", "form", "loss", "expected"),
    [
        (
            "average",
            "joint",
            -0.00003991,
            [
                [-0.09058792, -0.04453913, -0.07246913],
                [0.13816042, 0, 0],
                [-0.13140889, 0, 0],
                [0.02042081, 0.06996726, 0],
            ],
        ),
        (
            "average",
            "branch",
            0.00244031,
            [
                [-0.09058792, -0.04453913, -0.07246913],
                [0.08436618, 0, 0],
                [-0.13140889, 0, 0],
                [0.02042081, 0.05124173, 0],
            ],
        ),
        (
            "entropy",
            "joint",
            0.02789594,
            [[-0.08907826, 0, -0.07246913], [0.13816042, 0, 0], [-0.13140889, 0, 0], [0, 0.10248346, 0]],
        ),
        (
            "entropy",
            "branch",
            0.03035169,
            [[-0.08907826, 0, -0.07246913], [0.08436618, 0, 0], [-0.13140889, 0, 0], [0, 0.10248346, 0]],
        ),
    ],
)
def test_dhpo(mix, form, loss, expected):
    value, grad = result("dhpo", mix=mix, form=form, sequence_clip_low=0.1, sequence_clip_high=0.1)
    close(value, loss)
    close(grad, expected)


def test_dhpo_branches_average_to_the_mean_of_grpo_and_gspo():
    value, grad = result("dhpo", form="branch")
    ours = (value, grad)
    token, sequence = result("grpo"), result("gspo", form="token")
    for mixed, a, b in zip(ours, token, sequence):
        close(mixed, (a + b) / 2)


@pytest.mark.parametrize("fields", [{}, {"form": "branch"}, {"mix": "entropy"}, {"sequence_gradient": True}])
def test_dhpo_on_policy_has_the_gradient_of_grpo(fields):
    close(result("dhpo", logp=OLD, **fields)[1], result("grpo", logp=OLD)[1])


def test_dhpo_turned_round_weighs_the_sequence_where_entropy_is_high():
    opposite = result("dhpo", mix="entropy", form="branch", high_entropy_to="sequence")
    straight = result("dhpo", mix="entropy", form="branch")
    total = [a + b for a, b in zip(result("grpo"), result("gspo", form="token"))]  # w + (1 - w) = 1
    for a, b, both in zip(opposite, straight, total):
        close(a + b, both)


# ETR


def etr_credit(rows, **fields):
    alg = algorithms.make("etr", **fields)
    credit = alg.credit(alg.init(), rows, jax.random.key(0))
    return replace(credit, advantage=credit_of(ADVANTAGE, rows).advantage)


ETR_ROWS = {"reward": [1, 0, 1, 1], "group": [0, 0, 1, 1], "old_logp": OLD}


def test_etr():
    rows, config = rollouts(MASK, **ETR_ROWS), etr.Config()
    v = etr.learnability(config, rows)
    close(v, [1, 1, 0, 0])
    close(etr.radius(config, 0.2, credit_of(ADVANTAGE, rows).advantage, v)[:, 0], [0.45, 0.45, 0.25, 0.25])
    value, grad = loss_and_grad(algorithms.make("etr"), rows, LOGP, etr_credit(rows))
    close(value, 0.01185762)
    expected = [
        [-0.09209758, 0, -0.05586000],
        [0.16873235, 0, 0],
        [-0.13140889, 0, 0],
        [0.04084161, 0.10248346, 0],
    ]
    close(grad, expected)


def test_etr_without_growth_is_grpo():
    rows = rollouts(MASK, **ETR_ROWS)
    same = loss_and_grad(algorithms.make("etr", micro=0.0, macro=0.0), rows, LOGP, etr_credit(rows))
    plain = loss_and_grad(algorithms.make("grpo"), rows, LOGP, credit_of(ADVANTAGE, rows))
    close(same[0], 0.06602429)
    for a, b in zip(same, plain):
        close(a, b)


def test_etr_reads_rewards_of_any_range():
    rows = rollouts(MASK, reward=[3.0, -1.0, 3.0, 3.0], group=[0, 0, 1, 1])
    close(etr.learnability(etr.Config(reward_low=-1.0, reward_high=3.0), rows), [1, 1, 0, 0])


def test_the_sequence_ratio_of_the_specs():
    close(ratios.sequence(LOGP, OLD, MASK)[:, 0], [1.06893911, 0.86070798, 1.05127110, 0.89882523])


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("etr", {"cap": 1.0}, "algorithm.cap=1.0: expected at least clip_low and clip_high, 0.2, and less than 1"),
        ("etr", {"micro": -1.0}, "algorithm.micro=-1.0: expected at least 0"),
        ("dhpo", {"entropy_scope": "batch"}, "algorithm.entropy_scope='batch': expected row with mix=average"),
        ("dhpo", {"form": "both"}, "algorithm.form='both': expected one of joint, branch"),
        ("luspo", {"clip_low": 2.0}, "algorithm.clip_low=2.0: expected 0 to 1"),
    ],
)
def test_contradictory_settings_raise_one_clear_line(name, fields, message):
    with pytest.raises(ValueError) as error:
        algorithms.make(name, **fields)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
