"""GDPO, arXiv 2510.08554: the estimator of the bound against exact enumeration, the loss, and draws shared by policies."""

import itertools
import math

import jax
import jax.numpy as jnp
import learning
import numpy as np
import pytest
import tiny
from arrays import credit_of, rollouts

from jaxrl_llm import algorithms
from jaxrl_llm.algorithms import gdpo
from jaxrl_llm.algorithms.base import value_and_grad
from jaxrl_llm.objectives import elbo
from jaxrl_llm.sharding.mesh import make_mesh
from jaxrl_llm.training.learner import Learner
from jaxrl_llm.types import Mean, Views, metric_value

KEY = jax.random.key(0)
MASK_ID, VOCAB = 5, 6

pytestmark = pytest.mark.usefixtures("x64")


def table(ids):
    """The toy network "table(6)": logits[b, i, v] = 2 sin(0.9 (i+1)(v+1) + 0.3 sum_j ids[b, j])."""
    i, v = jnp.arange(ids.shape[1])[:, None] + 1, jnp.arange(VOCAB) + 1
    return 2 * jnp.sin(0.9 * i * v + 0.3 * ids.sum(1)[:, None, None])


def test_gauss_nodes():
    np.testing.assert_allclose(elbo.nodes("gauss", 2).t, [0.211324865, 0.788675135], atol=5e-10)
    grid = elbo.nodes("gauss", 3)
    np.testing.assert_allclose(grid.t, [0.112701665, 0.5, 0.887298335], atol=5e-10)
    np.testing.assert_allclose(grid.w, [0.277777778, 0.444444444, 0.277777778], atol=5e-10)


def test_hidden_counts():
    gauss = elbo.hidden_counts(elbo.nodes("gauss", 3).t, 8)
    assert gauss[:, [0, 1, 2, 5, 8]].T.tolist() == [[0, 0, 0], [1, 1, 1], [1, 1, 1], [1, 2, 4], [1, 4, 7]]
    simpson = elbo.hidden_counts(elbo.nodes("simpson", 3).t, 8)
    assert simpson[:, [1, 2, 5, 8]].T.tolist() == [[1, 1, 1], [1, 1, 2], [1, 2, 5], [1, 4, 8]]


def hidden_sets(length):
    """All ways to hide positions [2^T, T] and log p(y_i | masked y) at the hidden ones."""
    y = jnp.array([2, 0, 3, 1, 1, 4])[:length]
    hidden = jnp.asarray(list(itertools.product([False, True], repeat=length)))
    logp = jax.nn.log_softmax(table(jnp.where(hidden, MASK_ID, y)))
    logp = jnp.take_along_axis(logp, jnp.broadcast_to(y, hidden.shape)[..., None], -1)[..., 0]
    return np.asarray(hidden), np.where(hidden, logp, 0)


def expected_bound(grid, mode, length=6):
    """Exact expectation over masks of the estimate, by enumeration."""
    hidden, logp = hidden_sets(length)
    size, total = hidden.sum(1), logp.sum(1)
    counts = elbo.hidden_counts(grid.t, length)[:, length]
    value = 0.0
    for t, w, k in zip(grid.t, grid.w, counts):
        if mode == "iid":
            p = t**size * (1 - t) ** (length - size)
        else:
            p = (size == k) / math.comb(length, k)
        value += w / t * np.sum(p * total)
    return value


def exact_bound(length):
    """The bound in count form: k uniform on 1..L, a uniform subset of k positions, weight L/k."""
    hidden, logp = hidden_sets(length)
    size = hidden.sum(1)
    weight = [0 if k == 0 else 1 / (k * math.comb(length, k)) for k in size]
    return np.sum(weight * logp.sum(1))


@pytest.mark.parametrize(
    ("quadrature", "n", "mode", "expected"),
    [
        ("gauss", 1, "iid", -13.520032180),
        ("gauss", 2, "iid", -15.088853089),
        ("gauss", 3, "iid", -15.091706473),
        ("simpson", 3, "iid", -14.849034260),
        ("gauss", 1, "count", -11.063796958),
        ("gauss", 2, "count", -11.670782890),
        ("gauss", 3, "count", -15.600719846),
        ("simpson", 3, "count", -15.066497160),
    ],
)
def test_expectation_of_the_estimate_over_all_masks(quadrature, n, mode, expected):
    np.testing.assert_allclose(expected_bound(elbo.nodes(quadrature, n), mode), expected, atol=5e-9)


