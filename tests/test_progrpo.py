"""ProGRPO, arXiv 2602.05281: the known answers of its specification, in float64, and where prompt log-probs come from."""

import jax
import jax.numpy as jnp
import learning
import numpy as np
import pytest
from arrays import loss_and_grad, rollouts

from jaxrl_llm import algorithms
from jaxrl_llm.advantages import confidence
from jaxrl_llm.algorithms.base import Plan
from jaxrl_llm.models import attention, decoder
from jaxrl_llm.training import loop

OLD = [[-0.1, -1.2, -0.3, -0.05, -0.7, -2.0], [-0.2, -0.1, -0.4, -0.9, 0, 0], [-0.6, -0.3, -1.5, 0, 0, 0]]
MASK = np.arange(6) < np.array([[6], [4], [3]])
PROMPT = [0.0, -0.5, -2.0, -1.0]  # the first token is predicted by nothing
GRPO = [0.5773492691913578, 0.5773492691913578, -1.1546985383827153]
ARM = [0.5440686518123364, 0.44173208093936456, -1.1985959768386238]
KEY = jax.random.key(0)


def batch(reward=(1.0, 1, 0), group=(0, 0, 0), mask=MASK):
    rows = rollouts(mask, reward, np.zeros(3), OLD, {"old_prompt_logp": np.tile(PROMPT, (3, 1))})
    return rows.with_(group=jnp.asarray(group), prompt_length=jnp.array([4]))


def advantage(rows, **fields):
    return np.asarray(algorithms.make("progrpo", **fields).credit((), rows, KEY).advantage)[:, 0]


def close(actual, expected, tol=6e-9):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tol)


def test_confidences(x64):
    credit = algorithms.make("progrpo").credit((), batch(), KEY)
    close(credit.extras["confidence_answer"], [0.20189652, 0.40656966, 0.22313016])
    close(credit.extras["confidence_prompt"], [0.13533528] * 3)


def test_the_number_of_tokens_that_count_is_exact_in_float32():
    logp = -jnp.arange(1.0, 16)[None]
    got = confidence.of_least_likely(logp, jnp.ones((1, 15), bool), 0.2)
    close(got, [np.exp(-14)], 1e-9)  # of 3 tokens: -13, -14, -15


def test_a_row_without_tokens_is_sure_and_one_token_is_its_probability(x64):
    logp = jnp.array([[jnp.nan, jnp.nan], [jnp.nan, -2.0]])
    close(confidence.of_least_likely(logp, jnp.array([[False, False], [False, True]]), 0.2), [1, np.exp(-2)])


def test_advantages_and_loss(x64):
    close(advantage(batch()), ARM, 1e-14)
    close(advantage(batch(), alpha=0.0), GRPO, 1e-14)
    value, grad = loss_and_grad(algorithms.make("progrpo"), batch(), OLD)
    close(value, -0.11042710)
    close(grad, np.where(MASK, np.array([[-0.04185143], [-0.03397939], [0.09219969]]), 0))


def test_a_group_that_is_all_wrong_has_no_bonus(x64):
    assert not advantage(batch(reward=(0.0, 0, 0))).any()


def test_a_group_that_is_all_right_unlearns_its_most_confident_answer_unless_the_rule_is_mixed(x64):
    close(advantage(batch(reward=(1.0, 1, 1))), 0.5 * (0.13533528 - np.array([0.20189652, 0.40656966, 0.22313016])))
    assert not advantage(batch(reward=(1.0, 1, 1)), rule="mixed").any()
    close(advantage(batch(), rule="mixed"), ARM, 1e-14)


def test_one_alone_has_the_bonus_when_it_is_right(x64):
    alone = advantage(batch(group=(0, 1, 2)))
    close(alone, [0.5 * (0.13533528 - 0.20189652), 0.5 * (0.13533528 - 0.40656966), 0])


def test_without_alpha_it_is_grpo_with_a_token_mean(x64):
    logp = np.array(OLD) + np.linspace(-0.5, 0.5, 18).reshape(3, 6)
    ours = loss_and_grad(algorithms.make("progrpo", alpha=0.0), batch(), logp)
    plain = loss_and_grad(algorithms.make("grpo", clip_high=0.28, aggregation="token-mean"), batch(), logp)
    for a, b in zip(ours, plain):
        close(a, b, 1e-14)


def test_prompt_log_probs_are_the_policys_of_each_token_given_those_before():
    alg = learning.algorithm(needs=algorithms.make("progrpo").needs)
    learner, rows = learning.learner(alg), learning.rollouts()
    got = loop.rescore(learner, alg, Plan(), rows, old_logp=False).extras["old_prompt_logp"]
    positions = jnp.broadcast_to(jnp.arange(learning.L), rows.prompt_tokens.shape)
    params = learner.train.params["policy"]
    tokens = jnp.asarray(rows.prompt_tokens)
    states, _ = decoder.forward(learning.SPEC, params, tokens, positions, attention.causal(), dtype=jnp.float32)
    logp = jax.nn.log_softmax(states @ decoder.unembed(learning.SPEC, params))
    expected = jnp.take_along_axis(logp[:, :-1], tokens[:, 1:, None], -1)[..., 0]
    expected = jnp.pad(expected, ((0, 0), (1, 0)))
    within = np.arange(learning.L) < rows.prompt_length[:, None]
    close(got, np.where(within, expected, 0)[rows.prompt], 1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"share": 0.0}, "algorithm.share=0.0: expected more than 0, at most 1"),
        ({"rule": "all"}, "algorithm.rule='all': expected one of any, mixed"),
    ],
)
def test_contradictory_settings_raise_one_clear_line(fields, message):
    with pytest.raises(ValueError) as error:
        algorithms.make("progrpo", **fields)
    assert str(error.value) == message
