"""Live progress: a panel on a terminal, one line every few steps elsewhere."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

SHOWN = (  # metric name, label, format
    ("reward/mean", "reward", "{:.3f}"),
    ("accuracy", "accuracy", "{:.3f}"),
    ("loss", "loss", "{:.4f}"),
    ("kl", "kl", "{:.4f}"),
    ("entropy", "entropy", "{:.3f}"),
    ("completions/mean_length", "length", "{:.1f}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
)
QUIET = 30.0  # seconds without a plain line after which a step says itself


class Progress:
    """Shows the phase, the step, a few metrics and the time left. Use as a context manager.

    Args:
      stream: where to write; a live panel when it is a terminal, plain lines otherwise.
      every: steps between plain lines; slow steps get one when half a minute has passed.
      clock: seconds, for the time left.
    """

    def __init__(self, stream: TextIO | None = None, every: int = 10, clock: Callable[[], float] = time.monotonic):
        self._stream = stream or sys.stdout
        self._every, self._clock, self._live = every, clock, None
        self._phase, self._activity, self._first, self._step, self._total = "", "", 0, 0, 0
        self._timed: tuple[int, float] | None = None  # the first step reported, and when
        self._spoke = clock()  # when the last plain line was written
        self._values: dict[str, float] = {}
        if self._stream.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(file=self._stream), refresh_per_second=4, transient=False)

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def phase(self, name: str, total: int, done: int = 0) -> None:
        """Begin a phase of `total` steps, of which `done` were made before (a resumed run)."""
        self._phase, self._activity, self._values = name, "", {}
        self._first = self._step = done
        self._total, self._timed = total, None
        self._show(f"{name}: {total} steps" + (f", going on from {done}" if done else ""))

    def activity(self, name: str) -> None:
        """What the current step is doing (collect, update, ...); shown on terminals only."""
        self._activity = name
        if self._live:
            self._live.update(self._panel())

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """`step` steps of the phase are done."""
        if self._timed is None:
            self._timed = (step, self._clock())
        self._step, self._values = step, {**self._values, **values}
        if self._live:
            self._live.update(self._panel())
        elif step % self._every == 0 or step in (self._first + 1, self._total) or self._clock() - self._spoke >= QUIET:
            self._line(f"{self._phase} {step}/{self._total}  " + self._summary())

    def note(self, text: str) -> None:
        """A line that stays."""
        if self._live:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            self._line(text)

    def seconds_left(self) -> float | None:
        """Seconds until the phase ends at the speed so far; None before the second report.

        What came before the first report is left out of the speed: it compiled the programs.
        """
        if self._timed is None or self._step == self._timed[0]:
            return None
        step, began = self._timed
        return (self._clock() - began) / (self._step - step) * (self._total - self._step)

    def _show(self, text: str) -> None:
        if self._live:
            self._live.update(self._panel())
        else:
            self._line(text)

    def _line(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()
        self._spoke = self._clock()

    def _summary(self) -> str:
        shown = [f"{label} {form.format(self._values[k])}" for k, label, form in SHOWN if k in self._values]
        left = self.seconds_left()
        return "  ".join(shown + ([] if left is None else [f"{clock_time(left)} left"]))

    def _panel(self):
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        head = Table.grid(expand=True, padding=(0, 1))
        head.add_column()
        head.add_column(ratio=1)
        head.add_column(justify="right")
        left = self.seconds_left()
        head.add_row(
            Text(f"{self._phase} {self._step}/{self._total}", style="bold"),
            ProgressBar(total=max(self._total, 1), completed=self._step),
            Text("" if left is None else f"{clock_time(left)} left"),
        )
        names, numbers = Table.grid(expand=True), []
        for name, label, form in SHOWN:
            if name in self._values:
                names.add_column(justify="center")
                numbers.append(Text.assemble((label + " ", "dim"), form.format(self._values[name])))
        names.add_row(*numbers)
        body = Table.grid(expand=True)
        body.add_row(head)
        body.add_row(names)
        return Panel(body, title="jaxrl_llm", subtitle=self._activity or None)


def clock_time(seconds: float) -> str:
    """1:02:03, or 2:03 under an hour."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
