"""pass@k, maj@k and evaluation with a scripted engine."""

import itertools
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny

from jaxrl_llm import config
from jaxrl_llm.models import decoder, hf
from jaxrl_llm.rollout.rows import STOP_LENGTH, STOP_TOKEN, Completion
from jaxrl_llm.tasks.base import Prompt, RewardSpec, Task
from jaxrl_llm.tasks.text import load_text
from jaxrl_llm.training import evaluate as ev


@pytest.mark.parametrize(("n", "correct", "k"), [(6, 2, 1), (6, 2, 3), (6, 2, 5), (6, 0, 2), (6, 6, 2), (4, 1, 4)])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n, correct, k):
    judged = [i < correct for i in range(n)]
    subsets = [any(s) for s in itertools.combinations(judged, k)]
    assert ev.pass_at_k(n, correct, k) == pytest.approx(np.mean(subsets), abs=1e-12)


def test_pass_at_k_is_unbiased():
    rng, p, n, k = np.random.default_rng(0), 0.3, 8, 4
    estimates = [ev.pass_at_k(n, int(c), k) for c in rng.binomial(n, p, 20000)]
    assert np.mean(estimates) == pytest.approx(1 - (1 - p) ** k, abs=0.01)


@pytest.mark.parametrize("k", [0, 4])
def test_k_outside_the_samples_is_refused(k):
    with pytest.raises(ValueError, match="between 1 and the 3 samples"):
        ev.pass_at_k(3, 1, k)
    with pytest.raises(ValueError, match="between 1 and the 3 samples"):
        ev.maj_at_k("abc", [True] * 3, k)


@pytest.mark.parametrize(
    ("answers", "correct", "k", "expected"),
    [
        ("aab", [1, 1, 0], 3, 1.0),
        ("abb", [1, 0, 0], 3, 0.0),
        ("ab", [1, 0], 2, 0.5),  # a tie
        ("aabbc", [1, 1, 0, 0, 0], 5, 0.5),
        ("abc", [1, 0, 0], 3, 1 / 3),
        ("aabb", [1, 1, 0, 0], 2, 0.5),  # two runs of two
        ("aab", [1, 1, 0], 2, 1.0),  # a short last run is left out
        ("aa", [1, 0], 2, 0.5),  # the same answer, judged twice
        ("ba", [0, 1], 1, 0.5),
    ],
)
def test_the_majority_decides_and_ties_are_averaged(answers, correct, k, expected):
    assert ev.maj_at_k(answers, [bool(c) for c in correct], k) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" 42 ", "42"),
        ("so \\boxed{1} or \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("steps\n#### 1,200", "1,200"),
        ("<think>3</think><answer> 7 </answer>", "7"),
        ("The answer is 12.", "12"),
        ("The answer is: $x$", "x"),
        ("\\boxed{unclosed", "\\boxed{unclosed"),
        ("", ""),
    ],
)
def test_the_answer_is_taken_out_of_a_completion(text, answer):
    assert ev.extract_answer(text) == answer


class ScriptedEngine:
    """Answers problem p with the digits p, p+1, ..; remembers what it was asked."""

    def __init__(self):
        self.calls = []

    def generate(self, contexts, n, **settings):
        self.calls.append((len(contexts), list(n), settings))
        return [[self.complete(int(c[0]), j) for j in range(k)] for c, k in zip(contexts, n)]

    def complete(self, problem, j):
        tokens = np.array([problem + j, 99], np.int32)
        logp = np.zeros(2, np.float32)
        return Completion(tokens, logp, logp, STOP_TOKEN if j == 0 else STOP_LENGTH, 0)


def digits(tokens):
    return "".join(str(t) for t in tokens if t != 99)


def scorer(pairs):
    return [{"exact": None if text == "bad" else float(text == record["answer"])} for text, record in pairs]


TASK = Task("t", [], [], (RewardSpec("exact", "exact"),))


def evaluate(problems, settings, score=scorer, batch=2, **more):
    prompts = [Prompt(i, np.array([first], np.int32), {"answer": answer}) for i, (first, answer) in enumerate(problems)]
    engine = ScriptedEngine()
    found = ev.evaluate(engine, prompts, TASK, score, digits, settings, seed=5, step=7, batch=batch, **more)
    return found, engine


def test_greedy_accuracy_of_scripted_answers():
    found, _ = evaluate([(1, "1"), (2, "2"), (3, "x")], config.Eval())
    assert found.metrics["accuracy"] == pytest.approx(2 / 3)
    assert found.metrics["pass@1"] == found.metrics["maj@1"] == found.metrics["accuracy"]
    assert found.metrics["problems"] == 3


