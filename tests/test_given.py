"""Completions that come with the problems: preference files, what is refused of them, and runs that train on them."""

import json

import numpy as np
import pytest
import scripted
from test_loop import assert_same_run, configured, metrics_of

from jaxrl_llm import algorithms, config_check
from jaxrl_llm.config import FileTask
from jaxrl_llm.rollout import collectors
from jaxrl_llm.tasks import files, rewards
from jaxrl_llm.tasks.base import Prompt
from jaxrl_llm.tasks.data import Tokenized, without_long_completions
from jaxrl_llm.training import loop
from jaxrl_llm.types import GIVEN

FIELDS = {"chosen_field": "chosen", "rejected_field": "rejected", "answer_field": None, "reward": "preferred"}
PAIRS = [
    {"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": [str(a + b + 1)]} for a in range(4) for b in range(4)
]


def written(directory, rows):
    path = directory / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def load(directory, rows, **fields):
    return files.load(FileTask(train=written(directory, rows), eval_size=0, **{**FIELDS, **fields}), 0)


def test_a_text_and_a_list_of_texts_are_read_alike(tmp_path):
    task = load(tmp_path, PAIRS)
    assert task.train[1]["chosen"] == ["1"] and task.train[1]["rejected"] == ["2"]
    renamed = [{"prompt": "1+1=", "good": ["2", "+2"], "bad": "3"}]
    task = load(tmp_path, renamed, chosen_field="good", rejected_field="bad")
    assert task.train[0]["chosen"] == ["2", "+2"] and task.train[0]["rejected"] == ["3"]


def test_a_row_without_both_is_an_ordinary_problem_and_one_with_both_needs_no_answer(tmp_path):
    rows = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "1+2=", "chosen": "3", "rejected": "4"}]
    task = load(tmp_path, rows, answer_field="answer", reward="exact")
    assert "chosen" not in task.train[0] and task.train[0]["answer"] == "2"
    assert task.train[1]["chosen"] == ["3"] and "answer" not in task.train[1]


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"chosen": "2"}, "row 1: no field 'rejected', expected it beside 'chosen'"),
        ({"rejected": "2", "chosen": None}, "row 1: no field 'chosen', expected it beside 'rejected'"),
        ({"chosen": 2, "rejected": "3"}, "row 1: field 'chosen' is '2', expected text or a list of texts"),
        ({"chosen": "2", "rejected": []}, r"row 1: field 'rejected' is '\[\]', expected text or a list of texts"),
        ({"chosen": [{"role": "assistant"}], "rejected": "3"}, "row 1: field 'chosen' is .*, expected text or a list"),
        ({"chosen": ["2", "3"], "rejected": "3"}, "row 1: '3' is both chosen and rejected, expected different"),
    ],
)
def test_a_bad_row_is_refused_in_one_line(tmp_path, row, line):
    with pytest.raises(ValueError, match=line) as error:
        load(tmp_path, [{"prompt": "1+1=", **row}])
    assert "\n" not in str(error.value)


def test_the_reward_preferred_knows_the_chosen_completions():
    reward = rewards.resolve("preferred")
    assert [reward(said, {"chosen": ["2", " 3"]}) for said in ("2", "3 ", "4")] == [1, 1, 0]


def test_given_completions_become_rows_with_rewards_one_and_zero():
    prompts = [scripted.prompt(i, [i], chosen=[f"{i}1"], rejected=[f"{i}2", f"{i}3"]) for i in (4, 5)]
    plan = algorithms.make("dpo", pairs="given").plan(())
    assert plan.collector is collectors.preferences
    rows, requests = scripted.collect(plan, prompts, lambda c, i: None, lambda t: None)
    assert not requests
    assert [(r.group, r.tokens.tolist(), float(r.reward[0]), r.source) for r in rows] == [
        (g, [4 + g, k, scripted.EOS], float(k == 1), GIVEN) for g in (0, 1) for k in (1, 2, 3)
    ]
    assert all(r.mask.all() and not r.truncated for r in rows)


class Letters:
    """One token per character."""

    def encode(self, text):
        return np.zeros(len(text), np.int32)


def prompts_of(*lengths):
    record = lambda n: {"chosen": ["x" * n], "rejected": ["x"]}  # noqa: E731
    return Tokenized([Prompt(i, np.zeros(1, np.int32), record(n)) for i, n in enumerate(lengths)], 2)


