"""Group Sequence Policy Optimization, arXiv 2507.18071. Axis: the ratio, one per completion instead of one per token.

    s_i  = exp(mean_t (logp_it - old_logp_it))                                       length-normalised
    L    = mean_i -min(s_i A_i, clip(s_i, 1 - clip_low, 1 + clip_high) A_i)          form=sequence
    s_it = sg(s_i) * exp(logp_it - sg(logp_it))                                      form=token (GSPO-token)
    L    = mean_i mean_t -min(s_it A_it, clip(s_it, ...) A_it)

A_i is the group-normalised advantage of GRPO. The whole completion is clipped or not, in an interval about 1000 times narrower
than PPO's. With equal advantages on a row's tokens both forms have the same value and gradient. Completions without
trained tokens are not counted in the mean. Averaging the token form over tokens instead would weigh rows by length; that is
another method (LUSPO). verl's cap on log s is not in the paper and not here.
Our choices: ddof 1, eps 1e-6, `spread_tol`.
"""

from dataclasses import dataclass
from typing import Literal

import jax

from jaxrl_llm.advantages import group
from jaxrl_llm.algorithms import Paper
from jaxrl_llm.algorithms.base import Algorithm, check_clip, clipped_metrics, expect_one_of, group_method
from jaxrl_llm.objectives import ratios, surrogates, weights
from jaxrl_llm.types import Credit, Metrics, Rollouts, State, Views

PAPER = Paper(title="Group Sequence Policy Optimization", arxiv="2507.18071", axis="ratio", confidence="paper")


@dataclass(frozen=True)
class Config:
    clip_low: float = 3e-4
    clip_high: float = 4e-4
    form: Literal["sequence", "token"] = "sequence"
    ddof: int = 1
    eps: float = 1e-6
    spread_tol: float = group.SPREAD_TOL

    def __post_init__(self):
        check_clip(self.clip_low, self.clip_high)
        expect_one_of("form", self.form, ("sequence", "token"))


def build(config: Config) -> Algorithm:
    def loss(state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[jax.Array, Metrics]:
        mask = rows.trained
        likelihood_ratio = ratios.sequence if config.form == "sequence" else ratios.sequence_token
        ratio = likelihood_ratio(views.logp, rows.old_logp, mask)
        policy = surrogates.clipped(ratio, credit.advantage, mask, config.clip_low, config.clip_high)
        return weights.weighted_sum(policy.loss, credit.weight), clipped_metrics(policy, ratio, mask, credit.weight)

    return group_method("gspo", config, loss)
