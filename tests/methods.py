"""Every method, tiny, in two processes of two devices and in one of four: the same rows, metrics and arrays.

`python tests/methods.py [SLUG ...]` runs the files of configs/algorithms, all by default, and says what agreed and how closely;
tests/test_methods_in_processes.py runs some of them. The methods of a job run one after another in the same processes, which
import and connect once.
"""

import argparse
import faulthandler
import hashlib
import json
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
STEPS = 3
LIMIT = 400  # seconds a method may take in a process before that says where it is and ends
GUIDED = ("tgdpo",)
GUIDE = {"run": {"seed": 1, "steps": 0}, "checkpoint": {"export": True}}  # changes of a run that makes a guide
REFUSED = ("gdpo", "gigpo", "seeupo")  # `train` says why
SLUGS = sorted({path.stem for path in (ROOT / "configs" / "algorithms").glob("*.yaml")} - {*REFUSED})

# Over the quickstart: random weights and plain SGD, as Adam follows the rounding of gradients near zero.
REWARD = {"reward": "methods:reward"}
SGD = {"name": "sgd", "lr": 0.1, "warmup": 0}
SMALL: dict[str, Any] = {
    "run": {"steps": STEPS, "samples_every": 0, "compile_cache": "none"},
    "model": {
        "spec": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
        }
    },
    "rollout": {"prompts": 4, "max_new": 6},
    "optimizer": SGD,
    "warmstart": {"steps": 0, "until": None},
    "eval": {"size": 0},
    "checkpoint": {"every": 1, "keep": STEPS + 1, "export": False},
    "mesh": {"fsdp": 4},
}
# What a file needs besides: to do in three steps, on few rows, what it does in hundreds on many.
OWN: dict[str, dict[str, Any]] = {
    "aepo_entropy": {"algorithm": {"h0": 2.7, "sample_num": 4, "adv_threshold": 0.0}},
    "bupo": {"algorithm": {"layer": 0, "s_inter": 2}},
    "dapo_direct": {
        "algorithm": {"responses": 3, "kept": 2, "completions": 3, "states": 2, "gap": 0.0, "correct_at": 0.4}
        | {"critic_steps": 1, "actor_steps": 1},
        "rollout": {"max_prompt": 18},
        "reference": {"sync_every": 2},
    },
    # It takes one part besides the task's own, and random weights name no entities.
    "e_grpo": {"rewards": {"parts": [REWARD]}, "rollout": {"max_new": 8}},
    # They divide by how far entropies spread: 1e-3 with random weights, as rounding is.
    "empg": {"rollout": {"temperature": 0.1}},
    "hapo": {"rollout": {"temperature": 0.3}},
    "loop": {"algorithm": {"minibatch": 8}},
    "mini_rl_moe": {"model": {"spec": {"num_experts": 4, "moe_intermediate_size": 16}}},
    "rloo": {"reference": {"mode": "host"}},
    "rso": {"algorithm": {"candidates": 6, "keep": 4}, "reference": {"sync_every": 2}},
    "s_grpo": {
        "algorithm": {"path_tokens": 8, "answer_tokens": 3, "correct_at": 0.2},
        "rollout": {"max_prompt": 24, "max_new": 12},
    },
    "spo_single": {"algorithm": {"draw_gamma": 1.0}, "rollout": {"prompts": 8}, "learner": {"minibatches": 2}},
    "trpa": {"algorithm": {"levels": [0.3]}},
    "v0": {"algorithm": {"context": 8, "least_context": 4}},
}

# hapo's entropies still spread by 1e-2. In llds rounding decides which tokens fell in a first pass: its runs part. In float64
# (JAX_ENABLE_X64=1, model.dtype and param_dtype) all agree to 1e-12.
TOLERANCE = {"hapo": 1e-3}


def reward(completion: str, record: Mapping[str, Any]) -> float:
    """Share of even digits, by which even random weights differ."""
    return sum(completion.count(digit) for digit in "02468") / len(completion) if completion else 0.0


