"""A run directory that describes itself, belongs to one live process, and is never overwritten.

Checkpoints lie in it, or in `checkpoint.dir`, which describes itself too. In object storage nothing can be locked.
"""

import fcntl
import hashlib
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from etils import epath

from jaxrl_llm.redaction import redact
from jaxrl_llm.sharding import processes
from jaxrl_llm.training import places

CONFIG, ABOUT, LOCK = "config.yaml", "about.jsonl", "lock"
WHERE = {"run": ("dir", "compile_cache"), "checkpoint": ("dir",)}  # fields that say where and not what
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers", "tokenizers")


class RunDir(NamedTuple):
    """A claimed run directory and the places inside it."""

    path: Path
    resumed: bool  # False: made just now
    born: str  # tells it from another directory of the same run, such as that of a machine which is gone
    store: epath.Path  # what holds the checkpoints: `path`, or checkpoint.dir
    left: str | None  # where else this directory's run began to save, of one that has steps

    @property
    def checkpoints(self) -> epath.Path:
        return self.store / "checkpoints"

    @property
    def warmstart(self) -> epath.Path:
        return self.store / "warmstart"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def export(self) -> Path:
        return self.path / "export"


@contextmanager
def claim(directory: str | Path, config: dict[str, Any]) -> Iterator[RunDir]:
    """Hold `directory` for this run, and `checkpoint.dir` when that is set: new ones, or existing ones with the same config, to be
    resumed.

    Of several processes the first does so for all; they must share the directory that holds the checkpoints. Writes the
    resolved config (`config.yaml`) once into each, and a line of versions, devices, commit and command per start (`about.jsonl`)
    into local ones.

    Args:
      config: the resolved config as plain data (`Config.model_dump(mode="json")`).
    Raises ValueError (one line) when a directory holds a run with another config (the first differing key is named) or
    files that are no run, when another live process holds it, when object storage cannot be used, or when this process does not
    see what it must, or has another config than the first; OSError when the disk cannot be written.
    """
    path, config = Path(directory), json.loads(json.dumps(config))
    if difference := first_difference(processes.from_lead(lambda: config, "the config"), config):
        key, theirs, ours = difference
        raise ValueError(f"{key}={ours!r}: process 0 has {theirs!r}, expected the same config on all processes")
    processes.gather(None, "the comparison of configs")  # before the first writes anything
    where = config.get("checkpoint", {}).get("dir")
    with _using(where):
        store = places.place(path if where is None else where)
    key = "run.dir" if str(store) == str(path.absolute()) else "checkpoint.dir"
    with ExitStack() as held:

        def enter() -> tuple[_Claimed, str]:
            if places.remote(store):
                _describe(store, config, new=False)
            own = held.enter_context(_claimed("run.dir", path, config))
            if places.remote(store):
                _describe(store, config, new=True)
            elif key == "checkpoint.dir":
                return own, held.enter_context(_claimed(key, Path(store), config)).line
            return own, own.line

        told, line = processes.from_lead(enter, f"run.dir={path}")
        own = _Claimed(*told)
        if places.remote(store):
            _check_reached(store)
        else:
            _check_shared(key, path if key == "run.dir" else Path(store), line)
        yield RunDir(path, own.resumed, own.born, store, own.left)


class _Claimed(NamedTuple):
    resumed: bool
    line: str  # of this start
    born: str
    left: str | None


@contextmanager
def _claimed(key: str, path: Path, config: dict[str, Any]) -> Iterator[_Claimed]:
    """Hold a local directory; what was and is in it."""
    path.mkdir(parents=True, exist_ok=True)
    with _locked(key, path / LOCK):
        saved, left = path / CONFIG, None
        resumed = saved.exists()
        if resumed:
            before = yaml.safe_load(saved.read_text())
            _check_same(key, before, config, path)
            left = _left(before, config, path)
        elif strangers := sorted(p.name for p in path.iterdir() if p.name not in (LOCK, CONFIG + ".tmp")):
            raise ValueError(
                f"{key}={path}: not empty and no run ({strangers[0]}), expected a new directory or an earlier run's"
            )
        else:
            temporary = path / (CONFIG + ".tmp")
            temporary.write_text(_yaml(config))
            temporary.replace(saved)
        line = json.dumps({**about(), "start": secrets.token_hex(8)})  # time and pid may be those of a start elsewhere
        with (path / ABOUT).open("a") as file:
            file.write(line + "\n")
        with (path / ABOUT).open() as file:
            born = hashlib.sha256(file.readline().encode()).hexdigest()[:16]
        yield _Claimed(resumed, line, born, left)


