"""Checkpoints in object storage, against a stand-in for its server (`fake_gcs`): nothing here was asked of Google's."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml
from etils import epath
from fake_gcs import FakeGCS
from test_checkpoints import HOST, MEMORY, assert_same, make_tree
from test_loop import configured, letters, metrics_of
from test_processes import config_of, ended, environment

from jaxrl_llm import config_check
from jaxrl_llm.launch import free_port
from jaxrl_llm.training import loop
from jaxrl_llm.training.checkpoints import CheckpointError, Checkpoints
from jaxrl_llm.training.rundir import claim

if find_spec("gcsfs") is None:  # its import reads the environment that `storage` makes
    pytest.skip("the extra gcs is not installed", allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def storage(tmp_path_factory):
    """The server, and an environment in which nothing looks for another one or for credentials."""
    import fsspec

    with FakeGCS("bucket") as server, pytest.MonkeyPatch.context() as patch:
        address = server.url.removeprefix("http://")
        for name, value in {
            "STORAGE_EMULATOR_HOST": server.url,
            "TENSORSTORE_GCS_HTTP_URL": server.url,
            "GCE_METADATA_HOST": address,
            "GCE_METADATA_ROOT": address,
            "NO_GCE_CHECK": "true",
            "CLOUDSDK_CONFIG": str(tmp_path_factory.mktemp("no_credentials")),
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks over gRPC what kind of bucket it is
            "FSSPEC_GCS_TOKEN": "anon",
        }.items():
            patch.setenv(name, value)
        patch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
        patch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})
        yield server
        understood = [line for line in server.unknown if "/computeMetadata/" not in line]
        assert understood == []


@pytest.fixture
def where(storage, request):
    """A place of its own for every test."""
    storage.refuse = lambda method, name: None
    yield "gs://bucket/" + re.sub(r"\W+", "_", request.node.name)
    storage.refuse = lambda method, name: None


def name_of(where):
    return where.removeprefix("gs://bucket/")


def test_everything_comes_back_bitwise(where):
    tree = make_tree()
    with Checkpoints(where) as saved:
        assert saved.save(3, tree, HOST, MEMORY, wait=True)
        assert not saved.save(3, tree, HOST, MEMORY)
    with Checkpoints(where) as found:
        step, back, host, memory = found.restore_latest(make_tree(0.0))
    assert step == 3 and host == HOST
    assert_same(back, tree)
    np.testing.assert_array_equal(memory["replay"]["tokens"], MEMORY["replay"]["tokens"])
    assert memory["text"].tolist() == ["a", "bc"]


def test_an_empty_place_restores_nothing(where):
    with Checkpoints(where) as c:
        assert c.restore_latest({"x": jnp.zeros(2)}) is None


def test_the_last_and_the_best_are_kept_also_by_a_later_process(storage, where):
    with Checkpoints(where, keep=2, keep_best=True) as c:
        for step, score in enumerate([0.1, 0.9, None, 0.5, 0.4]):
            c.save(step, {"x": jnp.ones(2)}, {}, {}, score=score)
    with Checkpoints(where, keep=2, keep_best=True) as c:
        assert c.steps() == [1, 3, 4]
        c.save(5, {"x": jnp.ones(2)}, {}, {}, score=0.2, wait=True)
        assert c.steps() == [1, 4, 5]
    steps = {name.split("/")[1] for name in storage.names(name_of(where))}
    assert steps == {"1", "4", "5"}  # nothing is left of the others


def saver(where, *steps):
    """A process that saves steps."""
    code = f"""if True:
        import jax.numpy as jnp
        from jaxrl_llm.training.checkpoints import Checkpoints
        with Checkpoints({where!r}) as checkpoints:
            for step in {steps}:
                checkpoints.save(step, {{"x": jnp.arange(1000.0) + step}}, {{"step": step}}, {{}}, wait=True)
    """
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment(1))


def test_a_step_that_another_process_saved_is_seen(where):
    """No listing is remembered: one that is would be of before the other process's step."""
    with Checkpoints(where) as c:
        c.save(1, {"x": jnp.ones(2)}, {}, {}, wait=True)
        listed = sorted(path.name for path in c.directory.iterdir())
        other = saver(where, 2)
        _, said = other.communicate(timeout=400)
        assert other.returncode == 0, said
        assert (listed, sorted(path.name for path in c.directory.iterdir())) == (["1"], ["1", "2"])


