"""Ours against Tunix and TRL on the same shapes, interleaved in one run: every round runs each side once, one process at a time.

    python benchmarks/vs_peers.py --tunix-python TUNIX/bin/python --tunix-harness peer_tunix.py \\
        --trl-python TRL/bin/python --trl-harness peer_trl.py --cases uniform geometric step

The harnesses print one JSON object for given shapes; each peer lives in its own virtual environment. A peer without a
python is left out. Ours is `jaxrl_llm bench`, with Tunix's model (Qwen2, ffn 4 d) against Tunix and TRL's (Qwen3, ffn 3 d)
against TRL, in float32, with AdamW. A ratio above 1 is in our favour: tokens/s ours over theirs, seconds and bytes theirs
over ours. A round's figure is the median of the repetitions inside a process; the spread shown is over rounds.

Any other shapes: --case NAME:what=rollout,prompts=16,group=8,prompt=512,new=64,stop=0.02,layers=24,dim=128
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Figures = dict[str, float]
PEERS = ("tunix", "trl")
PACKAGES = {
    "ours": ("jaxrl_llm", "jax", "flax"),
    "tunix": ("google-tunix", "jax", "flax"),
    "trl": ("trl", "transformers", "torch"),
}
PARTS = {"rollout": "sampler", "train": "train", "step": "grpo"}  # of Tunix's harness
COMPARED = (
    "tokens_per_s",
    "cpu_per_token_s",
    "start_s",
    "compile_s",
    "peak_mib",
)  # of all but the first, less is better
ALONE = ("xla_compile_s", "temporaries_mib", "outside_share")  # which the peers' harnesses do not tell


@dataclasses.dataclass(frozen=True)
class Case:
    what: str = "rollout"  # rollout, train or step
    prompts: int = 4
    group: int = 8
    prompt: int = 64
    new: int = 128
    stop: float = 0.0  # share of tokens that end a completion; TRL's harness knows only 0
    layers: int = 4
    dim: int = 256
    heads: int = 4
    kv: int = 2
    head: int = 64
    vocab: int = 4096
    warm: bool = False  # with a persistent compilation cache, filled before
    peers: tuple[str, ...] = PEERS


CASES = {
    "uniform": Case(),
    "long": Case(prompt=512, new=64, peers=("tunix",)),
    "geometric": Case(prompts=16, stop=0.02, peers=("tunix",)),
    "train": Case("train"),
    "step": Case("step"),
    "step-geometric": Case("step", stop=0.02, peers=("tunix",)),
    "step-warm": Case("step", warm=True),
    "deep": Case("train", layers=24, dim=128, heads=2, kv=1, peers=("tunix",)),
}


def main() -> None:
    args = parse()
    cases = {name: CASES[name] for name in args.cases} | dict(map(custom, args.case))
    if args.rounds < 5:
        print(f"{args.rounds} rounds: fewer than 5 tell little", file=sys.stderr)
    report: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "command": "python benchmarks/vs_peers.py --cases " + " ".join(args.cases + [f"--case {c}" for c in args.case]),
        "versions": versions(args),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "ours": args.ours,
        "cases": {name: dataclasses.asdict(case) for name, case in cases.items()},
    }
    runs: list[dict[str, Any]] = []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(args.rounds):
            for name, case in cases.items():
                for side, against, command, read in sides(case, args, Path(scratch)):
                    caching = case.warm and (side == "ours" or "--cache-dir" in command)
                    if caching and number == 0:
                        measure(command, read)  # fills the cache
                    runs.append({"round": number, "case": name, "side": side, "against": against})
                    runs[-1] |= measure(command, read)
                    print(" ".join(f"{k}={v}" for k, v in runs[-1].items()), file=sys.stderr, flush=True)
            # A round at a time: what was measured stays when a later one is cut short.
            report |= {"ratios": ratios(runs), "alone": alone(runs), "runs": runs}
            args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", nargs="*", choices=list(CASES), default=list(CASES), metavar="CASE", help=", ".join(CASES)
    )
    parser.add_argument("--case", action="append", default=[], metavar="NAME:KEY=VALUE,...", help="other shapes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--reps", type=int, default=3, help="timed repetitions inside a process")
    parser.add_argument("--ours-python", default=sys.executable)
    parser.add_argument(
        "--ours", nargs="*", default=["learner.layout=shared"], metavar="KEY=VALUE", help="overrides for ours"
    )
    for peer in PEERS:
        parser.add_argument(f"--{peer}-python", help="its interpreter; none leaves it out")
        parser.add_argument(f"--{peer}-harness", help=f"path of peer_{peer}.py")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/vs_peers.json"))
    return parser.parse_args()


def versions(args: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Package versions in each environment."""
    code = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    found = {}
    for side, names in PACKAGES.items():
        if python := getattr(args, f"{side}_python"):
            found[side] = json.loads(execute([python, "-c", code, *names]))
    return found


