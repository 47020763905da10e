"""metrics.jsonl, samples.jsonl and tensorboard events of one run; every step appears once, also after a resume."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jaxrl_llm.reporting.samples import Sample, as_text


class Writers:
    """Appends to the files of a run.

    Args:
      directory: the run directory; None writes nothing (the processes of a run that leave that to the first).
      position: what `position()` said when the checkpoint that the run goes on from was saved; whatever was written after
        it is cut away. None for a new run.
      born: tells this directory from others that the run may have had, on machines that are gone. When `position` was said of
        another (`elsewhere`), what is cut away here are the lines of later steps.
    """

    def __init__(
        self, directory: str | Path | None, position: Mapping[str, Any] | None = None, born: str | None = None
    ):
        position = position or {"metrics": 0, "samples": 0, "step": -1}
        self._born = born
        self.elsewhere = position.get("born", born) != born
        self._step, self._board = position["step"], None
        if directory is None:
            self._metrics = self._samples = Path(os.devnull).open("ab")  # noqa: SIM115 (`close` closes it)
            return
        directory = Path(directory)
        self._metrics, self._samples = (
            _open_at(path, _length_until(path, self._step) if self.elsewhere else position[path.stem])
            for path in (directory / "metrics.jsonl", directory / "samples.jsonl")
        )
        # tensorboard hides events at and after `purge_step` that were written before this one.
        purge = None if self._step < 0 else self._step + 1
        board = directory / "tensorboard"
        suffix = f".{len(list(board.glob('events*')))}"  # tensorboardX names files by the second and overwrites
        self._board = _Board(logdir=str(board), flush_secs=30, purge_step=purge, filename_suffix=suffix)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, on disk when this returns, and tensorboard scalars. Non-finite values become null."""
        self._step = max(self._step, step)
        line = {"step": step, **{k: _number(v) for k, v in values.items()}}
        self._metrics.write((json.dumps(line, allow_nan=False) + "\n").encode())
        self._metrics.flush()
        for name, value in line.items():
            if name != "step" and value is not None:
                self._show("add_scalar", name, value, step)

    def samples(self, step: int, samples: Sequence[Sample], tag: str = "samples") -> None:
        """Lines of samples.jsonl and one tensorboard text."""
        for sample in samples:
            line = {"step": step, "tag": tag, **{k: _plain(v) for k, v in sample._asdict().items()}}
            self._samples.write((json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode())
        self._samples.flush()
        if samples:
            self._show("add_text", tag, as_text(samples), step)

    def text(self, step: int, tag: str, text: str) -> None:
        """Tensorboard text, for the config and notes."""
        self._show("add_text", tag, text, step)

    def position(self) -> dict[str, Any]:
        """Where the files end now; goes into the checkpoint."""
        ends = {"metrics": self._metrics.tell(), "samples": self._samples.tell()}
        return {**ends, "step": self._step, "born": self._born}

    def close(self) -> None:
        self._metrics.close()
        self._samples.close()
        if self._board:
            self._board.close()

    def _show(self, method: str, *args: Any) -> None:
        if self._board:
            self._board.add(method, *args)


class _Board:
    """A tensorboardX writer that lives in a thread of its own: importing it imports torch where that is installed, a second or
    more that passes while the first programs compile."""

    def __init__(self, **options: Any):
        self._thread = ThreadPoolExecutor(1, "tensorboard")
        self._writer = self._thread.submit(_open_board, options)
        self._last: Future[Any] = self._writer

    def add(self, method: str, *args: Any) -> None:
        """Call a method of the writer, after those before. Raises what opening it or the latest call raised, once that is done."""
        if self._last.done():
            self._last.result()
        self._last = self._thread.submit(lambda: getattr(self._writer.result(), method)(*args))

    def close(self) -> None:
        self._thread.shutdown()
        self._last.result()
        self._writer.result().close()


def _open_board(options: Mapping[str, Any]) -> Any:
    from tensorboardX import SummaryWriter

    return SummaryWriter(**options)


def _open_at(path: Path, position: int):
    """The file cut at `position` bytes, open for appending. Raises ValueError when it is shorter than that."""
    file = path.open("ab")
    size = file.tell()
    if size < position:
        file.close()
        raise ValueError(f"{path}: {size} bytes, expected at least the {position} the checkpoint knows of")
    file.truncate(position)
    return file


def _length_until(path: Path, step: int) -> int:
    """Bytes of the whole lines up to `step`."""
    length = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        if not line.endswith(b"\n") or json.loads(line)["step"] > step:
            break
        length += len(line)
    return length


def _number(value: Any) -> float | int | None:
    value = value if isinstance(value, int) and not isinstance(value, bool) else float(value)
    return value if math.isfinite(value) else None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return _number(value) if isinstance(value, float) else value
