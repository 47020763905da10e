"""What a measurement is made of: spreads of seconds, programs compiled, the device's peaks, and the bytes decoding must read."""

import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.models import decoder
from jaxrl_llm.models.spec import ModelSpec

Lengths = Sequence[int] | np.ndarray

_IMPORTED = time.time()
_STAGES = {
    "/jax/core/compile/jaxpr_trace_duration": "trace_s",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower_s",
    "/jax/core/compile/backend_compile_duration": "compile_s",
}
_CACHE_HIT = "/jax/compilation_cache/cache_hits"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Minimum, median and maximum of repetitions, and how many there were."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values), "n": len(values)}


class Timed(NamedTuple):
    seconds: float  # wall clock
    cpu: float  # of all threads of this process; on a shared machine it varies less
    value: Any


def timed(call: Callable[[], Any]) -> Timed:
    """Run `call` and wait until its result is on the device."""
    began, cpu = time.perf_counter(), time.process_time()
    out = jax.block_until_ready(call())
    return Timed(time.perf_counter() - began, time.process_time() - cpu, out)


def process_seconds() -> float:
    """Seconds since this process started, interpreter start included; where /proc does not tell, since this import."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        up = float(Path("/proc/uptime").read_text().split()[0])
        return up - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except OSError:
        return time.time() - _IMPORTED


class Programs:
    """The programs compiled since the last `take`, by name: how many, and seconds to trace, lower and compile them.

    Loading a program from the persistent cache counts as compiling it; `cache_hits` says how many were. Tracing one
    program may contain that of others, and threads may compile side by side, so seconds can add up to more than passed.
    """

    def __init__(self):
        self._by_name: dict[str, dict[str, float]] = {}
        self._reset()
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        jax.monitoring.register_event_listener(self._hit)

    def take(self) -> dict[str, Any]:
        by_name = dict(sorted(self._by_name.items(), key=lambda kv: -kv[1]["compile_s"]))
        out = {
            "count": int(sum(p["count"] for p in by_name.values())),
            "cache_hits": self._hits,
            **{s: sum(p.get(s, 0.0) for p in by_name.values()) for s in _STAGES.values()},
            "by_name": by_name,
        }
        self._reset()
        return out

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)
        jax.monitoring.unregister_event_listener(self._hit)

    def _reset(self) -> None:
        self._by_name, self._hits = defaultdict(lambda: {"count": 0, "compile_s": 0.0}), 0

    def _hit(self, event: str, **kwargs: Any) -> None:
        self._hits += event == _CACHE_HIT

    def _listen(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        if (stage := _STAGES.get(event)) is not None:
            name = str(kwargs.get("fun_name", "?")).removeprefix("jit(").removesuffix(")")
            entry = self._by_name[name]
            entry[stage] = entry.get(stage, 0.0) + duration_secs
            entry["count"] += stage == "compile_s"


def temporaries() -> dict[str, int]:
    """Bytes of temporary buffers of the programs now alive, by name, the largest of a name; largest first."""
    found: dict[str, int] = {}
    for program in jax.local_devices()[0].client.live_executables():
        name = program.hlo_modules()[0].name.removeprefix("jit_")
        found[name] = max(found.get(name, 0), program.get_compiled_memory_stats().temp_size_in_bytes)
    return dict(sorted(((k, v) for k, v in found.items() if v), key=lambda kv: -kv[1]))


class Peaks(NamedTuple):
    """What one device can do at most."""

    flops: float  # multiply-adds × 2, per second, of matrix products in the compute dtype
    bandwidth: float  # bytes read and written per second


def measure_peaks(dtype: Any) -> Peaks:
    """The rate of a large matrix product and of reading and writing a large buffer on the first local device; best of several.

    The buffer is updated in place: a fresh one would also measure the operating system handing out pages.
    """
    n, megabytes = (2048, 256) if jax.default_backend() == "cpu" else (8192, 2048)
    x = jnp.ones((n, n), dtype)
    buffer = jnp.zeros((megabytes << 20) // 4, jnp.float32)
    product, update = jax.jit(jnp.dot), jax.jit(lambda b: b + 1, donate_argnums=0)
    moved = 2 * buffer.nbytes
    return Peaks(2 * n**3 / _best(lambda _: product(x, x), x), moved / _best(update, buffer))


def _best(call: Callable[[Any], Any], x: Any, rounds: int = 5, calls: int = 4) -> float:
    """Seconds of a call on the last one's result; several are in flight at once, so that launching them is hidden."""

    def some(x: Any) -> Any:
        for _ in range(calls):
            x = call(x)
        return x

    x, seconds = jax.block_until_ready(call(x)), []
    for _ in range(rounds):
        run = timed(partial(some, x))
        seconds.append(run.seconds)
        x = run.value
    return min(seconds) / calls


def weight_bytes(spec: ModelSpec, itemsize: int) -> int:
    """What a decode step reads of the weights: all of them once; of an untied embedding only single rows, counted as 0."""
    shapes = decoder.abstract(spec)
    numbers = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes))
    return itemsize * (numbers - (0 if spec.tied else int(np.prod(shapes["embed"].shape))))


def kv_bytes(spec: ModelSpec, itemsize: int, contexts: Lengths, new: Lengths, skip: int = 0) -> int:
    """Keys and values that decoding must read: for the token at position t of a completion, context + t tokens of every layer.

    The context's last token counts among these: it is the first input. Sliding windows are not taken into account.

    Args:
      contexts, new: context and completion length of every row.
      skip: leave out the first tokens of every row.
    """
    n, c, t = np.asarray(new, np.int64), np.asarray(contexts, np.int64), np.int64(skip)
    left = np.maximum(n - t, 0)
    tokens = np.sum(left * c + (n * (n - 1) - t * (t - 1)) // 2 * (left > 0))
    return int(tokens) * 2 * spec.layers * spec.kv_heads * spec.head_dim * itemsize
