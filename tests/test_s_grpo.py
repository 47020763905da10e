"""S-GRPO, arXiv 2505.07686: known answers, and its serial groups collected from a scripted engine."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scripted
from arrays import credit_of, loss_and_grad, rollouts

from jaxrl_llm import algorithms, config_load
from jaxrl_llm.algorithms import s_grpo
from jaxrl_llm.rollout.rows import STOP_LENGTH, pack
from jaxrl_llm.tasks.text import load_text

KEY = jax.random.key(0)
END, EOS = 8, 9
CORRECT = [0.0, 1, 0, 1, 1]
ORDER = np.arange(1, 6)


def make(**fields):
    return algorithms.make("s_grpo", **{"marker": (END,), "inducer": (7, END), "exits": 2, **fields})


def test_successive_correct_exits_earn_half_as_much():
    correct, group = jnp.asarray(CORRECT, bool), jnp.zeros(5, int)
    reward = lambda kind: s_grpo.exit_reward(correct, group, jnp.asarray(ORDER), kind).tolist()  # noqa: E731
    assert reward("decay") == [0, 1, 0, 0.5, 0.25]
    assert reward("all1") == [0, 1, 0, 1, 1]
    assert reward("shortest1") == [0, 1, 0, 0, 0]


def advantage(reward, group, order, **fields):
    rows = rollouts(np.ones((len(group), 1)), reward, group, extras={"exit_order": np.asarray(order)})
    alg = make(**fields)
    return alg.credit(alg.init(), rows, KEY).advantage[:, 0]


def test_advantage_is_the_decayed_reward_less_the_groups_mean(x64):
    expected = np.array([-0.35, 0.65, -0.35, 0.15, -0.1])
    np.testing.assert_allclose(advantage(CORRECT, np.zeros(5), ORDER), expected, rtol=1e-12)
    shuffle = [3, 0, 4, 2, 1]
    got = advantage(np.array(CORRECT)[shuffle], np.zeros(5), ORDER[shuffle])
    np.testing.assert_allclose(got, expected[shuffle], rtol=1e-12)


def test_groups_are_counted_apart(x64):
    got = advantage([1.0, 1, 1, 0], [5, 3, 5, 3], [1, 1, 2, 2])
    np.testing.assert_allclose(got, [0.25, 0.5, -0.25, -0.5])


def test_no_correct_exit_and_a_path_alone_have_no_advantage():
    np.testing.assert_array_equal(advantage([0.0, 0, 1], [0, 0, 1], [1, 2, 1]), 0)


def test_one_correct_exit_of_g(x64):
    np.testing.assert_allclose(advantage([0.0, 0, 1, 0], np.zeros(4), [1, 2, 3, 4]), [-0.25, -0.25, 0.75, -0.25])


def test_loss_and_gradient(x64):
    mask = [[1, 0, 0, 1], [1, 1, 0, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    change = [[0.1, 0, 0, -0.3], [0.3, 0.1, 0, 0], [-0.3, 0, 0, 0], [0, 0.5, 0, 0], [0, 0, 0, 0.1]]
    old = np.full((5, 4), -0.5)
    rows = rollouts(mask, CORRECT, np.zeros(5), old)
    credit = credit_of([-0.35, 0.65, -0.35, 0.15, -0.1], rows)
    value, grad = loss_and_grad(make(), rows, old + change, replace(credit, score=jnp.asarray(CORRECT)))
    np.testing.assert_allclose(value, -0.02368390, atol=5e-9)
    expected = [
        [0.03868098, 0, 0, 0],
        [0, -0.04789074, 0, -0.04333333],
        [0, 0.02333333, 0.02333333, 0],
        [-0.015, 0, 0, 0],
        [0.005, 0.005, 0.005, 0.00552585],
    ]
    np.testing.assert_allclose(grad, expected, atol=5e-9)


def test_a_row_that_trains_nothing_is_counted_in_the_mean(x64):
    rows = rollouts([[1, 1], [0, 0]], [1.0, 0], np.zeros(2), extras={"exit_order": np.array([1, 2])})
    value, _ = loss_and_grad(make(), rows, np.zeros((2, 2)))
    np.testing.assert_allclose(value, -0.5 / 2)


THOUGHT = [11, 12, 13, 14, 15]
PROMPTS = [scripted.prompt(0, [1, 2]), scripted.prompt(1, [3])]


def answer(context, number):
    """The full path thinks five tokens and answers 4; an exit answers with the number of tokens it kept."""
    if context[-1] != END:
        return scripted.completion([*THOUGHT, END, 4, EOS])
    return scripted.completion([len(context) - context.index(11) - 2, EOS], first_logp=-100)


def collect(alg, prompts=PROMPTS, answer=answer):
    plan = alg.plan(alg.init())
    return scripted.collect(plan, prompts, answer, lambda tokens: float(tokens[-2] == 4))


def test_a_group_is_the_exits_in_order_and_the_full_path_last():
    rows, requests = collect(make(positions="even"))
    assert [r.group for r in rows] == [0, 0, 0, 1, 1, 1]
    assert [r.extras["exit_order"] for r in rows] == [1, 2, 3] * 2
    first, second, full = rows[:3]
    assert first.tokens.tolist() == [11, 7, END, 1, EOS]
    assert second.tokens.tolist() == [11, 12, 13, 7, END, 3, EOS]
    assert full.tokens.tolist() == [*THOUGHT, END, 4, EOS]
    assert [r.reward.tolist() for r in rows[:3]] == [[0], [0], [1]]
    assert [list(map(int, c)) for c in requests[1].contexts[:2]] == [[1, 2, 11, 7, END], [1, 2, 11, 12, 13, 7, END]]
    assert requests[0].max_new is None and requests[1].max_new == 256


def test_the_inducer_does_not_train_and_the_thought_keeps_its_log_probs():
    rows, _ = collect(make(positions="even"))
    assert rows[1].mask.tolist() == [True, True, True, False, False, True, True]
    np.testing.assert_array_equal(rows[1].policy_logp[rows[1].mask], [0, -1, -2, -100, -101])
    np.testing.assert_array_equal(rows[1].sampler_logp[rows[1].mask], [-0.5, -1.5, -2.5, -100.5, -101.5])
    assert rows[2].mask.all()


def test_only_answers_and_the_full_path_can_train():
    rows, _ = collect(make(positions="even", train_prefix=False))
    assert rows[1].mask.tolist() == [False] * 5 + [True, True]
    assert rows[2].mask.all()


def test_the_row_of_the_spec():
    """Thought [11..15] cut at 2, inducer [7, 8], answer [3, 4]."""
    alg = make(exits=8)
    say = lambda context, _: scripted.completion([*THOUGHT, END] if context[-1] != END else [3, 4])  # noqa: E731
    rows, _ = collect(alg, PROMPTS[:1], say)
    assert [r.extras["exit_order"] for r in rows] == [1, 2, 3, 4, 5, 9]  # a thought shorter than m: all its positions
    assert rows[1].tokens.tolist() == [11, 12, 7, 8, 3, 4]
    assert rows[1].mask.astype(int).tolist() == [1, 1, 0, 0, 1, 1]


def test_an_unfinished_thought_is_wrong_and_still_cut():
    def unfinished(context, number):
        return scripted.completion([11, 12, 13, 4, 4], STOP_LENGTH) if context[-1] != END else answer(context, number)

    rows, _ = collect(make(), PROMPTS[:1], unfinished)
    assert len(rows) == 3 and rows[-1].truncated
    assert rows[-1].reward.tolist() == [0]  # although the checker accepted it


def test_an_empty_thought_leaves_the_full_path_alone():
    rows, requests = collect(make(), PROMPTS[:1], lambda *_: scripted.completion([END, 4, EOS]))
    assert len(rows) == 1 and len(requests) == 1


def test_a_stop_token_is_no_thought():
    assert s_grpo.thought_length(np.array([11, 12, EOS]), (END,), stopped=True) == (2, False)
    assert s_grpo.thought_length(np.array([11, 12, 13]), (END,), stopped=False) == (3, False)
    assert s_grpo.thought_length(np.array([11, 8, 12, 8, 7]), (8, 7), stopped=False) == (3, True)


@pytest.mark.parametrize("how", ["random", "even"])
@pytest.mark.parametrize("n", [0, 1, 8, 9, 10, 100])
def test_exit_positions_are_distinct_ascending_and_inside_the_thought(how, n):
    got = s_grpo.exit_positions(n, 8, how, np.random.default_rng(0))
    assert len(got) == min(n, 8) and (np.diff(got) > 0).all()
    assert all(1 <= p <= n for p in got)


def test_positions_are_uniform_and_change_with_the_step():
    seen = [s_grpo.exit_positions(10, 2, "random", np.random.default_rng([step, 0])) for step in range(2000)]
    np.testing.assert_allclose(np.bincount(np.concatenate(seen), minlength=11)[1:] / 4000, 0.1, atol=0.02)


def test_a_steps_rows_fit_the_batch_the_loop_makes():
    alg = make(positions="even")
    plan = alg.plan(alg.init())
    rows, _ = collect(alg)
    assert plan.group_size == 3
    batch = pack(rows, contexts=2, prompt_len=2, size=6, length=8, parts=1, extras=alg.needs.row_extras)
    assert np.asarray(batch.counted).all()
    credit = alg.credit(alg.init(), jax.tree.map(jnp.asarray, batch), KEY)
    np.testing.assert_allclose(credit.advantage[:3, 0], [-1 / 3, -1 / 3, 2 / 3], rtol=1e-6)


@pytest.mark.parametrize("missing", ["marker", "inducer"])
def test_the_token_ids_must_be_given(missing):
    alg = make(**{missing: ()})
    with pytest.raises(ValueError, match=f"algorithm.{missing}"):
        alg.plan(alg.init())


def test_the_example_s_marker_is_the_sign_that_ends_its_thought():
    config = config_load.load(["configs/quickstart.yaml", "configs/algorithms/s_grpo.yaml"])
    words, method = load_text(config.tokenizer), config.algorithm
    assert words.decode(method["marker"]) == words.decode(method["inducer"]) == "="
    thought, found = s_grpo.thought_length(words.encode(" 12 + 34 = 46"), method["marker"], stopped=False)
    assert (thought, found) == (len(" 12 + 34 "), True)
