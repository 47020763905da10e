"""Programs compiled for TPUs that are not there, and what is read from the text of compiled programs."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_llm import cli, config_load
from jaxrl_llm.config import Mesh
from jaxrl_llm.models import scorers
from jaxrl_llm.planning import hlo, topology
from jaxrl_llm.sharding import target
from jaxrl_llm.sharding.mesh import make_mesh
from jaxrl_llm.training import plan

try:
    topology.devices("v5e:2x2")
    MISSING = ""
except ValueError as error:
    MISSING = str(error)
needs_libtpu = pytest.mark.skipif(bool(MISSING), reason=MISSING)

CONFIG = """
model:
  dtype: bfloat16
  remat: full
  spec: {model_type: qwen3, hidden_size: 512, intermediate_size: 1024, num_hidden_layers: 2, num_attention_heads: 8,
         num_key_value_heads: 4, head_dim: 64, vocab_size: 8192, max_position_embeddings: 4096, tie_word_embeddings: true}
tokenizer: {chars: "0123456789+= "}
task: {kind: reasoning_gym, datasets: [{name: chain_sum}]}
rollout: {prompts: 4, group_size: 4, max_prompt: 128, max_new: 128}
learner: {microbatch_rows: 16}
mesh: {fsdp: 4}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("topology") / "base.yaml"
    path.write_text(CONFIG)
    return lambda *overrides: config_load.load(path, list(overrides))


@pytest.fixture(scope="module")
def report(config):
    return topology.make(config(), "v5e:2x2")


def mesh(**sizes):
    return make_mesh(Mesh(**sizes), jax.devices()[:4])


def work(f, *args, **kw):
    return hlo.read(jax.jit(f, **kw).lower(*args).compile().as_text())


# The text of compiled programs


def test_matrix_products_count_as_often_as_their_loop_runs():
    x, w = jnp.ones((8, 32)), jnp.ones((5, 32, 32))
    assert work(lambda x, w: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0], x, w).flops == 5 * 2 * 8 * 32 * 32


def test_batched_products_cost_what_xla_says():
    a, b, c = jnp.ones((4, 16, 24)), jnp.ones((4, 24, 8)), jnp.ones((8, 8))

    def f(a, b, c):
        return jnp.einsum("nij,njk->nik", a, b) @ c

    expected = 2 * 4 * 16 * 24 * 8 + 2 * 4 * 16 * 8 * 8
    assert work(f, a, b, c).flops == expected


def test_a_batched_product_written_as_a_dilated_convolution_has_no_more_products():
    """As TPU programs have it: the batch of 4 is a spatial dimension, and its window meets one element at each place."""
    text = """
ENTRY %main (a: f32[4,16,24], b: f32[4,24,8]) -> f32[4,16,8] {
  %a = f32[4,16,24]{2,1,0} parameter(0)
  %b = f32[4,24,8]{2,1,0} parameter(1)
  ROOT %c = f32[4,16,8]{2,1,0} convolution(%a, %b), window={size=4 stride=3 pad=0_0 lhs_dilate=4}, dim_labels=0bf_0io->0bf
}
"""
    assert hlo.read(text).flops == 2 * 4 * 16 * 24 * 8


def test_a_slice_of_a_stack_is_traffic_of_the_slice():
    text = """
%fused (p: f32[10,64], i: s32[]) -> f32[1,64] {
  %p = f32[10,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %s = f32[1,64]{1,0} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,64}
}

ENTRY %main (p: f32[10,64], i: s32[]) -> f32[1,64] {
  %p = f32[10,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %f = f32[1,64]{1,0} fusion(%p, %i), kind=kLoop, calls=%fused
}
"""
    assert hlo.read(text).bytes == 2 * 64 * 4 + 4


def test_what_stays_in_the_core_s_own_memory_is_no_traffic():
    text = """
ENTRY %main (p: f32[64]) -> f32[64] {
  %p = f32[64]{0:T(128)} parameter(0)
  %c = f32[64]{0:T(128)S(1)} copy(%p)
  ROOT %n = f32[64]{0:T(128)} negate(%c)
}
"""
    assert hlo.read(text).bytes == 2 * 64 * 4


