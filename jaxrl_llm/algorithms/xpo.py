"""XPO: Exploratory Preference Optimization, arXiv 2405.21046. Axis: exploration, by an optimistic term in online DPO.

Of every prompt the policy samples one completion and the reference another; the larger reward is chosen (ties: the
policy's). With s = sum_t (logp - ref_logp), delta = s_chosen - s_rejected and y~ the reference's completion,

    L = mean over pairs of  -log sigma(beta delta) + alpha log pi(y~)          ipo: (delta - 1 / (2 beta))^2 instead

The sign is plus: what the reference says becomes LESS likely, whether it won or lost, and mass moves to where the reference
does not go. The loss has no lower bound in log pi(y~); `clip` = c (the paper's 500) puts clip(s, -c, c) in its place, which has the
same gradient inside. alpha = 0 is online DPO. Iterations only change alpha: `iteration_steps` RL steps each, the last alpha held;
the reference stays. To return the best iterate: `checkpoint.keep_best`.

Followed: reference samples as in the theory, TRL and oat (the paper's experiments reportedly take both completions from the policy).
`drop_identical` is oat's: pairs of equal completions have no loss, but count in the mean. Ours: that it drops the DPO term too;
`iteration_steps`; `drop_ties`, which leaves both terms of a tie out: with rewards of 0 and 1 most pairs tie, and to prefer the
policy's completion in them is to flee from the reference, right or wrong. As in the trainers, and not in the theory, every pair is
used once: there is no buffer of earlier iterations.
"""

from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import pairs
from jaxrl_llm.algorithms import Paper
from jaxrl_llm.algorithms.base import Algorithm, Needs, Plan, Selection, count_steps, expect, expect_one_of
from jaxrl_llm.objectives import preference
from jaxrl_llm.types import REFERENCE, Credit, Memory, Metrics, Rollouts, State, Views, mean_of

PAPER = Paper(
    title="Exploratory Preference Optimization: Harnessing Implicit Q*-Approximation for Sample-Efficient RLHF",
    arxiv="2405.21046",
    axis="preference",
    confidence="paper",
    cost="reference log-probs; half of the completions are the reference's",
    state="step counter",
)


@dataclass(frozen=True)
class Config:
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    beta: float = 0.1
    alpha: tuple[float, ...] = (1e-5, 5e-6, 0.0)  # of each iteration, the last one held
    iteration_steps: int = 100  # RL steps of an iteration
    clip: float | None = 500.0  # limits the optimistic term's log-ratio; none: log pi itself, unlimited
    drop_identical: bool = False  # no loss from pairs of equal completions
    drop_ties: bool = False  # no pair of equal rewards

    def __post_init__(self):
        expect_one_of("loss", self.loss, ("sigmoid", "ipo"))
        expect(self.beta > 0, "beta", self.beta, "more than 0")
        expect(len(self.alpha) > 0 and min(self.alpha) >= 0, "alpha", self.alpha, "numbers of at least 0")
        expect(self.iteration_steps >= 1, "iteration_steps", self.iteration_steps, "at least 1")
        expect(self.clip is None or self.clip > 0, "clip", self.clip, "more than 0, or null")


def policy_against_reference(score: np.ndarray, rows: Rollouts) -> pairs.Pairs:
    """(chosen, rejected): the policy's rows of a group against the reference's, first with first; ties go to the policy."""
    group, counted, theirs = np.asarray(rows.group), np.asarray(rows.counted), np.asarray(rows.source) == REFERENCE
    met = []
    for g in dict.fromkeys(group[counted].tolist()):
        here = counted & (group == g)
        for own, other in zip(np.flatnonzero(here & ~theirs), np.flatnonzero(here & theirs)):
            met.append((own, other) if score[own] >= score[other] else (other, own))
    chosen, rejected = np.array(met, np.int64).reshape(-1, 2).T
    return chosen, rejected


def differ(rows: Rollouts) -> np.ndarray:
    """[B] whether the two rows of a pair (neighbours) are different completions."""
    tokens, length = np.asarray(rows.tokens), np.asarray(rows.length)
    tokens = np.where(np.arange(tokens.shape[1]) < length[:, None], tokens, -1)
    return np.repeat((tokens[::2] != tokens[1::2]).any(1), 2)


def build(config: Config) -> Algorithm:
    def init() -> State:
        return {"step": jnp.zeros((), jnp.int32)}

    def alpha_at(state: State) -> jax.Array:
        return jnp.asarray(config.alpha)[jnp.minimum(state["step"] // config.iteration_steps, len(config.alpha) - 1)]

    def plan(state: State) -> Plan:
        from jaxrl_llm.rollout.collectors import against_reference

        return Plan(group_size=2, collector=against_reference)

    def credit(state: State, rows: Rollouts, key: jax.Array) -> Credit:
        return pairs.unpaired(rows, rows.score)

    def pairs_of(score: np.ndarray, rows: Rollouts) -> pairs.Pairs:
        met = policy_against_reference(score, rows)
        return pairs.without_ties(met, score) if config.drop_ties else met

    pair_up = pairs.selecting(pairs_of, lambda rows: len(rows.group) // 2)

    def select(state: State, memory: Memory, rows: Rollouts, credit: Credit, key: jax.Array) -> Selection:
        chosen = pair_up(state, memory, rows, credit, key)
        if not config.drop_identical:
            return chosen
        extras = {**chosen.credit.extras, "differs": jnp.asarray(differ(chosen.rows))}
        return chosen._replace(credit=replace(chosen.credit, extras=extras))

    def weigh(state: State, rows: Rollouts, credit: Credit) -> Credit:
        weighed = pairs.mean_over_pairs(state, rows, credit)
        share = weighed.extras["share"]
        if config.drop_identical:
            share = jnp.where(weighed.extras["differs"], share, 0)
        return replace(weighed, extras={**weighed.extras, "share": share})

    def loss(state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[jax.Array, Metrics]:
        role, share, ref_logp = credit.extras["role"], credit.extras["share"], rows.extras["ref_logp"]
        score = preference.sequence_score(views.logp, ref_logp, rows.trained, length_norm=False)
        difference = preference.pair_difference(score, role, rows.block)
        each = preference.pair_loss(difference, config.loss, config.beta)
        if config.clip is None:
            bonus = preference.sequence_score(views.logp, None, rows.trained, length_norm=False)
        else:
            bonus = jnp.clip(score, -config.clip, config.clip)
        theirs = (role != 0) & (rows.source == REFERENCE)
        total = pairs.weighted(each, credit)
        total += alpha_at(state) * jnp.sum(jnp.where(theirs & (share > 0), share * bonus, 0))
        return total, {
            **pairs.metrics(config.beta * score, config.beta * difference, role),
            "optimism/bonus": mean_of(bonus, theirs),
            "optimism/reference_won": mean_of(role > 0, theirs),
        }

    return Algorithm(
        name="xpo",
        config=config,
        init=init,
        plan=plan,
        credit=credit,
        loss=loss,
        weigh=weigh,
        select=select,
        observe=count_steps,
        couples="block",
        needs=Needs(rescore=("ref_logp",), importance=False, min_group=2),
    )
