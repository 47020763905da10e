"""Hugging Face model directories, in and out: config.json, generation_config.json and safetensors.

A table maps each tensor on disk to a place in the parameter tree. A tensor is reshaped, then its axes permuted, so import
and export are exact inverses and copy bits. Loading reads only the slices a device needs, one tensor at a time.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding, SingleDeviceSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxrl_llm.models import decoder
from jaxrl_llm.models.spec import ModelSpec, eos_ids, from_hf, to_hf
from jaxrl_llm.sharding import processes
from jaxrl_llm.sharding.rules import shardings
from jaxrl_llm.types import Params

CONFIG, GENERATION, WEIGHTS = "config.json", "generation_config.json", "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
IGNORED = re.compile(r"rotary_emb\.inv_freq$")  # recomputed from config.json
FLOATS = ("F64", "F32", "F16", "BF16")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


class Tensor(NamedTuple):
    """Where a tensor of the file lives in the parameter tree, and how.

    `at` are the indices of the leading axes on which tensors are stacked: the layer among those that have such a tensor, and
    the expert. `shape` is the shape on disk with the head axes split; `axes` permutes it to ours. `split` is the disk axis
    that the two head axes make, or None.
    """

    name: str
    path: tuple[str, ...]
    at: tuple[int, ...]
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    split: int | None = None

    @property
    def disk_shape(self) -> tuple[int, ...]:
        if (i := self.split) is None:
            return self.shape
        return (*self.shape[:i], self.shape[i] * self.shape[i + 1], *self.shape[i + 2 :])


def tensors(spec: ModelSpec) -> Iterator[Tensor]:
    """Every tensor of a checkpoint of this spec."""
    v, d, h, k, hd, f = spec.vocab, spec.embed, spec.heads, spec.kv_heads, spec.head_dim, spec.mlp
    yield Tensor("model.embed_tokens.weight", ("embed",), (), (v, d), (0, 1))
    yield Tensor("model.norm.weight", ("norm",), (), (d,), (0,))
    if not spec.tied:
        yield Tensor("lm_head.weight", ("unembed",), (), (v, d), (1, 0))
    for i, sparse in enumerate(spec.sparse):
        alike = spec.sparse[:i].count(sparse)  # earlier layers with the same kind of MLP

        def one(name: str, ours: str, *rest: Any, i: int = i) -> Tensor:
            return Tensor(f"model.layers.{i}.{name}", ("layers", ours), (i,), *rest)

        yield one("input_layernorm.weight", "attn_norm", (d,), (0,))
        yield one("post_attention_layernorm.weight", "mlp_norm", (d,), (0,))
        for x, heads in (("q", h), ("k", k), ("v", k)):
            yield one(f"self_attn.{x}_proj.weight", x, (heads, hd, d), (2, 0, 1), 0)
            if spec.qkv_bias:
                yield one(f"self_attn.{x}_proj.bias", f"{x}_bias", (heads, hd), (0, 1), 0)
        yield one("self_attn.o_proj.weight", "o", (d, h, hd), (1, 2, 0), 1)
        if spec.o_bias:
            yield one("self_attn.o_proj.bias", "o_bias", (d,), (0,))
        if spec.qk_norm:
            yield one("self_attn.q_norm.weight", "q_norm", (hd,), (0,))
            yield one("self_attn.k_norm.weight", "k_norm", (hd,), (0,))
        mlp, path = f"model.layers.{i}.mlp", ("layers", "experts")
        if not sparse:
            yield from _mlp(mlp, ("layers",), (alike,), d, f)
        elif spec.experts:
            yield Tensor(f"{mlp}.gate.weight", (*path, "router"), (alike,), (spec.experts.count, d), (1, 0))
            for e in range(spec.experts.count):
                yield from _mlp(f"{mlp}.experts.{e}", path, (alike, e), d, spec.experts.mlp)


def _mlp(name: str, path: tuple[str, ...], at: tuple[int, ...], embed: int, width: int) -> Iterator[Tensor]:
    """The three matrices of a gated MLP."""
    for ours in ("gate", "up"):
        yield Tensor(f"{name}.{ours}_proj.weight", (*path, ours), at, (width, embed), (1, 0))
    yield Tensor(f"{name}.down_proj.weight", (*path, "down"), at, (embed, width), (1, 0))


def load_spec(path: str | Path) -> ModelSpec:
    """The spec of a directory; the end-of-sequence ids of generation_config.json win over those of config.json."""
    spec = from_hf(_read_json(Path(path) / CONFIG))
    generation = Path(path) / GENERATION
    if generation.exists() and (ids := eos_ids(_read_json(generation).get("eos_token_id"))):
        spec = replace(spec, eos_ids=ids)
    return spec


def load(path: str | Path, *, mesh: Mesh | None = None, dtype: Any = jnp.float32) -> tuple[ModelSpec, Params]:
    """Spec and parameters of a directory, converted to `dtype` and, with a mesh, created in their shards.

    Raises:
      ValueError: no such directory or files, a spec that is not supported, or tensors that are missing, unexpected, of
        another shape than config.json says, or not floating point.
    """
    spec = load_spec(path)
    shapes = decoder.abstract(spec, dtype)
    if mesh is None:
        target = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), shapes)
    else:
        target = shardings(decoder.logical_axes(spec), shapes, mesh)
    table = list(tensors(spec))
    with _Files(Path(path)) as files:
        files.check(table)
        leaves: dict[tuple[str, ...], list[Tensor]] = {}
        for t in table:
            leaves.setdefault(t.path, []).append(t)
        params: Params = {}
        for where, parts in leaves.items():
            node, sharding, shape = params, target, shapes
            for key in where:
                sharding, shape = sharding[key], shape[key]
            for key in where[:-1]:
                node = node.setdefault(key, {})
            node[where[-1]] = _assemble(parts, shape, sharding, files.read)
    return spec, params


def save(path: str | Path, spec: ModelSpec, params: Params, tokenizer_dir: str | Path | None = None) -> None:
    """Write a directory that `transformers` and `load` read: the exact inverse of `load`, in the dtype of `params`.

    Of several processes all take part, and the first writes. Files of at most 5 GB, with an index when there are several;
    tokenizer files are copied from `tokenizer_dir`. An earlier export of the same model is replaced.

    Raises:
      ValueError: the directory holds weights in files of other names.
    """
    path = Path(path)
    dtype = jax.tree.leaves(params)[0].dtype
    files: list[list[Tensor]] = [[]]
    total, room = 0, SHARD_BYTES
    for t in tensors(spec):
        size = int(np.prod(t.shape)) * dtype.itemsize
        if size > room and files[-1]:
            files.append([])
            room = SHARD_BYTES
        files[-1].append(t)
        room -= size
        total += size
    if len(files) == 1:
        names = [WEIGHTS]
    else:
        names = [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]

    lead = processes.lead()
    if lead:
        path.mkdir(parents=True, exist_ok=True)
        if others := {f.name for f in path.glob("*.safetensors*")} - {*names, *([INDEX] if len(files) > 1 else [])}:
            raise ValueError(f"{path}: holds {_some(others)}, expected a directory without other weights")
    for name, group in zip(names, files):
        content = {}
        for t in group:
            x = _to_disk(t, params)
            content |= {t.name: x} if lead else {}
        if lead:
            save_file(content, path / name, metadata={"format": "pt"})
    if not lead:
        return
    if len(files) > 1:
        weight_map = {t.name: name for name, group in zip(names, files) for t in group}
        _write_json(path / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    config = to_hf(spec)
    _write_json(path / CONFIG, {**config, "dtype": dtype.name, "torch_dtype": dtype.name})
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    _write_json(path / GENERATION, {k: config[k] for k in ids if config[k] is not None})
    for name in TOKENIZER_FILES if tokenizer_dir else ():
        if (source := Path(str(tokenizer_dir)) / name).exists() and source.resolve() != (path / name).resolve():
            shutil.copyfile(source, path / name)


class _Files:
    """The safetensors files of a directory, opened on first use."""

    def __init__(self, path: Path):
        self.path = path
        self.open: dict[str, Any] = {}
        if (path / INDEX).exists():
            self.where: dict[str, str] = _read_json(path / INDEX)["weight_map"]
        elif (path / WEIGHTS).exists():
            self.where = dict.fromkeys(self._file(WEIGHTS).keys(), WEIGHTS)
        else:
            raise ValueError(f"{path}: no {WEIGHTS} or {INDEX}, expected a Hugging Face directory with safetensors")

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *_: Any) -> None:
        self.open.clear()

    def _file(self, name: str) -> Any:
        if name not in self.open:
            if Path(name).name != name:
                raise ValueError(f"{self.path}: {INDEX} names {name!r}, expected files beside it")
            if not (self.path / name).exists():
                raise ValueError(f"{self.path}: no {name}, which {INDEX} names")
            try:
                self.open[name] = safe_open(self.path / name, framework="numpy")
            except SafetensorError as error:
                raise ValueError(f"{self.path / name}: damaged, expected a safetensors file: {error}") from None
        return self.open[name]

    def _slice(self, name: str) -> Any:
        return self._file(self.where[name]).get_slice(name)

    def check(self, table: Iterable[Tensor]) -> None:
        """Raise unless the files hold exactly these tensors, of these shapes."""
        expected = {t.name: t for t in table}
        if missing := expected.keys() - self.where.keys():
            raise ValueError(f"{self.path}: {_some(missing)} missing from the weights, expected by {CONFIG}")
        if extra := [n for n in self.where if n not in expected and not IGNORED.search(n)]:
            raise ValueError(f"{self.path}: {_some(extra)} in the weights, not expected by {CONFIG}")
        for name, t in expected.items():
            found = self._slice(name)
            if tuple(found.get_shape()) != t.disk_shape:
                raise ValueError(f"{name}: shape {tuple(found.get_shape())}, {CONFIG} says {t.disk_shape}")
            if found.get_dtype() not in FLOATS:
                raise ValueError(f"{name}: dtype {found.get_dtype()} is not supported, expected {', '.join(FLOATS)}")

    def read(self, t: Tensor, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of tensor `t` in our layout, reading little more than that slice from disk."""
        want = [slice(0, n) for n in t.shape]  # in the order of `t.shape`
        for ours, theirs in enumerate(t.axes):
            want[theirs] = slice(*index[ours].indices(t.shape[theirs]))
        disk, shape = list(want), [s.stop - s.start for s in want]
        if (i := t.split) is not None:  # heads are contiguous on disk: read whole heads, then cut the width
            width = t.shape[i + 1]
            disk[i : i + 2] = [slice(want[i].start * width, want[i].stop * width)]
            shape[i + 1] = width
        x = self._slice(t.name)[tuple(disk)].reshape(shape)
        if i is not None:
            x = x[(slice(None),) * (i + 1) + (want[i + 1],)]
        return x.transpose(t.axes)


