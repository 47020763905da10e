"""One pre-norm decoder with grouped attention, gated MLP and rotary positions; `ModelSpec` says which family it is.

`Decoder` (Flax NNX) defines the parameters and their logical axes. Everything that computes is a function of the plain
nested dict of arrays that `init` returns, decoder layers stacked on a leading axis. Where some layers have experts and some
an MLP, the parameters of each kind are stacked over the layers that have them.

Letters: B batch, S positions, D embed, H heads, K key/value heads, hd head width, F mlp, V vocabulary, N layers, M layers with
experts, E experts, k experts of a token.
"""

from functools import partial
from itertools import groupby
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxrl_llm.models import experts
from jaxrl_llm.models.attention import LSE, OUT, Attend, LayerInfo, accumulator
from jaxrl_llm.models.products import PLAIN, SUMS, Products
from jaxrl_llm.models.spec import SILU, ModelSpec
from jaxrl_llm.sharding import target
from jaxrl_llm.sharding.rules import constrain, ways
from jaxrl_llm.sharding.target import Target
from jaxrl_llm.types import Params

Remat = Literal["auto", "none", "dots", "full"]

DENSE, EXPERTS = ("gate", "up", "down"), "experts"  # parameters of layers without and with experts
ACTIVATIONS = {SILU: jax.nn.silu}
# What "auto" lets the backward pass keep on a CPU, where computing again is no slower than reading back, and elsewhere
# as a share of the device's memory.
KEPT_ON_CPU, KEPT_SHARE = 2**28, 1 / 4
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(OUT, LSE),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Kept(NamedTuple):
    """What a layer leaves besides the residual stream; of `forward`, stacked on a leading axis."""

    attend: Any  # what `attend` kept; over N layers
    routes: (
        Int[Array, "M B S k"] | None
    )  # ids of the experts every position went to; over M layers. None without experts
    inner: Float[Array, "B S D"] | None = None  # of `forward`: the residual stream behind the layer asked for


class Layers(nnx.Module):
    """Parameters of all layers, stacked."""

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs, dtype: Any):
        n, d, h, k, hd, f = spec.layers, spec.embed, spec.heads, spec.kv_heads, spec.head_dim, spec.mlp
        normal = partial(_normal, rngs, dtype)
        out = 1 / (2 * n) ** 0.5  # the residual stream keeps its size at any depth
        self.attn_norm = _constant(1, dtype, (n, d), ("layers", None))
        self.q = normal((n, d, h, hd), ("layers", "embed", "heads", None), d**-0.5)
        self.k = normal((n, d, k, hd), ("layers", "embed", "kv_heads", None), d**-0.5)
        self.v = normal((n, d, k, hd), ("layers", "embed", "kv_heads", None), d**-0.5)
        self.o = normal((n, h, hd, d), ("layers", "heads", None, "embed"), out * (h * hd) ** -0.5)
        if spec.qkv_bias:
            self.q_bias = _constant(0, dtype, (n, h, hd), ("layers", "heads", None))
            self.k_bias = _constant(0, dtype, (n, k, hd), ("layers", "kv_heads", None))
            self.v_bias = _constant(0, dtype, (n, k, hd), ("layers", "kv_heads", None))
        if spec.o_bias:
            self.o_bias = _constant(0, dtype, (n, d), ("layers", None))
        if spec.qk_norm:
            self.q_norm = _constant(1, dtype, (n, hd), ("layers", None))
            self.k_norm = _constant(1, dtype, (n, hd), ("layers", None))
        self.mlp_norm = _constant(1, dtype, (n, d), ("layers", None))
        if n := spec.sparse.count(False):
            self.gate = normal((n, d, f), ("layers", "embed", "mlp"), d**-0.5)
            self.up = normal((n, d, f), ("layers", "embed", "mlp"), d**-0.5)
            self.down = normal((n, f, d), ("layers", "mlp", "embed"), out * f**-0.5)
        if spec.experts:
            self.experts = ExpertLayers(spec, rngs, dtype)


