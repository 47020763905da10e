"""A decoder family as data: what `config.json` says, checked, in our words."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SILU = "silu"


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's rule: long wavelengths are slowed by `factor`, short ones kept, the middle interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


@dataclass(frozen=True)
class Experts:
    """Sparse layers, whose MLP is a router and `count` small ones of which a token takes `per_token`."""

    count: int
    per_token: int
    mlp: int  # width of one
    norm_topk: bool  # weights of the chosen ones sum to 1
    dense: tuple[int, ...] = ()  # layers that have an ordinary MLP instead

    def __post_init__(self):
        if self.per_token > self.count:
            raise ValueError(f"num_experts_per_tok: {self.per_token}, expected at most num_experts = {self.count}")


@dataclass(frozen=True)
class ModelSpec:
    """Everything static about a decoder. Hashable: close over it or make it a static jit argument."""

    family: str  # model_type of config.json
    vocab: int
    layers: int
    embed: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    tied: bool = False  # the embedding is also the output matrix
    max_positions: int = 2048
    windows: tuple[int, ...] = ()  # per layer, keys a query sees including its own; 0: all
    act: str = SILU
    experts: Experts | None = None
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    pad_id: int | None = None

    def __post_init__(self):
        if not self.windows:
            object.__setattr__(self, "windows", (0,) * self.layers)
        if len(self.windows) != self.layers:
            raise ValueError(f"layer_types: {len(self.windows)} entries, expected num_hidden_layers = {self.layers}")
        if self.heads % self.kv_heads:
            raise ValueError(f"num_key_value_heads: {self.kv_heads} does not divide num_attention_heads {self.heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim: {self.head_dim} is odd; rotary embeddings need an even one")
        if self.experts is not None and not any(self.sparse):
            raise ValueError(f"mlp_only_layers: {list(self.experts.dense)}, expected at least one layer with experts")

    @property
    def sparse(self) -> tuple[bool, ...]:
        """Which layers have experts."""
        return tuple(self.experts is not None and i not in self.experts.dense for i in range(self.layers))

    @property
    def routes(self) -> tuple[int, int]:
        """What a token's experts are recorded as: layers that have experts, and how many of each it goes to."""
        return self.sparse.count(True), 0 if self.experts is None else self.experts.per_token

    @property
    def scale(self) -> float:
        """Factor of the attention logits."""
        return self.head_dim**-0.5


ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
# Keys of config.json that change the function computed, with the only values this decoder computes.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": (SILU,),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
}


