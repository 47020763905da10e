"""Compiled programs kept between processes, and that no state of their directory stops one."""

import os
import subprocess
import sys

import jax
import pytest

from jaxrl_llm import compile_cache

PROGRAM = """
import sys, jax
from jaxrl_llm import compile_cache
hits = []
jax.monitoring.register_event_listener(lambda event, **_: event.endswith("/cache_hits") and hits.append(event))
compile_cache.use(sys.argv[1])
print(float(jax.jit(lambda x: x * 2 + 1)(3.0)), len(hits))
"""


def run(where, **env):
    """What a process that computes 2 · 3 + 1 printed: the answer and how many programs it found; and its stderr."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, where], env={**clean, **env}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    answer, hits = done.stdout.split()
    return float(answer), int(hits), done.stderr


@pytest.fixture
def settings(monkeypatch):
    """Puts JAX's settings back, and begins without any."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_a_second_process_finds_small_programs_compiled_without_a_word_and_spoilt_ones_are_compiled_again(tmp_path):
    env = {"XDG_CACHE_HOME": str(tmp_path)}
    assert run("auto", **env)[:2] == (7.0, 0)
    entries = list((tmp_path / "jaxrl_llm" / "programs" / compile_cache.machine()).glob("*-cache"))
    assert entries
    answer, hits, said = run("auto", **env)
    assert answer == 7.0 and hits >= 1 and said == ""
    for entry in entries:
        entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])
    assert run("auto", **env)[:2] == (7.0, 0)


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    answer, _, said = run(str(tmp_path / "file" / "inside"))
    assert answer == 7.0 and said.count("\n") == 1 and "compiled programs are not kept" in said


def test_the_directory_jax_was_told_of_is_respected(settings, tmp_path, monkeypatch):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "told"))
    assert compile_cache.use("auto") == tmp_path / "told"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "environment"))
    assert compile_cache.use("auto") == tmp_path / "environment"
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0


def test_a_config_moves_it_or_switches_it_off(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "environment"))
    assert compile_cache.use(str(tmp_path / "own")) == tmp_path / "own"
    assert compile_cache.use(None) is None and jax.config.jax_compilation_cache_dir is None


def test_a_directory_that_cannot_be_written_is_only_read(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert compile_cache.use(str(tmp_path)) == tmp_path
    assert jax.config.jax_persistent_cache_min_compile_time_secs == compile_cache.NEVER


def test_the_entries_used_longest_ago_go_first(tmp_path):
    for age, name in enumerate(["new", "old", "oldest"]):
        (tmp_path / name).write_bytes(b"12345678")
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    compile_cache.prune(tmp_path, 17)
    assert {path.name for path in tmp_path.iterdir()} == {"new", "old"}


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_memory_is_returned_after_long_compilations_only(monkeypatch):
    calls, compiled = [], "/jax/core/compile/backend_compile_duration"

    class Library:
        malloc_trim = staticmethod(calls.append)

    monkeypatch.setattr(compile_cache.ctypes, "CDLL", lambda name: Library)
    listeners = []
    monkeypatch.setattr(jax.monitoring, "register_event_duration_secs_listener", listeners.append)
    compile_cache.return_memory.__wrapped__()
    (listen,) = listeners
    listen(compiled, 0.01)
    listen("/jax/core/compile/jaxpr_trace_duration", 9.0)
    assert calls == []
    listen(compiled, 1.0)
    assert calls == [0]
    monkeypatch.setattr(compile_cache.ctypes, "CDLL", lambda name: object())
    compile_cache.return_memory.__wrapped__()
    assert len(listeners) == 1


def test_a_level_of_optimization_in_the_environment_stands(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    usual = compile_cache.well("cpu")
    assert usual and not compile_cache.well("gpu")
    assert all(options("cpu").items() >= usual.items() for options in (compile_cache.quickly, compile_cache.in_place))
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=3")
    for options in (compile_cache.well, compile_cache.quickly, compile_cache.in_place):
        assert not options("cpu").keys() & usual.keys()