def _assemble(
    parts: list[Tensor], shape: Any, sharding: Sharding, read: Callable[[Tensor, tuple[slice, ...]], np.ndarray]
) -> jax.Array:
    """One leaf: a tensor, or a stack of tensors of layers and experts."""
    lead, table = len(parts[0].at), {t.at: t for t in parts}

    def shard(index: Any) -> np.ndarray:
        stacked = [range(n)[chosen] for n, chosen in zip(shape.shape, index[:lead])]
        sizes = [len(range(n)[chosen]) for n, chosen in zip(shape.shape, index)]
        out = np.empty(sizes, shape.dtype)
        for here, at in zip(np.ndindex(*sizes[:lead]), product(*stacked)):
            out[here] = read(table[at], index[lead:])
        return out

    return jax.make_array_from_callback(shape.shape, sharding, shard)


def _to_disk(t: Tensor, params: Params) -> np.ndarray:
    x = params
    for key in t.path:
        x = x[key]
    if t.at:
        rest = x.shape[len(t.at) :]
        x = jax.lax.dynamic_slice(x, (*t.at, *[0] * len(rest)), (*[1] * len(t.at), *rest)).reshape(rest)
    return np.ascontiguousarray(processes.fetch(x).transpose(np.argsort(t.axes))).reshape(t.disk_shape)


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _read_json(path: Path) -> Any:
    if not path.exists():
        raise ValueError(f"{path.parent}: no {path.name}, expected a Hugging Face directory")
    return json.loads(path.read_text())


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
