"""The learner: one gradient whatever the split, route and mesh; and what it does when numbers go wrong."""

import logging
import re
import warnings
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from learning import (
    APART,
    COUPLED,
    KEY,
    ROWS,
    SPEC,
    T,
    algorithm,
    assert_close,
    assert_same,
    config,
    credit,
    gradient,
    learner,
    rollouts,
)

from jaxrl_llm import algorithms
from jaxrl_llm.algorithms.base import Needs, Plan
from jaxrl_llm.config import Importance
from jaxrl_llm.sharding.mesh import make_mesh
from jaxrl_llm.training import gradients, updates
from jaxrl_llm.training.learner import Learner, NoGradientError, NonFiniteError
from jaxrl_llm.training.metrics import Compilations, values
from jaxrl_llm.training.minibatches import minibatches
from jaxrl_llm.training.state import TrainState
from jaxrl_llm.types import GIVEN, REPLAY, Credit, Max, Mean, Rollouts, Views, metric_value

# ------------------------------------------------------------------------------------------------------- one gradient


def test_joint_gradient_of_a_coupled_loss_is_independent_of_the_split(x64):
    rows = rollouts(dtype=np.float64)
    whole, value = gradient(rows, COUPLED, route="joint")
    for microbatch_rows in (4, 2):
        split, same = gradient(rows, COUPLED, route="joint", microbatch_rows=microbatch_rows)
        assert_close(split, whole, 1e-10)
        assert same == pytest.approx(value, rel=1e-10)


def test_fused_gradient_is_the_joint_one_for_any_split(x64):
    rows = rollouts(dtype=np.float64)
    joint, value = gradient(rows, route="joint")
    for microbatch_rows in (8, 4, 2):
        fused, same = gradient(rows, route="fused", microbatch_rows=microbatch_rows)
        assert_close(fused, joint, 1e-10)
        assert same == pytest.approx(value, rel=1e-10)


def test_a_split_coupled_loss_is_another_loss(x64):
    """The routes' agreement above is not because the coupled loss happens to add up."""
    rows = rollouts(dtype=np.float64)
    whole, _ = gradient(rows, COUPLED, route="joint")
    wrong, _ = gradient(rows, COUPLED, route="fused", microbatch_rows=2)
    with pytest.raises(AssertionError):
        assert_close(wrong, whole, 1e-3)


def test_single_microbatches_and_known_views_skip_the_extra_forward():
    rows = rollouts()
    alg = algorithm(couples="minibatch")
    made = learner(alg, learner={"route": "joint"})
    made.step(COUPLED, rows, credit(rows))
    after = jax.device_get(made.train.params)
    made = learner(alg, learner={"route": "joint"})
    current = made.views(rows, ("logp", "entropy"))
    whole = made._run
    made._run = whole._replace(score=None)  # a forward without gradient would raise from here on
    try:
        made.step(COUPLED, rows, credit(rows), current=current)
        assert_close(jax.device_get(made.train.params), after, 1e-6)
    finally:
        made._run = whole
    made = learner(alg)
    made.step(COUPLED, rows, credit(rows))
    assert_close(jax.device_get(made.train.params), after, 1e-6)


@pytest.mark.parametrize("name, fields", [("grpo", {"beta": 0.1}), ("dpo", {}), ("ppo", {})])
def test_methods_that_fuse_have_their_joint_gradient(name, fields):
    """Pairs and padding rows included: one prompt of four has no pair."""
    alg = algorithms.make(name, **fields)
    sgd = {"name": "sgd", "lr": 1.0, "clip_norm": 0.0}
    rows, state = rollouts(), alg.init()
    rows = rows.with_(extras={"ref_logp": rows.old_logp + 0.1, "old_values": 0.3 * rows.old_logp})
    rows = jax.tree.map(jnp.asarray, rows)
    given = alg.credit(state, rows, KEY)
    if alg.select:
        rows, given, _ = alg.select(state, {}, rows, given, KEY)
    after = []
    for settings in ({"route": "joint"}, {"route": "fused", "microbatch_rows": 4}):
        made = learner(alg, optimizer=sgd, learner=settings)
        before = jax.device_get(made.train.params)
        _, metrics = made.step(state, rows, given)
        moved = jax.tree.map(np.subtract, before, jax.device_get(made.train.params))
        after.append((moved, {k: metric_value(m) for k, m in metrics.items()}))
    assert_close(after[1][0], after[0][0], 1e-4)
    assert after[1][1] == pytest.approx(after[0][1], rel=1e-3, abs=1e-6)


