"""XRPO: eXplore-eXploit GRPO. arXiv 2510.06672. Axis: how many rollouts a prompt gets, and a bonus for unlikely right answers.

    phase 1: n_base completions of every prompt; then, in equal parts, what is left of prompts x group_size, one at a time to
    Pi_q   = h_q(n) - h_q(n + 1) + lam sqrt(log(1 + T) / n)              n: completions of q so far, T: of all prompts
    h_q(n) = t_{1 - alpha/2, n-1} s_q / sqrt(n)                          s_q: std of its rewards (ddof 1), held within a phase

A prompt without a reward over 0 is *seeded* from the next phase on: up to `examples` solved problems, the most similar first, stand
before it, and those rows train on the context that produced them, in the prompt's own group. Solutions are right completions of
earlier steps, one of each problem, never of the problem itself.

    A_i    = (R_i - mean_g) / (std_g + eps)
    A_i   += min(max(lam_nov (1 - eta_i), 0), kappa A_i)  if A_i > 0,    eta_i = exp(s_i - mean_g s),  s: mean old_logp
    L      = mean over all rows, empty ones too, of the mean over tokens of PPO's clipped loss

Our choices: the greedy hand-out, T, the square root, 3 phases of equal budgets, alpha 0.05, lam 1, n_base 4; the bonus for A > 0 only (the
formula has no cases, the text has); similarity as the cosine of token counts (the paper embeds with an 8B model), examples as whole
contexts while `rollout.max_prompt` has room, the first solution kept; ddof 0, eps 1e-6, `spread_tol`.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxrl_llm.advantages import group
from jaxrl_llm.algorithms import Paper
from jaxrl_llm.algorithms.base import (
    Algorithm,
    Key,
    Needs,
    Plan,
    Report,
    ViewsFn,
    check_clip,
    clipped_metrics,
    expect,
    keep_state,
    no_state,
    per_token,
    weigh_by,
)
from jaxrl_llm.objectives import ratios, surrogates, weights
from jaxrl_llm.types import Credit, Memory, Metrics, Rollouts, State, Views, mean_of

PAPER = Paper(
    title="XRPO: Pushing the Limits of GRPO with Targeted Exploration and Exploitation",
    arxiv="2510.06672",
    axis="rollout",
    confidence="paper",
    state="a solution of every problem solved",
)


@dataclass(frozen=True)
class Config:
    n_base: int = 4  # completions of every prompt in the first phase
    phases: int = 3  # the first included
    alpha: float = 0.05  # of the confidence interval
    lam: float = 1.0  # weight of the exploration bonus
    examples: int = 2  # solved problems before a prompt that fails; 0: no seeding
    lam_nov: float = 2.5
    kappa: float = 0.5  # the bonus is at most this share of the advantage
    clip_low: float = 0.2
    clip_high: float = 0.2
    ddof: int = 0
    eps: float = 1e-6
    spread_tol: float = group.SPREAD_TOL

    def __post_init__(self):
        check_clip(self.clip_low, self.clip_high)
        expect(self.n_base >= 2, "n_base", self.n_base, "at least 2, for a standard deviation")
        expect(self.phases >= 2, "phases", self.phases, "at least 2")
        expect(0 < self.alpha < 1, "alpha", self.alpha, "between 0 and 1")
        expect(self.lam >= 0, "lam", self.lam, "at least 0")
        expect(self.examples >= 0, "examples", self.examples, "at least 0")
        expect(self.lam_nov >= 0, "lam_nov", self.lam_nov, "at least 0")
        expect(self.kappa >= 0, "kappa", self.kappa, "at least 0")


def half_width(n: np.ndarray, std: np.ndarray, alpha: float) -> np.ndarray:
    """h: half the confidence interval of a mean reward, from n rewards of this standard deviation."""
    from scipy.stats import t

    sizes, of = np.unique(n, return_inverse=True)  # a quantile is slow, and sizes are few
    return t.ppf(1 - alpha / 2, sizes - 1)[of] * std / np.sqrt(n)


def priority(n: np.ndarray, std: np.ndarray, alpha: float, lam: float) -> np.ndarray:
    """Pi: what one more completion of each prompt is worth, after `n` of each."""
    gain = half_width(n, std, alpha) - half_width(n + 1, std, alpha)
    return gain + lam * np.sqrt(np.log1p(n.sum()) / n)


def similar(prompt: np.ndarray, others: Sequence[np.ndarray]) -> list[int]:
    """Indices of `others`, the most similar first: by the cosine of token counts, ties to the first."""
    size = 1 + max(int(x.max(initial=0)) for x in (prompt, *others))
    own = np.bincount(prompt, minlength=size)
    counts = [np.bincount(x, minlength=size) for x in others]
    cosine = [own @ c / max(np.linalg.norm(own) * np.linalg.norm(c), 1e-12) for c in counts]
    return sorted(range(len(others)), key=lambda i: -cosine[i])


def seeded(prompt: Any, corpus: dict[str, Any], examples: int, room: int) -> np.ndarray:
    """The prompt's tokens behind at most `examples` solved problems, as many as fit `room`; the most similar is next to it."""
    known = [x for problem, x in corpus.items() if problem != str(prompt.id)]
    context = prompt.tokens
    used = 0
    for i in similar(prompt.tokens, [x["prompt"] for x in known]) if known else []:
        longer = np.concatenate([known[i]["prompt"], known[i]["solution"], context])
        if used < examples and len(longer) <= room:
            context, used = longer, used + 1
    return context


