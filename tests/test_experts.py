"""Sparse layers: what the router weighs, that no token is dropped, and that recorded choices can be replayed."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxrl_llm.config import Mesh
from jaxrl_llm.models import attention, decoder, experts, hf, scorers
from jaxrl_llm.models.spec import from_hf, to_hf
from jaxrl_llm.sharding import rules
from jaxrl_llm.sharding.mesh import make_mesh

Z = np.array([[1.0, 0.5, -1.0, 0.2]])
MIXED = tiny.spec("qwen3_moe")
TOKENS = tiny.tokens(2, 9)


def spread(chosen, weight, count=4):
    return np.asarray((jax.nn.one_hot(chosen, count) * weight[..., None]).sum(-2)[0])


@pytest.mark.parametrize(
    ("replay", "norm_topk", "expected"),
    [
        (None, True, [0.62245933, 0.37754067, 0, 0]),
        ([[2, 0]], True, [0.88079708, 0, 0.11920292, 0]),
        ([[2, 0]], False, [0.45637200, 0, 0.06176323, 0]),
        ([[-1, -1]], True, [0.62245933, 0.37754067, 0, 0]),
    ],
)
def test_known_weights_of_chosen_and_replayed_experts(x64, replay, norm_topk, expected):
    chosen = experts.choose(jnp.asarray(Z), 2, None if replay is None else jnp.asarray(replay))
    np.testing.assert_allclose(spread(chosen, experts.gates(jnp.asarray(Z), chosen, norm_topk)), expected, atol=1e-8)


def test_replayed_experts_keep_the_router_s_gradient(x64):
    chosen = jnp.asarray([[2, 0]])
    both, all_ = (jax.grad(lambda z, n=n: experts.gates(z, chosen, n)[0, 0])(jnp.asarray(Z)) for n in (True, False))
    p, q = 0.11920292, jax.nn.softmax(Z[0])
    np.testing.assert_allclose(both[0], [-p * (1 - p), 0, p * (1 - p), 0], atol=1e-8)
    np.testing.assert_allclose(all_[0], q[2] * (np.arange(4) == 2) - q[2] * q, atol=1e-12)


def layer(dtype=np.float64, count=5, embed=6, width=7, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"gate": (count, embed, width), "up": (count, embed, width), "down": (count, width, embed)}
    return {name: jnp.asarray(rng.standard_normal(shape), dtype) for name, shape in shapes.items()}


def test_sorted_groups_equal_one_expert_after_another_and_a_loop_over_tokens(x64):
    p, rng = layer(), np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((11, 6)))
    chosen = jax.lax.top_k(jnp.asarray(rng.standard_normal((11, 5))).at[:, 3].set(-9), 2)[1]  # nobody goes to expert 3
    weight = jnp.asarray(rng.random((11, 2))).at[4, 1].set(0)  # its gradient is not 0 for that

    def one(e, t):
        return (jax.nn.silu(x[t] @ p["gate"][e]) * (x[t] @ p["up"][e])) @ p["down"][e]

    expected = [sum(weight[t, i] * one(chosen[t, i], t) for i in range(2)) for t in range(11)]

    def gradient(run):
        return jax.jit(jax.grad(lambda p, x, w: jnp.sin(run(p, x, chosen, w, jax.nn.silu)).sum(), argnums=(0, 1, 2)))

    gradients = []
    for run in (experts.one_by_one, experts.by_groups):
        np.testing.assert_allclose(run(p, x, chosen, weight, jax.nn.silu), np.stack(expected), atol=1e-12)
        gradients.append(gradient(run)(p, x, weight))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), *gradients)
    assert not gradients[0][0]["gate"][3].any() and gradients[0][2].all()


def test_all_tokens_may_go_to_one_expert(x64):
    p, x = layer(), jnp.asarray(np.random.default_rng(1).standard_normal((8, 6)))
    chosen, weight = jnp.full((8, 1), 4), jnp.ones((8, 1))
    expected = (jax.nn.silu(x @ p["gate"][4]) * (x @ p["up"][4])) @ p["down"][4]
    for run in (experts.one_by_one, experts.by_groups):
        np.testing.assert_allclose(run(p, x, chosen, weight, jax.nn.silu), expected, atol=1e-12)


def test_an_expert_a_token_has_not_chosen_cannot_spoil_it(x64):
    p = layer()
    p = {**p, "gate": p["gate"].at[2].set(jnp.inf)}
    x = jnp.ones((3, 6))
    out = experts.one_by_one(p, x, jnp.zeros((3, 1), int), jnp.ones((3, 1)), jax.nn.silu)
    assert np.isfinite(out).all()


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "ep": 2}, {"fsdp": 2, "tp": 2}], ids=str)
def test_sorted_groups_are_the_same_on_every_mesh(sizes, monkeypatch):
    monkeypatch.setattr(experts, "_one_by_one", lambda _: False)
    params = tiny.params(MIXED)

    def objective(p, tokens):
        at = jnp.arange(tokens.shape[1])[None]
        return jnp.sin(decoder.forward(MIXED, p, tokens, at, attention.causal(), remat="dots")[0]).mean()

    expected = jax.jit(jax.value_and_grad(objective))(params, TOKENS)
    mesh = make_mesh(Mesh(**sizes), jax.devices()[:4])
    layout = rules.shardings(decoder.logical_axes(MIXED), params, mesh)
    with jax.set_mesh(mesh):
        tokens = jax.device_put(TOKENS, rules.batch_sharding(mesh))
        found = jax.jit(jax.value_and_grad(objective))(jax.device_put(params, layout), tokens)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)


# in the decoder


@partial(jax.jit, static_argnames=("spec", "remat"))
def forward(params, replay=None, spec=MIXED, remat="none", tokens=TOKENS):
    at, dtype = jnp.arange(tokens.shape[1])[None], params["norm"].dtype
    return decoder.forward(spec, params, tokens, at, attention.causal(), dtype=dtype, remat=remat, replay=replay)


def logp(params, replay=None, remat="none"):
    hidden, kept = forward(params, replay, remat=remat)
    logits = scorers.logits(hidden, decoder.unembed(MIXED, params))
    return jnp.take_along_axis(jax.nn.log_softmax(logits)[:, :-1], TOKENS[:, 1:, None], -1)[..., 0], kept.routes


def moved(params, by=0.5, seed=5):
    """Other parameters nearby, whose router chooses differently."""
    other = tiny.params(MIXED, seed, params["norm"].dtype)
    return jax.tree.map(lambda a, b: a + by * b, params, other)


def test_every_position_of_a_sparse_layer_records_distinct_experts():
    _, kept = forward(tiny.params(MIXED))
    assert kept.routes.shape == (2, 2, 9, 2) and kept.routes.dtype == jnp.int16
    assert (kept.routes[..., 0] != kept.routes[..., 1]).all()
    assert set(np.unique(kept.routes)) == {0, 1, 2, 3}
    dense = tiny.spec("qwen3")
    assert forward(tiny.params(dense), spec=dense)[1].routes is None


def test_replaying_its_own_choice_changes_nothing(x64):
    params = tiny.params(MIXED, dtype=np.float64)
    own, routes = logp(params)
    again, replayed = logp(params, routes)
    np.testing.assert_array_equal(own, again)
    np.testing.assert_array_equal(routes, replayed)
    natural = jax.grad(lambda p: logp(p)[0].sum())(params)
    gradient = jax.grad(lambda p: logp(p, routes)[0].sum())(params)
    jax.tree.map(np.testing.assert_array_equal, natural, gradient)


def test_other_parameters_replay_the_recorded_experts_with_weights_of_their_own(x64):
    params = tiny.params(MIXED, dtype=np.float64)
    _, routes = logp(params)
    other = moved(params)
    natural, own = logp(other)
    replayed, kept = logp(other, routes)
    assert (own != routes).any()
    np.testing.assert_array_equal(kept, routes)
    assert np.abs(replayed - natural).max() > 1e-3
    router = jax.grad(lambda p: logp(p, routes)[0].sum())(other)["layers"]["experts"]["router"]
    assert (np.abs(router).max((1, 2)) > 1e-3).all()


def test_positions_without_recorded_experts_are_routed_as_ever(x64):
    params = tiny.params(MIXED, dtype=np.float64)
    _, routes = logp(params)
    other = moved(params)
    nowhere = jnp.full_like(routes, -1)
    np.testing.assert_array_equal(logp(other, nowhere)[0], logp(other)[0])
    early = routes.at[:, :, 5:].set(-1)
    np.testing.assert_array_equal(logp(other, early)[1][:, :, :5], routes[:, :, :5])
    late = routes.at[:, :, :5].set(-1)
    np.testing.assert_allclose(logp(other, late)[0][:, :4], logp(other)[0][:, :4], atol=1e-12)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_replay_is_the_same_where_layers_are_computed_again(x64, remat):
    params = tiny.params(MIXED, dtype=np.float64)
    _, routes = logp(params)
    other = moved(params)
    gradient = jax.jit(jax.grad(lambda p, r, remat: jnp.sin(logp(p, r, remat)[0]).sum()), static_argnames="remat")
    expected, found = gradient(other, routes, remat="none"), gradient(other, routes, remat=remat)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), found, expected)


def test_known_answer_without_normalised_weights(x64, tmp_path):
    import test_models

    path = test_models.known_directory(tmp_path, "qwen3_moe", norm_topk_prob=False)
    spec, params = hf.load(path, dtype=jnp.float64)
    out = test_models.logits(spec, params, test_models.IDS, dtype=jnp.float64)
    np.testing.assert_allclose(out[0, -1, :4], [0.299305, -0.684043, -0.217221, -1.105335], atol=2e-6)
    nll = -jax.nn.log_softmax(out[0])[np.arange(7), test_models.IDS[0, 1:]].mean()
    np.testing.assert_allclose([nll, (out**2).sum() / 100], [3.956571, 2.817807], atol=2e-6)


# spec


def test_layers_with_experts_are_read_from_either_rule():
    kinds = {1: (True, False, True), 2: (False, False, False), 3: (False, False, True)}
    assert MIXED.sparse == kinds[1]
    assert tiny.spec("qwen3_moe", decoder_sparse_step=3).sparse == kinds[3]
    with pytest.raises(ValueError, match=r"mlp_only_layers: \[0, 1, 2\], expected at least one layer with experts"):
        tiny.spec("qwen3_moe", decoder_sparse_step=2)
    assert tiny.spec("qwen3").sparse == (False, False)


def test_the_number_of_experts_has_two_names():
    config = to_hf(MIXED)
    config["num_local_experts"] = config.pop("num_experts")
    assert from_hf(config) == MIXED
    assert not tiny.spec("qwen3_moe", norm_topk_prob=None).experts.norm_topk


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 5}, "num_experts_per_tok: 5, expected at most num_experts = 4"),
        ({"num_experts": None}, "num_experts: None, expected a positive integer"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size: 0, expected a positive integer"),
    ],
)
def test_impossible_experts_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny.spec("qwen3_moe", **changes)


def test_what_a_backward_pass_keeps_counts_every_expert_on_a_cpu():
    bytes_of = partial(decoder.kept_products, dtype=jnp.float32, platform="cpu")
    dense, sparse = bytes_of(tiny.spec("qwen3", num_hidden_layers=1)), bytes_of(MIXED)
    assert sparse - 3 * dense == 4 * 2 * (4 + 4 * (2 * 12 + 16) - (2 * 24 + 16))
