"""The interface of a method: pure functions, in the manner of optax.

Most methods define `credit`, `loss` and `needs` and take the rest from here. Rules that keep methods honest:
statistics of the *old* policy belong in `credit`, of the *current* policy in `loss`; advantages are computed on the pool
they are defined on, before `select`; replayed rows bring their advantage and old_logp and stay out of fresh statistics.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrl_llm.advantages import group
from jaxrl_llm.objectives import weights
from jaxrl_llm.objectives.surrogates import Clipped
from jaxrl_llm.types import Credit, Max, Mean, Memory, Metrics, Rollouts, State, Views, mean_of

Key = jax.Array
INNER = "inner_logp"  # the view of `Needs.inner`


class Inner(NamedTuple):
    """An internal policy: what a layer of the decoder leaves, unembedded."""

    layer: int  # from 0
    norm: bool = False  # by way of the final norm


class Needs(NamedTuple):
    """What the loop must provide for a method. Everything is static."""

    loss: tuple[str, ...] = ("logp",)  # views of the current policy that the loss differentiates
    rescore: tuple[
        str, ...
    ] = ()  # "<policy>_<view>" stored in Rollouts.extras before credit: "ref_logp", "old_entropy", "old_prompt_logp"
    row_extras: tuple[str, ...] = ()  # row data the collector must supply: "prompt_id", "traj", "anchor_id", ...
    critic: bool = False  # a value model is a second trainable; loss view "values" comes from it
    reference: bool = False  # a frozen copy of the initial policy is kept (implied by any "ref_*" view)
    importance: bool = True  # sampler/learner importance weights make sense for this loss
    inner: Inner | None = None  # where the view "inner_logp" is taken
    scorer: str = "causal"  # who computes views: "causal", or a plug-in's name
    # Completions per prompt below which the method learns nothing (2: baseline within the group): a config that asks for
    # fewer gets a warning, or is refused when `Algorithm.couples` is "block", as there is no loss then.
    min_group: int = 1
    # `Algorithm.rate` compares the gradients of this many parts of a minibatch's groups; causal scorer only.
    noise: int = 0
    given: Literal["none", "some", "all"] = "none"  # training problems that come with chosen and rejected completions
    pool: str = ""  # config field that says for how many training problems the method has room; "": for any number


class Plan(NamedTuple):
    """What to generate. Static fields choose programs; arrays may change every step without recompiling."""

    group_size: int = 0  # completions per prompt; 0: the config's
    collector: "Collector | None" = None  # None: `rollout.collectors.flat`
    hook: "SamplerHook | None" = None  # changes logits before sampling, compiled into its own engine
    temperature: Array | None = None  # [] sampling temperature; None: the config's
    score_temperature: Array | None = None  # [] temperature of the "tempered_logp" view
    # Views that the loss differentiates, and those rescored, while this plan holds; None: `Needs.loss`, `Needs.rescore`. Only
    # of methods with `Needs.inner`.
    loss: tuple[str, ...] | None = None
    rescore: tuple[str, ...] | None = None
    hook_state: Any = ()  # pytree of arrays handed to the hook
    prompt_weights: Array | None = None  # [n_prompts] draw prompts without replacement by these weights
    # (prompts, group_size) -> (contexts, rows) of a batch; None: (prompts, prompts * group_size)
    capacity: Callable[[int, int], tuple[int, int]] | None = None
    # For the collector to read, put in by the loop.
    memory: Memory | None = None  # the method's
    max_prompt: int = 0  # longest context


# (logits [S, V] float32, temperature [S], hook_state) -> temperature [S]; pure, jitted into the decode loop.
SamplerHook = Callable[[Float[Array, "S V"], Float[Array, "S"], Any], Float[Array, "S"]]
# A host coroutine: yields Request / Score (rollout/collectors.py), receives completions / rewards, returns host rows.
Collector = Callable[..., Generator[Any, Any, Any]]
# views(rows, names, policy) -> Views: the learner's no-gradient scoring, handed to `observe` and `update`.
ViewsFn = Callable[[Rollouts, tuple[str, ...], str], Views]


class Report(NamedTuple):
    """What the update of one step measured."""

    metrics: Metrics  # merged over the minibatches of the step
    last: Metrics  # of the last minibatch
    updates: int  # optimizer steps taken
    per_update: tuple[Metrics, ...] = ()


class Noise(NamedTuple):
    """How much of a minibatch's gradient is noise, estimated from the gradients of parts of it (`Needs.noise`)."""

    square: Float[Array, ""]  # squared norm of the gradient
    variance: Float[Array, ""]  # trace of its covariance


class Selection(NamedTuple):
    rows: Rollouts
    credit: Credit
    memory: Memory


def no_state() -> State:
    return ()


