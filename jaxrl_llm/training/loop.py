"""The online loop: plan, collect, rescore, credit, select, update, observe; with checkpoints, metrics and evaluation.

`train` reads top to bottom as a run; `step` reads as one training step. Randomness is a function of (seed, step), so a
run killed anywhere and resumed from its last checkpoint gives the numbers of one that was not.
"""

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import algorithms
from jaxrl_llm.algorithms.base import Algorithm, Plan, Selection
from jaxrl_llm.compile_cache import quickly
from jaxrl_llm.config import Config
from jaxrl_llm.reporting import samples
from jaxrl_llm.reporting.progress import Progress
from jaxrl_llm.reporting.writers import Writers
from jaxrl_llm.rollout import driver
from jaxrl_llm.rollout.collectors import CollectError
from jaxrl_llm.rollout.rows import Completion, Request, Row, pack
from jaxrl_llm.sharding import processes
from jaxrl_llm.tasks.base import Prompt
from jaxrl_llm.training import ahead, build, metrics, parts, phases
from jaxrl_llm.training.checkpoints import CheckpointError, Checkpoints
from jaxrl_llm.training.learner import Learner, NoGradientError, NonFiniteError
from jaxrl_llm.training.parts import Parts
from jaxrl_llm.training.rundir import RunDir, claim
from jaxrl_llm.training.signals import Stop, stopping
from jaxrl_llm.types import ROUTES, Memory, Params, Rollouts, State, contexts

OnRows = Callable[[int, Sequence[Row]], None]


@dataclass
class Position:
    """Where a run is: everything besides the learner and the prompt order that a checkpoint keeps."""

    step: int
    state: State
    memory: Memory
    before: dict[str, float]  # held-out evaluation before RL


@dataclass
class Training:
    """A method at work: what `step` needs besides the parts of the run."""

    alg: Algorithm
    learner: Learner
    credit: Callable[..., Any]  # alg.credit, compiled
    ahead: Future[None] | None = None  # the update, being compiled
    on_rows: OnRows | None = None
    warned: bool = False  # of groups of one


def train(config: Config, on_rows: OnRows | None = None) -> int:
    """Run or resume what `config` describes in `config.run.dir`. Returns the exit code.

    Stops cleanly on Ctrl-C and SIGTERM: the step under way is finished and saved, and the code is 0. A batch that cannot be
    made ends the run with a message and code 1, the steps before it saved. A loss that stays non-finite or a disk that refuses
    does so too; the last checkpoint is whole.

    Args:
      on_rows: sees, and may change, the rewarded rows of every step before they are packed (control experiments).
    """
    resolved = config.model_dump(mode="json", exclude={"distributed"})  # of this start, not of the run
    with claim(config.run.dir, resolved) as run, stopping() as stop, _progress() as progress:
        progress.note(f"run directory {run.path}")
        made, params = parts.make(config)
        with made.scorer:
            try:
                return _run(made, params, run, stop, progress, on_rows)
            except (CollectError, NonFiniteError, NoGradientError, CheckpointError) as error:
                print(f"jaxrl_llm: stopped: {error}", file=sys.stderr)
                return 1


