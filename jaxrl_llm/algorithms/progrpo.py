"""ProGRPO: Back to Basics: Revisiting Exploration in RL for LLM Reasoning via Generative Probabilities. arXiv 2602.05281.

Axis: the advantage. Over-confident answers are damped and rare ones favoured, relative to how sure the policy is of the prompt:

    A~_i = A_i + alpha (c(q) - c(o_i))          in groups with a correct answer (some R > 0), right and wrong answers alike
    c(x) = exp(mean of the `share` smallest log-probs of x)              under the policy that sampled, a constant
    L    = token-mean of -min(r A~, clip(r, 1 - clip_low, 1 + clip_high) A~)

A is GRPO's; a group that is all wrong keeps A~ = A = 0. With `rule=mixed` all-correct groups keep it too, otherwise their most
confident answers are unlearned for the rare ones, and a correct answer that is alone has its bonus. c(q) needs the log-probs of the
prompt, "old_prompt_logp" [B, L]: an extra forward of the prompts. Their first token is predicted by nothing and left out.

Known from the abstract, one review and one note only. Our choices: alpha 0.5 (not known; c is in (0, 1), so the bonus stays below
the reward's signal), the same `share` for c(q) as for c(o), the sampling policy for c, ddof 1, eps 1e-6, `spread_tol`.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrl_llm.advantages import confidence, group
from jaxrl_llm.algorithms import Paper
from jaxrl_llm.algorithms.base import (
    Algorithm,
    Needs,
    check_clip,
    clipped_metrics,
    expect,
    expect_one_of,
    group_method,
    per_token,
    token_mean,
)
from jaxrl_llm.objectives import ratios, surrogates, weights
from jaxrl_llm.types import Credit, Metrics, Rollouts, State, Views, mean_of

PAPER = Paper(
    title="Back to Basics: Revisiting Exploration in RL for LLM Reasoning via Generative Probabilities (ProGRPO)",
    arxiv="2602.05281",
    axis="advantage",
    confidence="abstract",
    cost="a forward of the prompts",
)


@dataclass(frozen=True)
class Config:
    alpha: float = 0.5  # weight of the confidence difference; 0: GRPO with a token mean
    share: float = 0.2  # of the tokens, the least likely ones, that make the confidence
    rule: Literal["any", "mixed"] = "any"  # groups with a bonus: some answer correct; some correct and some not
    clip_low: float = 0.2
    clip_high: float = 0.28
    ddof: int = 1
    eps: float = 1e-6
    spread_tol: float = group.SPREAD_TOL

    def __post_init__(self):
        expect(self.alpha >= 0, "alpha", self.alpha, "at least 0")
        expect(0 < self.share <= 1, "share", self.share, "more than 0, at most 1")
        expect_one_of("rule", self.rule, ("any", "mixed"))
        check_clip(self.clip_low, self.clip_high)


def rewarded(config: Config, rows: Rollouts) -> Bool[Array, "B"]:
    """Counted rows whose group gets the bonus."""
    ids, correct = group.dense_ids(rows.group), (rows.score > 0).astype(rows.old_logp.dtype)
    right = group.segment(correct, ids, rows.counted)
    wrong = group.segment(1 - correct, ids, rows.counted)
    return rows.counted & (right > 0) & ((wrong > 0) | (config.rule == "any"))


def confidences(config: Config, rows: Rollouts) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """c(q) and c(o) of each row."""
    logp = rows.extras["old_prompt_logp"]
    at = jnp.arange(logp.shape[1])
    predicted = (at > 0) & (at < rows.prompt_length[rows.prompt][:, None])
    return (
        confidence.of_least_likely(logp, predicted, config.share),
        confidence.of_least_likely(rows.old_logp, rows.trained, config.share),
    )


def build(config: Config) -> Algorithm:
    def credit(state: State, rows: Rollouts, key: jax.Array) -> Credit:
        advantage = group.normalized(
            rows.score, rows.group, rows.counted, ddof=config.ddof, eps=config.eps, spread_tol=config.spread_tol
        )
        prompt, answer = confidences(config, rows)
        bonus = jnp.where(rewarded(config, rows), config.alpha * (prompt - answer), 0)
        extras = {"confidence_prompt": prompt, "confidence_answer": answer}
        return Credit(per_token(advantage + bonus, rows), extras=extras)

    def loss(state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[jax.Array, Metrics]:
        mask = rows.trained
        ratio = ratios.token(views.logp, rows.old_logp, mask)
        policy = surrogates.clipped(ratio, credit.advantage, mask, config.clip_low, config.clip_high)
        metrics = clipped_metrics(policy, ratio, mask, credit.weight)
        metrics |= {
            f"confidence/{of}": mean_of(credit.extras[f"confidence_{of}"], rows.counted) for of in ("prompt", "answer")
        }
        return weights.weighted_sum(policy.loss, credit.weight), metrics

    return group_method(
        "progrpo",
        config,
        loss,
        credit=credit,
        weigh=token_mean,
        needs=Needs(rescore=("old_prompt_logp",), min_group=2),
    )
