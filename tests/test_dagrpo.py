"""DaGRPO, arXiv 2512.06337: which rows are distinct, worked answers for hard prompts, and the loss of both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scripted
from arrays import loss_and_grad, rollouts
from test_loop import configured, letters, metrics_of

from jaxrl_llm import algorithms
from jaxrl_llm.algorithms import dagrpo
from jaxrl_llm.rollout.rows import pack
from jaxrl_llm.training import loop
from jaxrl_llm.types import GIVEN

KEY = jax.random.key(0)
GROUP = [0, 0, 0, 0, 1, 1, 1]
REWARD = [1.0, 1, 0, 0, 0, 0, 1]  # the last row is the answer prompt 1 was given
SCORE = [0.62, 0.90, 0.58, 0.65, 0.2, 0.4, 1]
A = [0.99999800, 0.99999800, -0.99999800, -0.99999800, -0.70710528, -0.70710528, 1.41421056]
MASK = np.array([[1, 1]] * 5 + [[1, 0], [1, 1]], bool)
OLD = np.full((7, 2), -1.0)
LOGP = OLD + np.array([[0.1, 0.3], [0, 0], [0.2, -0.1], [-0.5, 0], [0, 0], [0.1, 0], [0.7, -0.2]])


def batch(given=True, quality=SCORE):
    rows = rollouts(MASK, REWARD, GROUP, OLD, {"quality": quality})
    return rows.with_(source=jnp.where(jnp.arange(7) == 6, GIVEN, 0)) if given else rows


def result(rows, **fields):
    return loss_and_grad(algorithms.make("dagrpo", **fields), rows, LOGP)


def credit(rows, **fields):
    return algorithms.make("dagrpo", **fields).credit((), rows, KEY)


@pytest.mark.parametrize(("tau", "expected"), [(0.1, [0, 1, 1, 1, 1, 1, 1]), (0.3, [0, 1, 1, 0, 1, 1, 1])])
def test_rows_too_like_all_of_the_other_sign_are_masked(tau, expected, x64):
    got = credit(batch(), tau=tau)
    np.testing.assert_allclose(got.advantage[:, 0], A, atol=5e-9)
    assert got.extras["distinct"].astype(int).tolist() == expected


def test_loss_and_gradient(x64):
    value, grad = result(batch(), tau=0.3)
    np.testing.assert_allclose(value, 0.01964098, atol=5e-9)
    expected = [
        [0, 0],
        [-0.07142843, -0.07142843],
        [0.08724288, 0.06463111],
        [0, 0],
        [0.05050752, 0.05050752],
        [0.11163888, 0],
        [-0.10101504, -0.10101504],
    ]
    np.testing.assert_allclose(grad, expected, atol=5e-9)


def test_without_anchors_and_distance_it_is_grpo(x64):
    ours = result(batch(given=False), tau=0.0)
    plain = loss_and_grad(algorithms.make("grpo", ddof=0, count_empty=True), batch(given=False), LOGP)
    for a, b in zip(ours, plain):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15)


def test_a_masked_row_does_not_enlarge_the_steps_of_others(x64):
    all_, some = result(batch(), tau=0.1)[1], result(batch(), tau=0.3)[1]
    np.testing.assert_array_equal(all_[[1, 2, 4, 5, 6]], some[[1, 2, 4, 5, 6]])


def test_a_group_of_one_sign_and_unscored_rows_are_masked(x64):
    rows = batch().with_(reward=jnp.asarray([1.0, 1, 1, 1, 0, 0, np.nan])[:, None], scored=jnp.arange(7) < 6)
    assert not credit(rows, tau=0.0).extras["distinct"].any()


def test_the_gradient_of_sampled_rows_agrees_with_central_differences(x64):
    rows, h = batch(), 1e-6
    alg = algorithms.make("dagrpo", tau=0.3)
    _, grad = loss_and_grad(alg, rows, LOGP)
    for i, t in [(1, 0), (2, 1), (5, 0)]:
        step = np.zeros((7, 2))
        step[i, t] = h
        slope = (loss_and_grad(alg, rows, LOGP + step)[0] - loss_and_grad(alg, rows, LOGP - step)[0]) / (2 * h)
        np.testing.assert_allclose(slope, grad[i, t], rtol=1e-6)


PROMPTS = [scripted.prompt(0, [1], target="45"), scripted.prompt(1, [2], answer="7")]


def collected(alg=None, right=0):
    """Groups of two; completions of prompt `right` are correct."""
    alg = alg or algorithms.make("dagrpo")
    plan = alg.plan(())._replace(group_size=2)
    answer = lambda context, i: scripted.completion([context[0], i])  # noqa: E731
    return plan, scripted.collect(plan, PROMPTS, answer, lambda t: float(t[0] == PROMPTS[right].tokens[0]))[0]


@pytest.mark.parametrize(("right", "answer"), [(0, [7, scripted.EOS]), (1, [4, 5, scripted.EOS])])
def test_hard_prompts_get_their_worked_answer(right, answer):
    plan, rows = collected(right=right)
    hard = 1 - right
    assert [r.group for r in rows] == sorted([0, 0, 1, 1, hard])
    (anchor,) = [r for r in rows if r.source == GIVEN]
    assert anchor.group == hard and anchor.tokens.tolist() == answer and anchor.mask.all()
    assert anchor.reward.tolist() == [1] and anchor.extras["quality"] == 1
    assert [r.extras["quality"] for r in rows if r.group == right] == [1, 1]
    contexts, size = plan.capacity(2, 2)
    assert (contexts, size) == (2, 6)
    packed = pack(rows, contexts=2, prompt_len=1, size=6, length=3, parts=1, extras=("quality",))
    assert (np.asarray(packed.source) == GIVEN).sum() == 1 and packed.extras["quality"].dtype == np.float32


def test_anchors_can_be_off():
    plan, rows = collected(algorithms.make("dagrpo", anchors=False))
    assert len(rows) == 4 and plan.capacity(2, 2) == (2, 4)


def test_a_score_that_no_reward_part_gives_is_an_error_of_one_line():
    with pytest.raises(ValueError, match=r"^algorithm.quality='judge': expected one of the reward parts [^\n]*$"):
        collected(algorithms.make("dagrpo", quality="judge"))


def test_it_trains_in_the_ordinary_loop(tmp_path):
    sections = {"run": {"steps": 2}, "eval": {"size": 0}, "learner": {"epochs": 1}, "algorithm": {"name": "dagrpo"}}
    config = configured(tmp_path, **sections, rollout={"prompts": 4, "group_size": 4, "max_prompt": 10, "max_new": 5})
    given = []

    def watch(step, rows):
        letters(step, rows)
        given.append([row for row in rows if row.source == GIVEN])

    assert loop.train(config, on_rows=watch) == 0
    assert given[0] and all(row.tokens[-1] == 2 for row in given[0])  # <eos>
    assert [np.isfinite(line["grad_norm"]) for line in metrics_of(tmp_path)] == [True, True]


@pytest.mark.parametrize("fields", [{"tau": -1.0}, {"min_correct": 0}, {"clip_low": 2.0}])
def test_bad_settings_raise_one_clear_line(fields):
    with pytest.raises(ValueError, match=r"^algorithm\.\w+=.*: expected [^\n]*$"):
        dagrpo.Config(**fields)
