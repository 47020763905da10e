"""DAPO (direct), arXiv 2412.18279: known answers of its advantages, selection and losses; its collector; its two phases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scripted
from arrays import rollouts
from test_loop import assert_same_run, configured, letters, metrics_of

from jaxrl_llm import algorithms
from jaxrl_llm.algorithms import dapo_direct
from jaxrl_llm.algorithms.base import value_and_grad
from jaxrl_llm.training import loop
from jaxrl_llm.types import Credit, Views

STATE, ACTION = [0, 0, 0, 0, 1, 1], [0, 1, 0, 2, 0, 1]
NEXT = [0.9, 0.4, 0.9, 0.6, 0.5, 0.45]
LOGP = [[-0.8, -0.4], [-0.9, -1.0], [-0.8, -0.4], [-0.5, -1.0], [-0.3, -0.2], [-0.4, -0.9]]
REF = [[-1.0, -0.5], [-0.7, -1.1], [-1.0, -0.5], [-0.6, -0.8], [-0.3, -0.3], [-0.2, -0.9]]
MASK = [[1, 1], [1, 0], [1, 1], [1, 1], [1, 1], [1, 0]]
ADVANTAGE = [0.2, -0.3, 0.2, -0.1, 0.025, -0.025]
KEY, TWO = jax.random.key(0), {"delimiter": (2,)}  # token 2 ends a step


def rows_of(values, mask, step_length, reward=None, ref=None):
    """Rows of the example's states and steps; `values` are logits before every token."""
    mask = np.asarray(mask)
    reference = np.zeros(mask.shape) if ref is None else np.asarray(ref)
    extras = {"old_values": np.asarray(values, float), "ref_logp": reference}
    rows = rollouts(mask, np.zeros(6) if reward is None else reward, STATE, extras=extras)
    numbers = {"step_length": jnp.asarray(step_length), "action_id": jnp.asarray(ACTION)}
    return rows.with_(extras=numbers)


def actor(at=0, **fields):
    """The method in its actor phase, and its state."""
    alg = algorithms.make("dapo_direct", **{"critic_steps": 0, "beta": 0.02, **fields})
    return alg, alg.init()


def labelled():
    """The example with the critic's value of the next state in the token behind each step."""
    logit = np.log(NEXT) - np.log1p(-np.array(NEXT))
    length = np.asarray(MASK).sum(1)
    mask, values = np.zeros((6, 3)), np.full((6, 3), 99.0)
    for i, n in enumerate(length):
        mask[i, : n + 1], values[i, n] = 1, logit[i]
    pad = np.zeros((6, 1))
    return rows_of(values, mask, length, ref=np.concatenate([REF, pad], 1)), np.concatenate([LOGP, pad], 1)


def test_advantage_of_a_step_is_the_next_state_s_value_less_the_mean_with_repeats(x64):
    rows, _ = labelled()
    alg, state = actor()
    credit = alg.credit(state, rows, KEY)
    np.testing.assert_allclose(credit.score, ADVANTAGE, atol=1e-12)
    steps = np.asarray(credit.advantage) != 0
    np.testing.assert_array_equal(steps[:, :2], np.asarray(MASK, bool))


def test_a_step_that_ends_its_response_has_its_outcome_as_value(x64):
    rows = rows_of(np.full((6, 2), 99.0), MASK, [2] * 6, reward=[1.0, 0, 0, 0, 1, 0])
    alg, state = actor()
    np.testing.assert_allclose(alg.credit(state, rows, KEY).score, [0.75, -0.25, -0.25, -0.25, 0.5, -0.5])


def test_one_row_of_every_step_is_kept_where_steps_differ_enough():
    kept = dapo_direct.kept_steps(np.array(ADVANTAGE), np.array(STATE), np.array(ACTION), np.ones(6, bool), 0.1)
    assert kept.tolist() == [0, 1, 3]
    uncounted = np.array([False, True, True, True, True, True])
    kept = dapo_direct.kept_steps(np.array(ADVANTAGE), np.array(STATE), np.array(ACTION), uncounted, 0.0)
    assert kept.tolist() == [1, 2, 3, 4, 5]


def test_loss_and_gradient_of_the_actor(x64):
    rows, logp = labelled()
    alg, state = actor()
    chosen = alg.select(state, {}, rows, alg.credit(state, rows, KEY), KEY)
    kept = chosen.rows.row_id[:3].tolist()
    assert kept == [0, 1, 3] and not np.asarray(chosen.rows.mask)[3:].any()
    views = Views(logp=jnp.asarray(logp)[jnp.array([*kept, 0, 0, 0])], values=jnp.zeros((6, 3)))
    value, grads = value_and_grad(alg, state, chosen.rows, views, credit=chosen.credit)
    np.testing.assert_allclose(value, 56.19, atol=1e-8)
    expected = [[-3.23333333, -3.23333333, 0], [4.93333333, 0, 0], [1.63333333, 1.63333333, 0]]
    np.testing.assert_allclose(grads.logp[:3], expected, atol=5e-9)
    assert not np.asarray(grads.logp)[3:].any() and not np.asarray(grads.values).any()


