"""TGDPO: Token-Level Reward Guidance for DPO, arXiv 2506.14574. Axis: token weights inside DPO's sequence scores.

A frozen guide, itself trained on preferences (by DPO, SimPO, ...) from the same SFT model, induces a reward of every token, and
what it likes moves more in the chosen row and less in the rejected one:

    r_t = beta_r (guide_logp_t - ref_logp_t)
    f_t = 1 + alpha r_t in the chosen row, 1 - alpha r_t in the rejected
    phi = sum_t beta f_t (logp_t - ref_logp_t), chosen minus rejected
    L   = mean over pairs of -log sigma(phi)

alpha = 0, or a guide that is the reference, is DPO. Two stages, two runs: train the guide (`algorithm.name=dpo`), then name its
export in `guide.path`. beta_r is the beta the guide was trained with in the paper, and `beta` in the code, which is the default.
The theory asks for f > 0, the code does not clip; `f_min` does. Pairs are the best against the worst of a prompt's completions,
or those of a file, as in dpo.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxrl_llm import pairs
from jaxrl_llm.algorithms import Paper
from jaxrl_llm.algorithms.base import Algorithm, Needs, Plan, expect, expect_one_of, no_state
from jaxrl_llm.objectives import preference, ratios
from jaxrl_llm.types import Credit, Metrics, Rollouts, State, Views, mean_of

PAPER = Paper(
    title="TGDPO: Harnessing Token-Level Reward Guidance for Enhancing Direct Preference Optimization",
    arxiv="2506.14574",
    axis="preference",
    confidence="code",
    cost="log-probs of the reference and of the guide",
)


@dataclass(frozen=True)
class Config:
    beta: float = 0.1
    alpha: float = 0.5  # strength of the guidance; 0: DPO
    beta_reward: float | None = None  # beta_r; none: beta
    f_min: float | None = None  # smallest token weight; none: no limit
    pairs: Literal["sampled", "given"] = "sampled"  # given: those that come with the problems
    pairing: preference.Pairing = "best_worst"
    drop_ties: bool = False  # best_worst: no pair from a group whose rewards all agree

    def __post_init__(self):
        expect(self.beta > 0, "beta", self.beta, "more than 0")
        expect(self.alpha >= 0, "alpha", self.alpha, "at least 0")
        expect(
            self.beta_reward is None or self.beta_reward > 0, "beta_reward", self.beta_reward, "more than 0, or null"
        )
        expect_one_of("pairs", self.pairs, ("sampled", "given"))
        expect_one_of("pairing", self.pairing, ("best_worst", "all"))


def token_weights(
    reward: Float[Array, "B T"], role: Float[Array, "B"], alpha: float, f_min: float | None = None
) -> Float[Array, "B T"]:
    """f: 1 + alpha r in chosen rows (role 1), 1 - alpha r in rejected ones (role -1), at least `f_min`; constant."""
    f = 1 + alpha * role[:, None] * jax.lax.stop_gradient(reward)
    return f if f_min is None else jnp.maximum(f, f_min)


def token_reward(
    guide_logp: Float[Array, "B T"], ref_logp: Float[Array, "B T"], mask: Bool[Array, "B T"], beta: float
) -> Float[Array, "B T"]:
    """r: the reward a preference-trained guide implies for each token, 0 where masked."""
    return beta * ratios.log_ratio(guide_logp, ref_logp, mask)


def build(config: Config) -> Algorithm:
    given = "all" if config.pairs == "given" else "none"
    beta_reward = config.beta if config.beta_reward is None else config.beta_reward

    def plan(state: State) -> Plan:
        from jaxrl_llm.rollout import collectors

        return Plan(collector=collectors.preferences if config.pairs == "given" else None)

    def credit(state: State, rows: Rollouts, key: jax.Array) -> Credit:
        return pairs.unpaired(rows, rows.score)

    def pairs_of(score: np.ndarray, rows: Rollouts) -> pairs.Pairs:
        group, counted = np.asarray(rows.group), np.asarray(rows.counted)
        return preference.reward_pairs(score, group, counted, config.pairing, config.drop_ties)

    def slots(rows: Rollouts) -> int:
        return pairs.most(rows, lambda n: n * (n - 1) // 2 if config.pairing == "all" else 1)

    def loss(state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[jax.Array, Metrics]:
        mask, role, ref_logp = rows.trained, credit.extras["role"], rows.extras["ref_logp"]
        reward = token_reward(rows.extras["guide_logp"], ref_logp, mask, beta_reward)
        f = token_weights(reward, role, config.alpha, config.f_min)
        score = config.beta * jnp.sum(f * ratios.log_ratio(views.logp, ref_logp, mask), -1)
        margin = preference.pair_difference(score, role, rows.block)
        each = preference.pair_loss(margin, "sigmoid", 1.0)
        in_pair = mask & (role != 0)[:, None]
        return pairs.weighted(each, credit), {
            **pairs.metrics(score, margin, role),
            "guide/reward": mean_of(reward * role[:, None], in_pair),
            "guide/negative_weights": mean_of(f < 0, in_pair),
        }

    return Algorithm(
        name="tgdpo",
        config=config,
        init=no_state,
        plan=plan,
        credit=credit,
        loss=loss,
        weigh=pairs.mean_over_pairs,
        select=pairs.selecting(pairs_of, slots),
        couples="block",
        needs=Needs(rescore=("ref_logp", "guide_logp"), importance=False, min_group=2, given=given),
    )
