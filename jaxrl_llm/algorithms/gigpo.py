"""GiGPO: Group-in-Group Policy Optimization for LLM Agent Training. arXiv 2505.10978.

Changes the advantage. Rows are environment steps; groups are episodes from one initial state, and inside them steps from
one *anchor state* (`advantages.two_level`). With step rewards r, discount gamma and c for an action that cannot be parsed:

    e_b = sum of the trajectory's r - c invalid_b          s_b = (r_t + gamma r_{t+1} + ...) - c invalid_b
    A_b = (e_b - mean_group) / F + omega (s_b - mean_anchor) / F        F = 1 or std (ddof 1) + 1e-6
    l   = PPO clip of A (dual clip 3) + 0.01 clamp(k3, -10, 10) - 0.001 entropy, averaged over the batch's tokens

Where the code differs from the paper, the code is followed: statistics of the episode over rows (`cross_steps=False` is
the paper's formula), the penalty c after discounting, dual clip, entropy bonus. A group with a single counted row
(trajectory) keeps its raw score. Not copied: duplicating rows to fill devices. Ours: rows without trained tokens leave
all statistics and their reward counts as 0.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from jaxrl_llm.advantages import group as groups
from jaxrl_llm.advantages import two_level
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
)
from jaxrl_llm.objectives import kl, ratios, surrogates
from jaxrl_llm.objectives.weights import weighted_sum
from jaxrl_llm.types import Credit, Metrics, Rollouts, State, Views, mean_of

PAPER = Paper(
    "Group-in-Group Policy Optimization for LLM Agent Training",
    arxiv="2505.10978",
    axis="advantage",
    confidence="code",
    cost="reference log-probs",
)


@dataclass(frozen=True)
class Config:
    gamma: float = 0.95  # discount of step rewards
    omega: float = 1.0  # weight of the step advantage; 0 is GRPO over episodes
    mode: Literal["mean_norm", "mean_std_norm"] = "mean_norm"  # F = 1, or the group's std, at both levels
    cross_steps: bool = True  # episode statistics over rows (code), else one value per trajectory (paper)
    invalid_penalty: float = 0.1  # c, off the scores of a row whose action could not be parsed
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = 3.0  # None: the paper-time code
    kl_coef: float = 0.01  # 0: no reference policy
    entropy_coef: float = 0.001

    def __post_init__(self):
        check_clip(self.clip_low, self.clip_high, self.dual_clip)
        expect(0 <= self.gamma <= 1, "gamma", self.gamma, "0 to 1")
        expect_one_of("mode", self.mode, ("mean_norm", "mean_std_norm"))


def build(config: Config) -> Algorithm:
    def credit(state: State, rows: Rollouts, key: jax.Array) -> Credit:
        valid = rows.counted & jnp.any(rows.mask, -1)
        traj, group = rows.extras["traj"], rows.group
        reward = jnp.where(valid, rows.extras["step_reward"], 0)
        penalty = config.invalid_penalty * jnp.where(valid, rows.extras["invalid"], 0)
        episode = groups.segment(reward, groups.dense_ids(traj), valid) - penalty
        step = two_level.step_returns(reward, traj, rows.extras["step_index"], valid, config.gamma) - penalty
        a_episode, a_step = two_level.advantage(
            *(episode, step, group, traj, rows.extras["anchor_id"], valid),
            omega=config.omega,
            std=config.mode == "mean_std_norm",
            cross_steps=config.cross_steps,
        )
        shared = groups.statistics(step, rows.extras["anchor_id"], valid).count > 1
        return Credit(per_token(a_episode + a_step, rows), extras={"anchor_shared": shared})

    def loss(state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[jax.Array, Metrics]:
        mask = rows.trained
        ratio = ratios.token(views.logp, rows.old_logp, mask)
        clipped = surrogates.clipped(ratio, credit.advantage, mask, config.clip_low, config.clip_high, config.dual_clip)
        total = weighted_sum(clipped.loss, credit.weight)
        metrics = clipped_metrics(clipped, ratio, mask, credit.weight)
        metrics["anchor/shared"] = mean_of(credit.extras["anchor_shared"], rows.counted & jnp.any(mask, -1))
        if config.kl_coef:
            k3 = jnp.clip(kl.estimate("k3", views.logp, rows.extras["ref_logp"], mask), -10, 10)
            total += config.kl_coef * weighted_sum(k3, credit.reg_weight)
            metrics["kl"] = mean_of(k3, mask)
        if config.entropy_coef:
            total -= config.entropy_coef * weighted_sum(views.entropy, credit.reg_weight)
            metrics["entropy"] = mean_of(views.entropy, mask)
        return total, metrics

    return Algorithm(
        name="gigpo",
        config=config,
        init=no_state,
        plan=flat_plan,
        credit=credit,
        loss=loss,
        couples="row",
        needs=Needs(
            loss=("logp", "entropy") if config.entropy_coef else ("logp",),
            rescore=("ref_logp",) if config.kl_coef else (),
            row_extras=("traj", "step_index", "step_reward", "invalid", "anchor_id"),
            min_group=2,
        ),
    )
