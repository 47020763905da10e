"""The host's part of a checkpoint: JSON values and numpy arrays in one .npz, written inside orbax's atomic step.

It is the same on all processes: the first writes it, and any number of them may read it.

No pickle; the zip format checks its own contents (CRC-32).
"""

import io
import json
import zipfile
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.future import CommitFutureAwaitingContractedSignals

from jaxrl_llm.sharding import processes

FILE = "process_0.npz"
_ARRAY, _JSON = "__array__", "json"


def encode(tree: Any) -> bytes:
    """Nested dicts and lists of JSON values and numpy arrays as the bytes of an .npz file.

    Raises TypeError, with the path, for a value that would not come back as it is (a key that is no string, a tuple, an
    object).
    """
    arrays: dict[str, np.ndarray] = {}

    def one(x: Any, path: str) -> Any:
        if isinstance(x, dict):
            for key in x:
                if not isinstance(key, str) or key == _ARRAY:
                    raise TypeError(f"host state {path or '.'}: key {key!r} is no plain string")
            return {k: one(v, f"{path}.{k}") for k, v in x.items()}
        if isinstance(x, list):
            return [one(v, f"{path}[{i}]") for i, v in enumerate(x)]
        if x is None or type(x) in (bool, int, float, str):
            return x
        if isinstance(x, np.ndarray | np.generic) and x.dtype != object:
            name = f"a{len(arrays)}"
            x = np.asarray(x)
            plain = x.dtype.kind in "biufcSU"  # numpy's own; others (bfloat16) are stored as bytes
            arrays[name] = x if plain else np.frombuffer(x.tobytes(), np.uint8)
            return {_ARRAY: name} if plain else {_ARRAY: name, "dtype": x.dtype.name, "shape": list(x.shape)}
        raise TypeError(f"host state {path or '.'}: a {type(x).__name__} cannot be saved")

    text = json.dumps(one(tree, ""))
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **{_JSON: np.frombuffer(text.encode(), np.uint8)}, **arrays)
    return buffer.getvalue()


def decode(content: bytes) -> Any:
    """The inverse of `encode`. Raises ValueError or zipfile.BadZipFile when the bytes are damaged."""
    with np.load(io.BytesIO(content), allow_pickle=False) as file:

        def one(x: Any) -> Any:
            if isinstance(x, list):
                return [one(v) for v in x]
            if not isinstance(x, dict):
                return x
            if _ARRAY not in x:
                return {k: one(v) for k, v in x.items()}
            array = _member(file, x[_ARRAY])
            if "dtype" not in x:
                return array
            return np.frombuffer(array.tobytes(), jnp.dtype(x["dtype"])).reshape(x["shape"]).copy()

        return one(json.loads(_member(file, _JSON).tobytes()))


def values(directory: epath.Path) -> Any:
    """The JSON part of what is in `directory`, without reading the arrays. Raises as `decode` and `open` do."""
    with (directory / FILE).open("rb") as content, np.load(content, allow_pickle=False) as file:
        return json.loads(_member(file, _JSON).tobytes())


def _member(file: Any, name: str) -> np.ndarray:
    """An array of an .npz file, which hands out what is no array as bytes."""
    if name not in file or not isinstance(array := file[name], np.ndarray):
        raise ValueError(f"the host state is damaged: no array {name!r}")
    return array


class Handler(ocp.AsyncCheckpointHandler):
    """Writes the first process's bytes inside orbax's atomic directory."""

    async def async_save(self, directory: epath.Path, args: "Save") -> list[Any]:
        async def write() -> None:
            self.save(directory, args)

        return [CommitFutureAwaitingContractedSignals(write(), name="host_state")]

    def save(self, directory: epath.Path, args: "Save") -> None:
        if processes.lead():
            (directory / FILE).write_bytes(args.content)

    def restore(self, directory: epath.Path, args: "Restore | None" = None) -> bytes:
        return read(directory)


def read(directory: epath.PathLike) -> bytes:
    """What `Handler` wrote. Raises ValueError or zipfile.BadZipFile when it is damaged, OSError when it is not there."""
    content = (epath.Path(directory) / FILE).read_bytes()
    if zipfile.ZipFile(io.BytesIO(content)).testzip() is not None:
        raise ValueError("the host state is damaged")
    return content


@ocp.args.register_with_handler(Handler, for_save=True)
@dataclass
class Save(ocp.args.CheckpointArgs):
    content: bytes


@ocp.args.register_with_handler(Handler, for_restore=True)
@dataclass
class Restore(ocp.args.CheckpointArgs):
    pass
