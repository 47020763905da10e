"""What a training step of a config will do, computed from shapes alone: nothing is compiled, loaded or run."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import algorithms
from jaxrl_llm.algorithms.base import Algorithm
from jaxrl_llm.config import Config, Optimizer
from jaxrl_llm.models import critic, decoder, hf
from jaxrl_llm.models.scorers import CHUNK_ELEMENTS
from jaxrl_llm.models.spec import ModelSpec, from_hf
from jaxrl_llm.rollout.engine import most_slots, prefill_batch, turns
from jaxrl_llm.sharding import rules, target
from jaxrl_llm.sharding.mesh import AXES, shape_over
from jaxrl_llm.sharding.target import Target
from jaxrl_llm.tasks.text import load_text
from jaxrl_llm.training import layouts
from jaxrl_llm.training.layouts import Layout

WEIGHTS, CACHES, PREFILL = "generation: weights", "generation: keys and values", "generation: prefill"
ACTIVATIONS = "learner: activations of a microbatch"


class Step(NamedTuple):
    """Numbers of one training step."""

    on: Target
    spec: ModelSpec
    alg: Algorithm
    mesh: dict[str, int]
    group_size: int
    rows: int  # prompts × group_size
    minibatch_rows: int
    layout: Layout
    microbatches: int  # of a minibatch
    route: str  # "fused" or "joint"
    parameters: dict[str, int]  # by label of the trainable
    memory: dict[str, int]  # bytes of one device, by what they hold


def describe(config: Config, devices: int | None = None) -> str:
    """The text `jaxrl_llm plan` prints. `devices`: plan for this many instead of those present."""
    p = make(config, jax.device_count() if devices is None else devices)
    r, l, needs = config.rollout, config.learner, p.alg.needs
    rescored = [*needs.rescore, *(["old_logp"] if l.old_logp == "rescore" else [])]
    lines = [
        ("run", f"{config.run.dir}: {config.run.steps} steps, seed {config.run.seed}"),
        (
            "model",
            f"{p.spec.family}, {p.spec.layers} layers of width {p.spec.embed}, vocabulary {p.spec.vocab}, context "
            f"{p.spec.max_positions}; {config.model.dtype} compute, {config.model.param_dtype} parameters",
        ),
        ("parameters", ", ".join(f"{label} {_count(n)}" for label, n in p.parameters.items())),
        ("mesh", " × ".join(f"{axis} {n}" for axis, n in p.mesh.items()) + f" = {math.prod(p.mesh.values())} devices"),
        ("method", f"{p.alg.name}, couples {p.alg.couples}, {p.route} route"),
        ("views", f"differentiated: {_names(needs.loss)}; rescored: {_names(rescored)}"),
        ("reference", config.reference.mode),
        ("batch", f"{r.prompts} prompts × {p.group_size} completions = {p.rows} rows"),
        (
            "updates",
            f"{l.epochs} epochs × {l.minibatches} minibatches of {p.minibatch_rows} rows × {p.microbatches} "
            f"microbatches of {p.layout.sequences * p.layout.slots} rows",
        ),
        (
            "tokens",
            f"at most {r.prompts * r.max_prompt:,} of prompts and {p.rows * r.max_new:,} sampled; the learner runs "
            f"{l.epochs * l.minibatches * p.microbatches * p.layout.sequences * p.layout.length:,} places a pass",
        ),
        (
            "shapes",
            f"decode [{_slots(config, p)}] slots over {r.max_prompt} + {r.max_new} tokens; learner "
            f"[{p.layout.sequences}, {p.layout.length}] ({p.layout.name}), head "
            f"[{p.layout.sequences}, {p.layout.slots * p.layout.completion}]",
        ),
    ]
    width = max(len(name) for name, _ in lines)
    memory = [("at most at once", peak(p)), *p.memory.items()]
    return "\n".join(
        [f"{name:<{width}}  {text}" for name, text in lines]
        + ["", "memory of one device (arrays held are exact, activations an estimate)"]
        + [f"  {_bytes(n):>10}  {name}" for name, n in memory]
    )


def make(config: Config, devices: int, on: Target | None = None) -> Step:
    """The numbers of a step on this many devices, by default of this process's kind. Raises ValueError when the mesh does
    not fit them."""
    on = on or target.own()
    sizes: dict[str, int] = {axis: n for axis, n in zip(AXES, shape_over(config.mesh, devices))}
    if math.prod(sizes.values()) > devices:
        raise ValueError(f"mesh: {sizes} needs {math.prod(sizes.values())} devices, there are {devices}")
    fields = {k: v for k, v in config.algorithm.items() if k != "name"}
    alg = algorithms.make(config.algorithm["name"], **fields)
    spec = _spec(config)
    r, l = config.rollout, config.learner
    group_size = alg.plan(alg.init()).group_size or r.group_size
    rows = r.prompts * group_size
    per_update = -(-rows // l.minibatches)
    shards = math.prod(sizes[a] for a in rules.RULES["batch"])
    layout = layouts.choose(
        l.layout,
        rows=per_update,
        microbatch_rows=l.microbatch_rows,
        most=layouts.most_rows(r.max_new, alg.couples, on.platform),
        context=r.max_prompt,
        completion=r.max_new,
        group_size=group_size,
        shards=shards,
    )
    microbatches = -(-per_update // (layout.sequences * layout.slots))
    trees = _trees(config, spec, alg)
    route = l.route if l.route != "auto" else "fused" if microbatches == 1 or alg.couples == "row" else "joint"
    route = "joint" if alg.rate is not None else route
    step = Step(on, spec, alg, sizes, group_size, rows, per_update, layout, microbatches, route, {}, {})
    return step._replace(
        parameters={
            label: sum(math.prod(x.shape) for x in jax.tree.leaves(tree)) for label, (tree, _) in trees.items()
        },
        memory=_memory(config, step, trees),
    )


def peak(step: Step) -> int:
    """Bytes of one device at once: what the run holds, and beside it a gradient or what generation needs in prefill or while
    it decodes."""
    memory = step.memory
    learner = {name for name in memory if name == ACTIVATIONS or name.endswith("gradients")}
    held = memory.keys() - learner - {WEIGHTS, CACHES, PREFILL}
    generation = memory.get(WEIGHTS, 0) + max(memory.get(CACHES, 0), memory.get(PREFILL, 0))
    return sum(memory[name] for name in held) + max(generation, sum(memory[name] for name in learner))


def _spec(config: Config) -> ModelSpec:
    if config.model.path:
        return hf.load_spec(config.model.path)
    return from_hf({"vocab_size": load_text(config.tokenizer).vocab, **(config.model.spec or {})})


def _trees(config: Config, spec: ModelSpec, alg: Algorithm) -> dict[str, tuple[Any, Any]]:
    """Shapes and logical axes of each trainable's parameters."""
    dtype = jnp.dtype(config.model.param_dtype)
    trees = {"policy": (decoder.abstract(spec, dtype), decoder.logical_axes(spec))}
    if alg.needs.critic:
        shapes = jax.eval_shape(lambda key: critic.init(spec, key, dtype), jax.random.key(0))
        trees["critic"] = (shapes, critic.logical_axes(spec))
    return trees


