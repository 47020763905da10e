"""A run killed with signal 9 at random moments, again and again, ends as one that nobody touched.

The run has everything that can be left half done: a warm start with its own checkpoints, an optimizer window of two epochs
of two minibatches, replayed rows and a multiplier on the host, a checkpoint after every step, a reward worker.
"""

import os
import pathlib
import random
import subprocess
import sys
import time

import jax
import pytest
from test_loop import assert_same_run

RUN = """
import pathlib, sys
from test_loop import configured, letters
from jaxrl_llm.training import loop

config = configured(
    pathlib.Path(sys.argv[1]),
    run={"steps": 6},
    rewards={"workers": 1, "timeout": 300.0},  # a busy machine is no reason to leave a row unscored
    algorithm={"name": "r2vpo", "replay": 1.0, "capacity": 2},
    warmstart={"steps": 8, "batch": 8},
    eval={"size": 8, "every": 2},
    checkpoint={"every": 1, "keep": 2, "export": False},
)
sys.exit(loop.train(config, on_rows=letters))
"""


def start(directory):
    """The run in a process of its own, with the compiled programs of the tests."""
    cache = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or ""}
    cache["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    env = {**os.environ, **cache, "PYTHONPATH": str(pathlib.Path(__file__).parent)}
    return subprocess.Popen([sys.executable, "-c", RUN, str(directory)], env=env, stdout=subprocess.DEVNULL)


def kill_after(process, begun, seconds):
    """Signal 9 `seconds` after `begun()` is seen to hold. Returns whether it came in time."""
    while process.poll() is None and not begun():
        time.sleep(0.001)
    time.sleep(seconds)
    in_time = process.poll() is None
    process.kill()
    process.wait()
    return in_time


def any_of(directory, pattern):
    return lambda: any(directory.glob(pattern))


def wrote_step(directory, step):
    metrics = directory / "metrics.jsonl"
    return lambda: metrics.exists() and f'"step": {step},' in metrics.read_text()


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    directory = tmp_path_factory.mktemp("straight")
    assert start(directory).wait(timeout=600) == 0
    return directory


def test_a_run_killed_at_random_moments_ends_as_the_one_that_was_not(straight, tmp_path):
    chance = random.Random(9)
    moments = [
        (any_of(tmp_path, "warmstart/*"), chance.uniform(0, 0.3)),  # warm start, or the first programs after it
        (any_of(tmp_path, "checkpoints/*tmp*"), chance.uniform(0, 0.02)),  # a checkpoint is being written
        (wrote_step(tmp_path, 2), chance.uniform(0, 0.3)),  # inside a step, before or after its update
    ]
    kills = [kill_after(start(tmp_path), begun, seconds) for begun, seconds in moments]
    assert all(kills), "the run ended before it was killed"
    assert start(tmp_path).wait(timeout=600) == 0
    assert_same_run(straight, tmp_path)
