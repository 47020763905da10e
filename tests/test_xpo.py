"""XPO, arXiv 2405.21046: known answers, pairs of the policy against the reference, and what the optimistic term does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scripted
from arrays import loss_and_grad, rollouts

from jaxrl_llm import algorithms
from jaxrl_llm.types import CURRENT, REFERENCE

LOGP = [[-0.8, -0.7, -1.0], [-0.9, -1.0, -0.6], [-1.2, -0.5, -0.9], [-0.5, -1.0, -1.4]]
REF = [[-1.0, -0.5, -2.0], [-0.7, -1.1, -0.3], [-2.0, -0.4, -0.9], [-0.6, -0.8, -1.5]]
MASK = [[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1]]
KEY = jax.random.key(0)

pytestmark = pytest.mark.usefixtures("x64")


def example(reward=(0.3, 0.9, 0.5, 0.5), mask=MASK):
    rows = rollouts(mask, reward, [0, 0, 1, 1], extras={"ref_logp": np.asarray(REF)})
    return rows.with_(source=jnp.array([CURRENT, REFERENCE] * 2), tokens=jnp.arange(12).reshape(4, 3))


def select(rows=None, **fields):
    alg, rows = algorithms.make("xpo", **fields), example() if rows is None else rows
    chosen = alg.select(alg.init(), {}, rows, alg.credit(alg.init(), rows, KEY), KEY)
    return alg, chosen.rows, chosen.credit


def run(rows=None, **fields):
    """Loss and gradient, rows in the order they were sampled."""
    alg, pairs, credit = select(rows, **{"alpha": (0.05,), "clip": None, **fields})
    at = np.asarray(pairs.row_id)
    value, grad = loss_and_grad(alg, pairs, np.asarray(LOGP)[at], credit)
    return value, grad[np.argsort(at)]


def test_pairs_of_the_example():
    _, rows, credit = select()
    assert rows.row_id.tolist() == [1, 0, 2, 3]  # chosen 1 and 2: a tie goes to the policy
    assert credit.extras["role"].tolist() == [1, -1, 1, -1]
    assert rows.block.tolist() == [0, 0, 1, 1]


def test_a_tie_has_no_loss_when_dropped():
    alg, rows, credit = select(drop_ties=True, alpha=(0.05,), clip=None)
    assert rows.row_id.tolist()[:2] == [1, 0]
    assert credit.extras["role"].tolist() == [1, -1, 0, 0]
    value, grad = loss_and_grad(alg, rows, np.asarray(LOGP)[[1, 0, 2, 3]], credit)
    of_first_pair = np.log1p(np.exp(0.1 * 1.1)) + 0.05 * -1.9
    np.testing.assert_allclose(value, of_first_pair, rtol=1e-12)
    assert grad[0, :2].all() and grad[1].all() and not grad[2:].any()


def test_losses():
    np.testing.assert_allclose(run()[0], 0.58420924, atol=5e-9)
    np.testing.assert_allclose(run(alpha=(0.0,))[0], 0.70420924, atol=5e-9)
    np.testing.assert_allclose(run(clip=500.0)[0], 0.70170924, atol=5e-9)


def test_gradient():
    a, b, c, d = 0.02637362, -0.00137362, -0.02412536, 0.04912536
    expected = [[a] * 3, [b, b, 0], [c] * 3, [d] * 3]
    np.testing.assert_allclose(run()[1], expected, atol=5e-9)
    np.testing.assert_allclose(run(clip=500.0)[1], expected, atol=5e-9)  # inside the clip it is the same


def test_beyond_the_clip_the_optimistic_term_has_no_gradient():
    limited, plain = run(clip=0.05)[1], run(alpha=(0.0,))[1]  # log-ratios of the reference's rows: -0.1 and 0
    np.testing.assert_allclose(limited[1], plain[1], atol=1e-12)
    np.testing.assert_allclose(limited[3], plain[3] + 0.05 / 2, atol=1e-12)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_without_the_optimistic_term_it_is_dpo(loss):
    value, grad = run(alpha=(0.0,), loss=loss)
    dpo = algorithms.make("dpo", loss=loss, length_norm=False)
    rows = example((0.3, 0.9, 0.5, 0.4))  # dpo's own rule for ties is another
    chosen = dpo.select((), {}, rows, dpo.credit((), rows, KEY), KEY)
    at = np.asarray(chosen.rows.row_id)
    same, same_grad = loss_and_grad(dpo, chosen.rows, np.asarray(LOGP)[at], chosen.credit)
    np.testing.assert_allclose(value, same, rtol=1e-12)
    np.testing.assert_allclose(grad, same_grad[np.argsort(at)], rtol=1e-12)


def test_an_empty_reference_row_has_no_bonus():
    rows = example(mask=[MASK[0], [0, 0, 0], MASK[2], [0, 0, 0]])
    assert run(rows)[0] == run(rows, alpha=(0.0,))[0]


def test_identical_completions_are_dropped_from_the_loss_but_not_from_the_mean():
    rows = example()
    rows = rows.with_(tokens=rows.tokens.at[3].set(rows.tokens[2]))
    delta, bonus = -0.1 - 1.0, 0.05 * -1.9  # of the first pair
    value, grad = run(rows, drop_identical=True)
    np.testing.assert_allclose(value, (np.log1p(np.exp(-0.1 * delta)) + bonus) / 2, rtol=1e-12)
    assert not grad[2:].any()
    np.testing.assert_allclose(run(rows)[0], 0.58420924, atol=5e-9)
    shorter = rows.with_(length=rows.length.at[3].set(2))
    np.testing.assert_allclose(run(shorter, drop_identical=True)[0], 0.58420924, atol=5e-9)


def test_the_iteration_picks_alpha_and_the_last_one_is_held():
    alg, rows, credit = select(iteration_steps=2, clip=None)
    state, alphas = alg.init(), []
    plain = run(alpha=(0.0,))[0]
    for _ in range(8):
        value = loss_and_grad(alg, rows, np.asarray(LOGP)[np.asarray(rows.row_id)], credit, state)[0]
        alphas.append((value - plain) / ((-1.9 - 2.9) / 2))
        state, _ = alg.observe(state, {}, rows, credit, None, None)
    np.testing.assert_allclose(alphas[::2], [1e-5, 5e-6, 0, 0], atol=1e-12)
    np.testing.assert_allclose(alphas[1::2], alphas[::2], atol=1e-12)


def test_policy_and_reference_are_asked_for_one_completion_each():
    plan = algorithms.make("xpo").plan(algorithms.make("xpo").init())
    prompts = [scripted.prompt(i, [i]) for i in range(3)]
    asked = []

    def answer(context, i):
        asked.append(context[0])
        return scripted.completion([len(asked)])

    rows, requests = scripted.collect(plan, prompts, answer, lambda tokens: 0.0)
    assert [(r.policy, list(r.n)) for r in requests] == [("policy", [1] * 3), ("ref", [1] * 3)]
    assert [(r.group, r.source, r.tokens[0]) for r in rows] == [
        (g, source, 1 + g + 3 * source) for g in range(3) for source in (CURRENT, REFERENCE)
    ]
    assert (CURRENT, REFERENCE) == (0, 1)


def test_what_the_reference_says_becomes_less_likely_whoever_wins():
    """A bandit of six arms: mass moves off what the reference says, faster with a larger alpha."""
    ref = np.log(np.array([0.5, 0.3, 0.1, 0.06, 0.03, 0.01]))
    rng = np.random.default_rng(0)
    drawn, mine = rng.choice(6, 64, p=np.exp(ref)), rng.integers(0, 6, 64)

    def kept(alpha):
        alg = algorithms.make("xpo", alpha=(alpha,), clip=None)
        arm = np.stack([mine, drawn], 1).ravel()
        rows = rollouts(
            np.ones((128, 1)), np.zeros(128), np.repeat(np.arange(64), 2), extras={"ref_logp": ref[arm, None]}
        )
        rows = rows.with_(source=jnp.tile(jnp.array([CURRENT, REFERENCE]), 64))
        chosen = alg.select(alg.init(), {}, rows, alg.credit(alg.init(), rows, KEY), KEY)
        arm, logits = arm[np.asarray(chosen.rows.row_id)], jnp.asarray(ref)
        for _ in range(20):
            logp, back = jax.vjp(lambda x: jax.nn.log_softmax(x)[arm, None], logits)
            logits -= 0.5 * back(jnp.asarray(loss_and_grad(alg, chosen.rows, logp, chosen.credit)[1]))[0]
        return float(jax.nn.log_softmax(logits)[drawn].mean())

    none, some, more = kept(0.0), kept(0.1), kept(0.3)
    assert more < some < none


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"alpha": ()}, r"algorithm.alpha=\(\): expected numbers of at least 0"),
        ({"alpha": (-1.0,)}, r"algorithm.alpha=\(-1.0,\): expected numbers of at least 0"),
        ({"iteration_steps": 0}, "algorithm.iteration_steps=0: expected at least 1"),
        ({"clip": 0.0}, "algorithm.clip=0.0: expected more than 0, or null"),
    ],
)
def test_settings_without_a_meaning_are_refused(fields, line):
    with pytest.raises(ValueError, match=line):
        algorithms.make("xpo", **fields)