def test_whole_blocks_fuse_and_split_blocks_do_not():
    made = learner()
    block = np.array([0, 0, 2, 2])
    made.alg, alg = made.alg._replace(couples="block"), made.alg
    try:
        assert made._fuses(np.array([0, 0, 1, 1]), block)
        assert not made._fuses(np.array([0, 1, 1, 1]), block)
        made.config = config(learner={"route": "fused"})
        with pytest.raises(ValueError, match=r"learner.route=fused: these microbatches split blocks"):
            made._fuses(np.array([0, 1, 1, 1]), block)
        made.alg = alg._replace(couples="minibatch")
        made.config = config()
        assert made._fuses(np.zeros(4, int), block), "one microbatch needs no joint route"
        assert not made._fuses(np.array([0, 0, 1, 1]), block)
    finally:
        made.alg = alg


@pytest.mark.parametrize("devices", [(1, 4, 1), (1, 2, 2), (2, 1, 2)], ids=["fsdp4", "fsdp2_tp2", "dp2_tp2"])
def test_three_steps_on_a_mesh_are_those_of_one_device(devices):
    def three(made):
        state, losses = APART, []
        for seed in range(3):
            rows = rollouts(seed)
            state, metrics = made.step(state, rows, credit(rows))
            losses.append(float(metrics["loss"].sum))
        return losses, jax.device_get(made.train.params)

    losses, params = three(learner())
    made = learner(devices=devices)
    sharded_losses, sharded = three(made)
    assert len(made.train.params["policy"]["layers"]["q"].sharding.device_set) == 4
    assert not made.train.params["policy"]["layers"]["q"].sharding.is_fully_replicated
    np.testing.assert_allclose(sharded_losses, losses, rtol=1e-4)
    assert_close(sharded, params, 1e-4)


# ------------------------------------------------------------------------------------------------ what must not matter


def test_gradient_is_exactly_zero_at_padding_and_tool_positions_and_unscored_rows():
    """Even of a loss that reads every position."""
    rows = jax.tree.map(jnp.asarray, rollouts())
    alg = algorithm(lambda state, views, rows, credit: ((views.logp * views.entropy).sum(), {}))
    views = Views(logp=jnp.full((ROWS, T), -2.0), entropy=jnp.full((ROWS, T), 3.0))
    _, cotangents = gradients.differentiate(
        alg, APART, views, rows, Credit(rows.old_logp, rows.old_logp, rows.old_logp)
    )
    for pulled in (cotangents.logp, cotangents.entropy):
        assert np.array_equal(np.asarray(pulled) != 0, np.asarray(rows.trained))


def poisoned(rows: Rollouts) -> Rollouts:
    """Garbage wherever nothing may look: NaN in floats, impossible tokens, in every field."""
    behind = np.arange(T) >= rows.length[:, None]
    prompt_behind = np.arange(rows.prompt_tokens.shape[1]) >= rows.prompt_length[:, None]
    return replace(
        rows,
        prompt_tokens=np.where(prompt_behind, -(10**6), rows.prompt_tokens),
        tokens=np.where(behind, 10**6, rows.tokens),
        version=np.where(behind, -1, rows.version),
        sampler_logp=np.where(rows.trained, rows.sampler_logp, np.nan),
        old_logp=np.where(rows.trained, rows.old_logp, np.nan),
        reward=np.where(rows.scored[:, None], rows.reward, np.nan),
        extras={"ref_logp": np.where(rows.trained, rows.old_logp, np.nan)},
    )