def flat_plan(state: State) -> Plan:
    """The usual `plan`: independent completions of every prompt, everything as configured."""
    return Plan()


def token_mean(state: State, rows: Rollouts, credit: Credit) -> Credit:
    """Default `weigh`: every trained token of the minibatch counts the same (DAPO's token-mean)."""
    return weigh_by(credit, weights.token_mean(rows.trained))


def weigh_by(credit: Credit, weight: Float[Array, "B T"], reg_weight: Float[Array, "B T"] | None = None) -> Credit:
    """Credit with its aggregation weights set; regularizers use `weight` too unless given their own."""
    return Credit(credit.advantage, weight, weight if reg_weight is None else reg_weight, credit.score, credit.extras)


def per_token(advantage: Float[Array, "B"], rows: Rollouts) -> Float[Array, "B T"]:
    """The row's advantage on each of its trained tokens, 0 elsewhere."""
    return jnp.where(rows.trained, advantage[:, None], 0)


def weighted_mean_of(x: Float[Array, "B T"], weight: Float[Array, "B T"]) -> Mean:
    """Mean metric of token values under aggregation weights; adds over microbatches."""
    return Mean(weights.weighted_sum(x, weight), jnp.sum(weight))


def ratio_metrics(ratio: Float[Array, "B #T"], mask: Bool[Array, "B T"]) -> Metrics:
    """`ratio/mean` and `ratio/max` over the tokens of `mask`; the maximum of nothing is 0."""
    ratio = jnp.broadcast_to(ratio, mask.shape)
    return {"ratio/mean": mean_of(ratio, mask), "ratio/max": Max(jnp.max(jnp.where(mask, ratio, 0)))}


def clipped_metrics(
    surrogate: Clipped, ratio: Float[Array, "B #T"], mask: Bool[Array, "B T"], weight: Float[Array, "B T"]
) -> Metrics:
    """What every clipped loss reports: its mean under the weights, the shares of clipped tokens, the ratio."""
    return {
        "policy_loss": weighted_mean_of(surrogate.loss, weight),
        "clip_ratio/low": mean_of(surrogate.low, mask),
        "clip_ratio/high": mean_of(surrogate.high, mask),
        **ratio_metrics(ratio, mask),
    }


def group_credit(ddof: int, eps: float, spread_tol: float) -> Callable[[State, Rollouts, Key], Credit]:
    """The `credit` of methods that take GRPO's advantage as it is: (R - mean_g) / (std_g + eps) on every token of a row."""

    def credit(state: State, rows: Rollouts, key: Key) -> Credit:
        advantage = group.normalized(rows.score, rows.group, rows.counted, ddof=ddof, eps=eps, spread_tol=spread_tol)
        return Credit(per_token(advantage, rows))

    return credit


def keep(state: State, metrics: Metrics) -> State:
    """Default `tune`."""
    return state


def keep_state(
    state: State, memory: Memory, rows: Rollouts, credit: Credit, report: Report, views: ViewsFn
) -> tuple[State, Memory]:
    """Default `observe`."""
    return state, memory


def count_steps(
    state: State, memory: Memory, rows: Rollouts, credit: Credit, report: Report, views: ViewsFn
) -> tuple[State, Memory]:
    """`observe` of methods whose state is {"step": RL steps so far}."""
    return {"step": state["step"] + 1}, memory


class Algorithm(NamedTuple):
    """A method. `plan`, `select`, `observe` and `update` run on the host; the others are jitted and pure.

    init()                                            -> State, arrays of explicit dtype
    plan(state)                                       -> Plan
    credit(state, rows, key)                          -> Credit, on the whole batch, before anything is dropped
    select(state, memory, rows, credit, key)          -> Selection of a fixed size (padded with masked rows); None: keep all
    weigh(state, rows, credit)                        -> Credit with weights, once per minibatch
    loss(state, views, rows, credit)                  -> (scalar, Metrics)
    rate(state, noise)                                -> (factor of the policy's learning rate, State), before every step
    tune(state, metrics)                              -> State, after every optimizer step (dual variable, adaptive KL)
    observe(state, memory, rows, credit, report, views) -> (State, Memory), after the step; `views` scores the new policy
    update(learner, state, rows, credit, key)         -> (State, Report); own inner loop over learner.views/learner.step
    """

    name: str
    config: Any
    init: Callable[[], State]
    plan: Callable[[State], Plan]
    credit: Callable[[State, Rollouts, Key], Credit]
    loss: Callable[[State, Views, Rollouts, Credit], tuple[Float[Array, ""], Metrics]]
    needs: Needs = Needs()
    weigh: Callable[[State, Rollouts, Credit], Credit] = token_mean
    couples: Literal["row", "block", "minibatch"] = "minibatch"
    rate: Callable[[State, Noise], tuple[Float[Array, ""], State]] | None = None
    tune: Callable[[State, Metrics], State] = keep
    observe: Callable[..., tuple[State, Memory]] = keep_state
    select: Callable[..., Selection] | None = None
    update: Callable[..., tuple[State, Report]] | None = None
    updates: int | None = None  # optimizer steps of an own `update`, where their number is known ahead