def _run(made: Parts, params: Params, run: RunDir, stop: Stop, progress: Progress, on_rows: OnRows | None) -> int:
    config = made.config
    fields = {k: v for k, v in config.algorithm.items() if k != "name"}
    alg = algorithms.make(config.algorithm["name"], **fields)
    state = jax.tree.map(jnp.asarray, alg.init())
    with Checkpoints(run.checkpoints, config.checkpoint.keep, config.checkpoint.keep_best) as checkpoints:
        fresh = checkpoints.empty()
        if fresh and run.left:
            raise ValueError(
                f"checkpoint.dir={config.checkpoint.dir}: no checkpoint there, while this run saved to {run.left}; expected "
                "its checkpoints there, or a new run.dir"
            )
        if fresh and config.warmstart.steps:
            warm = phases.warm_start(made, params, run, stop, progress)
            if warm is None:
                return 0
            params = warm
        learner = Learner(config, made.spec, alg, made.mesh)
        learner.init(params, guide=made.guide)
        training = Training(
            alg, learner, jax.jit(alg.credit, compiler_options=quickly(jax.default_backend())), on_rows=on_rows
        )
        training.ahead = compile_ahead(made, training, state)
        if fresh:
            writers = _writers(run)
            before = _held_out(made, training, 0, "before RL", writers, progress)
            at = Position(0, state, {}, before)
            save(made, training, at, checkpoints, writers)
        else:
            at, written = restore(made, training, state, checkpoints)
            progress.note(f"going on after step {at.step}")
            writers = _writers(run, written)
            if writers.elsewhere:
                progress.note(f"metrics and samples up to there were written in another run directory than {run.path}")
        try:
            return _steps(made, training, at, run, writers, checkpoints, stop, progress)
        finally:
            writers.close()


def _steps(
    made: Parts,
    training: Training,
    at: Position,
    run: RunDir,
    writers: Writers,
    checkpoints: Checkpoints,
    stop: Stop,
    progress: Progress,
) -> int:
    config = made.config
    compilations = metrics.Compilations()
    peak = metrics.peak_flops()
    progress.phase("train", config.run.steps, at.step)
    while not stop.agree() and at.step < config.run.steps:
        try:
            numbers, shown = step(made, training, at, progress)
        except CollectError:
            save(made, training, at, checkpoints, writers, wait=True)
            raise
        numbers["recompiles"] = float(compilations.take())
        numbers["mfu"] = metrics.mfu(numbers.pop("flops"), numbers["timing/step"], jax.device_count(), peak)
        numbers |= metrics.memory()
        last = at.step == config.run.steps
        if at.step % config.run.log_every == 0 or last:
            writers.scalars(at.step, numbers)
        if config.run.samples_every and at.step % config.run.samples_every == 0:
            writers.samples(at.step, shown())
        progress.step(at.step, numbers)
        score = None  # held-out accuracy of this very step, for keep_best
        if config.eval.every and at.step % config.eval.every == 0 and not last:
            score = _held_out(made, training, at.step, f"at step {at.step}", writers, progress).get("accuracy")
        if config.checkpoint.every and at.step % config.checkpoint.every == 0 and not last:
            save(made, training, at, checkpoints, writers, score)
    compilations.close()
    if stop.agreed:
        save(made, training, at, checkpoints, writers, wait=True)
        progress.note(f"saved step {at.step} in {run.checkpoints}; the same command goes on from there")
        return 0
    after = _held_out(made, training, at.step, "after RL", writers, progress)
    save(made, training, at, checkpoints, writers, after.get("accuracy"), wait=True)
    if after:
        progress.note(f"held-out accuracy {at.before['accuracy']:.3f} before RL, {after['accuracy']:.3f} after")
    progress.note(f"metrics {run.metrics}\nsamples {run.samples}\ntensorboard --logdir {run.tensorboard}")
    if config.checkpoint.export:
        build.export(run.export, made.spec, training.learner.train.params["policy"], made.words)
        progress.note(f"model {run.export}")
    return 0