def test_problems_with_long_completions_are_dropped_and_counted_or_refused():
    kept, dropped = without_long_completions(prompts_of(3, 4, 2), Letters(), max_new=4)  # the end is a token too
    assert [p.id for p in kept] == [0, 2] and dropped == 3
    with pytest.raises(ValueError, match=r"rollout.max_new: 4, but given completions of 1 of 3 problems are longer"):
        without_long_completions(prompts_of(3, 4, 2), Letters(), 4, "error")
    with pytest.raises(ValueError, match=r"of 2 of 2 problems are longer \(up to 10 tokens\)"):
        without_long_completions(prompts_of(9, 8), Letters(), 4)


def run_of(directory, rows, task=None, **sections):
    """A run on a file of these rows; `task` changes its task."""
    sections = {
        "run": {"steps": 4},
        "algorithm": {"name": "dpo", "pairs": "given"},
        "rollout": {"prompts": 4, "group_size": 2, "max_prompt": 10, "max_new": 4},
        "learner": {"epochs": 1, "minibatches": 2},
        "reference": {"mode": "resident"},
        "eval": {"size": 0},
        **sections,
    }
    config = configured(directory / "run", **sections)
    own = {"kind": "file", "train": written(directory, rows), "eval_size": 0, **FIELDS, **(task or {})}
    return type(config).model_validate({**config.model_dump(mode="json"), "task": own})


def test_dpo_learns_the_preferences_of_a_file(tmp_path):
    ones = [{**row, "chosen": "1", "rejected": "2"} for row in PAIRS]
    config = run_of(tmp_path, ones, run={"steps": 12}, learner={"epochs": 1, "minibatches": 1})
    config_check.check(config)
    assert loop.train(config_check.check_method(config)) == 0
    lines = metrics_of(tmp_path / "run")
    loss = [line["loss"] for line in lines]
    assert loss[0] == pytest.approx(np.log(2), abs=1e-6) and loss[-1] < loss[0]
    assert lines[-1]["rewards/margin"] > 0 == lines[0]["rewards/margin"] and lines[-1]["rewards/accuracy"] == 1
    assert lines[-1]["epoch"] == 12 * 4 / 16 and lines[-1]["updates"] == 1


@pytest.mark.parametrize("name", ["dpo", "oorl_gepo"])
def test_a_resumed_run_equals_a_straight_one(tmp_path, name):
    def crash(step, rows):
        if step == 3:
            raise RuntimeError("power cut")

    given = {"name": "dpo", "pairs": "given"} if name == "dpo" else {"name": name}
    task = {} if name == "dpo" else {"answer_field": "answer", "reward": "exact"}
    problems = [] if name == "dpo" else [{"prompt": f"{a}+9=", "answer": str(a + 9)} for a in range(8)]
    configs = []
    for directory in (tmp_path / "straight", tmp_path / "cut"):
        directory.mkdir()
        configs.append(run_of(directory, PAIRS + problems, algorithm=given, task=task))
    assert loop.train(configs[0]) == 0
    with pytest.raises(RuntimeError, match="power cut"):
        loop.train(configs[1], on_rows=crash)
    assert loop.train(configs[1]) == 0
    assert_same_run(tmp_path / "straight" / "run", tmp_path / "cut" / "run")


@pytest.mark.parametrize(
    ("rows", "sections", "line"),
    [
        ([*PAIRS, {"prompt": "9+9="}], {}, "training problem 17 of pairs has none, expected chosen and rejected ones"),
        ([{"prompt": "1+1="}], {"algorithm": {"name": "oorl_gepo"}}, "training problem 1 of pairs has none"),
        (
            [{**PAIRS[0], "rejected": ["2", "3"]}],
            {},
            "rollout.group_size=2: training problem 1 of pairs has more given completions, expected at least 3",
        ),
    ],
)
def test_what_the_problems_contradict_is_refused(tmp_path, rows, sections, line):
    with pytest.raises(ValueError) as error:
        loop.train(run_of(tmp_path, rows, **sections))
    assert line in str(error.value) and "\n" not in str(error.value)


def test_a_method_that_samples_refuses_given_completions(tmp_path):
    config = run_of(tmp_path, PAIRS, algorithm={"name": "dpo"})
    with pytest.raises(
        ValueError, match=r"task.chosen_field='chosen': dpo with these settings samples its completions"
    ):
        config_check.check_method(config)


def test_one_field_alone_is_refused(tmp_path):
    config = run_of(tmp_path, PAIRS, task={"rejected_field": None})
    with pytest.raises(ValueError, match=r"task.chosen_field='chosen': task.rejected_field is None, expected both"):
        config_check.check(config)
