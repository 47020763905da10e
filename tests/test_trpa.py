"""TRPA, arXiv 2504.04524: known answers, its edge cases, and the levels of Knights and Knaves."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import rollouts

from jaxrl_llm import algorithms, config_load
from jaxrl_llm.algorithms import trpa
from jaxrl_llm.algorithms.base import value_and_grad
from jaxrl_llm.tasks import knights
from jaxrl_llm.types import Views

LOGP = [[-0.8, -0.7, -1.0], [-0.9, -1.0, -0.6], [-1.2, -0.5, -0.9], [-0.5, -1.0, -1.4]]
OLD = [[-0.9, -0.6, -1.5], [-0.8, -1.0, -0.5], [-1.5, -0.4, -0.9], [-0.6, -0.9, -1.4]]
REF = [[-1.0, -0.5, -2.0], [-0.7, -1.1, -0.3], [-2.0, -0.4, -0.9], [-0.6, -0.8, -1.5]]
MASK = [[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]]
REWARD = {1: 1.0, 2: 0.7, 3: 0.2, 4: -1.0}
KEY = jax.random.key(0)

pytestmark = pytest.mark.usefixtures("x64")


def example(level=(1, 2, 4, 2), group=(0, 0, 0, 1), mask=MASK):
    return rollouts(mask, [REWARD[k] for k in level], group, OLD, extras={"ref_logp": np.asarray(REF)})


def run(rows=None, logp=LOGP, **fields):
    """Loss and gradient as the learner sees them: selected and weighed."""
    alg, rows = algorithms.make("trpa", **fields), example() if rows is None else rows
    chosen = alg.select((), {}, rows, alg.credit((), rows, KEY), KEY)
    value, grads = value_and_grad(alg, (), chosen.rows, Views(jnp.asarray(logp)), credit=chosen.credit)
    return float(value), np.asarray(grads.logp)


def test_preference_loss():
    np.testing.assert_allclose(run(tr_coef=0.0)[0], 0.67817252, atol=5e-9)
    assert run(tr_coef=0.0, beta_mode="response", seq_agg="sum")[0] == pytest.approx(0.63757073, abs=5e-9)


def test_loss_and_gradient():
    value, grad = run()
    np.testing.assert_allclose(value, 0.67819170, atol=5e-9)
    np.testing.assert_allclose((value - run(tr_coef=0.0)[0]) / 0.001, 0.01917072, atol=5e-9)
    expected = [
        [-0.0269286, -0.02695086, -0.02689546],
        [0.01137277, 0.01138445, 0],
        [0.01937834, 0.01933786, 0.01934954],
        [1.057e-05, 0, 0],
    ]
    np.testing.assert_allclose(grad, expected, atol=5e-9)
    np.testing.assert_allclose(run(sqrt_kl=True)[0], 0.67869134, atol=5e-9)


def test_without_a_pair_right_completions_become_likelier_and_others_less():
    rows = example(level=(1, 1, 3, 3), group=(0, 0, 1, 1))
    value, grad = run(rows, tr_coef=0.0)
    np.testing.assert_allclose(value, 0.70494148, atol=5e-9)
    trained = np.asarray(MASK, bool)
    assert (grad[:2][trained[:2]] < 0).all() and (grad[2:][trained[2:]] > 0).all()
    assert run(rows, tr_coef=0.0, beta=0.7, anisotropy=1.0)[0] == value


def test_the_trust_region_is_still_at_the_policy_that_sampled():
    value, grad = run(logp=OLD)
    same, same_grad = run(logp=OLD, tr_coef=0.0)
    assert value == same
    np.testing.assert_array_equal(grad, same_grad)


def test_far_from_the_old_policy_the_trust_region_is_clamped():
    far = np.array(OLD) - np.array([[3.0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]])
    step = (run(logp=far, tr_coef=9.0)[0] - run(logp=far, tr_coef=0.0)[0]) / 9.0
    np.testing.assert_allclose(step, 10 / 9, rtol=1e-9)  # e^3 - 3 - 1 = 16.1, over nine tokens
    np.testing.assert_allclose(run(logp=far, tr_coef=9.0)[1], run(logp=far, tr_coef=0.0)[1], atol=1e-12)


def test_a_row_without_tokens_is_in_no_pair():
    mask = [MASK[0], [0, 0, 0], MASK[2], MASK[3]]
    value, grad = run(example(mask=mask), tr_coef=0.0)
    margin = 2.5 * 0.1 * (1 / 3 - 0.7 / 3)
    np.testing.assert_allclose(value, np.log1p(np.exp(-margin)), rtol=1e-9)
    assert not grad[1].any()


def test_only_the_order_of_rewards_matters():
    rows = example()
    scaled = rows.with_(reward=10 * rows.reward)
    bounds = tuple(10 * b for b in algorithms.make("trpa").config.levels)
    value, grad = run(scaled, levels=bounds)
    same, same_grad = run(rows)
    assert value == same
    np.testing.assert_array_equal(grad, same_grad)


def test_the_order_of_rows_and_padding_do_not_matter():
    order = np.array([2, 0, 3, 1])
    rows = rollouts(
        np.array(MASK)[order],
        np.array([REWARD[k] for k in (1, 2, 4, 2)])[order],
        np.array([0, 0, 0, 1])[order],
        np.array(OLD)[order],
        extras={"ref_logp": np.array(REF)[order]},
    )
    value, grad = run(rows, np.array(LOGP)[order])
    same, same_grad = run()
    np.testing.assert_allclose(value, same, rtol=1e-12)
    np.testing.assert_allclose(grad, same_grad[order], rtol=1e-12)


def test_levels_of_rewards():
    reward = jnp.array([1.0, 0.99, 0.5, 0.0, -0.1])
    assert trpa.levels_of(reward, (1.0, 0.5, 0.0)).tolist() == [1, 2, 2, 3, 4]
    assert trpa.levels_of(reward, (1.0,)).tolist() == [1, 2, 2, 2, 2]


@pytest.mark.parametrize("levels", [(), (0.0, 1.0), (1.0, 1.0)])
def test_levels_must_fall(levels):
    with pytest.raises(ValueError, match="expected falling numbers"):
        algorithms.make("trpa", levels=levels)


RECORD = {"answer": "Zoey is a knight, and Sam is a knave."}


@pytest.mark.parametrize(
    ("said", "level", "score"),
    [
        ("<think>hm</think> <answer>Sam is a knave. Zoey is a knight.</answer>", 1, 3.0),
        ("<think>hm</think><answer>(1) ZOEY is a Knave (2) Sam is a knave</answer>", 2, -0.5),
        ("<think>hm</think><answer>Zoey is a knight</answer>", 3, -1.0),
        ("<think>hm</think><answer>Zoey is a knight, Sam is a liar</answer>", 3, -1.0),
        ("<think>hm</think><answer> </answer>", 4, -1.0),
        ("Zoey is a knight, Sam is a knave", 4, -3.0),
        ("<answer>Zoey is a knight, Sam is a knave</answer><think>hm</think>", 4, -3.0),
        ("<think>a</think><think>b</think><answer>Zoey is a knight, Sam is a knave</answer>", 4, -3.0),
    ],
)
def test_levels_of_knights_and_knaves(said, level, score):
    assert knights.level(said, RECORD) == level
    assert knights.preference(said, RECORD) == -level
    assert knights.score(said, RECORD) == score


def test_a_reference_answer_without_roles_is_an_error():
    with pytest.raises(ValueError, match="no '<name> is a <role>' in the reference answer '42'"):
        knights.level("<think></think><answer>Zoey is a knight</answer>", {"answer": "42"})


def test_its_file_makes_one_pass_as_the_published_trust_region_holds_no_second_one_back():
    configs = Path(__file__).parents[1] / "configs"
    learner = config_load.load_unchecked([configs / "quickstart.yaml", configs / "algorithms" / "trpa.yaml"]).learner
    assert learner.epochs == 1 and learner.minibatches > 1  # from the second minibatch on it has a gradient at all


def test_a_rejected_answer_is_pushed_away_past_any_second_pass_by_the_published_coefficient():
    rows = example(level=(1, 2, 2, 2), group=(0, 0, 1, 1))
    rows = rows.with_(old_logp=jnp.array(REF), extras={"ref_logp": jnp.array(REF)})
    alg = algorithms.make("trpa")
    moved = Views(logp=jnp.array(REF) - jnp.array([[0.0], [2.0], [0], [0]]))  # two nats a token away already
    _, grads = value_and_grad(alg, alg.init(), rows, moved)
    assert (np.asarray(grads.logp)[1, :2] > 0).all()  # and descent lowers it further
