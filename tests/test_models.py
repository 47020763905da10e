"""The decoder against known answers and the transformers classes; attention; the critic."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import save_file

from jaxrl_llm.models import attention, critic, decoder, hf, products, scorers
from jaxrl_llm.models.spec import from_hf, to_hf
from jaxrl_llm.sharding import target
from jaxrl_llm.sharding.target import Target

FAMILIES = list(tiny.CONFIGS)
IDS = np.array([[1, 5, 9, 2, 7, 30, 4, 11]])
# Last-position logits[0:4], mean next-token NLL, sum of squared logits.
KNOWN = {
    "qwen2": ([1.288095, -1.364259, 0.987869, 0.849431], 4.430898, 303.0171),
    "qwen3": ([1.032130, 0.095816, 0.175611, -0.433265], 4.324462, 277.4530),
    "qwen3_moe": ([0.602756, -0.879489, -0.088415, -0.862586], 3.949523, 283.2638),
    "llama": ([-1.331886, -0.607468, -1.759095, -1.793286], 3.900680, 391.1079),
}


def positions(tokens):
    return np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)


@partial(jax.jit, static_argnames=("spec", "dtype", "remat"))
def logits(spec, params, tokens, at=None, segment=None, dtype=jnp.float32, remat="none"):
    attend = attention.causal(segment)
    at = jnp.arange(tokens.shape[1])[None] if at is None else at
    hidden, _ = decoder.forward(spec, params, tokens, at, attend, dtype=dtype, remat=remat)
    return scorers.logits(hidden, decoder.unembed(spec, params))


def known_directory(path: Path, family: str, **changes) -> Path:
    """A checkpoint whose weights are the arithmetic ones of the known answers."""
    (path / "config.json").write_text(json.dumps({**tiny.CONFIGS[family], **changes}))
    weights = {}
    for k, t in enumerate(sorted(hf.tensors(tiny.spec(family)), key=lambda t: t.name)):
        j = np.arange(np.prod(t.disk_shape), dtype=np.int64)
        v = ((31 * j**2 + 7919 * j + 1009 * k) % 10007) / 10007 - 0.5
        v = 1 + 0.2 * v if t.name.endswith("norm.weight") else v
        weights[t.name] = v.reshape(t.disk_shape)
    save_file(weights, path / "model.safetensors")
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_known_answers(x64, tmp_path, family):
    spec, params = hf.load(known_directory(tmp_path, family), dtype=jnp.float64)
    last, nll, squares = KNOWN[family]
    for dtype, tolerance in [(jnp.float64, 2e-6), (jnp.float32, 1e-4)]:
        out = logits(spec, params, IDS, dtype=dtype)
        np.testing.assert_allclose(out[0, -1, :4], last, atol=tolerance)
        logp = jax.nn.log_softmax(out[0])
        np.testing.assert_allclose(-logp[np.arange(7), IDS[0, 1:]].mean(), nll, atol=tolerance)
        np.testing.assert_allclose((out**2).sum(), squares, atol=100 * tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_either_side_changes_nothing(family):
    spec = tiny.spec(family)
    params = tiny.params(spec)
    expected = logits(spec, params, IDS)
    padded = np.concatenate([np.full((1, 3), 17), IDS, np.full((1, 2), 23)], axis=1)
    valid = (np.arange(13) >= 3) & (np.arange(13) < 11)
    out = logits(spec, params, padded, np.maximum(valid.cumsum() - 1, 0)[None], valid[None].astype(int))
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out[:, 3:11], expected, atol=1e-5)


def test_only_differences_of_positions_matter():
    spec = tiny.spec("llama")
    params = tiny.params(spec)
    np.testing.assert_allclose(
        logits(spec, params, IDS), logits(spec, params, IDS, positions(IDS) + 19), rtol=0, atol=2e-5
    )


def test_packed_sequences_do_not_see_each_other():
    spec = tiny.spec()
    params = tiny.params(spec)
    a, b = tiny.tokens(1, 5, seed=1), tiny.tokens(1, 4, seed=2)
    packed = np.concatenate([a, b], axis=1)
    segment = np.array([[1] * 5 + [2] * 4])
    out = logits(spec, params, packed, np.array([[*range(5), *range(4)]]), segment)
    np.testing.assert_allclose(out[:, :5], logits(spec, params, a), atol=1e-5)
    np.testing.assert_allclose(out[:, 5:], logits(spec, params, b), atol=1e-5)


def test_llama3_rotary_frequencies():
    spec = from_hf(
        {
            **tiny.CONFIGS["llama"],
            "head_dim": 128,
            "rope_theta": 5e5,
            "rope_scaling": {**tiny.LLAMA3, "original_max_position_embeddings": 8192},
        }
    )
    at = [0, 20, 28, 29, 30, 31, 32, 34, 35, 40, 63]
    expected = [1, 1.656044e-2, 3.211446e-3, 2.166571e-3, 1.371894e-3, 8.567514e-4]
    expected += [5.248462e-4, 1.785078e-4, 9.556212e-5, 3.428102e-5, 3.068926e-7]
    np.testing.assert_allclose(decoder.inv_freq(spec)[at], expected, rtol=1e-6)


ORACLES = {
    **tiny.CONFIGS,
    "qwen2, windows": {
        **tiny.CONFIGS["qwen2"],
        "use_sliding_window": True,
        "sliding_window": 3,
        "max_window_layers": 1,
    },
    "qwen3, all windows, biases": {
        **tiny.CONFIGS["qwen3"],
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": ["sliding_attention"] * 2,
        "attention_bias": True,
    },
    "qwen3_moe, every second layer, windows": {
        **tiny.CONFIGS["qwen3_moe"],
        "num_hidden_layers": 4,
        "mlp_only_layers": [],
        "decoder_sparse_step": 2,
        "norm_topk_prob": False,
        "num_experts_per_tok": 3,
        "use_sliding_window": True,
        "sliding_window": 5,
    },
    "qwen3_moe, all sparse, one expert": {
        **tiny.CONFIGS["qwen3_moe"],
        "mlp_only_layers": None,
        "num_experts_per_tok": 1,
        "norm_topk_prob": False,
    },
    "llama, biases, multi-query": {
        **tiny.CONFIGS["llama"],
        "rope_scaling": None,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "num_key_value_heads": 1,
    },
}


@pytest.mark.parametrize("name", list(ORACLES))
def test_logits_equal_the_transformers_class(name, tmp_path):
    pytest.importorskip("torch")
    import oracle

    model = oracle.model(ORACLES[name])
    model.save_pretrained(tmp_path)
    spec, params = hf.load(tmp_path)
    tokens = tiny.tokens(3, 12)
    np.testing.assert_allclose(logits(spec, params, tokens), oracle.logits(model, tokens), atol=2e-5)
    valid = np.arange(12) >= np.array([0, 2, 5])[:, None]
    out = logits(spec, params, tokens, np.maximum(valid.cumsum(1) - 1, 0), valid.astype(int))
    np.testing.assert_allclose(
        np.where(valid[..., None], out, 0),
        np.where(valid[..., None], oracle.logits(model, tokens, valid), 0),
        atol=2e-5,
    )


def test_bfloat16_stays_near_float32():
    spec = tiny.spec()
    params = tiny.params(spec)
    out = logits(spec, params, IDS, dtype=jnp.bfloat16)
    expected = logits(spec, params, IDS)
    assert out.dtype == jnp.float32
    assert 0 < jnp.linalg.norm(out - expected) < 0.03 * jnp.linalg.norm(expected)


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_layers_one_by_one_equal_the_scan(family):
    spec = tiny.spec(family, use_sliding_window=True, sliding_window=3, max_window_layers=1)
    params = tiny.params(spec)
    tokens = tiny.tokens(2, 9)
    expected, kept = decoder.forward(spec, params, tokens, positions(tokens), attention.causal(keep_kv=True))
    x = decoder.embed(spec, params, tokens, jnp.float32)
    cos, sin = decoder.rope(spec, positions(tokens), jnp.float32)
    for i, (p, info) in enumerate(zip(tiny.unstack(spec, params), decoder.layer_infos(spec))):
        x, own = decoder.block(spec, p, info, x, cos, sin, attention.causal(keep_kv=True))
        for a, b in zip(own.attend, kept.attend):
            np.testing.assert_allclose(a, b[i], atol=1e-5)
    np.testing.assert_allclose(decoder.final_norm(spec, params, x), expected, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_rematerialization_changes_no_gradient(x64, family):
    spec = tiny.spec(family)
    params = tiny.params(spec, dtype=np.float64)

    def gradient(remat):
        return jax.jit(jax.grad(lambda p: (logits(spec, p, IDS, dtype=jnp.float64, remat=remat) ** 2).sum()))(params)

    expected = gradient("none")
    for remat in ("dots", "full"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), gradient(remat), expected)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_the_order_of_a_cpu_s_products_changes_no_gradient(x64, family, monkeypatch):
    """Other platforms take the plain products, a CPU has the short side of some on the left."""
    spec = tiny.spec(family)
    params = tiny.params(spec, dtype=np.float64)
    targets = np.roll(IDS, -1, axis=1).reshape(-1)

    def loss(p):
        hidden, _ = decoder.forward(spec, p, IDS, positions(IDS), attention.causal(), dtype=jnp.float64, remat="dots")
        return scorers.token_views(hidden[0], decoder.unembed(spec, p), targets)["logp"].sum()

    def program():
        return jax.jit(jax.grad(lambda p: loss(p))).lower(params)

    swapped = program()
    monkeypatch.setattr(target, "current", lambda: Target("gpu", "some"))
    plain = program()
    barriers = [text.as_text().count("optimization_barrier") for text in (swapped, plain)]
    assert barriers[0] >= barriers[1] + 4, "down, the output matrix, keys and values"
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12),
        swapped.compile()(params),
        plain.compile()(params),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_with_turned_weights_is_the_layer(x64, family):
    spec = tiny.spec(family, attention_bias=True)
    params = tiny.params(spec, dtype=np.float64)
    x = decoder.embed(spec, params, IDS, jnp.float64)
    cos, sin = decoder.rope(spec, positions(IDS), jnp.float64)
    info = decoder.layer_infos(spec)[0]
    p = jax.tree.map(lambda w: w[0], decoder.own_parts(spec, params["layers"], 0))
    turned = {name: products.turn(w, products.SUMS[name]) if name in products.SUMS else w for name, w in p.items()}
    assert turned["q"].shape == (spec.heads, spec.head_dim, spec.embed)
    assert turned["o"].shape == (spec.embed, spec.heads, spec.head_dim)
    plain, _ = decoder.block(spec, p, info, x, cos, sin, attention.causal())
    same, _ = decoder.block(spec, turned, info, x, cos, sin, attention.causal(), products=products.TURNED)
    np.testing.assert_allclose(same, plain, atol=1e-12)


def test_compiled_size_does_not_grow_with_depth():
    def lines(layers):
        spec = tiny.spec(num_hidden_layers=layers)
        shapes = decoder.abstract(spec)
        return len(jax.jit(lambda p: logits(spec, p, IDS)).lower(shapes).as_text().splitlines())

    assert lines(2) == lines(12)


def test_every_parameter_dimension_has_a_logical_axis():
    for family in FAMILIES:
        spec = tiny.spec(family, attention_bias=True)
        axes, shapes = decoder.logical_axes(spec), decoder.abstract(spec)
        jax.tree.map(lambda x, a: len(a) == len(x.shape) or pytest.fail(f"{x} {a}"), shapes, axes)
        stacked = {spec.layers, spec.sparse.count(True), spec.sparse.count(False)}
        assert {x.shape[0] for x in jax.tree.leaves(shapes["layers"])} <= stacked
        is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
        assert all(a[0] == "layers" for a in jax.tree.leaves(axes["layers"], is_leaf=is_axes))


# attention


def parts(c=2, g=3, s=4, n=5, t=4, h=4, k=2, hd=6, dtype=np.float64):
    rng = np.random.default_rng(0)
    shapes = [(c, g, s, h, hd), (c, n, k, hd), (c, n, k, hd), (c, g, t, k, hd), (c, g, t, k, hd)]
    arrays = [jnp.asarray(rng.standard_normal(x), dtype) for x in shapes]
    context = jnp.asarray(np.arange(n) < np.array([3, 5])[:, None])[:, None, None]
    own = jnp.tril(jnp.ones((s, t), bool))[None, None]
    return arrays, context, own


@jax.jit
def concatenated(arrays, context, own):
    q, k_ctx, v_ctx, k_own, v_own = arrays
    c, g, s = q.shape[:3]

    def rows(x):  # one copy of the context for each row
        return jnp.broadcast_to(x[:, None], (c, g, *x.shape[1:])).reshape(c * g, *x.shape[1:])

    flat = [x.reshape(c * g, *x.shape[2:]) for x in (q, k_own, v_own)]
    k, v = jnp.concatenate([rows(k_ctx), flat[1]], 1), jnp.concatenate([rows(v_ctx), flat[2]], 1)
    mask = [jnp.broadcast_to(m, (c, g, s, m.shape[-1])).reshape(c * g, s, -1) for m in (context, own)]
    return plain(flat[0], k, v, jnp.concatenate(mask, -1), 0.4).reshape(q.shape)


def plain(q, k, v, mask, scale):
    """Attention as it is written, differentiated by JAX."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.where(mask[:, None], jnp.einsum("bqhd,bkhd->bhqk", q, k) * scale, -1e30)
    p = jnp.where(mask[:, None], jax.nn.softmax(scores), 0)
    return jnp.einsum("bhqk,bkhd->bqhd", p, v)