def _memory(config: Config, step: Step, trees: dict[str, tuple[Any, Any]]) -> dict[str, int]:
    param = jnp.dtype(config.model.param_dtype).itemsize
    wide = max(param, 4)  # gradients and second moments have at least float32
    count = {label: _per_device(tree, axes, step.mesh) for label, (tree, axes) in trees.items()}
    settings = {"policy": config.optimizer, "critic": config.critic or config.optimizer}
    memory = {}
    for label, n in count.items():
        memory[f"{label} parameters"] = n * param
        memory[f"{label} moments"] = n * _moment_bytes(settings[label], wide)
        memory[f"{label} gradients"] = n * wide
    if config.reference.mode == "resident":
        memory["reference parameters"] = count["policy"] * param
    if config.guide is not None:
        memory["guide parameters"] = count["policy"] * param
    replicated = {**step.mesh, **dict.fromkeys(rules.RULES["batch"], 1)}  # the engine splits weights over tp only
    weights = _per_device(*trees["policy"], replicated)
    if step.spec.tied and not turns(step.on.platform):  # the output matrix is a copy, transposed
        weights += step.spec.embed * step.spec.vocab // step.mesh["tp"]
    memory[WEIGHTS] = weights * jnp.dtype(_decode_dtype(config)).itemsize
    memory[CACHES] = _cache_bytes(config, step)
    memory[PREFILL] = _prefill_bytes(config, step, count["policy"])
    if config.learner.routing_replay != "none":
        positions = step.rows * (config.rollout.max_prompt + config.rollout.max_new)
        memory["learner: experts to replay"] = positions * math.prod(step.spec.routes) * np.dtype(np.int16).itemsize
    memory[ACTIVATIONS] = _activation_bytes(config, step, count["policy"])
    return memory


