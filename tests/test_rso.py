"""RSO, arXiv 2309.06657: known answers of its sampling, pairs and losses; candidates of the reference in the loop."""

import itertools

import jax
import numpy as np
import pytest
import scripted
from arrays import loss_and_grad, rollouts
from test_loop import assert_same_run, configured, letters

from jaxrl_llm import algorithms
from jaxrl_llm.objectives import preference
from jaxrl_llm.training import loop
from jaxrl_llm.types import REFERENCE

REWARDS = [0.2, 1.0, -0.3, 0.9, 0.4, 1.0]
UNIFORMS = [0.5, 0.99, 0.1, 0.7, 0.35, 0.2, 0.3, 0.15, 0.9, 0.05, 0.01, 0.6]
LOGP = [[-0.8, -0.7, -1.0], [-0.9, -1.0, -0.6]]
REF = [[-1.0, -0.5, -2.0], [-0.7, -1.1, -0.3]]
MASK = [[1, 1, 1], [1, 1, 0]]
KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("beta", "num", "expected"), [(0.5, 4, [1, 3, 5, 0]), (0.0, 3, [1, 5, 3]), (1e9, 4, [0, 1, 2, 3])]
)
def test_rejection_sampling(beta, num, expected):
    assert preference.rejection_sample(REWARDS, num, beta, iter(UNIFORMS)) == expected


def test_more_than_there_are_candidates_is_refused():
    with pytest.raises(ValueError, match="num=7: expected at most the 6 different candidates"):
        preference.rejection_sample(REWARDS, 7, 0.5, iter(UNIFORMS))


def test_all_candidates_are_accepted_in_the_end():
    uniform = np.random.default_rng(0).random
    assert sorted(preference.rejection_sample(REWARDS, 6, 0.2, iter(uniform, None))) == [0, 1, 2, 3, 4, 5]


def test_what_is_accepted_follows_the_tilted_distribution():
    rng, beta = np.random.default_rng(0), 0.4
    prior, reward = np.array([0.5, 0.2, 0.2, 0.08, 0.02]), np.array([0.0, 0.3, 0.5, 0.8, 0.2])
    hits = np.zeros(5)
    for _ in range(4000):
        drawn = rng.choice(5, 64, p=prior)
        hits[drawn[preference.rejection_sample(reward[drawn].tolist(), 1, beta, iter(rng.random, None))[0]]] += 1
    optimal = prior * np.exp(reward / beta)
    np.testing.assert_allclose(hits / 4000, optimal / optimal.sum(), atol=0.02)


def test_rounds_of_pairs():
    first = [(1, 0), (3, 2), (5, 4)]
    assert preference.round_pairs(REWARDS, range(6)) == first
    assert preference.round_pairs(REWARDS, range(6), tournament=True) == [*first, (1, 3), (1, 5)]
    assert preference.round_pairs([1, 2, 3], range(3)) == [(1, 0)]
    assert preference.round_pairs([1, 1], [1, 0]) == [(1, 0)]  # the first wins a tie
    for n in range(6):
        assert len(preference.round_pairs(REWARDS, range(n), tournament=True)) == max(n - 1, 0)


def test_reward_of_a_pairwise_model(x64):
    got = preference.pairwise_reward(np.array([0.5, 0.9, 0.2]))
    np.testing.assert_allclose(got, [0, 2.19722458, -1.38629436], atol=5e-9)


def test_a_tie_makes_a_pair_unless_dropped_and_its_first_still_passes_on():
    rows = rollouts(
        [[1]] * 6, [0.0, 0.0, 1.0, 0.0, 1.0, 1.0], [0, 0, 0, 0, 1, 1], extras={"ref_logp": np.zeros((6, 1))}
    )

    def met(**fields):
        alg = algorithms.make("rso", **fields)
        chosen = alg.select(alg.init(), {}, rows, alg.credit(alg.init(), rows, KEY), KEY)
        in_pairs = np.asarray(chosen.credit.extras["role"]) != 0
        return np.asarray(chosen.rows.row_id)[in_pairs].reshape(-1, 2).tolist()

    assert met() == [[0, 1], [2, 3], [4, 5]]
    assert met(drop_ties=True) == [[2, 3]]
    assert met(drop_ties=True, pairing="tournament") == [[2, 3], [2, 0]]


def run(logp=LOGP, **fields):
    alg = algorithms.make("rso", **fields)
    rows = rollouts(MASK, [1.0, 0.0], [0, 0], extras={"ref_logp": np.asarray(REF)})
    chosen = alg.select(alg.init(), {}, rows, alg.credit(alg.init(), rows, KEY), KEY)
    assert chosen.rows.row_id.tolist() == [0, 1]
    return loss_and_grad(alg, chosen.rows, logp, chosen.credit)


@pytest.mark.parametrize(
    ("loss", "value", "slope"),
    [("sigmoid_norm", 0.66602526, 0.02431267), ("hinge_norm", 0.945, 0.05), ("hinge", 1.03, 0.05)],
)
def test_losses(x64, loss, value, slope):
    got, grad = run(loss=loss)
    np.testing.assert_allclose(got, value, atol=5e-9)
    np.testing.assert_allclose(grad, [[-slope] * 3, [slope, slope, 0]], atol=5e-9)


def test_at_the_kink_of_the_hinge_there_is_no_gradient(x64):
    logp = np.array(REF) + np.array([[0.25, 0.25, 0.5], [0, 0, 0]])
    value, grad = run(logp, loss="hinge_norm", gamma=1.0)
    assert value == 0 and not grad.any()


