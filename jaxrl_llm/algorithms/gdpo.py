"""GDPO: Improving Reasoning for Diffusion Language Models via Group Diffusion Policy Optimization. arXiv 2510.08554.
(Not the multi-reward GDPO, arXiv 2601.05242.)

Changes the likelihood: a masked diffusion model has no log pi(y), so its bound S stands in, estimated with fixed time nodes
and random masks (`objectives.elbo`). One ratio per completion:

    r_b = exp(S_b - S_old_b);  A_b = R_b - mean of the group
    l_b = -min(r A, clip(r, 1 - eps, 1 + eps) A) / len_b,  averaged over completions, empty ones counted

The views come from the plug-in scorer "elbo": `extras["elbo"]`, each token's share of S. Masks are a function of the row's
`mask_key` alone, so current, old and reference policies see the same draws by construction, and r = 1 exactly when nothing
moved. Each of the `updates` inner updates has masks of its own; their old bounds are computed before the first.

`ratio_norm="length"` is a port's form: the length inside the exponent instead of outside. Ours: eps, no KL (beta = 0), and for
beta > 0 the k3 of the length-normalised reference ratio on the same masks.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.advantages import group
from jaxrl_llm.algorithms import Paper
from jaxrl_llm.algorithms.base import (
    Algorithm,
    Needs,
    Plan,
    Report,
    check_clip,
    clipped_metrics,
    count_steps,
    expect,
    expect_one_of,
    per_token,
    weigh_by,
)
from jaxrl_llm.objectives import elbo, surrogates, weights
from jaxrl_llm.types import Credit, Metrics, Rollouts, State, Views, mean_of, merge_metrics

PAPER = Paper(
    title="Improving Reasoning for Diffusion Language Models via Group Diffusion Policy Optimization",
    arxiv="2510.08554",
    axis="likelihood",
    confidence="paper",
    cost="nodes x samples forwards per view",
    state="step counter",
)


@dataclass(frozen=True)
class Config:
    quadrature: elbo.Quadrature = "gauss"
    nodes: int = 3  # N, time nodes
    samples: int = 1  # K, masks per node
    mask_mode: elbo.MaskMode = "count"  # the reference code; biased for short completions
    updates: int = 12  # inner updates per batch, each with its own masks
    ratio_norm: Literal["none", "length"] = "none"
    clip: float = 0.2
    beta: float = 0.0
    memory: Literal["two_pass", "batched"] = "two_pass"  # gradient of one forward at a time, or of all at once

    def __post_init__(self):
        check_clip(self.clip, self.clip)
        expect_one_of("mask_mode", self.mask_mode, get_args(elbo.MaskMode))
        expect_one_of("ratio_norm", self.ratio_norm, ("none", "length"))
        expect_one_of("memory", self.memory, ("two_pass", "batched"))
        expect(self.updates >= 1, "updates", self.updates, "at least 1")
        expect(self.samples >= 1, "samples", self.samples, "at least 1")
        elbo.nodes(self.quadrature, self.nodes)


def scorer(config: Config, logits: Callable[[Any, Rollouts, jax.Array], jax.Array], mask_id: int):
    """The "elbo" scorer of a network: (params, rows) -> Views.

    logits: (params, rows, completions [B, T] with hidden tokens replaced by `mask_id`) -> [B, T, V], same positions.
    """
    grid = elbo.nodes(config.quadrature, config.nodes)

    def views(params: Any, rows: Rollouts) -> Views:
        hidden = elbo.draw_masks(rows.extras["mask_key"], rows.mask, grid.t, config.samples, config.mask_mode)
        network = partial(logits, params, rows)
        share = elbo.score(network, rows.tokens, hidden, grid, mask_id, config.memory == "two_pass")
        return Views(extras={"elbo": share})

    return views


def keyed(step: int) -> Callable[..., Generator[Any, Any, Any]]:
    """Flat collection whose rows carry a `mask_key` made of the step and the row's number."""

    def collect(plan: Plan, prompts: Sequence[Any]):
        from jaxrl_llm.rollout.collectors import flat

        rows = yield from flat(plan, prompts)
        keys = np.random.default_rng(step).integers(np.iinfo(np.int32).max, size=len(rows))
        for row, key in zip(rows, keys):
            row.extras["mask_key"] = int(key)
        return rows

    return collect