def from_hf(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a Hugging Face `config.json`, of transformers 4 (`rope_theta`) or 5 (`rope_parameters`).

    Raises:
      ValueError: an unknown `model_type` or rope type, a missing key, or a value this decoder does not compute; the
        message names the key and its value.
    """
    family = config.get("model_type")
    if family not in ARCHITECTURES:
        raise ValueError(f"model_type: {family!r} is not supported, expected one of {', '.join(ARCHITECTURES)}")
    for key, allowed in NEUTRAL.items():
        if key in config and config[key] not in allowed:
            raise ValueError(f"{key}: {config[key]!r} is not supported for {family}, expected {allowed[0]!r}")
    layers, embed = _size(config, "num_hidden_layers"), _size(config, "hidden_size")
    heads = _size(config, "num_attention_heads")
    theta, scaling = _rope(config)
    attention_bias = bool(config.get("attention_bias") or False) and family != "qwen2"
    return ModelSpec(
        family=family,
        vocab=_size(config, "vocab_size"),
        layers=layers,
        embed=embed,
        heads=heads,
        kv_heads=_size(config, "num_key_value_heads", heads),
        head_dim=_size(config, "head_dim", embed // heads),
        mlp=_size(config, "intermediate_size"),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        qkv_bias=family == "qwen2" or attention_bias,
        o_bias=attention_bias,
        qk_norm=family in ("qwen3", "qwen3_moe"),
        tied=bool(config.get("tie_word_embeddings", False)),
        max_positions=_size(config, "max_position_embeddings", 2048),
        windows=_windows(config, layers),
        experts=_experts(config, layers) if family == "qwen3_moe" else None,
        eos_ids=eos_ids(config.get("eos_token_id")),
        bos_id=config.get("bos_token_id"),
        pad_id=config.get("pad_token_id"),
    )


def to_hf(spec: ModelSpec) -> dict[str, Any]:
    """The `config.json` of a spec, readable by transformers 4 and 5; `from_hf(to_hf(spec)) == spec`."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if s := spec.rope_scaling:
        rope = {
            "rope_type": "llama3",
            "factor": s.factor,
            "low_freq_factor": s.low_freq_factor,
            "high_freq_factor": s.high_freq_factor,
            "original_max_position_embeddings": s.original_positions,
        }
    config = {
        "architectures": [ARCHITECTURES[spec.family]],
        "model_type": spec.family,
        "vocab_size": spec.vocab,
        "num_hidden_layers": spec.layers,
        "hidden_size": spec.embed,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "intermediate_size": spec.mlp,
        "hidden_act": spec.act,
        "rms_norm_eps": spec.norm_eps,
        "rope_theta": spec.rope_theta,
        "rope_scaling": rope if spec.rope_scaling else None,
        "rope_parameters": {**rope, "rope_theta": spec.rope_theta},
        "tie_word_embeddings": spec.tied,
        "max_position_embeddings": spec.max_positions,
        "eos_token_id": spec.eos_ids[0] if len(spec.eos_ids) == 1 else list(spec.eos_ids) or None,
        "bos_token_id": spec.bos_id,
        "pad_token_id": spec.pad_id,
    }
    if spec.family != "qwen2":
        config["attention_bias"] = spec.o_bias
    if spec.family != "llama":
        window = max(spec.windows)
        config |= {
            "use_sliding_window": window > 0,
            "sliding_window": window or None,
            "layer_types": ["sliding_attention" if w else "full_attention" for w in spec.windows],
        }
    if e := spec.experts:
        config |= {
            "num_experts": e.count,
            "num_experts_per_tok": e.per_token,
            "moe_intermediate_size": e.mlp,
            "norm_topk_prob": e.norm_topk,
            "mlp_only_layers": list(e.dense),
            "decoder_sparse_step": 1,
        }
    return config


def eos_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """`eos_token_id` of config.json or generation_config.json: absent, one id, or several."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key}: {value!r}, expected a positive integer")
    return value


def _rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("partial_rotary_factor") not in NEUTRAL["partial_rotary_factor"]:
        raise ValueError(f"partial_rotary_factor: {rope['partial_rotary_factor']!r} is not supported, expected 1.0")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"rope_type: {kind!r} is not supported, expected default or llama3")
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if missing := [k for k in keys if rope.get(k) is None]:
        raise ValueError(f"rope_scaling: {missing[0]} is missing, expected a number for rope_type llama3")
    factor, low, high, original = (rope[k] for k in keys)
    return theta, RopeScaling(float(factor), float(low), float(high), int(original))


def _windows(config: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """Sliding windows: `layer_types` wins; else Qwen's `use_sliding_window` turns them on from `max_window_layers`."""
    types = config.get("layer_types")
    if types is None:
        if not config.get("use_sliding_window"):
            return (0,) * layers
        first = 0 if config["model_type"] == "qwen3_moe" else _size(config, "max_window_layers")
        types = ["full_attention"] * min(first, layers) + ["sliding_attention"] * max(layers - first, 0)
    if unknown := set(types) - {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"layer_types: {unknown.pop()!r} is not supported, expected full_attention or sliding_attention"
        )
    if "sliding_attention" not in types:
        return (0,) * len(types)
    window = _size(config, "sliding_window")
    return tuple(window if t == "sliding_attention" else 0 for t in types)


def _experts(config: Mapping[str, Any], layers: int) -> Experts:
    every = _size(config, "decoder_sparse_step", 1)
    dense = set(config.get("mlp_only_layers") or ()) | {i for i in range(layers) if (i + 1) % every}
    return Experts(
        count=_size(config, "num_experts" if "num_experts" in config else "num_local_experts"),
        per_token=_size(config, "num_experts_per_tok"),
        mlp=_size(config, "moe_intermediate_size"),
        norm_topk=bool(config.get("norm_topk_prob", False)),
        dense=tuple(sorted(dense & set(range(layers)))),
    )
