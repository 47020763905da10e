"""Model-written code, run where it can do no harm: one process without rights, killed when its time is over. Linux only.

`sandbox_main` says what it gives up. docs/security.md says what that protects from, and what not.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

MAIN = Path(__file__).with_name("sandbox_main.py")
OUTPUT_BYTES = 1 << 20  # of all results together

# Of Python's own isolation (-I) without -E, as the environment is made here: with a fixed hash seed a verdict repeats itself.
FLAGS = ("-s", "-S", "-P", "-B")

Reply = dict[str, Any]  # {"value": what JSON says of the result} or {"error": name of the exception}


class Limits(NamedTuple):
    """What a program may use."""

    seconds: float = 8.0  # wall-clock, its start included
    cpu_seconds: int = 2
    memory_mb: int = 512  # address space
    file_mb: int = 16  # of a file, and of its temporary directory
    namespaces: bool = (
        True  # False: without those (in containers that forbid unshare), and without a temporary directory
    )


class SandboxError(ValueError):
    """The sandbox could not be made: nothing is known of the program, and nothing of it has run."""


def run(source: str, function: str, calls: Sequence[Sequence[Any]], limits: Limits = Limits()) -> list[Reply]:  # noqa: B008
    """Define `function` by running `source`, then call it once for each list of arguments (JSON values).

    Returns: replies in the order of `calls`; fewer when the program ended, was killed or said too much before the last.
    They are the program's own claims: compare them here, and never send it what they are compared with.
    Raises SandboxError when the machine cannot restrict it, in one line that says what is missing.
    """
    if sys.platform != "linux":
        raise SandboxError(f"sandbox: this is {sys.platform}, expected Linux")
    with tempfile.TemporaryDirectory(prefix="jaxrl_llm-") as home, tempfile.TemporaryFile() as stdin:
        request = {"source": source, "function": function, "calls": calls, "home": home, "parent": os.getpid()}
        stdin.write(json.dumps(request | limits._asdict()).encode())
        stdin.seek(0)
        deadline = time.monotonic() + limits.seconds
        process = subprocess.Popen(
            [sys.executable, *FLAGS, str(MAIN)],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=home,
            env=_environment(home),
            start_new_session=True,
        )
        try:
            said = _read(process.stdout, deadline)  # type: ignore[arg-type]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()  # type: ignore[union-attr]
    first, *lines = said.split(b"\n")
    if first != b'{"ready": true}':
        why = json.loads(first)["refused"] if first else f"did not start (exit status {process.returncode})"
        raise SandboxError(f"sandbox: {why}")
    return _replies(lines[:-1][: len(calls)]) if len(said) <= OUTPUT_BYTES else []


def _environment(home: str) -> dict[str, str]:
    """Nothing of this process's but where the dynamic linker finds Python."""
    own = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "HOME": home, "TMPDIR": home, "TZ": "UTC"}
    return own | {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}


def _read(pipe: Any, deadline: float) -> bytes:
    """What comes through until its end, the deadline (monotonic seconds), or more than `OUTPUT_BYTES`."""
    said = b""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    while len(said) <= OUTPUT_BYTES and poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        chunk = os.read(pipe.fileno(), 1 << 16)
        if not chunk:
            break
        said += chunk
    return said


def _replies(lines: Sequence[bytes]) -> list[Reply]:
    """Replies up to the first that is none: the program may write into the pipe itself."""
    replies: list[Reply] = []
    for line in lines:
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(reply, dict):
            break
        replies.append(reply)
    return replies
