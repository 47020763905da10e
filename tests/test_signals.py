"""Stopping on signals, and who owns a run directory. Processes are real."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import yaml

from jaxrl_llm.training.rundir import claim, first_difference
from jaxrl_llm.training.signals import stopping


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_sets_the_flag_and_raises_nothing(number):
    with stopping() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        assert stop.signal == number


def test_the_handlers_found_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with stopping():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_signal_ends_the_process_at_once():
    code = """
        import os, signal
        from jaxrl_llm.training.signals import stopping
        with stopping() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            print(stop.requested, flush=True)
            os.kill(os.getpid(), signal.SIGINT)
            print("not reached")
    """
    found = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
    assert found.stdout == "True\n"
    assert found.returncode == 128 + signal.SIGINT
    assert "SIGTERM: saving and stopping" in found.stderr


CONFIG = {"run": {"dir": "here", "seed": 0}, "optimizer": {"lr": 1e-6, "total": None}, "eval": {"k": [1, 4]}}


def changed(key, value):
    config = json.loads(json.dumps(CONFIG))
    section, name = key.split(".")
    config[section][name] = value
    return config


def test_a_new_directory_is_claimed_and_described(tmp_path):
    with claim(tmp_path / "a" / "b", CONFIG) as run:
        assert not run.resumed
        assert yaml.safe_load((run.path / "config.yaml").read_text()) == CONFIG
        (about,) = [json.loads(line) for line in (run.path / "about.jsonl").read_text().splitlines()]
    assert about["pid"] == os.getpid()
    assert about["devices"]
    assert {"python", "jax", "flax", "jaxrl_llm"} <= set(about["versions"])
    assert about["argv"] == sys.argv


def test_the_same_config_resumes_wherever_the_directory_was_moved(tmp_path):
    with claim(tmp_path / "a", CONFIG):
        pass
    (tmp_path / "a").rename(tmp_path / "b")
    with claim(tmp_path / "b", changed("run.dir", "elsewhere")) as run:
        assert run.resumed
        assert yaml.safe_load((run.path / "config.yaml").read_text()) == CONFIG
        assert len((run.path / "about.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("key", "value"), [("optimizer.lr", 2e-6), ("optimizer.total", 5), ("eval.k", [1]), ("eval.new", 3)]
)
def test_another_config_is_refused_by_its_first_differing_key(tmp_path, key, value):
    with claim(tmp_path, CONFIG):
        pass
    with pytest.raises(ValueError, match=key) as e, claim(tmp_path, changed(key, value)):
        pass
    assert "\n" not in str(e.value)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == CONFIG


def elsewhere(path):
    return {**CONFIG, "checkpoint": {"dir": str(path)}}


def test_checkpoints_lie_in_the_run_directory_or_where_checkpoint_dir_says(tmp_path):
    with claim(tmp_path / "a", CONFIG) as run:
        assert str(run.checkpoints) == str(tmp_path / "a" / "checkpoints")
        assert str(run.warmstart) == str(tmp_path / "a" / "warmstart")
    with claim(tmp_path / "b", elsewhere(tmp_path / "disk")) as run:
        assert str(run.checkpoints) == str(tmp_path / "disk" / "checkpoints")
        assert str(run.warmstart) == str(tmp_path / "disk" / "warmstart")
    with claim(tmp_path / "b", elsewhere(tmp_path / "b")) as run:  # moved back, said in other words
        assert run.resumed and str(run.checkpoints) == str(tmp_path / "b" / "checkpoints")


def test_where_checkpoints_lie_belongs_to_one_run_and_one_process_too(tmp_path):
    with (
        claim(tmp_path / "a", elsewhere(tmp_path / "disk")),
        pytest.raises(ValueError, match=rf"^checkpoint\.dir={tmp_path}/disk: process {os.getpid()} is running there"),
        claim(tmp_path / "b", elsewhere(tmp_path / "disk")),
    ):
        pass
    other = {**elsewhere(tmp_path / "disk"), "eval": {"k": [2]}}
    with (
        pytest.raises(
            ValueError, match=rf"^checkpoint\.dir={tmp_path}/disk: holds a run with eval\.k=\[1, 4\], .* a new checkpo"
        ),
        claim(tmp_path / "c", other),
    ):
        pass


def test_a_run_that_has_written_metrics_knows_where_it_saved_before(tmp_path):
    with claim(tmp_path / "a", CONFIG) as run:
        born = run.born
    with claim(tmp_path / "a", elsewhere(tmp_path / "disk")) as run:
        assert run.left is None
    (tmp_path / "a" / "metrics.jsonl").write_text("{}\n")
    with claim(tmp_path / "a", CONFIG) as run:
        assert run.left is None
    with claim(tmp_path / "a", elsewhere(tmp_path / "disk")) as run:
        assert run.left == f"run.dir={tmp_path / 'a'}"
        assert run.born == born
    with claim(tmp_path / "b", CONFIG) as run:
        assert run.born != born


def test_a_directory_with_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"thesis\.tex"), claim(tmp_path, CONFIG):
        pass
    assert (tmp_path / "thesis.tex").read_text() == "precious"
    assert not (tmp_path / "config.yaml").exists()


def test_a_directory_of_a_live_process_is_refused_and_that_of_a_killed_one_is_not(tmp_path):
    code = f"""
        import time
        from jaxrl_llm.training.rundir import claim
        with claim({str(tmp_path)!r}, {CONFIG!r}):
            print("claimed", flush=True)
            time.sleep(600)
    """
    other = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "claimed\n"
        with pytest.raises(ValueError, match=f"process {other.pid} is running there"), claim(tmp_path, CONFIG):
            pass
    finally:
        other.kill()
        other.communicate()
    with claim(tmp_path, CONFIG) as run:
        assert run.resumed


def test_the_first_difference_is_a_dotted_key():
    assert first_difference({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}) == ("a.c", 2, 3)
    assert first_difference({"a": 1}, {"a": 1, "b": 2}) == ("b", None, 2)
    assert first_difference({"a": 1}, {"a": 1.0}) == ("a", 1, 1.0)
    assert first_difference({"a": [1]}, {"a": [1]}) is None
