"""Runs of several processes on one machine, over loopback: the numbers of one process, and everything that goes wrong."""

import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml
from test_loop import configured, metrics_of

from jaxrl_llm.launch import LOST, free_port
from jaxrl_llm.training import evaluate, loop, sample
from jaxrl_llm.training.rundir import claim

pytestmark = pytest.mark.processes

STEPS, SHARE = 3, 4  # RL steps; rows of a step in each of four processes
EVAL = 4  # held-out rows in each of two processes


def config_of(directory, **mesh):
    """A run with rows, replay and a multiplier on the host, and rewards in workers."""
    return configured(
        directory,
        run={"steps": STEPS},
        rewards={
            "workers": 1,
            "timeout": 300.0,  # a busy machine is no reason to leave a row unscored
            "parts": [{"reward": "strikes:reward"}],
            "env": ["STRIKE"],
        },
        algorithm={"name": "r2vpo", "replay": 1.0, "capacity": 2.0},
        checkpoint={"every": 1, "keep": 4, "export": False},
        mesh=mesh or {"fsdp": -1},
    )


class Job:
    """`count` processes of a command on a run with four devices in all."""

    def __init__(self, directory, count, *overrides, strike=None, config=None, command=("train",), inside=()):
        """strike: what befalls the last process (`strikes`), which runs `inside` another command."""
        file, port = directory.with_suffix(".yaml"), free_port()
        file.write_text(yaml.safe_dump((config or config_of(directory)).model_dump(mode="json")))
        self.running = []
        for i in range(count):
            words = [f"distributed.coordinator=127.0.0.1:{port}", f"distributed.processes={count}"]
            words += [f"distributed.process={i}", "distributed.heartbeat_timeout=300", *overrides]
            last = i == count - 1
            line = [*(inside if last else ()), sys.executable, "-m", "jaxrl_llm.cli", *command, str(file), *words]
            env = environment(4 // count) | ({"STRIKE": strike} if strike and last else {})
            self.running.append(
                subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )

    def end(self):
        """Exit codes, and what each process said on stderr."""
        said = ended(self.running, 400)
        self.printed = [out for out, _ in said]
        return [process.returncode for process in self.running], [error for _, error in said]


def ended(running, limit):
    """What each of the processes printed, read from all at once: one with a full pipe would keep the others waiting."""
    with ThreadPoolExecutor(len(running)) as readers:
        try:
            return list(readers.map(lambda process: process.communicate(timeout=limit), running))
        finally:
            for process in running:
                process.kill()


def environment(devices):
    return {
        "XLA_FLAGS": "--xla_backend_optimization_level=0",  # where no test has told XLA already
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parent),
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or "",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def run(directory, count, *overrides, strike=None):
    codes, said = Job(directory, count, *overrides, strike=strike).end()
    assert codes == [0] * count, said
    return directory


def steps_of(directory):
    return sorted(int(path.name) for path in (directory / "checkpoints").iterdir() if path.name.isdigit())


def saved(directory, step=None):
    """Every array of the checkpoint, the newest by default, by name."""
    step = steps_of(directory)[-1] if step is None else step
    where, handler = directory / "checkpoints" / str(step) / "arrays", ocp.PyTreeCheckpointHandler()
    names = handler.metadata(where).tree
    plain = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
    return handler.restore(where, args=ocp.args.PyTreeRestore(restore_args=plain))


def assert_same_run(a, b, **tolerance):
    """The same metrics and arrays: bitwise, or within a tolerance."""
    arrays_a, arrays_b = saved(a), saved(b)
    assert steps_of(a)[-1] == steps_of(b)[-1] and arrays_a.keys() == arrays_b.keys()
    compare = np.testing.assert_allclose if tolerance else np.testing.assert_array_equal
    for name, x in arrays_a.items():
        compare(x, arrays_b[name], err_msg=name, **tolerance)
    for x, y in zip(metrics_of(a), metrics_of(b), strict=True):
        assert x == (pytest.approx(y, rel=1e-3, abs=tolerance["atol"]) if tolerance else y)


def part_of(original, directory, steps):
    """A copy of a run as it was after `steps` steps."""
    shutil.copytree(original, directory)
    for step in steps_of(directory):
        if step > steps:
            shutil.rmtree(directory / "checkpoints" / str(step))
    return directory


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run in this process, on four devices."""
    directory = tmp_path_factory.mktemp("alone")
    assert loop.train(config_of(directory, fsdp=4)) == 0
    return directory


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The run in two processes of two devices; the second is late with its rewards once."""
    directory = tmp_path_factory.mktemp("two") / "run"
    return run(directory, 2, strike=f"sleep:{EVAL + 3}:{directory}.slept")


def test_two_processes_with_two_devices_each_make_the_steps_of_one_process(alone, two):
    lines = [line for line in metrics_of(two) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["completions/min_length"] < line["completions/max_length"] for line in lines)  # ends differ
    assert_same_run(alone, two, rtol=1e-5, atol=1e-5)


def test_four_processes_with_one_device_each_make_the_steps_of_one_process(alone, tmp_path):
    assert_same_run(alone, run(tmp_path / "four", 4), rtol=1e-5, atol=1e-5)


def test_what_the_first_process_does_once_is_done_once(two):
    assert len((two / "about.jsonl").read_text().splitlines()) == 1
    assert len(list((two / "tensorboard").iterdir())) == 1


def test_sigterm_to_one_during_collection_saves_the_step_on_all_and_the_run_goes_on_bitwise(two, tmp_path):
    directory = tmp_path / "stopped"
    during_step_2 = EVAL + 2 * SHARE + 3
    codes, said = Job(directory, 2, strike=f"TERM:{during_step_2}:{tmp_path}/struck").end()
    assert codes == [0, 0], said
    assert "SIGTERM: saving and stopping" in said[1] and "SIGTERM" not in said[0]
    assert steps_of(directory)[-1] == 2
    assert_same_run(two, run(directory, 2))


def test_a_run_saved_by_two_processes_goes_on_in_one(alone, two, tmp_path):
    directory = part_of(two, tmp_path / "one", steps=2)
    assert loop.train(config_of(directory, fsdp=4)) == 0
    assert_same_run(alone, directory, rtol=1e-5, atol=1e-5)


def test_a_damaged_newest_checkpoint_is_set_aside_and_four_processes_go_on_from_the_one_before(alone, two, tmp_path):
    directory = part_of(two, tmp_path / "four", steps=2)
    chunks = [path for path in (directory / "checkpoints" / "2" / "arrays").rglob("d/*") if path.is_file()]
    largest = max(chunks, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-100])
    codes, said = Job(directory, 4).end()
    assert codes == [0] * 4, said
    assert "2 is damaged" in said[0] and "going on from step 1" in said[0]
    assert (directory / "checkpoints" / "damaged_2.0").is_dir()
    assert_same_run(alone, directory, rtol=1e-5, atol=1e-5)


