"""Programs a model wrote: attacks on the machine, the trainer and the grader cost their own row, and nothing else.

Every attack is bounded: where the sandbox failed, it would still make at most two processes and files of a few MB.
"""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from jaxrl_llm import tasks
from jaxrl_llm.config import FileTask, Rewards
from jaxrl_llm.tasks import sandbox
from jaxrl_llm.tasks.base import RewardSpec
from jaxrl_llm.tasks.code import check_problem, code, same
from jaxrl_llm.tasks.rewards import resolve
from jaxrl_llm.tasks.sandbox import Limits, SandboxError
from jaxrl_llm.tasks.workers import Scorer

FUNCTIONS = Path(__file__).parents[1] / "configs" / "data" / "functions.jsonl"
EXPECTED = 12 * 76522803 + 9  # what no program is told
RECORD = {"function": "f", "tests": [{"args": [12], "expected": EXPECTED}]}
GOOD = f"def f(x):\n    return {EXPECTED}"
LIMITS = Limits(seconds=20.0, cpu_seconds=1, memory_mb=256, file_mb=2)


def missing(namespaces):
    try:
        return None if sandbox.run("def f(x): return x", "f", [[1]], Limits(namespaces=namespaces)) else "no reply"
    except SandboxError as error:
        return str(error)


MODES = [
    pytest.param(LIMITS._replace(namespaces=n), id=name, marks=pytest.mark.skipif(bool(why), reason=str(why)))
    for n, name in ((True, "namespaces"), (False, "without namespaces"))
    for why in [missing(n)]
]
pytestmark = pytest.mark.skipif(bool(missing(True)), reason=f"no sandbox here: {missing(True)}")


def said(source, limits=LIMITS, x=12):
    """What calling f(x) gives: {"value": ...}, {"error": ...}, or None when the program was ended before it replied."""
    replies = sandbox.run(source, "f", [[x]], limits)
    return replies[0] if replies else None


def attack(body, imports="ctypes, json, os, resource, socket, subprocess, sys, threading, time"):
    return f"import {imports}\ndef f(x):\n" + "".join(f"    {line}\n" for line in body.strip().split("\n"))


# ------------------------------------------------------------------------------------------------ what a program may do


@pytest.mark.parametrize("limits", MODES)
def test_an_honest_program_has_the_standard_library(limits):
    source = """
import bisect, collections, datetime, decimal, functools, heapq, itertools, json, math, random, re, statistics, string
def f(x):
    return [math.factorial(x), random.Random(0).random(), {"t": (1, None)}, sorted({"b", "a"}), re.sub("a", "b", "aa")]
"""
    assert said(source, limits, 5) == {"value": [120, 0.8444218515250481, {"t": [1, None]}, ["a", "b"], "bb"]}


def test_a_verdict_repeats_itself_where_a_program_follows_the_order_of_a_set():
    source = "def f(x): return list({'a', 'b', 'c', 'd', 'e'})"
    assert said(source) == said(source)


def test_it_has_a_temporary_directory_of_its_own_and_nothing_is_left_of_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    body = "path = tempfile.mkdtemp(); open(path + '/a', 'w').write('abc'); return [path, open(path + '/a').read(), os.listdir('.')]"
    path, text, here = said(attack(body, "os, tempfile"))["value"]
    assert path.startswith(str(tmp_path)) and text == "abc" and here == [Path(path).name]
    assert list(tmp_path.iterdir()) == []


def test_replies_come_in_order_and_end_where_the_program_ends():
    source = "import os\ndef f(x):\n    if x == 2: os._exit(0)\n    return 1 // x"
    assert sandbox.run(source, "f", [[1], [0], [-1], [2], [1]], LIMITS) == [
        {"value": 1},
        {"error": "ZeroDivisionError"},
        {"value": -1},
    ]


SYSTEM_PYTHON = "/usr/bin/python3"


