"""What the phases of a run work with (warm start, evaluation, RL steps), built once from the config."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from jax.sharding import Mesh

from jaxrl_llm import algorithms
from jaxrl_llm.algorithms.base import Algorithm
from jaxrl_llm.compile_cache import return_memory
from jaxrl_llm.config import Config
from jaxrl_llm.models.spec import ModelSpec
from jaxrl_llm.rollout import driver
from jaxrl_llm.rollout.engine import Engine
from jaxrl_llm.rollout.rows import Row
from jaxrl_llm.sharding import processes
from jaxrl_llm.tasks import load as load_task
from jaxrl_llm.tasks.base import Prompt, Record, Task
from jaxrl_llm.tasks.data import Stream, tokenize, without_long_completions
from jaxrl_llm.tasks.text import Text
from jaxrl_llm.tasks.workers import CAUSES, Scorer
from jaxrl_llm.training import build, metrics
from jaxrl_llm.types import Params


@dataclass
class Parts:
    config: Config
    words: Text
    task: Task
    spec: ModelSpec
    mesh: Mesh
    guide: Params | None  # a frozen model that scores rows
    prompts: Stream  # training prompts in the order they are drawn
    held_out: list[Prompt]
    dropped: int  # training prompts over rollout.max_prompt
    scorer: Scorer
    timer: metrics.Timer
    unscored: Counter[str] = field(default_factory=Counter)  # reward parts that could not be computed, by cause
    engines: dict[Any, Engine] = field(default_factory=dict)
    loaded: dict[Any, Params] = field(default_factory=dict)  # the weights each engine holds

    def engine(self, params: Params, version: int, hook: Any = None) -> Engine:
        """The engine compiled with this sampler hook, holding these weights."""
        if hook not in self.engines:
            record = self.config.learner.routing_replay == "rollout"
            self.engines[hook] = build.engine(self.config, self.spec, self.mesh, self.words, hook=hook, record=record)
        if self.loaded.get(hook) is not params:
            self.engines[hook].set_weights(params, version)
            self.loaded[hook] = params
        return self.engines[hook]

    def drop_weights(self) -> None:
        """Leave what engines hold of weights, which is whole over fsdp, to whatever comes after generation."""
        for engine in self.engines.values():
            engine.drop_weights()
        self.loaded.clear()

    def reward(self, rows: Sequence[Row]) -> None:
        """Decode and reward rows in place."""
        driver.reward_rows(rows, self.task.rewards, self.words.decode, self.score)

    def score(self, rows: Sequence[tuple[str, Record]]) -> list[dict[str, float | None]]:
        """Reward parts of (completion, record) rows. Every process scores its share; all get all of them."""
        own = self.scorer.score(rows[processes.share(len(rows))])
        said = processes.gather([own, self.scorer.take_counts()], "rewards")
        for _, counts in said:
            self.unscored.update(counts)
        return [parts for scored, _ in said for parts in scored]

    def take_unscored(self) -> dict[str, int]:
        """Reward parts that could not be computed since the last call, by cause, on all processes together."""
        taken, self.unscored = {cause: self.unscored[cause] for cause in CAUSES}, Counter()
        return taken


def make(config: Config) -> tuple[Parts, Params]:
    """All parts, and the initial parameters. The caller closes `parts.scorer`.

    Raises ValueError in one line for anything the config names that is not there or does not fit.
    """
    return_memory()
    with ThreadPoolExecutor(1) as background:  # transformers loads while problems are generated in a process
        loading = background.submit(build.text, config)
        task = load_task(config.task, config.rewards, config.run.seed, config.rollout.max_new)
        words, mesh = loading.result(), build.mesh(config)
    _check(config, task)
    limit, overlong = config.rollout.max_prompt, config.rollout.overlong
    found = tokenize(task.train, words, limit, overlong)
    prompts, dropped = without_long_completions(found, words, config.rollout.max_new, overlong)
    held_out = tokenize(task.eval[: config.eval.size], words, limit, overlong).prompts
    spec, params = build.model(config, mesh, words)
    parts = Parts(
        config=config,
        words=words,
        task=task,
        spec=spec,
        mesh=mesh,
        guide=build.guide(config, spec, mesh),
        prompts=Stream(prompts, config.run.seed),
        held_out=held_out,
        dropped=dropped,
        scorer=Scorer(task.rewards, config.rewards.workers, config.rewards.timeout, config.rewards.env),
        timer=metrics.Timer(),
    )
    return parts, params


def _check(config: Config, task: Task) -> None:
    """What a config can contradict once the problems are known; ValueError of one line."""
    if config.eval.size > len(task.eval):
        raise ValueError(
            f"eval.size={config.eval.size}: more than the {len(task.eval)} held-out problems of the task, expected at "
            f"most {len(task.eval)}"
        )
    fields = dict(config.algorithm)
    alg = algorithms.make(fields.pop("name"), **fields)
    if alg.needs.given != "none":
        _check_given(alg, task, config.rollout.group_size)
    if alg.needs.pool and (room := getattr(alg.config, alg.needs.pool)) < len(task.train):
        raise ValueError(
            f"algorithm.{alg.needs.pool}={room}: {alg.name} has no room for all problems of the task, expected at least "
            f"{len(task.train)}"
        )


def _check_given(alg: Algorithm, task: Task, room: int) -> None:
    """The completions a method takes from the problems must be there, and fit a group."""
    counts = [len(r["chosen"]) + len(r["rejected"]) if "chosen" in r else 0 for r in task.train]
    bare = [i for i, n in enumerate(counts) if not n]
    if len(bare) == len(counts) or (bare and alg.needs.given == "all"):
        raise ValueError(
            f"task.chosen_field: {alg.name} with these settings trains on given completions, but training problem "
            f"{bare[0] + 1} of {task.name} has none, expected chosen and rejected ones"
        )
    if max(counts) > room:
        raise ValueError(
            f"rollout.group_size={room}: training problem {counts.index(max(counts)) + 1} of {task.name} has more given "
            f"completions, expected at least {max(counts)}"
        )