def test_a_collective_whose_steps_are_spread_over_a_loop_runs_once_and_is_no_traffic_of_it():
    text = """
%start (p: f32[4]) -> f32[8] {
  %p = f32[4]{0} parameter(0)
  ROOT %g = f32[8]{0} all-gather(%p), channel_id=3, replica_groups={{0,1}}, dimensions={0}
}

%step (p: f32[4], q: f32[8], x: f32[100]) -> (f32[8], f32[100]) {
  %p = f32[4]{0} parameter(0)
  %q = f32[8]{0} parameter(1)
  %x = f32[100]{0} parameter(2)
  %n = f32[100]{0} negate(%x)
  %g = f32[8]{0} all-gather(%p), channel_id=3, replica_groups={{0,1}}, dimensions={0}
  ROOT %t = (f32[8]{0}, f32[100]{0}) tuple(%g, %n)
}

%body (c: (s32[], f32[4], f32[8], f32[100])) -> (s32[], f32[4], f32[8], f32[100]) {
  %c = (s32[], f32[4]{0}, f32[8]{0}, f32[100]{0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %p = f32[4]{0} get-tuple-element(%c), index=1
  %q = f32[8]{0} get-tuple-element(%c), index=2
  %x = f32[100]{0} get-tuple-element(%c), index=3
  %f = (f32[8]{0}, f32[100]{0}) fusion(%p, %q, %x), kind=kCustom, calls=%step
  ROOT %t = (s32[], f32[4]{0}, f32[8]{0}, f32[100]{0}) tuple(%i, %p, %q, %x)
}

%condition (c: (s32[], f32[4], f32[8], f32[100])) -> pred[] {
  %c = (s32[], f32[4]{0}, f32[8]{0}, f32[100]{0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %end = s32[] constant(6)
  ROOT %less = pred[] compare(%i, %end), direction=LT
}

ENTRY %main (p: f32[4], x: f32[100]) -> f32[8] {
  %p = f32[4]{0} parameter(0)
  %x = f32[100]{0} parameter(1)
  %zero = s32[] constant(0)
  %q = f32[8]{0} fusion(%p), kind=kCustom, calls=%start
  %c = (s32[], f32[4]{0}, f32[8]{0}, f32[100]{0}) tuple(%zero, %p, %q, %x)
  ROOT %w = (s32[], f32[4]{0}, f32[8]{0}, f32[100]{0}) while(%c), condition=%condition, body=%body
}
"""
    seen = hlo.read(text)
    assert seen.collectives == {"all-gather": (1, 16.0)}
    assert seen.bytes == 6 * 2 * 400


def test_a_sum_fused_with_the_slice_that_is_used_of_it_is_a_reduce_scatter():
    text = """
%all-reduce-scatter (p: f32[8,64], i: s32[]) -> f32[2,64] {
  %p = f32[8,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %r = f32[8,64]{1,0} all-reduce(%p), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %s = f32[2,64]{1,0} dynamic-slice(%r, %i, %zero), dynamic_slice_sizes={2,64}
}

ENTRY %main (p: f32[8,64], i: s32[]) -> f32[2,64] {
  %p = f32[8,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %f = f32[2,64]{1,0} fusion(%p, %i), kind=kCustom, calls=%all-reduce-scatter
}
"""
    assert hlo.read(text).collectives == {"reduce-scatter": (1, 8 * 64 * 4 * 3 / 4)}


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("{{0,1},{2,3}}", 2),
        ("[2,4]<=[8]", 4),
        ("mesh['axis_0'=2,'axis_1'=8] {'axis_1'}", 8),
        ("mesh['axis_0'=2,'axis_1'=1,'axis_2'=4], device_ids=([4,2]T(1,0)) {'axis_2'}", 4),
    ],
)
def test_a_collective_s_group_is_read_in_every_notation(groups, devices):
    text = f"""
ENTRY %main (p: f32[100]) -> f32[100] {{
  %p = f32[100]{{0}} parameter(0)
  ROOT %r = f32[100]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add
}}
"""
    assert hlo.read(text).sent == pytest.approx(2 * 400 * (devices - 1) / devices)


def test_what_hosts_exchange_between_slices_is_not_sent_over_the_links_of_one():
    text = """
ENTRY %main (p: f32[100]) -> f32[100] {
  %p = f32[100]{0} parameter(0)
  %t = token[] after-all()
  %s = (f32[100]{0}, u32[], token[]) send(%p, %t), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  %d = token[] send-done(%s), channel_id=2, is_host_transfer=true
  ROOT %g = f32[400]{0} all-gather(%p), channel_id=2, replica_groups={{0,1,2,3}}, dimensions={0}
}
"""
    seen = hlo.read(text)
    assert seen.collectives == {hlo.SLICES: (1, 400.0), "all-gather": (1, 1200.0)}
    assert (seen.sent, seen.exchanged) == (1200.0, 400.0)


# Communication volume, on virtual CPU devices