class ExpertLayers(nnx.Module):
    """Routers and experts of the layers that have them, stacked."""

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs, dtype: Any):
        assert spec.experts is not None
        m, d, e, f = spec.sparse.count(True), spec.embed, spec.experts.count, spec.experts.mlp
        normal = partial(_normal, rngs, dtype)
        self.router = normal((m, d, e), ("layers", "embed", None), d**-0.5)
        self.gate = normal((m, e, d, f), ("layers", "experts", "embed", "mlp"), d**-0.5)
        self.up = normal((m, e, d, f), ("layers", "experts", "embed", "mlp"), d**-0.5)
        self.down = normal((m, e, f, d), ("layers", "experts", "mlp", "embed"), (2 * spec.layers * f) ** -0.5)


class Decoder(nnx.Module):
    """Parameters of a decoder: `embed` [V,D], `layers`, `norm` [D], and `unembed` [D,V] unless tied."""

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        self.embed = _normal(rngs, dtype, (spec.vocab, spec.embed), ("vocab", "embed"), 0.02)
        self.layers = Layers(spec, rngs, dtype)
        self.norm = _constant(1, dtype, (spec.embed,), (None,))
        if not spec.tied:
            self.unembed = _normal(rngs, dtype, (spec.embed, spec.vocab), ("embed", "vocab"), 0.02)


def _normal(rngs: nnx.Rngs, dtype: Any, shape: tuple[int, ...], axes: tuple, std: float) -> nnx.Param:
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, dtype), logical_axes=axes)


def _constant(value: float, dtype: Any, shape: tuple[int, ...], axes: tuple) -> nnx.Param:
    return nnx.Param(jnp.full(shape, value, dtype), logical_axes=axes)


def init(spec: ModelSpec, key: Array, dtype: Any = jnp.float32) -> Params:
    """Random parameters. To create them sharded: `jax.jit(partial(init, spec), out_shardings=...)(key)`."""
    return nnx.to_pure_dict(nnx.state(Decoder(spec, nnx.Rngs(key), dtype)))


def abstract(spec: ModelSpec, dtype: Any = jnp.float32) -> Params:
    """The tree of `init` as ShapeDtypeStructs."""
    return jax.eval_shape(partial(init, spec, dtype=dtype), jax.random.key(0))


def logical_axes(spec: ModelSpec) -> Params:
    """The tree of `init` with a tuple of logical axis names (or None) for every dimension."""
    state = nnx.state(nnx.eval_shape(lambda: Decoder(spec, nnx.Rngs(0))))
    axes = jax.tree.map(lambda v: v.get_metadata("logical_axes"), state, is_leaf=lambda v: isinstance(v, nnx.Variable))
    return nnx.to_pure_dict(axes)


def layer_infos(spec: ModelSpec) -> list[LayerInfo]:
    """Static per-layer data, for layers run one by one."""
    return [LayerInfo(w, spec.scale) for w in spec.windows]


def own_parts(spec: ModelSpec, layers: Params, i: int) -> Params:
    """Of stacked layer parameters (or of something for each of them) what layer `i` has."""
    other = DENSE if spec.sparse[i] else (EXPERTS,)
    return {name: part for name, part in layers.items() if name not in other}


def some_layers(spec: ModelSpec, params: Params, first: int, end: int) -> Params:
    """Parameters of layers `first` to before `end`, which all have experts or all an MLP."""
    alike = spec.sparse[:first].count(spec.sparse[first])  # earlier layers of this kind

    def cut(name: str, part: Params) -> Params:
        start = alike if name in (*DENSE, EXPERTS) else first
        return jax.tree.map(lambda w: w[start : start + end - first], part)

    return {name: cut(name, part) for name, part in own_parts(spec, params["layers"], first).items()}


def reached(spec: ModelSpec, params: Params, layer: int, norm: bool) -> Params:
    """Masks that broadcast against `params`: True where a parameter has a part in what layer `layer` (from 0) leaves,
    unembedded, by way of the final norm if `norm`."""

    def mask(path: tuple, leaf: Any) -> np.ndarray:
        top, *below = (entry.key for entry in path)
        if top != "layers":
            return np.array(norm or top != "norm")
        kind = below[0]
        own = [i for i in range(spec.layers) if kind not in (*DENSE, EXPERTS) or spec.sparse[i] == (kind == EXPERTS)]
        return (np.array(own) <= layer).reshape(-1, *[1] * (len(leaf.shape) - 1))

    return jax.tree_util.tree_map_with_path(mask, params)


