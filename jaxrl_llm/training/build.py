"""From a config to the parts of a run: tokenizer, task, mesh, model, engine. Shared by train, eval and sample."""

from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxrl_llm.algorithms.base import SamplerHook
from jaxrl_llm.compile_cache import quickly
from jaxrl_llm.config import Config
from jaxrl_llm.models import decoder, hf
from jaxrl_llm.models.spec import ModelSpec, from_hf
from jaxrl_llm.rollout.engine import Engine
from jaxrl_llm.sharding import mesh as meshes
from jaxrl_llm.sharding import processes, rules, target
from jaxrl_llm.tasks.text import Text, load_text
from jaxrl_llm.types import Params


class Model(NamedTuple):
    spec: ModelSpec
    params: Params


def text(config: Config) -> Text:
    """The tokenizer of the run; raises ValueError in one line when none is named."""
    return load_text(config.tokenizer, config.model.path)


def mesh(config: Config) -> Mesh:
    """The mesh of the run, its devices connected."""
    made = meshes.make_mesh(config.mesh)
    processes.connect(made)
    return made


def model(config: Config, on: Mesh, words: Text) -> Model:
    """Load `model.path`, or build `model.spec` with random weights from `run.seed`, straight into its sharding."""
    dtype = jnp.dtype(config.model.param_dtype)
    if config.model.path:
        spec, params = hf.load(config.model.path, mesh=on, dtype=dtype)
        if words.vocab > spec.vocab:
            raise ValueError(f"tokenizer.path: {words.vocab} tokens, but the model's embedding has {spec.vocab}")
        return Model(spec, params)
    own = {"vocab_size": words.vocab, "eos_token_id": list(words.eos_ids), "pad_token_id": words.pad_id}
    keys = {**own, **(config.model.spec or {})}
    spec = from_hf(keys)
    shapes = decoder.abstract(spec, dtype)
    layout = rules.shardings(decoder.logical_axes(spec), shapes, on)
    init = jax.jit(
        lambda key: decoder.init(spec, key, dtype),
        out_shardings=layout,
        compiler_options=quickly(target.of(on).platform),
    )
    # Threefry would take three times as long to compile, most of the time to a first update.
    return Model(spec, init(jax.random.key(config.run.seed, impl="rbg")))


def guide(config: Config, spec: ModelSpec, on: Mesh) -> Params | None:
    """The frozen model of `guide.path`; raises ValueError when it is not built like the policy."""
    if config.guide is None:
        return None
    found = hf.load_spec(config.guide.path)
    names = {f.name for f in fields(spec)} - {"eos_ids", "bos_id", "pad_id"}  # scoring ends where the completion does
    if odd := sorted(name for name in names if getattr(found, name) != getattr(spec, name)):
        raise ValueError(
            f"guide.path={config.guide.path!r}: {', '.join(odd)} differ from the policy's, expected a model built like it"
        )
    return hf.load(config.guide.path, mesh=on, dtype=jnp.dtype(config.model.param_dtype))[1]


def engine(
    config: Config, spec: ModelSpec, on: Mesh, words: Text, *, hook: SamplerHook | None = None, **changed: Any
) -> Engine:
    """A rollout engine with the config's sampling settings; `changed` replaces some (evaluation, other lengths)."""
    r = config.rollout
    dtype = config.model.dtype if r.dtype == "same" else r.dtype
    settings: dict[str, Any] = {
        "max_prompt": r.max_prompt,
        "max_new": r.max_new,
        "slots": r.slots,
        "temperature": r.temperature,
        "top_k": r.top_k,
        "top_p": r.top_p,
        "min_p": r.min_p,
        "batch_invariant": r.batch_invariant,
        **changed,
    }
    return Engine(
        spec,
        on,
        eos_ids=words.eos_ids,
        stop_strings=r.stop,
        pieces=words.token_bytes() if r.stop else None,
        dtype=jnp.dtype(dtype),
        hook=hook,
        **settings,
    )


def export(directory: Path, spec: ModelSpec, params: Params, words: Text) -> None:
    """Write a Hugging Face directory with the tokenizer beside the weights. All processes take part, the first writes."""
    hf.save(directory, spec, params)
    processes.from_lead(lambda: words.save(directory), f"the tokenizer in {directory}")
