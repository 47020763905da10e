"""The numbers of a step under the names users know: from host rows, packed arrays, the learner, clocks and the machine."""

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxrl_llm.models.spec import ModelSpec
from jaxrl_llm.rollout.rows import Row
from jaxrl_llm.tasks.base import RewardSpec
from jaxrl_llm.types import CURRENT, GIVEN, Metrics, Rollouts, metric_value

SPREAD_TOL = 1e-6  # as in advantages.group: rewards closer than this, relatively, are the same
PHASES = ("collect", "generate", "score", "rescore", "update")


def of_rows(rows: Sequence[Row], rewards: Sequence[RewardSpec], correct_at: float) -> dict[str, float]:
    """Reward and completion metrics of a step's fresh rows (those in statistics that were sampled).

    `reward/mean` and `reward/std` are of the weighted total over scored rows, `reward/<part>` of the unweighted part.
    `accuracy` is the share of scored rows whose first part, the task's own, reaches `correct_at`.
    `frac_reward_zero_std` is the share of groups (of at least two scored rows) whose totals all agree, `groups_of_one`
    the number of those with a single scored row.
    `completions/clipped_ratio` is the share of rows cut off by the length limit.
    """
    fresh = [r for r in rows if r.stat and r.source != GIVEN]
    scored = [r for r in fresh if r.scored]
    totals = np.array([r.reward.sum() for r in scored], np.float64)
    out = {
        "reward/mean": float(totals.mean()) if scored else 0.0,
        "reward/std": float(totals.std()) if scored else 0.0,
        "unscored/rows": float(len(fresh) - len(scored)),
    }
    for part in rewards:
        values = [r.parts[part.name] for r in scored if part.name in r.parts]
        out[f"reward/{part.name}"] = float(np.mean(values)) if values else 0.0
    if rewards:
        correct = [r.parts[rewards[0].name] >= correct_at for r in scored if rewards[0].name in r.parts]
        out["accuracy"] = float(np.mean(correct)) if correct else 0.0
    groups: dict[int, list[float]] = {}
    for r, total in zip(scored, totals):
        groups.setdefault(r.group, []).append(float(total))
    same = [_agree(g) for g in groups.values() if len(g) > 1]
    out["frac_reward_zero_std"] = float(np.mean(same)) if same else 0.0
    out["groups_of_one"] = float(sum(len(g) == 1 for g in groups.values()))
    lengths = [len(r.tokens) for r in fresh] or [0]
    out["completions/mean_length"] = float(np.mean(lengths))
    out["completions/max_length"] = float(max(lengths))
    out["completions/min_length"] = float(min(lengths))
    out["completions/clipped_ratio"] = float(np.mean([r.truncated for r in fresh])) if fresh else 0.0
    return out


def of_batch(
    rollouts: Rollouts, advantage: Float[Array, "B T"] | None = None, rescored: bool = False
) -> dict[str, float]:
    """Metrics of the packed batch: advantages over trained tokens; over those sampled now, `entropy` estimated by the
    sampled tokens' -old_logp (nats) and, when `old_logp` was rescored by the learner, its distance to `sampler_logp`."""
    trained = np.asarray(rollouts.trained)
    fresh = trained & (np.asarray(rollouts.source) == CURRENT)[:, None]
    old_logp = np.asarray(rollouts.old_logp, np.float64)[fresh]
    out = {"entropy": float(-old_logp.mean()) if old_logp.size else 0.0}
    if rescored:
        apart = np.abs(old_logp - np.asarray(rollouts.sampler_logp, np.float64)[fresh])
        out["sampling/logp_difference_mean"] = float(apart.mean()) if apart.size else 0.0
        out["sampling/logp_difference_max"] = float(apart.max()) if apart.size else 0.0
    if advantage is not None:
        a = np.asarray(advantage, np.float64)[trained]
        for name in ("mean", "std", "min", "max"):
            out[f"advantages/{name}"] = float(getattr(a, name)()) if a.size else 0.0
    return out


def values(metrics: Metrics) -> dict[str, float]:
    """Device metrics as numbers."""
    return {name: metric_value(m) for name, m in jax.device_get(metrics).items()}