def test_the_exact_bound():
    np.testing.assert_allclose(exact_bound(6), -15.091706473, atol=5e-9)
    np.testing.assert_allclose(exact_bound(3), -8.138581490, atol=5e-9)


@pytest.mark.parametrize(("n", "length"), [(1, 2), (2, 4), (3, 6)])
def test_iid_masks_on_n_gauss_nodes_are_exact_up_to_2n_tokens(n, length):
    grid = elbo.nodes("gauss", n)
    np.testing.assert_allclose(expected_bound(grid, "iid", length), exact_bound(length), rtol=1e-10)
    assert abs(expected_bound(grid, "count", length) - exact_bound(length)) > 0.1


@pytest.mark.parametrize(("quadrature", "factor"), [("gauss", 3.666667), ("simpson", 3.166667)])
def test_count_masks_overweigh_a_completion_of_one_token(quadrature, factor):
    np.testing.assert_allclose(
        expected_bound(elbo.nodes(quadrature, 3), "count", 1) / exact_bound(1), factor, atol=5e-7
    )


def test_count_masks_hide_the_right_number_of_real_tokens_everywhere_alike():
    real = jnp.asarray([[True] * 5 + [False], [True] * 2 + [False] * 4, [False] * 6])
    rows = jnp.repeat(real, 400, 0)
    keys = jnp.arange(1200, dtype=jnp.int32)
    hidden = np.asarray(elbo.draw_masks(keys, rows, elbo.nodes("gauss", 3).t, 2)).reshape(3, 400, 3, 2, 6)
    assert (hidden.sum(-1) == np.array([[1, 2, 4], [1, 1, 1], [0, 0, 0]])[:, None, :, None]).all()
    assert not hidden[~np.broadcast_to(np.asarray(real)[:, None, None, None], hidden.shape)].any()
    np.testing.assert_allclose(hidden[0].mean((0, 2))[:, :5], np.array([[0.2], [0.4], [0.8]]).repeat(5, 1), atol=0.06)


def test_iid_masks_hide_each_real_token_with_probability_t():
    real = jnp.ones((2000, 3), bool).at[:, 2].set(False)
    hidden = np.asarray(elbo.draw_masks(jnp.arange(2000, dtype=jnp.int32), real, (0.2, 0.7), 1, "iid"))
    np.testing.assert_allclose(hidden.mean((0, 2)), [[0.2, 0.2, 0], [0.7, 0.7, 0]], atol=0.04)


def test_masks_depend_on_the_rows_own_key_only():
    real, keys = jnp.ones((4, 5), bool), jnp.array([7, 8, 9, 7], jnp.int32)
    hidden = elbo.draw_masks(keys, real, (0.3, 0.6), 2)
    np.testing.assert_array_equal(elbo.draw_masks(keys[1:3], real[1:3], (0.3, 0.6), 2), hidden[1:3])
    np.testing.assert_array_equal(hidden[0], hidden[3])
    assert (hidden[0] != hidden[1]).any()


# The loss example of the spec: N = 2, K = 1, B = 2, T = 3.
HIDDEN = np.array([[[[0, 1, 0]], [[1, 0, 1]]], [[[1, 0, 0]], [[0, 1, 0]]]], bool)
LOGP = np.array([[[[0, -1.2, 0]], [[-0.4, 0, -0.9]]], [[[-0.3, 0, 0]], [[0, -2.0, 0]]]])
OLD = np.array([[[[0, -1.3, 0]], [[-0.4, 0, -1.0]]], [[[-0.2, 0, 0]], [[0, -2.1, 0]]]])


def example(**fields):
    grid = elbo.nodes("gauss", 2)
    rows = rollouts([[1, 1, 1], [1, 1, 0]], [1.0, 0], [0, 0])
    rows = rows.with_(extras={"old_elbo": elbo.contributions(jnp.asarray(OLD), HIDDEN, grid)})
    alg = algorithms.make("gdpo", nodes=2, **fields)
    credit = alg.weigh((), rows, alg.credit((), rows, KEY))
    loss = lambda x: alg.loss((), Views(extras={"elbo": elbo.contributions(x, HIDDEN, grid)}), rows, credit)[0]  # noqa: E731
    value, grad = jax.value_and_grad(loss)(jnp.asarray(LOGP))
    return float(value), np.asarray(grad)


