"""Meshes and rules: the same numbers on every mesh, and what does not fit is said."""

import logging
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from jaxrl_llm.config import Mesh
from jaxrl_llm.models import attention, decoder, scorers
from jaxrl_llm.sharding import rules
from jaxrl_llm.sharding.mesh import AXES, make_mesh

MESHES = [{"fsdp": 1}, {"fsdp": 4}, {"fsdp": 2, "tp": 2}, {"dp": 2, "fsdp": 1, "tp": 2}, {"fsdp": 2, "ep": 2}]


def mesh_of(sizes):
    n = int(np.prod(list(sizes.values())))
    return make_mesh(Mesh(**sizes), jax.devices()[:n])


def loss(spec, params, tokens):
    """Mean negative log-likelihood and entropy, through the model and the scorers."""
    at = jnp.arange(tokens.shape[1] - 1)[None]
    hidden, _ = decoder.forward(spec, params, tokens[:, :-1], at, attention.causal())
    hidden = hidden.reshape(-1, spec.embed)
    views = scorers.token_views(hidden, decoder.unembed(spec, params), tokens[:, 1:].reshape(-1), ("logp", "entropy"))
    return -views["logp"].mean() + 0.1 * views["entropy"].mean()


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_loss_and_gradients_are_the_same_on_every_mesh(family):
    spec = tiny.spec(family, attention_bias=True)
    params, tokens = tiny.params(spec), tiny.tokens(8, 11)  # ten positions, which tp divides
    expected, gradient = jax.jit(jax.value_and_grad(lambda p: loss(spec, p, tokens)))(params)
    for sizes in MESHES:
        mesh = mesh_of(sizes)
        layout = rules.shardings(decoder.logical_axes(spec), params, mesh)
        with jax.set_mesh(mesh):
            f = jax.jit(jax.value_and_grad(lambda p, t: loss(spec, p, t)), out_shardings=(None, layout))
            value, g = f(jax.device_put(params, layout), jax.device_put(tokens, rules.batch_sharding(mesh)))
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), g, gradient)


def test_what_enters_a_layer_is_kept_in_parts_over_tp():
    """For the backward pass, stacked over layers: with all positions on every device it would be most of a large model's memory."""
    spec, (b, s) = tiny.spec(num_hidden_layers=3), (2, 16)
    mesh = mesh_of({"fsdp": 1, "tp": 4})
    layout = rules.shardings(decoder.logical_axes(spec), decoder.abstract(spec), mesh)
    given = jax.tree.map(
        lambda x, on: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on), decoder.abstract(spec), layout
    )

    def loss(params, tokens):
        at = jnp.arange(s)[None]
        return decoder.forward(spec, params, tokens, at, attention.causal(), remat="full")[0].sum()

    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss)).lower(given, jax.ShapeDtypeStruct((b, s), jnp.int32)).compile().as_text()
    assert f"f32[3,{b},{s // 4},{spec.embed}]" in text
    assert f"f32[3,{b},{s},{spec.embed}]" not in text


