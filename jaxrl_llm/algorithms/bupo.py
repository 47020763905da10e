"""BuPO: Bottom-up Policy Optimization, arXiv 2512.19673. Axis: the model, whose lower layers are trained first.

What layer l leaves, unembedded as it is, says something about the next token too: an internal policy.

    pi_l = softmax(H_l E_u^T / temperature)                              H_l: the residual stream behind layer l, without any norm
    steps 1 to s_inter:   GRPO on pi_l: r = exp(log pi_l - old log pi_l)
    afterwards:           GRPO on the policy: r = exp(logp - old_logp)
    L = token-mean of max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), at most -dual_clip A where A < 0

The whole policy samples in both phases, and nothing corrects for that in the first. `layer` counts from 0, as in the authors' code
(the paper counts from 1); the last layer's internal policy is not the policy, as there is no norm. In the first phase no layer
above l is run by an update, and none of them is moved by one, nor is the final norm: no gradient, no decay, no momentum. One
optimizer state serves both phases, so what was frozen begins the second with moments of 0 and a count that is not.
`apply_final_norm` puts the final norm between H_l and E_u, and trains it.
Our choices: frozen is frozen (the paper does not speak of decay), `spread_tol`. The paper's entropies of the attention's and the
MLP's own outputs are not measured here.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxrl_llm.advantages import group
from jaxrl_llm.algorithms import Paper
from jaxrl_llm.algorithms.base import (
    INNER,
    Algorithm,
    Inner,
    Needs,
    Plan,
    check_clip,
    clipped_metrics,
    count_steps,
    expect,
    group_credit,
)
from jaxrl_llm.objectives import ratios, surrogates, weights
from jaxrl_llm.types import Credit, Metrics, Rollouts, State, Views

PAPER = Paper(
    title="Bottom-up Policy Optimization: Your Language Model Policy Secretly Contains Internal Policies",
    arxiv="2512.19673",
    axis="training loop",
    confidence="code",
    cost="a forward for the internal policy's old log-probs, first phase only",
    state="step counter",
)


@dataclass(frozen=True)
class Config:
    layer: int = 5  # l, from 0; 5 for Qwen3-4B, 6 for Qwen3-8B
    s_inter: int = 30  # steps on the internal policy
    apply_final_norm: bool = False
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = 10.0
    ddof: int = 1
    eps: float = 1e-6
    spread_tol: float = group.SPREAD_TOL

    def __post_init__(self):
        expect(self.layer >= 0, "layer", self.layer, "at least 0")
        expect(self.s_inter >= 0, "s_inter", self.s_inter, "at least 0")
        check_clip(self.clip_low, self.clip_high, self.dual_clip)


def build(config: Config) -> Algorithm:
    def init() -> State:
        return {"step": jnp.zeros((), jnp.int32)}

    def plan(state: State) -> Plan:
        return Plan() if state["step"] < config.s_inter else Plan(loss=("logp",), rescore=())

    def loss(state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[jax.Array, Metrics]:
        if views.inner_logp is not None:  # the plan's choice: the first phase has this view, the second has not
            logp, old_logp = views.inner_logp, rows.extras[f"old_{INNER}"]
        else:
            logp, old_logp = views.logp, rows.old_logp
        mask = rows.trained
        ratio = ratios.token(logp, old_logp, mask)
        policy = surrogates.clipped(ratio, credit.advantage, mask, config.clip_low, config.clip_high, config.dual_clip)
        total = weights.weighted_sum(policy.loss, credit.weight)
        return total, clipped_metrics(policy, ratio, mask, credit.weight)

    return Algorithm(
        name="bupo",
        config=config,
        init=init,
        plan=plan,
        credit=group_credit(config.ddof, config.eps, config.spread_tol),
        loss=loss,
        observe=count_steps,
        needs=Needs(
            loss=(INNER,),
            rescore=(f"old_{INNER}",),
            inner=Inner(config.layer, config.apply_final_norm),
            min_group=2,
        ),
        couples="row",
    )
