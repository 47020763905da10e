"""DPO: Direct Preference Optimization, arXiv 2305.18290, with the IPO (2310.12036), SLiC-HF (2305.10425) and conservative
losses; online DPO, 2402.04792, which builds the pairs from fresh rollouts and a reward.

Axis: preference. With s_i = sum_t (logp - ref_logp) and delta = s_chosen - s_rejected:

    sigmoid  -(1-e) log sigma(beta delta) - e log sigma(-beta delta)        hinge  max(0, 1 - beta delta)
    robust   [-(1-e) log sigma(beta delta) + e log sigma(-beta delta)] / (1-2e)     ipo  (delta - 1 / (2 beta))^2

averaged over pairs. `select` makes the pairs of each prompt: the two rows of a pair share `block`, and `role` is +1 for the
chosen, -1 for the rejected; a row in several pairs is repeated. Offline pairs are rows with blocks and roles of their
own. IPO divides s by the length unless `length_norm` says otherwise (TRL's offline trainer; DPO's repository and TRL's
online ones do not). `beta` may be a list, one for each epoch with the last one held, as in TRL's online trainer. Ours: an
epoch is `epoch_steps` RL steps; when `drop_ties` leaves fewer pairs, padding fills the batch.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.algorithms import Paper
from jaxrl_llm.algorithms.base import (
    Algorithm,
    Needs,
    Report,
    Selection,
    ViewsFn,
    expect,
    expect_one_of,
    flat_plan,
    weigh_by,
)
from jaxrl_llm.objectives import preference
from jaxrl_llm.types import Credit, Memory, Metrics, Rollouts, State, Views, mean_of, take_rows

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
    pairing: preference.Pairing = "best_worst"
    drop_ties: bool = False  # best_worst: no pair from a group whose rewards all agree
    missing_eos_penalty: float = 0.0  # off the reward of truncated rows before pairing

    def __post_init__(self):
        expect_one_of("loss", self.loss, ("sigmoid", "robust", "hinge", "ipo"))
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


def pair_slots(group: np.ndarray, exists: np.ndarray, pairing: preference.Pairing) -> int:
    """Most pairs the groups can give: a size that does not depend on rewards, so nothing recompiles."""
    sizes = np.unique(group[exists], return_counts=True)[1]
    return int(np.sum(sizes * (sizes - 1) // 2 if pairing == "all" else sizes > 0))


def build(config: Config) -> Algorithm:
    length_norm = config.loss == "ipo" if config.length_norm is None else config.length_norm
    betas, epoch_steps = config.betas, config.epoch_steps or 1

    def init() -> State:
        return {"step": jnp.zeros((), jnp.int32)} if config.epoch_steps else ()

    def beta_at(state: State) -> float | jax.Array:
        if not config.epoch_steps:
            return betas[0]
        return jnp.asarray(betas)[jnp.minimum(state["step"] // epoch_steps, len(betas) - 1)]

    def credit(state: State, rows: Rollouts, key: jax.Array) -> Credit:
        reward = rows.score - config.missing_eos_penalty * rows.truncated
        none = jnp.zeros(rows.length.shape, reward.dtype)  # no row is in a pair yet
        return Credit(jnp.zeros_like(rows.old_logp), score=reward, extras={"role": none})

    def select(state: State, memory: Memory, rows: Rollouts, credit: Credit, key: jax.Array) -> Selection:
        group, exists = np.asarray(rows.group), np.asarray(rows.stat)
        pairs = preference.reward_pairs(
            np.asarray(credit.score), group, np.asarray(rows.counted), config.pairing, config.drop_ties
        )
        index = np.full((pair_slots(group, exists, config.pairing), 2), -1)
        index[: len(pairs[0])] = np.stack(pairs, 1)
        rows, credit = take_rows(rows, credit, jnp.asarray(index.ravel()))
        role = jnp.where(index >= 0, np.array([1, -1]), 0).ravel().astype(credit.advantage.dtype)
        credit = Credit(jnp.where(rows.trained, role[:, None], 0), score=credit.score, extras={"role": role})
        return Selection(rows.with_(block=jnp.arange(index.size, dtype=jnp.int32) // 2), credit, memory)

    def weigh(state: State, rows: Rollouts, credit: Credit) -> Credit:
        role = credit.extras["role"]
        pairs = jnp.maximum(jnp.sum(role > 0), 1).astype(role.dtype)
        weighed = weigh_by(credit, jnp.where(rows.trained & (role != 0)[:, None], 1 / pairs, 0))
        # A pair counts even when a row of it trains no token, so its share is kept apart from the token weights.
        return replace(weighed, extras={**credit.extras, "share": jnp.where(role > 0, 1 / pairs, 0)})

    def loss(state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[jax.Array, Metrics]:
        ref_logp = None if config.reference_free else rows.extras["ref_logp"]
        role, share, beta = credit.extras["role"], credit.extras["share"], beta_at(state)
        score = preference.sequence_score(views.logp, ref_logp, rows.trained, length_norm)
        difference = preference.pair_difference(score, role, rows.block)
        each = preference.pair_loss(difference, config.loss, beta, config.label_smoothing)
        reward = beta * score
        return jnp.sum(jnp.where(share > 0, share * each, 0)), {
            "rewards/accuracy": mean_of(difference > 0, role > 0),
            "rewards/margin": mean_of(beta * difference, role > 0),
            "rewards/chosen": mean_of(reward, role > 0),
            "rewards/rejected": mean_of(reward, role < 0),
        }

    def observe(
        state: State, memory: Memory, rows: Rollouts, credit: Credit, report: Report, views: ViewsFn
    ) -> tuple[State, Memory]:
        return {"step": state["step"] + 1} if config.epoch_steps else state, memory

    return Algorithm(
        name="dpo",
        config=config,
        init=init,
        plan=flat_plan,
        credit=credit,
        loss=loss,
        weigh=weigh,
        select=select,
        observe=observe,
        couples="block",
        needs=Needs(rescore=() if config.reference_free else ("ref_logp",), importance=False, min_group=2),
    )
