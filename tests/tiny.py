"""Tiny models of every family, shared by the tests."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.models import decoder
from jaxrl_llm.models.spec import ModelSpec, from_hf

BASE = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# Those of the known answers.
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": {**BASE, "model_type": "qwen2", "rope_theta": 1e4, "tie_word_embeddings": True},
    "qwen3": {**BASE, "model_type": "qwen3", "head_dim": 8, "rope_theta": 1e6, "tie_word_embeddings": False},
    "qwen3_moe": {
        **BASE,
        "model_type": "qwen3_moe",
        "head_dim": 8,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "num_hidden_layers": 3,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
    },
    "llama": {
        **BASE,
        "model_type": "llama",
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500.0,
        "rope_scaling": LLAMA3,
        "tie_word_embeddings": True,
    },
}


def spec(family: str = "qwen3", **changes: Any) -> ModelSpec:
    """A tiny spec; `changes` are config.json keys."""
    return from_hf({**CONFIGS[family], **changes})


def params(spec: ModelSpec, seed: int = 0, dtype: Any = np.float32) -> Any:
    """Random parameters whose norms and biases differ from 1 and 0, so that every term matters."""
    rng = np.random.default_rng(seed)

    def one(path: Any, leaf: Any) -> Any:
        x = rng.standard_normal(leaf.shape)
        x = 1 + 0.1 * x if "norm" in path[-1].key else 0.3 * x
        return jnp.asarray(x, leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, decoder.abstract(spec, dtype))


def unstack(spec: ModelSpec, params: Any) -> list[Any]:
    """Parameters layer by layer, for layers run one by one."""
    return [jax.tree.map(lambda w: w[0], decoder.some_layers(spec, params, i, i + 1)) for i in range(spec.layers)]


def tokens(rows: int, length: int, vocab: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, vocab, (rows, length), dtype=np.int32)
