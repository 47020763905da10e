"""What holds for every method, by being registered: masks, splits, shardings, order, padding, degenerate batches.

Runs in float64 on arrays, without a model. A method passes with its defaults; variants of a method are rows of `VARIANTS`.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import nasty
import numpy as np
import pytest
import yaml
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl_llm import algorithms
from jaxrl_llm.algorithms import Algorithm
from jaxrl_llm.types import REPLAY, Credit, Metrics, Rollouts, Views, merge_metrics, metric_value

VARIANTS = [
    ("grpo", {"scale": "none", "aggregation": "seq-mean-token-sum-norm", "count_empty": True}),  # Dr.GRPO
    ("grpo", {"clip_high": 0.28, "aggregation": "token-mean", "overlong_filter": True}),  # DAPO
    ("grpo", {"scale": "bnpo", "dual_clip": 10.0, "aggregation": "seq-mean-token-sum"}),
    ("grpo", {"scale": "batch", "beta": 0.04, "kl_ratio": True, "delta": 4.0, "singleton": "raw"}),
    ("grpo", {"beta": 0.04, "kl_kind": "k3+"}),
    ("gspo", {"form": "token", "clip_low": 0.1, "clip_high": 0.1}),
    ("mini_rl", {"form": "ratio"}),
    ("mini_rl", {"use_is": False, "length_norm": True, "clip_low": None, "clip_high": None}),
    ("cispo", {"clip_low": 0.2, "clip_high": 0.2, "cap_low": 0.5}),
    ("luspo", {"batch_mean_length": True, "clip_low": 0.2, "clip_high": 0.2}),
    ("dhpo", {"form": "branch", "sequence_gradient": True, "sequence_clip_low": 0.1, "sequence_clip_high": 0.1}),
    ("dhpo", {"mix": "entropy", "entropy_scope": "batch"}),
    ("llds", {"gate": "response", "ratio": "sequence", "aggregation": "seq-mean-token-mean"}),
    ("llds", {"gate": "token", "denominator": "all", "beta": 0.01}),
    ("epo", {"aggregation": "traj-turn-token", "turns": 2, "kind": "indicator"}),
    ("progrpo", {"rule": "mixed"}),
    ("empg", {"steps": "given", "aggregation": "seq-mean-token-mean"}),
    ("empg", {"steps": "rows", "k_f": 2.0}),
    ("gtpo", {"divide_by_conflicts": True}),
    ("e_grpo", {"agg": "batch"}),
    ("info_grpo", {"stability": "group", "normalize": "batch", "kl_coef": 0.0}),
    ("riskpo", {"bundle": 2, "credit": "std", "level": "sequence", "natural_baseline": False}),
    ("riskpo", {"bundle": 2, "credit": "sum-mean", "weighting": "paper"}),
    ("d3s", {"ratio": "sequence", "scope": "response"}),
    ("loop", {"ratio": "turn", "std": True}),
    ("loop", {"ratio": "trajectory", "bounds": "paper", "minibatch": None}),
    ("oblr_po", {"norm": "given", "loo": True, "adapt_rate": False}),
    ("tempsamp_r1", {"mode": "anchor", "beta": 0.0}),
    ("rloo", {"form": "reinforce", "whiten": True}),
    ("rloo", {"form": "token", "beta": 0.0}),
    ("reinforce_pp", {"baseline": True}),
    ("ppo", {"kl_target": 0.1, "gamma": 0.9}),
    ("rso", {"loss": "hinge", "pairing": "tournament"}),
    ("xpo", {"loss": "ipo", "clip": None, "drop_identical": True}),
    ("tgdpo", {"f_min": 0.9, "pairing": "all"}),
    ("trpa", {"levels": (0.0,), "beta_mode": "response", "seq_agg": "sum"}),
    ("dapo_direct", {"critic_steps": 0, "average": "states", "correct_at": 0.0}),
    ("r2vpo", {"center": True}),
    ("r2vpo", {"replay": 1.0, "drop_zero_advantage": True, "aggregation": "seq-mean-token-mean"}),
]
# The value of these losses is not what their gradient integrates to, on purpose.
STRAIGHT_THROUGH: list[tuple[str, dict[str, Any], str]] = [
    ("grpo", {"kl_kind": "k3+"}, "k3's value with k2's gradient"),
    ("mini_rl", {"form": "logp"}, "its weights are constants, whatever the value"),
    ("cispo", {}, "its weights are constants, whatever the value"),
    ("dhpo", {"sequence_gradient": False}, "the ratio of the completion passes its gradient to the own token only"),
    ("dhpo", {"mix": "entropy"}, "the entropy mixes the ratios as a constant"),
    ("gtpo", {}, "its ratio is 1, whatever the log-prob, with the gradient of that; its entropy is a constant"),
    ("dagrpo", {}, "the ratio of a given row is 1, whatever its likelihood"),
    ("tempsamp_r1", {}, "the ratio is 1, whatever the likelihood"),
    ("hapo", {}, "the entropy of the policy steers weights and clips as a constant"),
]
DEFAULTS = [(name, nasty.REQUIRED.get(name, {})) for name in algorithms.names()]
KEY = jax.random.key(3)


def label(case: tuple[str, dict[str, Any]]) -> str:
    name, fields = case
    return name if case in DEFAULTS else "-".join([name, *(f"{k}={v}" for k, v in fields.items())])


class Ready(NamedTuple):
    """A minibatch as the learner would see it: selected, weighed, with views; numpy arrays."""

    rows: Rollouts
    credit: Credit
    views: Views


class Result(NamedTuple):
    value: jax.Array
    metrics: Metrics
    grads: Views


class Programs(NamedTuple):
    """The jitted parts of a method, at its initial state."""

    credit: Callable[[Rollouts], Credit]
    weigh: Callable[[Rollouts, Credit], Credit]
    loss: Callable[[Rollouts, Credit, Views], Result]
    rest: Callable[[Rollouts, Credit, Views], Result]  # weigh and loss
    whole: Callable[[Rollouts, Views], Result]  # credit, weigh and loss


class Case(NamedTuple):
    name: str
    fields: dict[str, Any]
    alg: Algorithm
    state: Any
    run: Programs
    rows: Rollouts
    ready: Ready
    result: Result


def programs(alg: Algorithm, state: Any) -> Programs:
    def loss(rows: Rollouts, credit: Credit, views: Views) -> Result:
        credit = jax.lax.stop_gradient(credit)
        (value, metrics), grads = jax.value_and_grad(lambda v: alg.loss(state, v, rows, credit), has_aux=True)(views)
        return Result(value, metrics, grads)

    def credit(rows: Rollouts) -> Credit:
        return alg.credit(state, rows, KEY)

    def weigh(rows: Rollouts, credit: Credit) -> Credit:
        return alg.weigh(state, rows, credit)

    def rest(rows: Rollouts, credit: Credit, views: Views) -> Result:
        return loss(rows, weigh(rows, credit), views)

    def whole(rows: Rollouts, views: Views) -> Result:
        return rest(rows, credit(rows), views)

    return Programs(*map(jax.jit, (credit, weigh, loss, rest, whole)))


def select(alg: Algorithm, state: Any, run: Programs, rows: Rollouts, credit: Credit) -> tuple[Rollouts, Credit]:
    """What trains; a method with a memory has seen an earlier batch."""
    if alg.select is None:
        return rows, credit
    earlier = nasty.rollouts(77, alg.needs)
    first = alg.select(state, {}, earlier, run.credit(earlier), KEY)
    second = alg.select(state, first.memory, rows, credit, KEY)
    return second.rows, second.credit


def prepare(alg: Algorithm, state: Any, run: Programs, rows: Rollouts) -> Ready:
    rows, credit = jax.tree.map(np.asarray, select(alg, state, run, rows, run.credit(rows)))
    return Ready(rows, jax.tree.map(np.asarray, run.weigh(rows, credit)), nasty.views(0, rows, alg.needs.loss))


@pytest.fixture(scope="module", params=[*DEFAULTS, *VARIANTS], ids=label)
def case(request):
    name, fields = request.param
    with jax.enable_x64(True):
        alg = algorithms.make(name, **fields)
        state = alg.init()
        run = programs(alg, state)
        rows = nasty.rollouts(0, alg.needs)
        ready = prepare(alg, state, run, rows)
        yield Case(name, fields, alg, state, run, rows, ready, run.loss(*ready))


def assert_same(a: Any, b: Any, rtol: float = 1e-10, atol: float = 1e-12) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def assert_identical(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def finite(tree: Any) -> bool:
    return all(np.all(np.isfinite(x)) for x in jax.tree.leaves(tree))


def zero(tree: Any) -> bool:
    return all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves(tree))


def test_trains_something(case):
    assert finite(case.result)
    assert not zero(case.result.grads)
    assert case.result.value.dtype == jnp.float64


def test_untrained_positions_have_no_gradient(case):
    assert zero(nasty.by_token(case.result.grads, ~case.ready.rows.trained))


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_what_is_masked_changes_nothing(case, value):
    rows, credit, views = prepare(case.alg, case.state, case.run, nasty.poison(case.rows, value))
    assert finite(nasty.by_row((credit.advantage, credit.weight), rows.scored))
    result = case.run.loss(rows, credit, nasty.poison_views(views, rows.trained, value))
    assert_identical(result, case.result)


def test_gradient_agrees_with_central_differences(case):
    for name, fields, why in STRAIGHT_THROUGH:
        if case.name == name and all(getattr(case.alg.config, key) == value for key, value in fields.items()):
            pytest.skip(why)
    rows, credit, views = case.ready
    rng, h = np.random.default_rng(0), 1e-6
    for _ in range(6):
        direction = jax.tree.map(lambda x: rng.normal(size=x.shape), views)
        up = case.run.loss(rows, credit, jax.tree.map(lambda x, d: x + h * d, views, direction)).value
        down = case.run.loss(rows, credit, jax.tree.map(lambda x, d: x - h * d, views, direction)).value
        slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: np.sum(g * d), case.result.grads, direction)))
        np.testing.assert_allclose((up - down) / (2 * h), slope, rtol=1e-6, atol=1e-7)


def split(run: Programs, ready: Ready, parts: int) -> Result:
    """Loss, merged metrics and gradients of a weighed minibatch taken in `parts` microbatches of whole blocks."""
    block = np.asarray(ready.rows.block)
    total, metrics, grads = 0.0, {}, jax.tree.map(np.zeros_like, ready.views)
    for part in np.array_split(np.unique(block), parts):
        i = np.flatnonzero(np.isin(block, part))
        micro = run.loss(nasty.permute(ready.rows, i), nasty.by_row(ready.credit, i), nasty.by_row(ready.views, i))
        total, metrics = total + micro.value, merge_metrics(metrics, micro.metrics)
        jax.tree.map(lambda g, m, i=i: g.__setitem__(i, m), grads, micro.grads)
    return Result(total, metrics, grads)


def assert_independent_of_split(run: Programs, ready: Ready) -> None:
    whole = run.loss(*ready)
    for parts in (2, 4):
        result = split(run, ready, parts)
        assert_same(result[::2], whole[::2])
        for name, metric in whole.metrics.items():
            np.testing.assert_allclose(metric_value(result.metrics[name]), metric_value(metric), rtol=1e-9, atol=1e-12)


def test_loss_gradient_and_metrics_are_independent_of_the_split(case):
    if case.alg.couples == "minibatch":
        pytest.skip("couples the rows of a minibatch; the learner differentiates its loss on the whole of it")
    assert_independent_of_split(case.run, case.ready)


@pytest.mark.parametrize("lie", ["mean over the microbatch", "statistic of the microbatch"])
def test_a_method_that_wrongly_declares_row_coupling_is_found(lie):
    with jax.enable_x64(True):
        honest = algorithms.make("grpo")

        def loss(state, views, rows, credit):
            if lie == "mean over the microbatch":
                return jnp.mean(jnp.where(rows.trained, views.logp, 0) * credit.advantage), {}
            spread = jnp.std(jnp.where(rows.trained, views.logp, 0))
            value, metrics = honest.loss(state, views, rows, credit)
            return value / spread, metrics

        liar = honest._replace(loss=loss)
        run = programs(liar, ())
        with pytest.raises(AssertionError):
            assert_independent_of_split(run, prepare(liar, (), run, nasty.rollouts(0, liar.needs)))


@pytest.mark.parametrize("devices", [2, 4, 8])  # one device is the result compared with
def test_gradient_is_independent_of_sharding(case, devices):
    if (case.name, case.fields) not in DEFAULTS:
        pytest.skip("a variant shards like its method")
    mesh = Mesh(np.array(jax.devices()[:devices]), ("dp",))
    spread, everywhere = (NamedSharding(mesh, PartitionSpec(*axis)) for axis in (("dp",), ()))

    def sharded(rows: Rollouts) -> Rollouts:
        contexts = {n: jax.device_put(getattr(rows, n), everywhere) for n in ("prompt_tokens", "prompt_length")}
        by_row = replace(rows, prompt_tokens=rows.prompt, prompt_length=rows.prompt)
        return replace(jax.device_put(by_row, spread), **contexts)

    views = jax.device_put(case.ready.views, spread)
    if case.alg.select is None:
        result = case.run.whole(sharded(case.rows), views)
    else:
        unweighed = replace(case.ready.credit, weight=None, reg_weight=None)
        result = case.run.rest(sharded(case.ready.rows), jax.device_put(unweighed, spread), views)
    assert_same(result[::2], case.result[::2])


def test_the_order_of_rows_does_not_matter(case):
    if case.alg.select:
        pytest.skip("selects by position")
    order = np.random.default_rng(1).permutation(len(case.rows.group))
    rows = nasty.permute(case.rows, order)
    views = nasty.by_row(case.ready.views, order)
    result = case.run.loss(rows, case.run.weigh(rows, case.run.credit(rows)), views)
    assert_same(result.value, case.result.value)
    assert_same(result.grads, nasty.by_row(case.result.grads, order))


def test_padding_rows_change_nothing(case):
    if case.alg.select:
        pytest.skip("selects from a batch of fixed size")
    more = nasty.pad(case.rows, 4)
    views = jax.tree.map(lambda x: np.pad(x, ((0, 4), (0, 0)), constant_values=np.nan), case.ready.views)
    result = case.run.whole(more, views)
    assert_same(result.value, case.result.value)
    assert_same(nasty.by_row(result.grads, slice(len(case.rows.group))), case.result.grads)


def test_the_same_prompt_twice_stays_two_groups(case):
    rows = case.rows.with_(prompt_length=np.full_like(case.rows.prompt_length, nasty.L))
    apart = rows.with_(prompt=np.arange(nasty.ROWS, dtype=np.int32) % 7)
    together = rows.with_(prompt=np.zeros_like(rows.prompt))
    assert_identical(case.run.credit(apart).advantage, case.run.credit(together).advantage)


def test_one_alone_has_no_advantage(case):
    """Where the config warns of it (`Needs.min_group`), but for what specifications add: agents' episodes keep their raw
    score, a correct completion has the bonus of dcpo and progrpo, an agent's step that of empg."""
    if case.alg.needs.min_group == 1 or case.name in ("gigpo", "seeupo", "dcpo", "progrpo", "empg"):
        pytest.skip("its specification gives one alone an advantage")
    alone = case.rows.with_(group=np.arange(nasty.ROWS, dtype=np.int32))
    assert zero(case.run.credit(alone).advantage)


