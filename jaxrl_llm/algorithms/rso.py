"""RSO: Statistical Rejection Sampling Improves Preference Optimization, arXiv 2309.06657. Axis: the data of preference pairs.

Of many completions the reference (SFT) policy samples, rejection sampling keeps a few that follow the policy a reward model
calls optimal, pi_ref(y) exp(r(y) / beta); those meet in pairs, and the larger reward wins:

    accept y with probability exp((r(y) - max r) / beta), in passes over what is left, until `keep` are kept
    z = gamma (s_chosen - s_rejected)
    sigmoid_norm  -log sigma(z)      s = sum_t (logp - ref_logp)      DPO when gamma = beta
    hinge_norm    max(0, 1 - z)      the same s
    hinge         max(0, 1 - z)      s = sum_t logp                   SLiC, with margin 1 / gamma

averaged over pairs. beta = 0 keeps the best, a large beta (1e9) the first; candidates = keep with such a beta is the paper's
"sft-sample-rank", DPO on given pairs its "direct". `reference.sync_every` begins another round: the reference becomes the
present policy. The reward is the task's; a pairwise model's becomes one by `objectives.preference.pairwise_reward`.
Ours: in a tournament an odd one out passes to the next round; candidates are drawn for every step instead of once
for the data set; a prompt with fewer than `keep` different completions keeps all of them; unscored candidates are left out;
`drop_ties`: the first wins a tie, which real-valued rewards seldom give and rewards of 0 and 1 mostly do.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import pairs
from jaxrl_llm.algorithms import Paper
from jaxrl_llm.algorithms.base import Algorithm, Needs, Plan, Report, ViewsFn, expect, expect_one_of
from jaxrl_llm.objectives import preference
from jaxrl_llm.types import REFERENCE, Credit, Memory, Metrics, Rollouts, State, Views

PAPER = Paper(
    title="Statistical Rejection Sampling Improves Preference Optimization",
    arxiv="2309.06657",
    axis="preference",
    confidence="paper",
    cost="candidates / keep completions for each trained one, reference log-probs",
    state="step counter",
)


@dataclass(frozen=True)
class Config:
    candidates: int = 64  # completions per prompt that the reference samples
    keep: int = 8  # of them after rejection sampling
    beta: float = 0.5  # of the rejection sampling; 0: the best
    gamma: float = 0.05  # of the loss
    loss: Literal["sigmoid_norm", "hinge_norm", "hinge"] = "sigmoid_norm"
    pairing: Literal["first_round", "tournament"] = "first_round"
    drop_ties: bool = False  # no pair of equal rewards, whose order alone would say who wins

    def __post_init__(self):
        expect(self.keep >= 2, "keep", self.keep, "at least 2")
        expect(self.candidates >= self.keep, "candidates", self.candidates, f"at least keep={self.keep}")
        expect(self.beta >= 0, "beta", self.beta, "at least 0")
        expect(self.gamma > 0, "gamma", self.gamma, "more than 0")
        expect_one_of("loss", self.loss, ("sigmoid_norm", "hinge_norm", "hinge"))
        expect_one_of("pairing", self.pairing, ("first_round", "tournament"))


def thin(rows: Sequence[Any], keep: int, beta: float, uniforms: Iterator[float]) -> list[Any]:
    """The rows (of one prompt) that rejection sampling accepts, in that order; a repeated completion keeps its first place
    and its last reward."""
    first, reward = {}, {}
    for row in rows:
        if row.scored:
            key = row.tokens.tobytes()
            first.setdefault(key, row)
            reward[key] = row.reward
    for key, row in first.items():
        row.reward = reward[key]
    unique = list(first.values())
    total = [float(row.reward.sum()) for row in unique]
    accepted = preference.rejection_sample(total, min(keep, len(unique)), beta, uniforms)
    return [unique[i] for i in accepted]


def thinned(config: Config, step: int) -> Callable[..., Generator[Any, Any, Any]]:
    """Collector: candidates of the reference, scored and thinned; a group's rows are in the order of acceptance."""

    def collect(plan: Plan, prompts: Sequence[Any]):
        from jaxrl_llm.rollout.collectors import sample_groups

        rows = yield from sample_groups(prompts, config.candidates, policy="ref")
        kept = []
        for g in range(len(prompts)):
            rng = np.random.default_rng([step, g])
            kept += thin([r for r in rows if r.group == g], config.keep, config.beta, iter(rng.random, None))
        for row in kept:
            row.source = REFERENCE
        return kept

    return collect


def build(config: Config) -> Algorithm:
    kind: preference.PairLoss = "sigmoid" if config.loss == "sigmoid_norm" else "hinge"
    tournament = config.pairing == "tournament"

    def init() -> State:
        return {"step": jnp.zeros((), jnp.int32)}

    def plan(state: State) -> Plan:
        return Plan(group_size=config.keep, collector=thinned(config, int(state["step"])))

    def credit(state: State, rows: Rollouts, key: jax.Array) -> Credit:
        return pairs.unpaired(rows, rows.score)

    def pairs_of(score: np.ndarray, rows: Rollouts) -> pairs.Pairs:
        group, counted = np.asarray(rows.group), np.asarray(rows.counted)
        members = [np.flatnonzero((group == g) & counted) for g in dict.fromkeys(group[counted].tolist())]
        met = [pair for order in members for pair in preference.round_pairs(score, order.tolist(), tournament)]
        chosen, rejected = np.array(met, np.int64).reshape(-1, 2).T
        return pairs.without_ties((chosen, rejected), score) if config.drop_ties else (chosen, rejected)

    def slots(rows: Rollouts) -> int:
        return len(rows.group) if tournament else len(rows.group) // 2

    def loss(state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[jax.Array, Metrics]:
        role = credit.extras["role"]
        ref_logp = None if config.loss == "hinge" else rows.extras["ref_logp"]
        score = preference.sequence_score(views.logp, ref_logp, rows.trained, length_norm=False)
        difference = preference.pair_difference(score, role, rows.block)
        each = preference.pair_loss(difference, kind, config.gamma)
        return pairs.weighted(each, credit), pairs.metrics(config.gamma * score, config.gamma * difference, role)

    def observe(
        state: State, memory: Memory, rows: Rollouts, credit: Credit, report: Report, views: ViewsFn
    ) -> tuple[State, Memory]:
        return {"step": state["step"] + 1}, memory

    return Algorithm(
        name="rso",
        config=config,
        init=init,
        plan=plan,
        credit=credit,
        loss=loss,
        weigh=pairs.mean_over_pairs,
        select=pairs.selecting(pairs_of, slots),
        observe=observe,
        couples="block",
        needs=Needs(
            rescore=() if config.loss == "hinge" else ("ref_logp",), reference=True, importance=False, min_group=2
        ),
    )
