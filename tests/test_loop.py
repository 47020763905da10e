"""Whole runs of the loop, tiny: what a run writes, that a resumed run equals a straight one, that every method fits."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jaxrl_llm import algorithms
from jaxrl_llm.config import Config
from jaxrl_llm.rollout import collectors
from jaxrl_llm.rollout.engine import Engine
from jaxrl_llm.training import build, loop
from jaxrl_llm.training.checkpoints import Checkpoints
from jaxrl_llm.training.learner import Learner

CLOCKS = ("timing/", "tokens_per_second", "mfu", "memory/", "recompiles")

BASE = {
    "run": {"steps": 4, "samples_every": 2},
    "model": {
        "spec": {
            "model_type": "qwen3",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "max_position_embeddings": 32,
            "tie_word_embeddings": True,
        }
    },
    "tokenizer": {"chars": "0123456789+-= "},
    "task": {
        "kind": "reasoning_gym",
        "datasets": [
            {"name": "chain_sum", "config": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}
        ],
        "size": 24,
        "eval_size": 8,
        "prompt": "{expression} =",
        "target": " {answer}",
    },
    "rewards": {"workers": 0},
    "rollout": {"prompts": 4, "group_size": 4, "max_prompt": 10, "max_new": 4},
    "algorithm": {"name": "grpo"},
    "learner": {"epochs": 2, "minibatches": 2},
    "optimizer": {"lr": 1e-2},
    "eval": {"size": 8},
    "checkpoint": {"every": 2, "keep": 3, "export": False},
    "mesh": {"fsdp": 1},
}


def configured(directory, **sections) -> Config:
    merged = json.loads(json.dumps(BASE))
    for name, values in sections.items():
        merged[name] = {**merged.get(name, {}), **values} if name != "algorithm" else values
    merged["run"]["dir"] = str(directory)
    return Config.model_validate(merged)


def letters(step, rows):
    """A reward every policy can move: the share of the digit 1, instead of the sums nobody learns in four steps."""
    for row in rows:
        share = float(np.mean(row.tokens == 4)) if len(row.tokens) else 0.0
        row.reward[:] = share


def metrics_of(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(CLOCKS)} for line in lines]


def saved(directory):
    """Every array of the newest checkpoint, by name."""
    with Checkpoints(directory / "checkpoints", keep=3) as checkpoints:
        step = checkpoints.steps()[-1]
    import orbax.checkpoint as ocp

    arrays = ocp.PyTreeCheckpointer().restore(directory / "checkpoints" / str(step) / "arrays")
    return step, jax.tree.map(np.asarray, arrays)


def assert_same_run(a, b):
    assert metrics_of(a) == metrics_of(b)
    (step_a, arrays_a), (step_b, arrays_b) = saved(a), saved(b)
    assert step_a == step_b
    jax.tree.map(np.testing.assert_array_equal, arrays_a, arrays_b)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    directory = tmp_path_factory.mktemp("straight")
    assert loop.train(configured(directory), on_rows=letters) == 0
    return directory


def test_a_run_writes_one_line_of_metrics_per_step_with_the_names_users_know(straight):
    lines = [line for line in metrics_of(straight) if "reward/mean" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    wanted = {"reward/std", "frac_reward_zero_std", "grad_norm", "loss", "lr", "clip_ratio/low", "clip_ratio/high"}
    wanted |= {"completions/mean_length", "completions/clipped_ratio", "sampling/logp_difference_mean"}
    assert wanted <= set(lines[0])
    assert lines[-1]["updates"] == 4
    assert (straight / "config.yaml").exists() and (straight / "about.jsonl").exists()


def test_a_run_writes_samples_with_rewards_and_advantages(straight):
    lines = [json.loads(line) for line in (straight / "samples.jsonl").read_text().splitlines()]
    training = [line for line in lines if line["tag"] == "samples"]
    assert {line["step"] for line in training} == {2, 4}
    assert all({"prompt", "completion", "reward", "advantage", "stop"} <= set(line) for line in training)


def test_learner_and_sampler_agree_on_every_sampled_token(straight):
    assert max(line.get("sampling/logp_difference_max", 0.0) for line in metrics_of(straight)) < 1e-4


def test_a_run_that_crashed_between_checkpoints_resumes_to_the_same_numbers(straight, tmp_path):
    def crash(step, rows):
        letters(step, rows)
        if step == 3:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        loop.train(configured(tmp_path), on_rows=crash)
    assert loop.train(configured(tmp_path), on_rows=letters) == 0
    assert_same_run(straight, tmp_path)


@pytest.mark.parametrize(
    "method",
    [
        {"name": "epo", "steps": 4},
        {"name": "gtpo"},
        {"name": "riskpo", "bundle": 2},
        {"name": "bupo", "layer": 0, "s_inter": 3},  # the phase changes after the run is resumed
    ],
    ids=lambda method: method["name"],
)
def test_what_a_method_keeps_across_steps_is_resumed_to_the_same_numbers(method, tmp_path):
    def run(directory):
        return configured(directory, algorithm=method, eval={"size": 0}, learner={"epochs": 1})

    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert loop.train(run(straight), on_rows=letters) == 0
    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "checkpoints" / "4")  # the newest is that of step 2 now
    assert loop.train(run(resumed), on_rows=letters) == 0
    assert_same_run(straight, resumed)


def test_sigterm_saves_the_step_and_exits_0_and_the_run_goes_on_from_there(straight, tmp_path):
    def interrupt(step, rows):
        letters(step, rows)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    assert loop.train(configured(tmp_path), on_rows=interrupt) == 0
    assert saved(tmp_path)[0] == 3
    assert loop.train(configured(tmp_path), on_rows=letters) == 0
    assert_same_run(straight, tmp_path)


def test_an_existing_run_with_another_config_is_refused_and_left_alone(straight):
    before = (straight / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"optimizer\.lr"):
        loop.train(configured(straight, optimizer={"lr": 1e-3}))
    assert (straight / "metrics.jsonl").read_bytes() == before


KILLED = """
import json, sys
from tests.test_loop import configured, letters
from jaxrl_llm.training import build, loop
import pathlib
sys.exit(loop.train(configured(pathlib.Path(sys.argv[1])), on_rows=letters))
"""


def test_a_run_killed_with_signal_9_resumes_to_the_same_numbers(straight, tmp_path):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], env=env, stdout=subprocess.DEVNULL)
    metrics = tmp_path / "metrics.jsonl"
    give_up = time.monotonic() + 300
    while time.monotonic() < give_up and process.poll() is None:
        if metrics.exists() and '"step": 3' in metrics.read_text():
            break
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert loop.train(configured(tmp_path), on_rows=letters) == 0
    assert_same_run(straight, tmp_path)


def test_the_learner_has_the_memory_of_generation_s_weights(tmp_path, monkeypatch):
    engines, free = [], []
    begin, learn = Engine.set_weights, Learner.update

    def noted(engine, *args):
        engines.append(engine)
        begin(engine, *args)

    def watched(learner, *args):
        free.append(all(engine._weights is None and engine._params is None for engine in engines))
        return learn(learner, *args)

    monkeypatch.setattr(Engine, "set_weights", noted)
    monkeypatch.setattr(Learner, "update", watched)
    assert loop.train(configured(tmp_path, run={"steps": 2}, eval={"size": 8, "every": 1}), on_rows=letters) == 0
    assert engines and free == [True, True]


def test_a_reward_that_says_nothing_costs_its_row_and_is_counted(tmp_path):
    def silent(step, rows):
        letters(step, rows)
        for row in rows[::3]:
            row.scored = False
            row.reward[:] = np.nan

    assert loop.train(configured(tmp_path, run={"steps": 2}), on_rows=silent) == 0
    line = next(line for line in metrics_of(tmp_path) if "unscored/rows" in line)
    assert line["unscored/rows"] == 6
    assert np.isfinite(line["loss"]) and np.isfinite(line["grad_norm"])


def test_a_group_left_with_one_scored_row_warns_once_and_trains_on(tmp_path):
    def leave_one(step, rows):
        letters(step, rows)
        for row in rows[1:4]:
            row.scored = False

    with pytest.warns(UserWarning, match="nothing to be compared with") as warned:
        assert loop.train(configured(tmp_path, run={"steps": 2}), on_rows=leave_one) == 0
    assert len([w for w in warned if "nothing to be compared with" in str(w.message)]) == 1
    line = next(line for line in metrics_of(tmp_path) if "groups_of_one" in line)
    assert line["groups_of_one"] == 1 and np.isfinite(line["grad_norm"])


def test_a_batch_that_cannot_be_made_ends_the_run_with_its_steps_saved(tmp_path, monkeypatch, capsys):
    def fussy(max_draws):
        def collect(plan, prompts):
            if fussy.batches == 0:
                raise collectors.CollectError("no such groups")
            fussy.batches -= 1
            return (yield from collectors.flat(plan, prompts))

        return collect

    fussy.batches = 3
    monkeypatch.setattr(collectors, "dynamic", fussy)
    config = configured(tmp_path, algorithm={"name": "grpo", "dynamic_sampling": True}, checkpoint={"every": 2})
    assert loop.train(config, on_rows=letters) == 1
    assert "stopped: no such groups" in capsys.readouterr().err
    assert saved(tmp_path)[0] == 3
    fussy.batches = 1
    assert loop.train(config, on_rows=letters) == 0


def no_device_work(*_):
    raise AssertionError("the model was built")


@pytest.mark.parametrize(
    "sections, line",
    [
        ({"eval": {"size": 9}}, "eval.size=9: more than the 8 held-out problems of the task, expected at most 8"),
        (
            {"algorithm": {"name": "spo_single", "pool": 23}},
            "algorithm.pool=23: spo_single has no room for all problems of the task, expected at least 24",
        ),
    ],
)
def test_what_the_problems_contradict_is_refused_before_device_work(sections, line, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "model", no_device_work)
    with pytest.raises(ValueError) as error:
        loop.train(configured(tmp_path, **sections))
    assert str(error.value) == line


# What a method needs of the config besides its name; the rest of BASE is the same for all.
NEEDS = {
    "bupo": {"algorithm": {"name": "bupo", "layer": 0}},
    "e_grpo": {"rewards": {"workers": 0, "parts": [{"reward": "length_penalty"}]}},  # `letters` sets both parts
    "rso": {"algorithm": {"name": "rso", "candidates": 8, "keep": 4}},
    "s_grpo": {"rollout": {"prompts": 2, "group_size": 3, "max_prompt": 10, "max_new": 16}},
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model directory built like the policy of these runs."""
    directory = tmp_path_factory.mktemp("exported")
    nothing = {"run": {"steps": 0}, "eval": {"size": 0}, "checkpoint": {"export": True}}
    assert loop.train(configured(directory, **nothing)) == 0
    return str(directory / "export")


