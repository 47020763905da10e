"""The four measurements of `jaxrl_llm bench`: rollout, log-probs, train step, whole RL step. All run the training loop's own parts."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import algorithms
from jaxrl_llm.algorithms.base import Plan, Selection
from jaxrl_llm.benching import clocks
from jaxrl_llm.benching.clocks import Peaks, Programs, Timed, spread, timed
from jaxrl_llm.compile_cache import quickly
from jaxrl_llm.models.spec import ModelSpec
from jaxrl_llm.reporting.progress import Progress
from jaxrl_llm.rollout.collectors import row_of
from jaxrl_llm.rollout.rows import STOP_LENGTH, Completion, Row
from jaxrl_llm.training import loop, metrics
from jaxrl_llm.training.learner import Learner
from jaxrl_llm.training.parts import Parts
from jaxrl_llm.types import Params

Result = dict[str, Any]


class Subject:
    """What is measured: the parts of a run, and a learner made when one is first needed.

    Args:
      stop_rate: share of tokens that end a completion, for rows made up rather than sampled; 0: all have `rollout.max_new`.
    """

    def __init__(self, made: Parts, params: Params, stop_rate: float = 0.0):
        self.made, self.stop_rate, self._params = made, stop_rate, params
        fields = {k: v for k, v in made.config.algorithm.items() if k != "name"}
        self.alg = algorithms.make(made.config.algorithm["name"], **fields)

    @cached_property
    def training(self) -> loop.Training:
        learner = Learner(self.made.config, self.made.spec, self.alg, self.made.mesh)
        learner.init(self._params)
        self._params = None
        return loop.Training(
            self.alg, learner, jax.jit(self.alg.credit, compiler_options=quickly(jax.default_backend()))
        )

    @property
    def params(self) -> Params:
        """The policy's parameters, now."""
        return self.training.learner.train.params["policy"] if self._params is None else self._params

    @cached_property
    def state(self) -> Any:
        return jax.tree.map(jnp.asarray, self.alg.init())

    @property
    def plan(self) -> Plan:
        plan = self.alg.plan(self.state)
        return plan._replace(group_size=plan.group_size or self.made.config.rollout.group_size)

    def rows(self) -> list[Row]:
        """A step's rows with random tokens, rewards and lengths, which cost no generation."""
        rollout, rng = self.made.config.rollout, np.random.default_rng(self.made.config.run.seed)
        rows = []
        for group, prompt in enumerate(self.made.prompts.draw(rollout.prompts)):
            for _ in range(self.plan.group_size):
                n = min(rng.geometric(self.stop_rate), rollout.max_new) if self.stop_rate else rollout.max_new
                tokens = rng.integers(0, self.made.spec.vocab, n, dtype=np.int32)
                logp = np.full(n, -np.log(self.made.spec.vocab), np.float32)
                row = row_of(prompt, Completion(tokens, logp, logp, STOP_LENGTH, 0), group)
                row.reward = rng.random(len(self.made.task.rewards), np.float32)
                rows.append(row)
        return rows