def phased(config: Config) -> Callable[..., Generator[Any, Any, Any]]:
    """Collector: phases of rollouts, each spent where the last ones left most to learn."""

    def collect(plan: Plan, prompts: Sequence[Any]):
        from jaxrl_llm.rollout.budget import greedy
        from jaxrl_llm.rollout.collectors import row_of
        from jaxrl_llm.rollout.rows import Request, Row, Score

        expect(plan.group_size >= config.n_base, "n_base", config.n_base, f"at most group_size = {plan.group_size}")
        left = len(prompts) * (plan.group_size - config.n_base)
        budgets = [len(part) for part in np.array_split(np.arange(left), config.phases - 1)]
        contexts, extra = [p.tokens for p in prompts], np.full(len(prompts), config.n_base)
        rows: list[Row] = []
        for phase in range(config.phases):
            if not extra.any():
                break
            answers = yield Request(list(contexts), extra.tolist())
            new = []
            for g, (prompt, completions) in enumerate(zip(prompts, answers)):
                for completion in completions:
                    row = row_of(prompt, completion, g, prompt_size=len(prompt.tokens))
                    row.context = contexts[g]
                    new.append(row)
            yield Score(new)
            rows += new
            if phase == config.phases - 1:
                break
            rewards = [
                np.array([r.reward.sum() for r in rows if r.group == g and r.scored]) for g in range(len(prompts))
            ]
            std = np.array([r.std(ddof=1) if len(r) > 1 else 0.0 for r in rewards])
            spent = np.bincount([r.group for r in rows], minlength=len(prompts))
            extra = greedy(spent, budgets[phase], lambda n, std=std: priority(n, std, config.alpha, config.lam)) - spent
            for g, prompt in enumerate(prompts):
                failed = rewards[g].max(initial=-np.inf) <= 0
                corpus = (plan.memory or {}).get("corpus", {}) if failed else {}
                contexts[g] = seeded(prompt, corpus, config.examples, plan.max_prompt)
        return sorted(rows, key=lambda r: r.group)

    return collect


def sharpened(advantage: Float[Array, "B"], eta: Float[Array, "B"], lam: float, kappa: float) -> Float[Array, "B"]:
    """Advantages with the bounded bonus for right answers that are less likely than their group."""
    bonus = jnp.minimum(jnp.maximum(lam * (1 - eta), 0), kappa * advantage)
    return jnp.where(advantage > 0, advantage + bonus, advantage)


def novelty(rows: Rollouts) -> Float[Array, "B"]:
    """eta: a completion's mean token likelihood relative to its group's; 1 for one without trained tokens."""
    count = jnp.sum(rows.trained, -1)
    s = jnp.sum(jnp.where(rows.trained, rows.old_logp, 0), -1) / jnp.maximum(count, 1)
    told = rows.counted & (count > 0)
    mean = group.statistics(s, rows.group, told).mean
    return jnp.where(told, jnp.exp(jnp.where(told, s - mean, 0)), 1)


def build(config: Config) -> Algorithm:
    def plan(state: State) -> Plan:
        # A seeded prompt has a second context.
        return Plan(collector=phased(config), capacity=lambda prompts, size: (2 * prompts, prompts * size))

    def credit(state: State, rows: Rollouts, key: Key) -> Credit:
        advantage = group.normalized(
            rows.score, rows.group, rows.counted, ddof=config.ddof, eps=config.eps, spread_tol=config.spread_tol
        )
        eta = novelty(rows)
        return Credit(per_token(sharpened(advantage, eta, config.lam_nov, config.kappa), rows), extras={"eta": eta})

    def weigh(state: State, rows: Rollouts, credit: Credit) -> Credit:
        return weigh_by(credit, weights.seq_mean_token_mean(rows.trained, count_empty=True, rows=rows.counted))

    def loss(state: State, views: Views, rows: Rollouts, credit: Credit) -> tuple[jax.Array, Metrics]:
        mask = rows.trained
        ratio = ratios.token(views.logp, rows.old_logp, mask)
        policy = surrogates.clipped(ratio, credit.advantage, mask, config.clip_low, config.clip_high)
        metrics = clipped_metrics(policy, ratio, mask, credit.weight)
        metrics["novelty/eta"] = mean_of(credit.extras["eta"], rows.counted)
        metrics["novelty/seeded"] = mean_of(rows.prompt_length[rows.prompt] > rows.extras["prompt_size"], rows.counted)
        return weights.weighted_sum(policy.loss, credit.weight), metrics

    def observe(
        state: State, memory: Memory, rows: Rollouts, credit: Credit, report: Report, views: ViewsFn
    ) -> tuple[State, Memory]:
        rows, corpus = jax.tree.map(np.asarray, rows), dict(memory.get("corpus", {}))
        for b in np.flatnonzero(rows.counted & (rows.score > 0)):
            problem, length = str(rows.extras["prompt_id"][b]), rows.prompt_length[rows.prompt[b]]
            context = rows.prompt_tokens[rows.prompt[b], length - rows.extras["prompt_size"][b] : length]
            solution = {"prompt": context.copy(), "solution": rows.tokens[b, : rows.length[b]].copy()}
            corpus.setdefault(problem, solution)
        return state, {**memory, "corpus": corpus}

    return Algorithm(
        name="xrpo",
        config=config,
        init=no_state,
        plan=plan,
        credit=credit,
        loss=loss,
        weigh=weigh,
        observe=observe if config.examples else keep_state,
        couples="row",
        needs=Needs(row_extras=("prompt_id", "prompt_size"), min_group=2),
    )
