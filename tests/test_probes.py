"""The probes in the real loop, tiny: methods with a collector, a selection or an update of their own need no branch in it.

What the loop's own suite can run with flat rows (`hapo`, `dpo`, `spo_single`) is tested there.
"""

import numpy as np
from test_loop import configured, metrics_of

from jaxrl_llm import algorithms
from jaxrl_llm.algorithms.base import Plan
from jaxrl_llm.rollout.collectors import row_of
from jaxrl_llm.rollout.rows import Request, Score
from jaxrl_llm.training import loop

SECTIONS = {"run": {"steps": 2}, "eval": {"size": 0}, "learner": {"epochs": 1, "minibatches": 1}}


def lines_of(directory):
    return [line for line in metrics_of(directory) if "loss" in line]


def test_serial_groups_train_in_the_loop(tmp_path):
    config = configured(
        tmp_path,
        **SECTIONS,
        rollout={"prompts": 3, "group_size": 3, "max_prompt": 16, "max_new": 10},
        algorithm={"name": "s_grpo", "exits": 2, "marker": [15], "inducer": [15], "path_tokens": 6, "answer_tokens": 3},
    )

    def some_correct(step, rows):
        for row in rows:
            row.reward[:] = float(row.extras["exit_order"] == 2)

    assert loop.train(config, on_rows=some_correct) == 0
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["grad_norm"] > 0 for line in lines)
    # Two exits and the full path of three prompts; the inducer was not sampled and is in no comparison of log-probs.
    assert lines[0]["sampling/logp_difference_max"] < 1e-4


def test_substituted_rows_train_in_the_loop(tmp_path):
    config = configured(tmp_path, **SECTIONS, algorithm={"name": "aepo_entropy", "sample_num": 2, "h0": 5.0})

    def every_second(step, rows):
        for i, row in enumerate(rows):
            row.reward[:] = i % 2

    assert loop.train(config, on_rows=every_second) == 0
    lines = lines_of(tmp_path)
    assert all(np.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    assert [line["substituted"] for line in lines] == [2 / 16] * 2  # two of sixteen rows, out of four extra ones


def two_turns(plan, prompts):
    """Every trajectory asks the policy twice; the second turn sees the first, and `=` in between."""
    group_size = plan.group_size
    first = yield Request([p.tokens for p in prompts], [group_size] * len(prompts))
    flat = [(g, p, c) for g, (p, cs) in enumerate(zip(prompts, first)) for c in cs]
    contexts = [np.concatenate([p.tokens, c.tokens, [15]]).astype(np.int32) for _, p, c in flat]
    second = yield Request(contexts, [1] * len(contexts))
    rows = []
    for traj, ((g, p, c), context, (d,)) in enumerate(zip(flat, contexts, second)):
        one, two = row_of(p, c, g, traj=traj, turn=0), row_of(p, d, g, traj=traj, turn=1)
        two.context = context
        rows += [one, two]
    yield Score(rows)
    for one, two in zip(rows[::2], rows[1::2]):  # the outcome of a trajectory is the reward of all its turns
        one.reward = two.reward = np.array([np.mean(np.append(one.tokens, two.tokens) == 4)], np.float32)
    return rows


def test_turns_of_trajectories_train_in_the_loop(tmp_path, monkeypatch):
    plan = Plan(collector=two_turns, capacity=lambda prompts, size: (prompts * (1 + size), 2 * prompts * size))
    method = algorithms.make("seeupo")._replace(plan=lambda state: plan)
    monkeypatch.setattr(algorithms, "make", lambda *_, **__: method)
    config = configured(
        tmp_path,
        **SECTIONS,
        rollout={"prompts": 4, "group_size": 4, "max_prompt": 16, "max_new": 4},
        algorithm={"name": "seeupo"},
        reference={"mode": "resident"},
    )
    assert loop.train(config) == 0
    lines = lines_of(tmp_path)
    assert [line["updates"] for line in lines] == [2, 2]
    assert all(line["grad_norm"] > 0 and np.isfinite(line["loss"]) for line in lines)
    assert lines[0]["sampling/logp_difference_max"] < 1e-4
