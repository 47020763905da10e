"""The arrays that flow through one training step. Everything here is a pytree of fixed structure for a run.

Per-token arrays are in completion coordinates: `logp[b, 0]` is the first completion token given its prompt. Padding may
hold any value, NaN included, and never matters: every consumer selects with `where(mask, ...)`, never by multiplying.

Letters in shapes: P contexts, L context length, B rows, T completion length, R reward parts.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Where a row came from (`Rollouts.source`).
CURRENT, REFERENCE, GIVEN, REPLAY = 0, 1, 2, 3

ROUTES = "routes"  # in `Rollouts.extras`: experts to replay (training/routing.py)

Params = Any  # nested dict of arrays
State = Any  # a pytree of arrays, checkpointed
Memory = dict[str, Any]  # host state (numpy arrays in nested dicts), checkpointed


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rollouts:
    """Sampled rows with rewards. A row is a completion, an agent's turn, or a segment.

    `prompt` is the *sharing* key (rows with one prompt may be executed together); `group` is the *statistics* key
    (rows whose rewards are compared; ragged, ids global over hosts). The two differ on purpose: the same prompt drawn
    twice in a batch makes two groups.
    """

    prompt_tokens: Int[Array, "P L"]  # right-padded
    prompt_length: Int[Array, "P"]
    prompt: Int[Array, "B"]  # index into the contexts
    group: Int[Array, "B"]
    row_id: Int[Array, "B"]
    tokens: Int[Array, "B T"]  # right-padded
    length: Int[Array, "B"]  # tokens of the completion, tool output included
    mask: Bool[Array, "B T"]  # what trains; may have holes (tool output)
    stat: Bool[Array, "B"]  # counts in statistics (False: padding rows, replayed rows)
    scored: Bool[Array, "B"]  # the reward could be computed; False leaves statistics and loss
    reward: Float[Array, "B R"]  # weighted parts; their sum is `score`
    truncated: Bool[Array, "B"]
    version: Int[Array, "B T"]  # RL step of the policy that sampled the token
    sampler_logp: Float[Array, "B T"]  # under the distribution sampled from (temperature and truncation included)
    old_logp: Float[Array, "B T"]  # learner's logp when the row was collected; set once, replay never recomputes it
    source: Int[Array, "B"]  # CURRENT, REFERENCE, GIVEN or REPLAY
    block: Int[Array, "B"]  # rows that one loss term couples (a pair); = row index when rows are independent
    extras: dict[str, Array] = field(default_factory=dict)
    # extras holds rescored views named "<policy>_<view>" ("ref_logp", "old_entropy", "old_values", "old_tempered_logp";
    # "old_prompt_logp" [B, L] is that of each context token given those before it, 0 for the first)
    # recorded "routes" [B, L+T, M, k] of a model with experts (-1: none),
    # and row data a method asked for in `Needs.row_extras` ("prompt_id", "traj", "step_index", "anchor_id", ...).

    @property
    def score(self) -> Float[Array, "B"]:
        """Total reward of each row; unscored rows may hold anything."""
        return self.reward.sum(-1)

    @property
    def counted(self) -> Bool[Array, "B"]:
        """Rows that enter statistics: in the batch for statistics, and scored."""
        return self.stat & self.scored

    @property
    def trained(self) -> Bool[Array, "B T"]:
        """Tokens that enter the loss: masked in, and the row was scored."""
        return self.mask & self.scored[:, None]

    def with_(self, extras: dict[str, Array] | None = None, **fields: Any) -> "Rollouts":
        """A copy with fields replaced and extras added."""
        return replace(self, extras={**self.extras, **(extras or {})}, **fields)


_ABSENT: Any = None  # a method gets every view and weight it asked for, so the fields are typed as present


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Views:
    """What a policy says about rows: the only thing gradients flow through. Absent views are None."""

    logp: Float[Array, "B T"] = _ABSENT  # log softmax(logits / rollout temperature)[token]
    entropy: Float[Array, "B T"] = _ABSENT  # of the same distribution, nats
    logsumexp: Float[Array, "B T"] = _ABSENT  # of logits / rollout temperature
    collision: Float[Array, "B T"] = _ABSENT  # sum over the vocabulary of the same distribution's squared probabilities
    tempered_logp: Float[Array, "B T"] = _ABSENT  # at `Plan.score_temperature` instead
    inner_logp: Float[Array, "B T"] = _ABSENT  # logp of the layer `Needs.inner`, unembedded
    values: Float[Array, "B T"] = _ABSENT  # critic's value before each completion token
    extras: dict[str, Array] = field(default_factory=dict)  # views of plug-in scorers (ELBO terms, ...)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Credit:
    """What `credit` decides on the whole batch and `weigh` completes for one minibatch. Constant in the loss.

    weight: aggregation weight of the policy term, denominators of the whole minibatch included, so a loss is
      `sum(where(weight != 0, weight * token_loss, 0))` and splitting a minibatch into microbatches is exact. The learner
      multiplies importance weights for sampler/learner mismatch into it.
    reg_weight: the same for regularizers (KL, entropy, ratio variance), without importance weights.
    """

    advantage: Float[Array, "B T"]
    weight: Float[Array, "B T"] = _ABSENT  # None until `weigh`
    reg_weight: Float[Array, "B T"] = _ABSENT
    score: Float[Array, "B"] = _ABSENT  # selection score
    extras: dict[str, Array] = field(default_factory=dict)


def rollouts_of(
    mask: Bool[Array, "B T"],
    reward: Float[Array, "B"],
    group: Int[Array, "B"],
    old_logp: Float[Array, "B T"],
    extras: dict[str, Array] | None = None,
) -> Rollouts:
    """Rollouts from the arrays that losses read, for use as a functional reference without a model.

    Every row is scored and counted, its own block and its own context; tokens are 0. `extras`: what a method's
    `needs.rescore` and `needs.row_extras` name, such as "ref_logp" [B, T].
    """
    mask, reward, old_logp = jnp.asarray(mask, bool), jnp.asarray(reward), jnp.asarray(old_logp)
    b, t = mask.shape
    own, zeros = jnp.arange(b, dtype=jnp.int32), jnp.zeros((b, t), jnp.int32)
    yes = jnp.ones(b, bool)
    return Rollouts(
        prompt_tokens=jnp.zeros((b, 1), jnp.int32),
        prompt_length=jnp.ones(b, jnp.int32),
        prompt=own,
        group=jnp.asarray(group, jnp.int32),
        row_id=own,
        tokens=zeros,
        length=jnp.max(jnp.where(mask, jnp.arange(1, t + 1), 0), axis=1).astype(jnp.int32),
        mask=mask,
        stat=yes,
        scored=yes,
        reward=reward[:, None],
        truncated=~yes,
        version=zeros,
        sampler_logp=old_logp,
        old_logp=old_logp,
        source=jnp.full(b, CURRENT, jnp.int32),
        block=own,
        extras={name: jnp.asarray(x) for name, x in (extras or {}).items()},
    )


def contexts(rows: Rollouts) -> Rollouts:
    """The contexts as completions, to be scored: P rows of L tokens, each a context after its first token, given that."""
    p, l = rows.prompt_tokens.shape
    own, yes, zeros = jnp.arange(p, dtype=jnp.int32), jnp.ones(p, bool), jnp.zeros((p, l), rows.old_logp.dtype)
    length = jnp.asarray(rows.prompt_length) - 1
    return Rollouts(
        prompt_tokens=rows.prompt_tokens[:, :1],
        prompt_length=jnp.ones(p, jnp.int32),
        prompt=own,
        group=own,
        row_id=own,
        tokens=jnp.pad(jnp.asarray(rows.prompt_tokens)[:, 1:], ((0, 0), (0, 1))),
        length=length,
        mask=jnp.arange(l) < length[:, None],
        stat=yes,
        scored=yes,
        reward=zeros[:, :1],
        truncated=~yes,
        version=zeros.astype(jnp.int32),
        sampler_logp=zeros,
        old_logp=zeros,
        source=jnp.full(p, GIVEN, jnp.int32),
        block=own,
    )


def take(rows: Rollouts, index: Int[Array, "n"]) -> Rollouts:
    """Rows by index, in that order and repeatable; -1 makes a padding row.

    A padding row trains nothing and is in no statistic; every taken row is a block of its own. Contexts are kept whole.
    """
    keep, at = index >= 0, jnp.maximum(index, 0)
    own = jnp.arange(len(index), dtype=jnp.int32)
    names = [f.name for f in fields(Rollouts) if f.name not in ("prompt_tokens", "prompt_length", "extras")]
    taken = replace(rows, **jax.tree.map(lambda x: jnp.asarray(x)[at], {n: getattr(rows, n) for n in names}))
    return taken.with_(
        extras={name: jnp.asarray(x)[at] for name, x in rows.extras.items()},
        group=jnp.where(keep, taken.group, -1 - own),
        length=jnp.where(keep, taken.length, 0),
        mask=taken.mask & keep[:, None],
        stat=taken.stat & keep,
        scored=taken.scored & keep,
        block=own,
    )


def take_rows(rows: Rollouts, credit: Credit, index: Int[Array, "n"]) -> tuple[Rollouts, Credit]:
    """`take` of rows together with their unweighted credit, which is 0 in every field of a padding row."""
    taken = jax.tree.map(lambda x: jnp.asarray(x)[jnp.maximum(index, 0)], credit)
    return take(rows, index), credit_where(index >= 0, taken)


def credit_where(on: Bool[Array, "B"], credit: Credit) -> Credit:
    """Credit of the rows that are `on`; 0 in every field of the others."""
    return jax.tree.map(lambda x: jnp.where(jnp.expand_dims(on, range(1, x.ndim)), x, jnp.zeros((), x.dtype)), credit)


class Mean(NamedTuple):
    """A metric that adds over microbatches, devices and hosts: report sum / count."""

    sum: jax.Array
    count: jax.Array


class Max(NamedTuple):
    value: jax.Array


class Min(NamedTuple):
    value: jax.Array


Metric = Mean | Max | Min
Metrics = dict[str, Metric]


def mean_of(x: Array, where: Array | None = None) -> Mean:
    """Mean metric of `x` over `where` (everything when None); masked entries may be NaN."""
    x = jnp.asarray(x, jnp.result_type(x, jnp.float32))  # shares are means of booleans
    if where is None:
        return Mean(jnp.sum(x), jnp.asarray(x.size, x.dtype))
    where = jnp.broadcast_to(where, x.shape)
    return Mean(jnp.sum(jnp.where(where, x, 0)), jnp.sum(where).astype(x.dtype))


def merge_metrics(a: Metrics, b: Metrics) -> Metrics:
    """Add two sets of metrics with the same keys."""

    def one(x: Metric, y: Metric) -> Metric:
        if isinstance(x, Mean):
            return Mean(x.sum + y.sum, x.count + y.count)  # type: ignore[union-attr]
        return Max(jnp.maximum(x.value, y.value)) if isinstance(x, Max) else Min(jnp.minimum(x.value, y.value))  # type: ignore[union-attr]

    return {k: one(a[k], b[k]) if k in a and k in b else (a.get(k) or b[k]) for k in {**a, **b}}  # type: ignore[return-value]


def metric_value(m: Metric) -> float:
    """The number to report on the host; an empty mean is 0."""
    if isinstance(m, Mean):
        return float(m.sum) / float(m.count) if float(m.count) else 0.0
    return float(m.value)