def test_a_full_disk_of_one_process_ends_all_with_its_error_and_leaves_the_last_good_checkpoint(two, tmp_path):
    directory = tmp_path / "full"
    codes, said = Job(directory, 2, strike=f"disk:{EVAL + 2 * SHARE + 3}:{tmp_path}/struck").end()
    assert codes[1] == 1 and codes[0] != 0, (codes, said)
    assert "stopped: checkpoints: could not write" in said[1]
    last = steps_of(directory)[-1]
    assert f"the last good checkpoint is step {last}" in said[1] and last < 2
    good, same = saved(directory), saved(part_of(two, tmp_path / "same", steps=last))
    assert all(np.array_equal(good[name], same[name]) for name in same)


def may_mount():
    try:
        return subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not may_mount(), reason="no mount namespaces for this user here")
def test_a_disk_that_turns_read_only_ends_all_with_its_error_and_leaves_the_last_good_checkpoint(two, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    # Only the second process sees its disk turn read-only.
    inside = ["unshare", "-rm", "sh", "-c", f'mount --bind {disk} {disk} && exec "$@"', "sh"]
    strike = f"readonly:{EVAL + 2 * SHARE + 3}:{disk}/struck"
    codes, said = Job(disk / "run", 2, strike=strike, inside=inside).end()
    assert codes[1] == 1 and codes[0] != 0, (codes, said)
    assert "stopped: checkpoints: could not write" in said[1] and "Read-only file system" in said[1]
    last = steps_of(disk / "run")[-1]
    assert f"the last good checkpoint is step {last}" in said[1] and last < 2
    good, same = saved(disk / "run"), saved(part_of(two, tmp_path / "same", steps=last))
    assert all(np.array_equal(good[name], same[name]) for name in same)


def test_two_processes_warm_start_train_a_critic_export_evaluate_and_sample_as_one(tmp_path, capsys):
    def with_critic(directory, **mesh):
        return configured(
            directory,
            run={"steps": 2},
            rewards={"parts": [{"reward": "letter:1"}]},
            algorithm={"name": "ppo"},
            reference={"mode": "resident"},
            optimizer={"lr": 1e-3},  # Adam follows the rounding of gradients near zero, by up to this
            warmstart={"steps": 3, "batch": 8},
            checkpoint={"every": 1, "keep": 4, "export": True},
            mesh=mesh,
        )

    one, two = with_critic(tmp_path / "one", fsdp=4), with_critic(tmp_path / "two", dp=2, fsdp=2)
    assert loop.train(one) == 0
    job = Job(tmp_path / "two", 2, config=two)
    assert job.end()[0] == [0, 0]
    assert_same_run(tmp_path / "one", tmp_path / "two", rtol=1e-5, atol=1e-5)

    capsys.readouterr()
    found = evaluate.run(one)
    evaluating = Job(tmp_path / "two", 2, config=two, command=("eval",))
    sampling = Job(tmp_path / "two", 2, "1+2 =", config=two, command=("sample", "-n", "5"))
    assert evaluating.end()[0] == [0, 0] and sampling.end()[0] == [0, 0]
    said = {
        words[0]: float(words[1]) for words in map(str.split, evaluating.printed[0].splitlines()) if len(words) == 2
    }
    assert {name: said[name] for name in found} == pytest.approx(found, abs=1e-4)
    assert sampling.printed[0].splitlines()[-5:] == sample.run(one, "1+2 =", n=5)  # gloo prints something before
    assert "accuracy" in evaluating.printed[0] and "accuracy" not in evaluating.printed[1]


def test_a_run_directory_that_another_job_holds_is_refused_by_all_processes(tmp_path):
    directory = tmp_path / "held"
    with claim(directory, config_of(directory).model_dump(mode="json", exclude={"distributed"})):
        codes, said = Job(directory, 2).end()
    assert codes == [2, LOST]
    assert f"process {os.getpid()} is running there" in said[0]
    assert "jaxrl_llm: process 1 of 2: process 0 failed:" in said[1]


def test_a_process_says_for_what_and_how_long_it_waits_before_the_others_come(tmp_path):
    (code,), (said,) = Job(tmp_path / "waiting", 1, "distributed.processes=2", "distributed.start_timeout=3").end()
    assert code != 0
    assert said.startswith("jaxrl_llm: process 0 of 2: waits up to 3 s for the others at distributed.coordinator=127.")


FOUND = """
import os, sys
from jax._src.clusters import cloud_tpu_cluster
from jaxrl_llm.config import Distributed
from jaxrl_llm.sharding import processes

cloud_tpu_cluster.running_in_cloud_tpu_vm = sys.argv[1] in ("gke", "vm")
if sys.argv[1] == "vm":  # JAX sets it where it finds no chip
    del os.environ["TPU_SKIP_MDS_QUERY"]

def work():
    print(processes.gather([processes.index(), int(sys.argv[2])], "the numbers"))
    return 0

sys.exit(processes.run(Distributed(coordinator="auto"), work))
"""


def slurm(i):
    named = {"JOB_ID": 7, "STEP_NODELIST": "localhost", "NTASKS": 2, "PROCID": i, "LOCALID": i}
    return {f"SLURM_{name}": str(value) for name, value in named.items()}


def open_mpi(i):
    named = {"SIZE": 2, "RANK": i, "LOCAL_RANK": i}
    return {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://127.0.0.1:1"} | {
        f"OMPI_COMM_WORLD_{k}": str(n) for k, n in named.items()
    }


def two_slices(i):
    """GKE, two hosts in each."""
    hosts = {"TPU_WORKER_HOSTNAMES": "localhost,localhost", "TPU_WORKER_ID": str(i % 2), "TPU_SKIP_MDS_QUERY": "1"}
    slices = {"COORDINATOR_ADDRESS": "localhost:8080", "NUM_SLICES": "2", "SLICE_ID": str(i // 2)}
    return hosts | {f"MEGASCALE_{name}": value for name, value in slices.items()}


@contextmanager
def metadata(attributes):
    """The server that a Google machine asks who it is; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            value = attributes.get(self.path.rsplit("/", 1)[1])
            self.send_response(404 if value is None else 200)
            self.end_headers()
            self.wfile.write((value or "").encode())

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@contextmanager
def tpu_vms():
    """Two slices of two TPU VMs each, which JAX tells apart by their metadata."""

    def told(i):
        slices = f"MEGASCALE_COORDINATOR_ADDRESS: 'localhost:8080'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '{i // 2}'"
        hosts = {"agent-worker-number": str(i % 2), "worker-network-endpoints": "localhost,localhost"}
        return hosts | {"tpu-env": slices}

    with ExitStack() as servers:
        yield [{"GCE_METADATA_IP": servers.enter_context(metadata(told(i)))} for i in range(4)]


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        ("slurm", nullcontext([slurm(i) for i in range(2)])),
        ("mpi", nullcontext([open_mpi(i) for i in range(2)])),
        ("gke", nullcontext([two_slices(i) for i in range(4)])),
        ("vm", tpu_vms()),
    ],
    ids=["Slurm", "Open MPI", "two slices in GKE", "two slices of TPU VMs"],
)
def test_auto_finds_the_processes_by_what_the_environment_says(kind, where, tmp_path):
    """As JAX reads it; a TPU's environment with CPU devices."""
    (tmp_path / "found.py").write_text(FOUND)
    port, running = {"JAX_COORDINATOR_PORT": str(free_port())}, []
    with where as environments:
        for i, own in enumerate(environments):
            line = [sys.executable, str(tmp_path / "found.py"), kind, str(i)]
            env = environment(1) | port | own
            running.append(subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        said = ended(running, 200)
    everyone = str([[i, i] for i in range(len(running))])
    assert [(process.returncode, out.strip()) for process, (out, _) in zip(running, said)] == [
        (0, everyone) for _ in running
    ], said


LATE = """
import sys, time
from types import SimpleNamespace
from jaxrl_llm.config import Distributed, Mesh
from jaxrl_llm.sharding import processes
from jaxrl_llm.training import build

def work():
    if processes.lead():
        time.sleep(35)
    build.mesh(SimpleNamespace(mesh=Mesh(dp=2, fsdp=2)))
    return 0

where, i = sys.argv[1:]
sys.exit(processes.run(Distributed(coordinator=where, processes=2, process=int(i)), work))
"""


def test_devices_wait_for_a_process_that_is_slow_to_come(tmp_path):
    """Longer than the 30 s that gloo waits when devices first meet."""
    (tmp_path / "late.py").write_text(LATE)
    words = [sys.executable, str(tmp_path / "late.py"), f"127.0.0.1:{free_port()}"]
    running = [
        subprocess.Popen([*words, str(i)], env=environment(2), stderr=subprocess.PIPE, text=True) for i in range(2)
    ]
    said = ended(running, 400)
    assert [process.returncode for process in running] == [0, 0], said


TALK = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from jaxrl_llm.config import Distributed
from jaxrl_llm.sharding import processes

def f(layers, heads, x):  # an order between the gathers of the loop and those of the heads follows from nothing
    whole = lambda w: jax.lax.all_gather(w, "fsdp", tiled=True)
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ whole(w)), None), x, layers)
    return sum((x @ whole(w)).sum() for w in heads)[None]

def work():
    mesh, specs = jax.make_mesh((4,), ("fsdp",)), (P(None, "fsdp"), [P("fsdp")] * 6, P("fsdp"))
    heads = [np.ones((64, 16 * n), np.float32) for n in range(1, 7)]
    given = np.full((8, 64, 64), 0.01, np.float32), heads, np.ones((64, 64), np.float32)
    placed = processes.put(given, jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), specs))
    g = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=P("fsdp"), check_vma=False))
    said = {float(g(*placed).addressable_data(0)[0]) for _ in range(200)}
    assert len(said) == 1, said
    return 0

