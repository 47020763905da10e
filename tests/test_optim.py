"""Optimizers from config: rates, decay, clipping, dtypes, and updates that do not happen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from learning import assert_same

from jaxrl_llm.config import Optimizer
from jaxrl_llm.training import optim

PARAMS = {"w": jnp.ones((2, 2)), "norm": jnp.ones(2)}
GRADS = {"w": jnp.full((2, 2), 3.0), "norm": jnp.full(2, 4.0)}
ON, OFF = jnp.array(True), jnp.array(False)


def rates(total=10, **settings):
    schedule = optim.schedule(Optimizer(lr=1.0, **settings), total)
    return [float(schedule(i)) for i in range(total + 1)]


def moved(params=PARAMS, grads=GRADS, on=ON, **settings):
    tx = optim.make(Optimizer(**{"name": "sgd", "lr": 1.0, "clip_norm": 0.0, **settings}), 10)
    new, opt = optim.apply(tx, grads, optim.init(tx, params), params, on)
    return new, opt


def test_warm_up_is_linear_and_its_first_step_moves():
    assert rates(warmup=4)[:6] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])
    assert rates(warmup=1) == rates(warmup=0) == pytest.approx([1.0] * 11)


def test_schedules_end_at_their_final_share():
    assert rates(schedule="linear", final=0.1)[-1] == pytest.approx(0.1)
    assert rates(schedule="linear")[5] == pytest.approx(0.5)
    cosine = rates(schedule="cosine", warmup=2, final=0.2)
    assert cosine[:3] == pytest.approx([0.5, 1, 1])
    assert cosine[6] == pytest.approx(0.6) and cosine[10] == pytest.approx(0.2)
    assert rates(schedule="linear", total=20)[10] == pytest.approx(0.5), "the config's total wins over the run's"


def test_a_rate_that_falls_must_know_where_it_ends():
    assert rates(total=10, warmup=2)[2] == optim.schedule(Optimizer(lr=1.0, warmup=2), None)(2) == 1.0
    with pytest.raises(ValueError, match=r"optimizer.schedule=cosine: .* expected that number as optimizer.total"):
        optim.schedule(Optimizer(schedule="cosine"), None)


def test_warm_up_must_leave_room_for_a_falling_schedule():
    with pytest.raises(ValueError, match=r"optimizer.warmup=10: expected fewer than the 10 optimizer steps"):
        rates(schedule="cosine", warmup=10)


def test_gradients_are_clipped_by_their_global_norm():
    new, _ = moved(clip_norm=1.0)
    step = jax.tree.map(jnp.subtract, PARAMS, new)
    assert float(sum(jnp.sum(x**2) for x in jax.tree.leaves(step))) == pytest.approx(1.0)
    np.testing.assert_allclose(step["norm"][0] / step["w"][0, 0], 4 / 3, rtol=1e-6)


def test_decay_is_on_matrices_only():
    zero = jax.tree.map(jnp.zeros_like, GRADS)
    new, _ = moved(grads=zero, lr=0.1, weight_decay=0.5)
    np.testing.assert_allclose(new["w"], 0.95)
    assert_same(new["norm"], PARAMS["norm"])


def test_norms_and_biases_of_stacked_layers_are_no_matrices():
    spec = tiny.spec("qwen2")
    decays = optim.matrices(tiny.params(spec))
    assert {name for name, yes in decays["layers"].items() if yes} == {"q", "k", "v", "o", "gate", "up", "down"}
    assert decays["embed"] and not decays["norm"]


def test_adamw_is_the_published_update():
    settings = {"name": "adamw", "lr": 0.1, "b1": 0.9, "b2": 0.99, "eps": 1e-8, "weight_decay": 0.01}
    tx = optim.make(Optimizer(clip_norm=0.0, **settings), 10)
    params, opt = PARAMS, optim.init(tx, PARAMS)
    m = v = 0.0
    w = 1.0
    for t, g in enumerate((3.0, -1.0, 0.5), 1):
        params, opt = optim.apply(tx, {"w": jnp.full((2, 2), g), "norm": GRADS["norm"]}, opt, params, ON)
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        w -= 0.1 * (m / (1 - 0.9**t) / ((v / (1 - 0.99**t)) ** 0.5 + 1e-8) + 0.01 * w)
    np.testing.assert_allclose(params["w"], w, rtol=1e-5)


def test_an_update_that_is_off_leaves_parameters_and_moments_bitwise():
    tx = optim.make(Optimizer(lr=0.1, weight_decay=0.1), 10)
    _, opt = optim.apply(tx, GRADS, optim.init(tx, PARAMS), PARAMS, ON)
    nan = jax.tree.map(lambda g: g * jnp.nan, GRADS)
    assert_same(optim.apply(tx, nan, opt, PARAMS, OFF), (PARAMS, opt))


@pytest.mark.parametrize("moment_dtype", ["float32", "bfloat16"])
def test_half_precision_parameters_keep_their_dtype_and_wide_second_moments(moment_dtype):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    tx = optim.make(Optimizer(lr=0.1, weight_decay=0.1, moment_dtype=moment_dtype), 10)
    opt = optim.init(tx, half)
    new, after = optim.apply(tx, GRADS, opt, half, ON)
    assert {x.dtype for x in jax.tree.leaves(new)} == {jnp.dtype(jnp.bfloat16)}
    dtypes = lambda tree: [x.dtype for x in jax.tree.leaves(tree)]  # noqa: E731
    assert dtypes(after) == dtypes(opt), "nothing changes dtype, or would recompile"
    assert {x.dtype for x in jax.tree.leaves(after[1].nu)} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(after[1].mu)} == {jnp.dtype(moment_dtype)}
