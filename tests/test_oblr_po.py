"""OBLR-PO, arXiv 2511.23310: the baseline of least variance, and a learning rate that follows the gradient's noise."""

import itertools

import jax
import jax.numpy as jnp
import learning
import numpy as np
import pytest
from arrays import loss_and_grad, rollouts

from jaxrl_llm import algorithms, config_check
from jaxrl_llm.advantages import group
from jaxrl_llm.algorithms import oblr_po
from jaxrl_llm.algorithms.base import Needs, Noise
from jaxrl_llm.sharding.mesh import make_mesh
from jaxrl_llm.training import noise
from jaxrl_llm.training.learner import Learner

KEY = jax.random.key(0)
REWARD, WEIGHT = np.array([1.0, 0, 1, 0]), np.array([1.0, 4, 2, 1])
MICRO = np.array([[1, 0], [0.5, 0.5], [1.5, -1], [1, 0.1]])


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=6e-9)


def advantage(reward=REWARD, weight=WEIGHT, groups=None, loo=False, counted=None):
    reward = jnp.asarray(reward)
    groups = np.zeros(len(reward), int) if groups is None else np.asarray(groups)
    counted = np.ones(len(reward), bool) if counted is None else np.asarray(counted)
    return group.weighted_baseline(reward, jnp.asarray(weight), jnp.asarray(groups), jnp.asarray(counted), loo)


def test_the_baseline_is_weighed_by_squared_gradient_norms(x64):
    close(advantage(), [0.625, -0.375, 0.625, -0.375])
    close(advantage(loo=True), [0.71428571, -0.75, 0.83333333, -0.42857143])
    close(np.sum(WEIGHT * np.asarray(advantage())), 0)


def test_equal_weights_give_the_groups_mean_and_without_oneself_rloo(x64):
    reward, groups, yes = jnp.asarray([1.0, 0, 0.5, 2, 1, 7]), jnp.asarray([3, 3, 3, 1, 1, 9]), jnp.ones(6, bool)
    for weight in (np.full(6, 0.3), np.zeros(6)):
        close(advantage(reward, weight, groups), group.normalized(reward, groups, yes, "none"))
        close(advantage(reward, weight, groups, loo=True), group.leave_one_out(reward, groups, yes))


def test_unscored_rows_are_in_no_baseline_and_agreement_is_no_signal(x64):
    got = advantage([1.0, 0, np.nan], [1.0, 3, np.nan], counted=[True, True, False])
    close(got, [0.75, -0.25, 0])
    close(advantage([0.4] * 3, [1.0, 2, 3]), [0, 0, 0])


def test_the_weight_is_the_squared_norm_of_the_gradient_in_the_logits(x64):
    logits, tokens = jnp.asarray([[0.3, -0.2, 1.1], [0, 2, 0]]), np.array([2, 0])
    at = np.arange(2)
    logp = jax.nn.log_softmax(logits)
    collision = jnp.sum(jnp.exp(logp) ** 2, -1)
    rows = rollouts([[1, 1, 0]], [0.0], [0], [[*logp[at, tokens], np.nan]], {"old_collision": [[*collision, np.nan]]})
    close(oblr_po.logit_norm(rows), [1.69792632])
    gradient = jax.grad(lambda z: jax.nn.log_softmax(z)[at, tokens].sum())(logits)
    close(oblr_po.logit_norm(rows), [np.sum(np.asarray(gradient) ** 2)])


def test_the_loss_is_reinforce_on_whole_completions_and_counts_empty_ones(x64):
    mask = [[1, 1], [1, 0], [1, 1], [0, 0]]
    rows = rollouts(mask, REWARD, np.zeros(4), -np.ones((4, 2)), {"grad_square": WEIGHT})
    logp = np.array([[-1.0, -2], [-3, 0], [-0.5, -0.25], [0, 0]])
    value, grad = loss_and_grad(algorithms.make("oblr_po", norm="given"), rows, logp)
    a = np.array([0.625, -0.375, 0.625, -0.375])[:, None]
    close(value, -np.sum(np.where(mask, a * logp, 0)) / 4)
    close(grad, np.where(mask, -a / 4, 0))


def test_a_groups_baseline_has_less_variance_than_its_mean_and_that_less_than_none(x64):
    """Exact variances of (R - b) grad log pi over a small softmax policy."""
    logits, reward = jnp.asarray([0.5, -1.0, 2.0, 0.0]), np.array([1.0, 0.2, 0.9, 0.6])
    p = np.asarray(jax.nn.softmax(logits))
    score = np.eye(4) - p
    w = (score**2).sum(1)

    def variance(b):
        g = (reward - b)[:, None] * score
        return p @ (g**2).sum(1) - ((p @ g) ** 2).sum()

    best = p @ (w * reward) / (p @ w)
    assert variance(best) < variance(p @ reward) < variance(0)


# The learning rate


def test_noise_of_a_gradient_from_the_gradients_of_its_parts(x64):
    own = MICRO / 4  # parts add up to the gradient
    got = noise.measure(jnp.sum(jnp.asarray(MICRO.mean(0)) ** 2), jnp.sum(jnp.asarray(own) ** 2, 1))
    close(got, [1.01, 0.14333333])
    close(got.square / got.variance - 1, 6.04651163)
    close(oblr_po.signal_share(got), 0.85808581)


