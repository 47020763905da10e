"""Length-Unbiased Sequence Policy Optimization, arXiv 2602.05261. Axis: the aggregation.

    s_i = exp(mean_t (logp_it - old_logp_it))
    L   = mean_i -len_i min(s_i A_i, clip(s_i, 1 - clip_low, 1 + clip_high) A_i)

GSPO with each completion's term times its length. As ds_i / dlogp_it = s_i / len_i, every token of every completion weighs the
same, where GSPO and GRPO learn less from long answers; on policy the gradient is that of plain REINFORCE on whole
completions. A_i is the group-normalised advantage of GRPO. Completions without trained tokens are not counted in the mean
(TRL counts them). The loss grows with the mean length, so a gradient-norm limit acts earlier than under GSPO.
Our choices: `batch_mean_length` divides by the mean length of the minibatch, which keeps GSPO's scale; ddof 1, eps 1e-6,
`spread_tol`.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxrl_llm.advantages import group
from jaxrl_llm.algorithms import Paper
from jaxrl_llm.algorithms.base import Algorithm, check_clip, clipped_metrics, group_method, weigh_by
from jaxrl_llm.objectives import ratios, surrogates, weights
from jaxrl_llm.types import Credit, Metrics, Rollouts, State, Views

PAPER = Paper(
    title="Length-Unbiased Sequence Policy Optimization", arxiv="2602.05261", axis="aggregation", confidence="code"
)


@dataclass(frozen=True)
class Config:
    clip_low: float = 2e-3
    clip_high: float = 2.5e-3
    batch_mean_length: bool = False  # divide by the mean length of the minibatch's completions
    ddof: int = 1
    eps: float = 1e-6
    spread_tol: float = group.SPREAD_TOL

    def __post_init__(self):
        check_clip(self.clip_low, self.clip_high)


def build(config: Config) -> Algorithm:
    def weigh(state: State, rows: Rollouts, credit: Credit) -> Credit:
        mask = rows.trained
        # Every token of a row has the row's loss, so their sum is the loss times the length.
        weight = weights.seq_mean_token_sum(mask)
        if config.batch_mean_length:
            weight = weight / jnp.maximum(jnp.sum(weight), 1)
        return weigh_by(credit, weight)

    def loss(state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[jax.Array, Metrics]:
        mask = rows.trained
        ratio = ratios.sequence(views.logp, rows.old_logp, mask)
        policy = surrogates.clipped(ratio, credit.advantage, mask, config.clip_low, config.clip_high)
        return weights.weighted_sum(policy.loss, credit.weight), clipped_metrics(policy, ratio, mask, credit.weight)

    return group_method("luspo", config, loss, weigh=weigh)
