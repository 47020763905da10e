"""S-GRPO: Early Exit via Reinforcement Learning in Reasoning Models (serial-group decaying-reward policy optimization).
arXiv 2505.07686. (Not the "S-GRPO" about think-answer mismatch.)

Changes the rollout: a group is serial, one full reasoning path and m early exits cut from it. Exit i keeps P_i thought
tokens, adds the inducer ("time is up, answer now", then the end-of-thinking marker) and samples an answer. In the order
of the exits, the full path last, correct answers earn less and less:

    r_i = 2^-(correct so far, this one included, - 1) if correct, else 0;      A_i = r_i - mean(r)
    L   = mean over all rows of (1/len_i) sum_t max(-A r_t, -A clip(r_t, 1 - eps, 1 + eps))

Ours, where the paper does not say: m + 1 rows per group, eps 0.2, positions drawn from (step, prompt number); the kept thought
and the answer train and the inducer does not (`train_prefix=False`: answers only, and the full path); a path without the
marker counts as wrong and is still cut; a thought of no tokens leaves the full path alone. The inducer and the marker
are token ids: collectors have no tokenizer. `rollout.max_prompt` must hold prompt, thought and inducer.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.advantages import group as groups
from jaxrl_llm.algorithms import Paper
from jaxrl_llm.algorithms.base import (
    Algorithm,
    Needs,
    Plan,
    check_clip,
    clipped_metrics,
    count_steps,
    expect,
    expect_one_of,
    per_token,
    weigh_by,
)
from jaxrl_llm.objectives import ratios, surrogates, weights
from jaxrl_llm.types import Credit, Metrics, Rollouts, State, Views, mean_of

PAPER = Paper(
    title="S-GRPO: Early Exit via Reinforcement Learning in Reasoning Models",
    arxiv="2505.07686",
    axis="rollout",
    confidence="paper",
    cost="short answers for every exit",
    state="step counter",
)


@dataclass(frozen=True)
class Config:
    exits: int = 8  # m, cuts per path
    marker: tuple[int, ...] = ()  # token ids that end the thought
    inducer: tuple[int, ...] = ()  # token ids put after a cut thought, the marker included
    path_tokens: int | None = None  # longest full path; none: rollout.max_new
    answer_tokens: int = 256  # longest answer after an exit
    positions: Literal["random", "even"] = "random"
    reward: Literal["decay", "all1", "shortest1"] = "decay"
    correct_at: float = 1.0  # a reward of at least this is a correct answer
    train_prefix: bool = True
    clip_low: float = 0.2
    clip_high: float = 0.2

    def __post_init__(self):
        check_clip(self.clip_low, self.clip_high)
        expect(self.exits >= 1, "exits", self.exits, "at least 1")
        expect(self.answer_tokens >= 1, "answer_tokens", self.answer_tokens, "at least 1")
        expect_one_of("positions", self.positions, ("random", "even"))
        expect_one_of("reward", self.reward, ("decay", "all1", "shortest1"))


def thought_length(tokens: np.ndarray, marker: Sequence[int], stopped: bool) -> tuple[int, bool]:
    """(tokens before the marker, whether it is there); without it all tokens but a stop token are thought."""
    for i in range(len(tokens) - len(marker) + 1):
        if tuple(tokens[i : i + len(marker)]) == tuple(marker):
            return i, True
    return max(len(tokens) - stopped, 0), False


def exit_positions(n: int, exits: int, how: str, rng: np.random.Generator) -> np.ndarray:
    """At most `exits` distinct lengths in 1..n at which a thought of n tokens is cut, ascending."""
    if n <= exits:
        return np.arange(1, n + 1)
    if how == "even":
        return np.arange(1, exits + 1) * n // (exits + 1)
    return np.sort(rng.choice(n, exits, replace=False) + 1)


def serial(config: Config, step: int) -> Callable[..., Generator[Any, Any, Any]]:
    """Collector: a full path of every prompt, then the answers of its early exits."""

    def collect(plan: Plan, prompts: Sequence[Any]):
        from jaxrl_llm.rollout.collectors import row_of
        from jaxrl_llm.rollout.rows import STOP_LENGTH, STOP_TOKEN, Request, Row, Score

        inducer = np.asarray(config.inducer, np.int32)
        asked = Request([p.tokens for p in prompts], [1] * len(prompts), max_new=config.path_tokens)
        paths = [one for (one,) in (yield asked)]
        cuts: list[tuple[int, int, int]] = []  # prompt number, exit number, kept thought
        finished = []
        for g, path in enumerate(paths):
            n, found = thought_length(path.tokens, config.marker, path.stop == STOP_TOKEN)
            finished.append(found)
            where = exit_positions(n, config.exits, config.positions, np.random.default_rng([step, g]))
            cuts += [(g, i + 1, int(p)) for i, p in enumerate(where)]
        contexts = [np.concatenate([prompts[g].tokens, paths[g].tokens[:p], inducer]) for g, _, p in cuts]
        answers = (yield Request(contexts, [1] * len(cuts), max_new=config.answer_tokens)) if cuts else []

        rows: list[Row] = []
        for (g, order, p), (answer,) in zip(cuts, answers):
            path, silent = paths[g], np.zeros(len(inducer), np.float32)
            rows.append(
                Row(
                    prompt=prompts[g],
                    context=prompts[g].tokens,
                    tokens=np.concatenate([path.tokens[:p], inducer, answer.tokens]),
                    mask=np.repeat([config.train_prefix, False, True], [p, len(inducer), len(answer.tokens)]),
                    sampler_logp=np.concatenate([path.sampler_logp[:p], silent, answer.sampler_logp]),
                    policy_logp=np.concatenate([path.policy_logp[:p], silent, answer.policy_logp]),
                    group=g,
                    version=answer.version,
                    truncated=answer.stop == STOP_LENGTH,
                    routes=answer.routes,
                    extras={"exit_order": order},
                )
            )
        full = [
            row_of(prompt, path, g, exit_order=config.exits + 1) for g, (prompt, path) in enumerate(zip(prompts, paths))
        ]
        rows += full
        yield Score(rows)
        for row, found in zip(full, finished):
            if not found:
                row.reward = np.zeros_like(row.reward)
        return sorted(rows, key=lambda r: (r.group, r.extras["exit_order"]))

    return collect


def exit_reward(correct: jax.Array, group: jax.Array, order: jax.Array, kind: str) -> jax.Array:
    """[B] rewards of the rows of serial groups, from which of them are correct."""
    ids = groups.dense_ids(group)
    by = jnp.lexsort((order, ids))
    hits = jnp.cumsum(correct[by])
    before = jax.ops.segment_min(hits - correct[by], ids[by], group.shape[0])[ids[by]]
    rank = jnp.zeros_like(hits).at[by].set(hits - before)  # correct answers of the group so far, this one included
    if kind == "all1":
        value = jnp.ones(rank.shape)
    elif kind == "shortest1":
        value = jnp.where(rank == 1, 1.0, 0.0)
    else:
        value = jnp.exp2(1.0 - rank)
    return jnp.where(correct, value, 0)


def build(config: Config) -> Algorithm:
    def init() -> State:
        return {"step": jnp.zeros((), jnp.int32)}

    def plan(state: State) -> Plan:
        expect(bool(config.marker), "marker", config.marker, "the token ids that end a thought")
        expect(bool(config.inducer), "inducer", config.inducer, "token ids that ask for the answer")
        return Plan(group_size=config.exits + 1, collector=serial(config, int(state["step"])))

    def credit(state: State, rows: Rollouts, key: jax.Array) -> Credit:
        correct = rows.counted & (rows.score >= config.correct_at)
        reward = exit_reward(correct, rows.group, rows.extras["exit_order"], config.reward)
        advantage = groups.normalized(reward, rows.group, rows.counted, scale="none")
        return Credit(per_token(advantage, rows), score=reward)

    def weigh(state: State, rows: Rollouts, credit: Credit) -> Credit:
        return weigh_by(credit, weights.seq_mean_token_mean(rows.trained, count_empty=True, rows=rows.counted))

    def loss(state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[jax.Array, Metrics]:
        ratio = ratios.token(views.logp, rows.old_logp, rows.trained)
        clipped = surrogates.clipped(ratio, credit.advantage, rows.trained, config.clip_low, config.clip_high)
        metrics = clipped_metrics(clipped, ratio, rows.trained, credit.weight)
        return weights.weighted_sum(clipped.loss, credit.weight), {
            **metrics,
            "exits/reward": mean_of(credit.score, rows.counted),
        }

    return Algorithm(
        name="s_grpo",
        config=config,
        init=init,
        plan=plan,
        credit=credit,
        loss=loss,
        weigh=weigh,
        observe=count_steps,
        couples="row",
        needs=Needs(row_extras=("exit_order",)),
    )
