"""How many RL steps until 90% of a story's letters are e, over seeds, on a real pretrained 260K-parameter model.

python benchmarks/stories260k.py --model DIR --out benchmarks/results/stories260k.json
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from statistics import median

TARGET = 0.9


def run(model: str, seed: int, steps: int) -> dict:
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "run"
        overrides = [f"model.path={model}", f"run.seed={seed}", f"run.steps={steps}", f"run.dir={directory}"]
        began = time.perf_counter()
        words = [sys.executable, "-m", "jaxrl_llm.cli", "train", "configs/stories260k.yaml", *overrides]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        wall = time.perf_counter() - began
        lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    rewards = [line["reward/mean"] for line in lines if "reward/mean" in line]
    reached = next((i + 1 for i, r in enumerate(rewards) if r >= TARGET), None)
    return {
        "seed": seed,
        "steps_to_0.9": reached,
        "wall_seconds": round(wall, 1),
        "rewards": [round(r, 3) for r in rewards],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face directory of stories260k")
    parser.add_argument("--seeds", type=int, nargs="+", default=[*range(500, 515)])
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/stories260k.json"))
    args = parser.parse_args()
    runs = [run(args.model, seed, args.steps) for seed in args.seeds]
    steps = [r["steps_to_0.9"] for r in runs]
    packages = {name: metadata.version(name) for name in ("jaxrl_llm", "jax", "flax", "optax")}
    result = {
        "command": "python benchmarks/stories260k.py --model DIR",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, CPU",
        "packages": packages,
        "median_steps": median(s if s is not None else float("inf") for s in steps),
        "runs": runs,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"steps until the reward is {TARGET}: {steps}, median {result['median_steps']}")


if __name__ == "__main__":
    main()
