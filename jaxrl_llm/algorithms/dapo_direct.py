"""DAPO (direct): Direct Advantage(-Based) Policy Optimization, arXiv 2412.18279. (Not ByteDance's DAPO.)

Axis: step-level preference, as a regression. An action is one step of a response (up to a delimiter), its state the prompt and the
steps before. A critic, trained beforehand and frozen, values states; the actor regresses each step's log-ratio on its advantage:

    critic   V(s) = sigma(v),  BCE against MC(s), the share of correct completions among M from s
    A(s, a)  = V(s + a) - mean over the M completions of V(s + a'),  repeats counted
    L        = 1/2 mean over steps of (A / beta - sum_t (logp - ref_logp))^2

over one row of each different step, in states where max A - min A >= `gap`. At logp = ref_logp this is the advantage policy gradient
over beta; a log-ratio of A / beta is far away, so learning rate and number of steps bound the move.

Rows: from responses the reference samples, `kept` of a prompt, right and wrong as balanced as possible, are cut into steps; every
prefix is a state; from each the reference samples M completions. A row is such a completion, and its first `step_length` tokens are
the action; a step that ends its response has its verified outcome as value. `critic_steps` RL steps train the critic alone, then
`actor_steps` the actor alone, and so on; reference.sync_every = critic_steps + actor_steps starts each such iteration from the
present actor, with the critic as it is. Each step makes one update on fresh rows, whatever `learner` says of epochs and minibatches.
Ours: gap is max - min, the outcome of last steps, at most `states` states of a prompt (drawn by the step's number), both numbers of
steps. `rollout.max_prompt` must hold the states.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxrl_llm.advantages import group as groups
from jaxrl_llm.algorithms import Paper
from jaxrl_llm.algorithms.base import (
    Algorithm,
    Needs,
    Plan,
    Report,
    Selection,
    count_steps,
    expect,
    expect_one_of,
    weigh_by,
)
from jaxrl_llm.objectives import preference
from jaxrl_llm.types import REFERENCE, Credit, Memory, Metrics, Rollouts, State, Views, mean_of, take_rows

PAPER = Paper(
    title="Improving Multi-Step Reasoning Abilities of Large Language Models with Direct Advantage-Based Policy Optimization",
    arxiv="2412.18279",
    axis="preference",
    confidence="paper",
    cost="completions from every state, a critic, reference log-probs",
    state="step counter",
)


@dataclass(frozen=True)
class Config:
    beta: float = 0.01
    gap: float = 0.1  # states whose advantages spread less are left out
    average: Literal["rows", "states"] = "rows"  # mean over all steps, or inside each state first
    responses: int = 32  # n, of a prompt
    kept: int = 6  # n', of them to cut into steps
    completions: int = 16  # M, from a state
    states: int = 8  # of a prompt in an RL step
    delimiter: tuple[int, ...] = ()  # token ids any of which ends a step (line breaks)
    correct_at: float = 1.0  # a reward of at least this is a correct response
    critic_steps: int = 100  # RL steps that train the critic
    actor_steps: int = 100  # RL steps that then train the actor

    def __post_init__(self):
        expect(self.beta > 0, "beta", self.beta, "more than 0")
        expect(self.gap >= 0, "gap", self.gap, "at least 0")
        expect_one_of("average", self.average, ("rows", "states"))
        expect(1 <= self.kept <= self.responses, "kept", self.kept, f"1 to responses={self.responses}")
        expect(self.completions >= 2, "completions", self.completions, "at least 2")
        expect(self.states >= 1, "states", self.states, "at least 1")
        expect(self.critic_steps >= 0, "critic_steps", self.critic_steps, "at least 0")
        expect(self.actor_steps >= 1, "actor_steps", self.actor_steps, "at least 1")


def balanced(correct: Sequence[bool], kept: int) -> list[int]:
    """Indices of `kept` responses, correct and wrong ones as equal in number as possible, the first of each, ascending."""
    right, wrong = ([i for i, c in enumerate(correct) if bool(c) is side] for side in (True, False))
    many = min(len(right), max(kept - len(wrong), kept // 2))
    return sorted(right[:many] + wrong[: kept - many])


def step_ends(tokens: np.ndarray, delimiter: Sequence[int]) -> list[int]:
    """Where each step of a completion ends: behind every delimiter, and at the end."""
    ends = (np.flatnonzero(np.isin(tokens, delimiter)) + 1).tolist()
    return ends if ends and ends[-1] == len(tokens) else [*ends, len(tokens)]


def stepwise(config: Config, step: int) -> Callable[..., Generator[Any, Any, Any]]:
    """Collector: responses, the states in them, and completions from every state; a state is a group."""

    def collect(plan: Plan, prompts: Sequence[Any]):
        from jaxrl_llm.rollout.collectors import row_of, sample_groups
        from jaxrl_llm.rollout.rows import Request, Row, Score

        tried = yield from sample_groups(prompts, config.responses, policy="ref")
        states: list[tuple[Any, np.ndarray]] = []  # the prompt, the steps so far
        for g, prompt in enumerate(prompts):
            mine = [r for r in tried if r.group == g and r.scored]
            chosen = balanced([r.reward.sum() >= config.correct_at for r in mine], config.kept)
            cuts = [
                mine[i].tokens[:end] for i in chosen for end in [0, *step_ends(mine[i].tokens, config.delimiter)[:-1]]
            ]
            different = list({cut.tobytes(): cut for cut in cuts}.values())
            drawn = np.random.default_rng([step, g]).permutation(len(different))[: config.states]
            states += [(prompt, different[i]) for i in sorted(drawn)]
        contexts = [np.concatenate([prompt.tokens, steps]) for prompt, steps in states]
        answers = (yield Request(contexts, [config.completions] * len(states), policy="ref")) if states else []

        whole: list[Row] = []  # the response as the reward sees it: the steps so far and what follows
        rows: list[Row] = []
        for s, ((prompt, steps), completions) in enumerate(zip(states, answers)):
            actions: dict[bytes, int] = {}
            for c in completions:
                n = step_ends(c.tokens, config.delimiter)[0]
                action = actions.setdefault(c.tokens[:n].tobytes(), len(actions))
                rows.append(row_of(prompt, c, s, step_length=n, action_id=action))
                rows[-1].context, rows[-1].source = contexts[s], REFERENCE
                whole.append(replace(rows[-1], tokens=np.concatenate([steps, c.tokens])))
        yield Score(whole)
        return [replace(r, reward=w.reward, scored=w.scored, parts=w.parts, text=w.text) for r, w in zip(rows, whole)]

    return collect


def kept_steps(
    advantage: np.ndarray, state: np.ndarray, action: np.ndarray, counted: np.ndarray, gap: float
) -> np.ndarray:
    """[n] indices of the first row of every different step, in states whose advantages spread by at least `gap`."""
    at = np.flatnonzero(counted)
    wide = [s for s in np.unique(state[at]) if np.ptp(advantage[at][state[at] == s]) >= gap]
    at = at[np.isin(state[at], wide)]
    first = np.unique(np.stack([state[at], action[at]]), axis=1, return_index=True)[1]
    return at[np.sort(first)]


def critic_loss(logit: Float[Array, "n"], target: Float[Array, "n"]) -> Float[Array, "n"]:
    """Cross-entropy of V = sigma(logit) with a soft target: -[MC log V + (1 - MC) log(1 - V)]."""
    return jax.nn.softplus(logit) - target * logit


def first_of(x: Float[Array, "B T"], on: Bool[Array, "B T"]) -> tuple[Float[Array, "B"], Bool[Array, "B"]]:
    """The first entry of each row where `on` holds (0 when there is none), and whether there is one."""
    there = jnp.any(on, -1)
    entry = jnp.take_along_axis(x, jnp.argmax(on, -1)[:, None], -1)[:, 0]
    return jnp.where(there, entry, 0), there


def build(config: Config) -> Algorithm:
    def init() -> State:
        return {"step": jnp.zeros((), jnp.int32)}

    def trains_critic(state: State) -> Any:
        return state["step"] % (config.critic_steps + config.actor_steps) < config.critic_steps

    def action(rows: Rollouts) -> Bool[Array, "B T"]:
        """The trained tokens of the row's first step."""
        return rows.trained & (jnp.arange(rows.mask.shape[1]) < rows.extras["step_length"][:, None])

    def plan(state: State) -> Plan:
        expect(bool(config.delimiter), "delimiter", config.delimiter, "token ids that end a step")
        return Plan(
            group_size=config.completions,
            collector=stepwise(config, int(state["step"])),
            capacity=lambda prompts, size: (prompts * config.states, prompts * config.states * size),
        )

    def credit(state: State, rows: Rollouts, key: jax.Array) -> Credit:
        correct = (rows.score >= config.correct_at).astype(rows.old_logp.dtype)
        logit, goes_on = first_of(rows.extras["old_values"], rows.trained & ~action(rows))
        next_value = jnp.where(goes_on, jax.nn.sigmoid(logit), correct)
        advantage = groups.normalized(next_value, rows.group, rows.counted, scale="none", spread_tol=0.0)
        target = groups.statistics(correct, rows.group, rows.counted).mean
        return Credit(jnp.where(action(rows), advantage[:, None], 0), score=advantage, extras={"target": target})

    def select(state: State, memory: Memory, rows: Rollouts, credit: Credit, key: jax.Array) -> Selection:
        counted, group = np.asarray(rows.counted), np.asarray(rows.group)
        at = np.flatnonzero(counted)
        if not trains_critic(state):
            at = kept_steps(np.asarray(credit.score), group, np.asarray(rows.extras["action_id"]), counted, config.gap)
        index = np.full(len(group), -1)
        index[: len(at)] = at
        return Selection(*take_rows(rows, credit, jnp.asarray(index)), memory)

    def weigh(state: State, rows: Rollouts, credit: Credit) -> Credit:
        one = rows.counted.astype(rows.old_logp.dtype)
        if config.average == "states":
            one = jnp.where(rows.counted, 1 / jnp.maximum(groups.statistics(one, rows.group, rows.counted).count, 1), 0)
        learning = trains_critic(state)
        actor = jnp.where(learning, 0, one / jnp.maximum(jnp.sum(one), 1))
        valued = jnp.any(rows.trained, -1)
        critic = jnp.where(learning & valued, 1 / jnp.maximum(jnp.sum(valued), 1), 0)
        weighed = weigh_by(credit, jnp.where(action(rows), actor[:, None], 0))
        return replace(weighed, extras={**credit.extras, "actor": actor, "critic": critic})

    def loss(state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[jax.Array, Metrics]:
        actor, critic, target = (credit.extras[name] for name in ("actor", "critic", "target"))
        log_ratio = preference.sequence_score(views.logp, rows.extras["ref_logp"], action(rows), length_norm=False)
        distance = 0.5 * (credit.score / config.beta - log_ratio) ** 2
        logit, _ = first_of(views.values, rows.trained)
        entropy = critic_loss(logit, target)
        total = jnp.sum(jnp.where(actor > 0, actor * distance, 0)) + jnp.sum(jnp.where(critic > 0, critic * entropy, 0))
        return total, {
            "critic/loss": mean_of(entropy, critic > 0),
            "critic/error": mean_of(jnp.abs(jax.nn.sigmoid(logit) - target), critic > 0),
            "actor/log_ratio": mean_of(log_ratio, actor > 0),
        }

    def update(learner: Any, state: State, rows: Rollouts, credit: Credit, key: jax.Array) -> tuple[State, Report]:
        learning = bool(trains_critic(state))
        state, metrics = learner.step(state, rows, credit, active={"policy": not learning, "critic": learning})
        return state, Report(metrics, metrics, 1, (metrics,))

    return Algorithm(
        name="dapo_direct",
        config=config,
        init=init,
        plan=plan,
        credit=credit,
        loss=loss,
        weigh=weigh,
        select=select,
        update=update,
        updates=1,
        observe=count_steps,
        couples="row",
        needs=Needs(
            loss=("logp", "values"),
            rescore=("ref_logp", "old_values"),
            row_extras=("step_length", "action_id"),
            critic=True,
            importance=False,
            min_group=2,
        ),
    )
