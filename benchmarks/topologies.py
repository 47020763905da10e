"""What fits where: models of 0.5B to 32B parameters on slices of 4 to 256 TPU chips, and which mesh to pick.

For every model and slice the quick estimate of `jaxrl_llm plan` chooses the mesh: the least tensor parallelism that fits, as
its communication grows with the batch and FSDP's does not. `--compile` then compiles the step for the slice with libtpu
(extra `tpu`), which takes minutes each; what is already in the results is not done again. Nothing here ran on a TPU.

  python benchmarks/topologies.py                                  # estimates, and the table
  python benchmarks/topologies.py --compile qwen2.5-0.5b@v5e:2x2   # some of them exactly
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import jax

from jaxrl_llm.benching import shapes
from jaxrl_llm.config import Config
from jaxrl_llm.planning import topology
from jaxrl_llm.sharding.target import Target
from jaxrl_llm.training import plan

RESULTS = Path(__file__).parent / "results"
SLICES = [
    *(f"{chip}:{sides}" for chip in ("v5e", "v6e") for sides in ("2x2", "4x4", "8x8", "16x16")),
    *(f"v5p:{sides}" for sides in ("2x2x1", "2x2x4", "4x4x4", "4x8x8")),
]
MODELS = ["qwen2.5-0.5b", "qwen2.5-1.5b", "qwen3-4b", "qwen3-8b", "qwen3-14b", "qwen3-32b"]
PROMPTS, GROUP, SLOTS = 256, 8, 16  # of an RL step; completions decoded at once by one shard of the batch
SETTINGS = [
    f"rollout.prompts={PROMPTS}",
    f"rollout.group_size={GROUP}",
    "rollout.max_prompt=512",
    "rollout.max_new=1024",
    "model.dtype=bfloat16",
    "model.remat=full",
    "learner.old_logp=rescore",
]


def mesh_of(model: str, chips: int, tp: int) -> dict[str, int]:
    """As much FSDP as divides the model's width, which it shards; dp for the rest."""
    fsdp = math.gcd(chips // tp, shapes.MODELS[model]["hidden_size"])
    return {"dp": chips // tp // fsdp, "fsdp": fsdp, "tp": tp}


def config_of(model: str, chips: int, tp: int) -> Config:
    shards = chips // tp
    return shapes.config_of(
        model,
        [
            *SETTINGS,
            *(f"mesh.{axis}={n}" for axis, n in mesh_of(model, chips, tp).items()),
            f"rollout.slots={SLOTS * shards}",
            f"learner.microbatch_rows={GROUP * shards}",
        ],
    )


def estimate(model: str, name: str) -> dict[str, Any]:
    """The mesh with the least tensor parallelism that fits by the quick estimate, or the one that comes closest."""
    asked, found = topology.parse(name), []
    chip, chips = asked.chip, asked.chips
    heads = shapes.MODELS[model]["num_attention_heads"]
    for tp in (1, 2, 4, 8, 16):
        if chips % tp or heads % tp or chips // tp > PROMPTS:
            continue
        step = plan.make(config_of(model, chips, tp), chips, Target("tpu", chip.kind))
        found.append({**mesh_of(model, chips, tp), "bytes": plan.peak(step), "memory": chip.memory})
    return next((f for f in found if f["bytes"] <= chip.memory), min(found, key=lambda f: f["bytes"]))


def compiled(model: str, name: str) -> dict[str, Any]:
    """What libtpu says of the estimate's mesh."""
    mesh = estimate(model, name)
    report = topology.make(config_of(model, topology.parse(name).chips, mesh["tp"]), name)
    programs = [
        {
            "name": p.name,
            "runs": p.runs,
            "memory": p.memory and p.memory._asdict(),
            "bytes": p.needs,
            "flops": p.work.flops if p.work else None,
            "collectives": p.work.collectives if p.work else None,
        }
        for p in report.programs
    ]
    return {
        **{axis: mesh[axis] for axis in ("dp", "fsdp", "tp")},
        "fits": report.fits,
        "bytes": report.peak,
        "jax": jax.__version__,
        "programs": programs,
    }


def table(results: dict[str, Any]) -> str:
    """Markdown: a row for each model, a column for each slice."""
    lines = []
    for chip in ("v5e", "v6e", "v5p"):
        names = [name for name in SLICES if name.startswith(chip)]
        lines += [
            "",
            f"| {chip} | " + " | ".join(n.partition(":")[2] for n in names) + " |",
            "| --- " * (len(names) + 1) + "|",
        ]
        for model in MODELS:
            cells = [
                _cell(results["estimates"][f"{model}@{name}"], results["compiled"].get(f"{model}@{name}"))
                for name in names
            ]
            lines.append(f"| {model} | " + " | ".join(cells) + " |")
    exact = [
        f"| {key} | {_mesh(c)} | {c['bytes'] / 2**30:.2f} | {quick / 2**30:.2f} | {100 * (quick / c['bytes'] - 1):+.1f} % "
        f"| {_sent(c) / 2**30:.2f} |"
        for key, c in sorted(results["compiled"].items())
        for quick in [results["estimates"][key]["bytes"]]
    ]
    head = ["", "| compiled | mesh | GiB | estimated GiB | difference | GiB sent in a gradient |", "| --- " * 6 + "|"]
    return "\n".join(lines + head + exact).strip()


def _sent(exact: dict[str, Any]) -> float:
    (gradient,) = (p for p in exact["programs"] if p["name"] == "gradient")
    return sum(sent for _, sent in (gradient["collectives"] or {}).values())


def _mesh(used: dict[str, Any]) -> str:
    axes = ("dp", "fsdp", "tp") if used.get("dp", 1) > 1 else ("fsdp", "tp")
    return " × ".join(f"{axis} {used[axis]}" for axis in axes)


def _cell(quick: dict[str, Any], exact: dict[str, Any] | None) -> str:
    used = exact or quick
    fits = exact["fits"] if exact else quick["bytes"] <= quick["memory"]
    said = f"{_mesh(used)}, {used['bytes'] / 2**30:.1f}"
    return (f"**{said}**" if exact else said) if fits else f"no ({used['bytes'] / 2**30:.0f})"


def load() -> dict[str, Any]:
    """The committed results."""
    path = RESULTS / "topologies.json"
    return json.loads(path.read_text()) if path.exists() else {"compiled": {}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", nargs="*", default=[], metavar="MODEL@SLICE")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    results = load()
    results["estimates"] = {f"{model}@{name}": estimate(model, name) for model in MODELS for name in SLICES}
    for key in [None, *args.compile]:
        if key is not None and key not in results["compiled"]:
            results["compiled"][key] = compiled(*key.split("@"))
        (RESULTS / "topologies.json").write_text(json.dumps(results, indent=1) + "\n")
        (RESULTS / "topologies.md").write_text(table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
