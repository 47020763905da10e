"""DPO, arXiv 2305.18290, and its relatives: known answers, online pairs as blocks, and what they do to the interface."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import loss_and_grad, rollouts

from jaxrl_llm import algorithms
from jaxrl_llm.objectives import preference
from jaxrl_llm.types import Views

LOGP = [[-0.8, -0.7, -1.0], [-0.9, -1.0, -0.6], [-1.2, -0.5, -0.9], [-0.5, -1.0, -1.4]]
REF = [[-1.0, -0.5, -2.0], [-0.7, -1.1, -0.3], [-2.0, -0.4, -0.9], [-0.6, -0.8, -1.5]]
MASK = [[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]]
KEY = jax.random.key(0)

pytestmark = pytest.mark.usefixtures("x64")


def example(reward=(1.0, 0.2, 0.5, 0.5)):
    return rollouts(MASK, reward, [0, 0, 1, 1], extras={"ref_logp": np.asarray(REF)})


def select(alg, rows):
    chosen = alg.select(alg.init(), {}, rows, alg.credit(alg.init(), rows, KEY), KEY)
    return chosen.rows, chosen.credit


def run(rows=None, logp=LOGP, **fields):
    """Loss and gradient through the pairs; rows repeated by `select` add up in the original row."""
    alg, rows = algorithms.make("dpo", **fields), example() if rows is None else rows
    pairs, credit = select(alg, rows)
    at = np.asarray(pairs.row_id)
    value, grad = loss_and_grad(alg, pairs, np.asarray(logp, float)[at], credit)
    total = np.zeros(np.shape(logp))
    np.add.at(total, at, grad)
    return value, total


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"loss": "sigmoid"}, 0.65162802),
        ({"loss": "hinge"}, 0.915),
        ({"loss": "ipo"}, 22.49902778),
        ({"loss": "ipo", "length_norm": False}, 17.285),
        ({"loss": "sigmoid", "label_smoothing": 0.1}, 0.66012802),
        ({"loss": "robust", "label_smoothing": 0.1}, 0.64100302),
    ],
)
def test_losses(fields, expected):
    np.testing.assert_allclose(run(**fields)[0], expected, atol=5e-9)


def test_gradients():
    c, d = 0.02362638, 0.02425022
    np.testing.assert_allclose(run()[1], [[-c, -c, -c], [c, c, 0], [-d, -d, -d], [d, 0, 0]], atol=5e-9)
    a, b, e, f = 1.53888889, 2.30833333, 1.62222222, 4.86666667
    expected = [[-a, -a, -a], [b, b, 0], [-e, -e, -e], [f, 0, 0]]
    np.testing.assert_allclose(run(loss="ipo")[1], expected, atol=5e-9)


@pytest.mark.parametrize(("loss", "expected"), [("sigmoid", np.log(2)), ("hinge", 1.0), ("ipo", 25.0)])
def test_loss_where_policy_and_reference_agree(loss, expected):
    np.testing.assert_allclose(run(logp=REF, loss=loss)[0], expected, rtol=1e-12)


def test_the_epoch_picks_beta_and_the_last_one_is_held():
    fields = {"beta": (0.1, 0.5), "epoch_steps": 2}
    alg = algorithms.make("dpo", **fields)
    rows, credit = select(alg, example())
    state, losses = alg.init(), []
    for _ in range(5):
        losses.append(loss_and_grad(alg, rows, np.array(LOGP)[np.asarray(rows.row_id)], credit, state)[0])
        state, _ = alg.observe(state, {}, rows, credit, None, None)
    first, second = run(beta=0.1)[0], run(beta=0.5)[0]
    np.testing.assert_allclose(losses, [first, first, second, second, second], rtol=1e-12)


@pytest.mark.parametrize(
    ("fields", "start"),
    [
        ({"beta": (0.1, 0.5)}, "algorithm.epoch_steps=None: expected at least 1"),
        ({"epoch_steps": 5}, "algorithm.epoch_steps=5: expected null"),
        ({"beta": (), "epoch_steps": 5}, r"algorithm.beta=\(\): expected more than 0"),
        ({"beta": (0.1, 0.0), "epoch_steps": 5}, r"algorithm.beta=\(0.1, 0.0\): expected more than 0"),
    ],
)
def test_a_beta_of_each_epoch_needs_to_know_how_long_one_is(fields, start):
    with pytest.raises(ValueError, match=start):
        algorithms.make("dpo", **fields)


def test_slic_is_the_hinge_without_a_reference():
    alg = algorithms.make("dpo", loss="hinge", reference_free=True)
    assert alg.needs.rescore == ()
    value, _ = run(rollouts(MASK, [1.0, 0.2, 0.5, 0.5], [0, 0, 1, 1]), loss="hinge", reference_free=True)
    margins = 0.1 * np.array([-2.5 + 1.9, -2.6 + 0.5])
    np.testing.assert_allclose(value, np.mean(1 - margins), rtol=1e-12)


def test_pairs_of_the_example():
    chosen, rejected = preference.reward_pairs([1.0, 0.2, 0.5, 0.5], [0, 0, 1, 1], [True] * 4)
    assert chosen.tolist() == [0, 2] and rejected.tolist() == [1, 3]
    chosen, _ = preference.reward_pairs([1.0, 0.2, 0.5, 0.5], [0, 0, 1, 1], [True] * 4, drop_ties=True)
    assert chosen.tolist() == [0]


def test_best_against_worst_breaks_ties_by_the_lowest_index():
    chosen, rejected = preference.reward_pairs([0, 1, 1, 0], [7] * 4, [True] * 4)
    assert (chosen.tolist(), rejected.tolist()) == ([1], [0])
    chosen, rejected = preference.reward_pairs([2, 2, 2], [7] * 3, [True] * 3)
    assert (chosen.tolist(), rejected.tolist()) == ([0], [1])


def test_all_pairs_are_those_with_different_rewards():
    chosen, rejected = preference.reward_pairs([2, 0, 1, 1], [3] * 4, [True] * 4, "all")
    assert list(zip(chosen.tolist(), rejected.tolist())) == [(0, 1), (0, 2), (0, 3), (2, 1), (3, 1)]


def test_unscored_and_padding_rows_are_in_no_pair():
    chosen, rejected = preference.reward_pairs([np.nan, 1, 0, 5], [0, 0, 0, 1], [False, True, True, True])
    assert (chosen.tolist(), rejected.tolist()) == ([1], [2])


def test_select_puts_the_two_rows_of_a_pair_in_one_block():
    rows, credit = select(algorithms.make("dpo"), example())
    assert rows.row_id.tolist() == [0, 1, 2, 3]
    assert rows.block.tolist() == [0, 0, 1, 1]
    assert credit.extras["role"].tolist() == [1, -1, 1, -1]


def test_a_row_in_several_pairs_is_repeated_and_its_gradients_add_up():
    rows = rollouts(np.ones((3, 1)), [2.0, 1, 0], np.zeros(3), extras={"ref_logp": np.zeros((3, 1))})
    pairs, _ = select(algorithms.make("dpo", pairing="all"), rows)
    assert pairs.row_id.tolist() == [0, 1, 0, 2, 1, 2]
    _, grad = run(rows, [[0.0], [0.0], [0.0]], pairing="all")
    np.testing.assert_allclose(grad[:, 0], np.array([-2, 0, 2]) * 0.1 * 0.5 / 3, atol=1e-12)


@pytest.mark.parametrize("pairing", ["best_worst", "all"])
def test_the_batch_has_one_size_whatever_the_rewards(pairing):
    alg = algorithms.make("dpo", pairing=pairing, drop_ties=True)
    sizes = {select(alg, example(reward))[0].tokens.shape for reward in ([1, 0, 1, 0], [1, 0, 1, 1], [1, 1, 1, 1.0])}
    assert sizes == {(4, 3)}


def test_no_pairs_give_no_loss_and_no_gradient():
    value, grad = run(example([1.0, 1, 0, 0]), pairing="all")
    assert value == 0 and not grad.any()


def test_a_pair_with_an_empty_row_still_counts():
    rows = example()
    rows = rows.with_(mask=rows.mask.at[3].set(False))
    value, grad = run(rows)
    np.testing.assert_allclose(value, -np.mean(np.log(1 / (1 + np.exp(-0.1 * np.array([1.1, 0.7]))))), rtol=1e-9)
    assert not grad[3].any() and grad[2].all()


def test_masked_tokens_and_padding_rows_may_hold_nan():
    dirty = jnp.where(jnp.asarray(MASK, bool), 0, jnp.nan)
    rows = example().with_(extras={"ref_logp": jnp.asarray(REF) + dirty})
    value, grad = run(rows, jnp.asarray(LOGP) + dirty)
    same, same_grad = run()
    assert value == same
    np.testing.assert_array_equal(grad, same_grad)


def test_a_missing_end_is_punished_before_pairing():
    rows = example([0.4, 0.2, 0.5, 0.0]).with_(truncated=jnp.array([True, False, False, False]))
    pairs, _ = select(algorithms.make("dpo", missing_eos_penalty=1.0), rows)
    assert pairs.row_id.tolist() == [1, 0, 2, 3]


def test_minibatches_of_whole_blocks_add_up_to_the_batch():
    alg = algorithms.make("dpo")
    rows, credit = select(alg, example())
    whole, _ = loss_and_grad(alg, rows, LOGP, credit)
    credit = alg.weigh((), rows, credit)
    halves = []
    for part in (slice(0, 2), slice(2, 4)):
        take = lambda x, part=part: x[part]  # noqa: E731
        some, some_credit = jax.tree.map(take, (rows, credit))
        halves.append(alg.loss((), Views(logp=jnp.asarray(LOGP)[part]), some, some_credit)[0])
    np.testing.assert_allclose(sum(halves), whole, rtol=1e-12)


@pytest.mark.parametrize("fields", [{"beta": 0.0}, {"label_smoothing": 0.5}, {"loss": "ipo", "label_smoothing": 0.1}])
def test_settings_without_a_meaning_are_refused(fields):
    with pytest.raises(ValueError, match="expected"):
        algorithms.make("dpo", **fields)
