"""SPO (single-stream): Single-stream Policy Optimization. arXiv 2509.13232. (Not spo_segment.)

Changes the baseline: one completion per prompt, and a Beta success-rate tracker per prompt instead of a group mean
(`advantages.trackers`). With v the tracked rate before the step and r a reward in [0, 1]:

    draw prompts by sqrt(v (1 - v)) / N^gamma + 0.05                      without replacement
    A = (a - mean(a)) / (std(a) + 1e-8),  a = r - v                       over the rows of the batch, ddof 1
    l = max(-A r, -A clip(r, 1 - 0.2, 1 + 0.28)), dual clip 10            averaged over tokens
    after the update, D = mean |log-prob now - log-prob then| of the prompt's *previous* completion
    rho = clamp(2^(-D / 0.06), 0.875, 0.96);  alpha <- rho alpha + r;  beta <- rho beta + 1 - r

The code is followed where the paper differs: no N^gamma (gamma = 0), 0.5 added to the offline counts, D the mean absolute
log-ratio, both limits of rho. Rewards between 0 and 1 move v by the same formula (the paper mentions them, the code has none).
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.advantages import group as groups
from jaxrl_llm.advantages import trackers
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
from jaxrl_llm.objectives import ratios, surrogates
from jaxrl_llm.objectives.weights import weighted_sum
from jaxrl_llm.types import Credit, Memory, Metrics, Rollouts, State, Views, mean_of

PAPER = Paper(
    title="Single-stream Policy Optimization",
    arxiv="2509.13232",
    axis="baseline",
    confidence="code",
    cost="two forwards after each step",
    state="a success rate and the last completion of every prompt",
)


@dataclass(frozen=True)
class Config:
    pool: int = 8000  # the tracker has room for this many training problems
    successes: tuple[int, ...] = ()  # correct completions of each problem in an offline pass; empty: none made
    offline_samples: int = 8  # n0, completions per problem in that pass
    rho: Literal["drift", "constant"] = "drift"  # constant: rho_min, without stored completions
    rho_min: float = 0.875
    rho_max: float = 0.96
    drift_half: float = 0.06  # drift that halves the past's weight
    draw_gamma: float = 0.0  # paper: prompts of certain trackers are drawn less
    draw_floor: float = 0.05
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = 10.0

    def __post_init__(self):
        check_clip(self.clip_low, self.clip_high, self.dual_clip)
        expect(self.pool >= 1, "pool", self.pool, "at least the number of training problems")
        fits = not self.successes or len(self.successes) == self.pool
        expect(fits, "successes", f"{len(self.successes)} numbers", f"one for each of the {self.pool} problems")
        expect_one_of("rho", self.rho, ("drift", "constant"))
        expect(
            0 < self.rho_min <= self.rho_max < 1, "rho_min", self.rho_min, f"over 0, at most {self.rho_max}, under 1"
        )


def previous(rows: Rollouts, last: dict[str, Any]) -> tuple[Rollouts, np.ndarray]:
    """The rows with each one's completion replaced by its prompt's previous one (nothing trained when there is none), and
    the log-probs recorded for it."""
    tokens, mask, length = np.zeros_like(rows.tokens), np.zeros_like(rows.mask), np.zeros_like(rows.length)
    logp = np.zeros(mask.shape, np.float32)
    for b, prompt in enumerate(np.asarray(rows.extras["prompt_id"])):
        old = last.get(str(prompt)) if rows.counted[b] else None
        if old is not None:
            n = length[b] = len(old["tokens"])
            tokens[b, :n], mask[b, :n], logp[b, :n] = old["tokens"], old["mask"], old["logp"]
    return rows.with_(tokens=tokens, mask=mask, length=length), logp


def build(config: Config) -> Algorithm:
    def init() -> State:
        offline = jnp.asarray(config.successes or np.zeros(config.pool), jnp.float32)
        alpha, beta = trackers.initial(offline, config.offline_samples if config.successes else 0, config.rho_min)
        return {"alpha": alpha, "beta": beta, "visits": jnp.zeros(config.pool, jnp.int32)}

    def plan(state: State) -> Plan:
        weights = trackers.draw_weights(state["alpha"], state["beta"], config.draw_gamma, config.draw_floor)
        return Plan(group_size=1, prompt_weights=weights)

    def credit(state: State, rows: Rollouts, key: jax.Array) -> Credit:
        expected = trackers.value(state["alpha"], state["beta"])[rows.extras["prompt_id"]]
        batch = jnp.zeros_like(rows.group)  # all rows are one group
        advantage = groups.normalized(rows.score - expected, batch, rows.counted, eps=1e-8)
        return Credit(per_token(advantage, rows), extras={"expected": expected})

    def loss(state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[jax.Array, Metrics]:
        ratio = ratios.token(views.logp, rows.old_logp, rows.trained)
        clipped = surrogates.clipped(
            *(ratio, credit.advantage, rows.trained, config.clip_low, config.clip_high, config.dual_clip)
        )
        metrics = clipped_metrics(clipped, ratio, rows.trained, credit.weight)
        metrics["tracker/expected"] = mean_of(credit.extras["expected"], rows.counted)
        metrics["tracker/error"] = mean_of((rows.score - credit.extras["expected"]) ** 2, rows.counted)
        return weighted_sum(clipped.loss, credit.weight), metrics

    def observe(
        state: State, memory: Memory, rows: Rollouts, credit: Credit, report: Report, views: ViewsFn
    ) -> tuple[State, Memory]:
        rows = jax.tree.map(np.asarray, rows)
        counted = np.flatnonzero(rows.counted)
        prompt, reward = rows.extras["prompt_id"][counted], rows.score[counted]
        rho = jnp.full(len(counted), config.rho_min, jnp.float32)
        if config.rho == "drift":
            last = memory.get("last", {})
            old_rows, old_logp = previous(rows, last)
            now = views(old_rows, ("logp",), "policy").logp
            drift = trackers.drift(jnp.asarray(old_logp), now, old_rows.mask)[counted]
            rho = trackers.forgetting(drift, config.drift_half, config.rho_min, config.rho_max)
            logp = np.asarray(views(rows, ("logp",), "policy").logp, np.float32)
            fresh = {
                str(p): {"tokens": rows.tokens[b, :n], "mask": rows.mask[b, :n], "logp": logp[b, :n]}
                for p, b, n in zip(prompt, counted, rows.length[counted])
            }
            memory = {**memory, "last": {**last, **fresh}}
        # Copies of a prompt all start from the tracker before the step; numpy lets the last one win.
        table = {name: np.array(x) for name, x in state.items()}
        table["alpha"][prompt], table["beta"][prompt] = trackers.refresh(
            table["alpha"][prompt], table["beta"][prompt], reward, rho
        )
        np.add.at(table["visits"], prompt, 1)
        return {name: jnp.asarray(x) for name, x in table.items()}, memory

    return Algorithm(
        name="spo_single",
        config=config,
        init=init,
        plan=plan,
        credit=credit,
        loss=loss,
        observe=observe,
        needs=Needs(row_extras=("prompt_id",), pool="pool"),
        couples="row",
    )
