"""`jaxrl_llm bench`: measure, print a table, write JSON."""

import datetime
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_llm import compile_cache
from jaxrl_llm.benching import clocks, measure, shapes
from jaxrl_llm.benching.clocks import Peaks, Programs
from jaxrl_llm.config import Config
from jaxrl_llm.models import decoder
from jaxrl_llm.training import metrics, parts

WHAT = ("rollout", "logprob", "train", "step")
PACKAGES = ("jaxrl_llm", "jax", "jaxlib", "flax", "optax", "numpy")


def run(
    config: Config,
    *,
    what: Sequence[str] = WHAT,
    repeats: int = 5,
    stop_rate: float | None = None,
    cache_dir: str | None = None,
    peak_flops: float | None = None,
    peak_bandwidth: float | None = None,
) -> dict[str, Any]:
    """Measure `what` in the order of `WHAT`; everything as plain data for JSON.

    Args:
      stop_rate: share of tokens that end a completion (`shapes.stop_ids`); None: the tokenizer's own end tokens.
      cache_dir: directory of the persistent compilation cache; None leaves JAX's own setting, normally none.
      peak_flops, peak_bandwidth: of one device, FLOP/s and bytes/s; None measures both at the end.
    Raises ValueError for an unknown measurement or no repetitions, and whatever the config gets wrong.
    """
    if unknown := [w for w in what if w not in WHAT]:
        raise ValueError(f"--what {unknown[0]!r}: expected some of {', '.join(WHAT)}")
    if repeats < 1:
        raise ValueError(f"--repeats {repeats}: expected at least 1")
    if cache_dir is not None:
        compile_cache.use(cache_dir)
    programs, load = Programs(), os.getloadavg()[0]
    made, params = parts.make(config)
    if stop_rate is not None:
        made.words = shapes.with_stop_rate(made.words, stop_rate, made.spec.vocab)
    results: dict[str, Any] = {}
    with made.scorer:
        subject = measure.Subject(made, params, stop_rate or 0.0)
        del params
        if "rollout" in what:
            results["rollout"] = measure.rollout(subject, repeats, programs) | metrics.memory()
        if wanted := [w for w in ("logprob", "train") if w in what]:
            found = measure.learner_parts(subject, wanted, repeats, programs)
            results |= {name: result | metrics.memory() for name, result in found.items()}
        if "step" in what:
            results["step"] = measure.step(subject, repeats, programs) | metrics.memory()
    programs.close()
    largest = clocks.temporaries()
    peaks = Peaks(peak_flops or 0, peak_bandwidth or 0)
    if not all(peaks):
        found_peaks = clocks.measure_peaks(jnp.dtype(config.model.dtype))
        peaks = Peaks(*(given or measured for given, measured in zip(peaks, found_peaks)))
    results = {name: measure.with_peaks(r, peaks, made.mesh.size) for name, r in results.items()}
    return {
        "device": {
            "platform": jax.default_backend(),
            "kind": jax.devices()[0].device_kind,
            "count": made.mesh.size,
        },
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "load_before": load, "load_after": os.getloadavg()[0]},
        "versions": {"python": platform.python_version(), **_versions()},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "peaks": {**peaks._asdict(), "measured": peak_flops is None or peak_bandwidth is None},
        "shape": _shape(config, made, stop_rate),
        "temporaries": largest,
        **results,
    }


def _shape(config: Config, made: parts.Parts, stop_rate: float | None) -> dict[str, Any]:
    plain = config.model_dump(mode="json")
    plain["tokenizer"]["chars"] = config.tokenizer.chars and f"{len(config.tokenizer.chars)} characters"
    return {"config": plain, "stop_rate": stop_rate, "vocab": made.spec.vocab, "parameters": parameters(made)}


def parameters(made: parts.Parts) -> int:
    """How many numbers the policy has; a tied embedding counts once."""
    return sum(x.size for x in jax.tree.leaves(decoder.abstract(made.spec)))


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    device, peaks, shape = report["device"], report["peaks"], report["shape"]
    rollout = shape["config"]["rollout"]
    lines = [
        f"{device['count']} × {device['kind']} ({device['platform']}); peaks {peaks['flops'] / 1e9:,.0f} GFLOP/s "
        f"{shape['config']['model']['dtype']}, {peaks['bandwidth'] / 1e9:,.0f} GB/s",
        f"{shape['parameters'] / 1e6:.2f} M parameters, {rollout['prompts']} prompts × {rollout['group_size']}, "
        f"{rollout['max_prompt']} + {rollout['max_new']} tokens, stop rate {shape['stop_rate'] or 0:g}",
        "",
        f"{'':8} {'tokens/s':>30} {'seconds':>25} {'first':>7} {'compile':>8} {'programs':>9} {'again':>6} {'MFU':>6} {'peak GiB':>9}",
    ]
    for name in (w for w in WHAT if w in report):
        r = report[name]
        rate = " ".join(f"{r['tokens_per_s'][k]:>9,.0f}" for k in ("min", "median", "max"))
        seconds = " ".join(f"{r['seconds'][k]:>8.4g}" for k in ("min", "median", "max"))
        mfu = f"{100 * r['mfu']['median']:.1f}%" if "mfu" in r else ""
        peak = r.get("memory/device_peak_gib", r["memory/host_peak_gib"])
        lines.append(
            f"{name:8} {rate:>30} {seconds:>25} {r['first_s']:>7.2f} {r['programs']['compile_s']:>8.2f} "
            f"{r['programs']['count']:>9} {r['recompiles']:>6} {mfu:>6} {peak:>9.2f}"
        )
    lines.append("(min, median, max of the repetitions; peak memory is that of the process so far)")
    if "rollout" in report:
        r = report["rollout"]
        lines.append(
            f"decode: {r['decode_step_ms']['median']:.3g} ms a step, prefill and host {r['prefill_and_one_token_s']['median']:.3g} s, "
            f"{100 * r['slot_utilisation']['median']:.0f}% of slots used, "
            f"{r['decode_bandwidth']['median'] / 1e9:.1f} GB/s = {100 * r['bandwidth_utilisation']['median']:.0f}% of a copy's "
            f"({100 * r['bandwidth_utilisation_shared']['median']:.0f}% counting shared contexts once)"
        )
    if "step" in report:
        r = report["step"]
        phases = ", ".join(f"{name} {s['median']:.3f}" for name, s in r["phases"].items())
        lines.append(
            f"step: {phases} s; {100 * r['outside']['median']:.1f}% outside generation, rescoring and update; "
            f"process start to first update {r['start_to_first_update_s']:.2f} s"
        )
    if report["temporaries"]:
        name, size = next(iter(report["temporaries"].items()))
        lines.append(f"largest temporaries: {size / 2**20:.1f} MiB in {name}")
    return "\n".join(lines)


def write(report: dict[str, Any], path: str) -> None:
    """The report as JSON, in a directory that is made if need be."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(report, indent=1) + "\n")
