"""A reward every policy can move, and that does harm when told: for runs of several processes.

The environment variable STRIKE is "WHAT:CALL:FILE": at that call of a reward worker, WHAT happens to the trainer above it,
unless FILE, which it makes, is there already: "TERM" is the signal, "disk" lets it write no file any more, "readonly" turns the
mounted directory of FILE read-only, "sleep" keeps it waiting.
"""

import os
import resource
import signal
import subprocess
import time
from pathlib import Path

calls = 0


def reward(completion, record):
    global calls
    calls += 1
    if told := os.environ.get("STRIKE"):
        what, call, file = told.split(":")
        if calls == int(call) and not Path(file).exists():
            Path(file).touch()
            strike(what, Path(file).parent)
    return completion.count("1") / len(completion) if completion else 0.0


def strike(what, directory):
    if what == "sleep":
        time.sleep(5)
    elif what == "disk":
        resource.prlimit(os.getppid(), resource.RLIMIT_FSIZE, (100, 100))
    elif what == "readonly":
        subprocess.run(["mount", "-o", "remount,ro,bind", directory], check=True)
    else:
        os.kill(os.getppid(), signal.SIGTERM)