where, i = sys.argv[1:]
sys.exit(processes.run(Distributed(coordinator=where, processes=2, process=int(i)), work))
"""


def test_collectives_keep_their_order_when_a_start_finds_its_programs_compiled(tmp_path):
    """XLA's programs for a CPU would not, read back from the compilation cache: gloo's "Received data size doesn't match"."""
    (tmp_path / "talk.py").write_text(TALK)
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    for _ in range(2):
        words = [sys.executable, str(tmp_path / "talk.py"), f"127.0.0.1:{free_port()}"]
        running = [
            subprocess.Popen([*words, str(i)], env=environment(2) | cache, stderr=subprocess.PIPE, text=True)
            for i in range(2)
        ]
        said = ended(running, 200)
        assert [process.returncode for process in running] == [0, 0], said


CLAIM = """
import os, sys
from jaxrl_llm.config import Distributed
from jaxrl_llm.sharding import processes
from jaxrl_llm.training.rundir import claim

def work():
    with claim("run", {"run": {"seed": int(seed)}}):
        processes.gather(None, "the run")
    return 0

where, i, cwd, seed = sys.argv[1:]
os.chdir(cwd)
sys.exit(processes.run(Distributed(coordinator=where, processes=2, process=int(i)), work))
"""


def claimed(directory, places, seeds):
    """What the processes of a job end with and say that claim the run directory of their places."""
    (directory / "claim.py").write_text(CLAIM)
    where, words = f"127.0.0.1:{free_port()}", [sys.executable, str(directory / "claim.py")]
    running = [
        subprocess.Popen([*words, where, str(i), place, seed], env=environment(1), stderr=subprocess.PIPE, text=True)
        for i, (place, seed) in enumerate(zip(places, seeds))
    ]
    said = ended(running, 200)
    return [process.returncode for process in running], [error for _, error in said]


def test_a_process_with_another_config_ends_all_and_names_the_field(tmp_path):
    codes, said = claimed(tmp_path, [str(tmp_path)] * 2, ["0", "1"])
    line = "run.seed=1: process 0 has 0, expected the same config on all processes"
    assert codes == [LOST, 2]
    assert f"jaxrl_llm: process 1 of 2: {line}" in said[1]
    assert f"jaxrl_llm: process 0 of 2: process 1 failed: {line}" in said[0]
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_run_directory_that_not_all_processes_see_ends_all(tmp_path):
    places = [tmp_path / "a", tmp_path / "b"]  # the same path of both, as on two hosts
    for place in places:
        (place / "run").mkdir(parents=True)
    codes, said = claimed(tmp_path, [str(place) for place in places], ["0", "0"])
    assert codes == [LOST, 2]
    assert "run.dir=run: is not what process 0 writes to, expected a path that all processes share" in said[1]


def test_a_run_whose_processes_are_killed_at_random_ends_as_the_one_nobody_touched(tmp_path, monkeypatch):
    """The short form of benchmarks/soak.py."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import soak

    for name, value in environment(2).items():
        monkeypatch.setenv(name, value)
    found = soak.soak(tmp_path, steps=8, kills=1, seed=0)
    assert len(found["kills"]) == 1
    assert found["each_step_once"] and found["same_metrics"] and found["same_arrays"]
    said = (tmp_path / "killed.txt").read_text().splitlines()
    (line,) = [line for line in said if line.startswith("jaxrl_llm launch:")]
    killed = found["kills"][0]["rank"]
    assert line == f"jaxrl_llm launch: process {killed} of 2 was killed by SIGKILL; starting all again (1 of 1)"


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"coordinator": "host"}, "distributed.coordinator='host': expected HOST:PORT of process 0, or auto"),
        ({"coordinator": "h:1"}, "distributed.processes: missing, expected a number with distributed.coordinator=h:1"),
        ({"process": 1}, "distributed.process=1: distributed.coordinator is not set, expected HOST:PORT there"),
        (
            {"coordinator": "h:1", "processes": 2, "process": 2},
            "distributed.process=2: with distributed.processes=2, expected 0 to 1",
        ),
    ],
)
def test_contradictions_between_the_fields_are_one_line(given, line, tmp_path):
    from jaxrl_llm import config_check

    with pytest.raises(ValueError) as error:
        config_check.check(configured(tmp_path, distributed=given))
    assert str(error.value) == line


def test_a_run_directory_does_not_say_where_its_processes_met(two):
    saved = yaml.safe_load((two / "config.yaml").read_text())
    assert saved["run"]["steps"] == STEPS and "distributed" not in saved
