"""BLEUBERI: BLEU as a reward for instruction following. arXiv 2505.11080. Axis: the reward, and which problems to train on.

    reward: smoothed sentence BLEU-4 of the answer against one or more references      task.reward or rewards.parts: bleu
    data:   the problems whose answers by the base model have the lowest BLEU          tasks.bleu.select, before training
    A_i   = (R_i - mean_g) / (std_g + eps)
    L     = token-mean of -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + beta k3(ref)

The rest is GRPO with TRL's defaults of the time, its "bnpo" loss as a token mean over the minibatch. The BLEU is that of
TensorFlow's NMT script, which differs from sacrebleu's (`tasks.bleu` says how). `answer_format` is the code's reward of tags.
Not here: rewards by ROUGE-L, BERTScore and a reward model, and their z-scores over a whole batch.
Our choices: a text without words has reward 0 (the code divides by zero), `spread_tol`.
"""

from dataclasses import dataclass

import jax

from jaxrl_llm.advantages import group
from jaxrl_llm.algorithms import Paper
from jaxrl_llm.algorithms.base import (
    Algorithm,
    Needs,
    check_clip,
    clipped_metrics,
    expect,
    group_method,
    token_mean,
)
from jaxrl_llm.objectives import kl, ratios, surrogates, weights
from jaxrl_llm.types import Credit, Metrics, Rollouts, State, Views, mean_of

PAPER = Paper(
    title="BLEUBERI: BLEU is a surprisingly effective reward for instruction following",
    arxiv="2505.11080",
    axis="reward",
    confidence="code",
    cost="a forward of the reference when beta > 0",
)


@dataclass(frozen=True)
class Config:
    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.04  # KL to the reference (k3)
    ddof: int = 1
    eps: float = 1e-4
    spread_tol: float = group.SPREAD_TOL

    def __post_init__(self):
        check_clip(self.clip_low, self.clip_high)
        expect(self.beta >= 0, "beta", self.beta, "at least 0")


def build(config: Config) -> Algorithm:
    def loss(state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[jax.Array, Metrics]:
        mask = rows.trained
        ratio = ratios.token(views.logp, rows.old_logp, mask)
        policy = surrogates.clipped(ratio, credit.advantage, mask, config.clip_low, config.clip_high)
        total = weights.weighted_sum(policy.loss, credit.weight)
        metrics = clipped_metrics(policy, ratio, mask, credit.weight)
        if config.beta:
            token_kl = kl.estimate("k3", views.logp, rows.extras["ref_logp"], mask)
            total += config.beta * weights.weighted_sum(token_kl, credit.reg_weight)
            metrics["kl"] = mean_of(token_kl, mask)
        return total, metrics

    needs = Needs(rescore=("ref_logp",) if config.beta else (), min_group=2)
    return group_method("bleuberi", config, loss, weigh=token_mean, needs=needs)
