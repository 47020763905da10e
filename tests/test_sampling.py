"""Choosing tokens and finding stop strings, against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.rollout import sampling as functions
from jaxrl_llm.rollout.sampling import Sampling, item_keys
from jaxrl_llm.rollout.stops import stop_table

choose = jax.jit(functions.choose, static_argnames=("score_temperature", "truncated"))
truncate, uniforms = jax.jit(functions.truncate), jax.jit(functions.uniforms)


def sampling(rows: int, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> Sampling:
    def full(x, dtype):
        return jnp.broadcast_to(jnp.asarray(x, dtype), (rows,))

    return Sampling(
        full(temperature, jnp.float32), full(top_k, jnp.int32), full(top_p, jnp.float32), full(min_p, jnp.float32)
    )


def sorted_truncation(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Probabilities of one row by sorting, as the papers write them."""
    x = logits.astype(np.float64) / temperature
    order = np.argsort(-x, kind="stable")
    p = np.exp(x - x.max())
    if top_k:
        p[order[top_k:]] = 0
    p /= p.sum()
    if top_p < 1:
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= top_p]] = 0
    p[p < min_p * p.max()] = 0
    return p / p.sum()


@pytest.mark.parametrize("vocab", [7, 300])
@pytest.mark.parametrize(
    "rule",
    [(0, 1.0, 0.0), (1, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.6, 0.0), (0, 1.0, 0.2), (6, 0.8, 0.05), (999, 0.01, 0.9)],
)
def test_truncation_keeps_what_sorting_keeps(vocab, rule):
    logits = np.random.default_rng(vocab).normal(size=(4, vocab)).astype(np.float32) * 3
    temperature = np.array([0.5, 0.8, 1.0, 1.7], np.float32)
    arrays = sampling(4, temperature, *rule)
    got = jax.nn.softmax(truncate(jnp.asarray(logits), *arrays), -1)
    want = [sorted_truncation(row, t, *rule) for row, t in zip(logits, temperature)]
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_equal_logits_are_kept_or_dropped_together():
    logits = jnp.array([[2.0, 1.0, 1.0, 1.0, 0.0]])
    assert np.isfinite(truncate(logits, *sampling(1, top_k=2))).tolist() == [[True, True, True, True, False]]
    assert np.isfinite(truncate(logits, *sampling(1, top_p=0.6))).tolist() == [[True, True, True, True, False]]


def test_truncation_works_in_float64_and_with_minus_infinity(x64):
    logits = jnp.array([[1.0, -jnp.inf, 0.5, 0.2]], jnp.float64)
    kept = truncate(logits, *sampling(1, top_k=3, top_p=0.99))
    assert kept.dtype == jnp.float64 and np.isfinite(kept).tolist() == [[True, False, True, True]]


@pytest.mark.parametrize("vocab", [5, 256, 257, 1000])
def test_inverse_cdf_takes_the_interval_that_holds_the_number(vocab):
    rows = 64
    logits = np.random.default_rng(0).normal(size=(rows, vocab)).astype(np.float32) * 2
    u = np.linspace(0, 1, rows, endpoint=False, dtype=np.float32)
    choice = choose(jnp.asarray(logits), jnp.asarray(u), sampling(rows), score_temperature=1.0, truncated=False)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    edges = np.cumsum(p, -1)
    want = (edges <= u[:, None]).sum(-1)
    sure = np.abs(edges - u[:, None]).min(-1) > 1e-5
    assert sure.mean() > 0.8
    np.testing.assert_array_equal(np.asarray(choice.token)[sure], want[sure])
    logp = np.log(p[np.arange(rows), choice.token])
    np.testing.assert_allclose(choice.sampler_logp, logp, atol=1e-5)
    np.testing.assert_allclose(choice.policy_logp, logp, atol=1e-5)


@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-24])
def test_extreme_numbers_never_choose_a_token_without_mass(u):
    logits = np.full((1, 700), -np.inf, np.float32)
    logits[0, [130, 300, 301]] = [0.0, 1.0, -1.0]
    choice = choose(jnp.asarray(logits), jnp.array([u]), sampling(1), score_temperature=1.0, truncated=False)
    assert int(choice.token[0]) == (130 if u == 0 else 301)
    assert np.isfinite(choice.sampler_logp[0])


