"""Reward functions by name: what is right, what is wrong, and what cannot be scored."""

import json
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxrl_llm.advantages.overlong import soft_penalty
from jaxrl_llm.tasks.rewards import resolve

DATA = Path(__file__).parents[2] / "shared" / "data"


def reward(spec, completion, record=None, **options):
    return resolve(spec, options)(completion, record or {})


def test_exact_ignores_blanks_around_the_answer_only():
    assert reward("exact", " 42\n", {"answer": "42"}) == 1.0
    assert reward("exact", "4 2", {"answer": "42"}) == 0.0
    assert reward("exact", "Yes", {"answer": "yes"}) == 0.0
    assert reward("exact", "Yes", {"answer": "yes"}, ignore_case=True) == 1.0


def test_an_answer_pattern_takes_its_last_match():
    pattern = r"<answer>(.*?)</answer>"
    said = "<answer>1</answer> no, <answer> 42 </answer>!"
    assert reward("exact", said, {"answer": "42"}, answer_pattern=pattern) == 1.0
    assert reward("exact", "42", {"answer": "42"}, answer_pattern=pattern) == 0.0


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        ("The answer is 1080.", "1,080", 1.0),
        ("so \\boxed{1,080}", "1080", 1.0),
        ("so $\\boxed{1,\\!080}$", "1080", 1.0),
        ("#### 72", "72", 1.0),
        ("0.5", "\\frac{1}{2}", 1.0),
        ("\\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}", "\\left( 3, \\frac{\\pi}{2} \\right)", 1.0),
        ("It costs $18.90.", "\\$18.90", 1.0),
        ("The answer is 1081.", "1,080", 0.0),
        ("\\boxed{x+1}", "x-1", 0.0),
        ("I do not know", "3", 0.0),
        ("", "3", 0.0),
    ],
)
def test_math_compares_what_the_answers_mean(completion, answer, score):
    assert reward("math", completion, {"answer": answer}) == score


def test_math_with_an_unreadable_reference_cannot_be_scored():
    with pytest.raises(ValueError, match="cannot read the reference answer ''"):
        reward("math", "3", {"answer": ""})


def test_math_looks_only_where_the_answer_pattern_says():
    record = {"answer": "72"}
    assert reward("math", "#### 72\nor 73", record, answer_pattern=r"####\s*([^\n]+)") == 1.0
    assert reward("math", "72", record, answer_pattern=r"####\s*([^\n]+)") == 0.0


@pytest.mark.skipif(not (DATA / "gsm8k").is_dir(), reason="no gsm8k in ../shared/data")
def test_math_reads_every_answer_of_gsm8k():
    check = resolve("math")
    for line in (DATA / "gsm8k" / "test.jsonl").read_text().splitlines()[:300]:
        answer = json.loads(line)["answer"].split("#### ")[1]
        assert check(f"The answer is {answer}.", {"answer": answer}) == 1.0
        assert check(f"The answer is 1{answer}.", {"answer": answer}) == 0.0


@pytest.mark.skipif(not (DATA / "math").is_dir(), reason="no math in ../shared/data")
def test_math_accepts_every_solution_of_math500():
    check = resolve("math")
    for line in (DATA / "math" / "math500.jsonl").read_text().splitlines()[:200]:
        row = json.loads(line)
        assert check(f"Thus \\boxed{{{row['answer']}}}.", row) == 1.0, row["answer"]


def test_letter_is_the_share_of_a_character():
    assert reward("letter:e", "eel ") == 0.5
    assert reward("letter:e", "E") == 0.0
    assert reward("letter:e", "") == 0.0


def test_length_penalty_is_the_share_of_the_limit():
    assert reward("length_penalty", "any", {"completion_tokens": 25}, max_new=100) == -0.25


def test_overlong_is_the_same_penalty_as_the_one_on_arrays():
    lengths = [0, 79, 80, 81, 90, 99, 100]
    penalty = resolve("overlong", {"max_new": 100, "cache": 20})
    ours = [penalty("", {"completion_tokens": n}) for n in lengths]
    assert ours == pytest.approx(soft_penalty(jnp.array(lengths), 100, 20).tolist(), abs=1e-6)
    assert ours == pytest.approx([0, 0, 0, -0.05, -0.5, -0.95, -1])


def test_a_users_function_gets_completion_record_and_options(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def both(completion, record, factor=1):\n    return factor * record['x']\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)  # the working directory is searched
    assert reward("my_rewards:both", "", {"x": 2}) == 2
    assert reward("my_rewards:both", "", {"x": 2}, factor=3) == 6


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("maths", {}, "'maths', expected math, exact"),
        ("letter:ee", {}, "one character"),
        ("exact", {"patern": "x"}, "'exact' with options"),
        ("json:nothing", {}, "cannot be imported"),
        ("sys:path", {}, "is list, expected a function"),
        ("overlong", {"max_new": 10, "cache": 11}, "rewards.overlong_cache: 11, expected 1 to rollout.max_new=10"),
        ("length_penalty", {"max_new": 0}, "max_new"),
    ],
)
def test_a_reward_that_cannot_be_is_refused_in_one_line(spec, options, message):
    with pytest.raises(ValueError, match=message) as error:
        resolve(spec, options)
    assert "\n" not in str(error.value)