def test_it_is_the_same_for_a_user_who_is_not_root(tmp_path):
    """Who makes a user namespace first. The other tests are of this kind where they are not run by root."""
    if os.geteuid() != 0:
        pytest.skip("not root: every test is of this kind")
    ask = [SYSTEM_PYTHON, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
    if not Path(SYSTEM_PYTHON).exists() or subprocess.run(ask).returncode:
        pytest.skip("no Python 3.11 that every user may run")
    for path in (sandbox.__file__, sandbox.MAIN):  # it imports nothing but the standard library
        (tmp_path / Path(path).name).write_bytes(Path(path).read_bytes())
    programs = [
        "return x + 1",
        "return open('a', 'w').write('abc')",
        "import socket; socket.socket()",
        "open('/etc/passwd')",
    ]
    (tmp_path / "ask.py").write_text(
        "import json, os, sandbox\n"
        f"replies = [sandbox.run('def f(x): ' + p, 'f', [[1]])[0] for p in {programs!r}]\n"
        "print(json.dumps([os.geteuid(), *replies]))\n"
    )
    for path in (tmp_path, *tmp_path.iterdir()):
        path.chmod(0o755)
    with tempfile.TemporaryDirectory() as place:  # pytest's own directories are root's
        shutil.copytree(tmp_path, place, dirs_exist_ok=True)
        done = subprocess.run(
            [SYSTEM_PYTHON, "ask.py"],
            cwd=place,
            user=65534,
            group=65534,
            extra_groups=[],
            capture_output=True,
            timeout=60,
        )
    denied = {"error": "PermissionError"}
    assert json.loads(done.stdout or "null") == [65534, {"value": 2}, {"value": 3}, denied, denied], (
        done.stderr.decode()
    )


# -------------------------------------------------------------------------------------------------------------- attacks

DENIED = {  # every one is refused by the kernel, with or without namespaces
    "fork": "pid = os.fork()\nif pid == 0: os._exit(0)",
    "thread": "threading.Thread(target=time.sleep, args=(1,)).start()",
    "process": "subprocess.run(['/bin/true'])",
    "shell": "os.execv('/bin/sh', ['sh', '-c', 'true'])",
    "session of its own": "os.setsid()",
    "socket": "socket.socket()",
    "unix socket": "socket.socket(socket.AF_UNIX)",
    "socket to the hypervisor": "socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)",
    "kill the parent": "os.kill(os.getppid(), 9)",
    "kill the group": "os.kill(0, 9)",
    "kill everything": "os.kill(-1, 0)",
    "raise a limit": "try: resource.setrlimit(resource.RLIMIT_CPU, (60, 60))\nexcept ValueError as e: raise PermissionError from e",
    "limits of the parent": "resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (3, 3))",
    "read another's environment": "open(f'/proc/{os.getppid()}/environ').read()",
    "read its own environment": "open('/proc/self/environ').read()",
    "read memory": "open(f'/proc/{os.getppid()}/mem', 'rb').read(1)",
    "read accounts": "open('/etc/passwd').read()",
    "list files": "os.listdir('/')",
    "change a mode": "os.chmod('.', 0o777)",
    "symbolic link": "os.symlink('/etc/passwd', 'a')",
    "hard link": "os.link(os.__file__, 'a')",
    "shared memory": "if ctypes.CDLL(None, use_errno=True).shmget(0, 4096, 0o1600) < 0: raise PermissionError",
    "ptrace": "if ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) < 0: raise PermissionError",
    "namespaces": "if ctypes.CDLL(None).unshare(0x10000000) < 0: raise PermissionError",
    "outlive the parent": "if ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) < 0: raise PermissionError",
}


@pytest.mark.parametrize("limits", MODES)
@pytest.mark.parametrize("name", DENIED)
def test_what_a_program_has_no_right_to_is_refused(name, limits):
    reply = said(attack(DENIED[name]), limits)
    assert reply is not None and reply.get("error") in ("PermissionError", "RuntimeError" if name == "thread" else "")


@pytest.mark.parametrize("limits", MODES)
def test_a_fork_bomb_makes_no_process(limits):
    body = "made = 0\nfor _ in range(1000):\n    try:\n        os.fork()\n        made += 1\n        break\n    except OSError: pass\nreturn made"
    assert said(attack(body), limits) == {"value": 0}


@pytest.mark.parametrize("limits", MODES)
def test_nothing_outside_can_be_written_not_even_what_its_user_owns(limits, tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("whole")
    for path in (tmp_path, mine):
        path.chmod(0o777)
    body = f"""
failed = []
for flags in (os.O_WRONLY, os.O_RDWR | os.O_TRUNC, os.O_RDONLY | os.O_TRUNC, os.O_WRONLY | os.O_CREAT):
    for path in ({str(mine)!r}, {str(tmp_path / "new")!r}, os.__file__, '/tmp/new', '/dev/shm/new', '../new'):
        try: os.close(os.open(path, flags, 0o600))
        except OSError: failed.append(path)
for act in (os.unlink, os.truncate, os.utime):
    try: act({str(mine)!r}, *[0] * (act is os.truncate))
    except OSError: failed.append(act)
return len(failed)"""
    assert said(attack(body), limits) == {"value": 27}
    assert (
        mine.read_text() == "whole" and list(tmp_path.iterdir()) == [mine] and Path(os.__file__).stat().st_size > 1000
    )


@pytest.mark.parametrize("limits", MODES)
def test_no_secret_is_in_its_environment(limits, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "sk-do-not-tell")
    reply = said(attack("return sorted(os.environ)"), limits)
    allowed = {"HOME", "LC_CTYPE", "LD_LIBRARY_PATH", "PYTHONHASHSEED", "PYTHONUTF8", "TMPDIR", "TZ"}
    assert set(reply["value"]) <= allowed


@pytest.mark.parametrize("limits", MODES)
@pytest.mark.parametrize(
    "body",
    [
        "while True: pass",
        "while True: print('x' * 10**5)",
        "while True:\n    try: raise KeyError\n    except BaseException: pass",
    ],
)
def test_endless_computing_ends_by_its_cpu_time(body, limits):
    assert said(attack(body), limits) is None


@pytest.mark.parametrize("limits", MODES)
def test_endless_waiting_ends_by_the_clock(limits):
    assert said(attack("while True: time.sleep(1)"), limits._replace(seconds=2.0)) is None


@pytest.mark.parametrize("limits", MODES)
@pytest.mark.parametrize("body", ["return len(bytearray(2**40))", "a = []\nwhile True: a.append(bytearray(2**20))"])
def test_memory_ends_at_its_limit(body, limits):
    assert said(attack(body), limits) == {"error": "MemoryError"}


@pytest.mark.parametrize(
    "body", ["open('a', 'wb').write(bytes(4 << 20))", "for i in range(8): open(str(i), 'wb').write(bytes(1 << 20))"]
)
def test_files_end_at_their_limit_one_by_one_and_together(body):
    assert said(attack(body)) in ({"error": "OSError"}, None)


@pytest.mark.parametrize(
    "body",
    [
        "for fd in range(3, 9):\n    try:\n        while True: os.write(fd, b'[' * 10**5)\n    except OSError: pass",
        "return 'x' * 2**21",
        "x = []\nfor _ in range(10**5): x = [x]\nreturn x",
        "x = []; x.append(x); return x",
        "return 10**10**4",
    ],
)
def test_too_much_output_is_no_reply(body):
    assert not {"value"} & set(said(attack(body)) or {})


# ---------------------------------------------------------------------------------------------------------- the grader

FORGED = {
    "exit 0 when defined": "import sys\nsys.exit(0)",
    "leave when defined": "import os\nos._exit(0)",
    "exit 0 when called": "import sys\ndef f(x): sys.exit(0)",
    "leave when called": "import os\ndef f(x): os._exit(0)",
    "raise SystemExit": "def f(x): raise SystemExit(0)",
    "print what a pass looks like": "def f(x):\n    print('{\"value\": true}'); print('PASSED 1/1'); return True",
    "say it passed": 'import os\ndef f(x):\n    os.write(3, b\'{"value": true, "passed": 1}\\n\'); os._exit(0)',
    "write into every descriptor": "import os\ndef f(x):\n    for fd in range(9):\n        try: os.write(fd, b'1\\n')\n"
    "        except OSError: pass\n    os._exit(0)",
    "equal to everything": "class E(int):\n    def __eq__(self, other): return True\n    def __repr__(self): return 'E'\n"
    "def f(x): return E(1)",
    "patch json": "import json\njson.dumps = lambda *a, **k: '{\"value\": null}'\ndef f(x): return 1",
    "patch the runner": "import sys\nm = sys.modules['__main__']\nfor n in list(vars(m)): vars(m)[n] = lambda *a: True\n"
    "def f(x): return 1",
    "patch builtins": "import builtins\nbuiltins.all = builtins.sum = builtins.zip = lambda *a: True\ndef f(x): return True",
    "close the channel": "import os\nos.closerange(0, 20)\ndef f(x): return 1",
    "many replies": "import os\ndef f(x):\n    for _ in range(9): os.write(3, b'{\"value\": 1}\\n')\n    return 1",
    "look for the answer in memory": """
import sys
def f(x):
    answer, frame = x * 76522803 + 9, sys._getframe().f_back
    while frame:
        if str(answer) in repr(frame.f_locals) + repr(frame.f_globals): return answer
        frame = frame.f_back
""",
    "look for the answer on disk": """
import os
def f(x):
    for top in ("/", "..", "/proc/self", "/tmp"):
        for at, _, names in os.walk(top):
            for name in names:
                if name.endswith(".jsonl"): return open(os.path.join(at, name)).read()
""",
    "not defined": "def g(x): return 1",
    "no function": "f = 3",
    "no program": "Sorry, I cannot do that.",
    "a null byte": "def f(x): return 1\n\0",
    "deep nesting": "f = " + "(" * 100_000,
}


@pytest.fixture(scope="module", params=MODES)
def reward(request):
    return code(**request.param._asdict())


@pytest.mark.parametrize("name", FORGED)
def test_a_verdict_cannot_be_forged(reward, name):
    assert reward(FORGED[name], RECORD) == 0.0
    assert reward(GOOD, RECORD) == 1.0


def test_what_is_expected_is_never_sent(monkeypatch):
    sent = []
    monkeypatch.setattr(sandbox, "run", lambda *a: sent.append(a) or [{"value": 1}])
    assert code()("x", RECORD) == 0.0
    assert str(EXPECTED) not in json.dumps(sent) and sent[1][:3] == ("x", "f", [[12]])


@pytest.mark.parametrize(
    ("found", "expected", "equal"),
    [
        (1, 1.0, True),
        (0.1 + 0.2, 0.3, True),
        (0.3001, 0.3, False),
        (10**400, 1.5, False),
        (10**18 + 1, 10**18, False),
        (True, 1, False),
        (1, True, False),
        (True, True, True),
        ([1, [2.0]], [1, [2]], True),
        ([1], [1, 2], False),
        ({"a": 1}, {"a": 1, "b": 2}, False),
        ({"a": [True]}, {"a": [True]}, True),
        (None, 0, False),
        ("1", 1, False),
        (float("nan"), float("nan"), False),
    ],
)
def test_results_are_compared_as_json(found, expected, equal):
    assert same(found, expected) is equal


# --------------------------------------------------------------------------------------------------- reward, task, workers


def test_the_last_block_is_the_program_and_a_prefix_begins_it():
    score = resolve("code", {"partial": True})
    tests = [{"args": [1], "expected": 2}, {"args": [2], "expected": 4}, {"args": [3], "expected": 7}]
    record = {"function": "f", "tests": tests}
    text = "First:\n```python\ndef f(x):\n    return 0\n```\nBetter:\n```py\ndef f(x):\n    return 2 * x\n```\nDone."
    assert score(text, record) == pytest.approx(2 / 3)
    assert score("    return 2 * x", {**record, "prefix": "def f(x):\n"}) == pytest.approx(2 / 3)


def test_workers_score_programs_and_go_on_after_bad_ones_whatever_they_may_see_themselves(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "sk-do-not-tell")
    look = "import os\ndef f(x): return os.environ.get('MY_API_KEY', 0)"
    tell = {**RECORD, "tests": [{"args": [1], "expected": 0}]}
    rows = [(GOOD, RECORD), ("def f(x):\n    while True: pass", RECORD), (look, tell), (GOOD, RECORD)]
    spec = RewardSpec("code", "code", 1.0, {"cpu_seconds": 1})
    with Scorer([spec], timeout=60.0, env=["MY_API_KEY"]) as scorer:
        assert scorer.score(rows) == [{"code": score} for score in (1.0, 0.0, 1.0, 1.0)]
        assert not any(scorer.take_counts().values())


def test_a_program_dies_with_whoever_waits_for_it(tmp_path):
    """Also when that is killed with signal 9: programs have a session of their own, which no group's signal reaches."""
    script = (
        "from jaxrl_llm.tasks import sandbox\n"
        "sandbox.run('import time\\ndef f(x): time.sleep(60)', 'f', [[1]], sandbox.Limits(seconds=60.0))\n"
    )
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    waiting = subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": path, "TMPDIR": str(tmp_path)}
    )
    children = Path(f"/proc/{waiting.pid}/task/{waiting.pid}/children")

    def confined():
        for child in children.read_text().split():
            status = Path(f"/proc/{child}/status").read_text()
            if "Seccomp:\t2" in status:
                return int(child)
        return None

    while (child := confined()) is None:
        assert waiting.poll() is None
        time.sleep(0.02)
    waiting.send_signal(signal.SIGKILL)
    waiting.wait()
    for _ in range(1000):
        if not Path(f"/proc/{child}").exists() or "State:\tZ" in Path(f"/proc/{child}/status").read_text():
            return
        time.sleep(0.02)
    pytest.fail("the program is still running")


def test_every_solution_that_is_shipped_passes_and_no_other_problems_does():
    task = tasks.load(FileTask(train=str(FUNCTIONS), eval_size=4, answer_field="solution", reward="code"))
    records = [*task.train, *task.eval]
    score = resolve("code")
    assert len(records) == 16
    assert [score(r["answer"], r) for r in records] == [1.0] * 16
    assert [score(a["answer"], b) for a, b in itertools.pairwise(records)] == [0.0] * 15


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"function": "no name"}, "field 'function' is 'no name', expected the name"),
        ({"tests": []}, r"field 'tests' is \[\], expected a list"),
        ({"tests": [{"args": 1, "expected": 1}]}, "test .*, expected"),
        ({"tests": [{"args": []}]}, "test .*, expected"),
        ({"prefix": 3}, "field 'prefix' is 3, expected text"),
    ],
)
def test_a_problem_without_tests_is_refused_in_one_line(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        check_problem({**RECORD, **change}, "task: train problem 1")
    rows = [{"prompt": "a", **RECORD}, {"prompt": "b", **RECORD, **change}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = FileTask(train=str(tmp_path / "rows.jsonl"), eval_size=1, answer_field=None, reward="code")
    with pytest.raises(ValueError, match=r"^task: (train|eval) problem 1: " + message) as error:
        tasks.load(config, Rewards())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"second": 1}, "no option 'second', expected pattern, partial, seconds"),
        ({"memory_mb": 0}, "memory_mb=0, expected a positive integer"),
        ({"seconds": "1"}, "seconds='1', expected a positive number"),
        ({"namespaces": 1}, "namespaces=1, expected true or false"),
        ({"memory_mb": 1}, "sandbox: "),
        ({"pattern": "("}, r"pattern='\(': missing \)"),
        ({"pattern": "x"}, "pattern='x' has no group"),
    ],
)
def test_limits_that_cannot_be_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        code(**options)
    assert "\n" not in str(error.value)


