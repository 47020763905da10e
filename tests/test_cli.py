"""The command line: what it shows, what it refuses, and that refusing is one line and code 2."""

import gc
import subprocess
import sys

import jax
import pytest
import tiny
import yaml

from jaxrl_llm import algorithms, cli
from jaxrl_llm.config import Tokenizer
from jaxrl_llm.models import decoder, hf
from jaxrl_llm.tasks.text import load_text

CHARS = "0123456789+-= "


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    data = {
        "run": {"dir": str(tmp_path_factory.mktemp("cli") / "run")},
        "model": {"spec": {**tiny.CONFIGS["qwen3"], "vocab_size": len(CHARS) + 3}},
        "tokenizer": {"chars": CHARS},
        "task": {"kind": "reasoning_gym", "datasets": [{"name": "chain_sum"}], "eval_size": 8},
        "rollout": {"prompts": 2, "group_size": 2, "max_prompt": 16, "max_new": 8},
        "eval": {"size": 8},
    }
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(data))
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    words = load_text(Tokenizer(chars=CHARS))
    spec = tiny.spec(vocab_size=words.vocab, eos_token_id=list(words.eos_ids))
    hf.save(path, spec, decoder.init(spec, jax.random.key(0)))
    words.save(path)
    return str(path)


def test_help_shows_every_command(capsys):
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    assert all(f"    {name} " in text for name in ("train", "eval", "sample", "plan", "list", "check", "convert"))


def test_starting_imports_nothing_heavy():
    code = (
        "import sys\nfrom jaxrl_llm import cli\n"
        "try: cli.main(['train', '--help'])\nexcept SystemExit: pass\n"
        "heavy = {'jax', 'pydantic', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_train_help_config_shows_fields_with_meaning(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--help-config"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "rollout.group_size: int = 8\n      completions per prompt" in text


@pytest.mark.parametrize(
    "words, line",
    [
        (
            ["rollout.groupsize=3"],
            "jaxrl_llm train: rollout.groupsize=3: no such key; did you mean rollout.group_size?",
        ),
        (["algorithm.name=grpoo"], "did you mean 'grpo'?"),
        (["missing.yaml"], "jaxrl_llm train: missing.yaml: cannot be read"),
    ],
)
def test_a_bad_config_is_one_line_on_stderr_and_code_2(config, capsys, words, line):
    assert cli.main(["train", config, *words]) == 2
    out = capsys.readouterr()
    assert out.out == "" and line in out.err and out.err.count("\n") == 1


def test_no_config_at_all_is_refused(capsys):
    assert cli.main(["train", "rollout.prompts=3"]) == 2
    assert "no config given" in capsys.readouterr().err


def test_traceback_shows_where_an_error_came_from(config):
    with pytest.raises(ValueError, match="no such key"):
        cli.main(["--traceback", "plan", config, "nonsense=1"])


def test_an_unknown_option_is_refused(config, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", config, "--nonsense"])
    assert stop.value.code == 2
    assert "unrecognized arguments: --nonsense" in capsys.readouterr().err


def test_overrides_may_follow_options(config, capsys):
    assert cli.main(["plan", config, "--devices", "2", "rollout.prompts=4"]) == 0
    assert "4 prompts × 2 completions = 8 rows" in capsys.readouterr().out


def test_paths_and_overrides_are_told_apart():
    words = ["a.yaml", "model.path=/x/y", "runs/a=b", "k=v"]
    assert cli.split(words) == (["a.yaml", "runs/a=b"], ["model.path=/x/y", "k=v"])


def test_list_names_every_method(capsys):
    assert cli.main(["list"]) == 0
    first = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert first == ["method", *algorithms.names()]


def test_list_of_a_method_shows_its_paper_and_fields(capsys):
    assert cli.main(["list", "grpo"]) == 0
    text = capsys.readouterr().out
    assert "2402.03300" in text and "  clip_high: 0.2  (float)" in text
    assert "  beta: 0.0  (float)  # KL to the reference in the loss" in text


def test_list_of_an_unknown_method_names_the_nearest(capsys):
    assert cli.main(["list", "rlooo"]) == 2
    assert "did you mean 'rloo'?" in capsys.readouterr().err


def test_train_hands_the_config_to_the_loop_and_returns_its_code(config, monkeypatch):
    from jaxrl_llm.training import loop

    seen = []
    monkeypatch.setattr(loop, "train", lambda c: seen.append(c) or 1)
    assert cli.main(["train", config, "run.steps=7"]) == 1
    assert seen[0].run.steps == 7


def test_sample_completes_a_prompt_the_same_way_twice(config, model, capsys):
    command = ["sample", config, "12+34=", "-n", "2", "--model", model]
    assert cli.main(command) == 0
    first = capsys.readouterr().out
    assert cli.main(command) == 0
    assert capsys.readouterr().out == first and first.count("\n") == 2
    assert cli.main([*command, "--greedy"]) == 0
    once, again = capsys.readouterr().out.splitlines()
    assert once == again


def test_the_model_option_stands_in_for_a_path_that_is_not_there(config, model, capsys):
    elsewhere = ["model.path=missing", "model.spec=null", "tokenizer.chars=null"]
    assert cli.main(["sample", config, *elsewhere, "1+"]) == 2
    assert "model.path='missing'" in capsys.readouterr().err
    assert cli.main(["sample", config, *elsewhere, "1+", "--model", model]) == 0


def test_sample_refuses_a_prompt_over_the_limit(config, model, capsys):
    assert cli.main(["sample", config, "1" * 17, "--model", model]) == 2
    assert "rollout.max_prompt=16: the prompt has 18 tokens" in capsys.readouterr().err


def test_sample_without_a_model_says_what_is_missing(config, capsys):
    assert cli.main(["sample", config, "1"]) == 2
    assert "no export there and no model.path" in capsys.readouterr().err


def test_convert_says_where_it_wrote(model, tmp_path, capsys):
    assert cli.main(["convert", model, str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    assert str(tmp_path / "out") in capsys.readouterr().out
    spec, params = hf.load(tmp_path / "out", dtype="bfloat16")
    assert params["embed"].shape == (spec.vocab, spec.embed)


def test_importing_freezes_only_what_is_new(monkeypatch):
    """A caller's process with everything imported has nothing frozen, and a collector that was off stays off."""
    frozen = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(1))
    with cli._importing():
        assert not gc.isenabled()
    assert gc.isenabled() and not frozen
    gc.disable()
    try:
        with cli._importing():
            monkeypatch.setitem(sys.modules, "new", sys)
        assert not gc.isenabled() and frozen == [1]
    finally:
        gc.enable()
