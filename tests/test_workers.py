"""Reward workers: whatever reward code does costs its row, never the run, and never becomes a silent 0."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxrl_llm.tasks import workers as processes
from jaxrl_llm.tasks.base import RewardSpec
from jaxrl_llm.tasks.workers import Scorer

REWARDS = """
import ctypes, os, signal, subprocess, sys, time

def nasty(completion, record):
    if completion == "sleep": time.sleep(1000)
    if completion == "ignores signals":
        for s in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM): signal.signal(s, signal.SIG_IGN)
        while True: time.sleep(1)
    if completion == "spin":
        while True: pass
    if completion == "raise": raise KeyError("no such thing")
    if completion == "exit": sys.exit(3)
    if completion == "leave": os._exit(0)
    if completion == "abort": os.abort()
    if completion == "segfault": ctypes.string_at(0)
    if completion == "close": os.closerange(0, 100)
    if completion == "fork": os.fork()
    if completion == "fork and abort":
        if os.fork() == 0: time.sleep(1000)
        os.abort()
    if completion in ("leave a child", "hang with a child"):
        child = subprocess.Popen(["sleep", "1000"])
        with open(record["file"], "w") as file: file.write(f"{child.pid} {os.getpid()}")
        if completion == "hang with a child": time.sleep(1000)
    if completion == "print":
        print('{"part": "nasty", "value": 7}', flush=True)
        os.system('echo \\'{"part": "nasty", "value": 7}\\'')
    if completion == "read": sys.stdin.read(); os.system("cat")
    return {"none": None, "nan": float("nan"), "inf": float("inf"), "text": "1.0", "list": [1.0], "complex": 1j,
            "true": True, "huge": 10 ** 400}.get(completion, 0.5)

def environment(completion, record):
    return float(completion in os.environ)

def noted(completion, record):
    with open(record["file"], "a") as file: file.write(record["name"] + " ")
    return nasty(completion, {"file": record["file"] + ".pids"})

def imported(completion, record):
    return float(completion in sys.modules)

def patient(completion, record):
    while not os.path.exists(record["file"]): time.sleep(0.01)
    return 1.0

def scaled(completion, record, factor):
    return len(completion) * factor
"""
COUNTED = {  # what reward code does -> why its part is missing; None: it is not
    "sleep": "timeout",
    "ignores signals": "timeout",
    "spin": "timeout",
    "raise": "error",
    "exit": "error",
    "leave": "crash",
    "abort": "crash",
    "segfault": "crash",
    "close": "crash",
    "fork and abort": "crash",
    "none": "invalid",
    "nan": "invalid",
    "inf": "invalid",
    "text": "invalid",
    "list": "invalid",
    "complex": "invalid",
    "huge": "invalid",
    "fork": None,
    "leave a child": None,
    "print": None,
    "read": None,
    "true": None,
    "good": None,
}
NASTY = RewardSpec("nasty", "nasty_rewards:nasty")
LENGTH = RewardSpec("length", "nasty_rewards:scaled", 1.0, {"factor": 2.0})


@pytest.fixture(scope="module", autouse=True)
def rewards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "nasty_rewards.py").write_text(REWARDS)
    (folder / "slow_rewards.py").write_text(
        "import time\ntime.sleep(4)\ndef good(completion, record):\n    return 1.0\n"
    )
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


def alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    if stat.parent.parent.joinpath("self").exists():
        return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def dies(pid):
    for _ in range(1000):
        if not alive(pid):
            return True
        time.sleep(0.02)
    return False


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Every kind of reward code in one batch between good rows, each followed by what was counted."""
    file = str(tmp_path_factory.mktemp("children") / "pids")
    found = {}
    with Scorer([LENGTH, NASTY], workers=1, timeout=2.5) as scorer:
        for kind in COUNTED:
            rows = [("good", {"file": file}), (kind, {"file": file}), ("good", {"file": file})]
            found[kind] = scorer.score(rows), scorer.take_counts()
        found["children"] = [int(p) for p in Path(file).read_text().split()]
        yield found


@pytest.mark.parametrize("kind", COUNTED)
def test_reward_code_costs_only_its_row_and_is_counted_by_cause(scored, kind):
    (before, row, after), counts = scored[kind]
    cause = COUNTED[kind]
    good = {"length": 8.0, "nasty": 0.5}
    assert before == good and after == good
    expected = None if cause else 1.0 if kind == "true" else 0.5
    assert row == {"length": 2.0 * len(kind), "nasty": expected}
    assert counts == {name: int(name == cause) for name in ("timeout", "error", "crash", "invalid")}


def test_a_process_left_behind_by_a_row_is_killed(scored):
    child, _ = scored["children"]
    assert dies(child)


def test_a_timeout_kills_the_workers_whole_process_group(tmp_path):
    file = tmp_path / "pids"
    with Scorer([NASTY], timeout=2.5) as scorer:
        assert scorer.score([("hang with a child", {"file": str(file)})]) == [{"nasty": None}]
        assert all(dies(int(pid)) for pid in file.read_text().split())


def test_results_keep_their_order_and_do_not_depend_on_the_number_of_workers():
    rows = [("x" * (i % 7), {"i": i}) for i in range(60)]
    for workers in (0, 1, 3):
        with Scorer([LENGTH, RewardSpec("x", "letter:x")], workers) as scorer:
            assert scorer.score(rows) == [{"length": 2.0 * (i % 7), "x": float(i % 7 > 0)} for i in range(60)]


