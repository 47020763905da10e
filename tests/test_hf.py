"""Hugging Face directories, in and out."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from jaxrl_llm.config import Mesh
from jaxrl_llm.models import attention, decoder, hf, scorers
from jaxrl_llm.sharding import rules
from jaxrl_llm.sharding.mesh import make_mesh

FAMILIES = list(tiny.CONFIGS)
DATA = Path(__file__).parent.parent.parent / "shared" / "data"


def same(a, b):
    """Equal trees, bit for bit."""

    def one(x, y):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))

    jax.tree.map(one, a, b)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_export_then_import_is_exact(tmp_path, family, dtype):
    spec = tiny.spec(family, attention_bias=True, eos_token_id=[1, 3])
    params = tiny.params(spec, dtype=dtype)
    hf.save(tmp_path, spec, params)
    again, loaded = hf.load(tmp_path, dtype=dtype)
    assert again == spec
    same(loaded, params)


@pytest.mark.parametrize("family", FAMILIES)
def test_import_then_export_is_exact(tmp_path, family):
    pytest.importorskip("torch")
    import oracle

    oracle.model(tiny.CONFIGS[family]).save_pretrained(tmp_path / "theirs")
    hf.save(tmp_path / "ours", *hf.load(tmp_path / "theirs"))
    theirs, ours = (load_file(tmp_path / d / "model.safetensors") for d in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    same(ours, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_an_export(tmp_path, family):
    pytest.importorskip("torch")
    import oracle
    import transformers

    spec = tiny.spec(family, attention_bias=True, eos_token_id=[1, 3])
    params = tiny.params(spec)
    hf.save(tmp_path, spec, params)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert model.generation_config.eos_token_id == [1, 3]
    tokens = tiny.tokens(2, 9)
    hidden, _ = decoder.forward(spec, params, tokens, np.arange(9)[None], attention.causal())
    ours = scorers.logits(hidden, decoder.unembed(spec, params))
    np.testing.assert_allclose(ours, oracle.logits(model.eval(), tokens), atol=2e-5)


def test_weights_spread_over_files_with_an_index(tmp_path, monkeypatch):
    spec = tiny.spec()
    params = tiny.params(spec)
    monkeypatch.setattr(hf, "SHARD_BYTES", 4000)
    hf.save(tmp_path, spec, params)
    index = json.loads((tmp_path / hf.INDEX).read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2 and {f.name for f in tmp_path.glob("*.safetensors")} == files
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in jax.tree.leaves(params))
    same(hf.load(tmp_path)[1], params)


@pytest.mark.parametrize("sizes", [{"fsdp": 4}, {"fsdp": 2, "tp": 2}, {"dp": 2, "tp": 2}, {"fsdp": 1, "tp": 4}])
def test_loading_into_shards_reads_the_same_bits(tmp_path, sizes):
    spec = tiny.spec(attention_bias=True)
    params = tiny.params(spec)
    hf.save(tmp_path, spec, params)
    mesh = make_mesh(Mesh(**sizes), jax.devices()[:4])
    _, loaded = hf.load(tmp_path, mesh=mesh)
    same(loaded, params)
    expected = rules.shardings(decoder.logical_axes(spec), params, mesh)
    jax.tree.map(lambda x, s: x.sharding == s or pytest.fail(f"{x.sharding} {s}"), loaded, expected)


def test_a_shard_reads_only_its_part_of_a_tensor(tmp_path, monkeypatch):
    spec = tiny.spec()
    hf.save(tmp_path, spec, tiny.params(spec))
    biggest = {}
    read = hf._Files.read

    def spy(self, t, index):
        out = read(self, t, index)
        biggest[t.name] = max(biggest.get(t.name, 0), out.size)
        return out

    monkeypatch.setattr(hf._Files, "read", spy)
    hf.load(tmp_path, mesh=make_mesh(Mesh(fsdp=2, tp=2), jax.devices()[:4]))
    q = "model.layers.0.self_attn.q_proj.weight"
    assert biggest[q] == spec.embed * spec.heads * spec.head_dim // 4
    assert biggest["model.embed_tokens.weight"] == spec.vocab * spec.embed // 4


def test_an_export_is_read_from_shards_too(tmp_path):
    spec = tiny.spec()
    params = tiny.params(spec)
    mesh = make_mesh(Mesh(fsdp=2, tp=2), jax.devices()[:4])
    sharded = jax.device_put(params, rules.shardings(decoder.logical_axes(spec), params, mesh))
    hf.save(tmp_path, spec, sharded)
    same(hf.load(tmp_path)[1], params)


@pytest.fixture
def directory(tmp_path):
    spec = tiny.spec("qwen3", tie_word_embeddings=True)
    hf.save(tmp_path, spec, tiny.params(spec))
    return tmp_path


def change(directory, **changes):
    """Rewrite the weights with tensors added, replaced, or (None) removed."""
    weights = {**load_file(directory / "model.safetensors"), **changes}
    save_file({k: v for k, v in weights.items() if v is not None}, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.layers.1.mlp.up_proj.weight": None}, "model.layers.1.mlp.up_proj.weight missing"),
        ({"model.layers.2.mlp.up_proj.weight": np.zeros(3)}, "model.layers.2.mlp.up_proj.weight in the weights"),
        ({"lm_head.weight": np.zeros((32, 16))}, "lm_head.weight in the weights"),
        ({"model.norm.weight": np.zeros(17, np.float32)}, "model.norm.weight: shape (17,)"),
        ({"model.norm.weight": np.zeros(16, np.int8)}, "model.norm.weight: dtype I8"),
    ],
)
def test_missing_unexpected_and_misshapen_tensors_are_refused(directory, changes, message):
    change(directory, **changes)
    with pytest.raises(ValueError) as error:
        hf.load(directory)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_recorded_rotary_frequencies_are_ignored(directory):
    change(directory, **{"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)})
    hf.load(directory)


def test_a_directory_without_weights_is_refused(tmp_path, directory):
    with pytest.raises(ValueError, match=r"no config\.json"):
        hf.load(tmp_path / "nowhere")
    (directory / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        hf.load(directory)


def test_an_export_replaces_itself_but_nothing_else(directory, monkeypatch):
    spec, params = hf.load(directory)
    hf.save(directory, spec, params)
    monkeypatch.setattr(hf, "SHARD_BYTES", 4000)
    with pytest.raises(ValueError, match=r"holds model\.safetensors"):
        hf.save(directory, spec, params)


def test_stop_ids_of_the_generation_config_win(directory):
    for ids, expected in [(7, (7,)), ([7, 9], (7, 9)), (None, (1,))]:
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        assert hf.load_spec(directory).eos_ids == expected
    (directory / "generation_config.json").unlink()
    assert hf.load_spec(directory).eos_ids == (1,)


def test_the_tokenizer_travels_with_the_weights(directory, tmp_path):
    source = tmp_path / "tokenizer"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    spec, params = hf.load(directory)
    hf.save(tmp_path / "out", spec, params, tokenizer_dir=source)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["stories260k", "babyllama105"])
def test_real_checkpoints_reproduce_recorded_log_probs_and_greedy_text(name):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"no {path}: the real checkpoints are not part of the project")
    spec, params = hf.load(path)
    recorded = json.loads((path / "expected.json").read_text())
    width = max(len(s["ids"]) for s in recorded["scored"])

    @jax.jit
    def logits(tokens):
        hidden, _ = decoder.forward(spec, params, tokens, jnp.arange(width)[None], attention.causal())
        return scorers.logits(hidden, decoder.unembed(spec, params))

    def padded(ids):
        return np.array([list(ids) + [0] * (width - len(ids))])

    for text in recorded["scored"]:
        ids, n = text["ids"], len(text["ids"])
        logp = np.asarray(jax.nn.log_softmax(logits(padded(ids))[0]))[np.arange(n - 1), ids[1:]]
        np.testing.assert_allclose(logp, text["logp_float64"], atol=2e-5)
    greedy = recorded["greedy_ids"][:1]
    for _ in range(20):
        greedy.append(int(logits(padded(greedy))[0, len(greedy) - 1].argmax()))
    assert greedy == recorded["greedy_ids"][:21]
