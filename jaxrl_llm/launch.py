"""`jaxrl_llm launch`: the processes of a run on this host, all started again from the last checkpoint when one dies.

For several GPUs of one host, and for trying out a run of many processes; a scheduler does the same for many hosts.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

FINAL = (1, 2)  # exit codes that another start would not change: the run cannot go on, or the config is wrong
LOST = 75  # of a process that ends because another one did (`sharding.processes`)
GRACE = 5.0  # seconds the others have to say what they saw, once one has ended badly


def run(words: Sequence[str], processes: int, restarts: int) -> int:
    """Run `jaxrl_llm train WORDS` in `processes` processes; the exit code.

    SIGTERM and Ctrl-C are passed on: the run saves and ends. When a process dies, one line names it, and all are started
    again, at most `restarts` times. Raises ValueError for bad numbers.
    """
    if processes < 1 or restarts < 0:
        raise ValueError(f"-n {processes} --restarts {restarts}: expected at least one process and 0 restarts")
    gpus = _gpus()
    if len(gpus) % processes:
        raise ValueError(
            f"-n {processes}: {len(gpus)} GPUs ({','.join(gpus)}), expected a number that divides them, or JAX_PLATFORMS=cpu"
        )
    for start in range(restarts + 1):
        dead, code = _once(words, processes, gpus)
        if dead is None:
            return 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        final = code in FINAL or start == restarts
        then = "not starting again" if final else f"starting all again ({start + 1} of {restarts})"
        print(f"jaxrl_llm launch: process {dead} of {processes} {how}; {then}", file=sys.stderr, flush=True)
        if final:
            return code if code > 0 else 128 - code
    raise AssertionError("the last start returns")


def _once(words: Sequence[str], count: int, gpus: Sequence[str]) -> tuple[int | None, int]:
    """One start of all, each with its share of the GPUs. Returns the process that died first and its exit code, or None and 0."""
    port = free_port()
    command = [sys.executable, "-m", "jaxrl_llm.cli", "train", *words, f"distributed.coordinator=127.0.0.1:{port}"]
    numbers = [[f"distributed.processes={count}", f"distributed.process={i}"] for i in range(count)]
    each = len(gpus) // count
    seen = [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * each : (i + 1) * each])} if gpus else {} for i in range(count)]
    # In groups of their own, or Ctrl-C would reach them twice.
    running = [
        subprocess.Popen([*command, *own], process_group=0, env=os.environ | mine) for own, mine in zip(numbers, seen)
    ]

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in running:
            if process.poll() is None:
                process.send_signal(number)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while any(process.poll() is None for process in running) and not any(process.poll() for process in running):
            time.sleep(0.05)
        deadline = time.monotonic() + GRACE
        while any(process.poll() is None for process in running) and time.monotonic() < deadline:
            time.sleep(0.05)
        codes = [process.poll() for process in running]
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
            process.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)
    bad = {i: code for i, code in enumerate(codes) if code}
    if not bad:
        return None, 0
    first = min(bad, key=lambda i: (bad[i] in (LOST, -signal.SIGABRT), i))  # those come of another's death
    return first, bad[first]


def _gpus() -> list[str]:
    """The GPUs that processes started here would see; none where JAX is told to use something else."""
    if not {"", "cuda", "gpu"} & set(os.environ.get("JAX_PLATFORMS", "").split(",")):
        return []
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in named.split(",") if name]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return []
    return [str(i) for i in range(sum(line.startswith("GPU ") for line in listed.stdout.splitlines()))]


def free_port() -> int:
    """A port of this host that nobody uses. Not one that the system hands out by itself (Linux: from 32768 on), which may be
    gone by the time process 0 listens there.
    """
    for port in random.SystemRandom().sample(range(15000, 32768), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port among a hundred between 15000 and 32767")
