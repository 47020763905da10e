"""A long run of two processes under seeded random kills: it must end as the run that nobody touched.

    python benchmarks/soak.py [--steps 200] [--kills 8] [--seed 0]

Both runs are `jaxrl_llm launch -n 2` on a tiny model with everything a run keeps (replay on the host, a multiplier, optimizer
windows). One is left alone, and the memory of its processes is read at step 20 and at its end. Of the other, a random process
gets signal 9 at random steps. Writes benchmarks/results/soak.json.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from jaxrl_llm.training.rundir import about

HERE = Path(__file__).resolve().parent
CLOCKS = ("timing/", "tokens_per_second", "mfu", "memory/", "recompiles")
WARM = 20  # steps after which everything is compiled

CONFIG = {
    "run": {"samples_every": 0},
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
    "rewards": {"workers": 1, "timeout": 300.0, "parts": [{"reward": "letter:1"}]},
    "rollout": {"prompts": 4, "group_size": 4, "max_prompt": 10, "max_new": 4},
    "algorithm": {"name": "r2vpo", "replay": 1.0, "capacity": 2},
    "learner": {"epochs": 2, "minibatches": 2},
    "optimizer": {"lr": 1e-3},
    "eval": {"size": 8},
    "checkpoint": {"every": 5, "keep": 2, "export": False},
}


class Run:
    """A launched run in a directory of its own."""

    def __init__(self, directory: Path, steps: int, restarts: int):
        self.directory = directory
        file = directory.with_suffix(".yaml")
        config = {**CONFIG, "run": {**CONFIG["run"], "dir": str(directory), "steps": steps}}
        file.write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "jaxrl_llm.cli", "launch", "-n", "2", "--restarts", str(restarts), str(file)]
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
        with directory.with_suffix(".txt").open("w") as said:
            self.process = subprocess.Popen(command, env=env, stdout=said, stderr=said)

    def step(self) -> int:
        """The newest step in the metrics; 0 before the first."""
        lines = metrics(self.directory)
        return lines[-1]["step"] if lines else 0

    def ranks(self) -> list[int]:
        """The processes of the run."""
        tasks = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in tasks.read_text().split()]

    def until(self, step: int) -> bool:
        """Wait for a step; False when the run has ended."""
        while self.process.poll() is None:
            if self.step() >= step:
                return True
            time.sleep(0.02)
        return False

    def end(self) -> None:
        """Wait for its end. Raises RuntimeError, with what it said, when it failed."""
        if self.process.wait() != 0:
            raise RuntimeError(self.directory.with_suffix(".txt").read_text())


def metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of RL steps, without the clocks."""
    file = directory / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    lines = [line for line in lines if "loss" in line]
    return [{k: v for k, v in line.items() if not k.startswith(CLOCKS)} for line in lines]


def resident(pid: int) -> float:
    """MiB of memory that a process holds now."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def arrays(directory: Path) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint, by name."""
    import orbax.checkpoint as ocp

    newest = max(int(path.name) for path in (directory / "checkpoints").iterdir() if path.name.isdigit())
    where, handler = directory / "checkpoints" / str(newest) / "arrays", ocp.PyTreeCheckpointHandler()
    plain = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in handler.metadata(where).tree}
    return handler.restore(where, args=ocp.args.PyTreeRestore(restore_args=plain))


def untouched(directory: Path, steps: int) -> list[list[float]]:
    """A run left alone; MiB of its processes when all is compiled, and after the last step but one."""
    run, held = Run(directory, steps, 0), []
    for step in (min(WARM, steps - 1), steps - 1):
        held.append([resident(pid) for pid in run.ranks()] if run.until(step) else [])
    run.end()
    return held


def killed(directory: Path, steps: int, kills: int, seed: int) -> list[dict[str, Any]]:
    """A run of which `kills` random processes are killed at random steps; what was killed and when."""
    chance = random.Random(seed)
    run, done = Run(directory, steps, kills), []
    for step in sorted(chance.sample(range(1, steps), kills)):
        if not run.until(step):
            break
        time.sleep(chance.uniform(0, 0.2))
        ranks = run.ranks()
        rank = chance.randrange(2)
        if len(ranks) < 2:
            continue
        os.kill(ranks[rank], signal.SIGKILL)
        done.append({"step": run.step(), "rank": rank})
        said, started = directory.with_suffix(".txt"), len(done)
        while run.process.poll() is None and said.read_text().count("starting all again") < started:
            time.sleep(0.02)
    run.end()
    return done


def soak(scratch: Path, steps: int, kills: int, seed: int) -> dict[str, Any]:
    """Both runs and what they have in common."""
    began = time.monotonic()
    first, last = untouched(scratch / "untouched", steps)
    done = killed(scratch / "killed", steps, kills, seed)
    ours, theirs = metrics(scratch / "killed"), metrics(scratch / "untouched")
    a, b = arrays(scratch / "killed"), arrays(scratch / "untouched")
    return {
        "steps": steps,
        "kills": done,
        "each_step_once": [line["step"] for line in ours] == list(range(1, steps + 1)),
        "same_metrics": ours == theirs,
        "same_arrays": a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a),
        "mib_when_warm": first,
        "mib_at_the_end": last,
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Two processes under seeded random kills.")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "soak.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = soak(Path(scratch), args.steps, args.kills, args.seed)
    found = {"about": about(), **found}
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return 0 if found["each_step_once"] and found["same_metrics"] and found["same_arrays"] else 1


if __name__ == "__main__":
    sys.exit(main())
