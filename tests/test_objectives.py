"""Ratios, surrogates, KL estimators and aggregation weights as mathematics: exact values, gradients, expectations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.objectives import kl, ratios, surrogates, weights

pytestmark = pytest.mark.usefixtures("x64")

MASK = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 1], [0, 0, 0]], bool)


def arrays(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    old = -rng.exponential(size=MASK.shape)
    return old + rng.uniform(-3, 3, MASK.shape), old


# Ratios


def test_token_ratio_is_one_where_masked_whatever_is_there():
    logp, old = arrays()
    r = ratios.token(np.where(MASK, logp, np.nan), np.where(MASK, old, -np.inf), MASK)
    np.testing.assert_allclose(r, np.where(MASK, np.exp(logp - old), 1))


def test_sequence_ratio_is_the_geometric_mean_of_the_token_ratios():
    logp, old = arrays()
    s = ratios.sequence(logp, old, MASK)
    for row, mask in enumerate(MASK):
        r = np.exp(logp - old)[row][mask]
        np.testing.assert_allclose(s[row, 0], np.prod(r) ** (1 / max(len(r), 1)))


def test_product_ratio_is_the_product_of_the_token_ratios():
    logp, old = arrays()
    r = np.where(MASK, np.exp(logp - old), 1)
    np.testing.assert_allclose(ratios.product(logp, old, MASK)[:, 0], r.prod(-1))


def test_one_outlier_token_moves_the_sequence_ratio_by_its_share_only():
    mask = np.ones((1, 10), bool)
    logp = np.zeros((1, 10))
    logp[0, 3] = 2.0
    np.testing.assert_allclose(ratios.sequence(logp, np.zeros((1, 10)), mask), np.exp(0.2))


def test_sequence_token_ratio_has_the_sequence_value_and_its_own_derivative():
    logp, old = arrays()
    value, pull = jax.vjp(lambda x: ratios.sequence_token(x, old, MASK), logp)
    s = np.broadcast_to(ratios.sequence(logp, old, MASK), MASK.shape)
    np.testing.assert_allclose(value, s)
    weight = np.random.default_rng(1).normal(size=MASK.shape)
    np.testing.assert_allclose(pull(weight)[0], np.where(MASK, weight * s, 0))


def test_ratio_limit_clamps_the_log_ratio():
    logp, old = np.array([[30.0, -30.0, 0.5]]), np.zeros((1, 3))
    np.testing.assert_allclose(ratios.log_ratio(logp, old, np.ones((1, 3), bool), limit=20.0), [[20, -20, 0.5]])


# Surrogates


def reference_clip(r, a, low, high, dual=None, delta=None):
    free = min(r, delta) if delta else r
    loss = -min(free * a, min(max(r, 1 - low), 1 + high) * a)
    return min(loss, -dual * a) if dual and a < 0 else loss


@pytest.mark.parametrize("options", [{}, {"dual_clip": 2.0}, {"delta": 1.5}, {"dual_clip": 3.0, "delta": 4.0}])
def test_clipped_surrogate_is_the_papers_formula(options):
    logp, old = arrays()
    r = np.exp(logp - old)
    a = np.random.default_rng(2).normal(size=MASK.shape)
    loss = surrogates.clipped(r, a, MASK, 0.2, 0.28, **options).loss
    one = np.vectorize(lambda r, a: reference_clip(r, a, 0.2, 0.28, options.get("dual_clip"), options.get("delta")))
    np.testing.assert_allclose(loss, np.where(MASK, one(r, a), 0), atol=1e-15)


def test_clip_shares_are_where_the_gradient_is_gone():
    r = np.array([[0.5, 0.5, 1.0, 1.5, 1.5]])
    a = np.array([[1.0, -1.0, 1.0, 1.0, -1.0]])
    mask = np.ones((1, 5), bool)
    clipped = surrogates.clipped(r, a, mask, 0.2, 0.2)
    grad = jax.grad(lambda r: surrogates.clipped(r, a, mask, 0.2, 0.2).loss.sum())(r)
    np.testing.assert_array_equal(clipped.low, [[False, True, False, False, False]])
    np.testing.assert_array_equal(clipped.high, [[False, False, False, True, False]])
    np.testing.assert_array_equal(np.asarray(grad) == 0, clipped.low | clipped.high)


def test_on_policy_clipped_unclipped_and_reinforce_have_one_gradient():
    logp, _ = arrays()
    a = np.random.default_rng(2).normal(size=MASK.shape)
    losses = [
        lambda x: surrogates.clipped(ratios.token(x, logp, MASK), a, MASK, 0.2, 0.2).loss.sum(),
        lambda x: surrogates.unclipped(ratios.token(x, logp, MASK), a, MASK).sum(),
        lambda x: surrogates.reinforce(x, a, MASK).sum(),
    ]
    for loss in losses:
        np.testing.assert_allclose(jax.grad(loss)(logp), np.where(MASK, -a, 0), atol=1e-15)


def test_effective_advantage_is_the_gradient_of_the_variance_penalty():
    logp, old = arrays()
    a, lam = np.random.default_rng(2).normal(size=MASK.shape), 0.7

    def loss(x):
        r = ratios.token(x, old, MASK)
        return jnp.sum(surrogates.unclipped(r, a, MASK) + lam * (r - 1) ** 2)

    r = ratios.token(logp, old, MASK)
    expected = np.where(MASK, -r * surrogates.effective_advantage(r, a, lam), 0)
    np.testing.assert_allclose(jax.grad(loss)(logp), expected, atol=1e-12)


def test_value_loss_takes_the_worse_of_the_free_and_the_clipped_error():
    old, target = np.zeros((1, 3)), np.array([[1.0, 1.0, -1.0]])
    new = np.array([[0.3, 2.0, -0.8]])
    loss = surrogates.clipped_value(new, old, target, np.ones((1, 3), bool), 0.5)
    np.testing.assert_allclose(loss, [[0.5 * 0.7**2, 0.5, 0.5 * 0.5**2]])


@pytest.mark.parametrize(
    "surrogate",
    [
        lambda x, y: surrogates.clipped(x, y, MASK, 0.2, 0.2, 3.0).loss,
        lambda x, y: surrogates.unclipped(x, y, MASK),
        lambda x, y: surrogates.reinforce(x, y, MASK),
        lambda x, y: surrogates.clipped_value(x, y, y, MASK, 0.5),
        lambda x, y: kl.estimate("k3+", x, y, MASK),
    ],
)
@pytest.mark.parametrize("value", [np.nan, -np.inf, np.inf])
def test_masked_positions_neither_count_nor_get_a_gradient(surrogate, value):
    x, y = (np.where(MASK, a, value) for a in arrays())
    loss, pull = jax.vjp(lambda x: surrogate(x, y), x)
    assert np.all(np.isfinite(loss)) and np.all(np.asarray(loss)[~MASK] == 0)
    assert np.all(np.asarray(pull(jnp.ones_like(loss))[0])[~MASK] == 0)


# KL: a softmax policy over five tokens against a reference, sampled from an older policy or from itself.

LOGITS = np.array([0.3, -1.0, 0.8, 0.1, -0.4])
REF = np.log(np.array([0.1, 0.3, 0.2, 0.25, 0.15]))
OLD = LOGITS + np.array([0.5, -0.3, -0.6, 0.4, 0.2])
SAMPLES = 400_000


def log_softmax(x):
    return x - jax.nn.logsumexp(x)


def exact_gradient(reverse: bool = True) -> np.ndarray:
    """Of KL(pi || ref), or of KL(ref || pi)."""

    def divergence(logits):
        logp = log_softmax(logits)
        return jnp.sum(jnp.exp(logp) * (logp - REF)) if reverse else jnp.sum(jnp.exp(REF) * (REF - logp))

    return np.asarray(jax.grad(divergence)(LOGITS))


def monte_carlo_gradient(kind: kl.Kind, behaviour: np.ndarray, corrected: bool) -> tuple[np.ndarray, np.ndarray]:
    """Mean gradient of the estimator over sampled tokens, and its standard error."""
    p = np.exp(np.asarray(log_softmax(behaviour)))
    counts = np.bincount(np.random.default_rng(0).choice(5, SAMPLES, p=p), minlength=5)

    def of_token(logits, token):
        logp = log_softmax(logits)[token][None, None]
        mask = jnp.ones((1, 1), bool)
        ratio = ratios.token(logp, jnp.log(p)[token][None, None], mask) if corrected else None
        return kl.estimate(kind, logp, jnp.asarray(REF)[token][None, None], mask, ratio)[0, 0]

    each = np.asarray(jax.vmap(jax.grad(of_token), (None, 0))(LOGITS, jnp.arange(5)))
    share = counts / SAMPLES
    mean = share @ each
    return mean, np.sqrt(share @ (each - mean) ** 2 / SAMPLES)


def agrees(kind: kl.Kind, behaviour: np.ndarray, corrected: bool, exact: np.ndarray) -> bool:
    mean, error = monte_carlo_gradient(kind, behaviour, corrected)
    return bool(np.all(np.abs(mean - exact) < 5 * error + 1e-12))


@pytest.mark.parametrize("kind", ["k2", "k1+", "k3+"])
def test_on_policy_gradient_of_k2_and_the_straight_through_forms_is_unbiased(kind):
    assert agrees(kind, LOGITS, False, exact_gradient())


def test_on_policy_gradient_of_k1_is_zero_on_average():
    assert agrees("k1", LOGITS, False, np.zeros(5))
    assert not agrees("k1", LOGITS, False, exact_gradient())


def test_on_policy_gradient_of_k3_is_that_of_the_other_kl():
    assert agrees("k3", LOGITS, False, exact_gradient(reverse=False))
    assert not agrees("k3", LOGITS, False, exact_gradient())


@pytest.mark.parametrize("kind", kl.KINDS)
def test_off_policy_gradients_are_biased_unless_corrected_by_the_ratio(kind):
    assert not agrees(kind, OLD, False, exact_gradient())
    assert agrees(kind, OLD, True, exact_gradient())


@pytest.mark.parametrize("kind", kl.KINDS)
def test_kl_values_are_unbiased_except_k2(kind):
    p, logp = np.exp(log_softmax(LOGITS)), log_softmax(LOGITS)[:, None]
    values = kl.estimate(kind, logp, REF[:, None], np.ones((5, 1), bool))[:, 0]
    exact = np.sum(p * (logp[:, 0] - REF))
    assert np.isclose(p @ values, exact) == (kind != "k2")


def test_k3_is_never_negative():
    logp, ref = arrays()
    assert np.all(np.asarray(kl.estimate("k3", logp, ref, MASK)) >= 0)


# Aggregation


def test_weights_of_means_sum_to_one():
    for name in ("token-mean", "seq-mean-token-mean"):
        np.testing.assert_allclose(weights.aggregation(name, MASK).sum(), 1)


def test_aggregations_are_the_papers_means():
    x = np.random.default_rng(3).normal(size=MASK.shape)
    rows = [x[i][m] for i, m in enumerate(MASK) if m.any()]
    expected = {
        "token-mean": np.mean(np.concatenate(rows)),
        "seq-mean-token-mean": np.mean([r.mean() for r in rows]),
        "seq-mean-token-sum": np.mean([r.sum() for r in rows]),
        "seq-mean-token-sum-norm": np.mean([r.sum() / 3 for r in rows]),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(weights.weighted_sum(x, weights.aggregation(name, MASK)), value)


def test_an_empty_row_counts_only_when_asked_to():
    x = np.ones(MASK.shape)
    for name in ("seq-mean-token-mean", "seq-mean-token-sum"):
        excluded = weights.weighted_sum(x, weights.aggregation(name, MASK))
        included = weights.weighted_sum(x, weights.aggregation(name, MASK, count_empty=True))
        np.testing.assert_allclose(included, excluded * 3 / 4)
        padding = weights.aggregation(name, MASK, count_empty=True, rows=np.array([1, 1, 1, 0], bool))
        np.testing.assert_allclose(weights.weighted_sum(x, padding), excluded)


def test_an_all_masked_batch_weighs_nothing():
    for name in weights.AGGREGATIONS:
        assert not np.any(weights.aggregation(name, np.zeros_like(MASK)))


def test_an_unknown_aggregation_or_estimator_lists_the_known_ones():
    with pytest.raises(ValueError, match="expected one of token-mean"):
        weights.aggregation("mean", MASK)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected one of k1"):
        kl.estimate("k4", *arrays(), MASK)  # type: ignore[arg-type]