def step(
    made: Parts, training: Training, at: Position, progress: Progress
) -> tuple[dict[str, float], Callable[[], list[samples.Sample]]]:
    """One training step; moves `at` on by one. Returns its metrics and a function that makes its samples."""
    config, alg, learner, timer = made.config, training.alg, training.learner, made.timer
    key = jax.random.fold_in(jax.random.key(config.run.seed), at.step)
    plan = alg.plan(at.state)
    plan = plan._replace(
        group_size=plan.group_size or config.rollout.group_size, memory=at.memory, max_prompt=config.rollout.max_prompt
    )

    progress.activity("collect")
    with timer.phase("collect"):
        rows = collect(made, learner.policy, plan, at.step)
        made.drop_weights()
        if training.on_rows:
            training.on_rows(at.step, rows)
        sampled = batch_of(made, alg, plan, rows)
    with timer.phase("rescore"):
        batch = jax.block_until_ready(rescore(learner, alg, plan, sampled, config.learner.old_logp == "rescore"))
    if training.ahead:
        training.ahead.result()
    credit = training.credit(at.state, batch, key)
    chosen = Selection(batch, credit, at.memory)
    if alg.select:
        chosen = alg.select(at.state, at.memory, batch, credit, key)

    progress.activity("update")
    with timer.phase("update"):
        state, report = learner.update(at.state, chosen.rows, chosen.credit, key)
    state, memory = alg.observe(state, chosen.memory, chosen.rows, chosen.credit, report, learner.views)
    at.step, at.state, at.memory = at.step + 1, state, memory
    if config.reference.sync_every and at.step % config.reference.sync_every == 0:
        learner.sync_reference()

    numbers = metrics.of_rows(rows, made.task.rewards, made.task.correct_at)
    # Groups that are small by configuration have been warned of by `config_check`.
    left_alone = plan.group_size >= alg.needs.min_group > 1 and numbers["groups_of_one"]
    if left_alone and not training.warned:
        training.warned = True
        warnings.warn(
            f"{alg.name}: groups with a single scored completion have nothing to be compared with", stacklevel=2
        )
    numbers |= metrics.of_batch(batch, credit.advantage, rescored=config.learner.old_logp == "rescore")
    numbers |= metrics.values(report.metrics)  # a method's exact entropy replaces the estimate
    numbers |= {f"unscored/{cause}": float(n) for cause, n in made.take_unscored().items()}
    numbers |= {"updates": float(report.updates), "dropped_prompts": float(made.dropped), "epoch": made.prompts.epoch}
    numbers |= timer.take()
    numbers |= metrics.throughput(rows, numbers)
    lengths = [len(r.context) + len(r.tokens) for r in rows]
    numbers["flops"] = metrics.training_flops(made.spec, learner.parameters, lengths) * config.learner.epochs
    return numbers, lambda: samples.from_rows(rows, np.asarray(credit.advantage), _shown(made), plan.group_size)


def collect(made: Parts, policy: Callable[[str], Params], plan: Plan, step: int) -> list[Row]:
    """Rows of a step: prompts drawn, completions sampled by the policies asked for (by name), rewards given."""
    config, timer = made.config, made.timer
    sampled = 0

    def sample(ask: Request) -> list[list[Completion]]:
        nonlocal sampled
        first, sampled = sampled, sampled + sum(ask.n)
        temperature = plan.temperature if ask.temperature is None else ask.temperature
        with timer.phase("generate"):
            return made.engine(policy(ask.policy), step, plan.hook).generate(
                ask.contexts,
                ask.n,
                seed=config.run.seed,
                step=step,
                first_item=first,
                temperature=None if temperature is None else float(temperature),
                max_new=ask.max_new,
                hook_state=plan.hook_state,
            )

    def score(rows: Sequence[Row]) -> None:
        with timer.phase("score"):
            made.reward(rows)

    def draw(n: int) -> list[Prompt]:
        if plan.prompt_weights is None:
            return made.prompts.draw(n)
        return made.prompts.draw_weighted(n, np.asarray(plan.prompt_weights))

    def encode(texts: Sequence[str]) -> list[np.ndarray]:
        end = np.array(made.words.eos_ids[:1], np.int32)
        return [np.concatenate([made.words.encode(text), end]) for text in texts]

    prompts = draw(config.rollout.prompts)
    return driver.collect(plan, prompts, sample=sample, score=score, draw=draw, encode=encode)


def compile_ahead(made: Parts, training: Training, state: State) -> Future[None] | None:
    """Have the update compiled for the longest batch the first step may yield, while other things begin."""
    alg, rollout = training.alg, made.config.rollout
    plan = alg.plan(state)
    prompts = made.prompts.longest(rollout.prompts)
    rows = ahead.likely_rows(alg, plan.group_size or rollout.group_size, prompts, rollout.max_new)
    return ahead.start(training.learner, state, training.credit, batch_of(made, alg, plan, rows))