def test_fsdp_gathers_each_weight_once_and_reduces_its_gradient():
    """(n-1)/n of the weight received by each device in the forward, and twice that for the all-reduced gradient."""
    on, n, (d, f) = mesh(fsdp=4), 4, (64, 256)
    w = jax.ShapeDtypeStruct((d, f), jnp.float32, sharding=NamedSharding(on, PartitionSpec("fsdp")))
    x = jax.ShapeDtypeStruct((32, d), jnp.float32, sharding=NamedSharding(on, PartitionSpec("fsdp")))
    whole, split = NamedSharding(on, PartitionSpec()), NamedSharding(on, PartitionSpec("fsdp"))

    def forward(w, x):
        return x @ jax.lax.with_sharding_constraint(w, whole)

    seen = work(forward, w, x, out_shardings=split)
    assert seen.collectives == {"all-gather": (1, d * f * 4 * (n - 1) / n)}

    def gradient(w, x):
        return jax.lax.with_sharding_constraint(x, split).T @ jax.lax.with_sharding_constraint(forward(w, x), split)

    reduced = work(gradient, w, x, out_shardings=split).collectives
    sent = sum(v for kind, (_, v) in reduced.items() if kind in ("all-reduce", "reduce-scatter"))
    scattered, everywhere = d * f * 4 * (n - 1) / n, 2 * d * f * 4 * (n - 1) / n
    assert any(sent == pytest.approx(volume) for volume in (scattered, everywhere))


def test_tp_reduces_one_activation_for_each_pair_of_products():
    """Column-parallel then row-parallel: one all-reduce of [tokens, D], 2 (n-1)/n of it sent by each device."""
    on, n, (tokens, d, f) = mesh(tp=4, fsdp=1), 4, (32, 64, 256)
    place = [PartitionSpec(), PartitionSpec(None, "tp"), PartitionSpec("tp")]
    shapes = [(tokens, d), (d, f), (f, d)]
    x, up, down = (jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(on, p)) for s, p in zip(shapes, place))
    seen = work(
        lambda x, up, down: jnp.tanh(x @ up) @ down, x, up, down, out_shardings=NamedSharding(on, PartitionSpec())
    )
    assert seen.collectives == {"all-reduce": (1, 2 * tokens * d * 4 * (n - 1) / n)}


@pytest.mark.parametrize("sizes", [{"fsdp": 4}, {"dp": 2, "fsdp": 2}, {"dp": 4, "fsdp": 1}])
def test_the_output_matrix_s_gradient_is_reduced_once_however_many_chunks_of_logits_there_are(sizes):
    on, (tokens, d, v), n = mesh(**sizes), (64, 32, 256), 4
    split, place = (NamedSharding(on, PartitionSpec(*axes)) for axes in [(("dp", "fsdp"),), ("fsdp", "tp")])
    given = [
        jax.ShapeDtypeStruct((tokens, d), jnp.float32, sharding=split),
        jax.ShapeDtypeStruct((d, v), jnp.float32, sharding=place),
        jax.ShapeDtypeStruct((tokens,), jnp.int32, sharding=split),
    ]

    def loss(hidden, unembed, targets):
        return scorers.token_views(hidden, unembed, targets, chunk=8)["logp"].sum()

    with jax.set_mesh(on):
        seen = work(jax.grad(loss, (0, 1)), *given, out_shardings=(split, place)).collectives
    times, sent = (sum(x) for x in zip(*(c for kind, c in seen.items() if kind in ("all-reduce", "reduce-scatter"))))
    assert times == 1 and sent <= 2 * d * v * 4 * (n - 1) / n


# What the user gives


@pytest.mark.parametrize(
    "name", ["v5e", "v5e:4", "v5e:4x0", "v5p:4x4", "v9:2x2", "v5e:4xx4", "h100:8x8", "0xv5e:2x2", "x2v5e:2x2"]
)
def test_a_topology_that_is_none_is_one_clear_line(name):
    with pytest.raises(ValueError, match=re.escape(f"--topology {name!r}: expected v5e:AxB")):
        topology.parse(name)