def custom(text: str) -> tuple[str, Case]:
    """A case of NAME:KEY=VALUE,...; fields left out are those of `uniform`."""
    name, _, fields = text.partition(":")
    types = {f.name: type(f.default) for f in dataclasses.fields(Case) if f.name not in ("warm", "peers")}
    values = dict(pair.split("=") for pair in fields.split(",") if pair)
    if unknown := set(values) - set(types):
        sys.exit(f"--case {text}: no field {unknown.pop()!r}, expected some of {', '.join(types)}")
    case = Case(**{key: types[key](value) for key, value in values.items()})
    return name, dataclasses.replace(case, peers=PEERS if case.stop == 0 else ("tunix",))


def sides(
    case: Case, args: argparse.Namespace, scratch: Path
) -> list[tuple[str, str, list[str], Callable[[str], Figures]]]:
    """(side, against whom, command, how to read its standard output) for ours and each peer in turn."""
    out: list[Any] = []
    for peer in case.peers:
        python, harness = getattr(args, f"{peer}_python"), getattr(args, f"{peer}_harness")
        if not python:
            continue
        if not harness:
            sys.exit(f"--{peer}-harness: missing, expected the path of peer_{peer}.py")
        ours = ours_command(case, args, peer, scratch)
        out.append(("ours", peer, ours, lambda _, c=case, p=scratch / "ours.json": read_ours(c, p)))
        theirs = tunix_command if peer == "tunix" else trl_command
        read = read_tunix if peer == "tunix" else read_trl
        out.append(
            (peer, peer, [python, harness, *theirs(case, args, scratch)], lambda text, c=case, r=read: r(c, text))
        )
    return out


def ours_command(case: Case, args: argparse.Namespace, peer: str, scratch: Path) -> list[str]:
    spec = {
        "hidden_size": case.dim,
        "intermediate_size": (4 if peer == "tunix" else 3) * case.dim,
        "num_hidden_layers": case.layers,
        "num_attention_heads": case.heads,
        "num_key_value_heads": case.kv,
        "head_dim": case.head,
        "vocab_size": case.vocab,
    }
    rollout = {"prompts": case.prompts, "group_size": case.group, "max_prompt": case.prompt, "max_new": case.new}
    words = [f"model.spec.{k}={v}" for k, v in spec.items()] + [f"rollout.{k}={v}" for k, v in rollout.items()]
    options = [
        "--model",
        "qwen2-5m" if peer == "tunix" else "qwen3-4m",
        "--what",
        case.what,
        "--repeats",
        str(args.reps),
    ]
    options += ["--stop-rate", str(case.stop), "--json", str(scratch / "ours.json")]
    options += ["--peak-flops", "1e12", "--peak-bandwidth", "1e11"]  # not asked for here: saves measuring them
    if case.warm:
        options += ["--cache-dir", str(scratch / f"cache-ours-{peer}")]
    return [args.ours_python, "-m", "jaxrl_llm.cli", "bench", *words, *args.ours, *options]


def tunix_command(case: Case, args: argparse.Namespace, scratch: Path) -> list[str]:
    options = {
        "part": PARTS[case.what],
        "layers": case.layers,
        "dim": case.dim,
        "heads": case.heads,
        "kv-heads": case.kv,
        "head-dim": case.head,
        "ffn": 4 * case.dim,
        "vocab": case.vocab,
        "prompts": case.prompts,
        "group": case.group,
        "prompt-len": case.prompt,
        "new-tokens": case.new,
        "eos-rate": case.stop,
        "reps": args.reps,
        "steps": args.reps + 2,
    }
    if case.warm:
        options["cache-dir"] = scratch / "cache-tunix"
    return [str(word) for name, value in options.items() for word in (f"--{name}", value)]


def trl_command(case: Case, args: argparse.Namespace, scratch: Path) -> list[str]:
    options = {
        "layers": case.layers,
        "d-model": case.dim,
        "heads": case.heads,
        "kv-heads": case.kv,
        "head-dim": case.head,
        "ffn": 3 * case.dim,
        "vocab": case.vocab,
        "batch": case.prompts * case.group,
        "group": case.group,
        "prompt-len": case.prompt,
        "new-tokens": case.new,
        "reps": args.reps,
        "steps": args.reps + 2,
    }
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    return [*words, "--skip-micro" if case.what == "step" else "--skip-trainer"]


def execute(command: Sequence[str]) -> str:
    """Standard output of a command; raises RuntimeError with the end of its errors when it fails."""
    env = {"JAX_PLATFORMS": "cpu", **os.environ}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return done.stdout


def measure(command: Sequence[str], read: Callable[[str], Figures]) -> dict[str, Any]:
    """Figures of one process, or why there are none."""
    load = round(os.getloadavg()[0], 2)
    try:
        return {**{k: round(v, 6) for k, v in read(execute(command)).items()}, "load_before": load}
    except (RuntimeError, KeyError, ValueError, IndexError) as error:
        return {"error": f"{type(error).__name__}: {error}", "load_before": load}


def last_json(text: str) -> dict[str, Any]:
    return json.loads(text.strip().splitlines()[-1])