def damage(storage, prefix, how):
    with storage.lock:
        key = max((("bucket", name) for name in storage.names(prefix)), key=lambda key: len(storage.objects[key][0]))
        content, generation = storage.objects[key]
        if how == "gone":
            del storage.objects[key]
            return
        content = bytearray(content[: len(content) // 2] if how == "cut" else content)
        content[len(content) // 2] ^= how == "flip"
        storage.objects[key] = bytes(content), generation


@pytest.mark.parametrize(
    ("part", "how"),
    [
        ("arrays/d/", "cut"),
        ("arrays/ocdbt.process_0/d/", "flip"),
        ("arrays/ocdbt", "gone"),
        ("host", "flip"),
        ("host", "gone"),
    ],
)
def test_a_damaged_newest_step_is_set_aside_and_the_one_before_it_restored(storage, where, part, how):
    noise = jax.random.normal(jax.random.key(0), (1000,))
    with Checkpoints(where) as c:
        for step in (1, 2):
            c.save(step, {"x": noise * step}, {"step": step}, {})
    if part == "host":
        part = "host/process_0.npz"
    before = len(storage.names(f"{name_of(where)}/2/"))
    damage(storage, f"{name_of(where)}/2/{part}", how)
    with Checkpoints(where) as c:
        with pytest.warns(UserWarning, match=r"2 is damaged .* going on from step 1"):
            step, tree, host, _ = c.restore_latest({"x": noise})
        assert (step, host["step"], c.steps()) == (1, 1, [1])
        np.testing.assert_array_equal(tree["x"], noise)
        assert not storage.names(f"{name_of(where)}/2/")
        assert c.save(2, {"x": noise}, {"step": 2}, {}, wait=True)
    with Checkpoints(where) as c:  # which removes what is left of interrupted saves
        assert c.steps() == [1, 2]
    assert len(storage.names(f"{name_of(where)}/damaged_2.0/")) == before - (how == "gone")


def test_a_step_is_set_aside_also_when_that_was_interrupted_half_way(storage, where):
    with Checkpoints(where) as c:
        for step in (1, 2):
            c.save(step, {"x": jnp.ones(1000) * step}, {}, {})
    damage(storage, f"{name_of(where)}/2/host/process_0.npz", "flip")
    storage.refuse = lambda method, name: 403 if re.search(r"/2/arrays/.*(moveTo|rewriteTo)", name) else None
    with Checkpoints(where) as c, pytest.raises(CheckpointError, match="could not set step 2 aside in gs://bucket"):
        c.restore_latest({"x": jnp.ones(1000)})
    storage.refuse = lambda method, name: None
    with Checkpoints(where) as c:
        assert c.restore_latest({"x": jnp.ones(1000)})[0] == 1
        assert c.steps() == [1]


@pytest.mark.parametrize(
    "last", ["1/arrays/d/", "1/arrays/manifest.ocdbt", "1/host/process_0.npz", "1/commit_success.txt"]
)
def test_a_save_that_fails_half_way_is_one_line_and_leaves_nothing_that_counts(storage, where, last):
    x = jnp.arange(1000.0)
    with Checkpoints(where) as c:
        c.save(0, {"x": x}, {"step": 0}, {}, wait=True)
        storage.refuse = lambda method, name: 403 if "/upload/" in name and last in name else None
        with pytest.raises(CheckpointError, match="last good checkpoint is step 0") as error:
            c.save(1, {"x": x + 1}, {"step": 1}, {}, wait=True)
        assert re.search("403|Forbidden", str(error.value)) and "\n" not in str(error.value)
    assert storage.names(f"{name_of(where)}/1/")
    storage.refuse = lambda method, name: None
    with Checkpoints(where) as c:
        assert c.steps() == [0] and not storage.names(f"{name_of(where)}/1/")
        step, tree, host, _ = c.restore_latest({"x": x})
        assert (step, host) == (0, {"step": 0})
        np.testing.assert_array_equal(tree["x"], x)
        assert c.save(1, {"x": x}, {"step": 1}, {}, wait=True) and c.steps() == [0, 1]


def test_a_process_killed_before_the_last_object_of_a_step_leaves_the_step_before_it(storage, where):
    def strike(method, name):
        if name.endswith("/1/commit_success.txt") and "/upload/" in name:
            running.kill()
            return 503
        return None

    storage.refuse = strike
    running = saver(where, 0, 1, 2)
    _, said = running.communicate(timeout=400)
    assert running.returncode == -signal.SIGKILL, said
    assert f"{name_of(where)}/1/host/process_0.npz" in storage.names(name_of(where))
    storage.refuse = lambda method, name: None
    with Checkpoints(where) as c:
        assert not storage.names(f"{name_of(where)}/1/")
        step, tree, _, _ = c.restore_latest({"x": jnp.zeros(1000)})
    assert step == 0
    np.testing.assert_array_equal(tree["x"], np.arange(1000.0))


@pytest.mark.parametrize("what", ["manifest.ocdbt", "process_0.npz"])
def test_storage_that_refuses_to_be_read_is_an_error_and_no_damage(storage, where, what):
    with Checkpoints(where) as c:
        for step in (1, 2):
            c.save(step, {"x": jnp.ones(2)}, {}, {})
    with Checkpoints(where) as c:
        storage.refuse = lambda method, name: 403 if "/2/" in name and what in name else None
        with pytest.raises(CheckpointError, match="could not read step 2 in gs://bucket"):
            c.restore_latest({"x": jnp.ones(2)})
        storage.refuse = lambda method, name: None
        assert c.restore_latest({"x": jnp.ones(2)})[0] == 2


# ------------------------------------------------------------------------------------------------------------- whole runs


def arrays_of(root):
    """Every array of the newest checkpoint, and its step."""
    with Checkpoints(epath.Path(root) / "checkpoints", keep=3) as checkpoints:
        step = checkpoints.steps()[-1]
    where, handler = epath.Path(root) / "checkpoints" / str(step) / "arrays", ocp.PyTreeCheckpointHandler()
    plain = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in handler.metadata(where).tree}
    return step, handler.restore(where, args=ocp.args.PyTreeRestore(restore_args=plain))


def assert_same_arrays(a, b, **tolerance):
    (step_a, arrays_a), (step_b, arrays_b) = arrays_of(a), arrays_of(b)
    assert step_a == step_b and arrays_a.keys() == arrays_b.keys()
    compare = np.testing.assert_allclose if tolerance else np.testing.assert_array_equal
    for name, x in arrays_a.items():
        compare(x, arrays_b[name], err_msg=name, **tolerance)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    directory = tmp_path_factory.mktemp("straight")
    assert loop.train(configured(directory), on_rows=letters) == 0
    return directory


def interrupt(at, how):
    def on_rows(step, rows):
        letters(step, rows)
        if step == at:
            how()

    return on_rows


def crash():
    raise RuntimeError("power cut")


def test_a_run_goes_on_from_an_empty_run_directory_to_the_same_numbers(straight, where, tmp_path, capfd):
    def config_of(directory):
        return configured(directory, checkpoint={"every": 0, "dir": where})

    first, second = tmp_path / "first", tmp_path / "second"
    assert loop.train(config_of(first), interrupt(0, lambda: os.kill(os.getpid(), signal.SIGTERM))) == 0
    assert f"saved step 1 in {where}/checkpoints" in " ".join(capfd.readouterr().out.split())
    assert not (first / "checkpoints").exists()
    with pytest.raises(
        RuntimeError, match="power cut"
    ):  # there is a line of step 2, and no checkpoint after that of step 1
        loop.train(config_of(second), interrupt(2, crash))
    said = " ".join(capfd.readouterr().out.split())
    assert "going on after step 1" in said
    assert f"up to there were written in another run directory than {second}" in said
    assert [line["step"] for line in metrics_of(second)] == [2]
    assert loop.train(config_of(second), on_rows=letters) == 0
    assert_same_arrays(straight, where)
    assert metrics_of(first) + metrics_of(second) == metrics_of(straight)


def test_a_warm_start_saves_there_too(storage, where, tmp_path):
    config = configured(
        tmp_path,
        run={"steps": 0},
        eval={"size": 0},
        warmstart={"steps": 2, "batch": 8},
        checkpoint={"every": 1, "export": False, "dir": where},
    )
    assert loop.train(config) == 0
    assert storage.names(f"{name_of(where)}/warmstart/2/") and not (tmp_path / "warmstart").exists()


def test_lines_after_a_checkpoint_of_another_directory_are_cut_away(tmp_path):
    from jaxrl_llm.reporting.writers import Writers

    def steps():
        return [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]

    there = {"metrics": 5000, "samples": 100, "step": 3, "born": "a"}
    writers = Writers(tmp_path, there, "b")
    assert writers.elsewhere
    for step in (3, 4, 5):
        writers.scalars(step, {})
    assert writers.position()["born"] == "b"
    writers.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "to')  # killed while it wrote
    Writers(tmp_path, {**there, "step": 4}, "b").close()
    assert steps() == [3, 4]


def upload(storage, directory, where):
    for path in directory.rglob("*"):
        if path.is_file():
            storage.write(("bucket", f"{name_of(where)}/{path.relative_to(directory)}"), path.read_bytes(), {})


def test_a_run_moves_from_its_directory_into_a_bucket_with_its_checkpoints_only(straight, storage, where, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    config = configured(tmp_path / "run", checkpoint={"dir": where})
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    with pytest.raises(ValueError) as error:
        loop.train(config, on_rows=letters)
    assert str(error.value) == (
        f"checkpoint.dir={where}: no checkpoint there, while this run saved to run.dir={tmp_path / 'run'}; expected its "
        "checkpoints there, or a new run.dir"
    )
    assert metrics_of(tmp_path / "run") == metrics_of(straight)
    upload(storage, tmp_path / "run" / "checkpoints", f"{where}/checkpoints")
    assert loop.train(config, on_rows=letters) == 0
    assert_same_arrays(straight, where)
    assert metrics_of(tmp_path / "run") == metrics_of(straight)


def start(directory, places, file):
    """Two processes of a run, each in a place of its own: what is `run` to both is not the same directory."""
    port, running = free_port(), []
    for i, place in enumerate(places):
        (directory / place).mkdir(exist_ok=True)
        words = [f"distributed.coordinator=127.0.0.1:{port}", "distributed.processes=2", f"distributed.process={i}"]
        words += ["distributed.heartbeat_timeout=300"]
        line = [sys.executable, "-m", "jaxrl_llm.cli", "train", str(file), *words]
        running.append(
            subprocess.Popen(
                line,
                env=environment(2),
                cwd=directory / place,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    said = ended(running, 400)
    assert [process.returncode for process in running] == [0, 0], said
    return [out for out, _ in said]


@pytest.mark.processes
def test_two_processes_that_share_no_disk_go_on_and_save_in_a_bucket(storage, where, tmp_path):
    """From what one process saved there: with another mesh, and run directories of their own."""

    def config(directory, **mesh):
        config = config_of(directory, **mesh)
        return config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"dir": where})})

    assert loop.train(config(tmp_path / "alone", fsdp=4)) == 0
    alone = f"{where}_alone"
    with storage.lock:
        for name in storage.names(f"{name_of(where)}/checkpoints/3/"):
            content, _ = storage.objects["bucket", name]
            storage.write(("bucket", name.replace(name_of(where), name_of(alone), 1)), content, {})
        storage.remove(("bucket", f"{name_of(where)}/checkpoints/3/commit_success.txt"), {})
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config("run", fsdp=-1).model_dump(mode="json")))
    said, _ = start(tmp_path, ["a", "b"], file)
    assert "going on after step 2" in said
    assert (tmp_path / "a" / "run").exists() and not (tmp_path / "b" / "run").exists()
    (line,) = (line for line in metrics_of(tmp_path / "a" / "run") if "loss" in line)
    (same,) = (line for line in metrics_of(tmp_path / "alone") if line["step"] == 3 and "loss" in line)
    assert line == pytest.approx(same, rel=1e-3, abs=1e-5)
    assert storage.names(f"{name_of(where)}/checkpoints/3/arrays/array_metadatas/process_1")
    assert_same_arrays(alone, where, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("given", ["", "s3://bucket/run", "gs://", "gs:///run"])
def test_what_is_no_place_is_one_line(given, tmp_path):
    with pytest.raises(ValueError) as error:
        config_check.check(configured(tmp_path, checkpoint={"dir": given}))
    assert str(error.value) == f"checkpoint.dir={given!r}: expected a directory, or gs://BUCKET/PATH"


def test_a_path_that_orbax_takes_for_a_pattern_is_one_line(tmp_path):
    """A step would be saved there without its arrays."""
    for key, path in [("checkpoint.dir", "gs://bucket/run[1]"), ("run.dir", str(tmp_path / "run[1]"))]:
        given = configured(path) if key == "run.dir" else configured(tmp_path, checkpoint={"dir": path})
        with pytest.raises(ValueError) as error:
            config_check.check(given)
        assert str(error.value) == f"{key}={path!r}: has [ in its path, expected one without * ? ["


@pytest.mark.parametrize("package", ["gcsfs", "google.cloud.storage"])
def test_a_bucket_without_the_packages_for_it_names_the_extra(package, tmp_path, monkeypatch):
    found = config_check._installed
    monkeypatch.setattr(config_check, "_installed", lambda name: name != package and found(name))
    config_check.check(configured(tmp_path, checkpoint={"dir": str(tmp_path / "there")}))
    with pytest.raises(ValueError) as error:
        config_check.check(configured(tmp_path, checkpoint={"dir": "gs://bucket/run"}))
    assert str(error.value) == (
        f"checkpoint.dir='gs://bucket/run': the package {package} is missing, expected the extra gcs "
        "(pip install 'jaxrl_llm[gcs]')"
    )
    assert not config_check._installed("no_such_package.at_all")


def claimed(directory, where, seed=0):
    with claim(directory, {"run": {"seed": seed}, "checkpoint": {"dir": where}}) as run:
        return run


def test_the_checkpoints_of_another_run_are_refused_from_any_machine(where, tmp_path):
    assert claimed(tmp_path / "a", where).checkpoints == epath.Path(where) / "checkpoints"
    assert not claimed(tmp_path / "b", f"{where}/").resumed
    with pytest.raises(ValueError) as error:
        claimed(tmp_path / "c", where, seed=1)
    assert str(error.value) == (
        f"checkpoint.dir={where}: holds a run with run.seed=0, this one has 1; expected the same config to resume, or a new "
        "checkpoint.dir"
    )
    assert not (tmp_path / "c").exists()


def test_a_run_directory_that_is_refused_leaves_nothing_in_the_bucket(storage, where, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"thesis\.tex"):
        claimed(tmp_path, where)
    assert not storage.names(name_of(where))


def test_a_bucket_that_is_not_there_or_closed_is_one_line_and_none_is_made(storage, where, tmp_path):
    with pytest.raises(ValueError) as error:
        claimed(tmp_path / "a", "gs://bukcet/run")
    assert str(error.value) == (
        "checkpoint.dir=gs://bukcet/run: cannot be used (there is no gs://bukcet that may be read), expected a bucket that this "
        "machine may read and write"
    )
    assert storage.buckets == {"bucket"} and not (tmp_path / "a").exists()
    storage.refuse = lambda method, name: 403 if "/upload/" in name else None
    with pytest.raises(
        ValueError, match=r"^checkpoint\.dir=gs://bucket/.* cannot be used \(Forbidden.*read and write$"
    ):
        claimed(tmp_path / "b", where)


def test_local_runs_import_nothing_for_buckets():
    code = "import sys, jaxrl_llm.cli, jaxrl_llm.training.loop; print([n for n in sys.modules if n.startswith(('gcsfs', 'google.cloud.storage', 'aiohttp', 'grpc'))])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