def _per_device(tree: Any, axes: Any, sizes: dict[str, int]) -> int:
    """Parameters of a tree that one device holds under the sharding rules."""

    def one(leaf: Any, names: rules.Axes) -> int:
        spec, _ = rules.partition(names, leaf.shape, sizes)
        ways = [math.prod(sizes[a] for a in ((s,) if isinstance(s, str) else s)) for s in spec if s is not None]
        return math.prod(leaf.shape) // math.prod(ways)

    return sum(jax.tree.leaves(jax.tree.map(one, tree, axes)))


def _moment_bytes(optimizer: Optimizer, wide: int) -> int:
    return 0 if optimizer.name == "sgd" else np.dtype(jnp.dtype(optimizer.moment_dtype)).itemsize + wide


def _decode_dtype(config: Config) -> str:
    return config.model.dtype if config.rollout.dtype == "same" else config.rollout.dtype


def _slots(config: Config, step: Step) -> int:
    return config.rollout.slots or min(step.rows, _shards(step) * most_slots(step.on.platform))


def _cache_bytes(config: Config, step: Step, slots: bool = True) -> int:
    """Keys and values: of every context once, and per slot its context's copy and its own tokens."""
    r = config.rollout
    tokens = r.prompts * r.max_prompt + slots * _slots(config, step) * (r.max_prompt + r.max_new)
    return tokens * _token_bytes(config, step) // _shards(step)


def _token_bytes(config: Config, step: Step) -> int:
    """Keys and values of one token in all layers."""
    spec, tp = step.spec, step.mesh["tp"]
    heads = spec.kv_heads // tp if spec.kv_heads % tp == 0 else spec.kv_heads
    return 2 * spec.layers * heads * spec.head_dim * jnp.dtype(_decode_dtype(config)).itemsize


def _shards(step: Step) -> int:
    """Of a batch."""
    return math.prod(step.mesh[a] for a in rules.RULES["batch"])