def row_mean(state: State, rows: Rollouts, credit: Credit) -> Credit:
    """`weigh` by the mean over rows of the mean over a row's trained tokens, GRPO's aggregation."""
    return weigh_by(credit, weights.seq_mean_token_mean(rows.trained))


def group_method(name: str, config: Any, loss: Callable[..., tuple[Array, Metrics]], **changed: Any) -> Algorithm:
    """A method that is GRPO but for its loss: group-normalised advantages, row means, no state, nothing coupled.

    Args:
      config: has `ddof`, `eps` and `spread_tol`.
      changed: other fields of `Algorithm`, where the method differs there too.
    """
    fields: dict[str, Any] = {
        "init": no_state,
        "plan": flat_plan,
        "credit": group_credit(config.ddof, config.eps, config.spread_tol),
        "weigh": row_mean,
        "needs": Needs(min_group=2),
        "couples": "row",
    }
    return Algorithm(name=name, config=config, loss=loss, **(fields | changed))


def expect(ok: bool, field: str, value: Any, expected: str) -> None:
    """Raise ValueError "algorithm.<field>=<value>: expected <expected>" unless `ok`; for `Config.__post_init__`."""
    if not ok:
        raise ValueError(f"algorithm.{field}={value!r}: expected {expected}")


def expect_one_of(field: str, value: str, choices: Sequence[str]) -> None:
    expect(value in choices, field, value, f"one of {', '.join(choices)}")


def check_clip(low: float, high: float, dual_clip: float | None = None, delta: float | None = None) -> None:
    """Raise ValueError when clip settings make no interval."""
    expect(0 <= low <= 1, "clip_low", low, "0 to 1")
    expect(high >= 0, "clip_high", high, "at least 0")
    expect(dual_clip is None or dual_clip > 1, "dual_clip", dual_clip, "more than 1")
    expect(delta is None or delta > 1 + high, "delta", delta, f"more than 1 + clip_high = {1 + high}")


def check_inner(inner: Inner | None, layers: int) -> None:
    """Raise ValueError when a method's internal policy is of a layer that the model does not have."""
    expect(
        inner is None or inner.layer < layers, "layer", inner and inner.layer, f"0 to {layers - 1}, the model's layers"
    )


def views_in(alg: Algorithm, state: State) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The views that the loss differentiates, and those rescored, in this state: the plan's where a method has phases."""
    plan = alg.plan(state) if alg.needs.inner else Plan()
    return (
        alg.needs.loss if plan.loss is None else plan.loss,
        alg.needs.rescore if plan.rescore is None else plan.rescore,
    )


def value_and_grad(
    alg: Algorithm, state: State, rows: Rollouts, views: Views, key: Key | None = None, credit: Credit | None = None
) -> tuple[Float[Array, ""], Views]:
    """The functional reference: loss and its gradient with respect to the views, on plain arrays (float64 too).

    Args:
      rows: rollouts with rewards, `old_logp`, and in `extras` the rescored views the method needs.
      views: the current policy's views (`alg.needs.loss`).
      credit: given advantages instead of `alg.credit`'s; unweighted credit is weighed.
    Returns: the scalar loss and a `Views` of gradients, exactly 0 at untrained positions.
    Raises ValueError that names what the method needs of `rows.extras` or `views` and was not given.
    """
    # Old views and row data are what `credit` reads (given credit has read them), or a plug-in scorer.
    causal = alg.needs.scorer == "causal"
    loss, rescore = views_in(alg, state)
    wanted = [v for v in rescore if credit is None or not v.startswith("old_")]
    wanted += alg.needs.row_extras if causal and credit is None else ()
    missing = [f"rows.extras[{name!r}]" for name in wanted if name not in rows.extras]
    missing += [f"views.{name}" for name in loss if causal and getattr(views, name) is None]
    if missing:
        raise ValueError(f"{alg.name} with these settings needs {', '.join(missing)}")
    if credit is None:
        credit = alg.credit(state, rows, jax.random.key(0) if key is None else key)
    credit = jax.lax.stop_gradient(credit)
    if credit.weight is None:
        credit = alg.weigh(state, rows, credit)
    (value, _), grads = jax.value_and_grad(lambda v: alg.loss(state, v, rows, credit), has_aux=True)(views)
    return value, grads