def test_untrained_positions_have_no_advantage(case):
    assert zero(nasty.by_token(case.run.credit(case.rows).advantage, ~case.rows.trained))


@pytest.mark.parametrize("what", ["mask", "scored"])
def test_a_batch_with_nothing_to_train_has_no_gradient(case, what):
    rows = case.rows.with_(**{what: np.zeros_like(getattr(case.rows, what))})
    if what == "mask":
        rows = rows.with_(length=np.zeros_like(rows.length), truncated=rows.stat)
    ready = prepare(case.alg, case.state, case.run, nasty.poison(rows, np.nan))
    result = case.run.loss(*ready)
    fresh = ready.rows.source != REPLAY  # what is replayed still trains
    assert np.isfinite(result.value) and zero(nasty.by_row(result.grads, fresh))
    assert all(np.isfinite(metric_value(m)) for m in result.metrics.values())
    # A pair of empty rows, and an empty step with an advantage, have a constant loss.
    constant = case.alg.couples == "block" or case.name == "dapo_direct"
    if fresh.all() and (not constant or what == "scored"):
        assert result.value == 0


def test_a_reward_spread_of_1e_7_is_noise(case):
    rng = np.random.default_rng(2)

    def advantage(spread: float) -> np.ndarray:
        def noise(x):
            return 0.3 + spread * rng.normal(size=x.shape)

        extras = {name: noise(case.rows.extras[name]) for name in case.rows.extras if name == "step_reward"}
        return np.asarray(case.run.credit(case.rows.with_(reward=noise(case.rows.reward), extras=extras)).advantage)

    assert np.max(np.abs(advantage(1e-7) - advantage(0.0))) < 1e-2