@pytest.mark.parametrize("route", ["fused", "joint"])
def test_garbage_in_padding_changes_nothing(route):
    rows = rollouts()
    after = []
    for given, advantage in (
        (replace(rows, extras={"ref_logp": rows.old_logp}), np.where(rows.trained, rows.reward, 0)),
        (poisoned(rows), np.where(rows.trained, rows.reward, np.nan)),
    ):
        made = learner(learner={"route": route})
        _, report = made.update(APART, given, Credit(advantage.astype(np.float32)), KEY)
        assert report.metrics["update/skipped"].sum == 0
        after.append((jax.device_get(made.train.params), report.metrics))
    assert_same(after[1], after[0])


def none_trained() -> dict[str, Rollouts]:
    rows, no = rollouts(), np.zeros((ROWS, T), bool)
    return {
        "empty completions": replace(rows, length=np.zeros(ROWS, np.int32), mask=no),
        "all masked": replace(rows, mask=no, truncated=np.ones(ROWS, bool)),
        "all unscored": replace(rows, scored=np.zeros(ROWS, bool), reward=np.full((ROWS, 1), np.nan, np.float32)),
        "padding only": replace(rows, mask=no, stat=np.zeros(ROWS, bool)),
    }


@pytest.mark.parametrize("which", none_trained())
def test_batches_that_train_nothing_have_zero_loss_and_gradient_and_finite_metrics(which):
    made = learner()
    before = jax.device_get(made.train.params)
    rows = none_trained()[which]
    _, report = made.update(COUPLED, rows, Credit(np.full((ROWS, T), np.nan, np.float32)), KEY)
    numbers = values(report.metrics)
    assert numbers["loss"] == 0 and numbers["grad_norm"] == 0 and numbers["update/skipped"] == 0
    assert all(np.isfinite(x) for x in numbers.values())
    assert_same(jax.device_get(made.train.params), before)


# -------------------------------------------------------------------------------------------------------- many updates


def test_epochs_and_minibatches_are_optimizer_steps():
    made = learner(learner={"epochs": 2, "minibatches": 2})
    rows = rollouts()
    _, report = made.update(APART, rows, credit(rows), KEY)
    assert report.updates == len(report.per_update) == made.version == 4
    assert int(made.train.count["policy"]) == 4
    losses = [metric_value(m["loss"]) for m in report.per_update]
    assert len(set(losses)) == 4
    assert metric_value(report.metrics["loss"]) == pytest.approx(np.mean(losses), rel=1e-5)
    assert metric_value(report.last["loss"]) == losses[-1]


def test_an_update_is_a_function_of_its_key():
    rows, params = rollouts(), []
    for key in (KEY, KEY, jax.random.key(1)):
        made = learner(learner={"epochs": 2, "minibatches": 2})
        made.update(APART, rows, credit(rows), key)
        params.append(jax.device_get(made.train.params))
    assert_same(params[0], params[1])
    with pytest.raises(AssertionError):
        assert_same(params[0], params[2])


def test_nothing_compiles_in_steady_state():
    made = learner(learner={"epochs": 2, "minibatches": 2, "microbatch_rows": 2})
    compilations = Compilations()
    try:
        counts = []
        for seed in range(3):
            rows = rollouts(seed)
            rows = rows.with_(old_logp=made.views(rows, ("logp",)).logp)
            made.update(APART, rows, credit(rows), jax.random.key(seed))
            counts.append(compilations.take())
    finally:
        compilations.close()
    assert counts[0] <= 40
    assert counts[1:] == [0, 0]