def test_sigmoid_norm_is_dpo_with_gamma_for_beta(x64):
    alg = algorithms.make("dpo", beta=0.05)
    rows = rollouts(MASK, [1.0, 0.0], [0, 0], extras={"ref_logp": np.asarray(REF)})
    chosen = alg.select((), {}, rows, alg.credit((), rows, KEY), KEY)
    value, grad = loss_and_grad(alg, chosen.rows, LOGP, chosen.credit)
    same, same_grad = run()
    assert value == same
    np.testing.assert_array_equal(grad, same_grad)


def collect(step=0, tokens=None, **fields):
    """Candidates 0, 1, 2, ... of two prompts, each rewarded by its token."""
    plan = algorithms.make("rso", **fields).plan({"step": step})
    answer = tokens or (lambda context, i: [i])
    prompts = [scripted.prompt(i, [i + 1]) for i in range(2)]
    return scripted.collect(plan, prompts, lambda c, i: scripted.completion(answer(c, i)), lambda t: float(t[0]))


def test_the_reference_samples_the_candidates_and_the_best_are_kept():
    rows, (asked,) = collect(candidates=6, keep=3, beta=0.0)
    assert (asked.policy, list(asked.n)) == ("ref", [6, 6])
    assert [(r.group, r.tokens.tolist()) for r in rows] == [(g, [t]) for g in (0, 1) for t in (5, 4, 3)]
    assert all(r.source == REFERENCE for r in rows)


def test_the_thinning_is_a_function_of_the_step_and_the_prompt():
    def kept(step):
        return [r.tokens.tolist() for r in collect(step, candidates=16, keep=4, beta=10.0)[0]]

    assert kept(3) == kept(3) != kept(4)
    assert kept(3)[:4] != kept(3)[4:]


def test_a_repeated_completion_is_one_candidate_with_its_last_reward():
    rewards = itertools.count()
    plan = algorithms.make("rso", candidates=6, keep=4, beta=0.0).plan({"step": 0})
    rows, _ = scripted.collect(
        plan, [scripted.prompt(0, [1])], lambda c, i: scripted.completion([i % 3]), lambda tokens: next(rewards)
    )
    assert [(r.tokens.tolist(), r.reward.tolist()) for r in rows] == [([2], [5]), ([1], [4]), ([0], [3])]


def test_candidates_without_a_score_are_left_out():
    plan = algorithms.make("rso", candidates=3, keep=2, beta=0.0).plan({"step": 0})
    words = plan.collector(plan, [scripted.prompt(0, [1])])
    next(words)
    ask = words.send([[scripted.completion([i]) for i in range(3)]])
    for row, reward in zip(ask.rows, (1.0, np.nan, 0.0)):
        row.reward, row.scored = np.array([reward]), not np.isnan(reward)
    with pytest.raises(StopIteration) as done:
        words.send(None)
    assert [r.tokens.tolist() for r in done.value.value] == [[0], [2]]


RUN = {
    "run": {"steps": 4},
    "algorithm": {"name": "rso", "candidates": 8, "keep": 4, "gamma": 1.0},
    "learner": {"epochs": 1, "minibatches": 1},
    "reference": {"mode": "resident"},
    "eval": {"size": 0},
}


def candidates_of(directory, **sections):
    """The tokens that reach the learner in each step of a run."""
    seen = []

    def note(step, rows):
        seen.append([r.tokens.tolist() for r in rows])

    assert loop.train(configured(directory, **{**RUN, **sections}), on_rows=note) == 0
    return seen


def test_what_the_policy_learns_does_not_change_the_candidates_until_the_next_round(tmp_path):
    rewarded = {"rewards": {"workers": 0, "parts": [{"reward": "letter:1"}]}}
    still = candidates_of(tmp_path / "still", optimizer={"lr": 0.0}, **rewarded)
    moving = candidates_of(tmp_path / "moving", optimizer={"lr": 0.1}, **rewarded)
    rounds = {"reference": {"mode": "resident", "sync_every": 2}}
    again = candidates_of(tmp_path / "rounds", optimizer={"lr": 0.1}, **rewarded, **rounds)
    assert moving == still
    assert again[:2] == still[:2] and again[2] != still[2]


def test_a_resumed_run_equals_a_straight_one(tmp_path):
    def crash(step, rows):
        letters(step, rows)
        if step == 3:
            raise RuntimeError("power cut")

    sections = {**RUN, "reference": {"mode": "host", "sync_every": 2}}
    assert loop.train(configured(tmp_path / "straight", **sections), on_rows=letters) == 0
    with pytest.raises(RuntimeError, match="power cut"):
        loop.train(configured(tmp_path / "cut", **sections), on_rows=crash)
    assert loop.train(configured(tmp_path / "cut", **sections), on_rows=letters) == 0
    assert_same_run(tmp_path / "straight", tmp_path / "cut")


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"keep": 1}, "algorithm.keep=1: expected at least 2"),
        ({"candidates": 4}, "algorithm.candidates=4: expected at least keep=8"),
        ({"beta": -1.0}, "algorithm.beta=-1.0: expected at least 0"),
        ({"gamma": 0.0}, "algorithm.gamma=0.0: expected more than 0"),
    ],
)
def test_settings_without_a_meaning_are_refused(fields, line):
    with pytest.raises(ValueError) as error:
        algorithms.make("rso", **fields)
    assert str(error.value) == line