def test_pass_and_majority_of_several_samples():
    found, _ = evaluate([(1, "2"), (5, "x")], config.Eval(k=[1, 2], samples=2))
    assert found.metrics["pass@1"] == 0.25
    assert found.metrics["pass@2"] == 0.5
    assert found.metrics["maj@2"] == 0.25
    assert found.metrics["completions/clipped_ratio"] == 0.5


def test_the_engine_sees_one_size_and_randomness_that_batching_does_not_change():
    problems = [(i, str(i)) for i in range(5)]
    settings = config.Eval(samples=3, temperature=0.7)
    _, engine = evaluate(problems, settings, batch=2)
    assert [(c, n) for c, n, _ in engine.calls] == [(2, [3, 3])] * 3
    assert [s["first_item"] for _, _, s in engine.calls] == [0, 6, 12]
    assert all(s["temperature"] == 0.7 and s["step"] == 7 for _, _, s in engine.calls)
    assert engine.calls[0][2]["seed"] != 5  # training's


def test_unscored_samples_leave_the_estimate_and_are_counted():
    flaky = lambda pairs: [{"exact": None if t == "2" else 1.0} for t, _ in pairs]  # noqa: E731
    found, _ = evaluate([(1, ""), (2, "")], config.Eval(samples=2, k=[2]), score=flaky)
    assert found.metrics["unscored/rows"] == 2
    assert found.metrics["accuracy"] == 1.0
    assert found.metrics["pass@2"] == 0.0  # no problem has two scored samples


def test_samples_show_prompt_completion_and_reward_of_different_problems():
    found, _ = evaluate([(1, "1"), (2, "x"), (3, "x")], config.Eval(samples=2), shown=2)
    sample, other = found.samples
    assert other.prompt == "2"
    assert (sample.prompt, sample.completion, sample.reward, sample.parts) == ("1", "1", 1.0, {"exact": 1.0})


def test_the_model_to_evaluate_is_the_named_one_then_the_export_then_the_start(tmp_path):
    settings = SimpleNamespace(run=SimpleNamespace(dir=str(tmp_path)), model=SimpleNamespace(path="start"))
    assert ev.model_directory(settings, "named") == "named"
    assert ev.model_directory(settings, None) == "start"
    (tmp_path / "export").mkdir()
    assert ev.model_directory(settings, None) == str(tmp_path / "export")


def test_a_process_that_does_not_see_the_export_takes_no_other_model(tmp_path, monkeypatch):
    settings = SimpleNamespace(run=SimpleNamespace(dir=str(tmp_path)), model=SimpleNamespace(path="start"))
    monkeypatch.setattr(ev.processes, "from_lead", lambda make, what: True)  # of a process 0 on another disk
    assert ev.model_directory(settings, None) == str(tmp_path / "export")


def test_nothing_to_evaluate_is_one_line(tmp_path):
    settings = SimpleNamespace(run=SimpleNamespace(dir=str(tmp_path)), model=SimpleNamespace(path=None))
    with pytest.raises(ValueError, match=r"run\.dir=.* --model"):
        ev.model_directory(settings, None)


def test_a_hugging_face_directory_is_evaluated_on_its_own(tmp_path, capsys):
    words = load_text(config.Tokenizer(chars="0123456789+="))
    spec = tiny.spec(vocab_size=words.vocab, eos_token_id=list(words.eos_ids), num_hidden_layers=1)
    hf.save(tmp_path / "model", spec, decoder.init(spec, jax.random.key(0)))
    words.save(tmp_path / "model")
    problems = [{"prompt": f"{a}+{a}=", "answer": str(2 * a)} for a in range(6)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    settings = config.Config(
        run=config.Run(dir=str(tmp_path / "run")),
        tokenizer=config.Tokenizer(chars="0123456789+="),
        task=config.FileTask(train=str(tmp_path / "problems.jsonl"), eval_size=3, reward="exact"),
        rewards=config.Rewards(workers=0),
        rollout=config.Rollout(prompts=2, group_size=2, max_prompt=8, max_new=4),
        eval=config.Eval(size=3, samples=2, k=[1, 2], temperature=1.0),
        mesh=config.Mesh(fsdp=1),
    )
    found = ev.run(settings, str(tmp_path / "model"))
    assert found["problems"] == 3
    assert {"accuracy", "pass@2", "maj@2", "reward/mean"} <= set(found)
    assert "pass@2" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