@jax.jit
def two(arrays, context, own):
    q, k_ctx, v_ctx, k_own, v_own = arrays
    return attention.joined(q, [attention.Part(k_ctx, v_ctx, context), attention.Part(k_own, v_own, own)], 0.4)


def test_two_parts_equal_attention_over_the_concatenation(x64):
    arrays, context, own = parts()
    np.testing.assert_allclose(two(arrays, context, own), concatenated(arrays, context, own), atol=1e-12)

    def gradient(f):
        return jax.jit(jax.grad(lambda a: jnp.sum(jnp.sin(f(a, context, own)))))(arrays)

    for a, b in zip(gradient(two), gradient(concatenated)):
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_an_empty_part_is_finite_and_changes_nothing(x64):
    arrays, context, own = parts()
    none, some = jnp.zeros_like(context), jnp.zeros_like(own)
    only_own, only_context = two(arrays, none, own), two(arrays, context, some)
    np.testing.assert_allclose(only_own, concatenated(arrays, none, own), atol=1e-12)
    np.testing.assert_allclose(only_context, concatenated(arrays, context, some), atol=1e-12)
    assert not two(arrays, none, some).any()
    squares = jax.jit(jax.grad(lambda *args: jnp.sum(two(*args) ** 2)))
    for masks in [(none, own), (context, some), (none, some)]:
        gradient = squares(arrays, *masks)
        assert all(np.isfinite(x).all() for x in gradient)