def test_state_keeps_its_structure_and_dtypes(case):
    leaves = jax.tree.leaves(case.state)
    assert all(isinstance(x, jax.Array) and not x.weak_type for x in leaves)
    tuned = jax.jit(case.alg.tune)(case.state, case.result.metrics)
    assert jax.tree.structure(tuned) == jax.tree.structure(case.state)
    assert [x.dtype for x in jax.tree.leaves(tuned)] == [x.dtype for x in leaves]


@pytest.mark.parametrize("name", algorithms.names())
def test_a_method_says_what_it_is(name):
    paper, module = algorithms.paper(name), algorithms._module(name)
    assert paper.title and paper.axis and paper.confidence in ("code", "paper", "abstract")
    assert paper.arxiv in module.__doc__
    with pytest.raises(ValueError, match=r"algorithm\.not_a_field: not a field of"):
        algorithms.make(name, not_a_field=1)


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "configs" / "algorithms").glob("*.yaml")), ids=str)
def test_a_yaml_names_a_method_and_its_fields(path):
    section = yaml.safe_load(path.read_text())["algorithm"]
    assert algorithms.make(**section).name == section["name"]


def test_a_missing_reference_view_is_named_in_one_line():
    alg = algorithms.make("rloo", beta=0.1)
    rows = nasty.rollouts(0, alg.needs)
    rows = replace(rows, extras={})
    with pytest.raises(ValueError, match=r"rloo with these settings needs rows\.extras\['ref_logp'\], views\.logp"):
        algorithms.value_and_grad(alg, alg.init(), rows, Views())
