"""A run directory that describes itself, belongs to one live process, and is never overwritten."""

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from jaxrl_llm.redaction import redact
from jaxrl_llm.sharding import processes

CONFIG, ABOUT, LOCK = "config.yaml", "about.jsonl", "lock"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers", "tokenizers")


class RunDir(NamedTuple):
    """A claimed run directory and the places inside it."""

    path: Path
    resumed: bool  # False: made just now

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

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
    """Hold `directory` for this run: a new one, or an existing one with the same config, to be resumed.

    Of several processes the first does so for all; they must share the directory. Writes the resolved config
    (`config.yaml`) once, and a line of versions, devices, commit and command per start (`about.jsonl`).

    Args:
      config: the resolved config as plain data (`Config.model_dump(mode="json")`).
    Raises ValueError (one line) when the directory holds a run with another config (the first differing key is named) or
    files that are no run, when another live process holds it, or when this process does not see it or has another config
    than the first; OSError when it cannot be written.
    """
    path, config = Path(directory), json.loads(json.dumps(config))
    if difference := first_difference(processes.from_lead(lambda: config, "the config"), config):
        key, theirs, ours = difference
        raise ValueError(f"{key}={ours!r}: process 0 has {theirs!r}, expected the same config on all processes")
    processes.gather(None, "the comparison of configs")  # before the first writes anything
    with ExitStack() as held:
        entered = processes.from_lead(lambda: held.enter_context(_claimed(path, config)), f"run.dir={path}")
        _check_shared(path, *entered)
        yield RunDir(path, entered[0])


@contextmanager
def _claimed(path: Path, config: dict[str, Any]) -> Iterator[tuple[bool, str]]:
    """Whether the directory held the run already, and the line of this start."""
    path.mkdir(parents=True, exist_ok=True)
    with _locked(path / LOCK):
        saved = path / CONFIG
        resumed = saved.exists()
        if resumed:
            _check_same(yaml.safe_load(saved.read_text()), config, path)
        elif strangers := sorted(p.name for p in path.iterdir() if p.name not in (LOCK, CONFIG + ".tmp")):
            raise ValueError(
                f"run.dir={path}: not empty and no run ({strangers[0]}), expected a new directory or an earlier run's"
            )
        else:
            temporary = path / (CONFIG + ".tmp")
            temporary.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
            temporary.replace(saved)
        line = json.dumps(about())
        with (path / ABOUT).open("a") as file:
            file.write(line + "\n")
        yield resumed, line


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
    return {**rest, "run": {k: v for k, v in config.get("run", {}).items() if k not in ("dir", "compile_cache")}}


def first_difference(a: Any, b: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """Dotted key and both values where two configs first differ; None when they are equal."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*b, *(k for k in a if k not in b)]:
            found = first_difference(a.get(key), b.get(key), f"{path}.{key}" if path else key)
            if found:
                return found
        return None
    return None if a == b and type(a) is type(b) else (path, a, b)


def _check_shared(path: Path, resumed: bool, line: str) -> None:
    try:
        seen = (path / ABOUT).read_text().endswith(line + "\n")
    except OSError:
        seen = False
    if not seen:
        raise ValueError(f"run.dir={path}: is not what process 0 writes to, expected a path that all processes share")


def _check_same(saved: Any, config: dict[str, Any], path: Path) -> None:
    if difference := first_difference(what_it_computes(saved), what_it_computes(config)):
        key, before, now = difference
        raise ValueError(
            f"run.dir={path}: holds a run with {key}={before!r}, this one has {now!r}; expected the same config to resume, "
            "or a new run.dir"
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    # flock is released by the kernel when the process ends, however it ends: no stale locks after kill -9.
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise ValueError(
                f"run.dir={path.parent}: process {owner} is running there, expected no live process; use another run.dir"
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
