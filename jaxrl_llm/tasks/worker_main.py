"""A reward worker: `python -m jaxrl_llm.tasks.worker_main`, JSON lines on stdin and stdout, run by `tasks.workers`.

    <- {"rewards": [{"name", "spec", "options"}, ...]}          first line
    -> {"ready": true} or {"failed": "why"}
    <- {"completion": text, "record": {...}, "cpu_seconds": s}  a row; more may come before it is answered
    -> {"part": name, "value": number} or {"part": name, "cause": "error" | "invalid", "detail": text}, for every part;
       the last has "children": bool too: the row left processes running, and no other row is begun

Reward code may print, close stdin, fork or exit: the protocol runs on private copies of the two pipes.
"""

import json
import math
import os
import signal
import sys
import threading
from queue import SimpleQueue
from typing import Any

from jaxrl_llm.tasks.base import RewardFn
from jaxrl_llm.tasks.rewards import resolve


def call(reward: RewardFn, completion: str, record: dict[str, Any]) -> dict[str, Any]:
    """{"value": number}, or the cause ("error" or "invalid") and a detail why there is none."""
    try:
        value = reward(completion, record)
    except BaseException as error:  # SystemExit too: whatever reward code does costs its row only
        return {"cause": "error", "detail": f"{type(error).__name__}: {error}"[:500]}
    try:
        number = float(value) if hasattr(value, "__float__") else math.nan  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if math.isfinite(number):
        return {"value": number}
    return {"cause": "invalid", "detail": f"returned {value!r:.200}, expected a finite number"}


def has_children() -> bool:
    """Reap finished child processes; is one still running?"""
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                return True
        except ChildProcessError:
            return False


def main() -> None:
    lines = os.fdopen(os.dup(0), "r", encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    me = os.getpid()

    def reply(message: dict[str, Any]) -> None:
        if os.getpid() != me:  # a child that reward code forked came back from it: it must not speak for this worker
            os._exit(0)
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    rows: SimpleQueue[dict[str, Any]] = SimpleQueue()

    def read() -> None:
        for line in lines:
            rows.put(json.loads(line))
        os.killpg(me, signal.SIGKILL)  # the trainer is gone: nobody would stop a hanging reward any more

    threading.Thread(target=read, daemon=True).start()
    try:
        rewards = {r["name"]: resolve(r["spec"], r["options"]) for r in rows.get()["rewards"]}
    except BaseException as error:
        reply({"failed": str(error) or type(error).__name__})
        return
    reply({"ready": True})
    last = list(rewards)[-1]
    answer: dict[str, Any] = {}
    while not answer.get("children"):  # else the trainer stops this process, and another has the next rows
        row = rows.get()
        # A second line of defence that needs no interpreter: endless computing dies even when the trainer was killed.
        signal.setitimer(signal.ITIMER_VIRTUAL, row["cpu_seconds"])
        for name, reward in rewards.items():
            answer = {"part": name, **call(reward, row["completion"], dict(row["record"]))}
            if name == last:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
                sys.stdout.flush()
                answer["children"] = has_children()
            reply(answer)


if __name__ == "__main__":
    main()
