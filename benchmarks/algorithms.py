"""Every method that `train` accepts, for 30 RL steps from one warm start: JSON, and from it a table and a plot.

    python benchmarks/algorithms.py

Each file of configs/algorithms/ is layered over the quickstart: same model, warm start, seed, learning rate and number of
rows for all; `ADAPTED` and `OWN_START` say where that cannot be. Each method runs in a process of its own. Results are kept: a
later run does the methods that have none, --only repeats some. The plot needs matplotlib.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import zlib
from importlib import metadata
from pathlib import Path
from statistics import fmean, median
from typing import Any

import yaml

QUICKSTART = "configs/quickstart.yaml"
METHODS = Path("configs/algorithms")
REFERENCE = "grpo"
STEPS, ROWS, GROUP = 30, 512, 8
K, SAMPLES = 4, 8  # pass@K of SAMPLES completions at temperature 1
PROBLEMS = 512  # held out
ENDS = 5  # first and last steps whose mean reward and entropy the table gives
SETTINGS = [
    f"run.steps={STEPS}",
    "run.seed=0",
    "run.samples_every=0",
    f"rollout.prompts={ROWS // GROUP}",
    f"rollout.group_size={GROUP}",
    f"eval.size={PROBLEMS}",
    # Half the quickstart's rate, with which GRPO as published, neither dynamic sampling nor clip-higher, falls at first. No
    # warm-up, as methods take from one update a step to eight.
    "optimizer.lr=1e-4",
    "optimizer.warmup=0",
    "checkpoint.every=0",
    "checkpoint.keep=1",
]
# Overrides of methods that count steps or rows themselves, and what the table says of them.
ADAPTED: dict[str, tuple[list[str], str]] = {
    "aepo_entropy": ([f"algorithm.sample_num={ROWS // 40}"], ""),
    "bupo": ([f"algorithm.s_inter={STEPS // 2}"], "the first half of the steps on layer 1 of 0 to 3"),
    "d3s": ([f"algorithm.steps={STEPS}"], ""),
    "dapo_direct": (
        [f"rollout.prompts={ROWS // 24}", "algorithm.critic_steps=10", "algorithm.actor_steps=20"],
        "10 steps train the critic, 20 the policy; rewards are of 8 completions from each of 3 states of a prompt. It falls: the "
        "critic has seen 630 states and knows their mean reward only (100 steps teach it no more), so in only 1 to 6 of 63 states "
        "do steps differ in value: where a sum may end. With Monte Carlo values for the critic's, 29 to 62 of 504 rows "
        "train, and accuracy falls to 0.283",
    ),
    "epo": ([f"algorithm.steps={STEPS}"], ""),
    "info_grpo": ([], "both orders of the summands; to be right, and equally right in both"),
    "riskpo": ([], "bundles of 2 prompts; with 5 and the natural baseline it falls: no advantage is positive"),
    "rso": ([], "16 samples of a prompt, 4 of them kept; at first 58 % of the pairs tie and are left out"),
    "tgdpo": (["guide.path={work}/dpo/export"], "guided by what dpo ended with"),
    "v0": ([], "from the third step on 3 of the 64 prompts get 384 of the 512 rows; its reward is mostly theirs"),
    "xpo": ([], "at first 72 % of the pairs tie and are left out"),
}
OWN_START = {
    "e_grpo": "answers come after a thought: a warm start of its own, which leaves little to learn of its 720 sums; "
    "with 4,000 and a shorter one 0.469 → 0.816",
    "mini_rl_moe": "a model with experts, with a warm start of its own",
    "s_grpo": "answers repeat the problem: a warm start of its own",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    slugs = sorted(path.stem for path in METHODS.glob("*.yaml"))
    parser.add_argument("--only", nargs="+", choices=slugs, metavar="SLUG", help="do these, again if need be")
    parser.add_argument("--limit", type=float, default=600, help="seconds a method may take (default %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/algorithms"), help="of the runs (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/algorithms.json"))
    args = parser.parse_args()
    runs = json.loads(args.out.read_text())["runs"] if args.out.exists() else {}
    for slug in args.only or [slug for slug in slugs if slug not in runs]:
        runs[slug] = measure(slug, args.work, args.limit)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        report = {
            "command": "python benchmarks/algorithms.py",
            "settings": SETTINGS,
            "runs": dict(sorted(runs.items())),
        }
        args.out.write_text(json.dumps(report, indent=1) + "\n")
        print(f"{slug:14}", runs[slug].get("error") or " | ".join(cells(runs[slug], runs)[:6]), flush=True)
    runs = dict(sorted(runs.items()))
    picture = plot(runs, args.out.with_suffix(".png"))
    args.out.with_suffix(".md").write_text(document(runs, args.out.name, picture))


def measure(slug: str, work: Path, limit: float) -> dict[str, Any]:
    """The figures of one method, or under "error" why there are none."""
    from jaxrl_llm import algorithms

    name = yaml.safe_load((METHODS / f"{slug}.yaml").read_text())["algorithm"]["name"]
    versions = {p: metadata.version(p) for p in ("jaxrl_llm", "jax", "flax", "optax", "reasoning-gym")}
    about = {
        "axis": algorithms.paper(name).axis,
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": versions,
    }
    try:
        words, note = words_of(slug, work, limit)
        shutil.rmtree(work / slug, ignore_errors=True)
        process(words, work / f"{slug}.json", work / f"{slug}.log", limit)
    except (ValueError, RuntimeError) as error:
        return {**about, "error": str(error)}
    lines = [json.loads(line) for line in (work / slug / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "timing/step" in line]
    evaluated = [line for line in lines if "eval/accuracy" in line]
    return {
        **about,
        "words": words,
        "note": note,
        "problems": int(evaluated[0]["eval/problems"]),
        "accuracy": [line["eval/accuracy"] for line in (evaluated[0], evaluated[-1])],
        f"pass@{K}": json.loads((work / f"{slug}.json").read_text()),
        "reward": [round(line["reward/mean"], 4) for line in steps],
        "entropy": [round(line["entropy"], 4) for line in steps],
        "seconds": [round(line["timing/step"], 4) for line in steps],
    }


def words_of(slug: str, work: Path, limit: float) -> tuple[list[str], str]:
    """The words behind `train` for this method, its warm start made if need be, and the note on what is its own.

    Raises ValueError of one line where config and method do not fit.
    """
    from jaxrl_llm import cli, config_load

    base = work / "quickstart.yaml"  # without its method, whose settings are not for others; JSON is YAML
    work.mkdir(parents=True, exist_ok=True)
    plain = config_load.load_unchecked(QUICKSTART, SETTINGS).model_dump(mode="json", exclude={"algorithm"})
    base.write_text(json.dumps(plain))
    layers = [str(base), str(METHODS / f"{slug}.yaml")]
    config = config_load.load_unchecked(layers)
    parts = config.learner.minibatches
    prompts = -(-ROWS // (config.rollout.group_size * parts)) * parts
    adapted, note = ADAPTED.get(slug, ([], ""))
    own = slug in OWN_START
    start = warm_start(layers if own else layers[:1], work / f"start-{slug if own else 'all'}", limit)
    words = [
        *layers,
        *(f"run.dir={work / slug}", f"model.path={start}", "model.spec=null", "warmstart.steps=0"),
        *(f"rollout.prompts={prompts}", *(word.format(work=work) for word in adapted)),
    ]
    config = config_load.load(*cli.split(words))
    shape = (config.rollout.prompts, config.rollout.group_size)
    notes = [
        "" if shape == (ROWS // GROUP, GROUP) else "{} prompts × {}".format(*shape),
        note,
        OWN_START.get(slug, ""),
        *(f"reward with {part.reward} added" for part in config.rewards.parts),
    ]
    return words, "; ".join(n for n in notes if n)


def warm_start(layers: list[str], directory: Path, limit: float) -> Path:
    """Where the model is that methods begin with; made once."""
    exported = directory / "export"
    if not exported.is_dir():
        shutil.rmtree(directory, ignore_errors=True)
        words = [*layers, f"run.dir={directory}", "run.steps=0"]
        process(words, directory.with_suffix(".json"), directory.with_suffix(".log"), limit)
    return exported


def process(words: list[str], out: Path, log: Path, limit: float) -> None:
    """`child` in a process of its own. Raises RuntimeError with the last line of its log when it fails."""
    command = [sys.executable, __file__, "--child", str(out), *words]
    try:
        with log.open("w") as to:
            code = subprocess.run(command, stdout=to, stderr=subprocess.STDOUT, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"took more than {limit:g} seconds") from None
    if code:
        raise RuntimeError((log.read_text().strip().splitlines() or [f"exit code {code}"])[-1])


def child(out: Path, words: list[str]) -> int:
    """Train as the words say; writes pass@K before and after, where there is a model to begin with."""
    from jaxrl_llm import cli, compile_cache, config_load

    config = config_load.load(*cli.split(words))
    compile_cache.use(config.run.compile_cache)
    from jaxrl_llm.training import evaluate, loop

    sampled = config.eval.model_copy(update={"samples": SAMPLES, "k": [K], "temperature": 1.0})
    sampling = config.model_copy(update={"eval": sampled})

    def passed(path: str | None = None) -> float:
        return evaluate.run(sampling, path)[f"pass@{K}"]

    found = []
    if path := config.model.path:  # what methods of one task begin with is measured once
        kept = Path(path).parent / f"{zlib.crc32(repr((config.task, sampled)).encode()):08x}.json"
        if not kept.exists():
            kept.write_text(json.dumps(passed(path)))
        found.append(json.loads(kept.read_text()))
    code = loop.train(config)
    if code == 0:
        out.write_text(json.dumps([*found, passed()]))
    return code


# ----------------------------------------------------------------------------------------------------------- reporting


def document(runs: dict[str, Any], source: str, picture: Path | None) -> str:
    """The table of all runs, why others have none, and what they can and cannot show."""
    done = {slug: r for slug, r in runs.items() if "error" not in r}
    heads = ["method", "axis", "accuracy", f"pass@{K}", "reward", "entropy", "s/step", f"× {REFERENCE}", "note"]
    table = [heads, ["---"] * len(heads)]
    table += [[f"`{slug}`", r["axis"], *cells(r, runs), remark(r)] for slug, r in done.items()]
    refused = [f"- `{slug}` ({r['axis']}): {r['error']}" for slug, r in runs.items() if "error" in r]
    image = f"![Reward of the training rows by step, one panel for each axis]({picture.name})\n" if picture else ""
    about = f"""# Every method for {STEPS} steps

