"""Held-out evaluation: accuracy, pass@k, maj@k, mean reward, samples; during training and on its own."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrl_llm import config
from jaxrl_llm.reporting.samples import Sample, from_rows
from jaxrl_llm.rollout.collectors import row_of
from jaxrl_llm.rollout.driver import reward_rows
from jaxrl_llm.rollout.rows import Row
from jaxrl_llm.sharding import processes
from jaxrl_llm.tasks.base import Prompt, Record, Task
from jaxrl_llm.training.metrics import of_rows

SEED_OFFSET = 1_000_003  # evaluation never draws the random numbers of training


class Evaluation(NamedTuple):
    metrics: dict[str, float]  # names without the "eval/" prefix
    samples: list[Sample]


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is correct, from `correct` of n (arXiv 2107.03374, eq. 1).

    1 - C(n - correct, k) / C(n, k), exactly. Raises ValueError unless 1 <= k <= n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k}: expected k between 1 and the {n} samples")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def maj_at_k(answers: Sequence[str], correct: Sequence[bool], k: int) -> float:
    """Chance that the most frequent of k answers is correct (self-consistency, arXiv 2203.11171).

    The mean over the disjoint runs of k among the samples. Among equally frequent answers each is as likely to be
    taken; an answer judged differently from sample to sample counts by its share. Raises ValueError unless 1 <= k <= n.
    """
    n = len(answers)
    if not 1 <= k <= n:
        raise ValueError(f"maj@{k}: expected k between 1 and the {n} samples")
    return float(np.mean([_majority(answers[i : i + k], correct[i : i + k]) for i in range(0, n - k + 1, k)]))


def _majority(answers: Sequence[str], correct: Sequence[bool]) -> float:
    votes: dict[str, list[bool]] = defaultdict(list)
    for answer, ok in zip(answers, correct):
        votes[answer].append(ok)
    most = max(map(len, votes.values()))
    return float(np.mean([np.mean(v) for v in votes.values() if len(v) == most]))


def extract_answer(completion: str) -> str:
    """What counts as the answer in a vote: the last \\boxed{...}, else what follows the last ####, <answer> or
    "answer is", else the whole text; blanks, a closing full stop and dollar signs do not matter."""
    start = completion.rfind("\\boxed{")
    if start >= 0:
        depth, begin = 0, start + len("\\boxed")
        for end in range(begin, len(completion)):
            depth += (completion[end] == "{") - (completion[end] == "}")
            if depth == 0:
                return _normal(completion[begin + 1 : end])
    marked = re.findall(r"(?:####|<answer>|[Aa]nswer is:?)\s*(.*?)\s*(?:</answer>|\n|$)", completion)
    return _normal(marked[-1] if marked else completion)


def _normal(answer: str) -> str:
    return " ".join(answer.replace("$", "").split()).rstrip(".")


def summarize(rows: Sequence[Row], task: Task, ks: Sequence[int]) -> dict[str, float]:
    """Metrics of rewarded rows, one group per problem. Unscored rows leave the statistics; a problem with fewer than k
    scored samples leaves those of k.

    accuracy, reward/mean and reward/std, reward/<part>, pass@k, maj@k, completions/*, unscored/rows, problems.
    """
    out = of_rows(rows, task.rewards, task.correct_at)
    del out["frac_reward_zero_std"], out["groups_of_one"]
    groups: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.group] += [row] if row.scored else []
    first = task.rewards[0].name
    judged = [
        ([extract_answer(r.text or "") for r in g], [r.parts[first] >= task.correct_at for r in g])
        for g in groups.values()
    ]
    for k in ks:
        enough = [(a, c) for a, c in judged if len(c) >= k]
        out[f"pass@{k}"] = float(np.mean([pass_at_k(len(c), sum(c), k) for _, c in enough])) if enough else 0.0
        out[f"maj@{k}"] = float(np.mean([maj_at_k(a, c, k) for a, c in enough])) if enough else 0.0
    return {**out, "problems": float(len(groups))}


def evaluate(
    engine: Any,
    prompts: Sequence[Prompt],
    task: Task,
    score: Callable[[Sequence[tuple[str, Record]]], list[dict[str, float | None]]],
    decode: Callable[[Any], str],
    settings: config.Eval,
    *,
    seed: int,
    step: int,
    batch: int,
    shown: int = 8,
) -> Evaluation:
    """Sample `settings.samples` completions of every prompt with the engine's weights, score and summarize them.

    Problems go through the engine `batch` at a time, the last batch filled up with repeats, so that evaluation compiles
    one size; sample j of problem i draws the same random numbers whatever `batch` is.

    Args:
      score: the task's rewards, as `tasks.workers.Scorer.score`.
      decode: completion tokens -> the text that is scored.
      shown: of how many problems to return a sample.
    """
    rows: list[Row] = []
    for begin in range(0, len(prompts), batch):
        part = list(prompts[begin : begin + batch])
        filled = part + [part[-1]] * (batch - len(part))
        answers = engine.generate(
            [p.tokens for p in filled],
            [settings.samples] * batch,
            seed=seed + SEED_OFFSET,
            step=step,
            temperature=settings.temperature,
            first_item=begin * settings.samples,
        )
        rows += [row_of(p, c, begin + i) for i, (p, cs) in enumerate(zip(part, answers)) for c in cs]
    reward_rows(rows, task.rewards, decode, score)
    return Evaluation(summarize(rows, task, settings.k), from_rows(rows[:: settings.samples], None, decode, shown))


def run(settings: config.Config, path: str | None = None) -> dict[str, float]:
    """Evaluate a model on the config's task and print the result: the Hugging Face directory `path`, else what the run
    in `run.dir` exported, else `model.path`.

    Raises ValueError when there is none of them, or no held-out problem.
    """
    from jaxrl_llm.training import parts, phases  # phases evaluates with this module

    chosen = model_directory(settings, path)
    settings = settings.model_copy(update={"model": settings.model.model_copy(update={"path": chosen, "spec": None})})
    made, params = parts.make(settings)
    with made.scorer:
        if not made.held_out:
            raise ValueError(f"eval.size={settings.eval.size}: no held-out problem, expected at least one")
        found = phases.held_out(made, params, 0)
    if not processes.lead():
        return found.metrics
    for sample in found.samples[:3]:
        print(f"{sample.prompt!r} -> {sample.completion!r}  reward {sample.reward}")
    print(f"{chosen}:")
    for name, value in found.metrics.items():
        print(f"  {name:28} {value:.4f}")
    return found.metrics


def model_directory(settings: config.Config, path: str | None) -> str:
    """The Hugging Face directory a command on a config or run means. Raises ValueError when there is none."""
    exported = Path(settings.run.dir) / "export"
    if path is not None:
        return path
    # Of several hosts perhaps only the first has the run directory; none may then take another model.
    if processes.from_lead(exported.is_dir, f"whether there is {exported}"):
        return str(exported)
    if settings.model.path is not None:
        return settings.model.path
    raise ValueError(
        f"run.dir={settings.run.dir}: no export there and no model.path, expected a finished run or --model"
    )
