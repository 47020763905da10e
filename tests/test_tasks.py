"""Problems: generated, read from files, or a user's own; held-out problems never occur in training."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxrl_llm import tasks
from jaxrl_llm.config import CustomTask, FileTask, GymTask, Rewards
from jaxrl_llm.tasks import gym
from jaxrl_llm.tasks.workers import Scorer

DATA = Path(__file__).parents[2] / "shared" / "data"
SUMS = {"name": "chain_sum", "config": {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}}


def sums(**settings):
    return GymTask(**{"datasets": [SUMS], "size": 1200, "eval_size": 100, "prompt": "{expression} =", **settings})


def asked(records):
    return [r["prompt"] for r in records]


def test_problems_are_a_function_of_the_seed_and_no_seed_is_anothers_neighbour():
    held_out, train = gym.generate(sums(), 0)
    assert gym.generate(sums(), 0) == (held_out, train)
    other = gym.generate(sums(), 1)[1]
    assert (
        len({*asked(train)} & {*asked(other)}) < 300
    )  # chance: 1200 · 1200 of 16,200; shifted streams would share nearly all


def test_every_prompt_is_generated_once_and_none_is_held_out_and_trained():
    held_out, train = gym.generate(sums(), 0)
    assert (len(held_out), len(train)) == (100, 1200)
    assert len({*asked(held_out), *asked(train)}) == 1300


def test_held_out_problems_do_not_depend_on_the_training_size():
    assert gym.generate(sums(size=10), 0)[0] == gym.generate(sums(), 0)[0]


def test_a_prompt_has_the_questions_expression_and_the_target_its_answer():
    record = gym.generate(sums(size=1, eval_size=1, target=" {answer}"), 0)[1][0]
    left, sign, right, equals = record["prompt"].split()
    assert int(record["answer"]) == int(left) + (int(right) if sign == "+" else -int(right)) and equals == "="
    assert record["target"] == " " + record["answer"]


def test_a_pattern_cuts_the_question():
    record = gym.generate(sums(size=1, eval_size=1, prompt="{question}", question_pattern="problem: (.*)"), 0)[1][0]
    assert len(record["prompt"]) == len("12 + 34 =")


def test_a_mixture_has_the_shares_of_its_weights():
    mixed = sums(datasets=[{**SUMS, "weight": 3}, {"name": "gcd"}], prompt="{question}")
    train = gym.generate(mixed, 0)[1]
    share = sum(r["gym"]["name"] == "chain_sum" for r in train) / len(train)
    assert 0.7 < share < 0.8


def test_training_starts_from_the_same_problems_in_every_process_and_scores_with_their_generator():
    """Two of these generators follow the order of a set of strings, one needs tuples that JSON would not keep."""
    names = ["isomorphic_strings", "ransom_note", "rearc", "chain_sum"]
    config = GymTask(datasets=[{"name": n} for n in names], size=12, eval_size=4)
    task = tasks.load(config)
    assert task == tasks.load(config)
    assert {r["gym"]["name"] for r in task.train} == set(names)
    with Scorer(task.rewards, timeout=60) as scorer:
        rows = [(f" {r['answer']}\n", r) for r in task.train] + [("nonsense", task.train[0])]
        scores = [parts["isomorphic_strings+ransom_note+rearc+chain_sum"] for parts in scorer.score(rows)]
    assert scores[:-1] == [1.0] * 12
    assert scores[-1] is not None and scores[-1] < 0.1


def test_the_generators_score_sees_the_answer_the_pattern_finds():
    task = tasks.load(sums(size=1, eval_size=1, answer_pattern="<a>(.*?)</a>"))
    answer = task.train[0]["answer"]
    with Scorer(task.rewards, timeout=60) as scorer:
        right, wrong, none = scorer.score([(t, task.train[0]) for t in (f"So <a>{answer}</a>.", "<a>x</a>", answer)])
    assert (right, wrong, none) == ({"chain_sum": 1.0}, {"chain_sum": 0.0}, {"chain_sum": 0.0})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"datasets": [{"name": "chain_sums"}]}, "no generator 'chain_sums', perhaps 'chain_sum'"),
        ({"datasets": [{"name": "chain_sum", "config": {"terms": 2}}]}, "chain_sum refuses its settings"),
        ({"datasets": [{"name": "chain_sum", "config": {"min_terms": 0}}]}, "min_terms must be positive"),
        ({"datasets": [{**SUMS, "config": {**SUMS["config"], "min_digits": 1, "max_digits": 1}}]}, "no more different"),
        ({"prompt": "{nothing}"}, "task.prompt: '{nothing}' fails.*'expression'"),
        ({"question_pattern": "never"}, "task.question_pattern: 'never' does not occur"),
    ],
)
def test_generators_that_cannot_serve_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        gym.generate(sums(**settings), 0)


def test_a_refusal_reaches_the_caller_in_one_line():
    with pytest.raises(ValueError, match=r"task.datasets: no generator 'x'") as error:
        tasks.load(sums(datasets=[{"name": "x"}]))
    assert "\n" not in str(error.value)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


ROWS = [{"question": f"{i} + {i}?", "answer": f"double\n#### {2 * i}", "level": i} for i in range(20)]


def rows_task(path, **settings):
    return FileTask(
        **{"train": path, "eval_size": 5, "prompt_field": "question", "answer_pattern": r"####\s*(.+)", **settings}
    )


def test_rows_become_problems_with_prompt_answer_target_and_their_fields(tmp_path):
    task = tasks.load(rows_task(write(tmp_path / "sums.jsonl", ROWS), prompt="Q: {prompt} ({level})"))
    record = task.train[0]
    i = record["level"]
    assert record["prompt"] == f"Q: {i} + {i}? ({i})"
    assert (record["answer"], record["target"]) == (str(2 * i), f"double\n#### {2 * i}")
    assert (task.name, task.rewards[0].spec) == ("sums", "math")


def test_held_out_rows_are_chosen_by_the_seed_and_kept_apart(tmp_path):
    config = rows_task(write(tmp_path / "sums.jsonl", [*ROWS, *ROWS]))
    task = tasks.load(config)
    assert len(task.eval) == 5 and len(task.train) == 30
    assert not {*asked(task.eval)} & {*asked(task.train)}
    assert task == tasks.load(config, seed=0)
    assert asked(task.eval) != asked(tasks.load(config, seed=1).eval)
    assert asked(tasks.load(config.model_copy(update={"seed": 0}), seed=1).eval) == asked(task.eval)


def test_a_training_row_that_the_held_out_file_has_too_is_left_out(tmp_path):
    train, held_out = write(tmp_path / "a.jsonl", ROWS), write(tmp_path / "b.jsonl", ROWS[:3])
    task = tasks.load(rows_task(train, eval=held_out))
    assert len(task.eval) == 3 and len(task.train) == 17
    assert len(tasks.load(rows_task(train, eval=held_out, eval_size=2)).eval) == 2


def test_parquet_rows_are_read_with_dates_as_text(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    from datetime import date

    from pyarrow import parquet

    rows = [{**row, "day": date(2024, 1, 1 + i)} for i, row in enumerate(ROWS)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "sums.parquet")
    task = tasks.load(rows_task(str(tmp_path / "sums.parquet")))
    assert asked(task.train) == asked(tasks.load(rows_task(write(tmp_path / "sums.jsonl", ROWS))).train)
    assert task.train[0]["day"].startswith("2024-01-")


def test_a_hub_data_set_without_the_extra_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'jaxrl_llm\[hub\]'"):
        tasks.load(rows_task("hub:openai/gsm8k:train"))


@pytest.mark.parametrize(
    ("source", "arguments"),
    [
        ("hub:openai/gsm8k", ("openai/gsm8k", "train")),
        ("hub:openai/gsm8k:test", ("openai/gsm8k", "test")),
        ("hub:openai/gsm8k:main:test", ("openai/gsm8k", "main", "test")),
    ],
)
def test_a_hub_data_set_is_named_with_subset_and_split(monkeypatch, source, arguments):
    def load_dataset(*where, split):
        assert (*where, split) == arguments
        return ROWS

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert len(tasks.load(rows_task(source)).train) == 15


def test_a_hub_data_set_that_cannot_be_loaded_is_refused_in_one_line(monkeypatch):
    def load_dataset(*where, split):
        raise RuntimeError("Config name is missing.\nPick one of: main")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ValueError, match=r"hub:openai/gsm8k cannot be loaded.*is missing\. Pick one of: main"):
        tasks.load(rows_task("hub:openai/gsm8k"))


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"question": ["a"], "answer": "#### 1"}], {}, "row 1: field 'question' is list, expected text"),
        (ROWS, {"answer_field": None}, "task.answer_field: is null, but reward 'math' needs"),
        (ROWS, {"prompt_field": "ask"}, r"row 1: no field 'ask', expected one of \['answer', 'level', 'question'\]"),
        (ROWS, {"answer_pattern": "never(.)"}, "row 1: task.answer_pattern 'never"),
        (ROWS, {"eval_size": 20}, "task.eval_size: 20, expected less than the 20 distinct rows"),
        ([[1]], {}, "line 1 is list, expected an object"),
    ],
)
def test_rows_that_cannot_serve_are_refused_in_one_line(tmp_path, rows, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        tasks.load(rows_task(write(tmp_path / "rows.jsonl", rows), **settings))
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_or_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no file '/nowhere\.jsonl'"):
        tasks.load(rows_task("/nowhere.jsonl"))
    (tmp_path / "x.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"'\.csv', expected \.jsonl or \.parquet"):
        tasks.load(rows_task(str(tmp_path / "x.csv")))
    (tmp_path / "x.jsonl").write_text("{}\n{")
    with pytest.raises(ValueError, match="line 2 is no JSON"):
        tasks.load(rows_task(str(tmp_path / "x.jsonl")))


@pytest.mark.skipif(not (DATA / "gsm8k").is_dir(), reason="no gsm8k in ../shared/data")
def test_gsm8k_loads_from_local_files_and_its_worked_answers_are_right():
    folder = DATA / "gsm8k"
    config = rows_task(f"{folder}/train.jsonl", eval=f"{folder}/test.jsonl", eval_size=2000)
    task = tasks.load(config)
    assert (len(task.train), len(task.eval)) == (7473, 1319)
    assert "1,080" in {r["answer"] for r in (*task.train, *task.eval)}
    with Scorer(task.rewards, workers=2, timeout=60) as scorer:
        rows = [(f"The answer is {r['answer']}.", r) for r in task.eval[:50]]
        assert scorer.score(rows) == [{"math": 1.0}] * 50


@pytest.mark.skipif(not (DATA / "math").is_dir(), reason="no math in ../shared/data")
def test_math_loads_from_local_files():
    folder = DATA / "math"
    config = FileTask(
        train=f"{folder}/math_other4500.jsonl",
        eval=f"{folder}/math500.jsonl",
        eval_size=500,
        prompt_field="problem",
        target_field="solution",
    )
    task = tasks.load(config)
    assert (len(task.train), len(task.eval)) == (4500, 500)
    assert "\\boxed" in task.train[0]["target"] and "\\boxed" not in task.train[0]["answer"]


CUSTOM = """
from jaxrl_llm.tasks.base import RewardSpec, Task