def read_ours(case: Case, path: Path) -> Figures:
    report = json.loads(path.read_text())
    path.unlink()
    r = report[case.what]
    out = {
        "tokens_per_s": r["tokens_per_s"]["median"],
        "cpu_per_token_s": r["cpu_s"]["median"] / _number(r["tokens"]),
        "peak_mib": 1024 * r["memory/host_peak_gib"],
        "compile_s": r["first_s"] - r["seconds"]["median"],
    }
    if case.what == "train":
        out["xla_compile_s"] = r["programs"]["compile_s"]
        out["temporaries_mib"] = max(report["temporaries"].values()) / 2**20
    if case.what == "step":
        out |= {"start_s": r["start_to_first_update_s"], "outside_share": r["outside"]["median"]}
    return out


def _number(tokens: Any) -> float:
    return tokens["median"] if isinstance(tokens, dict) else tokens


def read_tunix(case: Case, text: str) -> Figures:
    r = last_json(text)[PARTS[case.what]]
    if case.what == "rollout":
        tokens, speed, clock = r["new_tokens_kept"], r["tokens_per_s"], r["call"]
    elif case.what == "train":
        tokens, speed, clock = r["tokens_per_step"], r["tokens_per_s"], r["step"]
    else:
        tokens, speed, clock = r["new_tokens_kept"], r["new_tokens_per_s_end_to_end"], r["step"]
    out = {"tokens_per_s": speed, "cpu_per_token_s": clock["cpu_median_s"] / tokens, "peak_mib": r["peak_rss_mb"]}
    if case.what == "step":
        return out | {"start_s": r["process_start_to_first_step_s"]}
    return out | {"compile_s": r["compile_s"]}


def read_trl(case: Case, text: str) -> Figures:
    r, rows = last_json(text), case.prompts * case.group
    if case.what == "step":
        out = {"tokens_per_s": rows * case.new / r["steady_step_s"], "start_s": r["process_start_to_first_step_s"]}
    elif case.what == "rollout":
        out = {"tokens_per_s": r["gen_tokens_per_s"], "cpu_per_token_s": r["gen_cpu_s"] / (rows * case.new)}
    else:
        tokens = rows * (case.prompt + case.new)
        out = {"tokens_per_s": r["train_tokens_per_s"], "cpu_per_token_s": r["train_cpu_s"] / tokens}
    # Its micro-measurements share one process, so only whole steps have a peak of their own.
    return out | ({"peak_mib": r["peak_rss_mib"]} if case.what == "step" else {})


def ratios(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per case, peer and figure that both have: the spread of the rounds' ratios, and both sides' medians."""
    out = []
    for case, peer in dict.fromkeys((r["case"], r["against"]) for r in runs):
        mine, theirs = (
            {r["round"]: r for r in runs if (r["case"], r["against"], r["side"]) == (case, peer, side)}
            for side in ("ours", peer)
        )
        for name in COMPARED:
            pairs = [(r[name], theirs[n][name]) for n, r in mine.items() if name in r and name in theirs.get(n, {})]
            if pairs:
                better = [a / b if name == "tokens_per_s" else b / a for a, b in pairs]
                medians = {side: statistics.median(x) for side, x in zip(("ours", "theirs"), zip(*pairs))}
                out.append({"case": case, "peer": peer, "figure": name, **spread(better), **medians})
    return out


def alone(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Figures of ours that have no counterpart."""
    out = []
    for case, peer in dict.fromkeys((r["case"], r["against"]) for r in runs):
        for name in ALONE:
            mine = (r for r in runs if (r["case"], r["against"], r["side"]) == (case, peer, "ours"))
            if values := [r[name] for r in mine if name in r]:
                out.append({"case": case, "model_of": peer, "figure": name, **spread(values)})
    return out


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values), "rounds": len(values)}


def table(report: dict[str, Any]) -> str:
    """Ratios, then ours alone, then what failed."""
    head = f"{'case':15} {'peer':6} {'figure':16} {'min':>8} {'median':>8} {'max':>8}"
    lines = [head + f" {'ours':>12} {'theirs':>12} rounds   (above 1: in our favour)"]
    for r in report["ratios"]:
        values = " ".join(f"{r[k]:7.2f}×" for k in ("min", "median", "max"))
        ends = f"{r['ours']:12,.6g} {r['theirs']:12,.6g} {r['rounds']:6}"
        lines.append(f"{r['case']:15} {r['peer']:6} {r['figure']:16} {values} {ends}")
    for r in report["alone"]:
        values = " ".join(f"{r[k]:8.4g}" for k in ("min", "median", "max"))
        lines.append(f"{r['case']:15} {'':6} {r['figure']:16} {values}   (ours alone, model of {r['model_of']})")
    failed = [r for r in report["runs"] if "error" in r]
    return "\n".join([*lines, *(f"failed: round {r['round']} {r['case']} {r['side']}: {r['error']}" for r in failed)])


if __name__ == "__main__":
    main()