def test_random_parameters_are_the_same_on_every_mesh():
    spec = tiny.spec()
    expected = jax.jit(lambda k: decoder.init(spec, k))(jax.random.key(3))
    mesh = mesh_of({"fsdp": 2, "tp": 2})
    layout = rules.shardings(decoder.logical_axes(spec), decoder.abstract(spec), mesh)
    params = jax.jit(lambda k: decoder.init(spec, k), out_shardings=layout)(jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert params["layers"]["q"].sharding.spec == P(None, "fsdp", "tp", None)
    assert params["embed"].sharding.spec == P("tp", "fsdp")
    assert params["norm"].sharding.is_fully_replicated


def test_constraints_act_on_cpu_and_need_a_mesh():
    x = jnp.zeros((4, 6, 8))
    constrained = jax.jit(lambda x: rules.constrain(x + 1, "batch", "seq", "heads"))
    assert len(constrained(x).sharding.device_set) == 1
    with jax.set_mesh(mesh_of({"fsdp": 2, "tp": 2})):
        assert constrained(x).sharding.spec == P("fsdp", None, "tp")


def test_inside_shard_map_only_the_other_axes_are_pinned():
    mesh = mesh_of({"fsdp": 2, "tp": 2})
    seen = []

    def local(x):
        seen.append((x.shape, rules.ways("batch"), rules.ways("batch", "vocab")))
        return rules.constrain(x + 1, "batch", "vocab")

    with jax.set_mesh(mesh):
        assert (rules.ways("batch"), rules.ways("batch", "vocab")) == (2, 4)
        mapped = jax.shard_map(local, in_specs=P("fsdp"), out_specs=P("fsdp"), axis_names={"fsdp"})
        np.testing.assert_array_equal(jax.jit(mapped)(jnp.zeros((4, 6))), np.ones((4, 6)))
    assert seen[0] == ((2, 6), 1, 2)
    assert rules.ways("batch") == 1


def test_what_does_not_divide_is_replicated_with_one_warning(caplog):
    spec = tiny.spec("qwen3", vocab_size=33)  # and 2 kv heads on tp 4
    mesh = mesh_of({"fsdp": 1, "tp": 4})
    with caplog.at_level(logging.WARNING):
        layout = rules.shardings(decoder.logical_axes(spec), decoder.abstract(spec), mesh)
    assert layout["layers"]["k"].spec == P(None, None, None, None)
    assert layout["layers"]["q"].spec == P(None, None, "tp", None)
    assert layout["embed"].spec == P(None, None)
    (record,) = caplog.records
    assert all(name in record.message for name in ("layers.k.kv_heads", "embed.vocab", "unembed.vocab"))
    params, tokens = tiny.params(spec), tiny.tokens(2, 6)
    with jax.set_mesh(mesh):
        value = jax.jit(lambda p: loss(spec, p, tokens))(jax.device_put(params, layout))
    np.testing.assert_allclose(value, loss(spec, params, tokens), rtol=1e-5)


def test_rules_refuse_what_makes_no_sense():
    with pytest.raises(ValueError, match="'width' is not a logical axis"):
        rules.partition(("width",), (4,), {"tp": 2})
    with pytest.raises(ValueError, match="two dimensions"):
        rules.partition(("heads", "mlp"), (4, 4), {"tp": 2})
    with pytest.raises(ValueError, match="axis names"):
        rules.partition(("heads",), (4, 4), {"tp": 2})


def test_every_axis_exists_and_minus_one_takes_the_rest():
    assert dict(make_mesh().shape) == dict.fromkeys(AXES, 1)
    assert make_mesh(Mesh(), jax.devices()[:4]).shape["fsdp"] == 4
    assert make_mesh(Mesh(dp=-1, fsdp=1, tp=2), jax.devices()).shape["dp"] == 4


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"dp": -1}, "dp and fsdp are both -1"),
        ({"tp": 3}, "do not divide 8 devices"),
        ({"fsdp": 16}, "needs 16 devices, there are 8"),
        ({"tp": 0}, "mesh.tp: 0"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(Mesh(**sizes), jax.devices())


def test_fewer_devices_than_there_are_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        assert make_mesh(Mesh(fsdp=2)).size == 2
    assert "2 of 8 devices" in caplog.text


@dataclass(frozen=True)
class Chip:
    """A device as far as a mesh looks at it."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "stub"
    device_kind: str = "stub"


def test_dp_goes_across_slices_and_the_other_axes_stay_inside():
    chips = [Chip(i, slice_index=i % 2) for i in range(8)]
    mesh = make_mesh(Mesh(dp=2, fsdp=2, tp=2), chips)
    assert dict(mesh.shape) == {"dp": 2, "fsdp": 2, "tp": 2, "ep": 1, "sp": 1}
    assert [{chip.slice_index for chip in replica.flat} for replica in mesh.devices] == [{0}, {1}]
    with pytest.raises(ValueError, match=r"mesh\.dp=1: the devices are in 2 slices, expected a multiple of that"):
        make_mesh(Mesh(dp=1, fsdp=8), chips)