def _agree(rewards: Sequence[float]) -> bool:
    return max(rewards) - min(rewards) <= SPREAD_TOL * (1 + max(map(abs, rewards)))


class Timer:
    """Seconds by phase. Phases may nest; an inner one's time is not counted in the outer one."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._spent: dict[str, float] = {}
        self._stack: list[str] = []
        self._began = self._mark = clock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Everything inside counts as `name`."""
        self._charge()
        self._stack.append(name)
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()

    def take(self) -> dict[str, float]:
        """`timing/<phase>`, `timing/other` and `timing/step` (their sum) since the last call, and begin anew."""
        self._charge()
        spent = {**dict.fromkeys(PHASES, 0.0), **self._spent}
        began, self._began = self._began, self._mark
        self._spent = {}
        whole = self._mark - began
        out = {f"timing/{name}": seconds for name, seconds in spent.items() if name != "other"}
        return {**out, "timing/other": whole - sum(out.values()), "timing/step": whole}

    def _charge(self) -> None:
        now = self._clock()
        name = self._stack[-1] if self._stack else "other"
        self._spent[name] = self._spent.get(name, 0.0) + now - self._mark
        self._mark = now


def training_flops(spec: ModelSpec, parameters: int, lengths: Sequence[int]) -> float:
    """Floating-point operations of one forward and backward pass over sequences of these lengths (PaLM, appendix B).

    6·N per token, and for attention 12·(heads · head_dim) per layer and pair of positions, halved because it is causal.
    Experts that a token does not go to are not counted.
    """
    n = np.asarray(lengths, np.float64)
    if e := spec.experts:
        parameters -= spec.sparse.count(True) * (e.count - e.per_token) * 3 * spec.embed * e.mlp
    return float(6 * parameters * n.sum() + 6 * spec.layers * spec.heads * spec.head_dim * (n**2).sum())


def mfu(flops: float, seconds: float, devices: int, peak: float) -> float:
    """Model FLOPs utilisation: the share of the devices' `peak` (FLOP/s each) that `flops` in `seconds` come to."""
    return flops / (seconds * devices * peak) if seconds > 0 else 0.0


# Dense bfloat16 FLOP/s of one device by the start of its kind, from the makers' data sheets.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device: Any = None) -> float:
    """Peak FLOP/s of a device: the maker's figure when known, else the speed of a large float32 matrix product."""
    device = device or jax.local_devices()[0]
    for kind, peak in PEAKS.items():
        if device.device_kind.startswith(kind):
            return peak
    n, product = 1024, jax.jit(jnp.dot)
    x = jax.device_put(jnp.ones((n, n), jnp.float32), device)
    product(x, x).block_until_ready()
    times = []
    for _ in range(3):
        began = time.perf_counter()
        product(x, x).block_until_ready()
        times.append(time.perf_counter() - began)
    return 2 * n**3 / min(times)


def memory() -> dict[str, float]:
    """Peak memory so far in GiB: the fullest local device where the backend tells, and this process on the host."""
    stats = [d.memory_stats() or {} for d in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    out = {"memory/host_peak_gib": rss / 2**30}
    return {**out, "memory/device_peak_gib": max(peaks) / 2**30} if peaks else out


class Compilations:
    """Counts the programs XLA compiled (or loaded from the persistent cache) since the last `take`."""

    def __init__(self):
        self._count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def take(self) -> int:
        count, self._count = self._count, 0
        return count

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        self._count += event == "/jax/core/compile/backend_compile_duration"


def throughput(rows: Sequence[Row], timing: Mapping[str, float]) -> dict[str, float]:
    """`tokens_per_second`: completion tokens of the step over all of its time, and of generation alone."""
    tokens = sum(len(r.tokens) for r in rows if r.stat)
    out = {"tokens_per_second": tokens / timing["timing/step"] if timing["timing/step"] > 0 else 0.0}
    if timing["timing/generate"] > 0:
        out["tokens_per_second/generate"] = tokens / timing["timing/generate"]
    return out
