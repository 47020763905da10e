"""EMPG: Harnessing Uncertainty: Entropy-Modulated Policy Gradients for Long-Horizon LLM Agents. arXiv 2509.09265.

Axis: the advantage. The trajectory's advantage A_i is rescaled in every agent step s by the step's mean entropy H_is under the
policy that sampled, and a step that leads to a confident one gets a bonus:

    h    = (H - min) / (max - min)                                      over all steps of the batch
    A_is = A_i exp(-k h_is) / mean(exp(-k h)) + zeta exp(-k_f h_{i,s+1})        no bonus in the last step
    A_is less its mean over all steps, on every token of the step; then DAPO's or GRPO's clipped loss, here with a token mean

For a softmax policy E |grad_z log pi|^2 = 1 - sum pi^2: uncertain steps have large gradients, which g counters. A group that
agrees has A_i = 0 and still trains, by bonus and mean. Steps are runs of trained tokens (`runs`: tool output ends one), so an ordinary
completion is one step; or rows bring them: "step" [B, T] (`given`), or "traj" and "turn" of rows that are steps (`rows`).

Our choices: zeta 0.1 (one public copy has 0.05), ddof 1, eps 1e-6, `spread_tol`, for entropies too; rows outside statistics have no
steps. The public re-implementations' slips are not copied (every step's g on the whole advantage; padding turns in min and max).
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxrl_llm.advantages import agent_steps, group
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
from jaxrl_llm.objectives import ratios, surrogates, weights
from jaxrl_llm.types import Credit, Metrics, Rollouts, State, Views, mean_of

PAPER = Paper(
    title="Harnessing Uncertainty: Entropy-Modulated Policy Gradients for Long-Horizon LLM Agents",
    arxiv="2509.09265",
    axis="advantage",
    confidence="paper",
    cost="entropies of the old policy",
)


@dataclass(frozen=True)
class Config:
    k: float = 1.0  # how much less uncertain steps count; 0: not
    k_f: float = 1.0  # how much less an uncertain next step is worth
    zeta: float = 0.1  # weight of the next step's certainty
    steps: Literal["runs", "given", "rows"] = "runs"
    clip_low: float = 0.2
    clip_high: float = 0.2
    aggregation: weights.Aggregation = "token-mean"
    ddof: int = 1
    eps: float = 1e-6
    spread_tol: float = group.SPREAD_TOL

    def __post_init__(self):
        expect(self.k >= 0, "k", self.k, "at least 0")
        expect(self.k_f >= 0, "k_f", self.k_f, "at least 0")
        expect(self.zeta >= 0, "zeta", self.zeta, "at least 0")
        expect_one_of("steps", self.steps, ("runs", "given", "rows"))
        check_clip(self.clip_low, self.clip_high)
        expect_one_of("aggregation", self.aggregation, weights.AGGREGATIONS)


EXTRAS = {"runs": (), "given": ("step",), "rows": ("traj", "turn")}  # what rows bring


def steps_of(config: Config, rows: Rollouts, mask: Bool[Array, "B T"]) -> agent_steps.Steps:
    """The agent steps that the tokens of `mask` belong to."""
    if config.steps == "rows":
        return agent_steps.of_rows(rows.extras["traj"], rows.extras["turn"], mask)
    number = ratios.turns(mask) if config.steps == "runs" else agent_steps.numbered(rows.extras["step"], mask)
    return agent_steps.in_rows(number)


def build(config: Config) -> Algorithm:
    def credit(state: State, rows: Rollouts, key: jax.Array) -> Credit:
        mask = rows.trained & rows.stat[:, None]
        steps = steps_of(config, rows, mask)
        entropy = agent_steps.mean(rows.extras["old_entropy"], mask, steps)
        advantage = group.normalized(
            rows.score, rows.group, rows.counted, ddof=config.ddof, eps=config.eps, spread_tol=config.spread_tol
        )
        of_step = agent_steps.modulated(advantage, entropy, steps, config.k, config.k_f, config.zeta, config.spread_tol)
        return Credit(jnp.where(mask, of_step[steps.of_token], 0), extras={"entropy": entropy[steps.of_token]})

    def weigh(state: State, rows: Rollouts, credit: Credit) -> Credit:
        return weigh_by(credit, weights.aggregation(config.aggregation, rows.trained))

    def loss(state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[jax.Array, Metrics]:
        mask = rows.trained
        ratio = ratios.token(views.logp, rows.old_logp, mask)
        policy = surrogates.clipped(ratio, credit.advantage, mask, config.clip_low, config.clip_high)
        metrics = clipped_metrics(policy, ratio, mask, credit.weight)
        metrics["entropy/step"] = mean_of(credit.extras["entropy"], mask & rows.stat[:, None])
        return weights.weighted_sum(policy.loss, credit.weight), metrics

    return group_method(
        "empg",
        config,
        loss,
        credit=credit,
        weigh=weigh,
        needs=Needs(rescore=("old_entropy",), row_extras=EXTRAS[config.steps], min_group=2),
    )