def batch_of(made: Parts, alg: Algorithm, plan: Plan, rows: Sequence[Row]) -> Rollouts:
    """The rows as arrays of the shapes every step has."""
    rollout = made.config.rollout
    prompts, group_size = rollout.prompts, plan.group_size or rollout.group_size
    contexts, size = plan.capacity(prompts, group_size) if plan.capacity else (prompts, prompts * group_size)
    return pack(
        rows,
        contexts=contexts,
        prompt_len=rollout.max_prompt,
        size=size,
        length=rollout.max_new,
        parts=len(made.task.rewards),
        extras=alg.needs.row_extras,
        routes=None if made.config.learner.routing_replay == "none" else made.spec.routes,
    )


def rescore(learner: Learner, alg: Algorithm, plan: Plan, batch: Rollouts, old_logp: bool) -> Rollouts:
    """Add what `credit` and `loss` need of frozen policies: old_logp, each "<policy>_<view>" the method asked for, and the
    experts that updates will replay."""
    asked: dict[str, list[str]] = {"old": ["logp"] if old_logp else []}
    record = learner.config.learner.routing_replay == "old"
    asked["old"] += [ROUTES] if record else []
    for name in alg.needs.rescore if plan.rescore is None else plan.rescore:
        policy, view = name.split("_", 1)
        asked.setdefault(policy, []).append(view)
    seen = {}
    for policy, names in asked.items():
        of = "policy" if policy == "old" else policy
        if "prompt_logp" in names:
            names.remove("prompt_logp")
            next_token = learner.views(contexts(batch), ("logp",), of).logp
            seen[f"{policy}_prompt_logp"] = jnp.pad(next_token[:, :-1], ((0, 0), (1, 0)))[batch.prompt]
        if names:
            views = learner.views(batch, tuple(names), of, plan.score_temperature)
            said = {**vars(views), **views.extras}  # plug-in scorers name their views themselves
            seen |= {f"{policy}_{name}": said[name] for name in names}
    if old_logp:
        batch = batch.with_(old_logp=seen.pop("old_logp"))
    if record:
        seen[ROUTES] = seen.pop(f"old_{ROUTES}")
    return batch.with_(extras=seen)


def save(
    made: Parts,
    training: Training,
    at: Position,
    checkpoints: Checkpoints,
    writers: Writers,
    score: float | None = None,
    wait: bool = False,
) -> None:
    """Checkpoint everything a resumed run needs."""
    tree = {"train": training.learner.train, "state": jax.tree.map(jnp.asarray, at.state)}
    host = {"prompts": made.prompts.state(), "written": writers.position(), "before": at.before}
    checkpoints.save(at.step, tree, host, at.memory, score=score, wait=wait)


def restore(made: Parts, training: Training, state: State, checkpoints: Checkpoints) -> tuple[Position, dict[str, Any]]:
    """The newest checkpoint: learner and prompt order as they were; also how much of the metrics it had written."""
    found = checkpoints.restore_latest({"train": training.learner.train, "state": state})
    assert found is not None  # the caller saw a step
    step, tree, host, memory = found
    training.learner.load(tree["train"])
    made.prompts.restore(host["prompts"])
    return Position(step, tree["state"], memory, host["before"]), host["written"]


def _progress() -> Progress:
    """What people see of the run; of several processes the first shows it."""
    return Progress(None if processes.lead() else open(os.devnull, "w"))


def _writers(run: RunDir, position: dict[str, Any] | None = None) -> Writers:
    return Writers(run.path if processes.lead() else None, position, run.born)


def _held_out(
    made: Parts, training: Training, step: int, when: str, writers: Writers, progress: Progress
) -> dict[str, float]:
    if not made.held_out:
        return {}
    return phases.report_held_out(made, training.learner.train.params["policy"], step, when, writers, progress)


def _shown(made: Parts) -> Callable[[Sequence[int]], str]:
    return lambda tokens: made.words.decode(tokens, special=True)