@pytest.mark.parametrize("workers, slow", [(1, False), (1, True), (3, False)])
def test_rows_sent_ahead_of_a_bad_one_are_scored_once(tmp_path, monkeypatch, workers, slow):
    """Also when the trainer is slow: the worker is long dead of a later row when replies to earlier ones are read."""
    receive = processes._Worker.receive

    def late(worker, deadline):
        time.sleep(0.1)
        return receive(worker, deadline)

    if slow:
        monkeypatch.setattr(processes._Worker, "receive", late)
    bad = {5: "sleep", 9: "leave", 10: "leave a child", 30: "raise"}
    file = tmp_path / "rows"
    rows = [(bad.get(i, "good"), {"name": str(i), "file": str(file)}) for i in range(40)]
    with Scorer([RewardSpec("noted", "nasty_rewards:noted")], workers, timeout=2.5) as scorer:
        values = [parts["noted"] for parts in scorer.score(rows)]
    assert [i for i, value in enumerate(values) if value is None] == [5, 9, 30]
    assert sorted(map(int, file.read_text().split())) == [*range(40)]


def test_without_workers_failures_are_counted_too():
    with Scorer([NASTY], workers=0) as scorer:
        assert scorer.score([("raise", {}), ("none", {}), ("good", {})]) == [{"nasty": v} for v in (None, None, 0.5)]
        assert scorer.take_counts() == {"timeout": 0, "error": 1, "crash": 0, "invalid": 1}
        assert sum(scorer.take_counts().values()) == 0


def test_rows_are_scored_while_the_caller_goes_on(tmp_path):
    with Scorer([RewardSpec("patient", "nasty_rewards:patient")], timeout=60) as scorer:
        pending = scorer.submit("", {"file": str(tmp_path / "now")})
        assert not pending.done()
        (tmp_path / "now").touch()
        assert pending.result() == {"patient": 1.0}
        assert pending.done()


def test_the_time_a_worker_takes_to_start_is_not_charged_to_a_row():
    with Scorer([RewardSpec("slow", "slow_rewards:good")], timeout=2.5) as scorer:
        assert scorer.score([("", {})]) == [{"slow": 1.0}]


def test_workers_see_only_the_environment_they_are_given(monkeypatch):
    monkeypatch.setenv("MY_SECRET", "s")
    monkeypatch.setenv("MY_SETTING", "s")
    with Scorer([RewardSpec("there", "nasty_rewards:environment")], env=["MY_SETTING"]) as scorer:
        rows = [(name, {}) for name in ("MY_SECRET", "MY_SETTING", "PATH")]
        assert [parts["there"] for parts in scorer.score(rows)] == [0.0, 1.0, 1.0]


def test_workers_do_not_import_jax():
    with Scorer([RewardSpec("imported", "nasty_rewards:imported"), RewardSpec("x", "letter:x")]) as scorer:
        rows = [(name, {}) for name in ("jax", "torch", "transformers", "json")]
        assert [parts["imported"] for parts in scorer.score(rows)] == [0.0, 0.0, 0.0, 1.0]


def test_importing_tasks_imports_no_heavy_library():
    code = (
        "import sys, jaxrl_llm.tasks.workers, jaxrl_llm.tasks.text, jaxrl_llm.tasks.data, jaxrl_llm.tasks.gym;"
        "assert not {'jax', 'torch', 'transformers', 'grain', 'reasoning_gym', 'math_verify'} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nasty_rewards:nowhere", "'nasty_rewards:nowhere' cannot be imported"),
        ("no_such_module:f", "cannot be imported: ModuleNotFoundError"),
        ("nonsense", "'nonsense', expected math, exact"),
    ],
)
def test_a_reward_that_cannot_be_loaded_stops_the_run_in_one_line(spec, message):
    with Scorer([RewardSpec("r", spec)]) as scorer, pytest.raises(ValueError, match=message) as error:
        scorer.score([("", {}), ("", {})])
    assert "\n" not in str(error.value)


def test_a_record_that_is_not_json_is_refused():
    with Scorer([NASTY]) as scorer, pytest.raises(ValueError, match="not JSON-able"):
        scorer.submit("good", {"x": object()})


def test_a_large_record_passes():
    with Scorer([LENGTH]) as scorer:
        assert scorer.score([("é" * 300_000, {"x": "\n" * 300_000})]) == [{"length": 600_000.0}]


def test_closing_kills_the_workers_and_cancels_what_is_not_scored(tmp_path):
    file = tmp_path / "pids"
    scorer = Scorer([NASTY], timeout=600)
    pending = [scorer.submit("hang with a child", {"file": str(file)}), scorer.submit("good", {})]
    while not file.exists() or len(file.read_text().split()) < 2:
        time.sleep(0.02)
    scorer.close()
    for row in pending:
        with pytest.raises(RuntimeError, match="closed"):
            row.result()
    assert all(dies(int(pid)) for pid in file.read_text().split())
    with pytest.raises(RuntimeError, match="closed"):
        scorer.submit("good", {})


def test_workers_die_with_a_killed_trainer(tmp_path, rewards):
    file = tmp_path / "pids"
    code = (
        "from jaxrl_llm.tasks.workers import Scorer; from jaxrl_llm.tasks.base import RewardSpec; import sys;"
        "Scorer([RewardSpec('n', 'nasty_rewards:nasty')], timeout=600).score([('hang with a child', {'file': sys.argv[1]})])"
    )
    path = os.pathsep.join([str(rewards), str(Path(__file__).parents[1])])
    trainer = subprocess.Popen([sys.executable, "-c", code, str(file)], env={**os.environ, "PYTHONPATH": path})
    while not file.exists() or len(file.read_text().split()) < 2:
        assert trainer.poll() is None
        time.sleep(0.02)
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    assert all(dies(int(pid)) for pid in file.read_text().split())
