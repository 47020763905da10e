"""How many programs a run compiles while lengths, temperatures and budgets change from step to step."""

import jax
import numpy as np
import tiny
from learning import APART, GROUP, KEY, PROMPTS, SPEC, L, T, credit, learner, rollouts

from jaxrl_llm.rollout.engine import Engine
from jaxrl_llm.sharding.mesh import make_mesh
from jaxrl_llm.training.metrics import Compilations

STEPS = 10


def test_a_run_compiles_a_few_programs_and_then_none():
    params = tiny.params(SPEC)
    engine = Engine(SPEC, make_mesh(), max_prompt=L, max_new=T, slots=4, eos_ids=(1, 2, 3))
    made = learner(learner={"layout": "shared", "old_logp": "sampler"})
    compilations, counts = Compilations(), []
    try:
        for step in [*range(STEPS), *range(STEPS)]:
            rng = np.random.default_rng(step)
            contexts = [tiny.tokens(1, n, seed=step)[0] for n in rng.integers(1, L + 1, PROMPTS)]
            budgets = rng.integers(1, T + 1, PROMPTS)
            engine.set_weights(params, step)
            engine.generate(
                contexts, [GROUP] * PROMPTS, seed=0, step=step, temperature=rng.uniform(0.5, 1.5), max_new=budgets
            )
            rows = rollouts(step)
            longest = rng.integers(1, T + 1)
            length = np.minimum(rows.length, longest)
            rows = rows.with_(length=length, mask=rows.mask & (np.arange(T) < length[:, None]))
            made.update(APART, rows, credit(rows), jax.random.fold_in(KEY, step))
            counts.append(compilations.take())
    finally:
        compilations.close()
    assert sum(counts[:STEPS]) <= 60
    assert counts[STEPS:] == [0] * STEPS, "what was met before compiles nothing"
    assert engine.compilations <= 10