def test_no_gradient_and_a_single_part_have_no_signal():
    assert float(oblr_po.signal_share(Noise(jnp.zeros(()), jnp.zeros(())))) == 0
    alone = noise.measure(jnp.asarray(2.0), jnp.asarray([2.0]))
    assert float(oblr_po.signal_share(alone)) == 0


def test_the_learning_rate_follows_averages_of_both():
    alg = algorithms.make("oblr_po")
    first, state = alg.rate(alg.init(), Noise(jnp.asarray(1.01), jnp.asarray(0.14333333)))
    np.testing.assert_allclose(1e-6 * first, 8.58085809e-07, rtol=1e-6)
    second, state = alg.rate(state, Noise(jnp.asarray(0.2), jnp.asarray(0.19)))
    np.testing.assert_allclose(1e-6 * second, 7.12353472e-07, rtol=1e-6)
    np.testing.assert_allclose([state["square"], state["variance"], state["count"]], [0.1109, 0.0319, 2], rtol=1e-6)
    least, _ = alg.rate(alg.init(), Noise(jnp.asarray(1.0), jnp.asarray(3.0)))
    np.testing.assert_allclose(least, 0.1, rtol=1e-6)


def test_groups_are_dealt_whole_to_parts():
    rows = learning.rollouts()
    host = noise.HostRows(*(np.asarray(getattr(rows, name)) for name in noise.HostRows._fields))
    dealt = noise.parts(host, rows.group, 3)
    of = [set(rows.group[part.length > 0].tolist()) for part in dealt]
    assert len(dealt) == 3 and all(a.isdisjoint(b) for a, b in itertools.combinations(of, 2))
    np.testing.assert_array_equal(sum(part.length for part in dealt), rows.length)
    assert len(noise.parts(host, rows.group, 99)) == 4
    empty = host._replace(length=np.zeros_like(host.length))
    assert len(noise.parts(empty, rows.group, 3)) == 1


def half_rate(state, measured):
    return jnp.asarray(0.5), {"seen": jnp.stack([measured.square, measured.variance])}


def stepped(**fields):
    """Change of the parameters over a step of plain SGD at rate 1, and the state after."""
    state = {"seen": jnp.zeros(2)} if fields else learning.APART
    loss = lambda state, views, rows, credit: learning.loss(learning.APART, views, rows, credit)  # noqa: E731
    alg = learning.algorithm(loss, init=lambda: state, **fields)
    sgd = {"name": "sgd", "lr": 1.0, "clip_norm": 0.0}
    made = learning.learner(alg, optimizer=sgd, model={"dtype": "float64", "param_dtype": "float64"})
    rows = learning.rollouts(dtype=np.float64)
    before = jax.device_get(made.train.params)
    state, metrics = made.step(state, rows, learning.credit(rows))
    return jax.tree.map(np.subtract, before, jax.device_get(made.train.params)), state, metrics


def test_the_optimizer_reads_the_factor_and_the_method_the_noise(x64):
    whole, _, _ = stepped()
    scaled, state, metrics = stepped(rate=half_rate, needs=Needs(loss=("logp", "entropy"), noise=4))
    learning.assert_close(scaled, jax.tree.map(lambda x: x / 2, whole), 1e-10)
    square = sum(np.sum(x**2) for x in jax.tree.leaves(whole))
    np.testing.assert_allclose(state["seen"][0], square, rtol=1e-9)
    assert float(metrics["lr"].sum) == 0.5

    def of_prompt(group):  # the same loss, with the advantages of one prompt only
        rows = learning.rollouts(dtype=np.float64)
        credit = learning.credit(rows)
        made = learning.learner(
            optimizer={"name": "sgd", "lr": 1.0, "clip_norm": 0.0},
            model={"dtype": "float64", "param_dtype": "float64"},
        )
        before = jax.device_get(made.train.params)
        made.step(learning.APART, rows, learning.Credit(np.where((rows.group == group)[:, None], credit.advantage, 0)))
        return jax.tree.map(np.subtract, before, jax.device_get(made.train.params))

    parts = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(of_prompt(g))]) * 4 for g in range(4)]
    mean = np.mean(parts, 0)
    variance = sum(np.sum((g - mean) ** 2) for g in parts) / (4 * 3)
    np.testing.assert_allclose(state["seen"][1], variance, rtol=1e-8)


def test_what_cannot_give_parts_of_a_gradient_is_refused():
    alg = learning.algorithm(rate=half_rate, needs=Needs(loss=("logp", "entropy"), noise=4))
    with pytest.raises(ValueError, match=r"^learner\.route=fused: test takes its gradient in parts"):
        Learner(learning.config(learner={"route": "fused"}), learning.SPEC, alg, make_mesh())
    config = learning.config(algorithm={"name": "oblr_po"}, learner={"minibatches": 4}, model={"spec": {}})
    with pytest.raises(ValueError, match=r"^learner\.minibatches=4: oblr_po compares the gradients of a minibatch's"):
        config_check.check_method(config)


@pytest.mark.parametrize("fields", [{"chunks": 1}, {"beta": 1.0}, {"floor": -0.1}, {"norm": "params"}])
def test_bad_settings_raise_one_clear_line(fields):
    with pytest.raises(ValueError, match=r"^algorithm\.\w+=.*: expected [^\n]*$"):
        algorithms.make("oblr_po", **fields)
