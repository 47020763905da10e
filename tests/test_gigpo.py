"""GiGPO, arXiv 2505.10978: the known answers of its spec and the edge cases it names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scripted
from arrays import credit_of, loss_and_grad, rollouts

from jaxrl_llm import algorithms
from jaxrl_llm.advantages import two_level
from jaxrl_llm.rollout.collectors import row_of
from jaxrl_llm.rollout.rows import pack

GROUP = [0, 0, 0, 0, 0, 0, 1]
TRAJ = [0, 0, 0, 1, 1, 2, 3]
INDEX = [0, 1, 2, 0, 1, 0, 0]
REWARD = [0.0, 0, 10, 0, 0, 10, 10]
INVALID = [0.0, 0, 0, 0, 1, 0, 0]
ANCHOR = ["hall", "kitchen", "hall", "hall", "kitchen", "hall", "hall"]
STEP = np.array([1.76875, 4.8, 2.74375, -7.25625, -4.8, 2.74375, 0])
KEY = jax.random.key(0)

pytestmark = pytest.mark.usefixtures("x64")


def episode_rows(keep=None):
    keep = range(7) if keep is None else keep
    ids = two_level.anchor_ids(GROUP, ANCHOR)
    extras = {"traj": TRAJ, "step_index": INDEX, "step_reward": REWARD, "invalid": INVALID, "anchor_id": ids}
    extras = {k: np.asarray(v)[list(keep)] for k, v in extras.items()}
    return rollouts(np.ones((len(keep), 2)), group=np.asarray(GROUP)[list(keep)], extras=extras)


def advantages(rows, **fields):
    alg = algorithms.make("gigpo", **fields)
    credit = alg.credit(alg.init(), rows, KEY)
    np.testing.assert_array_equal(credit.advantage[:, 0], credit.advantage[:, 1])
    return np.asarray(credit.advantage[:, 0])


def test_anchor_ids_join_equal_states_of_one_group():
    assert two_level.anchor_ids(GROUP, ANCHOR).tolist() == [0, 1, 0, 0, 1, 0, 2]


def test_anchor_ids_by_similarity_join_the_first_close_enough_cluster():
    texts = [
        "You are in the kitchen. Fridge is open.",
        "You are in the kitchen. Fridge is shut.",
        "You are in the hall.",
    ]
    assert two_level.anchor_ids([0, 0, 0], texts, 0.85).tolist() == [0, 0, 1]
    assert two_level.anchor_ids([0, 0, 0], texts, 0.8975).tolist() == [0, 1, 2]  # their ratio is 0.89744
    assert two_level.anchor_ids([0, 1, 1], texts, 0.85).tolist() == [0, 1, 2]  # groups share no state


@pytest.mark.parametrize("threshold", [0.0, 1.0, -1.0])
def test_a_similarity_threshold_outside_0_to_1_is_refused(threshold):
    with pytest.raises(ValueError, match="threshold"):
        two_level.anchor_ids([0], ["a"], threshold)


def test_similarity_needs_text():
    with pytest.raises(ValueError, match="strings"):
        two_level.anchor_ids([0], [(1, 2)], 0.5)


@pytest.mark.parametrize("shuffle", [range(7), [6, 2, 4, 0, 5, 3, 1]])
def test_step_returns_are_discounted_along_each_trajectory_in_any_row_order(shuffle):
    pick = lambda x: jnp.asarray(np.asarray(x)[list(shuffle)])  # noqa: E731
    returns = two_level.step_returns(pick(REWARD), pick(TRAJ), pick(INDEX), jnp.ones(7, bool), 0.95)
    np.testing.assert_allclose(returns, np.array([9.025, 9.5, 10, 0, 0, 10, 10])[list(shuffle)], rtol=1e-12)


def test_mean_norm_over_rows():
    expected = [5.11875, 8.15, 6.09375, -13.90625, -11.55, 6.09375, 10]
    np.testing.assert_allclose(advantages(episode_rows()), expected, rtol=1e-12)
    episode = [3.35, 3.35, 3.35, -6.65, -6.75, 3.35, 10]
    np.testing.assert_allclose(advantages(episode_rows(), omega=0.0), episode, rtol=1e-12)


def test_mean_norm_over_trajectories():
    got = advantages(episode_rows(), omega=0.0, cross_steps=False)
    expected = [3.3333333, 3.3333333, 3.3333333, -6.6666667, -6.7666667, 3.3333333, 10]
    np.testing.assert_allclose(got, expected, atol=5e-8)


def test_mean_std_norm_over_rows():
    got = advantages(episode_rows(), mode="mean_std_norm")
    expected = [1.0094789, 1.3525918, 1.2101256, -2.7746109, -2.007711, 1.2101256, 9.99999]
    np.testing.assert_allclose(got, expected, atol=5e-8)
    got = advantages(episode_rows(), mode="mean_std_norm", omega=0.0)
    expected = [0.6454851, 0.6454851, 0.6454851, -1.2813361, -1.3006043, 0.6454851, 9.99999]
    np.testing.assert_allclose(got, expected, atol=5e-8)


def test_the_advantage_belongs_to_the_row_not_to_its_place():
    order = [6, 2, 4, 0, 5, 3, 1]
    np.testing.assert_allclose(advantages(episode_rows(order)), advantages(episode_rows())[order], rtol=1e-12)


def test_a_state_visited_once_adds_nothing_to_the_episode_advantage():
    rows = episode_rows()
    alone = rows.with_(extras={"anchor_id": jnp.arange(7)})
    np.testing.assert_allclose(advantages(alone), advantages(rows, omega=0.0), rtol=1e-12)


def test_equal_successes_prefer_the_shorter_path():
    extras = {"traj": [0, 0, 1], "step_index": [0, 1, 0], "step_reward": [0.0, 10, 10], "invalid": [0.0, 0, 0]}
    rows = rollouts(np.ones((3, 1)), group=[0, 0, 0], extras={**extras, "anchor_id": [0, 1, 0]})
    np.testing.assert_allclose(advantages(rows), [-0.25, 0, 0.25], rtol=1e-12)
    np.testing.assert_allclose(advantages(rows, omega=0.0), [0, 0, 0])


@pytest.mark.parametrize("mode", ["mean_norm", "mean_std_norm"])
@pytest.mark.parametrize("how", ["empty", "unscored", "padding"])
def test_rows_out_of_statistics_change_nothing_whatever_they_hold(how, mode):
    rows = episode_rows([0, 1, 2, 3, 4, 5, 6, 5])  # the last row joins trajectory 2
    extras = {**rows.extras, "step_reward": rows.extras["step_reward"].at[7].set(jnp.nan)}
    extras["invalid"] = extras["invalid"].at[7].set(jnp.nan)
    rows = rows.with_(extras=extras)
    if how == "empty":
        rows = rows.with_(mask=rows.mask.at[7].set(False))
    else:
        rows = rows.with_(**{{"unscored": "scored", "padding": "stat"}[how]: jnp.arange(8) < 7})
    got = advantages(rows, mode=mode)
    np.testing.assert_allclose(got[:7], advantages(episode_rows(), mode=mode), rtol=1e-12)
    assert got[7] == 0


LOGP = [[-0.5, -1.0], [-0.2, -0.3]]
LOSS_ROWS = {"mask": np.ones((2, 2)), "old_logp": [[-0.9, -1.0], [-0.1, -1.9]]}
REF = {"ref_logp": np.array([[-0.6, -1.1], [-0.4, -0.3]])}


def test_loss_and_gradient():
    rows = rollouts(**LOSS_ROWS, extras=REF)
    credit = credit_of([1.5, -0.5], rows, anchor_shared=[True, False])
    value, grad = loss_and_grad(algorithms.make("gigpo"), rows, LOGP, credit, entropy=np.full((2, 2), 0.7))
    np.testing.assert_allclose(value, -0.3375243088, atol=1e-10)
    np.testing.assert_allclose(grad, [[0.00023790645, -0.37476209], [0.11355785, 0]], atol=1e-8)


def test_masked_tokens_may_hold_nan():
    rows = rollouts(**LOSS_ROWS, extras=REF)
    credit = credit_of([1.5, -0.5], rows, anchor_shared=[True, False])
    mask = np.array([[True, False], [True, True]])
    dirty = jnp.where(mask, 0, jnp.nan)
    alg, clean = algorithms.make("gigpo"), rows.with_(mask=jnp.asarray(mask))
    bad = clean.with_(old_logp=clean.old_logp + dirty, extras={"ref_logp": clean.extras["ref_logp"] + dirty})
    entropy = np.full((2, 2), 0.7)
    value, grad = loss_and_grad(alg, clean, LOGP, credit, entropy=entropy)
    same, same_grad = loss_and_grad(alg, bad, jnp.asarray(LOGP) + dirty, credit, entropy=entropy + dirty)
    assert value == same
    np.testing.assert_array_equal(grad, same_grad)
    assert grad[0, 1] == 0


def test_the_kl_and_entropy_terms_can_be_switched_off():
    alg = algorithms.make("gigpo", kl_coef=0.0, entropy_coef=0.0)
    assert alg.needs.loss == ("logp",) and alg.needs.rescore == ()
    rows = rollouts(**LOSS_ROWS)
    value, _ = loss_and_grad(alg, rows, LOGP, credit_of([1.5, -0.5], rows, anchor_shared=[True, False]))
    # max(-A r, -A clip r) of the four tokens by hand; the last is at the dual clip.
    np.testing.assert_allclose(value, (-1.8 - 1.5 + 0.5 * np.exp(-0.1) + 1.5) / 4, rtol=1e-12)


def test_rows_that_know_no_trajectory_are_refused():
    prompt, said = scripted.prompt(0, [1]), scripted.completion([2])
    needs = algorithms.make("gigpo").needs.row_extras
    with pytest.raises(ValueError, match="needs traj, step_index, step_reward, invalid, anchor_id"):
        pack([row_of(prompt, said, 0)], contexts=1, prompt_len=1, size=1, length=1, parts=1, extras=needs)
