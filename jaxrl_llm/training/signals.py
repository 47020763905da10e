"""Ctrl-C and SIGTERM ask the loop to stop at the next safe point; a second one ends the process at once.

A signal to one process stops all of them, at the same point.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from jaxrl_llm.sharding import processes


@dataclass
class Stop:
    """Whether a stop was asked for."""

    signal: int | None = None  # that this process got
    agreed: bool = False  # what all processes knew when they last agreed

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def agree(self) -> bool:
        """Whether any process was asked to stop. All must call it at the same point; `agreed` keeps the answer."""
        self.agreed = processes.any_of(self.requested, "the end of a step")
        return self.agreed


@contextmanager
def stopping(signals: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)) -> Iterator[Stop]:
    """While inside, the first of `signals` sets the flag of the yielded `Stop`; the second exits with 128 + its number.

    The handlers found on entry are put back on exit. Use it in the main thread.
    """
    stop = Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.requested:
            os.write(2, b"second signal: exiting without saving\n")
            os._exit(128 + number)
        stop.signal = number
        os.write(2, f"{signal.Signals(number).name}: saving and stopping; once more to exit at once\n".encode())

    previous = {number: signal.signal(number, handle) for number in signals}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
