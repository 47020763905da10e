"""DPO: Direct Preference Optimization, arXiv 2305.18290, with the IPO (2310.12036), SLiC-HF (2305.10425) and conservative
losses; online DPO, 2402.04792, which builds the pairs from fresh rollouts and a reward.

Axis: preference. With s_i = sum_t (logp - ref_logp) and delta = s_chosen - s_rejected:

    sigmoid  -(1-e) log sigma(beta delta) - e log sigma(-beta delta)        hinge  max(0, 1 - beta delta)
    robust   [-(1-e) log sigma(beta delta) + e log sigma(-beta delta)] / (1-2e)     ipo  (delta - 1 / (2 beta))^2

averaged over pairs. `select` makes the pairs of each prompt: the two rows of a pair share `block`, and `role` is +1 for the
chosen, -1 for the rejected; a row in several pairs is repeated. `pairs=given` is offline: the completions come with the
problems (task.chosen_field, task.rejected_field), chosen ones rewarded 1 and rejected ones 0. IPO divides s by the length unless `length_norm` says otherwise (TRL's offline trainer; DPO's repository and TRL's
online ones do not). `beta` may be a list, one for each epoch with the last one held, as in TRL's online trainer. Ours: an
epoch is `epoch_steps` RL steps; when `drop_ties` leaves fewer pairs, padding fills the batch.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import pairs
from jaxrl_llm.algorithms import Paper
from jaxrl_llm.algorithms.base import (
    Algorithm,
    Needs,
    Plan,
    Report,
    ViewsFn,
    expect,
    expect_one_of,
)
from jaxrl_llm.objectives import preference
from jaxrl_llm.types import Credit, Memory, Metrics, Rollouts, State, Views

PAPER = Paper(
    title="Direct Preference Optimization, with IPO, SLiC and online pairs",
    arxiv="2305.18290",
    axis="preference",
    confidence="code",
    cost="reference log-probs",
    state="step counter with a list of betas",
)


@dataclass(frozen=True)
class Config:
    loss: preference.PairLoss = "sigmoid"
    beta: float | tuple[float, ...] = 0.1  # several: one for each epoch, the last one held
    epoch_steps: int | None = None  # RL steps of an epoch, when beta is several
    label_smoothing: float = 0.0  # e, for sigmoid and robust
    length_norm: bool | None = None  # divide s by the row's length; none: only for ipo
    reference_free: bool = False  # s without ref_logp; with hinge this is SLiC
    pairs: Literal["sampled", "given"] = "sampled"  # given: those that come with the problems
    pairing: preference.Pairing = "best_worst"
    drop_ties: bool = False  # best_worst: no pair from a group whose rewards all agree
    missing_eos_penalty: float = 0.0  # off the reward of truncated rows before pairing

    def __post_init__(self):
        expect_one_of("loss", self.loss, ("sigmoid", "robust", "hinge", "ipo"))
        expect_one_of("pairs", self.pairs, ("sampled", "given"))
        expect_one_of("pairing", self.pairing, ("best_worst", "all"))
        several = not isinstance(self.beta, float | int)
        expect(len(self.betas) > 0 and min(self.betas) > 0, "beta", self.beta, "more than 0")
        fits = (self.epoch_steps or 0) >= 1 if several else self.epoch_steps is None
        steps = "at least 1, as beta is several" if several else "null, as beta is one number"
        expect(fits, "epoch_steps", self.epoch_steps, steps)
        expect(0 <= self.label_smoothing < 0.5, "label_smoothing", self.label_smoothing, "at least 0, less than 0.5")
        smooth = self.loss in ("sigmoid", "robust") or self.label_smoothing == 0
        expect(smooth, "label_smoothing", self.label_smoothing, f"0 with loss={self.loss}")

    @property
    def betas(self) -> tuple[float, ...]:
        return (self.beta,) if isinstance(self.beta, float | int) else tuple(self.beta)


def build(config: Config) -> Algorithm:
    length_norm = config.loss == "ipo" if config.length_norm is None else config.length_norm
    betas, epoch_steps = config.betas, config.epoch_steps or 1
    given = "all" if config.pairs == "given" else "none"

    def init() -> State:
        return {"step": jnp.zeros((), jnp.int32)} if config.epoch_steps else ()

    def beta_at(state: State) -> float | jax.Array:
        if not config.epoch_steps:
            return betas[0]
        return jnp.asarray(betas)[jnp.minimum(state["step"] // epoch_steps, len(betas) - 1)]

    def plan(state: State) -> Plan:
        from jaxrl_llm.rollout import collectors

        return Plan(collector=collectors.preferences if config.pairs == "given" else None)

    def credit(state: State, rows: Rollouts, key: jax.Array) -> Credit:
        return pairs.unpaired(rows, rows.score - config.missing_eos_penalty * rows.truncated)

    def pairs_of(score: np.ndarray, rows: Rollouts) -> pairs.Pairs:
        group, counted = np.asarray(rows.group), np.asarray(rows.counted)
        return preference.reward_pairs(score, group, counted, config.pairing, config.drop_ties)

    def slots(rows: Rollouts) -> int:
        return pairs.most(rows, lambda n: n * (n - 1) // 2 if config.pairing == "all" else 1)

    def loss(state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[jax.Array, Metrics]:
        ref_logp = None if config.reference_free else rows.extras["ref_logp"]
        role, beta = credit.extras["role"], beta_at(state)
        score = preference.sequence_score(views.logp, ref_logp, rows.trained, length_norm)
        difference = preference.pair_difference(score, role, rows.block)
        each = preference.pair_loss(difference, config.loss, beta, config.label_smoothing)
        return pairs.weighted(each, credit), pairs.metrics(beta * score, beta * difference, role)

    def observe(
        state: State, memory: Memory, rows: Rollouts, credit: Credit, report: Report, views: ViewsFn
    ) -> tuple[State, Memory]:
        return {"step": state["step"] + 1} if config.epoch_steps else state, memory

    return Algorithm(
        name="dpo",
        config=config,
        init=init,
        plan=plan,
        credit=credit,
        loss=loss,
        weigh=pairs.mean_over_pairs,
        select=pairs.selecting(pairs_of, slots),
        observe=observe,
        couples="block",
        needs=Needs(rescore=() if config.reference_free else ("ref_logp",), importance=False, min_group=2, given=given),
    )
