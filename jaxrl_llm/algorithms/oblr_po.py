"""OBLR-PO: optimal baseline and learning-rate policy optimization. arXiv 2511.23310. Axis: baseline and learning rate.

Only the abstract could be read; these are the standard results it describes, every estimator is our choice.

    A_i   = R_i - sum_j w_j R_j / sum_j w_j                   over the group: least variance of (R - b) grad log pi
    w_i   = sum_t (1 - 2 pi_t(y_t) + sum_v pi_t(v)^2)         the squared norm of grad log pi in the logits
    L     = -mean_i A_i sum_t logp_t                          REINFORCE of whole completions, empty ones counted
    lr    = lr_max max(floor, S / (S + N)),  S / (S + N) = max(1 - v / |g|^2, 0)

g is the gradient of a minibatch and v the trace of its covariance, estimated from the gradients of `chunks` parts of its prompts
(g_m - g)^2 / (M (M - 1)); both are averaged with decay beta, bias-corrected. The bound's minimiser is SNR / (1 + SNR) over the
smoothness of the objective; lr_max, the scheduled rate, stands for the latter, with AdamW too.

Our choices besides: the sample itself is in its baseline (`loo`: it is not, which is unbiased), w of the logits, or with
`norm=given` of the rows' "grad_square"; beta 0.9, floor 0.1, 8 chunks, `spread_tol`. One update a batch: the loss has no ratio.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrl_llm.advantages import group
from jaxrl_llm.algorithms import Paper
from jaxrl_llm.algorithms.base import (
    Algorithm,
    Key,
    Needs,
    Noise,
    expect,
    expect_one_of,
    flat_plan,
    per_token,
    ratio_metrics,
    weigh_by,
    weighted_mean_of,
)
from jaxrl_llm.objectives import ratios, surrogates, weights
from jaxrl_llm.types import Credit, Metrics, Rollouts, State, Views, mean_of

PAPER = Paper(
    title="OBLR-PO: A Theoretical Framework for Stable Reinforcement Learning",
    arxiv="2511.23310",
    axis="baseline",
    confidence="abstract",
    cost="a forward; the gradient in parts",
    state="averages of the gradient's square and variance",
)


@dataclass(frozen=True)
class Config:
    norm: Literal["logits", "given"] = "logits"  # whose squared norm weighs the baseline
    loo: bool = False
    adapt_rate: bool = True  # false: the scheduled learning rate
    chunks: int = 8  # parts of a minibatch's prompts
    beta: float = 0.9
    floor: float = 0.1  # least factor of the learning rate
    spread_tol: float = group.SPREAD_TOL

    def __post_init__(self):
        expect_one_of("norm", self.norm, ("logits", "given"))
        expect(self.chunks >= 2, "chunks", self.chunks, "at least 2")
        expect(0 <= self.beta < 1, "beta", self.beta, "0 to under 1")
        expect(0 <= self.floor <= 1, "floor", self.floor, "0 to 1")


def logit_norm(rows: Rollouts) -> Float[Array, "B"]:
    """w: the squared norm of the gradient of a completion's log-prob with respect to its logits."""
    per_token = 1 - 2 * jnp.exp(rows.old_logp) + rows.extras["old_collision"]
    return jnp.sum(jnp.where(rows.trained, jnp.maximum(per_token, 0), 0), -1)


def signal_share(noise: Noise) -> Float[Array, ""]:
    """SNR / (1 + SNR) of a gradient; 0 of no gradient."""
    some = noise.square > 0
    return jnp.where(some, jnp.maximum(1 - noise.variance / jnp.where(some, noise.square, 1), 0), 0)


def build(config: Config) -> Algorithm:
    def init() -> State:
        zero = jnp.zeros((), jnp.float32)
        return {"square": zero, "variance": zero, "count": jnp.zeros((), jnp.int32)} if config.adapt_rate else ()

    def credit(state: State, rows: Rollouts, key: Key) -> Credit:
        weight = logit_norm(rows) if config.norm == "logits" else rows.extras["grad_square"]
        advantage = group.weighted_baseline(rows.score, weight, rows.group, rows.counted, config.loo, config.spread_tol)
        return Credit(per_token(advantage, rows), score=jnp.where(rows.counted, weight, 0))

    def weigh(state: State, rows: Rollouts, credit: Credit) -> Credit:
        return weigh_by(credit, weights.seq_mean_token_sum(rows.trained, count_empty=True, rows=rows.counted))

    def loss(state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[jax.Array, Metrics]:
        mask = rows.trained
        policy_loss = surrogates.reinforce(views.logp, credit.advantage, mask)
        metrics = {
            "policy_loss": weighted_mean_of(policy_loss, credit.weight),
            "baseline/weight": mean_of(credit.score, rows.counted),
            **ratio_metrics(ratios.token(views.logp, rows.old_logp, mask), mask),
        }
        return weights.weighted_sum(policy_loss, credit.weight), metrics

    def rate(state: State, noise: Noise) -> tuple[Float[Array, ""], State]:
        def average(old: jax.Array, new: jax.Array) -> jax.Array:
            return (config.beta * old + (1 - config.beta) * new).astype(old.dtype)

        square, variance = average(state["square"], noise.square), average(state["variance"], noise.variance)
        share = signal_share(Noise(square, variance))  # the bias corrections of both cancel
        return jnp.maximum(share, config.floor), {
            "square": square,
            "variance": variance,
            "count": state["count"] + 1,
        }

    return Algorithm(
        name="oblr_po",
        config=config,
        init=init,
        plan=flat_plan,
        credit=credit,
        loss=loss,
        weigh=weigh,
        rate=rate if config.adapt_rate else None,
        couples="row",
        needs=Needs(
            rescore=("old_collision",) if config.norm == "logits" else (),
            row_extras=("grad_square",) if config.norm == "given" else (),
            noise=config.chunks if config.adapt_rate else 0,
            min_group=2,
        ),
    )