def _prefill_bytes(config: Config, step: Step, parameters: int) -> int:
    """The contexts' keys and values, and to make them: the cast of the `parameters` that a device holds, and of the contexts
    that are run at once what all layers leave to be kept and what one has at a time, attention scores with it."""
    r, spec, tp = config.rollout, step.spec, step.mesh["tp"]
    dtype = _decode_dtype(config)
    item, kv = jnp.dtype(dtype).itemsize, _token_bytes(config, step)
    tokens = prefill_batch(-(-r.prompts // _shards(step)), r.max_prompt) * r.max_prompt
    cast = item * parameters if dtype != config.model.param_dtype else 0
    layer = (4 * spec.embed + 2 * (spec.heads * spec.head_dim + _widest(spec)) // tp) * item + 2 * kv // spec.layers
    scores = spec.heads // tp * r.max_prompt * max(item, 4)
    return _cache_bytes(config, step, slots=False) + cast + tokens * (kv + layer + scores)


def _widest(spec: ModelSpec) -> int:
    """Numbers between the matrices of an MLP or of all experts, for one token."""
    return max([spec.mlp] * (False in spec.sparse) + ([spec.experts.count * spec.experts.mlp] if spec.experts else []))


def _activation_bytes(config: Config, step: Step, parameters: int) -> int:
    """What the gradient of a microbatch keeps and makes: by the remat setting, one layer computed again or the head, and of the
    `parameters` that a device holds their cast and their gradients.

    Attention scores, where no kernel keeps them to itself, and logits are there with their gradients, in at least float32.
    """
    spec, layout, sizes = step.spec, step.layout, step.mesh
    dtype, tp = config.model.dtype, sizes["tp"]
    item, wide = jnp.dtype(dtype).itemsize, max(jnp.dtype(dtype).itemsize, 4)
    d, q, kv = spec.embed, spec.heads * spec.head_dim // tp, spec.kv_heads * spec.head_dim // tp
    stream = spec.layers * d * item
    entering = stream // tp if layout.length % tp == 0 else stream  # the residual stream between layers
    products = 2 * stream + entering + (decoder.kept_products(spec, dtype, step.on.platform) - 3 * stream) // tp
    L, own = layout.context, layout.slots * layout.completion
    keys = layout.length if layout.name != "shared" else (L * L + own * (L + layout.completion)) // layout.length
    scores = 2 * spec.heads // tp * keys * wide
    window = spec.windows[0] if len(set(spec.windows)) == 1 else None
    behind = (L, layout.completion) if layout.name == "shared" else ()
    if step.on.platform == "tpu":
        from jaxrl_llm.models import splash

        if splash.suits(layout.length, spec.heads, spec.kv_heads, tp, window, *behind):
            scores = spec.heads // tp * splash.LANES * wide  # the kernel's statistics
    rest = (8 * d + 5 * q + 4 * kv + 3 * _widest(spec) // tp) * item + scores  # norms, rotations, gates
    everything = products + spec.layers * rest
    tokens = layout.sequences * layout.length // _shards(step)
    remat = config.model.remat
    if remat == "auto":
        remat = decoder.fitting_remat(spec, tokens, dtype, step.on)
    kept = {"none": everything, "dots": products, "full": entering}[remat] * tokens
    once = 0 if remat == "none" else everything // spec.layers * tokens
    # On TPUs the loop that goes backwards reads a copy of what the one that went forwards has stacked.
    copies = 2 if step.on.platform == "tpu" else 1
    logits, gathered, sums = _head_bytes(config, step, layout.sequences * own // _shards(step))
    cast = item if dtype != config.model.param_dtype else 0
    fresh = jnp.dtype(config.model.param_dtype).itemsize  # gradients of the piece, beside their sum over pieces
    return copies * kept + (cast + fresh) * parameters + sums + max(2 * logits + gathered, once)


def _head_bytes(config: Config, step: Step, scored: int) -> tuple[int, int, int]:
    """Logits of so many tokens in float32; the output matrix as it is gathered, and the sum of its gradients over chunks."""
    sizes, matrix = step.mesh, step.spec.embed * step.spec.vocab // step.mesh["tp"]
    most = config.model.head_chunk * step.spec.vocab // sizes["tp"] or CHUNK_ELEMENTS
    logits = min(scored * step.spec.vocab // sizes["tp"], most)
    whole = sizes["fsdp"] == 1 and config.model.dtype == config.model.param_dtype
    gathered = 0 if whole else matrix * jnp.dtype(config.model.dtype).itemsize
    sums = 0 if logits < most else 4 * matrix  # whole on every shard of the batch until all chunks are summed
    return 4 * logits, gathered, sums


def _names(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def _count(n: int) -> str:
    return f"{n:,} ({n / 1e6:.3g} M)"


def _bytes(n: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return f"{n:.4g} {unit}"
        n /= 1024
    raise AssertionError
