"""The quickstart over several seeds, with its two controls. Prints a table and writes JSON.

    python benchmarks/quickstart.py --out benchmarks/results/quickstart.json

  rl         configs/quickstart.yaml as it is
  permuted   the same, rewards permuted over the rows of each batch: what is left is no learning signal. It ends early
             when the policy solves so little that dynamic sampling finds too few groups whose rewards differ
  sft        supervised fine-tuning only, for as long as the whole `rl` run of the first seed took

Each run is a process of its own; --only repeats some. Results are merged into an existing --out file.
"""

import argparse
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

CONFIG = "configs/quickstart.yaml"


def permute(step, rows):
    """Give the rows each other's rewards, in an order that depends on the step alone."""
    import numpy as np

    order = np.random.default_rng(step).permutation(len(rows))
    for row, (reward, parts) in zip(rows, [(rows[i].reward, rows[i].parts) for i in order]):
        row.reward, row.parts = reward, parts


def child(kind: str, directory: str, overrides: list[str]) -> int:
    from jaxrl_llm import config_load
    from jaxrl_llm.training import loop

    config = config_load.load([CONFIG], [f"run.dir={directory}", *overrides])
    return loop.train(config, on_rows=permute if kind == "permuted" else None)


def run(kind: str, seed: int, seconds: float | None) -> dict:
    with tempfile.TemporaryDirectory() as scratch:
        overrides = [f"run.seed={seed}"]
        if kind == "sft":
            until = ["warmstart.until=null", "warmstart.steps=1000000", f"warmstart.seconds={seconds}"]
            overrides += ["run.steps=0", *until]
        if kind == "permuted":
            overrides.append("eval.every=20")
        directory = str(Path(scratch) / "run")
        began = time.perf_counter()
        words = [sys.executable, __file__, "--child", kind, directory, *overrides]
        ended = subprocess.run(words, check=kind != "permuted").returncode == 0
        wall = time.perf_counter() - began
        lines = [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["eval/accuracy"] for line in lines if "eval/accuracy" in line]
    before = 0.0 if kind == "sft" else held_out[0]  # sft: from random weights, whose first evaluation is the last
    steps = [line["timing/step"] for line in lines if "timing/step" in line]
    return {
        "kind": kind,
        "seed": seed,
        "wall_seconds": round(wall, 1),
        "rl_seconds": round(sum(steps), 1),
        "rl_steps": len(steps),
        "ended": ended,
        "held_out": [round(a, 4) for a in held_out],
        "problems": int(next(line["eval/problems"] for line in lines if "eval/problems" in line)),
        "before": round(before, 4),
        "after": round(held_out[-1], 4),
        "gain_points": round(100 * (held_out[-1] - before), 1),
        "overrides": overrides,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=["rl", "permuted", "sft"], default=["rl", "permuted", "sft"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quickstart.json"))
    args = parser.parse_args()
    done = json.loads(args.out.read_text())["runs"] if args.out.exists() else []
    jobs = [(kind, seed) for kind in args.only for seed in (args.seeds if kind == "rl" else args.seeds[:1])]
    for kind, seed in jobs:
        wall = next((r.get("wall_seconds") for r in done if (r["kind"], r["seed"]) == ("rl", seed)), None)
        done = [r for r in done if (r["kind"], r["seed"]) != (kind, seed)]
        done.append(run(kind, seed, wall))
        packages = {name: metadata.version(name) for name in ("jaxrl_llm", "jax", "flax", "optax", "reasoning-gym")}
        about = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{platform.machine()}, CPU",
            "python": platform.python_version(),
        }
        command = "python benchmarks/quickstart.py"
        args.out.write_text(
            json.dumps({"command": command, **about, "packages": packages, "runs": done}, indent=1) + "\n"
        )
    print(f"{'kind':10} seed  before  after   gain  wall s")
    for r in done:
        print(
            f"{r['kind']:10} {r['seed']:4}  {r['before']:.3f}   {r['after']:.3f}  {r['gain_points']:+5.1f}  {r.get('wall_seconds', math.nan):6.1f}"
        )


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] == "--child":
        sys.exit(child(sys.argv[2], sys.argv[3], sys.argv[4:]))
    main()
