"""Dynamic Hybrid Policy Optimization, arXiv 2601.05607. Axis: the ratio, a mix of the token's and the completion's.

    r_t = exp(logp_t - old_logp_t)
    s_t = sg(s) exp(logp_t - sg(logp_t)),    s = exp(mean_t log r_t)
    L   = mean_i mean_t -min((w r + (1 - w) s) A, (w clip(r) + (1 - w) clip(s)) A)           form=joint
    L   = mean_i mean_t -(w min(r A, clip(r) A) + (1 - w) min(s A, clip(s) A))               form=branch

Each ratio is clipped in its own interval before mixing. w is 1/2 (mix=average) or the policy's entropy at the token, scaled to
0..1 between the least and the largest of its completion, and constant (mix=entropy; 1/2 where all are equal). The branch form
with w = 1/2 is the mean of GRPO's and GSPO's losses; in the joint form a ratio outside on the harmless side can cancel the
other's clip. A is the group-normalised advantage of GRPO. At r = 1 every variant has GRPO's gradient.

Only the abstract and a reader's notes could be read. Our choices: the joint form, s with the gradient of its own token
(`sequence_gradient` lets it reach all of them), the scope of the entropy's range (`entropy_scope=batch`: of the minibatch), high
entropy for the token branch (`high_entropy_to=sequence` turns it round), all clip radii (the token's are GRPO's, the sequence's
GSPO's), ddof 1, eps 1e-6, `spread_tol`.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrl_llm.advantages import group
from jaxrl_llm.algorithms import Paper
from jaxrl_llm.algorithms.base import Algorithm, Needs, check_clip, clipped_metrics, expect, expect_one_of, group_method
from jaxrl_llm.objectives import ratios, surrogates, weights
from jaxrl_llm.types import Credit, Metrics, Rollouts, State, Views, mean_of

PAPER = Paper(
    title="Orchestrating Tokens and Sequences: Dynamic Hybrid Policy Optimization",
    arxiv="2601.05607",
    axis="ratio",
    confidence="abstract",
)


@dataclass(frozen=True)
class Config:
    mix: Literal["average", "entropy"] = "average"
    form: Literal["joint", "branch"] = "joint"
    clip_low: float = 0.2  # of the token's ratio
    clip_high: float = 0.2
    sequence_clip_low: float = 3e-4
    sequence_clip_high: float = 4e-4
    sequence_gradient: bool = False  # the completion's ratio passes its gradient to all tokens
    entropy_scope: Literal["row", "batch"] = "row"
    high_entropy_to: Literal["token", "sequence"] = "token"
    ddof: int = 1
    eps: float = 1e-6
    spread_tol: float = group.SPREAD_TOL

    def __post_init__(self):
        expect_one_of("mix", self.mix, ("average", "entropy"))
        expect_one_of("form", self.form, ("joint", "branch"))
        expect_one_of("entropy_scope", self.entropy_scope, ("row", "batch"))
        expect_one_of("high_entropy_to", self.high_entropy_to, ("token", "sequence"))
        check_clip(self.clip_low, self.clip_high)
        low, high = self.sequence_clip_low, self.sequence_clip_high
        expect(0 <= low <= 1, "sequence_clip_low", low, "0 to 1")
        expect(high >= 0, "sequence_clip_high", high, "at least 0")
        if self.mix == "average":
            why = "with mix=average"
            expect(self.entropy_scope == "row", "entropy_scope", self.entropy_scope, f"row {why}")
            expect(self.high_entropy_to == "token", "high_entropy_to", self.high_entropy_to, f"token {why}")


def entropy_weight(
    entropy: Float[Array, "B T"], mask: Bool[Array, "B T"], scope: Literal["row", "batch"] = "row"
) -> Float[Array, "B T"]:
    """(H - min) / (max - min) over the trained tokens of the row or the batch; 1/2 where these are equal."""
    axis = -1 if scope == "row" else None
    low = jnp.min(jnp.where(mask, entropy, jnp.inf), axis, keepdims=True)
    high = jnp.max(jnp.where(mask, entropy, -jnp.inf), axis, keepdims=True)
    varied = mask & (high > low)
    width = jnp.where(high > low, high - low, 1)
    return jnp.where(varied, jnp.where(mask, entropy - low, 0) / width, 0.5)


def build(config: Config) -> Algorithm:
    by_entropy = config.mix == "entropy"

    def loss(state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[jax.Array, Metrics]:
        mask, advantage = rows.trained, jnp.where(rows.trained, credit.advantage, 0)
        token_ratio = ratios.token(views.logp, rows.old_logp, mask)
        sequence = ratios.sequence if config.sequence_gradient else ratios.sequence_token
        row_ratio = sequence(views.logp, rows.old_logp, mask)
        w = jnp.asarray(0.5, token_ratio.dtype)
        if by_entropy:
            w = jax.lax.stop_gradient(entropy_weight(views.entropy, mask, config.entropy_scope))
            w = w if config.high_entropy_to == "token" else 1 - w
        token = surrogates.clipped(token_ratio, advantage, mask, config.clip_low, config.clip_high)
        row = surrogates.clipped(row_ratio, advantage, mask, config.sequence_clip_low, config.sequence_clip_high)
        if config.form == "branch":
            each = w * token.loss + (1 - w) * row.loss
        else:
            near = w * jnp.clip(token_ratio, 1 - config.clip_low, 1 + config.clip_high)
            near += (1 - w) * jnp.clip(row_ratio, 1 - config.sequence_clip_low, 1 + config.sequence_clip_high)
            each = -jnp.minimum((w * token_ratio + (1 - w) * row_ratio) * advantage, near * advantage)
        policy = surrogates.Clipped(each, token.low, token.high)
        return weights.weighted_sum(each, credit.weight), {
            **clipped_metrics(policy, token_ratio, mask, credit.weight),
            "clip_ratio/sequence_low": mean_of(row.low, mask),
            "clip_ratio/sequence_high": mean_of(row.high, mask),
        }

    return group_method(
        "dhpo",
        config,
        loss,
        needs=Needs(loss=("logp", "entropy") if by_entropy else ("logp",), min_group=2),
        couples="minibatch" if config.entropy_scope == "batch" else "row",
    )
