"""How cost grows: tokens/s of generation and of the train step along one axis at a time, everything else as in the base.

    python benchmarks/scaling.py --axes rows prompt new layers vocab

Each point is `jaxrl_llm bench` in a process of its own. Results are written after every point and kept: a later run
measures the points it is asked for and leaves the others. The plot (results/scaling.png) needs matplotlib.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

AXES = {
    "rows": [8, 16, 32, 64, 128, 256, 512],
    "prompt": [64, 128, 256, 512, 1024, 2048],
    "new": [64, 128, 256, 512, 1024, 2048],
    "layers": [2, 4, 8, 16, 24],
    "vocab": [4096, 16384, 65536, 151936],
}
BASE = {"rows": 32, "prompt": 64, "new": 128, "layers": 4, "vocab": 4096}
GROUP = 8
WHAT = ("rollout", "train")
OURS = ["learner.layout=shared"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--most", type=int, help="leave out points above this value")
    parser.add_argument("--model", default="qwen3-4m")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ours", nargs="*", default=OURS, metavar="KEY=VALUE", help="overrides (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scaling.json"))
    args = parser.parse_args()
    report = json.loads(args.out.read_text()) if args.out.exists() else {"base": BASE, "points": []}
    for axis in args.axes:
        for value in AXES[axis]:
            if args.most is not None and value > args.most:
                continue
            point = measure({**BASE, axis: value}, args)
            same = [p for p in report["points"] if (p["axis"], p["value"]) == (axis, value)]
            report["points"] = [p for p in report["points"] if p not in same] + [
                {"axis": axis, "value": value, **point}
            ]
            report["points"].sort(key=lambda p: (p["axis"], p["value"]))
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(report, indent=1) + "\n")
            print(line(report["points"], axis, value), flush=True)
    plot(report, args.out.with_suffix(".png"))


def measure(shape: dict[str, int], args: argparse.Namespace) -> dict[str, Any]:
    """The figures of one shape, or why there are none."""
    words = [
        f"rollout.prompts={shape['rows'] // GROUP}",
        f"rollout.group_size={GROUP}",
        f"rollout.max_prompt={shape['prompt']}",
        f"rollout.max_new={shape['new']}",
        f"model.spec.num_hidden_layers={shape['layers']}",
        f"model.spec.vocab_size={shape['vocab']}",
        *args.ours,
    ]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "bench.json"
        options = ["--model", args.model, "--what", ",".join(WHAT), "--repeats", str(args.repeats), "--json", str(out)]
        command = [sys.executable, "-m", "jaxrl_llm.cli", "bench", *words, *options]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return {"error": done.stderr[-1000:]}
        report = json.loads(out.read_text())
    about = {key: report[key] for key in ("date", "device", "machine", "versions", "peaks")}
    keys = (
        "tokens_per_s",
        "seconds",
        "cpu_s",
        "first_s",
        "recompiles",
        "memory/host_peak_gib",
        "memory/device_peak_gib",
    )
    return {"ours": args.ours, **about, **{w: {k: report[w][k] for k in keys if k in report[w]} for w in WHAT}}


def line(points: list[dict[str, Any]], axis: str, value: int) -> str:
    point = next(p for p in points if (p["axis"], p["value"]) == (axis, value))
    if "error" in point:
        return f"{axis:7} {value:7}  {point['error'].strip().splitlines()[-1]}"
    rates = "  ".join(f"{w} {point[w]['tokens_per_s']['median']:10,.0f} tokens/s" for w in WHAT)
    return f"{axis:7} {value:7}  {rates}  peak {point[WHAT[-1]]['memory/host_peak_gib']:.2f} GiB"


def plot(report: dict[str, Any], path: Path) -> None:
    """One panel per axis; the bars span the fastest and slowest repetition."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return
    axes = [a for a in AXES if any(p["axis"] == a and "error" not in p for p in report["points"])]
    if not axes:
        return
    figure = Figure(figsize=(4 * len(axes), 3.5), layout="constrained")
    for panel, axis in zip(figure.subplots(1, len(axes), squeeze=False)[0], axes):
        points = [p for p in report["points"] if p["axis"] == axis and "error" not in p]
        for what in WHAT:
            rates = [p[what]["tokens_per_s"] for p in points]
            middle = [r["median"] for r in rates]
            bars = [[m - r["min"] for m, r in zip(middle, rates)], [r["max"] - m for m, r in zip(middle, rates)]]
            panel.errorbar([p["value"] for p in points], middle, bars, marker="o", capsize=3, label=what)
        panel.set(xscale="log", yscale="log", xlabel=axis)
    figure.axes[0].set_ylabel("tokens/s")
    figure.axes[0].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