def embed(spec: ModelSpec, params: Params, tokens: Int[Array, "B S"], dtype: Any) -> Float[Array, "B S D"]:
    """Token embeddings in the compute dtype."""
    return constrain(params["embed"].astype(dtype)[tokens], "batch", "stream", None)


def unembed(spec: ModelSpec, params: Params) -> Float[Array, "D V"]:
    """The output matrix; the embedding's transpose when tied."""
    return params["embed"].T if spec.tied else params["unembed"]


def final_norm(spec: ModelSpec, params: Params, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    return rms_norm(x, params["norm"], spec.norm_eps)


def rms_norm(x: Float[Array, "... D"], weight: Float[Array, "D"], eps: float) -> Float[Array, "... D"]:
    """x / rms(x) in float32, cast back, times `weight` (Zhang & Sennrich 2019)."""
    y = x.astype(accumulator(x.dtype))
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype) * weight.astype(x.dtype)


def inv_freq(spec: ModelSpec) -> np.ndarray:
    """Rotary frequencies [hd/2], radians per position; Llama 3.1's scaling applied where the spec has it."""
    f = spec.rope_theta ** -(np.arange(0, spec.head_dim, 2, dtype=np.float64) / spec.head_dim)
    if (s := spec.rope_scaling) is None:
        return f
    turns = s.original_positions * f / (2 * np.pi)  # rotations within the original context
    smooth = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    smooth = np.clip(smooth, 0, 1)  # 0: a long wavelength, slowed by the factor; 1: kept
    return (1 - smooth) * f / s.factor + smooth * f


def rope(
    spec: ModelSpec, positions: Int[Array, "B S"], dtype: Any
) -> tuple[Float[Array, "B S hd/2"], Float[Array, "B S hd/2"]]:
    """cos and sin of the rotary angles; computed in float32 (float64 for a float64 `dtype`), cast to `dtype`."""
    acc = accumulator(dtype)
    angles = positions[..., None].astype(acc) * jnp.asarray(inv_freq(spec), acc)
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def rotate(x: Float[Array, "B S H hd"], cos: Float[Array, "B S hd/2"], sin: Float[Array, "B S hd/2"]) -> Array:
    """Rotary positions, half-split pairs (Su et al. 2021; the layout of Hugging Face checkpoints)."""
    a, b = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def block(
    spec: ModelSpec,
    layer_params: Params,
    layer_info: LayerInfo,
    x: Float[Array, "B S D"],
    cos: Float[Array, "B S hd/2"],
    sin: Float[Array, "B S hd/2"],
    attend: Attend,
    replay: Int[Array, "B S k"] | None = None,
    products: Products = PLAIN,
) -> tuple[Float[Array, "B S D"], Kept]:
    """One layer in the dtype of `x`. Returns the residual stream and what is kept.

    replay: experts that positions go to instead of those the router would choose; -1 leaves it the choice.
    products: how the weights lie.
    """

    def product(x: Array, name: str) -> Array:
        return products.project(x, p[name], SUMS[name])

    p = jax.tree.map(lambda w: w.astype(x.dtype), layer_params)
    h = rms_norm(x, p["attn_norm"], spec.norm_eps)
    q, k, v = (product(h, name) for name in ("q", "k", "v"))
    if spec.qkv_bias:
        q, k, v = q + p["q_bias"], k + p["k_bias"], v + p["v_bias"]
    if spec.qk_norm:
        q, k = rms_norm(q, p["q_norm"], spec.norm_eps), rms_norm(k, p["k_norm"], spec.norm_eps)
    q = constrain(rotate(q, cos, sin), "batch", "seq", "heads", None)
    k = constrain(rotate(k, cos, sin), "batch", "seq", "kv_heads", None)
    v = constrain(v, "batch", "seq", "kv_heads", None)
    out, y = attend(layer_info, q, k, v)
    out = product(out, "o")
    x = constrain(x + (out + p["o_bias"] if spec.o_bias else out), "batch", "seq", None)
    h = rms_norm(x, p["mlp_norm"], spec.norm_eps)
    act, routes = ACTIVATIONS[spec.act], None
    if spec.experts and EXPERTS in p:
        h, routes = experts.mix(spec.experts, p[EXPERTS], h, act, replay)
    else:
        h = products.mlp(act, p, h)
    return constrain(x + constrain(h, "batch", "stream", None), "batch", "stream", None), Kept(y, routes)


