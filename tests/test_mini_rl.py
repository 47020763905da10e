"""MiniRL: the known answers of its specification in float64, its ablations, and what its theory rests on."""

import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import credit_of, loss_and_grad, rollouts

from jaxrl_llm import algorithms
from jaxrl_llm.algorithms import mini_rl
from jaxrl_llm.config import Importance
from jaxrl_llm.training import gradients
from jaxrl_llm.types import GIVEN, metric_value

MASK = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]], bool)
OLD = np.array([[-1.0, -0.7, -2.0], [-0.5, -1.5, 0], [-0.3, 0, 0], [-2.2, -1.1, -0.9]])
LOGP = OLD + np.array([[0.1, 0.5, -0.4], [0.3, -0.6, 0], [0.05, 0, 0], [-0.02, 0.9, -1.2]])
SAMPLER = OLD + np.array([[0.05, -0.1, 0.2], [0, -2, 0], [0.1, 0, 0], [-0.05, 0, 0.3]])
ADVANTAGE = [1.0, -1.0, 0.5, -0.5]
GRADIENT = [
    [-0.26281777, 0, -0.13720291],
    [0.33746470, 0, 0],
    [-0.11890368, 0, 0],
    [0.12880682, 0.30745039, 0],
]
WEIGHT = [[0.95122942, 1.10517092, 0.81873075], [1, 5, 0], [0.90483742, 0, 0], [1.05127110, 1, 0.74081822]]

pytestmark = pytest.mark.usefixtures("x64")


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=6e-9)


def rows_of(sampler=SAMPLER, **fields):
    return replace(rollouts(MASK, old_logp=OLD), sampler_logp=jnp.asarray(sampler), **fields)


def result(rows=None, logp=LOGP, **fields):
    rows = rows_of() if rows is None else rows
    return loss_and_grad(algorithms.make("mini_rl", **fields), rows, logp, credit_of(ADVANTAGE, rows))


def test_advantages_are_rewards_less_the_group_s_mean():
    def advantage(reward, group):
        rows = rollouts(np.ones((len(reward), 1)), reward, group)
        return algorithms.make("mini_rl").credit((), rows, jax.random.key(0)).advantage[:, 0]

    close(advantage([1, 0, 1, 0], [0] * 4), [0.5, -0.5, 0.5, -0.5])
    close(advantage([3.0, 1.0, 1.0], [0, 1, 1]), [0, 0, 0])  # one alone, and two that agree


def test_weights_of_the_sampler_s_mismatch():
    w = jnp.minimum(mini_rl.mismatch(rows_of()), 5)
    close(jnp.where(MASK, w, 0), WEIGHT)


def test_loss_and_gradient():
    value, grad = result()
    close(value, 0.18061475)
    close(grad, GRADIENT)


def test_the_mask_is_decided_by_staleness_alone():
    kept = [[1, 0, 1], [1, 0, 0], [1, 0, 0], [1, 1, 0]]
    for sampler in (SAMPLER, OLD, OLD - 1):
        np.testing.assert_array_equal(result(rows_of(sampler))[1] != 0, kept)


def test_the_ratio_form_has_the_same_gradient():
    value, grad = result(form="ratio")
    close(value, 0.25479755)
    close(grad, GRADIENT)


def test_ablations():
    close(result(use_is=False)[0], 0.28271956)
    close(result(length_norm=True)[0], 0.06877337)
    _, free = result(clip_low=None, clip_high=None)
    ratio, w = np.exp(np.where(MASK, LOGP - OLD, 0)), np.where(MASK, WEIGHT, 0)
    close(free, -np.array(ADVANTAGE)[:, None] * ratio * w / 4)


def test_on_policy_with_a_sampler_that_equals_the_learner_it_is_reinforce():
    value, grad = result(rows_of(OLD), OLD)
    close(grad, np.where(MASK, -np.array(ADVANTAGE)[:, None] / 4, 0))
    rows = rows_of(OLD)
    plain = loss_and_grad(algorithms.make("rloo", form="reinforce", beta=0.0), rows, OLD, credit_of(ADVANTAGE, rows))
    close(value, plain[0])
    close(grad, plain[1])


def test_its_weights_are_those_of_the_learner_s_truncated_importance_sampling():
    rows = rows_of()
    alg = algorithms.make("mini_rl", use_is=False)
    credit = alg.weigh((), rows, credit_of(ADVANTAGE, rows))
    credit, _ = gradients.importance_weighted(Importance(mode="truncate", cap=5.0), rows, credit)
    close(loss_and_grad(alg, rows, LOGP, credit)[1], GRADIENT)
    assert alg.needs.importance and not algorithms.make("mini_rl").needs.importance