@pytest.mark.parametrize(
    "route, steps, programs",
    [("auto", 11, ["fused", "apply"]), ("joint", 12, ["score", "differentiate", "pull", "apply"])],
)
def test_an_update_compiled_ahead_is_not_compiled_again(route, steps, programs):
    made = learner(run={"steps": steps}, learner={"route": route})  # of its own, so nothing is compiled yet
    rows, seen = rollouts(), []
    heavy = {f"jit({name})" for name in programs}

    def listen(event: str, duration_secs: float, fun_name: str = "", **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        made.compile_ahead(APART, rows, credit(rows))
        assert heavy <= set(seen)
        seen.clear()
        made.update(APART, rows, credit(rows), KEY)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not heavy & set(seen)


def test_updates_donate_the_old_parameters_and_moments():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = learner()
        old, rows = made.train, rollouts()
        made.step(APART, rows, credit(rows))
    assert all(x.is_deleted() for x in jax.tree.leaves((old.params, old.opt)))


def test_the_optimizer_copies_no_matrix_before_it_overwrites_it():
    made, rows, given = learner(), rollouts(), []
    run = made._run
    shaped = partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding))
    made._run = run._replace(apply=lambda *args: given.append(shaped(args)) or run.apply(*args))
    made.step(APART, rows, credit(rows))
    with jax.set_mesh(made.mesh):
        text = run.apply.lower(*given[0]).compile().as_text()
    copied = [tuple(map(int, dims.split(","))) for dims in re.findall(r"= f32\[([\d,]+)\]\S* copy\(", text)]
    assert not {shape for shape in copied if len(shape) > 1}


def test_minibatches_deal_every_real_row_once_and_keep_blocks_whole():
    rows = rollouts()
    rows = replace(rows, stat=np.arange(ROWS) < 6, mask=rows.mask & (np.arange(ROWS) < 6)[:, None])
    for whole_contexts in (False, True):
        parts = minibatches(rows, 3, np.random.default_rng(0), whole_contexts)
        taken = np.concatenate([p.index for p in parts])
        assert sorted(taken[taken >= 0]) == list(range(6)), "rows 6 and 7 neither train nor count"
        assert {len(p.index) for p in parts} == {4}, "one shape"
        for p in parts:
            assert (p.index >= 0).sum() == 2
            assert len(set(rows.block[p.index[p.index >= 0]])) == 1
            assert np.array_equal(p.block[p.index < 0], np.flatnonzero(p.index < 0)), "padding rows are alone"


def test_rows_that_share_a_block_or_a_context_stay_together():
    rows = replace(
        rollouts(), block=np.array([0, 0, 1, 2, 2, 3, 4, 5], np.int32), prompt=np.array([0, 1, 1, 2, 3, 3, 0, 0])
    )
    rows = replace(rows, prompt=np.array([0, 1, 1, 2, 3, 3, 4, 5], np.int32))
    (a, b) = minibatches(rows, 2, np.random.default_rng(0), whole_contexts=True)
    where = {row: i for i, part in enumerate((a, b)) for row in part.index[part.index >= 0].tolist()}
    assert where[0] == where[1] == where[2]
    assert where[3] == where[4] == where[5]
    assert len(where) == ROWS


def test_minibatches_are_a_seeded_permutation():
    deal = lambda seed: minibatches(rollouts(), 2, np.random.default_rng(seed))  # noqa: E731
    assert_same(deal(0), deal(0))
    assert any(not np.array_equal(deal(0)[0].index, deal(seed)[0].index) for seed in range(1, 5))


# -------------------------------------------------------------------------------------------------- when numbers go wrong


def test_a_nonfinite_update_is_skipped_counted_named_and_stops_the_run(caplog):
    made = learner(learner={"max_nonfinite": 2})
    rows = rollouts()
    made.update(APART, rows, credit(rows), KEY)
    before = jax.device_get((made.train.params, made.train.opt, made.train.count))
    bad = Credit(np.where(rows.mask, np.inf, 0).astype(np.float32))
    with caplog.at_level(logging.WARNING):
        _, report = made.update(APART, rows, bad, KEY)
    assert_same(jax.device_get((made.train.params, made.train.opt, made.train.count)), before)
    assert int(made.train.skipped) == int(made.train.skipped_in_row) == 1
    assert values(report.metrics)["update/skipped"] == 1
    assert caplog.messages == ["update 2 skipped (1 in a row): loss value is not finite"]
    made.update(APART, rows, credit(rows), KEY)
    assert int(made.train.skipped) == 1 and int(made.train.skipped_in_row) == 0, "a finite update ends the row"
    made.update(APART, rows, bad, KEY)
    with pytest.raises(NonFiniteError, match=r"update 5 skipped \(2 in a row\): .*; learner.max_nonfinite=2"):
        made.update(APART, rows, bad, KEY)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(made.train.params)))