def rollout(subject: Subject, repeats: int, programs: Programs) -> Result:
    """Generation of one step's completions, weights handed to the engine each time as training does.

    `decode` is what a decode step takes: the difference between whole rollouts and ones of a single new token, which hold
    the prefill and what the host does. `decode_bytes` is the least its steps must read: weights once a step, keys and values
    of every live row; `decode_bytes_shared` counts the context of rows that share one only once.
    """
    made, config = subject.made, subject.made.config
    prompts = made.prompts.draw(config.rollout.prompts)
    plan = subject.plan
    contexts, n = [p.tokens for p in prompts], [plan.group_size] * len(prompts)

    def sample(step: int, max_new: int | None = None) -> tuple[Timed, list[int], dict[str, Any]]:
        made.drop_weights()

        def call() -> Any:
            engine = made.engine(subject.params, step, plan.hook)
            return engine.generate(contexts, n, seed=config.run.seed, step=step, max_new=max_new)

        run = timed(call)
        return run, [len(c.tokens) for group in run.value for c in group], made.engines[plan.hook].stats

    first = sample(0)[0].seconds
    compiled = programs.take()
    sample(1, 1)
    whole = [sample(2 + i) for i in range(repeats)]
    short = [sample(2 + i, 1) for i in range(repeats)]
    again = programs.take()
    itemsize = made.engines[plan.hook].dtype.itemsize
    quick, quick_steps = min(run.seconds for run, _, _ in short), short[0][2]["steps"]
    steps = [stats["steps"] - quick_steps for _, _, stats in whole]
    decode = [run.seconds - quick for run, _, _ in whole]
    lengths = [np.array(lengths).reshape(len(contexts), -1) for _, lengths, _ in whole]
    read, shared = zip(*(decode_bytes(made.spec, itemsize, contexts, l, s) for l, s in zip(lengths, steps)))
    return {
        "rows": len(contexts) * plan.group_size,
        "tokens": spread([int(l.sum()) for l in lengths]),
        "tokens_per_s": spread([l.sum() / run.seconds for l, (run, _, _) in zip(lengths, whole)]),
        "seconds": spread([run.seconds for run, _, _ in whole]),
        "cpu_s": spread([run.cpu for run, _, _ in whole]),
        "prefill_and_one_token_s": spread([run.seconds for run, _, _ in short]),
        "decode_steps": spread(steps),
        "decode_step_ms": spread([1e3 * d / max(s, 1) for d, s in zip(decode, steps)]),
        "decode_bytes": spread(read),
        "decode_bytes_shared": spread(shared),
        "decode_bandwidth": spread([r / d for r, d in zip(read, decode)]),
        "decode_bandwidth_shared": spread([r / d for r, d in zip(shared, decode)]),
        "slot_utilisation": spread([stats["slot_utilisation"] for _, _, stats in whole]),
        "first_s": first,
        "programs": compiled,
        "recompiles": again["count"],
    }


def decode_bytes(
    spec: ModelSpec, itemsize: int, contexts: Sequence[np.ndarray], lengths: np.ndarray, steps: int
) -> tuple[int, int]:
    """The least that decode steps must read after every row's first token, contexts read by each row or shared by a group.

    Args:
      lengths: [contexts, rows of each] completion lengths.
    """
    group = lengths.shape[1]
    rows = [len(c) for c in contexts for _ in range(group)]
    read = steps * clocks.weight_bytes(spec, itemsize) + clocks.kv_bytes(spec, itemsize, rows, lengths.ravel(), skip=1)
    token = clocks.kv_bytes(spec, itemsize, [1], [1])
    # Rows of a group read their context together for as long as the longest of them lives.
    spared = sum(len(c) * int((n - 1).sum() - (n.max() - 1)) for c, n in zip(contexts, lengths))
    return read, read - spared * token


def learner_parts(subject: Subject, what: Sequence[str], repeats: int, programs: Programs) -> dict[str, Result]:
    """`logprob`: the views verb for log-probs alone; `train`: `Learner.update` on one batch, optimizer included.

    Tokens are those of contexts and completions, counted for every row. FLOPs are those of the model on these tokens: a
    third of the training formula for log-probs; what is recomputed, padded or shared changes the time, not them.
    """
    made, training, plan = subject.made, subject.training, subject.plan
    learner, config, key = training.learner, made.config, jax.random.key(made.config.run.seed)
    rows = subject.rows()
    batch = loop.batch_of(made, subject.alg, plan, rows)
    lengths = [len(r.context) + len(r.tokens) for r in rows]
    flops = metrics.training_flops(made.spec, learner.parameters, lengths)
    out = {}
    programs.take()
    if "logprob" in what:
        out["logprob"] = _repeat(lambda: learner.views(batch, ("logp",)), repeats, programs, sum(lengths), flops / 3)
    if "train" in what:
        whole = loop.rescore(learner, subject.alg, plan, batch, config.learner.old_logp == "rescore")
        credit = training.credit(subject.state, whole, key)
        chosen = Selection(whole, credit, {})
        if subject.alg.select:
            chosen = subject.alg.select(subject.state, {}, whole, credit, key)

        def update():
            learner.update(subject.state, chosen.rows, chosen.credit, key)
            return learner.train

        epochs = config.learner.epochs
        programs.take()
        out["train"] = _repeat(update, repeats, programs, sum(lengths) * epochs, flops * epochs)
    return out