def test_a_program_may_not_take_longer_than_its_row(tmp_path):
    from jaxrl_llm import config_load

    (tmp_path / "config.json").write_text("{}")
    config = Path(__file__).parents[1] / "configs" / "code.yaml"
    overrides = [f"model.path={tmp_path}", f"task.train={FUNCTIONS}", "rewards.timeout=8"]
    with pytest.raises(ValueError, match=r"task\.reward_options\.seconds=8: expected less than rewards\.timeout=8"):
        config_load.load(config, overrides)


def test_without_what_it_needs_it_refuses_and_runs_nothing(monkeypatch):
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    with pytest.raises(ValueError, match="sandbox: this is darwin, expected Linux"):
        code()


@pytest.mark.parametrize("name", ["unshare", "mount", "syscall", "capset", "prctl"])
def test_a_restriction_that_fails_is_a_refusal_before_anything_runs(name, monkeypatch, tmp_path):
    code = sandbox.MAIN.read_text()
    failing = code.replace("result = getattr", f'result = -1 if name == "{name}" else getattr')
    assert failing != code
    (tmp_path / "main.py").write_text(failing)
    monkeypatch.setattr(sandbox, "MAIN", tmp_path / "main.py")
    with pytest.raises(SandboxError, match=r"sandbox: .*: Success") as error:
        sandbox.run("def f(x): return x", "f", [[1]], LIMITS)
    assert "\n" not in str(error.value)
