"""Information-consistent language model recommendations through GRPO. arXiv 2512.12858.

Axis: the group. Completions that are compared answer different phrasings of one request, each in a fresh context, and are rewarded
for a high entropy (more complete, the paper says) that is stable across phrasings:

    help_b = (H_b - H_min) / (H_max - H_min)
    F_b    = 1 - mean_{b'} |H_b - H_b'| / MAX_GAP             over the other answers to the request; MAX_GAP: the batch's largest
    A_b    = (r_b - mean) / (std + 1e-4),   r = alpha help + beta F          within the request
    L      = GRPO's clipped loss + kl_coef k3

H is the row's score: with `task.reward: text_entropy` the entropy of the text's own words (our reading; the model's predictive entropy
is another thing), or whatever number should be high and stable. Problems bring other phrasings in a field "phrasings"; the
rollout's group_size is dealt evenly to them, and answers to the same phrasing are compared too.

`stability=group` has one F for all answers to a request, the form of the paper: a constant cancels in a group-normalised advantage, so
it acts with `normalize=batch` only. The reward sees a number: different answers of equal entropy count as consistent, and rare words raise
it. Known from the abstract and a note. Our choices: alpha, beta, 4 phrasings, clip, kl_coef, bounds of H from the batch, F of single
answers, `spread_tol`. Running bounds of H are not here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.advantages import consistency, group
from jaxrl_llm.algorithms import Paper
from jaxrl_llm.algorithms.base import (
    Algorithm,
    Needs,
    Plan,
    check_clip,
    clipped_metrics,
    expect,
    expect_one_of,
    no_state,
    per_token,
    row_mean,
)
from jaxrl_llm.objectives import kl, ratios, surrogates
from jaxrl_llm.objectives.weights import weighted_sum
from jaxrl_llm.types import Credit, Metrics, Rollouts, State, Views, mean_of

PAPER = Paper(
    title="Information-Consistent Language Model Recommendations through Group Relative Policy Optimization",
    arxiv="2512.12858",
    axis="reward",
    confidence="abstract",
    cost="a forward of the reference when kl_coef > 0",
)


@dataclass(frozen=True)
class Config:
    alpha: float = 0.5  # weight of helpfulness
    beta: float = 0.5  # weight of stability
    phrasings: int = 4  # most phrasings of a request to use
    stability: Literal["row", "group"] = "row"
    normalize: Literal["group", "batch"] = "group"  # advantages within a request, or over all rows of the batch
    h_min: float | None = None  # bounds of H; none: the batch's
    h_max: float | None = None
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.04  # 0: no reference policy
    ddof: int = 1
    eps: float = 1e-4
    spread_tol: float = group.SPREAD_TOL

    def __post_init__(self):
        expect(self.alpha >= 0, "alpha", self.alpha, "at least 0")
        expect(self.beta >= 0, "beta", self.beta, "at least 0")
        expect(self.phrasings >= 1, "phrasings", self.phrasings, "at least 1")
        expect_one_of("stability", self.stability, ("row", "group"))
        expect_one_of("normalize", self.normalize, ("group", "batch"))
        acts = self.stability == "row" or self.normalize == "batch"
        expect(acts, "stability", self.stability, "row, as a constant of the group cancels with normalize=group")
        bounds = self.h_min is None or self.h_max is None or self.h_min < self.h_max
        expect(bounds, "h_min", self.h_min, f"less than h_max={self.h_max}")
        check_clip(self.clip_low, self.clip_high)
        expect(self.kl_coef >= 0, "kl_coef", self.kl_coef, "at least 0")


def across_phrasings(most: int):
    """Collector: `plan.group_size` completions for every request, dealt evenly to its first `most` phrasings."""

    def collect(plan: Plan, prompts: Sequence[Any]):
        from jaxrl_llm.rollout.collectors import row_of
        from jaxrl_llm.rollout.rows import Request, Score

        asked = []  # (request, context, completions)
        for g, prompt in enumerate(prompts):
            contexts = [prompt.tokens, *prompt.phrasings][: min(most, plan.group_size)]
            each, more = divmod(plan.group_size, len(contexts))
            asked += [(g, context, each + (i < more)) for i, context in enumerate(contexts)]
        answers = yield Request([context for _, context, _ in asked], [n for *_, n in asked])
        rows = [
            replace(row_of(prompts[g], completion, g), context=context)
            for (g, context, _), completions in zip(asked, answers)
            for completion in completions
        ]
        yield Score(rows)
        return rows

    return collect


def rewards(config: Config, rows: Rollouts) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Helpfulness and stability of each counted row."""
    counted, tol = rows.counted, config.spread_tol
    helps = consistency.helpfulness(rows.score, counted, config.h_min, config.h_max, tol)
    stable = consistency.stability(rows.score, rows.group, counted, tol)
    if config.stability == "group":
        stable = group.statistics(stable, rows.group, counted).mean
    return helps, stable


def build(config: Config) -> Algorithm:
    def plan(state: State) -> Plan:
        return Plan(
            collector=across_phrasings(config.phrasings),
            capacity=lambda prompts, size: (prompts * min(config.phrasings, size), prompts * size),
        )

    def credit(state: State, rows: Rollouts, key: jax.Array) -> Credit:
        helps, stable = rewards(config, rows)
        compared = rows.group if config.normalize == "group" else jnp.zeros_like(rows.group)
        advantage = group.normalized(
            config.alpha * helps + config.beta * stable,
            *(compared, rows.counted),
            ddof=config.ddof,
            eps=config.eps,
            spread_tol=config.spread_tol,
        )
        shown = {"helpfulness": helps, "stability": stable}
        extras = {name: jnp.where(rows.counted, x, 0) for name, x in shown.items()}
        return Credit(per_token(advantage, rows), extras=extras)

    def loss(state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[jax.Array, Metrics]:
        mask = rows.trained
        ratio = ratios.token(views.logp, rows.old_logp, mask)
        policy = surrogates.clipped(ratio, credit.advantage, mask, config.clip_low, config.clip_high)
        total = weighted_sum(policy.loss, credit.weight)
        metrics = clipped_metrics(policy, ratio, mask, credit.weight)
        metrics |= {f"reward/{name}": mean_of(x, rows.counted) for name, x in credit.extras.items()}
        if config.kl_coef:
            k3 = kl.estimate("k3", views.logp, rows.extras["ref_logp"], mask)
            total += config.kl_coef * weighted_sum(k3, credit.reg_weight)
            metrics["kl"] = mean_of(k3, mask)
        return total, metrics

    return Algorithm(
        name="info_grpo",
        config=config,
        init=no_state,
        plan=plan,
        credit=credit,
        loss=loss,
        weigh=row_mean,
        needs=Needs(rescore=("ref_logp",) if config.kl_coef else (), min_group=2 if config.normalize == "group" else 1),
        couples="row",
    )
