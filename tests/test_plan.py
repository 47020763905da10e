"""A plan says what the learner would do and hold, from shapes alone."""

import jax
import jax.numpy as jnp
import pytest

from jaxrl_llm import config_load
from jaxrl_llm.models import decoder, scorers
from jaxrl_llm.sharding import rules
from jaxrl_llm.sharding.mesh import make_mesh
from jaxrl_llm.training import layouts, optim, plan

BASE = """
model:
  spec:
    {model_type: qwen3, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4,
     num_key_value_heads: 2, head_dim: 8, max_position_embeddings: 64, tie_word_embeddings: true}
tokenizer: {chars: "0123456789+= "}
task: {kind: reasoning_gym, datasets: [{name: chain_sum}]}
rollout: {prompts: 8, group_size: 4, max_prompt: 16, max_new: 8}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "base.yaml"
    path.write_text(BASE)
    return lambda *overrides: config_load.load(path, list(overrides))


EXPERTS = [
    f"model.spec.{key}={value}"
    for key, value in {
        "model_type": "qwen3_moe",
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "mlp_only_layers": "[0]",
    }.items()
]


def size(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


def test_rows_divide_into_minibatches_and_microbatches(config):
    p = plan.make(config("learner.minibatches=2", "learner.microbatch_rows=4"), 1)
    assert (p.rows, p.minibatch_rows, p.microbatches) == (32, 16, 4)


def test_the_shared_layout_runs_a_prompt_once_for_its_group(config):
    p = plan.make(config("learner.layout=shared"), 1)
    assert (p.layout.sequences, p.layout.slots, p.layout.length) == (8, 4, 16 + 4 * 8)


@pytest.mark.parametrize("changes", [[], EXPERTS], ids=["dense", "experts"])
def test_parameters_and_moments_are_those_of_the_real_trees(config, changes):
    c = config(*changes)
    p = plan.make(c, 1)
    params = decoder.init(p.spec, jax.random.key(0))
    opt = optim.init(optim.make(c.optimizer, 10), params)
    moments = [x for x in jax.tree.leaves(opt) if x.ndim]
    assert p.parameters == {"policy": size(params)}
    assert p.memory["policy parameters"] == 4 * size(params)
    assert p.memory["policy moments"] == sum(x.nbytes for x in moments)


def test_one_device_holds_its_shard_as_the_rules_say(config):
    c = config("mesh.fsdp=2", "mesh.tp=2")
    p = plan.make(c, 4)
    mesh = make_mesh(c.mesh, jax.devices()[:4])
    layout = rules.shardings(decoder.logical_axes(p.spec), decoder.abstract(p.spec), mesh)
    params = jax.device_put(decoder.init(p.spec, jax.random.key(0)), layout)
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(params))
    assert p.memory["policy parameters"] == held


def test_a_reference_and_a_critic_take_room(config):
    with_both = plan.make(config("algorithm.name=ppo", "algorithm.beta=0.1", "reference.mode=resident"), 1).memory
    plain = plan.make(config(), 1).memory
    assert with_both["reference parameters"] == plain["policy parameters"]
    assert with_both["critic parameters"] > 0 and "critic parameters" not in plain


def test_recorded_experts_take_room(config):
    p = plan.make(config(*EXPERTS, "learner.routing_replay=old"), 1)
    assert p.memory["learner: experts to replay"] == 32 * (16 + 8) * 1 * 2 * 2
    assert "learner: experts to replay" not in plan.make(config(*EXPERTS), 1).memory


def test_plain_sgd_keeps_no_moments(config):
    assert plan.make(config("optimizer.name=sgd"), 1).memory["policy moments"] == 0


@pytest.mark.parametrize("changes", [[], EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_activations_are_within_a_factor_of_two_of_what_xla_allocates(config, remat, changes):
    c = config(f"model.remat={remat}", "rollout.prompts=64", *changes)
    p = plan.make(c, 1)
    n, s, k = p.layout.sequences, p.layout.length, p.layout.slots * p.layout.completion
    ints = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in [(n, s)] * 3 + [(n, k)] * 3 + [(n, s)]]
    piece = layouts.Piece(*ints, rows=jax.ShapeDtypeStruct((n,), bool))

    def loss(params, piece):
        hidden, _ = layouts.hidden(p.spec, params, p.layout, piece, dtype=jnp.float32, remat=remat)
        head = decoder.unembed(p.spec, params)
        flat = hidden.reshape(-1, hidden.shape[-1])
        return scorers.token_views(flat, head, piece.target.reshape(-1), ("logp",), 1.0)["logp"].sum()

    compiled = jax.jit(jax.grad(loss)).lower(decoder.abstract(p.spec), piece).compile()
    ratio = p.memory["learner: activations of a microbatch"] / compiled.memory_analysis().temp_size_in_bytes
    assert 0.5 < ratio < 2


def test_a_mesh_larger_than_the_devices_is_refused(config):
    with pytest.raises(ValueError, match="needs 4 devices, there are 2"):
        plan.make(config("mesh.fsdp=4"), 2)


def test_the_text_names_what_a_step_does(config):
    text = plan.describe(config("learner.minibatches=2", "learner.microbatch_rows=4"), devices=2)
    assert "8 prompts × 4 completions = 32 rows" in text
    assert "1 epochs × 2 minibatches of 16 rows × 2 microbatches of 8 rows" in text  # four for each device
    assert "dp 1 × fsdp 2 × tp 1 × ep 1 × sp 1 = 2 devices" in text
    assert "differentiated: logp; rescored: old_logp" in text
