"""TempSamp-R1, arXiv 2509.18056: shaped advantages of groups that hold the answer, and spans of time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scripted
from arrays import loss_and_grad, rollouts

from jaxrl_llm import algorithms
from jaxrl_llm.algorithms import tempsamp_r1
from jaxrl_llm.tasks import rewards, spans
from jaxrl_llm.tasks.spans import Span
from jaxrl_llm.types import GIVEN

KEY = jax.random.key(0)
REWARD = [0.1, 0.4, 0.75, 1.0]  # the last row is given
MASK = np.array([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1]], bool)
LOGP = np.array([[-1, -0.5, 0], [-0.2, -0.3, -0.7], [-0.9, 0, 0], [-1.4, -0.2, -0.1]])
REF = LOGP + np.array([[0.1, -0.1, 0], [0, 0, 0.2], [0.3, 0, 0], [-0.2, 0, 0]])

pytestmark = pytest.mark.usefixtures("x64")


def batch(reward=REWARD, group=(0, 0, 0, 0), parts=None):
    rows = rollouts(MASK, reward, group, LOGP, {"ref_logp": REF})
    rows = rows.with_(source=jnp.where(jnp.arange(4) == 3, GIVEN, 0))
    return rows if parts is None else rows.with_(reward=jnp.stack([rows.score, jnp.asarray(parts)], 1))


def advantage(mode, rows=None):
    rows = batch() if rows is None else rows
    return np.asarray(algorithms.make("tempsamp_r1", mode=mode).credit((), rows, KEY).advantage[:, 0])


def test_shaping():
    r = jnp.asarray([0, 0.3, 0.5, 0.79, 0.8, 0.9, 1])
    expected = [0.08676373, 0.42245933, 0.59639032, 0.79415104, 0.8, 0.80095310, 0.80182322]
    np.testing.assert_allclose(tempsamp_r1.shape(r, 0.8, 0.01, 1.0), expected, atol=5e-9)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("none", [-1.17209275, -0.41181637, 0.47517274, 1.10873639]),
        ("scale", [-1.25894973, -0.34334993, 0.72484985, 0.87744981]),
        ("anchor", [-0.97310037, -0.05121581, 1.02431618, 1.22917941]),
        ("shape", [-1.32399554, -0.21891945, 0.71386292, 0.82905207]),
    ],
)
def test_advantages(mode, expected):
    np.testing.assert_allclose(advantage(mode), expected, atol=6e-9)


def test_a_format_reward_is_added_after_shaping():
    rows = batch(parts=[0.1, 0, 0.1, 0.1])
    total = tempsamp_r1.shape(jnp.asarray(REWARD), 0.8, 0.01, 1.0) + jnp.asarray([0.1, 0, 0.1, 0.1])
    expected = (total - total.mean()) / (total.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(advantage("shape", rows), expected, rtol=1e-12)


def test_loss_and_gradient():
    value, grad = loss_and_grad(algorithms.make("tempsamp_r1"), batch(), LOGP)
    np.testing.assert_allclose(value, 0.00068241, atol=6e-9)
    expected = [
        [0.16497359, 0.16597526, 0],
        [0.01824329, 0.01824329, 0.01750528],
        [-0.18196432, 0, 0],
        [-0.06848344, -0.06908767, -0.06908767],
    ]
    np.testing.assert_allclose(grad, expected, atol=6e-9)


def test_when_everybody_is_right_nothing_is_learned():
    for mode in ("shape", "none", "anchor"):
        assert not advantage(mode, batch([1.0] * 4)).any()


def test_when_only_the_answer_is_right_it_carries_the_signal():
    a = advantage("shape", batch([0.0, 0, 0, 1]))
    assert a[3] > 0 and a[0] == a[1] == a[2] < 0


def test_a_given_row_without_sampled_ones_has_no_anchor():
    rows = batch().with_(scored=jnp.asarray([False, False, False, True]))
    assert not advantage("anchor", rows).any()


def test_the_answer_is_the_last_row_of_its_group():
    alg = algorithms.make("tempsamp_r1", render="<{answer}>")
    prompts = [scripted.prompt(0, [1], answer="12"), scripted.prompt(1, [2], answer="3")]
    plan = alg.plan(())._replace(group_size=3)
    rows, requests = scripted.collect(plan, prompts, lambda c, i: scripted.completion([c[0], i]), lambda t: 0.25)
    assert list(requests[0].n) == [2, 2]
    assert [(r.group, r.source) for r in rows] == [(0, 0), (0, 0), (0, GIVEN), (1, 0), (1, 0), (1, GIVEN)]
    assert rows[2].tokens.tolist() == [1, 2, scripted.EOS] and rows[2].reward.tolist() == [1]
    assert rows[0].reward.tolist() == [0.25]


def test_a_problem_without_the_field_to_render_is_an_error_of_one_line():
    plan = algorithms.make("tempsamp_r1").plan(())._replace(group_size=2)
    with pytest.raises(ValueError, match=r"^algorithm.render: '{target}' fails with KeyError\('target'\)[^\n]*$"):
        scripted.collect(plan, [scripted.prompt(0, [1])], lambda *_: scripted.completion([1]), lambda _: 0.0)


def test_overlap_of_spans():
    right = Span(10, 20)
    got = [spans.iou(Span(*s), right) for s in [(12, 22), (0, 5), (10, 20)]]
    np.testing.assert_allclose(got, [0.66666667, 0, 1], atol=5e-9)
    assert spans.iou(None, right) == 0 and spans.iou(Span(3, 3), Span(3, 3)) == 0


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("from 1.5 to 20 seconds", (1.5, 20)),
        ("1 to 2, or rather 3s - 4.25s", (3, 4.25)),
        ("12.0, 14", (12, 14)),
        ("never", None),
    ],
)
def test_spans_are_read_from_text(text, span):
    assert spans.parse(text) == span


def test_the_reward_of_a_span():
    reward = rewards.resolve("span_iou", {"answer_pattern": "<answer>(.*?)</answer>"})
    record = {"answer": "10 to 20"}
    assert reward("1 to 2 <answer>12 to 22</answer>", record) == pytest.approx(2 / 3)
    assert reward("12 to 22", record) == 0
    with pytest.raises(ValueError, match="no span"):
        reward("1 to 2", {"answer": "soon"})


@pytest.mark.parametrize("fields", [{"tau": 0.0}, {"a2": 0.0}, {"mode": "soft"}, {"beta": -1.0}])
def test_bad_settings_raise_one_clear_line(fields):
    with pytest.raises(ValueError, match=r"^algorithm\.\w+=.*: expected [^\n]*$"):
        algorithms.make("tempsamp_r1", **fields)