def apply(value=0.0, metrics=None, bad=None, grad=1.0):
    """One update of two numbers by a loss that says this."""
    import optax

    params = {"policy": {"w": jnp.ones(2)}}
    tx = {"policy": optax.sgd(0.5)}
    zero = jnp.zeros((), jnp.int32)
    train = TrainState(params, {"policy": tx["policy"].init(params["policy"])}, {"policy": zero}, zero, zero)
    loss = gradients.Loss(jnp.float32(value), metrics or {}, bad or {"logp": jnp.array(False)})
    grads = {"policy": {"w": jnp.full(2, grad)}}
    on = {"policy": jnp.array(True)}
    return updates.apply(tx, {"policy": lambda count: 0.5}, train, grads, loss, on, jnp.array(True))


def test_the_first_number_that_is_not_finite_is_named():
    nan = np.float32(np.nan)
    ratio = {"kl": Mean(jnp.float32(1), jnp.float32(1)), "ratio/max": Max(jnp.float32(np.inf))}
    assert updates.first_bad(apply(nan, ratio, {"logp": jnp.array(True)}, nan)[2]) == "view logp"
    assert updates.first_bad(apply(nan, ratio, grad=nan)[2]) == "metric ratio/max"
    assert updates.first_bad(apply(nan, grad=nan)[2]) == "loss value"
    assert updates.first_bad(apply(grad=nan)[2]) == "gradient policy.w"


def test_a_metric_alone_skips_nothing():
    train, metrics, health = apply(metrics={"odd": Max(jnp.float32(-np.inf))})
    assert health.finite and np.array_equal(train.params["policy"]["w"], [0.5, 0.5])
    assert metric_value(metrics["grad_norm"]) == pytest.approx(2**0.5)
    assert metric_value(metrics["lr"]) == 0.5


def test_advantages_without_a_gradient_are_an_error_on_the_first_step():
    made, rows = learner(), rollouts()
    advantage = credit(rows).advantage
    out_of_range = np.where(advantage > 0, -10, 10).astype(np.float32)  # every ratio is clipped
    clipped = replace(rows, old_logp=out_of_range)
    with pytest.raises(NoGradientError, match="update 1: tokens have a weight and an advantage"):
        made.update(APART, clipped, credit(rows), KEY)
    made = learner()
    made.update(APART, clipped, Credit(np.zeros_like(advantage)), KEY)  # no advantage, no error


GRPO = algorithms.make("grpo")


def test_a_batch_of_groups_of_one_is_an_update_by_zero():
    made, rows = learner(GRPO), rollouts()
    alone = jax.tree.map(jnp.asarray, rows.with_(group=np.arange(ROWS, dtype=np.int32)))
    before = jax.device_get(made.train.params)
    _, report = made.update(GRPO.init(), alone, GRPO.credit(GRPO.init(), alone, KEY), KEY)
    assert_same(jax.device_get(made.train.params), before)
    assert report.updates == 1 and metric_value(report.metrics["update/skipped"]) == 0


# ------------------------------------------------------------------------------- critic, reference, temperature, plug-ins


def critic_loss(state, views, rows, credit):
    on = rows.trained
    policy = weighted_sum_of(views.tempered_logp, credit.advantage, credit.weight)
    value = jnp.where(on, (views.values - 1) ** 2, 0).sum() / jnp.maximum(on.sum(), 1)
    return policy + value, {"value_loss": Mean(value, jnp.ones(()))}


def weighted_sum_of(logp, advantage, weight):
    return -jnp.sum(jnp.where(weight != 0, weight * logp * advantage, 0))


HOT = algorithm(
    critic_loss,
    needs=Needs(loss=("logp", "tempered_logp", "values"), critic=True),
    plan=lambda state: Plan(score_temperature=jnp.float32(2.0)),
)


