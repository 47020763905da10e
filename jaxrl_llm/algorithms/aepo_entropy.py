"""AEPO: Arbitrary Entropy Policy Optimization. arXiv 2510.08141. (Not Agentic Entropy-Balanced Policy Optimization.)

Changes the data: a quarter of the prompts is also rolled out at another temperature, and the good ones of these samples
steer the entropy towards a target h0. One step, with last step's entropy h:

    T   = t_high if h <= h0 else t_low
    S   = rows sampled at T whose GRPO advantage in their own group exceeds adv_threshold, in order
    n   = min(sample_num, |S|), halved when h > h0
    batch = S[:n] with advantage 1, then rows n.. of the normal batch with their GRPO advantages

The loss is GRPO's with a dual clip and a token mean. The substituted rows have no importance correction: their ratio is of
the policy at temperature 1 to itself, so they are REINFORCE on samples of the tempered policy. The entropy is estimated
from sampled tokens, -sum logp / sum mask, averaged over the step's updates, substituted rows included. The paper writes a
coefficient alpha, the code (followed) substitutes rows and halves n. Ours: no qualifying row means plain GRPO.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.advantages import group
from jaxrl_llm.algorithms import Paper
from jaxrl_llm.algorithms.base import (
    Algorithm,
    Needs,
    Plan,
    Report,
    Selection,
    ViewsFn,
    check_clip,
    clipped_metrics,
    expect,
    per_token,
)
from jaxrl_llm.objectives import ratios, surrogates
from jaxrl_llm.objectives.weights import weighted_sum
from jaxrl_llm.types import Credit, Memory, Metrics, Rollouts, State, Views, mean_of, metric_value, take_rows

PAPER = Paper(
    title="Arbitrary Entropy Policy Optimization",
    arxiv="2510.08141",
    axis="entropy",
    confidence="code",
    cost="a quarter more rollouts",
    state="entropy of the last step",
)


@dataclass(frozen=True)
class Config:
    h0: float = 0.5  # target entropy, nats per token
    t_high: float = 1.2
    t_low: float = 0.8
    sample_num: int = 60  # most rows to substitute; as few as still control the entropy
    adv_threshold: float = 0.05
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = 3.0

    def __post_init__(self):
        check_clip(self.clip_low, self.clip_high, self.dual_clip)
        expect(self.t_low > 0, "t_low", self.t_low, "more than 0")
        expect(self.t_high > self.t_low, "t_high", self.t_high, f"more than t_low={self.t_low}")
        expect(self.sample_num >= 0, "sample_num", self.sample_num, "at least 0")


def with_extra(temperature: float) -> Callable[..., Generator[Any, Any, Any]]:
    """Collector: the normal groups, then new groups of the first quarter of the prompts at another temperature.

    The extra rows (`extra` = 1) stay out of the batch's statistics; their advantage is that in their own group.
    """

    def collect(plan: Plan, prompts: Sequence[Any]):
        from jaxrl_llm.rollout.collectors import sample_groups

        main = yield from sample_groups(prompts, plan.group_size)
        some = prompts[: len(prompts) // 4]
        extra = []
        if some:
            extra = yield from sample_groups(some, plan.group_size, len(prompts), temperature=temperature)
        for row in main:
            row.extras["extra"] = 0
        for row in extra:
            row.extras["extra"], row.stat = 1, False
        return main + extra

    return collect


def substitutes(
    advantage: np.ndarray, candidates: np.ndarray, limit: int, config: Config, entropy: float
) -> np.ndarray:
    """Indices of the extra rows that enter the batch; at most `limit`."""
    good = np.flatnonzero(candidates & (advantage > config.adv_threshold))
    n = min(config.sample_num, len(good))
    return good[: min(n // 2 if entropy > config.h0 else n, limit)]


def build(config: Config) -> Algorithm:
    def init() -> State:
        return {"entropy": jnp.zeros((), jnp.float32)}

    def plan(state: State) -> Plan:
        temperature = config.t_high if float(state["entropy"]) <= config.h0 else config.t_low
        return Plan(
            collector=with_extra(temperature),
            capacity=lambda prompts, size: (prompts + prompts // 4, (prompts + prompts // 4) * size),
        )

    def credit(state: State, rows: Rollouts, key: jax.Array) -> Credit:
        counted = rows.scored & (rows.stat | (rows.extras["extra"] == 1))
        advantage = group.normalized(rows.score, rows.group, counted)
        return Credit(per_token(advantage, rows), score=advantage)

    def select(state: State, memory: Memory, rows: Rollouts, credit: Credit, key: jax.Array) -> Selection:
        extra = np.asarray(rows.extras["extra"]) == 1
        main = np.flatnonzero(~extra)
        chosen = substitutes(
            np.asarray(credit.score), extra & np.asarray(rows.scored), len(main), config, float(state["entropy"])
        )
        rows, credit = take_rows(rows, credit, jnp.asarray(np.append(chosen, main[len(chosen) :])))
        new = jnp.arange(len(main))[:, None] < len(chosen)
        advantage = jnp.where(new & rows.trained, 1, credit.advantage)
        return Selection(rows, Credit(advantage, score=credit.score), memory)

    def loss(state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[jax.Array, Metrics]:
        mask = rows.trained
        ratio = ratios.token(views.logp, rows.old_logp, mask)
        clipped = surrogates.clipped(ratio, credit.advantage, mask, config.clip_low, config.clip_high, config.dual_clip)
        metrics = clipped_metrics(clipped, ratio, mask, credit.weight)
        metrics["entropy/sampled"] = mean_of(-views.logp, mask)
        metrics["substituted"] = mean_of(rows.extras["extra"] == 1, jnp.any(mask, -1))
        return weighted_sum(clipped.loss, credit.weight), metrics

    def observe(
        state: State, memory: Memory, rows: Rollouts, credit: Credit, report: Report, views: ViewsFn
    ) -> tuple[State, Memory]:
        each = [metric_value(m["entropy/sampled"]) for m in report.per_update]
        return {"entropy": jnp.asarray(np.mean(each), jnp.float32)} if each else state, memory

    return Algorithm(
        name="aepo_entropy",
        config=config,
        init=init,
        plan=plan,
        credit=credit,
        loss=loss,
        select=select,
        observe=observe,
        couples="row",
        needs=Needs(row_extras=("extra",), importance=False, min_group=2),
    )
