"""Checkpoints: bitwise round trips, atomicity, damage, other meshes, refusals."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl_llm.training.checkpoints import CheckpointError, Checkpoints, Mismatch
from jaxrl_llm.training.host_state import decode, encode


class Counters(NamedTuple):
    step: jax.Array
    done: jax.Array


def make_tree(scale=1.0):
    params = {
        "policy": {"layers": {"q": jnp.arange(24, dtype=jnp.float32).reshape(2, 3, 4) * scale}},
        "critic": {"head": (jnp.arange(5) * 0.1 * scale).astype(jnp.bfloat16)},
    }
    return {
        "params": params,
        "opt": optax.adamw(1e-3).init(params),
        "state": (),
        "absent": None,
        "nothing": jnp.zeros((0, 3)),
        "odd": jnp.array([jnp.nan, -0.0, jnp.inf]),
        "flags": jnp.array([True, False]),
        "key": jax.random.key(3),
        "counters": Counters(jnp.int32(7), jnp.uint8(1)),
        "reference": {"w": np.linspace(0, scale, 6)},
    }


def raw(x):
    x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return x.dtype, x.shape, np.asarray(x).tobytes()


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert raw(x) == raw(y)


HOST = {"step": 3, "iterator": {"at": [1, 2], "name": "ß", "rate": 0.1 + 0.2, "none": None}}
MEMORY = {
    "replay": {"tokens": np.arange(6).reshape(2, 3), "empty": np.zeros(0, np.float32)},
    "text": np.array(["a", "bc"]),
}


def test_everything_comes_back_bitwise(tmp_path):
    tree = make_tree()
    with Checkpoints(tmp_path) as saved:
        assert saved.save(3, tree, HOST, MEMORY, wait=True)
    with Checkpoints(tmp_path) as found:
        step, back, host, memory = found.restore_latest(make_tree(0.0))
    assert step == 3
    assert_same(back, tree)
    assert isinstance(back["reference"]["w"], np.ndarray)
    assert host == HOST
    np.testing.assert_array_equal(memory["replay"]["tokens"], MEMORY["replay"]["tokens"])
    assert memory["replay"]["empty"].dtype == np.float32
    assert memory["text"].tolist() == ["a", "bc"]


def test_abstract_leaves_are_enough_to_restore(tmp_path):
    tree = {k: v for k, v in make_tree().items() if k != "reference"}
    with Checkpoints(tmp_path) as c:
        c.save(0, tree, {}, {})
        assert_same(c.restore_latest(jax.eval_shape(lambda: tree))[1], tree)


def test_a_tree_without_arrays_can_be_saved(tmp_path):
    with Checkpoints(tmp_path) as c:
        c.save(1, {"state": (), "none": None}, {"a": 1}, {})
        assert c.restore_latest({"state": (), "none": None}) == (1, {"state": (), "none": None}, {"a": 1}, {})


def test_restored_scalars_mix_with_arrays_on_any_mesh(tmp_path):
    with Checkpoints(tmp_path) as c:
        c.save(1, {"n": jnp.int32(2)}, {}, {})
        n = c.restore_latest({"n": jnp.int32(0)})[1]["n"]
    mesh = jax.make_mesh((4,), ("x",))
    x = jax.device_put(jnp.arange(8), NamedSharding(mesh, P("x")))
    np.testing.assert_array_equal(jax.jit(lambda x, n: x * n)(x, n), np.arange(8) * 2)


def test_a_checkpoint_restores_onto_another_mesh(tmp_path):
    x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    four = NamedSharding(jax.make_mesh((4,), ("x",)), P("x"))
    two = NamedSharding(jax.make_mesh((2, 2), ("x", "y")), P("y", "x"))
    with Checkpoints(tmp_path) as c:
        c.save(1, {"w": jax.device_put(x, four)}, {}, {})
        w = c.restore_latest({"w": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=two)})[1]["w"]
    assert w.sharding == two
    np.testing.assert_array_equal(w, x)


def test_donating_and_overwriting_after_an_asynchronous_save_does_not_change_it(tmp_path):
    x, host_side = jnp.arange(1 << 20, dtype=jnp.float32), np.arange(1 << 18, dtype=np.float32)
    expected, memory = np.array(x), {"m": np.zeros(4)}
    bump = jax.jit(lambda x: x + 1, donate_argnums=0)
    with Checkpoints(tmp_path) as c:
        c.save(1, {"x": x, "h": host_side}, {}, memory)
        host_side += 1
        memory["m"] += 1
        for _ in range(5):
            x = bump(x)
        _, tree, _, memory = c.restore_latest({"x": expected, "h": host_side})
    np.testing.assert_array_equal(tree["x"], expected)
    np.testing.assert_array_equal(tree["h"], np.arange(1 << 18))
    np.testing.assert_array_equal(memory["m"], np.zeros(4))


def test_the_last_and_the_best_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2, keep_best=True) as c:
        for step, score in enumerate([0.1, 0.9, None, 0.5, 0.4]):
            c.save(step, {"x": jnp.ones(2)}, {}, {}, score=score)
    with Checkpoints(tmp_path, keep=2, keep_best=True) as c:
        assert c.steps() == [1, 3, 4]
        c.save(5, {"x": jnp.ones(2)}, {}, {}, score=0.2)
        c.wait()
        assert c.steps() == [1, 4, 5]


def test_a_step_is_saved_once(tmp_path):
    with Checkpoints(tmp_path) as c:
        assert c.save(1, {"x": jnp.ones(2)}, {}, {})
        assert not c.save(1, {"x": jnp.zeros(2)}, {}, {})
        assert c.restore_latest({"x": jnp.zeros(2)})[1]["x"].tolist() == [1, 1]


def test_an_empty_directory_restores_nothing(tmp_path):
    with Checkpoints(tmp_path) as c:
        assert c.restore_latest({"x": jnp.zeros(2)}) is None


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "cut":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)


def largest(directory):
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("how", ["cut", "flip", "host", "gone"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path, how):
    noise = jax.random.normal(jax.random.key(0), (1000,))
    with Checkpoints(tmp_path) as c:
        for step in (1, 2):
            c.save(step, {"x": noise * step}, {"step": step}, {})
    if how == "host":
        damage(tmp_path / "2" / "host" / "process_0.npz", "flip")
    elif how == "gone":
        (tmp_path / "2" / "host" / "process_0.npz").unlink()
    else:
        damage(largest(tmp_path / "2" / "arrays"), how)
    with Checkpoints(tmp_path) as c:
        with pytest.warns(UserWarning, match=r"2 is damaged .* going on from step 1"):
            step, tree, host, _ = c.restore_latest({"x": noise})
        assert (step, host["step"]) == (1, 1)
        np.testing.assert_array_equal(tree["x"], noise)
        assert c.save(2, {"x": noise}, {"step": 2}, {}, wait=True)
        assert c.steps() == [1, 2]
    assert (tmp_path / "damaged_2.0").is_dir()


def test_only_damaged_checkpoints_are_an_error_and_not_a_fresh_start(tmp_path):
    with Checkpoints(tmp_path) as c:
        c.save(4, {"x": jnp.ones(1000)}, {}, {})
    damage(tmp_path / "4" / "host" / "process_0.npz", "cut")
    with Checkpoints(tmp_path) as c, pytest.raises(CheckpointError, match=r"no checkpoint in .* step 4"):
        c.restore_latest({"x": jnp.ones(1000)})


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"x": jnp.ones(3)}, r"x is float32\[2\], expected float32\[3\]"),
        ({"x": jnp.ones(2, jnp.bfloat16)}, r"x is float32\[2\], expected bfloat16\[2\]"),
        ({"y": jnp.ones(2)}, "has no array y"),
        ({}, "has an unexpected array x"),
    ],
)
def test_another_tree_is_refused_by_name(tmp_path, target, message):
    with Checkpoints(tmp_path) as c:
        c.save(1, {"x": jnp.ones(2)}, {}, {})
        with pytest.raises(Mismatch, match=message):
            c.restore_latest(target)


def run_saver(directory, body, **env):
    code = f"""
        import jax, jax.numpy as jnp, os, resource, signal, sys, time
        from pathlib import Path
        from jaxrl_llm.training.checkpoints import Checkpoints, CheckpointError
        directory = Path({str(directory)!r})
        checkpoints = Checkpoints(directory)
        x = jax.random.normal(jax.random.key(0), (1 << 20,))
    """
    code = textwrap.dedent(code) + textwrap.dedent(body)
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **env},
    )


def test_a_save_killed_midway_leaves_the_checkpoint_before_it(tmp_path):
    saver = run_saver(
        tmp_path,
        """
        checkpoints.save(0, {"x": x}, {"step": 0}, {}, wait=True)
        print("first", flush=True)
        for step in range(1, 10_000):
            checkpoints.save(step, {"x": x + step}, {"step": step}, {})
        """,
    )
    assert saver.stdout.readline() == "first\n"
    deadline = time.monotonic() + 60
    while not any("tmp" in p.name for p in tmp_path.iterdir()) and time.monotonic() < deadline:
        pass  # a save is under way as soon as its temporary directory is there
    os.kill(saver.pid, signal.SIGKILL)
    saver.communicate()
    first = jax.random.normal(jax.random.key(0), (1 << 20,))
    with Checkpoints(tmp_path) as c:
        step, tree, host, _ = c.restore_latest({"x": first})
        assert not any("tmp" in p.name for p in tmp_path.iterdir())
    assert host["step"] == step
    np.testing.assert_array_equal(tree["x"], first + step)


def test_of_many_damaged_arrays_only_the_warning_is_heard(tmp_path):
    """Orbax starts all reads, and gives up at the first that fails."""
    reader = run_saver(
        tmp_path,
        """
        tree = {f"x{i}": x[: 10_000 + i] for i in range(60)}
        for step in (1, 2):
            checkpoints.save(step, tree, {}, {}, wait=True)
        # The file with the arrays' bytes; where they are is in smaller ones.
        file = max((directory / "2" / "arrays").rglob("d/*"), key=lambda file: file.stat().st_size)
        file.write_bytes(file.read_bytes()[:1000])
        print(checkpoints.restore_latest(tree)[0])
        """,
    )
    said, errors = reader.communicate(timeout=120)
    assert said == "1\n", errors
    assert "2 is damaged (OUT_OF_RANGE" in errors and len(errors.splitlines()) == 1, errors


def test_a_full_disk_is_one_line_and_leaves_the_last_good_checkpoint(tmp_path):
    saver = run_saver(
        tmp_path,
        """
        checkpoints.save(1, {"x": x}, {}, {}, wait=True)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
        try:
            checkpoints.save(2, {"x": x + 1}, {}, {}, wait=True)
        except CheckpointError as e:
            print(e)
        try:
            checkpoints.close()
        except CheckpointError:
            pass
        """,
    )
    said, errors = saver.communicate(timeout=120)
    assert saver.returncode == 0, errors
    assert said.count("\n") == 1
    assert "could not write" in said
    assert "the last good checkpoint is step 1" in said
    with Checkpoints(tmp_path) as c:
        assert c.restore_latest({"x": jnp.zeros(1 << 20)})[0] == 1


def test_a_place_that_cannot_hold_checkpoints_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot use .*file/checkpoints") as e:
        Checkpoints(tmp_path / "file" / "checkpoints")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("value", "path"),
    [({"a": {1: 2}}, ".a"), ({"a": (1, 2)}, ".a"), ({"a": [object()]}, r"a\[0\]"), ({"a": np.array([None])}, ".a")],
)
def test_host_state_that_would_not_come_back_is_refused(value, path):
    with pytest.raises(TypeError, match=path):
        encode(value)


def test_leaves_that_are_no_arrays_are_refused(tmp_path):
    with Checkpoints(tmp_path) as c, pytest.raises(TypeError, match="leaf n is a int"):
        c.save(1, {"n": 1}, {}, {})


def test_host_state_keeps_dtypes_numpy_does_not_know():
    x = np.asarray(jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3))
    back = decode(encode({"x": x, "s": np.float64(0.1)}))
    assert back["x"].dtype == x.dtype
    np.testing.assert_array_equal(back["x"], x)
    assert back["s"] == 0.1