def kept_products(spec: ModelSpec, dtype: Any, platform: str) -> int:
    """Bytes of the residual stream, of all products with weights and of what attention reads, of one token in all layers."""
    dense, sparse = spec.sparse.count(False), spec.sparse.count(True)
    numbers = spec.layers * (2 * spec.embed + 2 * (spec.heads + spec.kv_heads) * spec.head_dim)
    numbers += dense * (spec.embed + 2 * spec.mlp)
    if spec.experts:
        numbers += sparse * experts.kept_products(spec.experts, spec.embed, platform)
    return numbers * jnp.dtype(dtype).itemsize


def fitting_remat(spec: ModelSpec, tokens: int, dtype: Any, on: Target) -> Remat:
    """ "dots" where what it keeps of `tokens` on one device fits, else "full"."""
    room = KEPT_ON_CPU if on.platform == "cpu" else KEPT_SHARE * target.memory(on)
    return "dots" if kept_products(spec, dtype, on.platform) * tokens <= room else "full"


def forward(
    spec: ModelSpec,
    params: Params,
    tokens: Int[Array, "B S"],
    positions: Int[Array, "B S"],
    attend: Attend,
    *,
    dtype: Any = jnp.float32,
    remat: Remat = "none",
    replay: Int[Array, "M B S k"] | None = None,
    inner: int | None = None,
) -> tuple[Float[Array, "B S D"], Kept]:
    """Hidden states after the final norm, and what the layers kept.

    `positions` are those of the rotary embedding; `attend` alone decides who sees whom. Layers run in a scan, or one for
    each run of layers of a kind, so compile time does not grow with depth. `remat`: what the backward pass recomputes of a
    layer: nothing ("none"), all but products with weights and what attention reads ("dots"), everything ("full"); "auto" is
    "dots" where those fit. `replay`: experts that positions go to, as `Kept.routes` has them; -1 leaves the router the choice.
    `inner`: keep what layer `inner` (from 0) leaves, before any norm; who reads that alone runs no layer above it.
    """
    if remat == "auto":
        remat = fitting_remat(spec, tokens.size // ways("batch"), dtype, target.current())
    x = embed(spec, params, tokens, dtype)
    cos, sin = rope(spec, positions, dtype)
    mixed = len(set(spec.windows)) > 1  # one window for all stays static

    def layer(x: Array, own: tuple[Params, Array | None, Array | None]) -> tuple[Array, Kept]:
        p, window, route = own
        info = LayerInfo(window if mixed else spec.windows[0], spec.scale)  # type: ignore[arg-type]
        # The first names how what enters is kept for the backward pass: without it XLA keeps what the second gathers.
        x = constrain(constrain(x, "batch", "stream", None), "batch", "seq", None)
        return block(spec, p, info, x, cos, sin, attend, route)

    if remat != "none":
        layer = jax.checkpoint(layer, policy=REMAT_POLICIES[remat], prevent_cse=False)
    windows = jnp.asarray(spec.windows, jnp.int32) if mixed else None
    kept: list[Kept] = []
    end = routed = 0
    inside = None
    for (sparse, _), run in groupby((sparse, inner is None or i <= inner) for i, sparse in enumerate(spec.sparse)):
        first, end = end, end + len(list(run))
        route = None
        if replay is not None and sparse:
            route, routed = replay[routed : routed + end - first], routed + end - first
        window = None if windows is None else windows[first:end]
        x, own = jax.lax.scan(layer, x, (some_layers(spec, params, first, end), window, route))
        kept.append(own)
        inside = x if inner == end - 1 else inside
    return final_norm(spec, params, constrain(x, "batch", "seq", None)), _stacked(kept)._replace(inner=inside)


def _stacked(kept: list[Kept]) -> Kept:
    """What runs of layers kept, as one."""
    routes = [own.routes for own in kept if own.routes is not None]
    attend = jax.tree.map(lambda *runs: jnp.concatenate(runs), *(own.attend for own in kept))
    return Kept(attend, jnp.concatenate(routes) if routes else None)