def test_devices_and_topology_exclude_each_other(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text(CONFIG)
    assert cli.main(["plan", str(path), "--devices", "4", "--topology", "v5e:2x2"]) == 2
    assert "--topology says how many there are" in capsys.readouterr().err


def test_a_program_follows_the_platform_of_its_mesh():
    seen = []
    with jax.set_mesh(mesh(fsdp=4)):
        jax.jit(lambda x: seen.append(target.current()) or x).lower(1.0)
    assert seen == [target.own()] and seen[0].platform == "cpu"


# Compiled for TPUs


@needs_libtpu
def test_a_program_for_tpus_is_traced_for_tpus():
    on, seen = make_mesh(Mesh(fsdp=4), topology.devices("v5e:2x2")), []
    with jax.set_mesh(on):
        jax.jit(lambda x: seen.append(target.current()) or x).lower(1.0)
    assert seen == [target.Target("tpu", "TPU v5 lite")]


@needs_libtpu
@pytest.mark.parametrize(("name", "chips"), [("v5e:1x1", 1), ("v6e:4x4", 16), ("v5p:2x2x2", 8), ("2xv5e:2x2", 8)])
def test_every_chip_of_a_topology_is_a_device_of_its_kind(name, chips):
    found = topology.devices(name)
    asked = topology.parse(name)
    assert [d.device_kind for d in found] == [asked.chip.kind] * chips and asked.chips == chips


@needs_libtpu
def test_a_step_compiles_for_a_slice_and_fits(report):
    names = ["prepare_layer", "prepare", "prefill", "decode", "rescore", "gradient", "apply"]
    assert [p.name for p in report.programs] == names
    assert report.fits and all(p.memory for p in report.programs)
    assert {p.name: p.runs for p in report.programs} == {
        "prepare_layer": 2,
        "prepare": 1,
        "prefill": 1,
        "decode": 128,
        "rescore": 1,
        "gradient": 1,
        "apply": 1,
    }


@needs_libtpu
def test_the_gradient_costs_what_the_formula_for_transformers_says(report):
    """6 FLOPs per parameter and token, 2 more where the forward is computed again, and attention."""
    gradient = next(p for p in report.programs if p.name == "gradient")
    layout, head = report.step.layout, 8192 * 512
    tokens, scored = layout.sequences * layout.length, layout.sequences * layout.slots * layout.completion
    least = 6 * ((report.step.parameters["policy"] - head) * tokens + head * scored) / 4
    assert gradient.work is not None
    assert 1.0 < gradient.work.flops / least < 2.0


def lowered(settings, name):
    """The programs of a step, before they are compiled, for a slice or several."""
    on = make_mesh(settings.mesh, topology.devices(name))
    step = plan.make(settings, on.size, target.of(on))
    programs, _ = topology._lower(settings, step, on)
    return step, {program: text for program, _, text, _ in programs}


@needs_libtpu
def test_fsdp_gathers_weights_once_forwards_and_at_most_twice_backwards_and_reduces_gradients_once(report):
    """In bfloat16, but for the output matrix's gradient; a sum that is given to all is sent twice, a scattered one once."""
    gradient = next(p.work for p in report.programs if p.name == "gradient")
    share, head = 3 / 4, 8192 * 512  # of four chips; the embedding is the output matrix
    layers = report.step.parameters["policy"] - head
    sent = {kind: n for kind, (_, n) in gradient.collectives.items()}
    assert 2 * share * (2 * layers + head) <= sent["all-gather"] <= 2 * share * (3 * layers + head)
    scattered = share * (2 * layers + 4 * head)
    assert scattered <= sent["all-reduce"] + sent["reduce-scatter"] <= 2 * scattered


@needs_libtpu
def test_the_whole_gradient_of_the_output_matrix_is_gone_before_the_layers_are_differentiated(config):
    """A chip's sum of it over its tokens, and over chips: libtpu scatters a sum only along one side of a slice."""
    small = ["hidden_size=128", "intermediate_size=128", "num_attention_heads=2", "num_key_value_heads=2"]
    overrides = [f"model.spec.{each}" for each in (*small, "vocab_size=65536")]
    _, programs = lowered(config("mesh.fsdp=16", *overrides), "v5e:4x4")
    computations, entry = hlo._parse(programs["gradient"].compile().as_text())
    run = computations[entry]  # as scheduled
    (whole,) = [i.name for i in run if i.op == "all-reduce" and "[128,65536]" in i.type]
    last_use = max(at for at, i in enumerate(run) if whole in i.operands)
    layers_backwards = max(at for at, i in enumerate(run) if i.op == "while")
    assert last_use < layers_backwards


@needs_libtpu
def test_tp_sends_what_the_formula_for_activations_says(config):
    """A layer has two pairs of products, each of which gathers its input and scatters its output over tp, or reduces it to all,
    which sends as much: four times forwards, again when the forward is computed again, and for the gradients. Besides,
    activations are scattered after the embedding and gathered before the output matrix, there and back, and the gradient
    behind that is reduced in float32.
    """
    step, programs = lowered(config("mesh.fsdp=1", "mesh.tp=4"), "v5e:2x2")
    seen, layout, share, width = hlo.read(programs["gradient"].compile().as_text()), step.layout, 3 / 4, 512
    activations = 2 * layout.sequences * layout.length * width
    scored = 4 * layout.sequences * layout.slots * layout.completion * width
    expected = share * ((12 * 2 + 3) * activations + 2 * scored)
    np.testing.assert_allclose(seen.sent, expected, rtol=0.02)


@needs_libtpu
def test_slices_exchange_gradients_once_and_nothing_for_a_single_token(config):
    """dp goes across slices: of two, a chip sends the other what it holds of the gradient, in float32 or bfloat16."""
    step, programs = lowered(config("mesh.dp=2"), "2xv5e:2x2")
    assert step.mesh["dp"] == 2
    gradient = hlo.read(programs["gradient"].compile().as_text())
    held = step.memory["policy gradients"]
    assert held / 2 <= gradient.exchanged <= 1.1 * held
    computations, entry = hlo._parse(programs["decode"].compile().as_text())
    exchanges = [name for name, body in computations.items() for i in body if i.op == "send"]
    assert exchanges and set(exchanges) == {entry}  # of completions, once a call: no loop has any


@needs_libtpu
@pytest.mark.parametrize(
    ("phase", "beside"),
    [
        ("prepare", [plan.WEIGHTS]),
        ("prefill", [plan.WEIGHTS, plan.PREFILL]),
        ("decode", [plan.WEIGHTS, plan.CACHES]),
        ("apply", ["policy gradients"]),
    ],
)
def test_what_is_held_is_estimated_within_15_percent_of_what_is_compiled(report, phase, beside):
    """Small gradients are left out, as their temporaries are in the core's own memory; the next test has large ones."""
    program = next(p for p in report.programs if p.name == phase)
    kept = ["policy parameters", "policy moments", *beside]
    step = report.step._replace(memory={name: report.step.memory[name] for name in kept})
    np.testing.assert_allclose(plan.peak(step), program.needs, rtol=0.15)


def test_the_quick_estimate_is_within_15_percent_of_the_models_that_were_compiled(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import topologies

    for key, exact in topologies.load()["compiled"].items():
        quick = topologies.estimate(*key.split("@"))
        assert (quick["fsdp"], quick["tp"]) == (exact["fsdp"], exact["tp"]), key
        np.testing.assert_allclose(quick["bytes"], exact["bytes"], rtol=0.15, err_msg=key)


@needs_libtpu
def test_the_report_names_memory_collectives_and_times(report):
    text = topology.describe(report)
    assert "v5e:2x2: 4 chips" in text and "never run on a TPU" in text and "fits" in text
    assert re.search(r"gradient: .*all-gather × \d+", text) and "roofline of an RL step" in text


@needs_libtpu
def test_attention_of_rescoring_and_gradients_is_the_splash_kernel_and_the_report_says_so(report):
    kernels = {p.name: p.work.kernels for p in report.programs}
    assert kernels["rescore"]["splash_mha_fwd_segmented_no_residuals"] == 2  # layers
    assert all(kernels["gradient"][f"splash_mha_{what}_segmented_no_residuals"] == 2 for what in ("dq", "dkv"))
    assert "kernel splash_mha_dkv_segmented_no_residuals × 2" in topology.describe(report)


@needs_libtpu
def test_the_command_plan_prints_the_report(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text(CONFIG)
    small = ["hidden_size=128", "intermediate_size=128", "num_hidden_layers=1", "vocab_size=256"]
    overrides = ["rollout.max_new=32", "rollout.max_prompt=32", *(f"model.spec.{each}" for each in small)]
    assert cli.main(["plan", str(path), *overrides, "--topology", "v5e:2x2"]) == 0
    said = capsys.readouterr().out
    assert "v5e:2x2: 4 chips" in said and "roofline of an RL step" in said
    assert all(f"\n{name} " in said for name in ("prepare", "prefill", "decode", "rescore", "gradient", "apply"))


@needs_libtpu
def test_a_program_the_compiler_refuses_does_not_fit_and_says_by_how_much():
    on = NamedSharding(make_mesh(Mesh(fsdp=4), topology.devices("v5e:2x2")), PartitionSpec())
    lowered = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((2**16, 2**17), jnp.float32, sharding=on))
    chip = target.CHIPS["v5e"]
    refused = topology._compile("large", 1, lowered, (), {"parameters": 2**30}, chip)
    assert refused.memory is None and refused.needs >= 33 * 2**30 > chip.memory
