"""HAPO, arXiv 2509.16591: known answers of its four parts, each alone, and the sampler hook between steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import credit_of, loss_and_grad, rollouts

from jaxrl_llm import algorithms
from jaxrl_llm.advantages.token_group import token_group
from jaxrl_llm.algorithms.base import Report
from jaxrl_llm.objectives import entropy as entropies

OLD = [[-1.0, -0.2, -0.8], [-0.5, -0.1, -0.9], [-1.3, -0.4, -0.7], [-0.6, -0.3, -0.2]]
LOGP = [[-0.75, -0.2, -0.78], [-0.52, -0.35, -0.9], [-1.28, -0.4, -0.45], [-1.0, -0.28, -0.2]]
MASK = [[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]]
ENTROPY = [[1.5, 0.05, 0.6], [0.3, 0.01, 0.7], [2.0, 0.2, 1.1], [0.9, 0.4, 0.1]]
REWARD = [1.0, 0, 0, 1]
SCALE = [0.09531018, 2.03045249, 0.29443536, 2.31499155]
KEY = jax.random.key(0)

pytestmark = pytest.mark.usefixtures("x64")


def example():
    return rollouts(MASK, REWARD, np.zeros(4), OLD)


def run(rows=None, **fields):
    rows = example() if rows is None else rows
    alg = algorithms.make("hapo", **fields)
    return loss_and_grad(alg, rows, LOGP, alg.credit(alg.init(), rows, KEY), entropy=ENTROPY)


def test_token_group_average_weighs_rows_by_length_and_sums_to_zero():
    expected = [[1.11803174] * 3, [-0.89442539, -0.89442539, 0], [-0.89442539] * 3, [1.11803174, 0, 0]]
    got = token_group(jnp.asarray(REWARD), jnp.asarray(MASK, bool), jnp.zeros(4, int))
    np.testing.assert_allclose(got, expected, atol=5e-9)
    np.testing.assert_allclose(got.sum(), 0, atol=1e-12)


def test_a_group_with_an_extreme_token_advantage_falls_back_to_grpo():
    mask = jnp.arange(30) < jnp.array([30, 30, 30, 1])[:, None]  # the one reward is carried by one token of 91
    rewards, group = jnp.array([0.0, 0, 0, 1]), jnp.zeros(4, int)
    plain = token_group(rewards, mask, group, cap=None)
    assert plain[3, 0] > 5
    fallback = token_group(rewards, mask, group)
    np.testing.assert_allclose(fallback[:, 0], [-0.5, -0.5, -0.5, 1.5], atol=1e-5)


def test_groups_that_agree_and_single_rows_have_no_token_advantage():
    got = token_group(jnp.array([0.3, 0.3, 1.0]), jnp.ones((3, 2), bool), jnp.array([0, 0, 1]))
    np.testing.assert_array_equal(got, 0)


def test_scale_of_the_log_entropies():
    got = entropies.log_entropy_scale(jnp.asarray(ENTROPY), jnp.asarray(MASK, bool), 0.8)
    np.testing.assert_allclose(jnp.stack(got), SCALE, atol=5e-9)


def test_token_signal_is_signed_and_zero_at_the_pivot():
    expected = [
        [0.51879514, -0.65760140, -0.12895188],
        [-0.27641494, -1, 0],
        [1, -0.36267529, 0],
        [-0.04269153, 0, 0],
    ]
    got = entropies.token_signal(jnp.asarray(ENTROPY), jnp.asarray(MASK, bool), 0.8)
    np.testing.assert_allclose(got, expected, atol=5e-9)
    unsigned = entropies.token_signal(jnp.asarray(ENTROPY), jnp.asarray(MASK, bool), 0.8, signed=False)
    np.testing.assert_allclose(unsigned, np.abs(expected), atol=5e-9)


def test_loss_and_gradient():
    value, grad = run()
    np.testing.assert_allclose(value, -0.03824255, atol=5e-9)
    expected = [
        [-0.24226152, -0.04253472, -0.11039252],
        [0.07048640, 0.07739769, 0],
        [0.10138822, 0.06333771, 0.12760722],
        [-0.08327101, 0, 0],
    ]
    np.testing.assert_allclose(grad, expected, atol=5e-9)


def test_the_released_codes_unsigned_signal():
    np.testing.assert_allclose(run(signed=False)[0], 0.00474920, atol=5e-9)


def reference_loss(redistribute, adaptive_clip):
    """The loss by hand, with the printed signal."""
    h = np.asarray(entropies.token_signal(jnp.asarray(ENTROPY), jnp.asarray(MASK, bool), 0.8))
    a = np.asarray(token_group(jnp.asarray(REWARD), jnp.asarray(MASK, bool), jnp.zeros(4, int)))
    r = np.exp(np.array(LOGP) - np.array(OLD))
    low, high = np.full_like(h, 0.2), np.full_like(h, 0.28)
    if adaptive_clip:
        low, high = np.where(h <= 0, 0.2 * (1 - h), 0.2), np.where(h > 0, 0.28 * (1 + h), 0.28)
    inside = (1 - low / 2 < r) & (r < 1 + high / 2)
    if redistribute:
        a = a * np.where((h > 0) & ~inside | (h <= 0) & inside, 1 + h, 1)
    return np.where(MASK, np.maximum(-a * r, -a * np.clip(r, 1 - low, 1 + high)), 0).sum() / np.sum(MASK)


@pytest.mark.parametrize("redistribute", [True, False])
@pytest.mark.parametrize("adaptive_clip", [True, False])
def test_each_part_can_be_switched_alone(redistribute, adaptive_clip):
    value, _ = run(redistribute=redistribute, adaptive_clip=adaptive_clip)
    np.testing.assert_allclose(value, reference_loss(redistribute, adaptive_clip), rtol=1e-12)


def test_without_the_token_baseline_the_advantage_is_grpos():
    alg = algorithms.make("hapo", token_baseline=False)
    got = alg.credit(alg.init(), example(), KEY).advantage
    np.testing.assert_allclose(got[:, 0], np.array([1, -1, -1, 1]) * 0.5 / (1 / np.sqrt(3) + 1e-6), rtol=1e-9)


def test_equal_entropies_leave_the_base_method():
    alg, rows = algorithms.make("hapo"), example()
    credit = alg.credit(alg.init(), rows, KEY)
    value, grad = loss_and_grad(alg, rows, LOGP, credit, entropy=np.full((4, 3), 0.4))
    plain = algorithms.make("hapo", redistribute=False, adaptive_clip=False)
    same, same_grad = loss_and_grad(plain, rows, LOGP, credit, entropy=ENTROPY)
    np.testing.assert_allclose(value, same, rtol=1e-12)
    np.testing.assert_allclose(grad, same_grad, rtol=1e-12)


def test_a_batch_without_trained_tokens_has_no_loss_and_keeps_the_last_statistics():
    rows = rollouts(np.zeros((4, 3)), REWARD, np.zeros(4), OLD, {"old_entropy": np.full((4, 3), np.nan)})
    value, grad = run(rows)
    assert value == 0 and not grad.any()
    alg = algorithms.make("hapo")
    before = {"scale": jnp.asarray(SCALE, jnp.float32), "seen": jnp.asarray(True)}
    after, _ = alg.observe(before, {}, rows, credit_of(np.zeros(4), rows), Report({}, {}, 1), None)
    np.testing.assert_array_equal(after["scale"], before["scale"])


LOGITS = jnp.asarray([[2.0, 0, -1], [0.1, 0, -0.1]])


def temperatures(scale, seen=True, base=1.0, **fields):
    plan = algorithms.make("hapo", **fields).plan({"scale": jnp.asarray(scale), "seen": jnp.asarray(seen)})
    return plan.hook(LOGITS, jnp.full(2, base), plan.hook_state)


def test_temperature_follows_the_entropy_of_the_token():
    np.testing.assert_allclose(temperatures(SCALE), [0.9921171383489384, 0.9999543291037156], atol=1e-8)
    paper = temperatures(SCALE, rule="paper", tau=0.1)
    np.testing.assert_allclose(paper, [0.9635024657921255, 0.9997885444178485], atol=1e-8)


def test_the_first_step_and_greedy_decoding_keep_their_temperature():
    np.testing.assert_array_equal(temperatures(SCALE, seen=False), 1)
    np.testing.assert_array_equal(temperatures(SCALE, base=0.0), 0)


def test_statistics_of_a_step_steer_the_sampling_of_the_next():
    alg = algorithms.make("hapo")
    state = alg.init()
    first = alg.plan(state)
    rows = example().with_(extras={"old_entropy": jnp.asarray(ENTROPY)})
    state, _ = alg.observe(state, {}, rows, credit_of(np.zeros(4), rows), Report({}, {}, 1), None)
    second = alg.plan(state)
    assert second.hook is first.hook  # one engine, compiled once
    assert jax.tree.map(jnp.shape, second.hook_state) == jax.tree.map(jnp.shape, first.hook_state)
    np.testing.assert_allclose(state["scale"], np.add(SCALE, [0, 1e-6, 0, 0]), rtol=1e-6)
    np.testing.assert_allclose(second.hook(LOGITS, jnp.ones(2), second.hook_state), temperatures(SCALE), atol=1e-6)


def test_without_adaptive_temperature_nothing_is_kept_or_rescored():
    alg = algorithms.make("hapo", adaptive_temperature=False)
    assert alg.plan(alg.init()).hook is None and alg.init() == () and alg.needs.rescore == ()
