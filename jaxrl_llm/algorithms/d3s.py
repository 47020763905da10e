"""D3S: Dynamic Dual-Level Down-Sampling (Learning More with Less). arXiv 2509.22115. Axis: which rows and tokens train.

    A_i    = (R_i - mean_g) / (std_g + eps)                over all rows of the group; never normalised again
    S_g    = argmax over |S| = N of Var(A_S)               per prompt: the k smallest and N - k largest, best k
    S      = argmax over |S| = ceil(batch_keep |U|) of Var(A_S),  U the union of the S_g       across prompts
    tokens = the ceil(K count) of S with the largest |A_i| H_it                      H: entropy of the policy that sampled
    (N, K) = (1 - p) (N_init, K_init) + p (N_final, K_final),   p = step / steps, at most 1
    L      = mean over the rows of S of the mean over a row's kept tokens of PPO's clipped loss

The second selection removes groups that agree; a kept row without kept tokens adds 0 but counts. With ratio=sequence the ratio is
GSPO's, of all tokens of the row. N is given as a share of the group and rounded half up, at least 2. Equal variances: the
smallest k; equal values: the first rows.
Our choices: batch_keep 0.5, N from a quarter to half of the group, K from 0.2 to 0.5, tokens ranked over the whole selection
(`scope=response`: inside each completion), the row mean, `steps`, `spread_tol`.
"""

from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.advantages import group
from jaxrl_llm.algorithms import Paper
from jaxrl_llm.algorithms.base import (
    Algorithm,
    Key,
    Needs,
    Selection,
    check_clip,
    clipped_metrics,
    count_steps,
    expect,
    expect_one_of,
    flat_plan,
    per_token,
    weigh_by,
)
from jaxrl_llm.objectives import ratios, surrogates, weights
from jaxrl_llm.types import Credit, Memory, Metrics, Rollouts, State, Views, take_rows

PAPER = Paper(
    title="Learning More with Less: A Dynamic Dual-Level Down-Sampling Framework for Efficient Policy Optimization",
    arxiv="2509.22115",
    axis="selection",
    confidence="paper",
    cost="entropies of the old policy; fewer rows in the update",
    state="step counter",
)


@dataclass(frozen=True)
class Config:
    rows_init: float = 0.25  # share of a group kept at the start
    rows_final: float = 0.5  # after `steps`
    tokens_init: float = 0.2  # share of the kept rows' tokens that trains
    tokens_final: float = 0.5
    steps: int = 300  # RL steps over which both grow; those of the run
    batch_keep: float = 0.5  # share kept across prompts; 1: all
    scope: Literal["batch", "response"] = "batch"
    ratio: Literal["token", "sequence"] = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    ddof: int = 0
    eps: float = 1e-6
    spread_tol: float = group.SPREAD_TOL

    def __post_init__(self):
        for name in ("rows_init", "rows_final", "tokens_init", "tokens_final", "batch_keep"):
            expect(0 < getattr(self, name) <= 1, name, getattr(self, name), "over 0, at most 1")
        expect(self.steps >= 1, "steps", self.steps, "at least 1")
        expect_one_of("scope", self.scope, ("batch", "response"))
        expect_one_of("ratio", self.ratio, ("token", "sequence"))
        check_clip(self.clip_low, self.clip_high)


def shares(config: Config, step: int) -> tuple[float, float]:
    """(share of a group's rows, share of tokens) at an RL step."""
    p = min(step / config.steps, 1.0)
    return (
        (1 - p) * config.rows_init + p * config.rows_final,
        (1 - p) * config.tokens_init + p * config.tokens_final,
    )


def most_varied(values: np.ndarray, size: int) -> np.ndarray:
    """Indices [size], ascending, of the subset with the largest variance; all when there are no more than `size`.

    The best subset holds the k smallest and size - k largest values; the first best k is taken, and of equal values the
    first ones.
    """
    n = len(values)
    if n <= size:
        return np.arange(n)
    up, down = np.argsort(values, kind="stable"), np.argsort(-values, kind="stable")

    def subset(k: int) -> np.ndarray:
        return np.concatenate([up[:k], down[~np.isin(down, up[:k])][: size - k]])

    subsets = [subset(k) for k in range(size + 1)]
    variance = np.array([np.var(values[s]) for s in subsets])
    first = np.argmax(variance >= variance.max() * (1 - 1e-12))  # rounding is no reason for a later k
    return np.sort(subsets[first])


