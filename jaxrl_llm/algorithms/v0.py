"""V0: a generalist value model for any policy at state zero. arXiv 2602.03584. Axis: how many rollouts a prompt gets.

Before anything is sampled, a predictor says how likely the policy solves each prompt, from (prompt, reward) pairs of the last steps
as context; the rollouts of a step go where an outcome is most likely to be mixed:

    U(B, p) = B (1 - p) (1 - (1 - p)^(B - 1)) = E[(B - k) 1(0 < k < B)],   k ~ Bin(B, p)
    maximise sum_q U(B_q, p_q)   with sum B_q = prompts x group_size,  least <= B_q <= most

The loss is GRPO's, with ragged groups; the prediction is no baseline. `allocation=greedy` gives one rollout at a time to the largest
gain (the paper's rule); U is not concave and its gain never falls under 1 - p, so greed can starve hard prompts: `exact` is the optimum.

The model is `models.state_zero`: adapter, its loss, and the stand-in for the paper's head. Here it runs untrained, on hidden states
of a frozen random embedding, so its votes go by likeness of words; `build(config, predict=...)` takes a real one.
Our choices: that predictor; mean rewards of groups as outcomes, hardened at 0.5; as long as fewer than `least_context` are known,
equal groups. Not here: routing over several models (`state_zero.routing_label` is its label).
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.algorithms import Paper, grpo
from jaxrl_llm.algorithms.base import Algorithm, Plan, Report, ViewsFn, check_clip, expect, expect_one_of
from jaxrl_llm.types import Credit, Memory, Rollouts, State

PAPER = Paper(
    title="V0: A Generalist Value Model for Any Policy at State Zero",
    arxiv="2602.03584",
    axis="rollout",
    confidence="code",
    cost="a prediction for every prompt",
    state="the last prompts and their rewards",
)

# (contexts of the pairs, their rewards [N], prompts asked about) -> chance that the policy solves each [M]
Predict = Callable[[Sequence[np.ndarray], np.ndarray, Sequence[np.ndarray]], np.ndarray]


@dataclass(frozen=True)
class Config:
    least: int = 2  # rollouts of a prompt
    most: int = 128
    allocation: Literal["greedy", "exact"] = "greedy"
    context: int = 256  # pairs kept, of the last steps
    least_context: int = 128  # with fewer the paper's predictor is near chance
    queries: int = 8  # of the adapter
    width: int = 64  # of the stand-in encoder
    temperature: float = 1.0  # of the stand-in head
    clip_low: float = 0.2
    clip_high: float = 0.2

    def __post_init__(self):
        check_clip(self.clip_low, self.clip_high)
        expect_one_of("allocation", self.allocation, ("greedy", "exact"))
        expect(self.least >= 2, "least", self.least, "at least 2")
        expect(self.most >= self.least, "most", self.most, f"at least {self.least}")
        expect(1 <= self.least_context <= self.context, "least_context", self.least_context, f"1 to {self.context}")
        expect(self.temperature > 0, "temperature", self.temperature, "more than 0")


def utility(rollouts: Any, p: Any) -> np.ndarray:
    """U: expected wrong completions in groups of mixed outcome."""
    rollouts, wrong = np.asarray(rollouts, float), 1 - np.asarray(p, float)
    return rollouts * wrong * (1 - wrong ** (rollouts - 1))


def allocate(p: np.ndarray, total: int, least: int, most: int, allocation: str = "greedy") -> np.ndarray:
    """Rollouts of each prompt, from the chance that it is solved."""
    from jaxrl_llm.rollout import budget

    if allocation == "exact":
        return budget.exact(utility(np.arange(least, most + 1), p[:, None]), total, least)
    first = np.full(len(p), least)
    return budget.greedy(first, total - first.sum(), lambda n: utility(n + 1, p) - utility(n, p), most)


def stand_in(config: Config) -> Predict:
    """The predictor of this module's docstring."""
    from jaxrl_llm.models import state_zero

    def encode(table: np.ndarray, prompts: Sequence[np.ndarray]) -> tuple[jax.Array, jax.Array]:
        length = np.array([len(x) for x in prompts])
        mask = np.arange(length.max()) < length[:, None]
        hidden = np.zeros((*mask.shape, config.width))
        hidden[mask] = table[np.concatenate(prompts) % len(table)]
        return jnp.asarray(hidden), jnp.asarray(mask)

    def predict(known: Sequence[np.ndarray], rewards: np.ndarray, asked: Sequence[np.ndarray]) -> np.ndarray:
        table = np.random.default_rng(0).standard_normal((4096, config.width))
        adapter = state_zero.init(jax.random.key(0), config.width, config.queries)
        context, query = (state_zero.features(adapter, *encode(table, x)) for x in (known, asked))
        logits = state_zero.kernel_head(context, jnp.asarray(rewards >= 0.5, float), query, config.temperature)
        return np.asarray(jax.nn.softmax(logits)[:, 1], float)

    return predict


def guided(config: Config, predict: Predict) -> Callable[..., Generator[Any, Any, Any]]:
    """Collector: groups as large as the predictor finds worth it."""

    def collect(plan: Plan, prompts: Sequence[Any]):
        from jaxrl_llm.rollout.collectors import row_of
        from jaxrl_llm.rollout.rows import Request, Score

        size, pool = plan.group_size, (plan.memory or {}).get("pool", {"reward": np.zeros(0)})
        expect(size >= config.least, "least", config.least, f"at most group_size = {size}")
        expect(size <= config.most, "most", config.most, f"at least group_size = {size}")
        counts, contexts = np.full(len(prompts), size), [p.tokens for p in prompts]
        if len(pool["reward"]) >= config.least_context:
            known = [x[:n] for x, n in zip(pool["tokens"], pool["length"])]
            p = predict(known, pool["reward"], contexts)
            counts = allocate(p, size * len(prompts), config.least, config.most, config.allocation)
        answers = yield Request(contexts, counts.tolist())
        rows = [row_of(p, c, g) for g, (p, some) in enumerate(zip(prompts, answers)) for c in some]
        yield Score(rows)
        return rows

    return collect


def build(config: Config, predict: Predict | None = None) -> Algorithm:
    collector = guided(config, predict or stand_in(config))

    def observe(
        state: State, memory: Memory, rows: Rollouts, credit: Credit, report: Report, views: ViewsFn
    ) -> tuple[State, Memory]:
        rows = jax.tree.map(np.asarray, rows)
        groups = [np.flatnonzero(rows.counted & (rows.group == g)) for g in np.unique(rows.group[rows.counted])]
        at = rows.prompt[np.array([own[0] for own in groups], int)]
        fresh = {
            "tokens": rows.prompt_tokens[at],
            "length": rows.prompt_length[at],
            "reward": np.array([rows.score[own].mean() for own in groups], np.float32),
        }
        pool = memory.get("pool", {})
        both = {k: np.concatenate([*([pool[k]] if pool else []), v])[-config.context :] for k, v in fresh.items()}
        return state, {**memory, "pool": both}

    loss = grpo.build(grpo.Config(clip_low=config.clip_low, clip_high=config.clip_high))
    return loss._replace(name="v0", config=config, plan=lambda state: Plan(collector=collector), observe=observe)
