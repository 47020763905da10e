"""What surrounds the RL steps of a run: the supervised warm start before, evaluation before, between and after."""

import time

import jax.numpy as jnp

from jaxrl_llm.reporting.progress import Progress
from jaxrl_llm.reporting.writers import Writers
from jaxrl_llm.training import warmstart
from jaxrl_llm.training.checkpoints import Checkpoints
from jaxrl_llm.training.evaluate import Evaluation, evaluate
from jaxrl_llm.training.parts import Parts
from jaxrl_llm.training.rundir import RunDir
from jaxrl_llm.training.signals import Stop
from jaxrl_llm.types import Params

REPORT_EVERY = 50  # supervised steps between reports; a report waits for the device


def warm_start(parts: Parts, params: Params, run: RunDir, stop: Stop, progress: Progress) -> Params | None:
    """Supervised fine-tuning as configured; None when a signal stopped it (its state is saved and resumed)."""
    config, words = parts.config, parts.words
    settings = config.warmstart
    records = [r for r in parts.task.train if r.get("target")]
    pairs = [(words.encode_prompt(r).tolist(), words.encode(r["target"]).tolist()) for r in records]
    data = warmstart.examples(pairs, words.eos_ids[0], config.rollout.max_prompt, config.rollout.max_new)
    state = warmstart.init(settings.optimizer, settings.steps, params)
    spent = 0.0
    with Checkpoints(run.warmstart, keep=1) as checkpoints:
        if not checkpoints.empty():
            _, state, host, _ = checkpoints.restore_latest(state)  # type: ignore[misc]
            spent = host["spent"]
        done = int(state.step)
        progress.phase("warm start", settings.steps, done)
        began = time.monotonic() - spent
        steps = warmstart.run(
            settings,
            parts.spec,
            state,
            data,
            parts.mesh,
            seed=config.run.seed,
            dtype=jnp.dtype(config.model.dtype),
            remat=config.model.remat,
            accuracy=lambda p: held_out(parts, p, 0).metrics["accuracy"],
            spent=spent,
        )
        for state, measured, reached in steps:
            done += 1
            if done % REPORT_EVERY == 0 or done == settings.steps or reached is not None:
                numbers = {"loss": float(measured.loss), "grad_norm": float(measured.grad_norm)}
                progress.step(done, numbers | ({} if reached is None else {"accuracy": reached}))
            due = config.checkpoint.every and done % config.checkpoint.every == 0
            if stop.agree() or due:
                checkpoints.save(done, state, {"spent": time.monotonic() - began}, {}, wait=stop.agreed)
            if stop.agreed:
                progress.note(
                    f"saved step {done} of the warm start in {run.warmstart}; the same command goes on from there"
                )
                return None
    return state.params


def held_out(parts: Parts, params: Params, step: int) -> Evaluation:
    """Evaluate these weights on the held-out problems."""
    config = parts.config
    found = evaluate(
        parts.engine(params, step),
        parts.held_out,
        parts.task,
        parts.score,
        parts.words.decode,
        config.eval,
        seed=config.run.seed,
        step=step,
        batch=min(len(parts.held_out), config.rollout.prompts * config.rollout.group_size // config.eval.samples or 1),
    )
    parts.drop_weights()
    return found


def report_held_out(
    parts: Parts, params: Params, step: int, when: str, writers: Writers, progress: Progress
) -> dict[str, float]:
    """Evaluate, write and show; returns the metrics."""
    progress.activity("evaluate")
    numbers, shown = held_out(parts, params, step)
    writers.scalars(step, {f"eval/{name}": value for name, value in numbers.items()})
    writers.samples(step, shown, "eval")
    line = "  ".join(
        f"{name} {numbers[name]:.3f}" for name in numbers if "@" in name or name in ("accuracy", "reward/mean")
    )
    progress.note(f"held-out {when}: {line}")
    parts.timer.take()  # evaluation is no part of a step's time
    return numbers