def hot_learner():
    decayed = {"lr": 1e-2, "clip_norm": 0.0, "weight_decay": 0.1}
    return learner(HOT, optimizer=decayed, critic={"lr": 3e-2}, reference={"mode": "host"})


def test_a_critic_learns_its_values_with_its_own_optimizer():
    made, rows = hot_learner(), rollouts()
    assert np.all(np.asarray(made.views(rows, ("values",)).values) == 0), "a new critic says 0"
    losses = []
    for _ in range(10):
        _, report = made.update(APART, rows, credit(rows), KEY)
        losses.append(metric_value(report.metrics["value_loss"]))
    assert losses[-1] < 0.1 * losses[0]
    numbers = values(report.metrics)
    assert numbers["critic/lr"] == pytest.approx(3e-2) and numbers["lr"] == pytest.approx(1e-2)
    assert numbers["critic/grad_norm"] > 0


def test_an_inactive_tree_gets_no_update_no_decay_and_no_momentum():
    made, rows = hot_learner(), rollouts()
    made.step(APART, rows, credit(rows))
    policy = jax.device_get((made.train.params["policy"], made.train.opt["policy"]))
    critic = jax.device_get(made.train.params["critic"])
    made.step(APART, rows, credit(rows), active={"policy": False, "critic": True})
    assert_same(jax.device_get((made.train.params["policy"], made.train.opt["policy"])), policy)
    assert {k: int(v) for k, v in made.train.count.items()} == {"policy": 1, "critic": 2}
    with pytest.raises(AssertionError):
        assert_same(jax.device_get(made.train.params["critic"]), critic)


def test_the_reference_stays_until_it_is_synced():
    made, rows = hot_learner(), rollouts()
    first = np.asarray(made.views(rows, ("logp",)).logp)
    made.step(APART, rows, credit(rows))
    assert np.array_equal(made.views(rows, ("logp",), "ref").logp, first)
    now = np.asarray(made.views(rows, ("logp",)).logp)
    assert not np.array_equal(now, first)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(made.train.reference)} == {"pinned_host"}
    made.sync_reference()
    assert np.array_equal(made.views(rows, ("logp",), "ref").logp, now)


def test_views_are_zero_behind_a_completion_and_temperatures_are_arrays():
    made, rows = hot_learner(), rollouts()
    seen = made.views(rows, ("logp", "tempered_logp"), temperature=jnp.float32(1.0))
    inside = np.arange(T) < rows.length[:, None]
    assert np.array_equal(np.asarray(seen.logp) != 0, inside)
    np.testing.assert_allclose(seen.tempered_logp, seen.logp, rtol=1e-6)
    compilations = Compilations()
    hotter = made.views(rows, ("logp", "tempered_logp"), temperature=jnp.float32(2.0))
    compilations.close()
    assert compilations.take() == 0
    assert np.all(np.asarray(hotter.tempered_logp)[inside] != np.asarray(seen.tempered_logp)[inside])


def test_views_refuse_what_is_not_there():
    made, rows = learner(), rollouts()
    with pytest.raises(ValueError, match=r"reference.mode=none"):
        made.views(rows, ("logp",), "ref")
    with pytest.raises(ValueError, match=r"policy='old': expected 'policy', 'ref'"):
        made.views(rows, ("logp",), "old")
    with pytest.raises(ValueError, match=r"'tempered_logp' needs a temperature"):
        made.views(rows, ("tempered_logp",))


def test_state_is_tuned_after_finite_updates_only():
    tuned = algorithm(tune=lambda state, metrics: state + metrics["loss"].count)
    made, rows = learner(tuned), rollouts()
    state, _ = made.step(jnp.float32(0), rows, credit(rows))
    assert float(state) == 1
    state, _ = made.step(state, rows, Credit(np.where(rows.mask, np.inf, 0).astype(np.float32)))
    assert float(state) == 1


