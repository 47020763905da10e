"""LLDS: against lazy likelihood displacement, arXiv 2512.04220. Axis: a regularizer of likelihoods that fall.

    D_t    = sg(old_logp_t) - logp_t                            positive where the token became less likely
    L_llds = 1 / N * sum over kept rows of w_t g_t max(0, D_t)  N: trained tokens of kept rows
    L      = L_GRPO + lam L_llds (+ beta k3)

Kept rows are those with A >= 0: what was right, or no worse than the rest, must not become less likely. The gate g is constant:
1 where the likelihood of the whole action fell (`action`; a run of trained tokens, so tool output ends one), of the whole
completion (`response`), or everywhere (`token`). w is 1, or `answer_weight` on tokens of the final answer (LLDS-MA: rows then bring
an "answer_mask" [B, T]). At logp = old_logp the term is 0: it acts from the second optimizer step on a batch, so it needs
`learner.epochs` or `learner.minibatches` above 1. In the first step rounding decides which tokens fell: each gets lam w / N of gradient.

L_GRPO is GRPO's, or with ratio=sequence GSPO's in its token form. `denominator=all` divides by all trained tokens, as the released
code does against the paper. Aggregation is the code's; the paper has the mean over rows. The code's clamp of the ratio is not here.
Our choices: the row's sign of A also for token advantages, answer_weight has no default but 1, ddof 1, eps 1e-6, `spread_tol`.
"""

from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrl_llm.advantages import group
from jaxrl_llm.algorithms import Paper
from jaxrl_llm.algorithms.base import (
    Algorithm,
    Needs,
    check_clip,
    clipped_metrics,
    expect,
    expect_one_of,
    group_method,
    weigh_by,
)
from jaxrl_llm.objectives import kl, ratios, surrogates, weights
from jaxrl_llm.types import Credit, Metrics, Rollouts, State, Views, mean_of

Gate = Literal["action", "response", "token"]

PAPER = Paper(
    title="On GRPO Collapse in Search-R1: The Lazy Likelihood-Displacement Death Spiral",
    arxiv="2512.04220",
    axis="regularizer",
    confidence="code",
    cost="a forward of the reference when beta > 0",
)


@dataclass(frozen=True)
class Config:
    lam: float = 0.2
    gate: Gate = "action"
    denominator: Literal["preserved", "all"] = "preserved"
    answer_weight: float = 1.0  # below 1: LLDS-MA, which lets the final answer become less likely
    ratio: Literal["token", "sequence"] = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    aggregation: weights.Aggregation = "token-mean"
    beta: float = 0.0  # KL to the reference (k3); the recipe has 1e-3
    ddof: int = 1
    eps: float = 1e-6
    spread_tol: float = group.SPREAD_TOL

    def __post_init__(self):
        expect(self.lam >= 0, "lam", self.lam, "at least 0")
        expect_one_of("gate", self.gate, ("action", "response", "token"))
        expect_one_of("denominator", self.denominator, ("preserved", "all"))
        expect(0 <= self.answer_weight <= 1, "answer_weight", self.answer_weight, "0 to 1")
        expect_one_of("ratio", self.ratio, ("token", "sequence"))
        check_clip(self.clip_low, self.clip_high)
        expect_one_of("aggregation", self.aggregation, weights.AGGREGATIONS)
        expect(self.beta >= 0, "beta", self.beta, "at least 0")


def gates(fall: Float[Array, "B T"], mask: Bool[Array, "B T"], gate: Gate) -> Bool[Array, "B T"]:
    """Which tokens are held: those of an action or completion whose likelihood fell, or all."""
    if gate == "token":
        return mask
    if gate == "response":
        return mask & (jnp.sum(jnp.where(mask, fall, 0), -1, keepdims=True) > 0)
    return mask & (ratios.over_turns(fall, mask) > 0)


def displacement(
    logp: Float[Array, "B T"], old_logp: Float[Array, "B T"], mask: Bool[Array, "B T"], gate: Gate
) -> Float[Array, "B T"]:
    """g max(0, D): how much less likely each held token became. Its gradient is 0 where D is."""
    fall = -ratios.log_ratio(logp, old_logp, mask)
    held = gates(jax.lax.stop_gradient(fall), mask, gate)
    return jnp.where(held, jax.nn.relu(fall), 0)


def build(config: Config) -> Algorithm:
    def weigh(state: State, rows: Rollouts, credit: Credit) -> Credit:
        mask = rows.trained
        kept = mask & (jnp.sum(jnp.where(mask, credit.advantage, 0), -1, keepdims=True) >= 0)
        count = jnp.sum(kept if config.denominator == "preserved" else mask)
        weight = kept.astype(rows.old_logp.dtype) / jnp.maximum(count, 1)
        if config.answer_weight != 1:
            weight *= jnp.where(rows.extras["answer_mask"] > 0, config.answer_weight, 1)
        credit = replace(credit, extras={**credit.extras, "keep": weight})
        return weigh_by(credit, weights.aggregation(config.aggregation, mask))

    def loss(state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[jax.Array, Metrics]:
        mask = rows.trained
        likelihood_ratio = ratios.token if config.ratio == "token" else ratios.sequence_token
        ratio = likelihood_ratio(views.logp, rows.old_logp, mask)
        policy = surrogates.clipped(ratio, credit.advantage, mask, config.clip_low, config.clip_high)
        fell = displacement(views.logp, rows.old_logp, mask, config.gate)
        total = weights.weighted_sum(policy.loss, credit.weight)
        total += config.lam * weights.weighted_sum(fell, credit.extras["keep"])
        metrics = clipped_metrics(policy, ratio, mask, credit.weight)
        metrics["displacement"] = mean_of(fell, credit.extras["keep"] > 0)
        metrics["displacement/share"] = mean_of(fell > 0, credit.extras["keep"] > 0)
        if config.beta:
            token_kl = kl.estimate("k3", views.logp, rows.extras["ref_logp"], mask)
            total += config.beta * weights.weighted_sum(token_kl, credit.reg_weight)
            metrics["kl"] = mean_of(token_kl, mask)
        return total, metrics

    return group_method(
        "llds",
        config,
        loss,
        weigh=weigh,
        needs=Needs(
            rescore=("ref_logp",) if config.beta else (),
            row_extras=("answer_mask",) if config.answer_weight != 1 else (),
            min_group=2,
        ),
    )