def test_grouped_queries_read_their_own_kv_head(x64):
    (q, _, _, k, v), _, own = parts(c=1, g=1)
    q, k, v, own = q[0], k[0], v[0], own[0]
    out = attention.attention(q, k, v, own, 0.4)
    for head in range(4):
        alone = attention.attention(q[:, :, [head]], k[:, :, [head // 2]], v[:, :, [head // 2]], own, 0.4)
        np.testing.assert_allclose(out[:, :, [head]], alone, atol=1e-12)


@pytest.mark.parametrize("window", [0, 3, jnp.asarray(3)], ids=["all", "static", "traced"])
@pytest.mark.parametrize("segmented", [False, True])
def test_attention_in_blocks_is_attention(window, segmented, x64, monkeypatch):
    monkeypatch.setattr(attention, "QUERIES", 4)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 11, heads, 6))) for heads in (4, 2, 2))
    segment = jnp.asarray(np.repeat([[1, 1, 2, 0], [0, 3, 3, 3]], [4, 3, 2, 2], axis=1)) if segmented else None
    at = np.arange(11)
    mask = attention.visible(at[:, None], at[None, :], window)[None]
    if segment is not None:
        mask = mask & (segment[:, :, None] == segment[:, None, :])
    info = attention.LayerInfo(window, 0.4)

    def both(f):
        return jax.jit(jax.value_and_grad(lambda *a: jnp.sum(jnp.sin(f(*a))), argnums=(0, 1, 2)))(q, k, v)

    assert len(attention.causal_blocks(11, window)) == 3
    got, want = both(lambda *a: attention.causal(segment)(info, *a)[0]), both(lambda *a: plain(*a, mask, 0.4))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_blocks_leave_out_keys_that_none_of_their_queries_sees(monkeypatch):
    monkeypatch.setattr(attention, "QUERIES", 4)
    assert attention.causal_blocks(10) == [
        (slice(0, 4), slice(0, 4)),
        (slice(4, 8), slice(0, 8)),
        (slice(8, 10), slice(0, 10)),
    ]
    assert attention.causal_blocks(10, 3)[2] == (slice(8, 10), slice(6, 10))
    assert len(attention.causal_blocks(1000)) == attention.MOST_BLOCKS


