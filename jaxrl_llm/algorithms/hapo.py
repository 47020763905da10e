"""HAPO: From Uniform to Heterogeneous: Tailoring Policy Optimization to Every Token's Nature. arXiv 2509.16591.

Four pieces driven by the token's entropy, each switchable alone, over DAPO (token mean, clip-higher, no KL). With
h~ in [-1, 1] the log-entropy of a token relative to its batch (`objectives.entropy.token_signal`):

    A  T      = T_base (1 + tau clip(h~, -1, 1))                     while sampling, against last step's statistics
    B  A_it   = (R_i - mu_g) / (sigma_g + eps)                       mean and std over the tokens of the group
    D  low    = clip_low (1 - a h~) if h~ <= 0,  high = clip_high (1 + a h~) if h~ > 0
    C  A_it  *= 1 + beta h~   if h~ > 0 and r outside (1 - low/2, 1 + high/2), or h~ <= 0 and r inside
    l         = max(-A r, -A clip(r, 1 - low, 1 + high)), dual clip 10

The released code divides negative h by a negative number, so its h~ is never negative: `signed=False` reproduces it.
Followed from the code: A's clipping and rescaling (`rule="paper"`: T_base (1 + tau (log H - Q) / sigma)), C's zone from the
adapted bounds, B's fallback at |A| >= 5. Ours: entropy statistics over the minibatch the loss sees. A's entropy is that of
softmax(logits), the statistics are of the policy (rollout temperature); the paper's temperature is 1, where both agree.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxrl_llm.advantages import group as groups
from jaxrl_llm.advantages.token_group import token_group
from jaxrl_llm.algorithms import Paper
from jaxrl_llm.algorithms.base import (
    Algorithm,
    Needs,
    Plan,
    Report,
    ViewsFn,
    check_clip,
    clipped_metrics,
    expect,
    expect_one_of,
    per_token,
)
from jaxrl_llm.objectives import entropy, ratios, surrogates
from jaxrl_llm.objectives.weights import weighted_sum
from jaxrl_llm.types import Credit, Memory, Metrics, Rollouts, State, Views, mean_of

PAPER = Paper(
    title="From Uniform to Heterogeneous: Tailoring Policy Optimization to Every Token's Nature",
    arxiv="2509.16591",
    axis="entropy",
    confidence="code",
    cost="entropies of the old and current policy",
    state="log-entropy statistics of the last batch",
)


@dataclass(frozen=True)
class Config:
    adaptive_temperature: bool = True  # A
    token_baseline: bool = True  # B; false: GRPO's advantage
    redistribute: bool = True  # C
    adaptive_clip: bool = True  # D
    pivot: float = 0.8  # quantile that parts low from high entropy
    tau: float = 0.05  # strength of A (paper: 0.1)
    rule: Literal["code", "paper"] = "code"  # of A
    beta: float = 1.0  # strength of C
    a: float = 1.0  # strength of D
    signed: bool = True  # false: the released code's sign slip
    cap: float | None = 5.0  # B falls back to GRPO's advantage in groups that reach it; none: never
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = 10.0

    def __post_init__(self):
        check_clip(self.clip_low, self.clip_high, self.dual_clip)
        expect(0 <= self.pivot <= 1, "pivot", self.pivot, "0 to 1")
        expect_one_of("rule", self.rule, ("code", "paper"))


def temperature_hook(tau: float, rule: str, signed: bool):
    """Part A as a sampler hook; `hook_state` is the algorithm's state."""

    def hook(logits: jax.Array, temperature: jax.Array, state: Any) -> jax.Array:
        log_h = jnp.log(jnp.maximum(entropy.of_logits(logits), 1e-6))
        scale = entropy.LogEntropyScale(*state["scale"])
        if rule == "paper":
            signal = (log_h - scale.pivot) / scale.spread
        else:
            signal = jnp.clip(entropy.relative_log_entropy(log_h, scale, signed), -1, 1)
        return jnp.where(state["seen"], temperature * (1 + tau * signal), temperature)

    return hook


def build(config: Config) -> Algorithm:
    hook = temperature_hook(config.tau, config.rule, config.signed) if config.adaptive_temperature else None

    def init() -> State:
        return {"scale": jnp.ones(4, jnp.float32), "seen": jnp.zeros((), bool)} if hook else ()

    def plan(state: State) -> Plan:
        return Plan(hook=hook, hook_state=state)

    def credit(state: State, rows: Rollouts, key: jax.Array) -> Credit:
        if config.token_baseline:
            mask = rows.trained & rows.stat[:, None]
            return Credit(token_group(rows.score, mask, rows.group, cap=config.cap))
        return Credit(per_token(groups.normalized(rows.score, rows.group, rows.counted), rows))

    def loss(state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[jax.Array, Metrics]:
        mask, a = rows.trained, credit.advantage
        ratio = ratios.token(views.logp, rows.old_logp, mask)
        h = entropy.token_signal(views.entropy, mask, config.pivot, config.signed)
        low, high = jnp.asarray(config.clip_low, h.dtype), jnp.asarray(config.clip_high, h.dtype)
        if config.adaptive_clip:
            low, high = (
                jnp.where(h <= 0, low * (1 - config.a * h), low),
                jnp.where(h > 0, high * (1 + config.a * h), high),
            )
        if config.redistribute:
            inside = (1 - low / 2 < ratio) & (ratio < 1 + high / 2)
            a = jnp.where((h > 0) != inside, a * (1 + config.beta * h), a)
        clipped = surrogates.clipped(ratio, a, mask, low, high, config.dual_clip)
        metrics = clipped_metrics(clipped, ratio, mask, credit.weight)
        return weighted_sum(clipped.loss, credit.weight), {**metrics, "entropy": mean_of(views.entropy, mask)}

    def observe(
        state: State, memory: Memory, rows: Rollouts, credit: Credit, report: Report, views: ViewsFn
    ) -> tuple[State, Memory]:
        if not hook:
            return state, memory
        mask = rows.trained & rows.stat[:, None]
        scale = entropy.log_entropy_scale(jnp.asarray(rows.extras["old_entropy"]), mask, config.pivot)
        scale = scale._replace(spread=scale.spread + 1e-6)
        # An empty batch says nothing; the last statistics stay.
        new = {"scale": jnp.stack(scale).astype(jnp.float32), "seen": jnp.ones((), bool)}
        return jax.tree.map(lambda x, y: jnp.where(jnp.any(mask), x, y), new, state), memory

    return Algorithm(
        name="hapo",
        config=config,
        init=init,
        plan=plan,
        credit=credit,
        loss=loss,
        observe=observe,
        needs=Needs(loss=("logp", "entropy"), rescore=("old_entropy",) if hook else (), min_group=2),
    )