@pytest.mark.parametrize("name", algorithms.names())
def test_every_method_trains_in_the_same_loop(name, tmp_path, request):
    needs = algorithms.make(name).needs
    if needs.scorer != "causal" or set(needs.row_extras) - {"prompt_id"}:
        pytest.skip(f"{name} needs rows of another kind: {needs.row_extras or needs.scorer}")
    if needs.given != "none":
        pytest.skip(f"{name} trains on completions that come with the problems (test_given)")
    sections = {"run": {"steps": 2}, "eval": {"size": 0}, "learner": {"epochs": 1}, "algorithm": {"name": name}}
    if needs.reference or any(view.startswith("ref_") for view in needs.rescore):
        sections["reference"] = {"mode": "resident"}
    if any(view.startswith("guide_") for view in needs.rescore):
        sections["guide"] = {"path": request.getfixturevalue("exported")}
    config = configured(tmp_path, **{**sections, **NEEDS.get(name, {})})
    assert loop.train(config, on_rows=letters) == 0
    lines = metrics_of(tmp_path)
    assert [line["step"] for line in lines] == [1, 2]
    assert all(np.isfinite(line["grad_norm"]) for line in lines)


def test_steps_of_one_minibatch_are_the_same_under_replay_of_their_own_routing(tmp_path):
    experts = {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "mlp_only_layers": [0],
    }

    def run(mode):
        config = configured(
            tmp_path / mode,
            run={"steps": 2},
            model={"spec": {**BASE["model"]["spec"], **experts}},
            algorithm={"name": "mini_rl"},
            learner={"epochs": 1, "minibatches": 1, "routing_replay": mode},
            eval={"size": 0},
        )
        assert loop.train(config, letters) == 0
        return metrics_of(tmp_path / mode)

    natural = run("none")
    assert all(step["grad_norm"] > 0 for step in natural)
    for mode in ("old", "rollout"):
        for step, same in zip(natural, run(mode), strict=True):
            assert same == pytest.approx(step, rel=1e-3, abs=1e-5)
