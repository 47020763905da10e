"""AEPO for GUI grounding, arXiv 2508.05731: the known answers of its specification, and what counts as an answer."""

import json

import jax
import numpy as np
import pytest
from arrays import loss_and_grad, rollouts

from jaxrl_llm import algorithms
from jaxrl_llm.tasks import grounding
from jaxrl_llm.tasks.rewards import resolve

BOX = [10, 10, 20, 20]
FENCED = 'Here:\n```json\n[{"point_2d": [3, 4]}, {"point_2d": [12.5, 11]}]\n```'
KEY = jax.random.key(0)


def close(actual, expected, tol=6e-9):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tol)


def answer(*candidates):
    return json.dumps([{"point_2d": list(p)} for p in candidates])


def score(text, spec="grounding", **options):
    return resolve(spec, options)(text, {"box": BOX})


@pytest.mark.parametrize(
    ("candidates", "reward"),
    [
        ([(15, 15)], 2),
        ([(1, 1)], 0),
        ([(15, 15), (1, 1)], 1.70710678),
        ([(1, 1), (15, 15)], 1.5),
        ([(1, 1), (2, 5)], 0.5),
        ([(1, 1), (2, 5), (30, 3), (50, 60)], 0.75),
        ([(1, 1), (2, 5), (10, 20), (50, 60)], 1.28867513),
        ([(15, 15), (16, 16), (17, 17)], -1),
        ([(15, 15), (15, 15), (1, 3)], -1),
        ([(15, 15), (15, 15)], 1.70710678),
        ([], 0),
    ],
)
def test_rewards(candidates, reward):
    close(score(answer(*candidates), think=False), reward)


def test_an_answer_is_the_first_list_behind_a_thought():
    text = f"<think>two candidates</think>{FENCED}"
    assert grounding.points(text) == [(3.0, 4.0), (12.5, 11.0)]
    close(score(text), 1.5)
    assert score(FENCED) == -1
    close(score(FENCED, think=False), 1.5)


@pytest.mark.parametrize(
    "text",
    [
        " <think>a</think>[]",
        "<think> </think>[]",
        "<think>a</think> ",
        "<think>a</think><think>b</think>[]",
        "<think>a[]",
        "<think>a</think>no list",
        "<think>a</think>[1",
        "<think>a</think>[1, 2]",
        '<think>a</think>{"point_2d": [1, 2]}',
        '<think>a</think>[{"point_2d": [1, 2, 3]}]',
        '<think>a</think>[{"point_2d": [1, true]}]',
        '<think>a</think>[{"point_2d": [1, "2"]}]',
        '<think>a</think>[{"point_2d": [1, NaN]}]',
        '<think>a</think>[{"point_2d": [1, 1' + "0" * 400 + "]}]",
        "<think>a</think>" + "[" * 100_000 + "]" * 100_000,
    ],
)
def test_any_other_format_is_a_failure(text):
    assert grounding.points(text) is None
    assert score(text) == -1


def test_weights_do_not_soften_a_failure():
    options = {"think": False, "format_weight": 0.5, "accuracy_weight": 2.0}
    close(score(answer((1, 1), (15, 15)), **options), 1.5)
    assert score("nothing", **options) == -1


def test_nearly_collinear_points_are_not_when_one_side_is_exactly_zero():
    assert not grounding.collinear([(0, 0), (1, 0), (2, 1e-30)])
    assert grounding.collinear([(0, 0), (1, 1), (3, 3 + 1e-12)])


@pytest.mark.parametrize(
    ("measure", "expected"),
    [("num_pred", 2), ("has_correct", 1), ("first_correct", 0), ("only_correct", 0), ("is_collinear", 0)],
)
def test_measures_for_metrics(measure, expected):
    assert score(FENCED, f"grounding:{measure}", think=False) == expected
    assert score("nothing", f"grounding:{measure}", think=False) == 0


def test_one_right_point_and_three_on_a_line_are_measured():
    assert score(answer((15, 15)), "grounding:only_correct", think=False) == 1
    assert score(answer((1, 1), (2, 2), (3, 3)), "grounding:is_collinear", think=False) == 1


def test_an_unknown_measure_or_a_bad_box_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^reward: 'grounding:hits', expected one of reward, num_pred, "):
        resolve("grounding:hits")
    with pytest.raises(ValueError, match=r"^grounding: box=\[3, 0, 1, 1\], expected \[x1, y1, x2, y2\]"):
        resolve("grounding")("[]", {"box": [3, 0, 1, 1]})


def test_advantages_loss_and_gradient(x64):
    mask = [[1, 1], [1, 1], [1, 0], [1, 1]]
    old = [[-0.9, -0.8], [-0.4, -1], [-1, -0.1], [-1.6, -0.2]]
    logp = [[-0.5, -0.5], [-0.5, -1], [-1, -0.2], [-0.2, -0.2]]
    rows = rollouts(mask, [2, 1.5, 0, -1], np.zeros(4), old)
    alg = algorithms.make("aepo_gui")
    close(alg.credit((), rows, KEY).advantage[:, 0], [1.83333333, 1.16666667, -0.83333333, -2.16666667])
    value, grad = loss_and_grad(alg, rows, logp)
    close(value, 0.3194688379, 6e-11)
    close(grad, [[0, -0.35353445], [-0.15080624, -0.16666667], [0.11904762, 0], [0, 0.30952381]])


def test_one_alone_keeps_its_reward_and_a_group_that_agrees_has_no_advantage(x64):
    rows = rollouts(np.ones((3, 1)), [0.5, 2, 2], [0, 1, 1])
    close(algorithms.make("aepo_gui").credit((), rows, KEY).advantage[:, 0], [0.5, 0, 0], 1e-14)
