"""Whole-run checkpoints with orbax, on disk or in object storage: a step is either whole there or absent.

A checkpoint holds a pytree of device arrays (parameters, optimizer states, algorithm state) and the host's part (JSON
values and nested dicts of numpy arrays). The arrays are stored by the name of their path in the tree, with shape, dtype
and a fingerprint that does not depend on how they are sharded, so damage is noticed, and another mesh or another number
of processes can read them. All processes save and restore together, in a directory that all of them see.

On disk a step is whole when it has its name, which a rename gives it. In object storage nothing can be renamed at once: orbax
writes under the last name, and a step is one when the object `commit_success.txt`, which is written last, is there.
"""

import asyncio
import contextlib
import os
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import Array, UInt32
from orbax.checkpoint.options import AsyncOptions

from jaxrl_llm.sharding import processes
from jaxrl_llm.training import host_state
from jaxrl_llm.training.places import place, remote, unreachable
from jaxrl_llm.types import Memory

Tree = Any


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message is one line."""


class Mismatch(ValueError):
    """The checkpoint is whole but belongs to another model, optimizer or method."""


class Checkpoints:
    """Checkpoints of one run in `directory`, written in the background.

    Args:
      directory: where steps are kept (`places.place`), and nothing else; created when missing. Only one run may use it at a
        time: leftovers of interrupted saves are removed here.
      keep: how many of the latest steps to keep.
      keep_best: keep the step with the highest `score` as well.
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int = 2, keep_best: bool = False):
        self.directory = place(directory)
        self._retention = Retention(keep, keep_best, {})
        # Orbax's own barrier would wait for processes that have said that they failed.
        barrier = AsyncOptions(barrier_sync_fn=processes.meet) if processes.count() > 1 else None
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._retention, cleanup_tmp_directories=True, async_options=barrier
        )
        with self._reporting("cannot use"):
            self._manager = ocp.CheckpointManager(self.directory, options=options)
            for step in self.steps():
                self._retention.scores[step] = self._score(step)

    def steps(self) -> list[int]:
        """Steps that are whole on disk, ascending, as this process sees it."""
        return sorted(self._manager.all_steps())

    def empty(self) -> bool:
        """Whether there is no step to go on from; all processes get the same answer."""
        return not self._agreed_steps()

    def save(
        self,
        step: int,
        tree: Tree,
        host: dict[str, Any],
        memory: Memory,
        score: float | None = None,
        wait: bool = False,
    ) -> bool:
        """Save everything of `step`; returns as soon as the caller may change or donate what it passed.

        Args:
          tree: pytree whose leaves are jax arrays (typed random keys too) or numpy arrays (parameters kept on the host).
          host: JSON values (string keys).
          memory: nested dict with string keys of numpy arrays and JSON values.
          score: what `keep_best` compares.
          wait: return only when the step is whole on disk.
        Returns: False when that step exists already and nothing was written.
        Raises CheckpointError when the disk refuses; earlier steps stay whole.
        """
        self.wait()
        if step in self._manager.all_steps():
            return False
        arrays = {name: _shared(x) for name, x in named_leaves(tree).items()}
        score = None if score is None else float(score)
        content = host_state.encode({"leaves": _manifest(arrays), "host": host, "memory": memory, "score": score})
        stored = {name: x for name, x in arrays.items() if x.size} or {"empty": jnp.zeros(1)}
        self._retention.scores[step] = score
        with self._reporting(f"could not write step {step} in"):
            self._manager.save(
                step,
                args=ocp.args.Composite(arrays=ocp.args.PyTreeSave(stored), host=host_state.Save(content)),
                force=True,
            )
        if wait:
            self.wait()
        return True

    def restore_latest(self, abstract_tree: Tree) -> tuple[int, Tree, dict[str, Any], Memory] | None:
        """The newest step that can be read, or None when there is none.

        Args:
          abstract_tree: like the saved tree, of `jax.ShapeDtypeStruct` with shardings, or of arrays. Any mesh will do;
            numpy leaves come back as numpy.
        A damaged step gives a warning, is moved aside, and the one before it is tried. Raises CheckpointError when
        steps exist but none is whole, ValueError when the saved tree has other leaves than `abstract_tree`.
        """
        self.wait()
        steps = self._agreed_steps()[::-1]
        reasons = []
        for step in steps:
            found, reason = self._try(step, abstract_tree)
            if found is None:
                reasons.append(reason)
            else:
                for damaged, reason in zip(steps, reasons):
                    warnings.warn(
                        f"checkpoint {self.directory / str(damaged)} is damaged ({reason}); going on from step {step}",
                        stacklevel=2,
                    )
                    self._set_aside(damaged)
                return found
        if reasons:
            raise CheckpointError(f"no checkpoint in {self.directory} can be read; step {steps[0]}: {reasons[0]}")
        return None

    def wait(self) -> None:
        """Block until the save under way is whole on disk. Raises CheckpointError when it failed."""
        with self._reporting("could not write to"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish the save under way and release the threads. Raises CheckpointError when that save failed."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):
                self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        if error is None or processes.count() == 1:  # a save under way waits for processes that may be gone
            self.close()

    def _agreed_steps(self) -> list[int]:
        return processes.from_lead(self.steps, f"the steps in {self.directory}")

    def _try(self, step: int, abstract_tree: Tree) -> tuple[tuple[int, Tree, dict[str, Any], Memory] | None, str]:
        """What step `step` holds, or None and the reason; None on all processes when one of them cannot read it."""
        named = dict(zip(_names(abstract_tree), jax.tree.leaves(abstract_tree)))
        read, reason = None, ""
        try:
            read = self._read(step, named)
        except Mismatch:
            raise
        except Exception as e:  # whatever a damaged file makes orbax, tensorstore or zipfile raise
            if remote(self.directory) and unreachable(e):
                raise CheckpointError(
                    f"checkpoints: could not read step {step} in {self.directory}: {_one_line(e)}"
                ) from e
            reason = _one_line(e.__cause__ or e)  # orbax's own says which part of the array, not what is wrong
        reason = next(filter(None, processes.gather(reason, f"reading the checkpoint of step {step}")), "")
        if read is None or reason:
            return None, reason
        content, arrays = read
        for name, mark in _fingerprints(arrays).items():
            if mark != content["leaves"][name]["fingerprint"]:
                return None, f"the contents of {name} changed on disk"
        leaves = [_like(arrays[name], x) for name, x in named.items()]
        tree = jax.tree.unflatten(jax.tree.structure(abstract_tree), leaves)
        return (step, tree, content["host"], content["memory"]), ""

    def _read(self, step: int, named: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The host's part and the arrays of a step. Reads files only: one process may fail and the others not."""
        where = self.directory / str(step)
        content = host_state.decode(host_state.read(where / "host"))
        manifest = content["leaves"]
        _check_leaves(manifest, named, where)
        abstract = {name: _abstract(x) for name, x in named.items()}
        stored = {name: x for name, x in abstract.items() if x.size} or {"empty": jax.ShapeDtypeStruct((1,), "float32")}
        restore_args = ocp.checkpoint_utils.construct_restore_args(stored)
        with _reads_ended():
            restored = ocp.PyTreeCheckpointHandler().restore(
                where / "arrays", args=ocp.args.PyTreeRestore(stored, restore_args=restore_args)
            )
        return content, {name: restored[name] if x.size else _empty(x) for name, x in abstract.items()}

    def _score(self, step: int) -> float | None:
        try:
            return host_state.values(self.directory / str(step) / "host")["score"]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return None  # damaged; restoring will say so

    def _set_aside(self, step: int) -> None:
        def move() -> None:
            before = len(list(self.directory.glob(f"damaged_{step}.*")))
            with self._reporting(f"could not set step {step} aside in"):  # what is cut short, the next start does again
                (self.directory / str(step)).rename(self.directory / f"damaged_{step}.{before}")

        processes.from_lead(move, f"moving step {step} aside")
        self._manager.reload()

    @contextlib.contextmanager
    def _reporting(self, what: str):
        try:
            yield
        except (TypeError, CheckpointError):
            raise
        except Exception as error:
            e = _cause(error)
            whole = self.steps() if hasattr(self, "_manager") else []
            last = f"the last good checkpoint is step {whole[-1]}" if whole else "there is no good checkpoint yet"
            raise CheckpointError(f"checkpoints: {what} {self.directory}: {_one_line(e)}; {last}") from e


@dataclass
class Retention:
    """Which steps stay (orbax's preservation policy): the latest, and the one with the highest score."""

    keep: int
    keep_best: bool
    scores: dict[int, float | None]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [c.step for c in checkpoints]
        scored = {step: score for step in steps if (score := self.scores.get(step)) is not None}
        best = {max(scored, key=lambda step: scored[step])} if scored and self.keep_best else set()
        return [step in steps[-self.keep :] or step in best for step in steps]


def named_leaves(tree: Tree) -> dict[str, Array]:
    """Leaves of a tree by the name of their path; typed random keys as their data. Raises TypeError for other leaves."""
    named = dict(zip(_names(tree), jax.tree.leaves(tree)))
    for name, x in named.items():
        if not isinstance(x, jax.Array | np.ndarray):
            raise TypeError(f"checkpoint leaf {name} is a {type(x).__name__}, expected a jax or numpy array")
    return {name: jax.random.key_data(x) if _is_key(x) else x for name, x in named.items()}


def _names(tree: Tree) -> list[str]:
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    names = [jax.tree_util.keystr(path, simple=True, separator=".") or "tree" for path in paths]
    if len(set(names)) != len(names):
        raise ValueError("two leaves of the checkpointed tree have the same path name")
    return names


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _empty(x: Any) -> Array | np.ndarray:
    return x if isinstance(x, np.ndarray) else processes.put(np.zeros(x.shape, x.dtype), x.sharding)


def _shared(x: Array | np.ndarray) -> Array | np.ndarray:
    """What all processes hold alike is saved as the host's, where there are several."""
    return np.asarray(x) if processes.count() > 1 and isinstance(x, Array) and x.is_fully_addressable else x


def _free(x: Any) -> bool:
    """Whether a target says nothing about the devices its value is to be on."""
    return getattr(x, "sharding", None) is None or not getattr(x, "committed", True)


def _abstract(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return x
    data = jax.ShapeDtypeStruct(x.shape, x.dtype)
    data = jax.eval_shape(jax.random.key_data, data) if _is_key(x) else data
    if processes.count() > 1 and _free(x):
        return np.empty(data.shape, data.dtype)
    sharding = getattr(x, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)


def _like(restored: Array | np.ndarray, target: Any) -> Array | np.ndarray:
    """Restored data as a leaf like `target`: numpy, a random key, or an array free to move, when that is."""
    if isinstance(target, np.ndarray):
        return np.asarray(restored)
    array = jnp.asarray(np.asarray(restored) if _free(target) else restored)
    return jax.random.wrap_key_data(array, dtype=target.dtype) if _is_key(target) else array


def _manifest(arrays: Mapping[str, Array | np.ndarray]) -> dict[str, Any]:
    marks = _fingerprints(arrays)
    return {
        name: {"shape": list(x.shape), "dtype": x.dtype.name, "fingerprint": marks[name]} for name, x in arrays.items()
    }


def _check_leaves(manifest: dict[str, Any], named: dict[str, Any], where: epath.Path) -> None:
    for name in [*named, *manifest]:
        if name not in manifest or name not in named:
            side = "has no" if name not in manifest else "has an unexpected"
            raise Mismatch(f"checkpoint {where} {side} array {name}: it is of another model, optimizer or method")
        saved, want = manifest[name], _abstract(named[name])
        if (tuple(saved["shape"]), saved["dtype"]) != (want.shape, want.dtype.name):
            raise Mismatch(
                f"checkpoint {where}: {name} is {saved['dtype']}{saved['shape']}, "
                f"expected {want.dtype.name}{list(want.shape)}"
            )


def _fingerprints(arrays: Mapping[str, Any]) -> dict[str, int]:
    marks = {name: int(_fingerprint(x, np)) for name, x in arrays.items() if isinstance(x, np.ndarray)}
    groups: dict[Any, list[str]] = {}  # one program per set of devices; offloaded arrays visit their device
    for name, x in arrays.items():
        if name not in marks:
            groups.setdefault(frozenset(x.sharding.device_set), []).append(name)
    for names in groups.values():
        on_device = [_on_device(arrays[name]) for name in names]
        marks.update(zip(names, np.asarray(_device_fingerprints(on_device)).tolist()))
    return marks


@jax.jit
def _device_fingerprints(arrays: list[Array]) -> UInt32[Array, "n"]:
    return jnp.stack([_fingerprint(x, jnp) for x in arrays])


def _fingerprint(x: Any, xp: Any) -> Any:
    """Sum modulo 2^32 of the bits, each word times an odd number of its place: any one changed word changes the sum.

    Integer sums don't depend on their order, so every sharding, and numpy (`xp`), gives the same number.
    """
    word = f"uint{8 * min(x.dtype.itemsize, 4)}"
    if xp is np:
        wide = x.dtype.itemsize > 4
        bits = np.ascontiguousarray(x).reshape(x.shape + (1,) * wide).view(word).astype(np.uint32)
    elif jnp.issubdtype(x.dtype, jnp.bool_):
        bits = x.astype(jnp.uint32)
    else:
        bits = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
    place = xp.zeros(bits.shape, xp.uint32)
    for axis, size in enumerate(bits.shape):
        along = [1] * bits.ndim
        along[axis] = size
        place = place * xp.uint32(1000003) + xp.arange(size, dtype=xp.uint32).reshape(along)
    return xp.sum(bits * (xp.uint32(2) * place + xp.uint32(1)), dtype=xp.uint32)


def _on_device(x: Array) -> Array:
    offloaded = x.sharding.memory_kind not in (None, "device")
    return jax.device_put(x, x.sharding.with_memory_kind("device")) if offloaded else x


class _Loop(asyncio.SelectorEventLoop):
    """Ends what runs in it before it closes."""

    def close(self) -> None:
        while left := not self.is_closed() and asyncio.all_tasks(self):
            self.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        super().close()


class _Loops(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return _Loop()


@contextlib.contextmanager
def _reads_ended():
    """Orbax leaves its loop when a read fails; each of the others would then print a page of traces, at any later time."""
    before = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(_Loops())
    try:
        yield
    finally:
        asyncio.set_event_loop_policy(before)


def _cause(error: BaseException) -> BaseException:
    """The error of this process that one of another process followed, as orbax then waits for the others; else itself.

    Raises the error when it is only that of another process.
    """
    other = (processes.LostProcessError, jax.errors.JaxRuntimeError)
    e: BaseException | None = error
    while e is not None and isinstance(e, other):
        e = e.__context__
    if e is None and isinstance(error, processes.LostProcessError):
        raise error
    return e or error


def _one_line(e: BaseException) -> str:
    text = " ".join(str(e).split()) or type(e).__name__
    return text if len(text) <= 300 else text[:297] + "..."