def rekeyed(rows: Rollouts, update: int) -> Rollouts:
    """The rows with the mask keys of an inner update; update 0 keeps theirs."""
    if update == 0:
        return rows
    fold = jax.vmap(lambda k: jax.random.bits(jax.random.fold_in(jax.random.key(k), update), (), jnp.uint32) >> 1)
    return rows.with_(extras={"mask_key": fold(jnp.asarray(rows.extras["mask_key"])).astype(jnp.int32)})


def build(config: Config) -> Algorithm:
    policies = {"old": "policy", "ref": "ref"} if config.beta else {"old": "policy"}
    shortest = 1 / min(elbo.nodes(config.quadrature, config.nodes).t)

    def init() -> State:
        return {"step": jnp.zeros((), jnp.int32)}

    def plan(state: State) -> Plan:
        return Plan(collector=keyed(int(state["step"])))

    def credit(state: State, rows: Rollouts, key: jax.Array) -> Credit:
        return Credit(per_token(group.normalized(rows.score, rows.group, rows.counted, scale="none"), rows))

    def weigh(state: State, rows: Rollouts, credit: Credit) -> Credit:
        return weigh_by(credit, weights.seq_mean_token_mean(rows.trained, count_empty=True, rows=rows.counted))

    def loss(state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[jax.Array, Metrics]:
        mask = rows.trained
        length = jnp.maximum(mask.sum(-1), 1).astype(rows.old_logp.dtype)
        bound = elbo.sequence_bound(views.extras["elbo"], mask)
        change = bound - elbo.sequence_bound(rows.extras["old_elbo"], mask)
        ratio = jnp.exp(change / length if config.ratio_norm == "length" else change)[:, None]
        clipped = surrogates.clipped(ratio, credit.advantage, mask, config.clip, config.clip)
        scale = 1 if config.ratio_norm == "length" else 1 / length[:, None]
        total = weights.weighted_sum(clipped.loss * scale, credit.weight)
        metrics = clipped_metrics(clipped, ratio, mask, credit.weight)
        metrics["elbo/per_token"] = mean_of(bound / length, rows.counted)
        metrics["elbo/short_rows"] = mean_of(length < shortest, rows.counted)  # their masks are biased the most
        if config.beta:
            q = (elbo.sequence_bound(rows.extras["ref_elbo"], mask) - bound) / length
            k3 = jnp.broadcast_to((jnp.expm1(q) - q)[:, None], mask.shape)
            total += config.beta * weights.weighted_sum(k3, credit.reg_weight)
            metrics["kl"] = mean_of(k3[:, 0], rows.counted)
        return total, metrics

    def update(learner: Any, state: State, rows: Rollouts, credit: Credit, key: jax.Array) -> tuple[State, Report]:
        """Inner update u sees mask set u; update 0 uses the bounds rescored with the batch."""
        batches = [rows]
        for u in range(1, config.updates):
            fresh = rekeyed(rows, u)
            seen = {f"{name}_elbo": learner.views(fresh, ("elbo",), policy) for name, policy in policies.items()}
            batches.append(fresh.with_(extras={name: v.extras["elbo"] for name, v in seen.items()}))
        reports: list[Metrics] = []
        merged: Metrics = {}
        for batch in batches:
            state, metrics = learner.step(state, batch, credit)
            reports.append(metrics)
            merged = merge_metrics(merged, metrics)
        return state, Report(merged, reports[-1], len(reports), tuple(reports))

    return Algorithm(
        name="gdpo",
        config=config,
        init=init,
        plan=plan,
        credit=credit,
        loss=loss,
        weigh=weigh,
        update=update,
        updates=config.updates,
        observe=count_steps,
        couples="row",
        needs=Needs(
            loss=("elbo",),
            rescore=tuple(f"{name}_elbo" for name in policies),
            row_extras=("mask_key",),
            importance=False,
            scorer="elbo",
            min_group=2,
        ),
    )
