"""Proximal Policy Optimization with a critic. Axis: none, it is the reference point.

PPO, arXiv 1707.06347; GAE, 1506.02438; dual clip, 1912.09729.

    rew_t   = -kl_coef * kl(old_logp_t, ref_logp_t), plus the score on the last trained token
    delta_t = rew_t + gamma V_{t+1} - V_t,   adv_t = delta_t + gamma lam adv_{t+1}      over trained tokens
    ret     = adv + V,   A = (adv - mean) / sqrt(var + 1e-8)                            over the batch's trained tokens
    l_t     = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)); where A < 0 at most -dual_clip A
    L       = token mean of l_t + token mean of 0.5 max((v - ret)^2, (clip(v, V - clip_value, V + clip_value) - ret)^2)
    kl_coef <- kl_coef (1 + clip(KL / kl_target - 1, -0.2, 0.2) n / kl_horizon)         after each step, if kl_target is set

V is the critic before this step's updates; policy and critic are separate trainables, so the sum of their losses trains each by
its own. The end of a completion is terminal, also when it was cut at the length limit (verl); `bootstrap` [B] in the rows' extras,
when given, is the value after the last token. Whitening needs two trained tokens; with fewer, advantages stay as they are.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.advantages import gae
from jaxrl_llm.advantages.whiten import whiten
from jaxrl_llm.algorithms import Paper
from jaxrl_llm.algorithms.base import (
    Algorithm,
    Needs,
    Report,
    ViewsFn,
    check_clip,
    clipped_metrics,
    expect,
    expect_one_of,
    flat_plan,
    keep_state,
    weighted_mean_of,
)
from jaxrl_llm.objectives import kl, ratios, surrogates, weights
from jaxrl_llm.types import Credit, Memory, Metrics, Rollouts, State, Views, mean_of, metric_value

PAPER = Paper(
    title="Proximal Policy Optimization Algorithms",
    arxiv="1707.06347",
    axis="advantage",
    confidence="code",
    cost="a critic; a forward of the reference when beta > 0",
    state="critic, KL coefficient",
)


@dataclass(frozen=True)
class Config:
    gamma: float = 1.0
    lam: float = 0.95
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = 3.0
    clip_value: float = 0.5
    whiten: bool = True
    beta: float = 0.001  # (initial) coefficient of the KL in the reward
    kl_kind: kl.Kind = "k1"
    kl_target: float | None = None  # adapt the coefficient towards this KL; none: fixed
    kl_horizon: float = 10_000.0  # completions over which the coefficient adapts

    def __post_init__(self):
        check_clip(self.clip_low, self.clip_high, self.dual_clip)
        expect(0 < self.gamma <= 1, "gamma", self.gamma, "more than 0, at most 1")
        expect(0 <= self.lam <= 1, "lam", self.lam, "0 to 1")
        expect(self.clip_value > 0, "clip_value", self.clip_value, "more than 0")
        expect(self.beta >= 0, "beta", self.beta, "at least 0")
        expect_one_of("kl_kind", self.kl_kind, ("k1", "k2", "k3"))
        expect(self.kl_target is None or self.kl_target > 0, "kl_target", self.kl_target, "more than 0, or none")
        expect(self.kl_target is None or self.beta > 0, "kl_target", self.kl_target, "none without a KL term (beta=0)")
        expect(self.kl_horizon > 0, "kl_horizon", self.kl_horizon, "more than 0")


def kl_controller(coef, measured: float, completions: int, target: float, horizon: float):
    """The next KL coefficient: up to 20 % per `horizon` completions towards the target."""
    return coef * (1 + np.clip(measured / target - 1, -0.2, 0.2) * completions / horizon)


def token_kl(config: Config, rows: Rollouts) -> jax.Array:
    """[B, T] KL estimate of the policy that sampled to the reference, 0 where untrained."""
    return kl.estimate(config.kl_kind, rows.old_logp, rows.extras["ref_logp"], rows.trained)


def build(config: Config) -> Algorithm:
    def init() -> State:
        return {"kl_coef": jnp.asarray(config.beta, jnp.float32)}

    def credit(state: State, rows: Rollouts, key: jax.Array) -> Credit:
        mask = rows.trained
        reward_kl = token_kl(config, rows) if config.beta else None
        rewards = gae.token_rewards(rows.score, mask, reward_kl, state["kl_coef"])
        values = rows.extras["old_values"]
        advantage = gae.gae(rewards, values, mask, config.gamma, config.lam, rows.extras.get("bootstrap"))
        returns = jnp.where(mask, advantage + values, 0)
        return Credit(whiten(advantage, mask) if config.whiten else advantage, extras={"returns": returns})

    def loss(state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[jax.Array, Metrics]:
        mask = rows.trained
        ratio = ratios.token(views.logp, rows.old_logp, mask)
        policy = surrogates.clipped(ratio, credit.advantage, mask, config.clip_low, config.clip_high, config.dual_clip)
        value_loss = surrogates.clipped_value(
            views.values, rows.extras["old_values"], credit.extras["returns"], mask, config.clip_value
        )
        total = weights.weighted_sum(policy.loss, credit.weight) + weights.weighted_sum(value_loss, credit.reg_weight)
        metrics = {
            **clipped_metrics(policy, ratio, mask, credit.weight),
            "value_loss": weighted_mean_of(value_loss, credit.reg_weight),
        }
        if config.beta:
            metrics["kl"] = mean_of(ratios.log_ratio(views.logp, rows.extras["ref_logp"], mask), mask)
            metrics["kl_coef"] = mean_of(state["kl_coef"])
        return total, metrics

    def observe(
        state: State, memory: Memory, rows: Rollouts, credit: Credit, report: Report, views: ViewsFn
    ) -> tuple[State, Memory]:
        completions = rows.trained.any(-1)
        per_row = token_kl(config, rows).sum(-1) / jnp.maximum(rows.trained.sum(-1), 1)
        measured = metric_value(mean_of(per_row, completions))
        coef = kl_controller(
            state["kl_coef"], measured, int(completions.sum()), config.kl_target or 1.0, config.kl_horizon
        )
        return {"kl_coef": jnp.asarray(coef, jnp.float32)}, memory

    return Algorithm(
        name="ppo",
        config=config,
        init=init,
        plan=flat_plan,
        credit=credit,
        loss=loss,
        observe=keep_state if config.kl_target is None else observe,
        needs=Needs(
            loss=("logp", "values"),
            rescore=("old_values", "ref_logp") if config.beta else ("old_values",),
            critic=True,
        ),
        couples="row",
    )