def test_contributions_and_bounds():
    grid = elbo.nodes("gauss", 2)
    got = elbo.contributions(jnp.asarray(LOGP), HIDDEN, grid)
    expected = [[-0.253589838, -2.839230485, -0.570577137], [-0.709807621, -1.267949192, 0]]
    np.testing.assert_allclose(got, expected, atol=5e-10)
    mask = jnp.asarray([[1, 1, 1], [1, 1, 0]], bool)
    np.testing.assert_allclose(elbo.sequence_bound(got, mask), [-3.663397460, -1.977756814], atol=5e-10)
    old = elbo.sequence_bound(elbo.contributions(jnp.asarray(OLD), HIDDEN, grid), mask)
    np.testing.assert_allclose(old, [-3.963397460, -1.804551733], atol=5e-10)


def test_loss_with_the_full_ratio():
    value, grad = example()
    np.testing.assert_allclose(value, 0.005120641, atol=5e-10)
    expected = np.zeros_like(grad)
    expected[1, 0, 0, 0], expected[1, 1, 0, 1] = 0.248718108, 0.066643816
    np.testing.assert_allclose(grad, expected, atol=5e-10)


def test_loss_with_the_length_inside():
    value, grad = example(ratio_norm="length")
    np.testing.assert_allclose(value, -0.047032352, atol=5e-10)
    expected = np.zeros_like(grad)
    expected[0, 0, 0, 1], expected[0, 1, 0, [0, 2]] = -0.217905206, -0.058387524
    expected[1, 0, 0, 0], expected[1, 1, 0, 1] = 0.271217939, 0.072672628
    np.testing.assert_allclose(grad, expected, atol=5e-10)


def test_an_empty_completion_adds_nothing_and_is_counted():
    alg = algorithms.make("gdpo")
    rows = rollouts([[1, 1], [0, 0]], [1.0, 0], [0, 0], extras={"old_elbo": np.full((2, 2), [[-1.0], [np.nan]])})
    views = Views(extras={"elbo": jnp.full((2, 2), jnp.array([[-1.0], [jnp.nan]]))})
    value, grads = value_and_grad(alg, alg.init(), rows, views)
    np.testing.assert_allclose(value, -0.5 / 2 / 2)
    np.testing.assert_allclose(grads.extras["elbo"], [[-0.125, -0.125], [0, 0]])


def test_the_kl_is_zero_at_the_reference_and_positive_elsewhere():
    alg = algorithms.make("gdpo", beta=0.5)
    assert alg.needs.rescore == ("old_elbo", "ref_elbo")
    old = np.full((2, 2), -1.0)
    rows = rollouts(np.ones((2, 2)), extras={"old_elbo": old, "ref_elbo": old})
    at = lambda x: value_and_grad(alg, (), rows, Views(extras={"elbo": jnp.full((2, 2), x)}))  # noqa: E731
    assert float(at(-1.0)[0]) == 0 and not np.asarray(at(-1.0)[1].extras["elbo"]).any()
    q = 2 * 0.25 / 2
    np.testing.assert_allclose(at(-1.25)[0], 0.5 * (np.exp(q) - q - 1), rtol=1e-12)


class TableLearner:
    """A learner whose network is a table of logits added to the toy network; steps are plain gradient descent."""

    def __init__(self, alg, config):
        self.alg = alg
        self.params = 0.1 * jax.random.normal(jax.random.key(1), (4, VOCAB))
        self.scorer = gdpo.scorer(config, lambda params, rows, ids: table(ids) + params, MASK_ID)
        self.score = jax.jit(self.scorer)
        self.ratios, self.keys = [], []

    def views(self, rows, names, policy="policy"):
        assert names == ("elbo",)
        return self.score(self.params, rows)

    def step(self, state, rows, credit):
        credit = self.alg.weigh(state, rows, credit)
        loss = lambda p: self.alg.loss(state, self.scorer(p, rows), rows, credit)  # noqa: E731
        grads, metrics = jax.grad(loss, has_aux=True)(self.params)
        self.params = self.params - 0.05 * grads
        self.ratios.append(metrics["ratio/max"].value.item())
        self.keys.append(np.asarray(rows.extras["mask_key"]))
        return state, metrics


def diffusion_rows():
    rows = rollouts([[1, 1, 1, 1], [1, 1, 1, 0]], [1.0, 0], [0, 0], extras={"mask_key": np.array([3, 4], np.int32)})
    return rows.with_(tokens=jnp.array([[2, 0, 3, 1], [1, 4, 0, 0]]))