def test_mean_inside_each_state_first(x64):
    rows, logp = labelled()
    alg, state = actor(average="states")
    credit = alg.credit(state, rows, KEY)
    value, _ = value_and_grad(alg, state, rows, Views(jnp.asarray(logp), values=jnp.zeros((6, 3))), credit=credit)
    np.testing.assert_allclose(value, 27.255, atol=1e-8)


def test_at_the_reference_it_is_the_advantage_policy_gradient_over_beta(x64):
    rows, _ = labelled()
    alg, state = actor(beta=0.5)
    credit = alg.credit(state, rows, KEY)
    views = Views(logp=rows.extras["ref_logp"], values=jnp.zeros((6, 3)))
    _, grads = value_and_grad(alg, state, rows, views, credit=credit)
    np.testing.assert_allclose(grads.logp, -np.asarray(credit.advantage) / 0.5 / 6, atol=1e-12)


def test_critic_loss_and_gradient(x64):
    logit, target = jnp.array([2.0, -1.0, 0.5]), jnp.array([0.75, 0.25, 1.0])
    value, grad = jax.value_and_grad(lambda v: dapo_direct.critic_loss(v, target).mean())(logit)
    np.testing.assert_allclose(value, 0.55475556, atol=5e-9)
    np.testing.assert_allclose(grad, [0.04359903, 0.00631381, -0.12584689], atol=5e-9)


def test_the_critic_learns_the_share_of_correct_completions_from_a_state(x64):
    alg = algorithms.make("dapo_direct", critic_steps=1)
    rows = rows_of(np.zeros((6, 2)), MASK, [1] * 6, reward=[1.0, 0, 0, 0, 1, 1])
    credit = alg.credit(alg.init(), rows, KEY)
    np.testing.assert_allclose(credit.extras["target"], [0.25] * 4 + [1.0] * 2)
    views = Views(logp=jnp.asarray(LOGP), values=jnp.full((6, 2), 0.5))
    value, grads = value_and_grad(alg, alg.init(), rows, views, credit=credit)
    np.testing.assert_allclose(value, np.log1p(np.exp(0.5)) - 0.5 * 0.5, rtol=1e-12)
    expected = (1 / (1 + np.exp(-0.5)) - np.array([0.25] * 4 + [1.0] * 2)) / 6
    np.testing.assert_allclose(grads.values[:, 0], expected, rtol=1e-12)
    assert not np.asarray(grads.values)[:, 1].any() and not np.asarray(grads.logp).any()


def test_without_a_kept_step_there_is_no_loss(x64):
    rows, logp = labelled()
    alg, state = actor(gap=1.0)
    chosen = alg.select(state, {}, rows, alg.credit(state, rows, KEY), KEY)
    views = Views(logp=jnp.asarray(logp), values=jnp.zeros((6, 3)))
    value, grads = value_and_grad(alg, state, chosen.rows, views, credit=chosen.credit)
    assert value == 0 and not np.asarray(grads.logp).any()


def test_critic_and_actor_take_turns():
    class Learner:
        active = None

        def step(self, state, rows, credit, active):
            self.active = active
            return state, {}

    alg, learner = algorithms.make("dapo_direct", critic_steps=2, actor_steps=1), Learner()
    state, turns = alg.init(), []
    for _ in range(6):
        alg.update(learner, state, None, Credit(jnp.zeros((1, 1))), KEY)
        turns.append("critic" if learner.active == {"policy": False, "critic": True} else "actor")
        state, _ = alg.observe(state, {}, None, None, None, None)
    assert turns == ["critic", "critic", "actor"] * 2


@pytest.mark.parametrize(
    ("correct", "kept", "expected"),
    [
        ([1, 1, 1, 0, 0, 0], 4, [0, 1, 3, 4]),
        ([1, 1, 1, 1, 1, 0], 4, [0, 1, 2, 5]),
        ([0, 0, 0, 0, 0, 1], 4, [0, 1, 2, 5]),
        ([0, 0, 0], 2, [0, 1]),
        ([1, 0], 4, [0, 1]),
    ],
)
def test_kept_responses_are_as_balanced_as_they_can_be(correct, kept, expected):
    assert dapo_direct.balanced([bool(c) for c in correct], kept) == expected


@pytest.mark.parametrize(
    ("tokens", "ends"), [([5, 2, 6, 2], [2, 4]), ([5, 2, 6], [2, 3]), ([5, 6], [2]), ([2], [1]), ([], [0])]
)
def test_steps_end_behind_delimiters_and_at_the_end(tokens, ends):
    assert dapo_direct.step_ends(np.array(tokens, np.int32), (2,)) == ends