@pytest.mark.parametrize(
    "rule", [dict(), dict(top_k=4), dict(top_p=0.7), dict(min_p=0.3), dict(temperature=0.5, top_k=40)]
)
def test_frequencies_match_the_truncated_distribution(rule):
    vocab, draws = 270, 20000
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(1, vocab)), jnp.float32) * 3
    keys = item_keys(0, 0, jnp.arange(draws))
    u = uniforms(keys, jnp.zeros(draws, jnp.int32))
    every = jnp.broadcast_to(logits, (draws, vocab))
    choice = choose(every, u, sampling(draws, **rule), score_temperature=1.0, truncated=bool(rule))
    p = np.asarray(jax.nn.softmax(truncate(logits, *sampling(1, **rule)), -1)[0], np.float64)
    counts = np.bincount(np.asarray(choice.token), minlength=vocab)
    assert counts[p == 0].sum() == 0
    expected = p * draws
    common = expected >= 5
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(expected[common], expected[~common].sum() + 1e-9)
    chi2 = ((observed - expected) ** 2 / np.maximum(expected, 1)).sum()
    freedom = common.sum()
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom) + 4
    np.testing.assert_allclose(choice.sampler_logp, np.log(p[choice.token]), atol=1e-5)


def test_temperature_zero_takes_the_first_of_the_most_likely():
    logits = jnp.array([[0.0, 3.0, 3.0], [5.0, 1.0, 4.5], [0.0, 1.0, 2.0]])
    mixed = sampling(3, jnp.array([0.0, 0.0, 1.0]))
    choice = choose(logits, jnp.array([0.9, 0.9, 0.0]), mixed, score_temperature=2.0, truncated=False)
    assert choice.token.tolist() == [1, 0, 0]
    assert choice.sampler_logp[:2].tolist() == [0.0, 0.0]
    np.testing.assert_allclose(choice.margin[:2], [0.0, 0.5])
    want = jax.nn.log_softmax(logits / 2.0, -1)[jnp.arange(3), choice.token]
    np.testing.assert_allclose(choice.policy_logp, want, atol=1e-6)


def test_margin_is_the_distance_to_another_choice():
    logits = jnp.log(jnp.array([[0.2, 0.5, 0.3]]))
    choice = choose(logits, jnp.array([0.25]), sampling(1), score_temperature=1.0, truncated=False)
    assert int(choice.token[0]) == 1
    np.testing.assert_allclose(choice.margin, [0.05], atol=1e-6)
    # The kept set nearly loses its last token: a change of 1e-3 in mass would renormalise everything.
    near = choose(logits, jnp.array([0.3]), sampling(1, top_p=0.501), score_temperature=1.0, truncated=True)
    np.testing.assert_allclose(near.margin, [0.001], atol=1e-6)


def test_random_numbers_depend_on_seed_step_item_and_position_only():
    def numbers(seed, step, items, position):
        items = jnp.asarray(items)
        return np.asarray(uniforms(item_keys(seed, step, items), jnp.full(items.shape, position)))

    base = numbers(1, 2, [3, 4, 5], 6)
    np.testing.assert_array_equal(numbers(1, 2, [5, 3], 6), base[[2, 0]])
    for other in (numbers(0, 2, [3, 4, 5], 6), numbers(1, 0, [3, 4, 5], 6), numbers(1, 2, [3, 4, 5], 7)):
        assert (other != base).all()


PIECES = [b"a", b"b", b"ab", b"\n", b"ba\nc", b"\n\n", b"c", b"", b"aab"]


@pytest.mark.parametrize("strings", [["\n\n"], ["ab"], ["aab", "b\n"], ["abab", "c"], ["é"]])
def test_automaton_finds_what_searching_the_text_finds(strings):
    pieces = [*PIECES, *(bytes([b]) for b in "é".encode())]
    table = stop_table(strings, pieces)
    assert table.shape[1] == len(pieces)
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(200):
        state, text = 0, b""
        for token in rng.integers(0, len(pieces), 12):
            state, text = table[state, token], text + pieces[token]
            assert (state == len(table) - 1) == any(s.encode() in text for s in strings)
        found += state == len(table) - 1
    assert found > 0


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="non-empty"):
        stop_table(["x", ""], PIECES)
