"""What is measured: a config, with random weights and a synthetic task unless the user names their own."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from jaxrl_llm.benching.task import alphabet
from jaxrl_llm.config import Config, CustomTask
from jaxrl_llm.config_load import load
from jaxrl_llm.tasks.text import Text

SPECIALS = 3  # <pad> <bos> <eos> come before the characters of a character tokenizer

_SMALL = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 4096,
    "tie_word_embeddings": True,
}
_QWEN2 = {"model_type": "qwen2", "rope_theta": 1e6, "vocab_size": 151936, "tie_word_embeddings": True}
_QWEN3 = {
    "model_type": "qwen3",
    "rope_theta": 1e6,
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
# config.json keys by the name `bench --model` takes. The small ones are the shapes the peers are measured on.
MODELS: dict[str, dict[str, Any]] = {
    "qwen2-5m": {**_SMALL, "model_type": "qwen2", "intermediate_size": 1024},
    "qwen3-4m": {**_SMALL, "model_type": "qwen3", "intermediate_size": 768},
    "qwen2.5-0.5b": {
        **_QWEN2,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "qwen2.5-1.5b": {
        **_QWEN2,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
    "qwen3-4b": {
        **_QWEN3,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        **_QWEN3,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
    "qwen3-14b": {
        **_QWEN3,
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
    "qwen3-32b": {
        **_QWEN3,
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
    },
}


def config_of(model: str, overrides: Sequence[str] = ()) -> Config:
    """The config of a model of `MODELS` with random weights on the synthetic task, with overrides as of any command.

    By default 4 prompts of 64 tokens × 8 completions of 128, no evaluation, old log-probs from the sampler. Every prompt
    has `rollout.max_prompt` tokens; the vocabulary is `model.spec.vocab_size`.
    Raises ValueError for an unknown model, a config that does not check, or a vocabulary without room for a letter.
    """
    if model not in MODELS:
        raise ValueError(f"--model {model!r}: expected one of {', '.join(MODELS)}")
    spec = {**MODELS[model], "max_position_embeddings": 131072}
    base = [
        f"model.spec={json.dumps(spec)}",
        "tokenizer.chars=ab",
        "task.kind=custom",
        f"task.function={alphabet.__module__}:problems",
        "rollout.prompts=4",
        "rollout.group_size=8",
        "rollout.max_prompt=64",
        "rollout.max_new=128",
        "learner.old_logp=sampler",
        "optimizer.lr=1e-5",
        "eval.size=0",
    ]
    config = load([], [*base, *overrides])
    vocab, rollout = int((config.model.spec or {})["vocab_size"]), config.rollout
    letters = vocab - SPECIALS
    if letters < 1:
        raise ValueError(f"model.spec.vocab_size={vocab}: expected more than the {SPECIALS} special tokens")
    options = {"letters": min(letters, 64), "length": rollout.max_prompt, "size": 8 * rollout.prompts}
    assert isinstance(config.task, CustomTask)
    return config.model_copy(
        update={
            "tokenizer": config.tokenizer.model_copy(update={"chars": alphabet(letters)}),
            "task": config.task.model_copy(update={"options": {**options, **config.task.options}}),
        }
    )


def stop_ids(rate: float, vocab: int) -> tuple[int, ...]:
    """Token ids that end a completion, so many that about `rate` of uniformly drawn tokens do; none for 0.

    With random weights the next token is nearly uniform, so lengths are geometric up to the limit. This is the rule of the
    harnesses that measure other libraries, special tokens left out.
    Raises ValueError for a rate outside 0..1.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"--stop-rate {rate}: expected 0 to 1")
    n = min(max(1, round(rate * vocab)), vocab - SPECIALS) if rate else 0
    return tuple(range(SPECIALS, SPECIALS + n))


def with_stop_rate(words: Text, rate: float, vocab: int) -> Text:
    """The tokenizer with `stop_ids` in place of its own end tokens."""
    return dataclasses.replace(words, eos_ids=stop_ids(rate, vocab))
