"""Supervised warm start: the loss, the order of examples, resuming, limits, meshes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxrl_llm import config
from jaxrl_llm.models import decoder
from jaxrl_llm.models.attention import causal
from jaxrl_llm.sharding import rules
from jaxrl_llm.sharding.mesh import make_mesh
from jaxrl_llm.training import optim, warmstart
from jaxrl_llm.training.checkpoints import Checkpoints

EOS = 1
PAIRS = [([2, i, 3], [i, i + 1]) for i in range(4, 12)] + [([2, 3], [7, 8, 9, 10])]
SETTINGS = config.WarmStart(steps=6, batch=4, optimizer=config.WarmStartOptimizer(lr=1e-2))


@pytest.fixture(scope="module")
def spec():
    return tiny.spec("qwen3")


@pytest.fixture(scope="module")
def data():
    return warmstart.examples(PAIRS, EOS, max_prompt=4, max_new=8)


@pytest.fixture
def mesh():
    return make_mesh(None, jax.devices()[:1])


def start(spec, settings=SETTINGS):
    return warmstart.init(settings.optimizer, settings.steps, tiny.params(spec))


def run(spec, data, mesh, state, settings=SETTINGS, **more):
    return list(
        (jax.device_get(s), float(m.loss), reached)
        for s, m, reached in warmstart.run(settings, spec, state, data, mesh, seed=3, **more)
    )


def rows(data, n=9):
    return data.tokens[:n], data.prompt_length[:n], data.length[:n], data.answer_length


def test_examples_are_prompt_answer_and_eos(data):
    assert data.tokens.shape == (9, 8)
    assert data.tokens[0].tolist() == [2, 4, 3, 4, 5, EOS, 0, 0]
    assert (data.prompt_length[0], data.length[0], data.answer_length) == (3, 6, 5)


def test_examples_over_a_limit_are_left_out():
    found = warmstart.examples([([2] * 5, [3]), ([2], [3] * 4), ([2], [3] * 3)], EOS, max_prompt=4, max_new=4)
    assert found.length.tolist() == [5]
    with pytest.raises(ValueError, match="none of 1 worked answers fits"):
        warmstart.examples([([2] * 5, [3])], EOS, max_prompt=4, max_new=4)


def test_the_loss_is_the_mean_over_answer_tokens_eos_included(spec, data, x64):
    params = tiny.params(spec, dtype=np.float64)
    at = jnp.broadcast_to(jnp.arange(8), data.tokens.shape)
    hidden, _ = decoder.forward(spec, params, data.tokens, at, causal(), dtype=jnp.float64)
    logp = np.asarray(jax.nn.log_softmax(hidden @ decoder.unembed(spec, params)))
    wanted = [
        -logp[row, i - 1, data.tokens[row, i]]
        for row in range(9)
        for i in range(data.prompt_length[row], data.length[row])
    ]
    found = warmstart.loss(spec, params, *rows(data), dtype=jnp.float64)
    assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, np.mean(wanted), rtol=1e-12)


def test_eos_trains_when_it_is_also_the_padding(spec):
    data = warmstart.examples([([2, 3], [4])], 0, max_prompt=4, max_new=4)
    assert data.length[0] - data.prompt_length[0] == 2


def test_padding_changes_neither_loss_nor_gradient(spec, data):
    noisy = np.where(np.arange(data.tokens.shape[1]) < data.length[:, None], data.tokens, 31)
    f = jax.jit(jax.value_and_grad(lambda p, t: warmstart.loss(spec, p, t, *rows(data)[1:])))
    params = tiny.params(spec)
    for a, b in zip(jax.tree.leaves(f(params, data.tokens)), jax.tree.leaves(f(params, noisy))):
        np.testing.assert_array_equal(a, b)


def test_every_epoch_visits_every_example_once_in_an_order_of_its_own():
    drawn = np.concatenate([warmstart.batch_indices(9, 4, seed=0, step=s) for s in range(9)]).reshape(4, 9)
    assert (np.sort(drawn, axis=1) == np.arange(9)).all()
    assert len({tuple(order) for order in drawn}) == 4
    assert not (drawn[0] == warmstart.batch_indices(9, 9, seed=1, step=0)).all()


def test_a_batch_larger_than_the_data_wraps_into_the_next_epoch():
    assert np.bincount(warmstart.batch_indices(3, 7, seed=0, step=0)).tolist().count(0) == 0


def test_training_learns_the_answers(spec, data, mesh):
    settings = SETTINGS.model_copy(update={"steps": 60})
    losses = [x[1] for x in run(spec, data, mesh, start(spec, settings), settings)]
    assert losses[0] > 2
    assert losses[-1] < 0.7


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(spec, data, mesh, tmp_path):
    whole = run(spec, data, mesh, start(spec))
    with Checkpoints(tmp_path) as saved:
        for i, (state, *_) in enumerate(warmstart.run(SETTINGS, spec, start(spec), data, mesh, seed=3)):
            if i == 2:
                saved.save(3, state, {}, {})
                break
    with Checkpoints(tmp_path) as saved:
        _, state, _, _ = saved.restore_latest(start(spec))
    rest = run(spec, data, mesh, state)
    assert [x[1] for x in rest] == [x[1] for x in whole[3:]]
    for a, b in zip(jax.tree.leaves(rest[-1][0]), jax.tree.leaves(whole[-1][0])):
        assert a.tobytes() == b.tobytes()


def test_a_finished_warm_start_does_nothing_more(spec, data, mesh):
    state = start(spec)._replace(step=jnp.int32(SETTINGS.steps))
    assert run(spec, data, mesh, state) == []


def test_it_stops_when_the_accuracy_is_reached(spec, data, mesh):
    settings = SETTINGS.model_copy(update={"until": 0.5, "eval_every": 2})
    seen = iter([0.3, 0.6])
    steps = run(spec, data, mesh, start(spec), settings, accuracy=lambda params: next(seen))
    assert [reached for *_, reached in steps] == [None, 0.3, None, 0.6]


def test_until_needs_a_way_to_measure(spec, data, mesh):
    settings = SETTINGS.model_copy(update={"until": 0.5})
    with pytest.raises(ValueError, match=r"warmstart\.until"):
        run(spec, data, mesh, start(spec), settings)


def test_it_stops_when_the_time_is_spent_also_before_a_resume(spec, data, mesh):
    settings = SETTINGS.model_copy(update={"seconds": 10.0})
    for spent, expected in ((0.0, 3), (7.0, 1)):
        now = iter(np.arange(0, 100, 4.0))
        steps = run(spec, data, mesh, start(spec), settings, spent=spent, clock=lambda now=now: float(next(now)))
        assert len(steps) == expected


def test_meshes_agree(spec, data):
    settings, found = SETTINGS.model_copy(update={"steps": 3}), []
    for sizes in (config.Mesh(fsdp=1), config.Mesh(fsdp=2, tp=2)):
        mesh = make_mesh(sizes, jax.devices()[: sizes.dp * sizes.fsdp * sizes.tp])
        layout = rules.shardings(decoder.logical_axes(spec), decoder.abstract(spec), mesh)
        params = jax.device_put(tiny.params(spec), layout)
        state = warmstart.init(settings.optimizer, settings.steps, params)
        moments = [x for x in jax.tree.leaves(state.opt) if x.ndim > 1]
        assert {x.sharding for x in moments} <= set(jax.tree.leaves(layout))
        found.append([x[1] for x in run(spec, data, mesh, state, settings)])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4)


def test_a_batch_the_mesh_does_not_divide_is_refused(spec, data):
    with pytest.raises(ValueError, match=r"warmstart\.batch=4: expected a multiple .* 8"):
        run(spec, data, make_mesh(config.Mesh()), start(spec))


def test_a_step_that_is_not_finite_changes_nothing_but_the_counter(spec, data):
    params = tiny.params(spec)
    params["norm"] = params["norm"].at[0].set(jnp.nan)
    tx = optim.make(SETTINGS.optimizer, 1)
    before = warmstart.init(SETTINGS.optimizer, 1, params)
    after, measured = jax.jit(partial(warmstart.sft_step, spec, tx), static_argnames="answer_length")(
        before, *rows(data)[:3], answer_length=data.answer_length
    )
    assert not measured.applied
    assert after.step == 1
    for a, b in zip(jax.tree.leaves((after.params, after.opt)), jax.tree.leaves((before.params, before.opt))):
        np.testing.assert_array_equal(a, b)