def run(updates, **fields):
    config = gdpo.Config(updates=updates, **fields)
    alg = gdpo.build(config)
    learner, rows = TableLearner(alg, config), diffusion_rows()
    rows = rows.with_(extras={"old_elbo": learner.views(rows, ("elbo",)).extras["elbo"]})
    _, report = alg.update(learner, alg.init(), rows, alg.credit((), rows, KEY), KEY)
    return learner, report


def test_every_inner_update_has_masks_of_its_own_for_old_and_current():
    learner, report = run(3)
    assert report.updates == 3 and isinstance(report.metrics["ratio/mean"], Mean)
    assert len({tuple(k.tolist()) for k in learner.keys}) == 3
    assert learner.ratios[0] == 1 and learner.ratios[1] != 1  # old bounds are those before the first update


def test_the_ratio_is_exactly_one_while_nothing_has_moved():
    config = gdpo.Config(updates=4)
    alg = gdpo.build(config)
    learner, rows = TableLearner(alg, config), diffusion_rows()
    for u in range(4):
        fresh = gdpo.rekeyed(rows, u)
        old = learner.views(fresh, ("elbo",)).extras["elbo"]
        np.testing.assert_array_equal(old, learner.views(fresh, ("elbo",), "ref").extras["elbo"])


def test_one_forward_at_a_time_gives_the_gradient_of_all_at_once():
    one, both = run(2, samples=2), run(2, samples=2, memory="batched")
    np.testing.assert_allclose(one[0].params, both[0].params, rtol=1e-12)


def test_the_scorer_reports_the_contributions_of_its_draws():
    config = gdpo.Config(samples=2)
    rows, grid = diffusion_rows(), elbo.nodes()
    got = TableLearner(gdpo.build(config), config).views(rows, ("elbo",)).extras["elbo"]
    hidden = elbo.draw_masks(rows.extras["mask_key"], rows.mask, grid.t, 2)
    params = 0.1 * jax.random.normal(jax.random.key(1), (4, VOCAB))
    logp = np.zeros(hidden.shape)
    for n, k in itertools.product(range(3), range(2)):
        all_logp = jax.nn.log_softmax(table(jnp.where(hidden[:, n, k], MASK_ID, rows.tokens)) + params)
        logp[:, n, k] = np.take_along_axis(np.asarray(all_logp), np.asarray(rows.tokens)[..., None], -1)[..., 0]
    np.testing.assert_allclose(got, elbo.contributions(jnp.asarray(logp), hidden, grid), rtol=1e-12)


def test_the_learner_runs_its_updates_over_a_plug_in_scorer():
    with jax.enable_x64(False):
        settings = gdpo.Config(updates=2)
        alg = gdpo.build(settings)
        words = lambda params, ids: params["embed"][ids]  # noqa: E731

        def network(params, rows, ids):  # every position sees the bag of all words
            return (words(params, ids) + words(params, ids).mean(1, keepdims=True)) @ params["embed"].T

        falling = learning.config(run={"steps": 1}, optimizer={"schedule": "linear", "lr": 1e-2})
        made = Learner(falling, learning.SPEC, alg, make_mesh(None), gdpo.scorer(settings, network, MASK_ID))
        made.init(tiny.params(learning.SPEC))
        rows = learning.rollouts().with_(extras={"mask_key": np.arange(learning.ROWS, dtype=np.int32)})
        rows = rows.with_(extras={"old_elbo": made.views(rows, ("elbo",)).extras["elbo"]})
        _, report = made.update(alg.init(), rows, alg.credit((), jax.tree.map(jnp.asarray, rows), KEY), KEY)
    first, second = (metric_value(m["ratio/max"]) for m in report.per_update)
    assert [metric_value(m["lr"]) for m in report.per_update] == pytest.approx([1e-2, 5e-3]), "it falls over both"
    assert report.updates == 2 and first == pytest.approx(1, abs=1e-5) and abs(second - 1) > 1e-4


def test_rows_get_new_mask_keys_every_step():
    alg = algorithms.make("gdpo")
    state = alg.init()
    after, _ = alg.observe(state, {}, diffusion_rows(), credit_of([0, 0], diffusion_rows()), None, None)
    assert (int(state["step"]), int(after["step"])) == (0, 1)


@pytest.mark.parametrize("fields", [{"quadrature": "simpson", "nodes": 2}, {"quadrature": "euler"}, {"updates": 0}])
def test_unknown_settings_are_refused(fields):
    with pytest.raises(ValueError, match="expected"):
        algorithms.make("gdpo", **fields)
