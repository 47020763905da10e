"""Rewards in killable processes: whatever reward code does costs its row, never the run.

A worker process has its own session and process group and scores one row after another; when one takes longer than the time
limit the whole group is killed and a new worker started. Nothing is pickled: JSON lines over pipes (`worker_main`).
"""

import contextlib
import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from itertools import islice
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

from jaxrl_llm.redaction import redact
from jaxrl_llm.tasks.base import Record, RewardSpec
from jaxrl_llm.tasks.judge import Judge, JudgeError
from jaxrl_llm.tasks.rewards import resolve
from jaxrl_llm.tasks.worker_main import call

log = logging.getLogger(__name__)

Parts = dict[str, float | None]  # unweighted reward parts by name; None: could not be computed

CAUSES = ("timeout", "error", "crash", "invalid")
_START_SECONDS = 120.0  # for a worker to import its rewards; not charged to any row
_AHEAD = 32  # rows a worker may have
_STARTS = 3  # tries to start a worker before the run is told
_VARIABLES = ("PATH", "HOME", "USER", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH")


class Pending(NamedTuple):
    """A row being scored."""

    names: tuple[str, ...]
    futures: tuple["Future[Parts]", ...]

    def done(self) -> bool:
        return all(future.done() for future in self.futures)

    def result(self) -> Parts:
        """Wait for all parts. Raises ValueError when a reward cannot be loaded, RuntimeError when the scorer was closed."""
        parts: Parts = {}
        for future in self.futures:
            try:
                parts |= future.result()
            except CancelledError:
                raise RuntimeError("the scorer was closed before the row was scored") from None
        return {name: parts[name] for name in self.names}


class _Job(NamedTuple):
    line: bytes
    future: "Future[Parts]"


class Scorer:
    """Scores (completion, record) rows; results keep their order and do not depend on the number of workers.

    A part that takes the row past `timeout` seconds, raises, kills its process, or returns no finite number is None and
    counted by cause (`take_counts`); parts computed before it are kept, those after it are None and not counted. Processes that
    a row leaves behind are killed with its worker. Workers see only basic environment variables and those named in `env`.

    Parts named "judge" are requests made by this process, within the judge's own limits. With `workers` 0 the other parts
    run in this process too, without a time limit. Use as a context manager, or `close`.
    """

    def __init__(self, rewards: Sequence[RewardSpec], workers: int = 1, timeout: float = 10.0, env: Sequence[str] = ()):
        self._names = tuple(r.name for r in rewards)
        self._judges = {r.name: Judge(**r.options) for r in rewards if r.spec == "judge"}
        self._asking = ThreadPoolExecutor(max(1, sum(j.concurrency for j in self._judges.values())))
        self._code = [r for r in rewards if r.spec != "judge"]
        self._here = {r.name: resolve(r.spec, r.options) for r in self._code} if workers == 0 else {}
        self._timeout, self._env = timeout, tuple(env)
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._seen: set[tuple[str, str]] = set()
        self._closed = False
        self._running: set[_Worker] = set()
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._serve, name=f"reward worker {i}", daemon=True)
            for i in range(workers if self._code else 0)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, completion: str, record: Record) -> Pending:
        """Queue one row; may be called while earlier rows are still being scored. Raises ValueError for a record that is no JSON."""
        if self._closed:
            raise RuntimeError("the scorer is closed")
        futures = [self._asking.submit(self._judge, name, completion, record) for name in self._judges]
        if self._threads:
            row = {"completion": completion, "record": record, "cpu_seconds": self._timeout + 10.0}
            try:
                job = _Job(json.dumps(row).encode() + b"\n", Future())
            except TypeError as error:
                raise ValueError(f"task: a record is not JSON-able: {error}") from None
            self._jobs.put(job)
            futures.append(job.future)
        elif self._here:
            future: Future[Parts] = Future()
            replies = {name: call(reward, completion, dict(record)) for name, reward in self._here.items()}
            future.set_result({name: self._value(name, reply) for name, reply in replies.items()})
            futures.append(future)
        return Pending(self._names, tuple(futures))

    def score(self, rows: Sequence[tuple[str, Record]]) -> list[Parts]:
        """Score rows and wait; one dict of parts per row, in order."""
        return [pending.result() for pending in [self.submit(*row) for row in rows]]

    def take_counts(self) -> dict[str, int]:
        """Parts that could not be computed since the last call, by cause: timeout, error, crash, invalid."""
        with self._lock:
            taken = {cause: self._counts[cause] for cause in CAUSES}
            self._counts.clear()
        return taken

    def close(self) -> None:
        """Kill the workers and everything they started; rows not yet scored are cancelled."""
        with self._lock:
            self._closed = True
            running = list(self._running)
        for worker in running:
            worker.kill()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        while not self._jobs.empty():
            if job := self._jobs.get():
                job.future.cancel()
        self._asking.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self) -> None:
        """One thread per worker process: start it, give it rows, replace it when a row has cost it its life.

        The process has the next rows before it has answered: a reply and a row that cross cost no waiting. Rows that a lost
        process still had go to the next one.
        """
        worker: _Worker | None = None
        broken: ValueError | None = None
        jobs: deque[_Job] = deque()  # unanswered, oldest first
        sent = 0  # of these, to the worker
        while not self._closed:
            if worker is None and broken is None:
                try:
                    worker, sent = self._start(), 0
                except ValueError as error:
                    broken = error
            if not self._take(jobs):
                break
            if worker is None:
                job = jobs.popleft()
                job.future.cancel() if self._closed else job.future.set_exception(broken or ValueError("no worker"))
                continue
            parts, usable = self._row(worker, b"".join(job.line for job in islice(jobs, sent, None)))
            job = jobs.popleft()
            sent = len(jobs)
            if not usable:
                self._stop(worker)
                worker = None
            job.future.cancel() if self._closed else job.future.set_result(parts)
        for job in jobs:
            job.future.cancel()
        if worker is not None:
            self._stop(worker)

    def _take(self, jobs: "deque[_Job]") -> bool:
        """Wait for a row unless there is one; take more ahead as long as all workers have some. False: no more will come."""
        while not jobs or len(jobs) < min(_AHEAD, self._jobs.qsize() // len(self._threads)):
            try:
                job = self._jobs.get(block=not jobs)
            except Empty:  # another worker was faster
                break
            if job is None:
                if jobs:  # first finish these
                    self._jobs.put(None)
                break
            jobs.append(job)
        return bool(jobs)

    def _row(self, worker: "_Worker", lines: bytes) -> tuple[Parts, bool]:
        """Send `lines`; the parts of the oldest unanswered row, and whether the worker can take another row."""
        deadline = time.monotonic() + self._timeout
        parts: Parts = {}
        usable = False
        try:
            with contextlib.suppress(BrokenPipeError, EOFError):  # it died of a row: the first it has not answered
                worker.send(lines, deadline)
            reply: dict[str, Any] = {}
            while "children" not in reply:
                reply = worker.receive(deadline)
                parts[reply["part"]] = self._value(reply["part"], reply)
            usable = not reply["children"]
        except TimeoutError:
            failure = {"cause": "timeout", "detail": f"took more than {self._timeout:g} s"}
        except (OSError, EOFError, ValueError, LookupError, TypeError):  # the last three: somebody wrote into the pipe
            failure = {"cause": "crash", "detail": f"its process died ({worker.exit_status()})"}
        else:
            failure = {"cause": "crash", "detail": "sent no reply"}
        missing = [r.name for r in self._code if r.name not in parts]
        if missing and not self._closed:
            self._value(missing[0], failure)
        return parts | dict.fromkeys(missing), usable

    def _judge(self, name: str, completion: str, record: Record) -> Parts:
        try:
            return {name: self._judges[name].score(completion, record)}
        except JudgeError as error:
            return {name: self._value(name, {"cause": error.cause, "detail": str(error)})}

    def _value(self, name: str, reply: dict[str, Any]) -> float | None:
        """The number of a reply; a failure is counted, and the first of its kind logged."""
        if "value" in reply:
            return float(reply["value"])
        cause = reply["cause"]
        with self._lock:
            self._counts[cause] += 1
            first = (name, cause) not in self._seen
            self._seen.add((name, cause))
        if first:
            why = redact(reply["detail"])
            log.warning("reward %s: %s: %s; the row is unscored (said once, counted always)", name, cause, why)
        return None

    def _start(self) -> "_Worker | None":
        """A worker that has loaded the rewards; None when the scorer was closed. Raises ValueError when it cannot."""
        hello = {"rewards": [{"name": r.name, "spec": r.spec, "options": dict(r.options)} for r in self._code]}
        problem = ""
        for _ in range(_STARTS):
            with self._lock:
                if self._closed:
                    return None
                worker = _Worker(self._environment())
                self._running.add(worker)
            try:
                deadline = time.monotonic() + _START_SECONDS
                worker.send(json.dumps(hello).encode() + b"\n", deadline)
                reply = worker.receive(deadline)
                if "ready" in reply:
                    return worker
                self._stop(worker)
                raise ValueError(reply["failed"])
            except TimeoutError:
                problem = f"not ready after {_START_SECONDS:g} s"
            except (OSError, EOFError):
                problem = f"died while loading the rewards ({worker.exit_status()})"
            self._stop(worker)
        raise ValueError(f"rewards.workers: a worker could not be started in {_STARTS} tries: {problem}")

    def _stop(self, worker: "_Worker") -> None:
        worker.close()
        with self._lock:
            self._running.discard(worker)

    def _environment(self) -> dict[str, str]:
        """What a worker may see: no secrets, the same imports, the same hashes in every worker, no accelerator to grab."""
        fixed = {
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "PYTHONHASHSEED": "0",
            "JAX_PLATFORMS": "cpu",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        return fixed | {name: os.environ[name] for name in (*_VARIABLES, *self._env) if name in os.environ}


class _Worker:
    """A worker process and the pipes to it."""

    def __init__(self, environment: dict[str, str]):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "jaxrl_llm.tasks.worker_main"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        assert self._process.stdin and self._process.stdout
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._in, False)
        self._buffer = b""
        self._killed = False
        self._lock = threading.Lock()

    def send(self, line: bytes, deadline: float) -> None:
        """Raises TimeoutError past the deadline (monotonic seconds), BrokenPipeError or EOFError when the process is gone."""
        rest = memoryview(line)
        while rest:
            self._wait(self._in, select.POLLOUT, deadline)
            rest = rest[os.write(self._in, rest[: select.PIPE_BUF]) :]

    def receive(self, deadline: float) -> dict[str, Any]:
        """The next message. Raises TimeoutError past the deadline, EOFError when the process is gone."""
        while b"\n" not in self._buffer:
            self._wait(self._out, select.POLLIN, deadline)
            chunk = os.read(self._out, 1 << 16)
            if not chunk:
                raise EOFError
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def kill(self) -> None:
        """Kill the process group and wait for the process; callable from any thread, and once more."""
        with self._lock:
            if not self._killed:
                self._killed = True  # later the number might name somebody else's group
                with contextlib.suppress(ProcessLookupError, PermissionError):  # all gone; macOS says so of zombies
                    os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """Kill, and close the pipes; only for the thread that reads and writes them."""
        self.kill()
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.stdout.close()  # type: ignore[union-attr]

    def exit_status(self) -> str:
        try:
            code = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "still running"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"

    def _wait(self, fd: int, event: int, deadline: float) -> None:
        """Until `fd` is ready. A child that outlives the process may hold its pipe open, so look at the process too."""
        poll = select.poll()
        poll.register(fd, event)
        while not poll.poll(max(0.0, min(0.1, deadline - time.monotonic())) * 1000):
            if time.monotonic() >= deadline:
                raise TimeoutError
            if self._process.poll() is not None and not poll.poll(0):
                raise EOFError