def keep_rows(advantage: np.ndarray, groups: np.ndarray, counted: np.ndarray, share: float, batch: float) -> np.ndarray:
    """Which rows [B] survive both selections."""
    kept: list[np.ndarray] = []
    for g in np.unique(groups[counted]):
        own = np.flatnonzero(counted & (groups == g))
        kept.append(own[most_varied(advantage[own], max(int(np.floor(share * len(own) + 0.5)), 2))])
    union = np.sort(np.concatenate([*kept, np.zeros(0, int)])).astype(int)
    return np.isin(np.arange(len(groups)), union[most_varied(advantage[union], _ceil(batch * len(union)))])


def keep_tokens(rank: np.ndarray, mask: np.ndarray, share: float, scope: str) -> np.ndarray:
    """Which tokens [B, T] of `mask` have the largest `rank`: a share of all of them, or of each row's; first ones first."""
    if scope == "response":
        return np.concatenate([keep_tokens(r[None], m[None], share, "batch") for r, m in zip(rank, mask)])
    at = np.flatnonzero(mask)
    best = at[np.argsort(-rank.ravel()[at], kind="stable")[: _ceil(share * len(at))]]
    return np.isin(np.arange(mask.size), best).reshape(mask.shape)


def _ceil(x: float) -> int:
    return int(np.ceil(x - 1e-9))  # 0.2 * 15 is a little over 3


def build(config: Config) -> Algorithm:
    def init() -> State:
        return {"step": jnp.zeros((), jnp.int32)}

    def credit(state: State, rows: Rollouts, key: Key) -> Credit:
        advantage = group.normalized(
            rows.score, rows.group, rows.counted, ddof=config.ddof, eps=config.eps, spread_tol=config.spread_tol
        )
        return Credit(per_token(advantage, rows), score=advantage, extras={"kept": rows.trained})

    def select(state: State, memory: Memory, rows: Rollouts, credit: Credit, key: Key) -> Selection:
        row_share, token_share = shares(config, int(state["step"]))
        advantage, trained = np.asarray(credit.score, np.float64), np.asarray(rows.trained)
        kept = keep_rows(advantage, np.asarray(rows.group), np.asarray(rows.counted), row_share, config.batch_keep)
        mask = trained & kept[:, None]
        entropy = np.where(mask, np.asarray(rows.extras["old_entropy"], np.float64), 0)
        tokens = keep_tokens(np.abs(advantage)[:, None] * entropy, mask, token_share, config.scope)
        credit = replace(credit, extras={**credit.extras, "kept": jnp.asarray(tokens)})
        return Selection(*take_rows(rows, credit, jnp.asarray(np.where(kept, np.arange(len(kept)), -1))), memory)

    def weigh(state: State, rows: Rollouts, credit: Credit) -> Credit:
        kept = rows.trained & credit.extras["kept"]
        return weigh_by(credit, weights.seq_mean_token_mean(kept, count_empty=True, rows=rows.counted))

    def loss(state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[jax.Array, Metrics]:
        likelihood_ratio = ratios.token if config.ratio == "token" else ratios.sequence
        ratio, mask = likelihood_ratio(views.logp, rows.old_logp, rows.trained), rows.trained & credit.extras["kept"]
        policy = surrogates.clipped(ratio, credit.advantage, mask, config.clip_low, config.clip_high)
        return weights.weighted_sum(policy.loss, credit.weight), clipped_metrics(policy, ratio, mask, credit.weight)

    return Algorithm(
        name="d3s",
        config=config,
        init=init,
        plan=flat_plan,
        credit=credit,
        loss=loss,
        select=select,
        weigh=weigh,
        observe=count_steps,
        couples="row",
        needs=Needs(rescore=("old_entropy",), min_group=2),
    )