def test_rows_without_trained_tokens_are_not_counted():
    empty = np.zeros((1, 3))
    rows = rollouts(np.concatenate([MASK, empty]), old_logp=np.concatenate([OLD, empty]))
    rows = replace(rows, sampler_logp=jnp.asarray(np.concatenate([SAMPLER, empty])))
    alg = algorithms.make("mini_rl")
    value, grad = loss_and_grad(alg, rows, np.concatenate([LOGP, empty]), credit_of([*ADVANTAGE, 9.0], rows))
    close(value, 0.18061475)
    close(grad, [*GRADIENT, [0, 0, 0]])


def test_without_sampler_log_probs_weights_are_one_and_it_warns():
    rows = replace(rows_of(), sampler_logp=None)
    with pytest.warns(UserWarning, match="mini_rl: rows have no sampler_logp"):
        close(result(rows)[0], 0.28271956)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(result(rows, use_is=False)[0], 0.28271956)


def test_tokens_that_no_policy_of_the_run_sampled_have_weight_one():
    some = np.where(np.arange(4)[:, None] == 1, np.nan, SAMPLER)
    given = rows_of(source=jnp.asarray([0, 0, 0, GIVEN]))
    close(jnp.where(MASK, mini_rl.mismatch(rows_of(some)), 0)[1], [1, 1, 0])
    close(jnp.where(MASK, mini_rl.mismatch(given), 0)[3], [1, 1, 1])
    assert np.isfinite(result(rows_of(some))[1]).all()


def test_metrics_say_how_often_either_bound_acts():
    rows, alg = rows_of(), algorithms.make("mini_rl")
    from jaxrl_llm.types import Views

    credit = alg.weigh((), rows, credit_of(ADVANTAGE, rows))
    _, metrics = alg.loss((), Views(logp=jnp.asarray(LOGP)), rows, credit)
    values = {name: metric_value(m) for name, m in metrics.items()}
    close(values["clip_ratio/high"], 1 / 9)
    close(values["clip_ratio/low"], 2 / 9)
    close(values["sampling/importance_clipped"], 1 / 9)
    close(values["sampling/importance_mean"], np.sum(WEIGHT) / 9)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"is_cap": 0.5}, "algorithm.is_cap=0.5: expected at least 1"),
        ({"clip_low": None}, "algorithm.clip_high=0.27: expected both clip_low and clip_high, or neither"),
        ({"form": "sum"}, "algorithm.form='sum': expected one of logp, ratio"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(ValueError) as error:
        algorithms.make("mini_rl", **fields)
    assert str(error.value) == message


def test_the_token_sum_is_the_sequence_objective_to_first_order():
    """With pi_theta / mu = 1 + d the gradient of prod_t (1 + d_t) and that of sum_t (1 + d_t) differ by the order of d."""
    direction = jnp.asarray(np.random.default_rng(0).normal(size=6))

    def apart(size):
        product, total = (jax.grad(lambda x, f=f: f(jnp.exp(x)))(size * direction) for f in (jnp.prod, jnp.sum))
        return float(jnp.abs(product - total).max())

    near, far = apart(1e-3), apart(2e-3)
    assert 0 < near < 5e-3
    np.testing.assert_allclose(far / near, 2, rtol=0.02)


def test_a_sampler_with_rounded_weights_is_off_by_what_importance_weights_repair():
    """A policy linear in its weights, sampled with 3 or 4 bits of mantissa: kl(mu || pi) falls with precision, and weighed
    samples of mu have the expectation of pi."""
    rng = np.random.default_rng(0)
    weight, reward = jnp.asarray(rng.normal(size=(4, 50))), jnp.asarray(rng.normal(size=50))
    features = jnp.asarray(rng.normal(size=4))
    pi = jax.nn.log_softmax(features @ weight)
    kls = []
    for bits in (3, 4):
        mu = jax.nn.log_softmax(features @ jax.lax.reduce_precision(weight, 11, bits))
        kls.append(float(jnp.sum(jnp.exp(mu) * (mu - pi))))
        w = jnp.exp(pi - mu)
        off = float(jnp.sum(jnp.exp(mu) * reward) - jnp.sum(jnp.exp(pi) * reward))
        assert abs(off) > 1e-4
        close(jnp.sum(jnp.exp(mu) * jnp.minimum(w, 5) * reward), jnp.sum(jnp.exp(pi) * reward))
    assert kls[0] > 2 * kls[1] > 0
