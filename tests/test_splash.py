"""JAX's splash kernel in place of `models.attention`, run by Pallas's interpreter."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.config import Mesh
from jaxrl_llm.models import attention, decoder, splash
from jaxrl_llm.models.attention import LayerInfo
from jaxrl_llm.models.spec import from_hf
from jaxrl_llm.sharding import target
from jaxrl_llm.sharding.mesh import make_mesh
from jaxrl_llm.training import layouts

SPEC = from_hf(
    {
        "model_type": "qwen3",
        "vocab_size": 16,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
    }
)
LENGTH = 200
# Two packed rows with padding at both ends; three without any; one position; nothing.
SEGMENTS = [[(5, 100), (100, 190)], [(0, 20), (20, 130), (130, 200)], [(199, 200)], []]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(splash, "BLOCK", splash.LANES)


def segments(rows=SEGMENTS):
    out = np.zeros((len(rows), LENGTH), np.int32)
    for own, row in zip(out, rows):
        for n, (start, end) in enumerate(row):
            own[start:end] = n + 1
    return jnp.asarray(out)


def heads():
    """Queries, keys and values: 4 heads on 2 of width 16."""
    rng, shape = np.random.default_rng(0), (len(SEGMENTS), LENGTH)
    return tuple(jnp.asarray(rng.standard_normal((*shape, n, 16)), jnp.float32) for n in (4, 2, 2))


@partial(jax.jit, static_argnums=(0, 1))
def value_and_gradients(attend, window, qkv, segment, traced):
    """Output where there is no padding, and gradients of a sum over it that weighs every number differently."""
    info = LayerInfo(traced if window is None else window, 0.3)
    real = (segment > 0)[..., None, None]

    def loss(qkv):
        out = jnp.where(real, attend(info, *qkv, segment), 0)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

    return jax.value_and_grad(loss, has_aux=True)(qkv)


def plain(info, q, k, v, segment):
    return attention.causal(segment)(info, q, k, v)[0]


def kernel(info, q, k, v, segment):
    return splash.attend(info, q, k, v, segment, interpret=True)


def agree(have, want):
    for a, b in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(jnp.abs(b).max(), 1))


@pytest.mark.parametrize(("window", "traced"), [(0, 0), (30, 0), (None, 30), (None, 0)])
def test_packed_and_padded_rows_with_grouped_heads_get_the_plain_values_and_gradients(window, traced):
    args = heads(), segments(), jnp.int32(traced)
    agree(value_and_gradients(kernel, window, *args), value_and_gradients(plain, window, *args))


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "tp": 2}, {"dp": 2, "fsdp": 2}])
def test_a_mesh_gives_the_same(sizes):
    args = heads(), segments(), jnp.int32(0)
    want = value_and_gradients(plain, 0, *args)
    with jax.set_mesh(make_mesh(Mesh(**sizes), jax.devices()[:4])):
        agree(value_and_gradients(kernel, 0, *args), want)


def test_padding_is_finite_and_so_are_its_gradients():
    segment = segments()

    def total(qkv):
        return jnp.sum(kernel(LayerInfo(0, 0.3), *qkv, segment))

    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(jax.jit(jax.value_and_grad(total))(heads())))


def shared_piece():
    """Two contexts of a group each, the first one's short completions two in a slot, and a sequence nothing is in."""
    rng = np.random.default_rng(0)
    rows = layouts.HostRows(
        prompt_tokens=rng.integers(1, 16, (2, 60)),
        prompt_length=np.array([60, 33]),
        prompt=np.array([0, 0, 0, 1, 1]),
        tokens=rng.integers(1, 16, (5, 90)),
        length=np.array([40, 90, 50, 70, 1]),
        block=np.zeros(5, int),
    )
    layout = layouts.Layout("shared", sequences=4, context=60, completion=90, slots=2)
    (piece,), _ = layouts.arrange(layout, rows)
    assert len(set(piece.segment[0, 150:].tolist())) == 2  # completions of one slot
    return layout, jax.tree.map(jnp.asarray, piece)


def test_completions_that_share_their_context_get_the_plain_hidden_states_and_gradients(monkeypatch):
    params, (layout, piece) = decoder.init(SPEC, jax.random.key(0)), shared_piece()

    def loss(params):
        states, _ = layouts.hidden(SPEC, params, layout, piece, dtype=jnp.float32, remat="full")
        states = jnp.where((piece.slot < 5 * 90)[..., None], states, 0)
        return jnp.sum(states * jnp.cos(jnp.arange(states.size).reshape(states.shape))), states

    want = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    monkeypatch.setattr(target, "current", lambda: target.Target("tpu", "some"))
    monkeypatch.setattr(splash, "attend", partial(splash.attend, interpret=True))
    agree(jax.jit(jax.value_and_grad(lambda p: loss(p), has_aux=True))(params), want)


def traced_for(monkeypatch, platform, layout, piece, spec=SPEC):
    monkeypatch.setattr(target, "current", lambda: target.Target(platform, "some"))
    params = decoder.abstract(spec)
    return str(jax.make_jaxpr(lambda p: layouts.hidden(spec, p, layout, piece, dtype=jnp.float32)[0])(params))


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_only_programs_for_tpus_have_the_kernel(monkeypatch, platform):
    layout, piece = shared_piece()
    for each in (layout, layout._replace(name="packed")):
        assert ("pallas_call" in traced_for(monkeypatch, platform, each, piece)) == (platform == "tpu")


@pytest.mark.parametrize(("window", "has"), [(149, False), (150, True)])
def test_a_window_narrower_than_a_context_and_a_completion_is_left_to_plain_attention(monkeypatch, window, has):
    spec = replace(SPEC, windows=(window,) * SPEC.layers)
    assert ("pallas_call" in traced_for(monkeypatch, "tpu", *shared_piece(), spec)) == has


@pytest.mark.parametrize(
    ("shape", "has"),
    [
        ({}, True),
        ({"length": 2**15 + 1}, False),
        ({"kv_heads": 1}, False),
        ({"heads": 5}, False),
        ({"window": 100}, True),
        ({"window": None}, True),
        ({"context": 512, "slot": 1024}, True),
        ({"context": 512, "slot": 1024, "window": None}, False),
    ],
)
def test_shapes_the_kernel_suits(shape, has):
    assert splash.suits(**{"length": 2**15, "heads": 4, "kv_heads": 2, "tp": 2, "window": 0} | shape) == has