def _repeat(call: Any, repeats: int, programs: Programs, tokens: int, flops: float) -> Result:
    first = timed(call).seconds
    compiled = programs.take()
    timed(call)  # arrays now have the layout and placement of every later call
    runs = [timed(call) for _ in range(repeats)]
    seconds = [run.seconds for run in runs]
    again = programs.take()
    return {
        "tokens": tokens,
        "flops": flops,
        "tokens_per_s": spread([tokens / s for s in seconds]),
        "flops_per_s": spread([flops / s for s in seconds]),
        "seconds": spread(seconds),
        "cpu_s": spread([run.cpu for run in runs]),
        "first_s": first,
        "programs": compiled,
        "recompiles": again["count"],
    }


def step(subject: Subject, repeats: int, programs: Programs) -> Result:
    """Whole RL steps by `training.loop.step`: collect, rescore, credit, update, metrics; rewards in the config's workers.

    `outside` is the share of a step that is neither generation, rescoring nor update. `start_to_first_update_s` counts from
    the start of the process, imports and compilation included, and means something when nothing else was measured before.
    """
    made, at = subject.made, loop.Position(0, subject.state, {}, {})
    subject.training.ahead = loop.compile_ahead(made, subject.training, at.state)
    with Progress() as progress:
        first = timed(lambda: loop.step(made, subject.training, at, progress)[0])
        start = clocks.process_seconds()
        compiled = programs.take()
        loop.step(made, subject.training, at, progress)
        second = programs.take()
        made.timer.take()
        runs = [timed(lambda: loop.step(made, subject.training, at, progress)[0]) for _ in range(repeats)]
    again = programs.take()
    steps = [run.value for run in runs]
    rows = made.config.rollout.prompts * subject.plan.group_size
    timing = {name: [s[f"timing/{name}"] for s in steps] for name in (*metrics.PHASES, "other", "step")}
    main = ("generate", "rescore", "update")
    kept = [s["completions/mean_length"] * rows for s in steps]
    return {
        "rows": rows,
        "tokens": spread(kept),
        "tokens_per_s": spread([s["tokens_per_second"] for s in steps]),
        "seconds": spread(timing["step"]),
        "cpu_s": spread([run.cpu for run in runs]),
        "phases": {name: spread(values) for name, values in timing.items() if name != "step"},
        "outside": spread([1 - sum(s[f"timing/{m}"] for m in main) / s["timing/step"] for s in steps]),
        "flops": spread([s["flops"] for s in steps]),
        "flops_per_s": spread([s["flops"] / s["timing/step"] for s in steps]),
        "first_s": first.seconds,
        "first_phases": {name: first.value[f"timing/{name}"] for name in (*metrics.PHASES, "other")},
        "start_to_first_update_s": start,
        "programs": compiled,
        "second_step_programs": second["count"],
        "recompiles": again["count"],
    }


def with_peaks(result: Result, peaks: Peaks, devices: int) -> Result:
    """The result with `mfu` (model FLOP/s) and `bandwidth_utilisation` as shares of what all devices can do."""
    shares = {
        "mfu": ("flops_per_s", peaks.flops),
        "bandwidth_utilisation": ("decode_bandwidth", peaks.bandwidth),
        "bandwidth_utilisation_shared": ("decode_bandwidth_shared", peaks.bandwidth),
    }
    more = {}
    for name, (rate, peak) in shares.items():
        if rate in result and peak:
            more[name] = {k: v if k == "n" else v / (devices * peak) for k, v in result[rate].items()}
    return {**result, **more}
