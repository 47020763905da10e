"""LOOP, arXiv 2502.01600: its known answers, what it drops, and its own loop of updates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import credit_of, loss_and_grad, rollouts

from jaxrl_llm import algorithms
from jaxrl_llm.algorithms import loop
from jaxrl_llm.objectives import ratios
from jaxrl_llm.types import Mean, Views

KEY = jax.random.key(0)
MASK = np.array([[1, 1, 0, 1], [1, 0, 1, 1], [1, 1, 0, 1]], bool)
OLD = np.array([[-1, -0.5, -9, -0.4], [-0.3, -9, -0.8, -0.2], [-0.6, -0.1, -9, -0.9]])
LOGP = OLD + np.array([[0.05, 0.2, 4, -0.1], [0.3, 4, 0, -0.2], [-0.05, -0.3, 4, 0.1]])
RETURN, GROUP = [1, 0.5, 0, 0.25, 0.25], [0, 0, 0, 1, 1]

pytestmark = pytest.mark.usefixtures("x64")


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=6e-9)


def advantage(reward=RETURN, group=GROUP, **fields):
    rows = rollouts(np.ones((len(reward), 1)), reward, group)
    alg = algorithms.make("loop", **fields)
    return np.asarray(alg.credit((), rows, KEY).score)


def result(**fields):
    rows = rollouts(MASK, old_logp=OLD)
    alg = algorithms.make("loop", **{"minibatch": 4, **fields})
    return loss_and_grad(alg, rows, LOGP, credit_of([0.75, 0, -0.75], rows))


def test_advantages():
    close(advantage(), [0.75, 0, -0.75, 0, 0])
    close(advantage(std=True), [1.83711731, 0, -1.83711731, 0, 0])
    close(advantage(baseline="mean"), [0.5, 0, -0.5, 0, 0])
    close(advantage([3.0], [0]), [0])


def kept(a, counted=None, threshold=0.01, workers=1, positive_only=False):
    a = np.asarray(a, float)
    counted = np.ones(len(a), bool) if counted is None else np.asarray(counted, bool)
    return np.flatnonzero(loop.keep_rows(a, counted, threshold, workers, positive_only)).tolist()


def test_rows_without_advantage_are_dropped():
    assert kept([0.75, 0, -0.75, 0, 0]) == [0, 2]
    assert kept([0.75, 0, -0.75, 0.001, 0], workers=3) == [0, 2, 3]
    assert kept([0, 0, 0.001], workers=2) == [0, 2]  # one for each worker, with nothing to learn
    assert kept([0.75, 0, -0.75], positive_only=True) == [0]
    assert kept([0.75, 0, -0.75], [False, True, True]) == [2]
    assert kept([0.5, -0.5], [False, False]) == []


def test_dropped_rows_are_padding():
    rows = rollouts(np.ones((5, 1)), RETURN, GROUP)
    alg = algorithms.make("loop")
    chosen = alg.select((), {}, rows, alg.credit((), rows, KEY), KEY)
    assert np.asarray(chosen.rows.counted).tolist() == [True, False, True, False, False]


@pytest.mark.parametrize(
    ("fields", "value", "grad"),
    [
        (
            {},
            -0.00566358,
            [[-0.06570444, 0, 0, -0.05655234], [0] * 4, [0.05945184, 0, 0, 0.06907318]],
        ),
        ({"ratio": "turn"}, 0.00088354, [[0, 0, 0, -0.08482851], [0] * 4, [0, 0, 0, 0.10360977]]),
        ({"ratio": "trajectory"}, -0.03579545, [[0] * 4] * 3),
    ],
)
def test_loss_and_gradient(fields, value, grad):
    got = result(**fields)
    close(got[0], value)
    close(got[1], grad)


def test_the_papers_range_of_ratios():
    close(result(bounds="paper")[0], -0.00623176)


def test_turns_are_runs_of_trained_tokens():
    assert ratios.turns(MASK).tolist() == [[1, 1, 0, 2], [1, 0, 2, 2], [1, 1, 0, 2]]
    close(ratios.turn(LOGP, OLD, MASK)[0], np.exp([0.25, 0.25, 0, -0.1]))


def test_without_a_clip_it_is_reinforce():
    value, grad = result(clipped=False, ratio="trajectory")
    a = np.array([0.75, 0, -0.75])[:, None]
    close(value, -np.sum(np.where(MASK, a * LOGP, 0)) / 12)
    close(grad, np.where(MASK, -a / 12, 0))


def test_strictly_on_policy_with_one_ratio_an_episode_it_is_rloo():
    rows = rollouts(np.ones((5, 3)), RETURN, GROUP, -np.ones((5, 3)))
    ours = loss_and_grad(algorithms.make("loop", minibatch=None, ratio="trajectory"), rows, -np.ones((5, 3)))
    rloo = loss_and_grad(algorithms.make("rloo", beta=0.0), rows, -np.ones((5, 3)))
    for a, b in zip(ours, rloo):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_a_minibatch_that_is_not_full_keeps_its_divisor():
    rows = rollouts(MASK, old_logp=OLD)
    credit = credit_of([0.75, 0, -0.75], rows)
    few, many = (loss_and_grad(algorithms.make("loop", minibatch=n), rows, LOGP, credit) for n in (4, 32))
    for a, b in zip(few, many):
        np.testing.assert_allclose(a, np.multiply(b, 8), rtol=1e-12)


class Learner:
    """Takes note of the row ids of every step; its log-probs drift by `drift` each."""

    def __init__(self, drift=0.0):
        self.drift, self.steps = drift, []

    def views(self, rows, names):
        return Views(logp=rows.old_logp + self.drift * len(self.steps))

    def step(self, state, rows, credit, current=None):
        assert current is not None and len(rows.group) == 2
        self.steps.append(np.asarray(rows.row_id)[np.asarray(rows.counted)].tolist())
        return state, {"loss": Mean(jnp.ones(()), jnp.ones(()))}


def run(learner, **fields):
    rows = rollouts(np.ones((5, 3)), RETURN, GROUP)
    alg = algorithms.make("loop", minibatch=2, **fields)
    return alg.update(learner, (), rows, alg.credit((), rows, KEY), KEY)[1]


def test_every_epoch_trains_every_row_once_in_another_order():
    learner = Learner()
    report = run(learner)
    assert report.updates == 6 and float(report.metrics["loss"].count) == 6
    first, second = ([row for step in part for row in step] for part in (learner.steps[:3], learner.steps[3:]))
    assert sorted(first) == sorted(second) == [0, 1, 2, 3, 4] and first != second
    assert [len(step) for step in learner.steps] == [2, 2, 1, 2, 2, 1]


def test_a_policy_that_drifted_too_far_is_not_updated_again():
    assert run(Learner(drift=-5.0)).updates == 2  # 3 tokens, 5 nats each: 15 after one update, 30 after two


def test_the_straggler_rule():
    assert loop.enough([6, 5, 6, 5], 6)
    assert not loop.enough([6, 6, 6, 3], 6)
    assert not loop.enough([6, 6, 6, 6, 6, 6, 6, 3], 6)  # 45 of 48 are there, but one task lacks a fourth episode


def test_the_return_of_an_episode():
    assert loop.episode_return(3, 4) == 0.75
    assert loop.episode_return(3, 4, sparse=True) == 0
    assert loop.episode_return(4, 4, 2, 1, execution_penalty=0.1, code_penalty=0.3) == pytest.approx(0.5)
    assert loop.episode_return(1, 4, 9, execution_penalty=0.1) == 0


@pytest.mark.parametrize("fields", [{"clip": 1.0}, {"minibatch": 0}, {"ratio": "step"}, {"workers": 0}])
def test_bad_settings_raise_one_clear_line(fields):
    with pytest.raises(ValueError, match=r"^algorithm\.\w+=.*: expected [^\n]*$"):
        algorithms.make("loop", **fields)