def test_a_window_holds_that_many_keys():
    i = np.arange(6)
    for window in (3, jnp.asarray(3)):
        seen = attention.visible(i[:, None], i[None, :], window)
        np.testing.assert_array_equal(seen.sum(1), [1, 2, 3, 3, 3, 3])
        assert seen[5].tolist() == [False] * 3 + [True] * 3
    for window in (0, jnp.asarray(0)):
        np.testing.assert_array_equal(attention.visible(i[:, None], i[None, :], window).sum(1), i + 1)


# spec


@pytest.mark.parametrize("name", list(ORACLES))
def test_a_spec_survives_its_config(name):
    spec = from_hf({**ORACLES[name], "bos_token_id": 2, "eos_token_id": [1, 3]})
    assert from_hf(to_hf(spec)) == spec
    assert from_hf(json.loads(json.dumps(to_hf(spec)))) == spec


def test_configs_of_both_eras_agree():
    old = tiny.CONFIGS["llama"]
    rope = {**tiny.LLAMA3, "rope_theta": 500.0}
    new = {k: v for k, v in old.items() if k not in ("rope_theta", "rope_scaling")}
    assert from_hf({**new, "rope_parameters": rope}) == from_hf(old)
    legacy = {**tiny.LLAMA3, "type": "llama3"}
    del legacy["rope_type"]
    assert from_hf({**old, "rope_scaling": legacy}) == from_hf(old)


