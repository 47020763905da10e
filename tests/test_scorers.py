"""Scorers: the chunked statistics against the plain ones, and their memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.config import Mesh
from jaxrl_llm.models import scorers
from jaxrl_llm.sharding.mesh import make_mesh

NAMES = scorers.VIEWS
HEAT, TEMPERED = 0.7, 1.9


def plain(hidden, unembed, targets):
    """The definitions, on the whole [N,V] array."""
    z = hidden @ unembed
    a = jax.nn.log_softmax(z / HEAT)
    at = jnp.arange(len(targets))
    return {
        "logp": a[at, targets],
        "entropy": -jnp.sum(jnp.exp(a) * a, axis=1),
        "logsumexp": jax.nn.logsumexp(z / HEAT, axis=1),
        "tempered_logp": jax.nn.log_softmax(z / TEMPERED)[at, targets],
        "collision": jnp.sum(jnp.exp(a) ** 2, axis=1),
    }


def chunked(hidden, unembed, targets, names=NAMES, chunk=0):
    return scorers.token_views(hidden, unembed, targets, names, HEAT, TEMPERED, chunk)


def inputs(n=13, d=6, v=17, dtype=np.float64):
    rng = np.random.default_rng(0)
    weights = {k: jnp.asarray(rng.standard_normal(n), dtype) for k in NAMES}
    hidden = jnp.asarray(rng.standard_normal((n, d)), dtype)
    return hidden, jnp.asarray(rng.standard_normal((d, v)), dtype), jnp.asarray(rng.integers(0, v, n)), weights


def gradients(views, hidden, unembed, targets, weights, names=NAMES):
    """Gradients of a weighted sum of squared views: cotangents that differ by token and view."""

    def loss(h, w):
        out = views(h, w, targets)
        return sum(jnp.sum(weights[k] * out[k] ** 2) for k in names)

    return jax.jit(jax.grad(loss, argnums=(0, 1)))(hidden, unembed)


@pytest.mark.parametrize("chunk", [0, 1, 4, 13, 50])
def test_views_and_gradients_equal_the_plain_computation(x64, chunk):
    hidden, unembed, targets, weights = inputs()
    expected = plain(hidden, unembed, targets)
    got = chunked(hidden, unembed, targets, chunk=chunk)
    for name in NAMES:
        assert got[name].dtype == jnp.float64
        np.testing.assert_allclose(got[name], expected[name], rtol=0, atol=1e-10, err_msg=name)
    want = gradients(plain, hidden, unembed, targets, weights)
    have = gradients(lambda h, w, t: chunked(h, w, t, chunk=chunk), hidden, unembed, targets, weights)
    for a, b in zip(have, want):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_each_view_alone_has_its_own_gradient(x64, name):
    hidden, unembed, targets, weights = inputs()
    want = gradients(plain, hidden, unembed, targets, weights, (name,))
    have = gradients(lambda h, w, t: chunked(h, w, t, (name,), 4), hidden, unembed, targets, weights, (name,))
    for a, b in zip(have, want):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10)


def test_bfloat16_hidden_states_score_in_float32():
    hidden, unembed, targets, weights = inputs(dtype=np.float32)
    half = hidden.astype(jnp.bfloat16)
    out = scorers.token_views(half, unembed, targets, ("logp",), chunk=4)["logp"]
    exact = scorers.token_views(half.astype(jnp.float32), unembed.astype(jnp.bfloat16).astype(jnp.float32), targets)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, exact["logp"], atol=1e-5)
    dh, dw = gradients(lambda h, w, t: chunked(h, w, t, chunk=4), half, unembed, targets, weights)
    assert (dh.dtype, dw.dtype) == (jnp.bfloat16, jnp.float32)


def test_temperatures_may_be_traced():
    hidden, unembed, targets, _ = inputs(dtype=np.float32)
    f = jax.jit(lambda t, u: scorers.token_views(hidden, unembed, targets, NAMES, t, u))
    expected = plain(hidden, unembed, targets)
    for name, value in f(HEAT, TEMPERED).items():
        np.testing.assert_allclose(value, expected[name], atol=1e-5)


def temporaries(n, v, d=8, names=NAMES):
    """Bytes of compiled scratch memory of value and gradient, less one float32 [D,V] gradient."""

    def loss(h, w, t):
        return sum(x.sum() for x in scorers.token_views(h, w, t, names, HEAT, TEMPERED).values())

    shapes = [jax.ShapeDtypeStruct(s, t) for s, t in [((n, d), jnp.float32), ((d, v), jnp.float32), ((n,), jnp.int32)]]
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes - 4 * d * v


def test_temporaries_do_not_grow_with_tokens_times_vocabulary(monkeypatch):
    monkeypatch.setattr(scorers, "CHUNK_ELEMENTS", 2**20)
    base = temporaries(2**11, 2**12)
    assert base < 4 * 4 * 2**20  # a few [chunk, V] arrays
    per_token = 4 * 8 * 16  # hidden states, their gradients and the views
    for n, v in [(2**13, 2**12), (2**11, 2**14), (2**13, 2**14)]:
        assert temporaries(n, v) < 1.1 * base + per_token * n, (n, v)


def test_below_the_threshold_there_is_one_chunk():
    assert scorers._chunks(4096, 4096, 0) == 1
    assert scorers._chunks(32 * 1024, 151936, 0) > 50


@pytest.mark.parametrize("sizes", [{"fsdp": 4}, {"dp": 2, "fsdp": 2}, {"fsdp": 2, "tp": 2}])
def test_a_mesh_gives_the_same_views_and_gradients(sizes):
    hidden, unembed, targets, weights = inputs(n=24, d=8, v=32, dtype=np.float32)
    want_views = plain(hidden, unembed, targets)
    want = gradients(plain, hidden, unembed, targets, weights)
    mesh = make_mesh(Mesh(**sizes), jax.devices()[:4])
    spec = jax.sharding.PartitionSpec
    with jax.set_mesh(mesh):
        hidden = jax.device_put(hidden, jax.NamedSharding(mesh, spec(("dp", "fsdp"))))
        place = jax.NamedSharding(mesh, spec("fsdp", "tp"))
        unembed = jax.device_put(unembed, place)
        for chunk in (0, 4, 16):  # of 24 tokens: the last of two chunks of 16 is filled up
            views = jax.jit(lambda h, w, t, chunk=chunk: chunked(h, w, t, chunk=chunk))(hidden, unembed, targets)
            have = gradients(lambda h, w, t, c=chunk: chunked(h, w, t, chunk=c), hidden, unembed, targets, weights)
            for name in NAMES:
                np.testing.assert_allclose(views[name], want_views[name], atol=2e-5)
            for a, b in zip(have, want):
                np.testing.assert_allclose(a, b, atol=2e-4)
            assert have[1].sharding.is_equivalent_to(place, 2)


def test_unknown_views_and_missing_temperatures_are_refused():
    hidden, unembed, targets, _ = inputs(dtype=np.float32)
    with pytest.raises(ValueError, match="'logits' is unknown"):
        scorers.token_views(hidden, unembed, targets, ("logits",))
    with pytest.raises(ValueError, match="tempered_temperature"):
        scorers.token_views(hidden, unembed, targets, ("tempered_logp",))