def collected(answers, completions=2, reward=lambda tokens: float(sum(tokens) % 2), **fields):
    """Rows of one prompt; `answers` maps a context to the completions sampled from it, in turn."""
    fields = {"responses": 2, "kept": 2, "states": 4, "completions": completions, **TWO, **fields}
    alg = algorithms.make("dapo_direct", **fields)
    scored = []

    def scoring(tokens):
        scored.append(tokens)
        return reward(tokens)

    rows, requests = scripted.collect(
        alg.plan(alg.init()), [scripted.prompt(0, [9])], lambda c, i: scripted.completion(answers[tuple(c)][i]), scoring
    )
    return rows, requests, scored


ANSWERS = {(9,): [[5, 2, 6], [7]], (9, 5, 2): [[6], [8, 2, 1]]}


def test_every_prefix_of_a_kept_response_is_a_state_with_completions_of_its_own():
    rows, requests, scored = collected(ANSWERS)
    assert all(r.policy == "ref" for r in requests)
    assert [list(map(list, r.contexts)) for r in requests] == [[[9]], [[9], [9, 5, 2]]]
    assert [(r.group, r.context.tolist(), r.tokens.tolist()) for r in rows] == [
        (0, [9], [5, 2, 6]),
        (0, [9], [7]),
        (1, [9, 5, 2], [6]),
        (1, [9, 5, 2], [8, 2, 1]),
    ]
    assert [r.extras["step_length"] for r in rows] == [2, 1, 1, 2]
    assert [r.extras["action_id"] for r in rows] == [0, 1, 0, 1]
    assert scored[2:] == [[5, 2, 6], [7], [5, 2, 6], [5, 2, 8, 2, 1]]  # whole responses are rewarded
    assert [float(r.reward[0]) for r in rows] == [1, 1, 1, 0]


def test_equal_steps_share_an_action():
    answers = {(9,): [[5, 2, 6], [5, 2, 7]], (9, 5, 2): [[6], [6]]}
    assert [r.extras["action_id"] for r in collected(answers)[0]] == [0, 0, 0, 0]


def test_states_of_a_prompt_are_limited_and_drawn_by_the_step():
    long = {(9,): [[1, 2] * 6, [1, 2] * 6]} | {(9, *[1, 2] * n): [[1], [1]] for n in range(1, 6)}

    def lengths(step):
        alg = algorithms.make("dapo_direct", responses=1, kept=1, states=3, completions=2, **TWO)
        plan = alg.plan({"step": jnp.asarray(step)})
        answer = lambda c, i: scripted.completion(long[tuple(c)][i])  # noqa: E731
        rows, _ = scripted.collect(plan, [scripted.prompt(0, [9])], answer, lambda tokens: 0.0)
        return [len(r.context) for r in rows[::2]]

    assert len(lengths(0)) == 3 and lengths(0) == lengths(0)
    assert len({tuple(lengths(step)) for step in range(8)}) > 1


RUN = {
    "run": {"steps": 4},
    "algorithm": {
        "name": "dapo_direct",
        "responses": 3,
        "kept": 2,
        "completions": 3,
        "states": 2,
        "delimiter": list(range(3, 13)),  # every digit ends a step
        "gap": 0.0,
        "critic_steps": 1,
        "actor_steps": 1,
    },
    "rollout": {"prompts": 3, "group_size": 4, "max_prompt": 14, "max_new": 4},
    "reference": {"mode": "resident", "sync_every": 2},
    "eval": {"size": 0},
}


def test_a_resumed_run_equals_a_straight_one(tmp_path):
    def crash(step, rows):
        letters(step, rows)
        if step == 3:
            raise RuntimeError("power cut")

    straight, cut = tmp_path / "straight", tmp_path / "cut"
    assert loop.train(configured(straight, **RUN), on_rows=letters) == 0
    with pytest.raises(RuntimeError, match="power cut"):
        loop.train(configured(cut, **RUN), on_rows=crash)
    assert loop.train(configured(cut, **RUN), on_rows=letters) == 0
    assert_same_run(straight, cut)
    lines = [line for line in metrics_of(straight) if "critic/loss" in line]
    assert [line["critic/loss"] > 0 for line in lines] == [True, False, True, False]


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"kept": 40}, "algorithm.kept=40: expected 1 to responses=32"),
        ({"completions": 1}, "algorithm.completions=1: expected at least 2"),
        ({"actor_steps": 0}, "algorithm.actor_steps=0: expected at least 1"),
    ],
)
def test_settings_without_a_meaning_are_refused(fields, line):
    with pytest.raises(ValueError) as error:
        algorithms.make("dapo_direct", **fields)
    assert str(error.value) == line


def test_a_plan_needs_to_know_what_ends_a_step():
    alg = algorithms.make("dapo_direct")
    with pytest.raises(ValueError, match=r"algorithm.delimiter=\(\): expected token ids that end a step"):
        alg.plan(alg.init())
