"""XRPO, arXiv 2510.06672: where rollouts go, solved examples before prompts that fail, and the bonus for unlikely answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scripted
from arrays import loss_and_grad, rollouts
from test_loop import configured, letters, metrics_of

from jaxrl_llm import algorithms
from jaxrl_llm.algorithms import xrpo
from jaxrl_llm.algorithms.base import Report
from jaxrl_llm.rollout.budget import greedy
from jaxrl_llm.rollout.rows import pack
from jaxrl_llm.training import host_state, loop

KEY = jax.random.key(0)


# Where rollouts go


def test_confidence_and_priority():
    np.testing.assert_allclose(xrpo.half_width(np.array([4, 5]), 0.5, 0.05), [0.79561158, 0.62083200], atol=5e-9)
    std = np.array([np.std(r, ddof=1) for r in ([1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 0])])
    np.testing.assert_allclose(std, [0.57735027, 0, 0.5], atol=5e-9)
    got = xrpo.priority(np.array([4, 4, 4]), std, 0.05, 1.0)
    np.testing.assert_allclose(got, [1.00259104, 0.80077296, 0.97555254], atol=5e-9)


@pytest.mark.parametrize(("lam", "extra"), [(1.0, [3, 1, 2]), (0.1, [3, 0, 3])])
def test_a_budget_is_handed_out_one_by_one(lam, extra):
    std = np.array([0.57735027, 0, 0.5])
    counts = greedy(np.array([4, 4, 4]), 6, lambda n: xrpo.priority(n, std, 0.05, lam))
    assert (counts - 4).tolist() == extra


def test_a_cap_leaves_the_rest_of_a_budget_unspent():
    assert greedy(np.array([1, 1]), 9, lambda n: np.array([2.0, 1.0]), most=4).tolist() == [4, 4]


PROMPTS = [scripted.prompt(g, [1, 10 + g]) for g in range(3)]
RIGHT = {10: (1, 0), 11: (0,), 12: (1, 1, 1, 0)}  # rewards of a prompt's completions in turn


def collected(memory=None, max_prompt=99, **fields):
    alg = algorithms.make("xrpo", **fields)
    plan = alg.plan(())._replace(group_size=8, memory=memory, max_prompt=max_prompt)

    def answer(context, i):
        pattern = RIGHT[context[-1]]
        return scripted.completion([pattern[i % len(pattern)], 5])

    return alg, plan, *scripted.collect(plan, PROMPTS, answer, lambda tokens: float(tokens[0]))


def test_later_phases_go_where_rewards_differ():
    _, plan, rows, requests = collected()
    assert [sum(r.n) for r in requests] == [12, 6, 6] and list(requests[1].n) == [3, 1, 2]
    assert [r.group for r in rows] == sorted(r.group for r in rows) and len(rows) == 24
    packed = pack(rows, **dict(zip(("contexts", "size"), plan.capacity(3, 8))), prompt_len=2, length=2, parts=1)
    assert np.asarray(packed.counted).all()


def test_budgets_are_spent_exactly_whatever_the_phases():
    for phases, base, asked in [(2, 2, 2), (3, 7, 3), (4, 3, 4), (3, 8, 1)]:
        _, _, rows, requests = collected(phases=phases, n_base=base)
        assert len(rows) == 24 and len(requests) == asked


def test_a_first_phase_over_the_budget_is_refused():
    with pytest.raises(ValueError, match=r"algorithm\.n_base=9: expected at most group_size = 8"):
        collected(n_base=9)


# Examples


def solved(*pairs):
    return {"corpus": {k: {"prompt": np.array(p, np.int32), "solution": np.array(s, np.int32)} for k, p, s in pairs}}


MEMORY = solved(("7", [1, 30], [6]), ("1", [1, 11], [8]), ("9", [1, 11, 11], [4, 5]))


def test_a_prompt_that_fails_is_seeded_with_similar_solved_ones_but_not_with_itself():
    _, _, rows, requests = collected(MEMORY)
    assert requests[0].contexts[1].tolist() == [1, 11]
    assert requests[1].contexts[1].tolist() == [1, 30, 6, 1, 11, 11, 4, 5, 1, 11]  # the most similar is nearest
    assert [requests[1].contexts[g].tolist() for g in (0, 2)] == [[1, 10], [1, 12]]
    contexts = {tuple(r.context.tolist()) for r in rows if r.group == 1}
    assert len(contexts) == 2 and {r.extras["prompt_size"] for r in rows} == {2}


def test_examples_that_do_not_fit_are_left_out():
    assert collected(MEMORY, max_prompt=7)[3][1].contexts[1].tolist() == [1, 11, 11, 4, 5, 1, 11]
    assert collected(MEMORY, max_prompt=5)[3][1].contexts[1].tolist() == [1, 30, 6, 1, 11]
    assert collected(MEMORY, max_prompt=4)[3][1].contexts[1].tolist() == [1, 11]
    assert collected(MEMORY, examples=1)[3][1].contexts[1].tolist() == [1, 11, 11, 4, 5, 1, 11]
    assert collected()[3][1].contexts[1].tolist() == [1, 11]


def test_right_completions_join_the_corpus_with_their_plain_prompt():
    alg, _, rows, _ = collected(MEMORY)
    extras = alg.needs.row_extras
    packed = pack(rows, contexts=6, prompt_len=12, size=24, length=2, parts=1, extras=extras)
    _, memory = alg.observe((), MEMORY, jax.tree.map(jnp.asarray, packed), None, Report({}, {}, 1), None)
    corpus = host_state.decode(host_state.encode(memory))["corpus"]  # as a resumed run sees it
    assert sorted(corpus) == ["0", "1", "2", "7", "9"]
    assert corpus["0"]["prompt"].tolist() == [1, 10] and corpus["0"]["solution"].tolist() == [1, 5]
    assert corpus["1"]["solution"].tolist() == [8], "the first solution is kept"
    assert MEMORY["corpus"].keys() == {"7", "1", "9"}, "the memory before is not changed"


def test_a_seeded_row_is_stored_without_its_examples():
    alg, _, rows, _ = collected(solved(("7", [1, 30], [6])))
    packed = pack(rows, contexts=6, prompt_len=12, size=24, length=2, parts=1, extras=alg.needs.row_extras)
    won = packed.with_(reward=np.ones_like(packed.reward), stat=np.asarray(packed.prompt_length[packed.prompt] > 2))
    _, memory = alg.observe((), {}, won, None, Report({}, {}, 1), None)
    assert list(memory["corpus"]) == ["1"] and memory["corpus"]["1"]["prompt"].tolist() == [1, 11]


# The bonus and the loss

MASK = np.array([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1]], bool)
OLD = np.array([[-0.2, -0.4, 0], [-1.5, -0.9, -1.2], [-0.6, 0, 0], [-0.3, -0.5, -0.1]])
LOGP = OLD + np.array([[0.05, -0.1, 0], [0.3, 0, -0.2], [0.1, 0, 0], [-0.3, 0, 0]])


def batch(reward=(1, 1, 0, 0), mask=MASK):
    mask = np.asarray(mask, bool)
    return rollouts(mask, reward, np.zeros(4), OLD, {"prompt_id": np.zeros(4, int), "prompt_size": np.full(4, 2)})


def test_unlikely_right_answers_have_a_bounded_bonus(x64):
    credit = algorithms.make("xrpo").credit((), batch(), KEY)
    np.testing.assert_allclose(credit.extras["eta"], [1.34985881, 0.54881164, 1, 1.34985881], atol=5e-9)
    np.testing.assert_allclose(credit.advantage[:, 0], [0.99999800, 1.49999700, -0.99999800, -0.99999800], atol=5e-9)


def test_loss_and_gradient(x64):
    value, grad = loss_and_grad(algorithms.make("xrpo"), batch(), LOGP)
    np.testing.assert_allclose(value, -0.11222862, atol=5e-9)
    expected = [
        [-0.13140862, -0.11310445, 0],
        [0, -0.12499975, -0.10234114],
        [0.27629218, 0, 0],
        [0, 0.08333317, 0.08333317],
    ]
    np.testing.assert_allclose(grad, expected, atol=5e-9)


def test_an_empty_row_counts_in_rewards_but_not_in_likelihoods(x64):
    mask = MASK.copy()
    mask[1] = False
    credit = algorithms.make("xrpo").credit((), batch(mask=mask), KEY)
    s = np.array([-0.3, -0.6, -0.3])
    np.testing.assert_allclose(credit.extras["eta"], [*np.exp(s[:1] - s.mean()), 1, *np.exp(s[1:] - s.mean())])
    np.testing.assert_allclose(credit.advantage[0, 0], 0.99999800, atol=5e-9)


def test_without_the_bonus_it_is_grpo(x64):
    ours = loss_and_grad(algorithms.make("xrpo", lam_nov=0.0), batch(), LOGP)
    plain = loss_and_grad(algorithms.make("grpo", ddof=0), batch(), LOGP)
    for a, b in zip(ours, plain):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_a_group_that_agrees_has_no_bonus():
    assert not algorithms.make("xrpo").credit((), batch([1, 1, 1, 1]), KEY).advantage.any()


def test_it_trains_in_the_ordinary_loop_and_resumes_to_the_same_numbers(tmp_path):
    sections = {
        "run": {"steps": 3},
        "eval": {"size": 0},
        "learner": {"epochs": 1},
        "checkpoint": {"every": 1, "keep": 3, "export": False},
        "algorithm": {"name": "xrpo", "n_base": 2},
        "rollout": {"prompts": 4, "group_size": 4, "max_prompt": 24, "max_new": 4},
    }
    seen = {}

    def watch(step, rows, crash_at=None):
        letters(step, rows)
        if step == crash_at:
            raise RuntimeError("power cut")
        seen[step] = [(r.context.tolist(), r.tokens.tolist()) for r in rows]

    assert loop.train(configured(tmp_path / "straight", **sections), on_rows=watch) == 0
    straight = dict(seen)
    with pytest.raises(RuntimeError, match="power cut"):
        loop.train(configured(tmp_path / "cut", **sections), on_rows=lambda s, r: watch(s, r, 2))
    assert loop.train(configured(tmp_path / "cut", **sections), on_rows=watch) == 0
    assert seen == straight
    assert metrics_of(tmp_path / "cut") == metrics_of(tmp_path / "straight")


@pytest.mark.parametrize("fields", [{"n_base": 1}, {"phases": 1}, {"alpha": 0.0}, {"kappa": -1.0}])
def test_bad_settings_raise_one_clear_line(fields):
    with pytest.raises(ValueError, match=r"^algorithm\.\w+=.*: expected [^\n]*$"):
        algorithms.make("xrpo", **fields)