Made by `python benchmarks/algorithms.py`; [{source}]({source}) has every step, the date, the machine and the versions.

Sums of two numbers of two digits, the quickstart's model and its warm start, the same for all; one seed, {ROWS} rows a step
({ROWS // GROUP} prompts × {GROUP} completions, or as the note says), AdamW at 1e-4, and otherwise each method as its file in
`configs/algorithms/` says. Before → after: *accuracy*, greedy, and *pass@{K}*, from {SAMPLES} samples at temperature 1, on
held-out problems. First {ENDS} → last {ENDS} steps: mean *reward* of the training rows, and *entropy* as training logs it (an
estimate from the sampled tokens, or the method's own). *s/step* is the median after the first {ENDS} steps, which compile.

{STEPS} steps of one seed show that a method runs, moves the reward, and what a step costs. They do not show that one is better
than another: the learning rate was chosen for {REFERENCE} alone, and {PROBLEMS} problems tell accuracy to about ±4 points.
"""
    return "\n".join([about, image, *map(row, table), "", "Without a run on these sums:", "", *refused, ""])


def remark(run: dict[str, Any]) -> str:
    own = "" if run["problems"] == PROBLEMS else f"{run['problems']} held-out problems from its own file"
    return "; ".join(n for n in (run["note"], own) if n)


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def cells(run: dict[str, Any], runs: dict[str, Any]) -> list[str]:
    """Accuracy, pass@K, reward, entropy (none where no row is the policy's), seconds a step, and those in the reference's."""
    pairs = [run["accuracy"], run[f"pass@{K}"], ends(run["reward"]), ends(run["entropy"])]
    seconds, reference = (
        median(r["seconds"][ENDS:]) if "seconds" in r else None for r in (run, runs.get(REFERENCE, {}))
    )
    return [f"{a:.3f} → {b:.3f}" if a or b else "" for a, b in pairs] + [
        f"{seconds:.2f}",
        f"{seconds / reference:.2f}" if seconds and reference else "",
    ]


def ends(values: list[float]) -> tuple[float, float]:
    return fmean(values[:ENDS]), fmean(values[-ENDS:])


def plot(runs: dict[str, Any], path: Path) -> Path | None:
    """Mean reward of the last ENDS steps by step, one panel for each axis; grey is the reference."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return None
    axes: dict[str, list[str]] = {}
    for slug, r in runs.items():
        if "reward" in r:
            axes.setdefault(r["axis"], []).append(slug)
    if not axes:
        return None
    across = min(4, len(axes))
    down = -(-len(axes) // across)
    figure = Figure(figsize=(4 * across, 3 * down), layout="constrained")
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).flat
    for (axis, slugs), panel in zip(sorted(axes.items()), panels):  # in this order, or zip takes one panel too many
        for slug in [REFERENCE] * (REFERENCE in runs) + [slug for slug in slugs if slug != REFERENCE]:
            reward = runs[slug]["reward"]
            smooth = [fmean(reward[max(0, i - ENDS + 1) : i + 1]) for i in range(len(reward))]
            style = {"color": "0.7", "linewidth": 3} if slug == REFERENCE else {}
            panel.plot(range(1, len(smooth) + 1), smooth, label=slug, **style)
        panel.set_title(axis)
        panel.legend(fontsize="small")
    for panel in list(panels):  # those left over
        panel.axis("off")
    figure.supxlabel("RL step")
    figure.supylabel(f"reward, mean of {ENDS} steps")
    figure.savefig(path, dpi=90)
    return path


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] == "--child":
        sys.exit(child(Path(sys.argv[2]), sys.argv[3:]))
    main()
