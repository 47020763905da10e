"""REINFORCE Leave-One-Out (Back to Basics), arXiv 2402.14740. Axis: the baseline, and the completion as one action.

    R_i = score_i - beta * sum_t (old_logp_it - ref_logp_it)                 KL in the reward, no gradient
    A_i = R_i - mean_{j != i} R_j                                            over the other completions of the prompt
    rho_i = exp(sum_t (logp_it - old_logp_it))                               product, not length-normalised
    L = mean_i -min(rho_i A_i, clip(rho_i, 1 - clip, 1 + clip) A_i)          form=clipped (TRL)
    L = -mean_i A_i sum_t logp_it                                            form=reinforce (the paper)
    L = token mean of PPO's clipped loss with A_i on every token             form=token (verl)

On policy the first two have the same gradient. A completion without a reward is left out of its siblings' baseline and of the
loss; one alone has advantage 0. Completions without trained tokens are not counted in means.
Nothing clamps the sum in rho: beyond 88 nats it overflows float32, its gradient is not finite, and the learner skips the update.
Our choices: `spread_tol`, `whiten_eps`.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from jaxrl_llm.advantages import group
from jaxrl_llm.advantages.whiten import whiten
from jaxrl_llm.algorithms import Paper
from jaxrl_llm.algorithms.base import (
    Algorithm,
    Needs,
    check_clip,
    clipped_metrics,
    expect,
    expect_one_of,
    flat_plan,
    no_state,
    per_token,
    ratio_metrics,
    weigh_by,
    weighted_mean_of,
)
from jaxrl_llm.objectives import ratios, surrogates, weights
from jaxrl_llm.types import Credit, Metrics, Rollouts, State, Views

PAPER = Paper(
    title="Back to Basics: Revisiting REINFORCE-Style Optimization for Learning from Human Feedback in LLMs",
    arxiv="2402.14740",
    axis="advantage",
    confidence="code",
    cost="a forward of the reference when beta > 0",
)


@dataclass(frozen=True)
class Config:
    form: Literal["clipped", "reinforce", "token"] = "clipped"
    beta: float = 0.03  # KL to the reference in the reward
    clip_low: float = 0.2
    clip_high: float = 0.2
    whiten: bool = False  # whiten advantages over the batch's completions (TRL's normalize_advantages)
    whiten_eps: float = 1e-8
    spread_tol: float = group.SPREAD_TOL

    def __post_init__(self):
        expect_one_of("form", self.form, ("clipped", "reinforce", "token"))
        check_clip(self.clip_low, self.clip_high)
        expect(self.beta >= 0, "beta", self.beta, "at least 0")


def shaped_reward(rows: Rollouts, beta: float) -> jax.Array:
    """[B] score minus beta times the completion's summed log ratio to the reference."""
    if not beta:
        return rows.score
    return rows.score - beta * jnp.sum(ratios.log_ratio(rows.old_logp, rows.extras["ref_logp"], rows.trained), -1)


def build(config: Config) -> Algorithm:
    def credit(state: State, rows: Rollouts, key: jax.Array) -> Credit:
        advantage = group.leave_one_out(shaped_reward(rows, config.beta), rows.group, rows.counted, config.spread_tol)
        if config.whiten:
            advantage = whiten(advantage, rows.counted, eps=config.whiten_eps)
        return Credit(per_token(advantage, rows))

    def weigh(state: State, rows: Rollouts, credit: Credit) -> Credit:
        if config.form == "token":
            return weigh_by(credit, weights.token_mean(rows.trained))
        if config.form == "reinforce":
            return weigh_by(credit, weights.seq_mean_token_sum(rows.trained))
        return weigh_by(credit, weights.seq_mean_token_mean(rows.trained))  # the tokens of a row share one ratio

    def loss(state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[jax.Array, Metrics]:
        mask = rows.trained
        if config.form == "reinforce":
            policy_loss = surrogates.reinforce(views.logp, credit.advantage, mask)
            metrics = {
                "policy_loss": weighted_mean_of(policy_loss, credit.weight),
                **ratio_metrics(ratios.token(views.logp, rows.old_logp, mask), mask),
            }
            return weights.weighted_sum(policy_loss, credit.weight), metrics
        likelihood_ratio = ratios.product if config.form == "clipped" else ratios.token
        ratio = likelihood_ratio(views.logp, rows.old_logp, mask)
        policy = surrogates.clipped(ratio, credit.advantage, mask, config.clip_low, config.clip_high)
        return weights.weighted_sum(policy.loss, credit.weight), clipped_metrics(policy, ratio, mask, credit.weight)

    return Algorithm(
        name="rloo",
        config=config,
        init=no_state,
        plan=flat_plan,
        credit=credit,
        loss=loss,
        weigh=weigh,
        needs=Needs(rescore=("ref_logp",) if config.beta else (), min_group=2),
        couples="row",
    )