def _left(before: dict[str, Any], config: dict[str, Any], path: Path) -> str | None:
    """Where a run that has written metrics here began to save, when that is not where it is to save now."""
    then, now = (c.get("checkpoint", {}).get("dir") for c in (before, config))
    metrics = path / "metrics.jsonl"
    if then == now or not metrics.exists() or not metrics.stat().st_size:
        return None
    return f"run.dir={path}" if then is None else f"checkpoint.dir={then}"


def _describe(store: epath.Path, config: dict[str, Any], new: bool) -> None:
    """Compare the config with that of the run whose checkpoints are in object storage; `new`: leave it there when there is none."""
    with _using(str(store)):
        places.check_bucket(store)
        saved = store / CONFIG
        before = yaml.safe_load(saved.read_text()) if saved.exists() else None
        if before is None and new:
            saved.write_text(_yaml(config))
    if before is not None:
        _check_same("checkpoint.dir", before, config, store)


def _check_reached(store: epath.Path) -> None:
    with _using(str(store)):
        if not (store / CONFIG).exists():
            raise FileNotFoundError(f"{CONFIG}, which process 0 has put there, is not found")


@contextmanager
def _using(where: str | None) -> Iterator[None]:
    """Errors of object storage as one line; whatever gcsfs and those below it raise."""
    try:
        yield
    except Exception as error:
        if where is None or "://" not in where:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"checkpoint.dir={where}: cannot be used ({text[:300]}), expected a bucket that this machine may read and write"
        ) from error


def _yaml(config: dict[str, Any]) -> str:
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def about() -> dict[str, Any]:
    """Versions, devices, git commit, command and time of this process."""
    import jax

    versions = {"python": sys.version.split()[0]}
    for name in ("jaxrl_llm", *PACKAGES):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "argv": [redact(word) for word in sys.argv],
        "pid": os.getpid(),
        "processes": jax.process_count(),
        "devices": [d.device_kind for d in jax.devices()],
        "commit": _commit(),
        "versions": versions,
    }


def what_it_computes(config: dict[str, Any]) -> dict[str, Any]:
    """A config without what only says where: the directories, and over which processes and devices. A run may be moved and go
    on elsewhere."""
    rest = {key: value for key, value in config.items() if key not in ("distributed", "mesh")}
    for section, fields in WHERE.items():
        rest[section] = {k: v for k, v in config.get(section, {}).items() if k not in fields}
    return rest


def first_difference(a: Any, b: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """Dotted key and both values where two configs first differ; None when they are equal."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*b, *(k for k in a if k not in b)]:
            found = first_difference(a.get(key), b.get(key), f"{path}.{key}" if path else key)
            if found:
                return found
        return None
    return None if a == b and type(a) is type(b) else (path, a, b)


def _check_shared(key: str, path: Path, line: str) -> None:
    try:
        seen = (path / ABOUT).read_text().endswith(line + "\n")
    except OSError:
        seen = False
    if not seen:
        raise ValueError(f"{key}={path}: is not what process 0 writes to, expected a path that all processes share")


def _check_same(key: str, saved: Any, config: dict[str, Any], path: os.PathLike[str]) -> None:
    if difference := first_difference(what_it_computes(saved), what_it_computes(config)):
        field, before, now = difference
        raise ValueError(
            f"{key}={path}: holds a run with {field}={before!r}, this one has {now!r}; expected the same config to resume, "
            f"or a new {key}"
        )


@contextmanager
def _locked(key: str, path: Path) -> Iterator[None]:
    # flock is released by the kernel when the process ends, however it ends: no stale locks after kill -9.
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise ValueError(
                f"{key}={path.parent}: process {owner} is running there, expected no live process; use another {key}"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _commit() -> str | None:
    """Commit of the source tree this package runs from, `+changes` when it was edited; None outside a checkout."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    try:
        run = lambda *args: subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, timeout=10)  # noqa: E731
        commit = run("rev-parse", "HEAD")
        changes = run("status", "--porcelain", "--untracked-files=no").stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return commit.stdout.strip() + ("+changes" if changes else "") if commit.returncode == 0 else None
