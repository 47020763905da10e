"""OORL with GEPO: On-Policy Optimization with Group Equivalent Preference, arXiv 2505.12723. Axis: an offline preference loss
beside the on-policy one, in every update.

On-policy rows are REINFORCE++: binary reward on every token, whitened over the batch, PPO's clip, token mean. Given rows come in
groups of equivalent winners and of losers; with rho = sum_t (logp - ref_logp),

    GEPO = -log sigma(beta (mean_w rho - mean_l rho)) + lam Var_w(rho)          mean over groups
    L    = w_rl L_on-policy + w_gepo GEPO

The variance keeps equivalent answers equally likely relative to the reference: with one winner it is 0, with one loser too GEPO is
DPO. Its gradient, 2 (rho - mean) / n, outgrows the preference term's (at most beta / n) when winners differ by more than about beta;
w_gepo keeps it small. A group without winners or losers is skipped; an empty row counts with rho = 0.

The paper's formulas were rebuilt from its prose. Ours: population variance, beta, the clip; and both kinds of data are rows of one
task, problems with `chosen` and `rejected` completions (their lists in task.chosen_field, task.rejected_field) among problems to
sample, in one shuffled order: a batch holds them in the file's proportion on average. `rollout.group_size` must hold a group.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.advantages import group as groups
from jaxrl_llm.advantages.whiten import whiten
from jaxrl_llm.algorithms import Paper
from jaxrl_llm.algorithms.base import (
    Algorithm,
    Needs,
    Plan,
    Selection,
    check_clip,
    clipped_metrics,
    expect,
    no_state,
    per_token,
    weigh_by,
)
from jaxrl_llm.objectives import preference, ratios, surrogates, weights
from jaxrl_llm.types import GIVEN, Credit, Memory, Metrics, Rollouts, State, Views, mean_of

PAPER = Paper(
    title="On-Policy Optimization with Group Equivalent Preference for Multi-Programming Language Understanding",
    arxiv="2505.12723",
    axis="preference",
    confidence="paper",
    cost="reference log-probs",
)


@dataclass(frozen=True)
class Config:
    w_rl: float = 1.0
    w_gepo: float = 0.01
    beta: float = 0.1
    lam: float = 1.0  # of the winners' variance
    clip_low: float = 0.2
    clip_high: float = 0.2
    eps: float = 1e-8  # inside the square root of the whitening

    def __post_init__(self):
        check_clip(self.clip_low, self.clip_high)
        expect(self.beta > 0, "beta", self.beta, "more than 0")
        for name in ("w_rl", "w_gepo", "lam"):
            expect(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")


def mixed(plan: Plan, prompts: Sequence[Any]):
    """Collector: completions of the problems without given ones, and the given ones of the others."""
    from jaxrl_llm.rollout.collectors import preference_rows, sample_groups

    asked = [p for p in prompts if "chosen" not in p.record]
    rows = (yield from sample_groups(asked, plan.group_size)) if asked else []
    return rows + (yield from preference_rows([p for p in prompts if "chosen" in p.record], len(asked)))


def group_preference(
    rho: Float[Array, "B"], role: Int[Array, "B"], ids: Int[Array, "B"], beta: float, lam: float
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """GEPO of each row's group and the standard deviation of its winners' rho; role is 1 for winners, -1 for losers."""
    wins, loses = role > 0, role < 0
    count, others = (jnp.maximum(groups.segment(jnp.ones_like(rho), ids, on), 1) for on in (wins, loses))
    mean = groups.segment(rho, ids, wins) / count
    variance = groups.segment((rho - mean) ** 2, ids, wins) / count
    margin = beta * (mean - groups.segment(rho, ids, loses) / others)
    return -jax.nn.log_sigmoid(margin) + lam * variance, jnp.sqrt(jax.lax.stop_gradient(variance))


def build(config: Config) -> Algorithm:
    def on_policy(rows: Rollouts) -> Bool[Array, "B T"]:
        return rows.trained & (rows.stat & (rows.source != GIVEN))[:, None]

    def credit(state: State, rows: Rollouts, key: jax.Array) -> Credit:
        advantage = whiten(per_token(rows.score, rows), on_policy(rows), eps=config.eps, too_few="zero")
        given = rows.counted & (rows.source == GIVEN)
        role = jnp.where(given, jnp.where(rows.score > 0.5, 1, -1), 0)
        return Credit(advantage, extras={"role": role})

    def select(state: State, memory: Memory, rows: Rollouts, credit: Credit, key: jax.Array) -> Selection:
        return Selection(rows.with_(block=groups.dense_ids(jnp.asarray(rows.group)).astype(jnp.int32)), credit, memory)

    def weigh(state: State, rows: Rollouts, credit: Credit) -> Credit:
        role, ids = credit.extras["role"], groups.dense_ids(rows.group)
        one = jnp.ones(role.shape, rows.old_logp.dtype)
        winners, losers = groups.segment(one, ids, role > 0), groups.segment(one, ids, role < 0)
        inside = (role != 0) & (winners > 0) & (losers > 0)
        part = jnp.where(inside, 1 / jnp.maximum(winners + losers, 1), 0)  # of its group
        weighed = weigh_by(credit, weights.token_mean(on_policy(rows)))
        return replace(weighed, extras={**credit.extras, "share": part / jnp.maximum(jnp.sum(part), 1)})

    def loss(state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[jax.Array, Metrics]:
        mask, role, share = on_policy(rows), credit.extras["role"], credit.extras["share"]
        ratio = ratios.token(views.logp, rows.old_logp, mask)
        policy = surrogates.clipped(ratio, credit.advantage, mask, config.clip_low, config.clip_high)
        given = rows.trained & (role != 0)[:, None]
        rho = preference.sequence_score(views.logp, rows.extras["ref_logp"], given, length_norm=False)
        gepo, spread = group_preference(rho, role, groups.dense_ids(rows.group), config.beta, config.lam)
        total = config.w_rl * weights.weighted_sum(policy.loss, credit.weight)
        total += config.w_gepo * jnp.sum(jnp.where(share > 0, share * gepo, 0))
        return total, {
            **clipped_metrics(policy, ratio, mask, credit.weight),
            "gepo/loss": mean_of(gepo, share > 0),
            "gepo/winners_spread": mean_of(spread, share > 0),
            "gepo/winners": mean_of(rho, (share > 0) & (role > 0)),
            "gepo/losers": mean_of(rho, (share > 0) & (role < 0)),
        }

    return Algorithm(
        name="oorl_gepo",
        config=config,
        init=no_state,
        plan=lambda state: Plan(collector=mixed),
        credit=credit,
        loss=loss,
        weigh=weigh,
        select=select,
        couples="block",
        needs=Needs(rescore=("ref_logp",), importance=False, given="some"),
    )
