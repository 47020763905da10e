"""AEPO: InfiGUI-G1: Advancing GUI Grounding with Adaptive Exploration Policy Optimization. arXiv 2508.05731. (Not the two methods
of entropy that share the name.)

Axis: the reward. One completion lists N candidate points in order, N chosen by the model; with k the rank of the first hit

    R   = 1 + (1 / sqrt(N k) on a hit, -1 / N on a miss, -1 for an empty list),    or -1: bad format, or three points on a line
    A_i = R_i - mean of the other rewards of the group;  A = R for one alone
    L   = token-mean of -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), at most -dual_clip A where A < 0

The reward is a function of text, `tasks.grounding`: `task.reward: grounding` on problems with a field "box", and
`grounding:has_correct` and the like as parts of weight 0 for metrics. A miss with more points scores higher, which is the incentive
to explore; a hit with fewer does, which ends it. What is left for the method is RLOO with a token-level clip, so it trains on
any task. Format and collinearity override the reward, as in the code.
Our choices: `spread_tol`, for groups that agree.
"""

from dataclasses import dataclass

import jax

from jaxrl_llm.advantages import group
from jaxrl_llm.algorithms import Paper
from jaxrl_llm.algorithms.base import (
    Algorithm,
    check_clip,
    clipped_metrics,
    flat_plan,
    no_state,
    per_token,
)
from jaxrl_llm.objectives import ratios, surrogates
from jaxrl_llm.objectives.weights import weighted_sum
from jaxrl_llm.types import Credit, Metrics, Rollouts, State, Views

PAPER = Paper(
    title="InfiGUI-G1: Advancing GUI Grounding with Adaptive Exploration Policy Optimization",
    arxiv="2508.05731",
    axis="reward",
    confidence="code",
)


@dataclass(frozen=True)
class Config:
    clip_low: float = 0.2
    clip_high: float = 0.4
    dual_clip: float | None = 3.0
    spread_tol: float = group.SPREAD_TOL

    def __post_init__(self):
        check_clip(self.clip_low, self.clip_high, self.dual_clip)


def build(config: Config) -> Algorithm:
    def credit(state: State, rows: Rollouts, key: jax.Array) -> Credit:
        advantage = group.leave_one_out(
            rows.score, rows.group, rows.counted, spread_tol=config.spread_tol, singleton="raw"
        )
        return Credit(per_token(advantage, rows))

    def loss(state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[jax.Array, Metrics]:
        mask = rows.trained
        ratio = ratios.token(views.logp, rows.old_logp, mask)
        policy = surrogates.clipped(ratio, credit.advantage, mask, config.clip_low, config.clip_high, config.dual_clip)
        return weighted_sum(policy.loss, credit.weight), clipped_metrics(policy, ratio, mask, credit.weight)

    return Algorithm(
        name="aepo_gui",
        config=config,
        init=no_state,
        plan=flat_plan,
        credit=credit,
        loss=loss,
        couples="row",
    )