def test_defaults_of_absent_keys():
    spec = from_hf({k: v for k, v in tiny.CONFIGS["llama"].items() if not k.startswith(("rope", "head", "tie", "eos"))})
    assert (spec.rope_theta, spec.rope_scaling, spec.head_dim, spec.tied, spec.eos_ids) == (10000.0, None, 4, False, ())
    windowed = {**tiny.CONFIGS["qwen2"], "use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0}
    assert from_hf(windowed).windows == (0, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type: 'mamba'"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type: 'longrope'"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "rope_scaling: low_freq_factor is missing"),
        ({"hidden_act": "relu"}, "hidden_act: 'relu'"),
        ({"mlp_bias": True}, "mlp_bias: True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: {'bits': 4}"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor: 0.5"),
        ({"layer_types": ["full_attention"]}, "layer_types: 1 entries, expected num_hidden_layers = 2"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types: 'linear_attention'"),
        ({"hidden_size": None}, "hidden_size: None, expected a positive integer"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3"),
        ({"head_dim": 5}, "head_dim: 5"),
    ],
)
def test_what_cannot_be_computed_is_refused(changes, message):
    with pytest.raises(ValueError) as error:
        from_hf({**tiny.CONFIGS["llama"], **changes})
    assert message in str(error.value) and "\n" not in str(error.value)


# critic


def test_a_critic_starts_at_zero_on_the_policy_s_features():
    spec = tiny.spec()
    policy = tiny.params(spec)
    params = critic.init(spec, jax.random.key(1), policy=policy)
    trunk = critic.trunk(spec)
    attend = attention.causal()
    hidden, _ = decoder.forward(trunk, params, IDS, positions(IDS), attend)
    np.testing.assert_array_equal(hidden, decoder.forward(spec, policy, IDS, positions(IDS), attend)[0])
    assert not critic.values(params, hidden).any()
    assert "unembed" not in params and "unembed" in policy
    jax.tree.map(lambda x, a: len(a) == x.ndim or pytest.fail(str(a)), params, critic.logical_axes(spec))


def test_a_critic_s_values_are_affine_in_its_hidden_states(x64):
    head = {"weight": jnp.arange(16.0), "bias": jnp.asarray(-2.0)}
    hidden = jnp.asarray(np.random.default_rng(0).standard_normal((3, 5, 16)))
    np.testing.assert_allclose(critic.values({"value": head}, hidden), hidden @ np.arange(16.0) - 2)


def test_automatic_rematerialization_keeps_products_while_they_fit():
    spec = tiny.spec("qwen3")
    few, cpu = decoder.KEPT_ON_CPU // decoder.kept_products(spec, jnp.float32, "cpu"), Target("cpu", "cpu")
    assert decoder.fitting_remat(spec, few, jnp.float32, cpu) == "dots"
    assert decoder.fitting_remat(spec, few + 1, jnp.float32, cpu) == "full"
    assert decoder.fitting_remat(spec, 2 * few, jnp.bfloat16, cpu) == "dots"
    assert decoder.fitting_remat(spec, 2 * few, jnp.float32, Target("tpu", "TPU v5 lite")) == "dots"
