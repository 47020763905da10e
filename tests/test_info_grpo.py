"""Information-consistent GRPO, arXiv 2512.12858: the known answers of its specification, in float64, and its phrasings."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scripted
from arrays import rollouts
from test_loop import configured

from jaxrl_llm import algorithms
from jaxrl_llm.advantages import consistency
from jaxrl_llm.algorithms import info_grpo
from jaxrl_llm.algorithms.base import Plan
from jaxrl_llm.config import FileTask
from jaxrl_llm.rollout.rows import pack
from jaxrl_llm.tasks import data, files
from jaxrl_llm.tasks.rewards import resolve
from jaxrl_llm.training import loop

RESPONSES = ["aabb", "abcd", "aaab", "abc", "aaaa", "abab"]
ENTROPY = [0.69314718, 1.38629436, 0.56233514, 1.09861229, 0, 0.69314718]
HELPFUL = [0.5, 1.0, 0.40563906, 0.79248125, 0, 0.5]
STABLE = [0.625, 0.30953512, 0.56546488, 0.31546488, 0.18453512, 0.5]
ADVANTAGE = [-0.06020175, 1.02756033, -0.96735858, 0.68067813, -1.14762844, 0.46695032]
HELPFUL_ALONE = [-0.42304509, 1.14132012, -0.71827503, 0.90200795, -1.07453332, 0.17252537]
INTENT = [0, 0, 0, 1, 1, 1]
KEY = jax.random.key(0)


def close(actual, expected, tol=6e-9):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tol)


def entropies():
    return [resolve("text_entropy", {"unit": "character"})(text, {}) for text in RESPONSES]


def credit(**fields):
    rows = rollouts(np.ones((6, 1)), entropies(), INTENT, extras={"ref_logp": np.zeros((6, 1))})
    return algorithms.make("info_grpo", **fields).credit((), rows, KEY)


def test_entropy_of_a_text_is_that_of_its_own_characters_or_words():
    close(entropies(), ENTROPY)
    words = resolve("text_entropy")
    close(words("gold oil gold  bonds", {}), 1.5 * np.log(2))
    assert words("", {}) == 0
    with pytest.raises(ValueError, match="text_entropy: unit='line', expected character or word"):
        resolve("text_entropy", {"unit": "line"})


def test_rewards_and_advantages(x64):
    got = credit()
    close(got.extras["helpfulness"], HELPFUL)
    close(got.extras["stability"], STABLE)
    close(got.advantage[:, 0], ADVANTAGE)


def test_stability_of_two_phrasings(x64):
    h = jnp.array(entropies())
    close(consistency.aggregate_stability(h[:3], h[3:]), 0.53771927)
    assert consistency.aggregate_stability(h[:3], h[:3]) == 1


def test_a_constant_of_the_group_cancels_unless_advantages_are_over_the_batch(x64):
    close(credit(beta=0.0, alpha=1.0).advantage[:, 0], HELPFUL_ALONE, 1e-3)
    halved = credit(beta=0.0).advantage[:, 0]
    close(halved, HELPFUL_ALONE, 1e-8)
    over_batch = credit(stability="group", normalize="batch")
    stable = np.repeat([np.mean(STABLE[:3]), np.mean(STABLE[3:])], 3)
    close(over_batch.extras["stability"], stable, 1e-8)
    reward = (np.array(HELPFUL) + stable) / 2
    close(over_batch.advantage[:, 0], (reward - reward.mean()) / (reward.std(ddof=1) + 1e-4), 1e-7)
    with pytest.raises(ValueError) as error:
        algorithms.make("info_grpo", stability="group")
    expected = "algorithm.stability='group': expected row, as a constant of the group cancels with normalize=group"
    assert str(error.value) == expected


def test_equal_answers_are_stable_and_helpful_and_have_no_advantage(x64):
    rows = rollouts(np.ones((3, 1)), [0.3] * 3, [0, 0, 1], extras={"ref_logp": np.zeros((3, 1))})
    got = algorithms.make("info_grpo").credit((), rows, KEY)
    np.testing.assert_array_equal(got.extras["helpfulness"], 1)
    np.testing.assert_array_equal(got.extras["stability"], 1)
    assert not got.advantage.any()


def test_bounds_of_entropy_may_be_fixed(x64):
    got = consistency.helpfulness(jnp.array([0.5, 1, 2, 4]), jnp.ones(4, bool), 1.0, 3.0)
    close(got, [0, 0, 0.5, 1], 1e-14)


def prompts():
    """Two requests: one with three phrasings, one with one."""
    first, second = scripted.prompt(0, [1]), scripted.prompt(1, [2, 2])
    return [first._replace(phrasings=(np.array([3, 3], np.int32), np.array([4], np.int32))), second]


def collected(most, group_size):
    plan = Plan(group_size=group_size, collector=info_grpo.across_phrasings(most))
    return scripted.collect(plan, prompts(), lambda context, n: scripted.completion([n]), lambda tokens: tokens[0])[0]


def test_completions_of_a_request_are_dealt_evenly_to_its_phrasings_and_compared():
    rows = collected(4, 4)
    contexts = [row.context.tolist() for row in rows]
    assert contexts == [[1], [1], [3, 3], [4], [2, 2], [2, 2], [2, 2], [2, 2]]
    assert [row.group for row in rows] == [0] * 4 + [1] * 4
    assert [float(row.reward[0]) for row in rows] == [0, 1, 0, 0, 0, 1, 2, 3]
    plan = algorithms.make("info_grpo").plan(())
    contexts_size, size = plan.capacity(2, 4)
    batch = pack(rows, contexts=contexts_size, prompt_len=2, size=size, length=1, parts=1)
    assert batch.prompt.tolist() == [0, 0, 1, 2, 3, 3, 3, 3]


def test_no_more_phrasings_than_asked_for_or_than_completions():
    assert [row.context.tolist() for row in collected(2, 4)][:4] == [[1], [1], [3, 3], [3, 3]]
    assert [row.context.tolist() for row in collected(4, 1)] == [[1], [2, 2]]


class Words:
    """A tokenizer of one token for each character."""

    def encode_prompt(self, prompt):
        text = prompt if isinstance(prompt, str) else prompt["prompt"]
        return np.array([ord(c) for c in text], np.int32)


def test_phrasings_of_a_problem_are_tokenized_and_a_long_one_drops_the_problem():
    records = [{"prompt": "ab", "phrasings": ["c", "def"]}, {"prompt": "a", "phrasings": ["bcde"]}, {"prompt": "x"}]
    found, dropped = data.tokenize(records, Words(), max_prompt=3)
    assert dropped == 1
    assert [len(p.phrasings) for p in found] == [2, 0]
    assert found[0].phrasings[1].tolist() == [ord(c) for c in "def"]
    with pytest.raises(ValueError, match="task: problem 1 has phrasings='no', expected a list of prompts"):
        data.tokenize([{"prompt": "a", "phrasings": "no"}], Words(), max_prompt=3)


def test_a_file_tasks_template_is_for_phrasings_too():
    config = FileTask(train="t.jsonl", prompt="Q: {prompt}", answer_field=None, reward="text_entropy")
    record = files._record(config, {"prompt": "what", "phrasings": ["which", "say what"]}, "row 1")
    assert record["phrasings"] == ["Q: which", "Q: say what"]


def test_a_run_with_phrasings_trains(tmp_path):
    problems = [{"prompt": f"{i}+1 =", "phrasings": [f"1+{i} =", f"{i}--1 ="]} for i in range(6)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, problems)))
    task = {"kind": "file", "train": str(tmp_path / "t.jsonl"), "eval_size": 1, "answer_field": None}
    config = configured(
        tmp_path / "run",
        run={"steps": 1, "samples_every": 1},
        algorithm={"name": "info_grpo", "kl_coef": 0.0},
        learner={"epochs": 1},
        eval={"size": 0},
    ).model_copy(update={"task": FileTask(**task, reward="text_entropy", reward_options={"unit": "character"})})
    assert loop.train(config) == 0
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert 0 < line["reward/helpfulness"] < 1 and 0 < line["reward/stability"] < 1 and line["grad_norm"] > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"h_min": 2.0, "h_max": 1.0}, "algorithm.h_min=2.0: expected less than h_max=1.0"),
        ({"phrasings": 0}, "algorithm.phrasings=0: expected at least 1"),
    ],
)
def test_contradictory_settings_raise_one_clear_line(fields, message):
    with pytest.raises(ValueError) as error:
        algorithms.make("info_grpo", **fields)
    assert str(error.value) == message