def over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = over(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def data_of(slug: str, directory: Path) -> dict[str, Any]:
    """The file of configs/algorithms over the quickstart, small, as plain data."""
    from jaxrl_llm.config_load import load_unchecked

    files = [ROOT / "configs" / "quickstart.yaml", ROOT / "configs" / "algorithms" / f"{slug}.yaml"]
    data = load_unchecked(files).model_dump(mode="json")
    task = data["task"]
    own = {
        "run": {"dir": str(directory)},
        "task": {"size": 24, "eval_size": 8},
        "rewards": {"workers": 0, "parts": [*data["rewards"]["parts"], REWARD]},
        "critic": data["critic"] and SGD,
        "guide": {"path": str(directory.parent / "guide" / "export")} if slug in GUIDED else None,
    }
    if task["kind"] == "file":
        own["task"] = {"train": str(ROOT / task["train"]), "eval_size": 8}
    return over(over(over(data, SMALL), own), OWN.get(slug, {}))


def checked(data: Mapping[str, Any]):
    """The config, as `train` would have it."""
    from jaxrl_llm import config_check
    from jaxrl_llm.config_load import validate

    config = validate(data)
    config_check.check(config)
    return config_check.check_method(config)


# ---------------------------------------------------------------------------------------------- inside a process of a job


def watch(process: int) -> None:
    """Have every update and every checkpoint note first what this process gives them."""
    import jax
    import numpy as np

    from jaxrl_llm.sharding import processes
    from jaxrl_llm.training.checkpoints import Checkpoints
    from jaxrl_llm.training.learner import Learner

    update, save = Learner.update, Checkpoints.save

    def note(run: Path, what: str, tree: Any) -> None:
        hashes = {}
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            if isinstance(x, jax.Array) and jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
                x = jax.random.key_data(x)
            x = np.ascontiguousarray(processes.fetch(x))
            hashes[jax.tree_util.keystr(path)] = hashlib.sha256(x.tobytes()).hexdigest()[:16]
        with open(run.with_suffix(f".{process}.jsonl"), "a") as file:
            file.write(json.dumps({"what": what, **hashes}) + "\n")

    def noted_update(self, state, rows, credit, key, **fields):
        note(Path(self.config.run.dir), "update", (state, rows, credit, key))
        return update(self, state, rows, credit, key, **fields)

    def noted_save(self, step, tree, host, memory, *args, **fields):
        note(Path(self.directory).parent, f"checkpoint {step}", (host["prompts"], memory))
        return save(self, step, tree, host, memory, *args, **fields)

    Learner.update, Checkpoints.save = noted_update, noted_save


def train(directory: Path, coordinator: str, count: int, process: int, slugs: Sequence[str]) -> int:
    """Train the methods one after another, in one of `count` processes."""
    import jax

    from jaxrl_llm.config import Distributed
    from jaxrl_llm.sharding import processes
    from jaxrl_llm.training import loop

    def work() -> int:
        watch(process)
        for slug in slugs:
            faulthandler.dump_traceback_later(LIMIT, exit=True)
            print(f"methods: {slug}", time.strftime("%X"), file=sys.stderr, flush=True)
            runs = [data_of(slug, directory / slug)]
            if slug in GUIDED:
                runs.insert(0, over(data_of("grpo", directory / "guide"), GUIDE))
            for data in runs:
                if code := loop.train(checked(data)):
                    return code
            jax.clear_caches()
        return 0

    if count == 1:
        return work()
    patience = {"heartbeat_timeout": LIMIT, "start_timeout": LIMIT}  # with a machine that is busy with other tests
    return processes.run(Distributed(coordinator=coordinator, processes=count, process=process, **patience), work)


# ------------------------------------------------------------------------------------------------------- what came of it


class Agreement(NamedTuple):
    moved: float  # most that an array changed from the first checkpoint to the last
    arrays: float  # largest difference between the arrays of the last checkpoints
    metrics: float  # the same of metrics


def start(directory: Path, count: int, slugs: Sequence[str]):
    """A job of `count` processes on four devices, below `directory`.

    One process has eight, of which it uses half: XLA keeps as many threads as there are devices, and collectives that wait for
    the last device may hold all of four.
    """
    import subprocess

    from test_processes import environment

    from jaxrl_llm.launch import free_port

    directory.mkdir(parents=True, exist_ok=True)
    env = environment(4 // count if count > 1 else 8)
    where = f"127.0.0.1:{free_port()}"
    line = [sys.executable, __file__, "train", str(directory), where, str(count)]
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen([*line, str(i), *slugs], env=env, **out) for i in range(count)]


def run(directory: Path, slugs: Sequence[str]) -> dict[str, str]:
    """Run the methods in one process and in two, side by side; what stopped those that did not end, by slug."""
    from test_processes import ended

    def job(count: int) -> dict[str, str]:
        left, failed = list(slugs), {}
        while left:
            running = start(directory / str(count), count, left)
            said = [error for _, error in ended(running, LIMIT * (1 + len(left)))]
            if all(process.returncode == 0 for process in running):
                break
            begun = [line.split()[1] for line in said[0].splitlines() if line.startswith("methods: ")]
            at = begun[-1] if begun else left[0]
            failed[at] = "\n".join(f"process {i} of {count}:\n{text[-4000:]}" for i, text in enumerate(said))
            left = left[left.index(at) + 1 :]
        return failed

    with ThreadPoolExecutor(2) as jobs:
        one, two = jobs.map(job, (1, 2))
    return {**one, **two}


def assert_agree(directory: Path, slug: str) -> Agreement:
    """The runs of a method in one process and in two are the same; the processes of a job were of one mind."""
    import jax
    import numpy as np
    from test_loop import metrics_of
    from test_processes import assert_same_run, saved

    from jaxrl_llm.training import host_state

    one, two = directory / "1" / slug, directory / "2" / slug
    texts = [two.with_suffix(f".{i}.jsonl").read_text().splitlines() for i in (0, 1)]
    first, second = ([json.loads(line) for line in text] for text in texts)
    assert [x["what"] for x in first] == [x["what"] for x in second] and len(first) == 2 * STEPS + 1, slug
    for a, b in zip(first, second):
        apart = [name for name in {*a, *b} if a.get(name) != b.get(name)]
        assert not apart, f"{slug}: the processes differ before {a['what']} in {apart}"
    near = TOLERANCE.get(slug, 1e-5)
    assert_same_run(one, two, rtol=near, atol=near)
    where = Path("checkpoints") / str(STEPS) / "host"
    hosts = [host_state.decode((run / where / host_state.FILE).read_bytes()) for run in (one, two)]
    assert hosts[0]["host"]["prompts"] == hosts[1]["host"]["prompts"], slug
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), *(host["memory"] for host in hosts))
    (a, b), before = (saved(d) for d in (one, two)), saved(one, 0)
    lines = [(x[k], y[k]) for x, y in zip(metrics_of(one), metrics_of(two)) for k in x if isinstance(x[k], float)]
    apart = [float(np.abs(np.asarray(a[name], float) - np.asarray(b[name], float)).max(initial=0)) for name in a]
    moved = [float(np.abs(a[n] - before[n]).max()) for n in a if ".params." in n]
    return Agreement(max(moved), max(apart), max(abs(x - y) for x, y in lines))


def main() -> int:
    import tempfile

    if sys.argv[1:2] == ["train"]:
        directory, coordinator, count, process, *slugs = sys.argv[2:]
        return train(Path(directory), coordinator, int(count), int(process), slugs)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slugs", nargs="*", metavar="SLUG", help="files of configs/algorithms, without .yaml")
    parser.add_argument("--keep", type=Path, help="a new directory for the runs, instead of a temporary one")
    given = parser.parse_args()
    slugs, bad = given.slugs or SLUGS, 0
    with tempfile.TemporaryDirectory() as temporary:
        directory = given.keep or Path(temporary)
        failed = run(directory, slugs)
        for slug in slugs:
            try:
                if slug in failed:
                    raise AssertionError(failed[slug])
                found = assert_agree(directory, slug)
                print(f"{slug:14} moved {found.moved:.1e}  arrays {found.arrays:.1e}  metrics {found.metrics:.1e}")
            except AssertionError as error:
                bad += 1
                print(f"{slug:14} DIFFERS\n{error or traceback.format_exc(limit=-1)}")
    return bool(bad)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main())