def make(n, shared=False):
    rows = [{"prompt": f"say {i}", "answer": str(i)} for i in range(n)]
    return Task("mine", rows[:-1], rows[-2:] if shared else rows[-1:], (RewardSpec("exact", "exact"),), 0.5)

def wrong():
    return []
"""


@pytest.fixture
def my_task(tmp_path, monkeypatch):
    (tmp_path / "my_task.py").write_text(CUSTOM)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_users_function_makes_the_task(my_task):
    task = tasks.load(CustomTask(function="my_task:make", options={"n": 4}))
    assert (task.name, len(task.train), len(task.eval), task.correct_at) == ("mine", 3, 1, 0.5)


def test_a_users_task_must_be_one_and_keep_its_held_out_problems_apart(my_task):
    with pytest.raises(ValueError, match="returned list, expected"):
        tasks.load(CustomTask(function="my_task:wrong"))
    with pytest.raises(ValueError, match="1 prompts both in train and in eval"):
        tasks.load(CustomTask(function="my_task:make", options={"n": 4, "shared": True}))


def test_parts_are_added_to_the_tasks_own_reward(my_task):
    rewards = Rewards(
        parts=[{"reward": "letter:e", "weight": 0.1}, {"reward": "length_penalty"}, {"reward": "judge"}],
        judge={"url": "http://127.0.0.1:1", "model": "m"},
        overlong_cache=4,
    )
    task = tasks.load(CustomTask(function="my_task:make", options={"n": 4}), rewards, max_new=16)
    assert [(r.name, r.weight) for r in task.rewards] == [
        ("exact", 1.0),
        ("letter_e", 0.1),
        ("length_penalty", 1.0),
        ("judge", 1.0),
        ("overlong", 1.0),
    ]
    with Scorer(task.rewards[:3] + task.rewards[4:], workers=0) as scorer:
        record = {**task.train[0], "completion_tokens": 14}
        assert scorer.score([("0", record)]) == [
            {"exact": 1.0, "letter_e": 0.0, "length_penalty": -0.875, "overlong": -0.5}
        ]


def test_a_part_named_twice_or_a_judge_that_is_nowhere_is_refused(my_task):
    mine = CustomTask(function="my_task:make", options={"n": 4})
    with pytest.raises(ValueError, match="name a part twice"):
        tasks.load(mine, Rewards(parts=[{"reward": "exact"}]))
    with pytest.raises(ValueError, match=r"rewards.judge: is missing"):
        tasks.load(mine, Rewards(parts=[{"reward": "judge"}]))
