"""TRPA: Trust Region Preference Approximation, arXiv 2504.04524. Axis: preference levels instead of rewards.

Rules give every completion a level, 1 the best. All pairs of a prompt's completions with different levels are compared:

    s_i    = mean_t (logp - ref_logp)
    h_ij   = a_i beta (s_i - s_j)  for level_i < level_j;  a_i = `anisotropy` where level_i = 1, else 1
    L_pref = mean over all pairs of the minibatch of -log sigma(h_ij)
    L_TR   = mean over tokens of clip(e^d - d - 1, -10, 10),  d = old_logp - logp
    L      = L_pref + tr_coef L_TR,  or with sqrt_kl  L_pref + tr_coef sqrt(L_TR + 1/4)

Without any pair L_pref = mean_i of -log sigma(s_i) at level 1, -log sigma(-s_i) elsewhere. L_TR has no value and no gradient at
logp = old_logp: it acts from the second optimizer step on a batch, so it needs `learner.epochs` or `learner.minibatches` above 1.
Rows without a trained token are in no pair.

The code is followed. The paper's form: beta_mode=response has h = a_i beta s_i - a_j beta s_j, seq_agg=sum sums over tokens. Two
differences on purpose: pairs are made over the whole minibatch (whole groups stay together), where the code loses those that its
balancing put on different devices; a completion's level is told by its reward, level k being at least `levels[k - 1]`, so any reward
serves and only its order matters. `tasks.knights` has the paper's rules for Knights and Knaves.
"""

from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_llm.advantages import group as groups
from jaxrl_llm.algorithms import Paper
from jaxrl_llm.algorithms.base import (
    Algorithm,
    Needs,
    Selection,
    expect,
    expect_one_of,
    flat_plan,
    no_state,
    per_token,
    weigh_by,
    weighted_mean_of,
)
from jaxrl_llm.objectives import kl, preference, weights
from jaxrl_llm.types import Credit, Mean, Memory, Metrics, Rollouts, State, Views, mean_of

PAPER = Paper(
    title="Trust Region Preference Approximation: A simple and stable reinforcement learning algorithm for LLM reasoning",
    arxiv="2504.04524",
    axis="preference",
    confidence="code",
    cost="reference log-probs",
)


@dataclass(frozen=True)
class Config:
    beta: float = 0.1
    anisotropy: float = 2.5  # factor of beta in pairs won by level 1
    tr_coef: float = 0.001
    sqrt_kl: bool = False
    beta_mode: Literal["pair", "response"] = "pair"  # response: the paper's
    seq_agg: Literal["mean", "sum"] = "mean"  # sum: the paper's
    levels: tuple[float, ...] = (1.0, 0.5, 0.0)  # smallest reward of level 1, 2, ...; below all of them is one more

    def __post_init__(self):
        expect(self.beta > 0, "beta", self.beta, "more than 0")
        expect(self.anisotropy > 0, "anisotropy", self.anisotropy, "more than 0")
        expect(self.tr_coef >= 0, "tr_coef", self.tr_coef, "at least 0")
        expect_one_of("beta_mode", self.beta_mode, ("pair", "response"))
        expect_one_of("seq_agg", self.seq_agg, ("mean", "sum"))
        falling = len(self.levels) > 0 and all(a > b for a, b in zip(self.levels, self.levels[1:]))
        expect(falling, "levels", self.levels, "falling numbers")


def levels_of(reward: Float[Array, "B"], bounds: tuple[float, ...]) -> Int[Array, "B"]:
    """1 for a reward of at least bounds[0], 2 for one of at least bounds[1], ..., len(bounds) + 1 below all."""
    return 1 + jnp.sum(reward[:, None] < jnp.asarray(bounds), -1, dtype=jnp.int32)


def build(config: Config) -> Algorithm:
    def better(rows: Rollouts, level: Int[Array, "B"]) -> Array:
        """[B, B] whether i has a better level than j, in one group, both with tokens to train."""
        live = rows.counted & jnp.any(rows.trained, -1)
        same = (rows.group[:, None] == rows.group) & live[:, None] & live
        return same & (level[:, None] < level)

    def credit(state: State, rows: Rollouts, key: jax.Array) -> Credit:
        level = jnp.where(rows.counted, levels_of(rows.score, config.levels), 0)
        over = better(rows, level).astype(rows.old_logp.dtype)
        return Credit(per_token(over.sum(1) - over.sum(0), rows), extras={"level": level})  # wins less losses

    def select(state: State, memory: Memory, rows: Rollouts, credit: Credit, key: jax.Array) -> Selection:
        return Selection(rows.with_(block=groups.dense_ids(jnp.asarray(rows.group)).astype(jnp.int32)), credit, memory)

    def weigh(state: State, rows: Rollouts, credit: Credit) -> Credit:
        pairs = jnp.sum(better(rows, credit.extras["level"]))
        live = (rows.counted & jnp.any(rows.trained, -1)).astype(rows.old_logp.dtype)
        shares = {
            "pair": jnp.where(pairs > 0, live / jnp.maximum(pairs, 1), 0),
            "alone": jnp.where(pairs > 0, 0, live / jnp.maximum(jnp.sum(live), 1)),  # the fallback
        }
        weighed = weigh_by(credit, weights.token_mean(rows.trained))
        return replace(weighed, extras={**credit.extras, **shares})

    def loss(state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[jax.Array, Metrics]:
        mask, level, share = rows.trained, credit.extras["level"], credit.extras["pair"]
        score = preference.sequence_score(views.logp, rows.extras["ref_logp"], mask, config.seq_agg == "mean")
        beta = config.beta * jnp.where(level == 1, config.anisotropy, 1.0)
        theirs = beta * score if config.beta_mode == "response" else beta[:, None] * score
        margin = (beta * score)[:, None] - theirs
        over = better(rows, level) & (share > 0)[:, None]
        total = -jnp.sum(jnp.where(over, share[:, None] * jax.nn.log_sigmoid(margin), 0))
        alone = credit.extras["alone"]
        total -= jnp.sum(jnp.where(alone > 0, alone * jax.nn.log_sigmoid(jnp.where(level == 1, score, -score)), 0))
        moved = jnp.clip(kl.estimate("k3", views.logp, rows.old_logp, mask), -10, 10)
        region = weights.weighted_sum(moved, credit.reg_weight)
        total += config.tr_coef * (jnp.sqrt(region + 0.25) if config.sqrt_kl else region)
        shown = {f"level/{k + 1}": mean_of(level == k + 1, rows.counted) for k in range(len(config.levels) + 1)}
        return total, {
            "rewards/accuracy": mean_of(margin > 0, over),
            "rewards/margin": mean_of(margin, over),
            "trust_region": weighted_mean_of(moved, credit.reg_weight),
            "pairs": Mean(
                jnp.sum(over).astype(score.dtype), jnp.sum(rows.counted).astype(score.dtype)
            ),  # per completion
            **shown,
        }

    return Algorithm(
        name="trpa",
        config=config,
        init=no_state,
        plan=flat_plan,
        credit=credit,
        loss=loss,
        weigh=weigh,
        select=select,
        couples="minibatch" if config.sqrt_kl else "block",
        needs=Needs(rescore=("ref_logp",), importance=False, min_group=2),
    )