def table(params, rows):
    """A plug-in: the view of a token is the sum of its embedding."""
    return Views(extras={"share": params["embed"][rows.tokens].sum(-1) * jnp.ones((len(rows.tokens), 1))})


def test_a_plug_in_scorer_provides_views_by_any_route_and_split():
    def loss(state, views, rows, credit):
        share = jnp.where(rows.trained, views.extras["share"], 0)
        return (share * jnp.where(rows.trained, credit.advantage, 0)).sum(), {}

    alg = algorithm(loss, needs=Needs(loss=("share",), scorer="table"))
    rows, after = rollouts(), []
    for settings in (
        {"route": "fused"},
        {"route": "joint", "microbatch_rows": 2},
        {"route": "fused", "microbatch_rows": 4},
    ):
        made = Learner(config(learner=settings), SPEC, alg, make_mesh(None), plug_in=table)
        made.init(learner().train.params["policy"])
        trained = np.asarray(rows.trained)
        assert np.all(np.asarray(made.views(rows, ("share",)).extras["share"])[trained] != 0)
        made.step(APART, rows, credit(rows))
        after.append(jax.device_get(made.train.params))
    assert_close(after[1], after[0], 1e-6)
    assert_close(after[2], after[0], 1e-6)


def test_a_config_that_contradicts_the_method_is_refused():
    mesh = make_mesh(None)
    with pytest.raises(ValueError, match=r"learner.route=fused: the loss of test couples the minibatch"):
        Learner(config(learner={"route": "fused"}), SPEC, algorithm(couples="minibatch"), mesh)
    truncate = config(learner={"importance": {"mode": "truncate"}})
    with pytest.raises(ValueError, match=r"learner.importance.mode=truncate: .* expected none"):
        Learner(truncate, SPEC, algorithm(needs=Needs(importance=False)), mesh)
    falling = config(optimizer={"schedule": "linear"})
    with pytest.raises(ValueError, match=r"optimizer.schedule=linear: .* not known ahead, expected that number as"):
        Learner(falling, SPEC, algorithms.make("seeupo"), mesh)
    with pytest.raises(ValueError, match=r"its views come from scorer 'elbo', expected that as plug_in"):
        Learner(config(), SPEC, algorithm(needs=Needs(scorer="elbo")), mesh)


# --------------------------------------------------------------------------------------------------- importance weights


def importance(mode, log_w, source=0):
    rows = rollouts()
    rows = replace(rows, sampler_logp=rows.old_logp - np.float32(log_w), source=np.full(ROWS, source, np.int32))
    one = np.where(rows.trained, 1.0, 0.0).astype(np.float32)
    rows = replace(rows, sampler_logp=np.where(rows.trained, rows.sampler_logp, np.nan))
    rows, weighted = jax.tree.map(jnp.asarray, (rows, Credit(one, one, one)))
    out, metrics = gradients.importance_weighted(Importance(mode=mode, cap=2.0), rows, weighted)
    on = np.asarray(rows.trained)
    assert np.all(np.asarray(out.weight)[~on] == 0)
    assert np.array_equal(out.reg_weight, one), "regularizers keep their weight"
    return np.unique(np.asarray(out.weight)[on]), {name: metric_value(m) for name, m in metrics.items()}


def test_importance_weights_truncate_or_mask_the_mismatch():
    assert importance("none", 1.0) == (1.0, {})
    weight, metrics = importance("truncate", np.log(4))
    assert weight == 2.0
    assert metrics == pytest.approx(
        {"sampling/importance_mean": 2.0, "sampling/importance_max": 4.0, "sampling/importance_clipped": 1.0}
    )
    assert importance("truncate", np.log(0.25))[0] == pytest.approx(0.25), "small weights stay"
    assert importance("mask", np.log(1.5))[0] == pytest.approx(1.5)
    assert importance("mask", np.log(4))[0] == importance("mask", np.log(0.25))[0] == 0.0


def test_importance_weights_concern_tokens_this_run_sampled():
    assert importance("truncate", np.log(4), GIVEN)[0] == 1.0
    assert importance("truncate", np.log(4), REPLAY)[0] == 2.0
