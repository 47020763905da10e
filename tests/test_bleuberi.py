"""BLEUBERI, arXiv 2505.11080: the NMT script's BLEU as a reward, hard problems, and the loss."""

import jax
import numpy as np
import pytest
from arrays import loss_and_grad, rollouts

from jaxrl_llm import algorithms
from jaxrl_llm.tasks import bleu, rewards

REFERENCES = ["the cat sat on the mat .", "a cat was sitting on the red mat ."]
KEY = jax.random.key(0)


def test_words_of_mteval_13a():
    words = ["Hello", ",", "world", "!", "It", "costs", "$", "3.50", "(", "twenty-one", "7", "-", "8", ")", "."]
    assert bleu.tokenize_13a("Hello, world! It costs $3.50 (twenty-one 7-8).") == words
    assert bleu.tokenize_13a("it's &quot;a&lt;b&quot; so-\ncalled\n1,000, <skipped>") == [
        *("it's", '"', "a", "<", "b", '"', "socalled", "1,000", ","),
    ]


@pytest.mark.parametrize(
    ("text", "score", "precisions", "brevity"),
    [
        ("the cat sat on the mat .", 1.0, [1.0, 1.0, 1.0, 1.0], 1.0),
        ("the cat sat on a mat", 0.56607645, [1.0, 0.666667, 0.6, 0.5], 0.846482),
        ("the cat", 0.08208500, [1.0, 1.0, 1.0, 1.0], 0.082085),
        ("cat", 0.00247875, [1.0, 1.0, 1.0, 1.0], 0.002479),
        ("dogs bark", 0.05244764, [0.333333, 0.5, 1.0, 1.0], 0.082085),
        (
            "the cat sat on the mat . the cat sat on the mat .",
            0.47587331,
            [0.533333, 0.5, 0.461538, 0.416667],
            1.0,
        ),
        ("<think>hm</think><answer>the cat sat</answer>", 0.26359714, [1.0] * 4, 0.263597),
        ("", 0.0, [0.0] * 4, 0.0),
    ],
)
def test_the_known_answers(text, score, precisions, brevity):
    got = bleu.bleu(bleu.answer_of(text), REFERENCES)
    np.testing.assert_allclose(got.score, score, atol=5e-9)
    np.testing.assert_allclose(got.precisions, precisions, atol=5e-7)
    np.testing.assert_allclose(got.brevity, brevity, atol=5e-7)
    assert rewards.resolve("bleu")(text, {"references": REFERENCES}) == got.score


@pytest.mark.parametrize("text", ["<answer></answer>", "   ", "<answer> </answer> the cat"])
def test_an_empty_answer_has_no_reward(text):
    assert rewards.resolve("bleu")(text, {"references": REFERENCES}) == 0


def test_an_answer_ends_at_the_next_tag_or_the_end():
    assert bleu.answer_of("x <answer> a b ") == "a b"
    assert bleu.answer_of("<answer>a<answer>b</answer>") == "a"
    assert bleu.answer_of(" plain ") == "plain"


def test_references_come_from_a_field_or_are_the_answer():
    same = rewards.resolve("bleu")("a b", {"answer": "a b c"})
    assert same == rewards.resolve("bleu", {"field": "texts"})("a b", {"texts": "a b c"}) > 0
    with pytest.raises(ValueError, match="no references"):
        rewards.resolve("bleu")("a", {"references": []})


def test_more_references_never_lower_a_match_but_for_brevity():
    one, two = (bleu.bleu("a cat sat on the mat", REFERENCES[:n]).precisions for n in (1, 2))
    assert all(b >= a for a, b in zip(one, two)) and two[0] > one[0]


def test_problems_are_chosen_by_the_base_models_bleu():
    scores = [0.3, 0.1, 0.9, 0.1]
    assert bleu.select(scores, 2) == [1, 3]
    assert bleu.select(scores, 2, "easy") == [0, 2]
    assert bleu.select([0.1, 0.2, 0.3, 0.4], 2, "medium") == [1, 2]
    assert bleu.select(scores, 3, "random") == bleu.select(scores, 3, "random") and len(bleu.select(scores, 3)) == 3
    with pytest.raises(ValueError, match="n=5: expected 1 to the 4 problems"):
        bleu.select(scores, 5)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<think>a</think><answer>b</answer>", 1),
        ("<think>a\n</think>\n<answer>b</answer>\n", 1),
        ("<answer>b</answer>", 0),
        ("<think>a</think><answer>b</answer> and", 0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0),
    ],
)
def test_the_reward_of_tags(text, score):
    assert rewards.resolve("answer_format")(text, {}) == score


MASK = [[1, 1], [1, 1], [1, 0], [1, 1], [1, 0], [1, 1]]
LOGP = [[-0.9, -0.2], [-0.9, -1.1], [-2.0, -0.3], [-0.4, -0.9], [-1.0, -0.2], [-0.8, -0.4]]
OLD = [[-1.0, -0.5], [-0.7, -1.1], [-2.0, -0.4], [-0.6, -0.8], [-1.0, -0.2], [-0.5, -0.5]]
REF = [[-0.95, -0.45], [-0.65, -1.05], [-1.95, -0.35], [-0.55, -0.75], [-0.95, -0.15], [-0.45, -0.45]]


def test_advantages_and_loss(x64):
    rows = rollouts(MASK, [0.9, 0.2, 0.2, 0.5, 0.3, 0.3], [0, 0, 0, 1, 1, 1], OLD, {"ref_logp": REF})
    alg = algorithms.make("bleuberi")
    expected = [1.15441489, -0.57720745, -0.57720745, 1.1537014, -0.5768507, -0.5768507]
    np.testing.assert_allclose(alg.credit((), rows, KEY).advantage[:, 0], expected, atol=6e-9)
    value, grad = loss_and_grad(alg, rows, LOGP)
    np.testing.assert_allclose(value, -0.17802069, atol=6e-9)
    same = loss_and_grad(algorithms.make("grpo", aggregation="token-mean", eps=1e-4, beta=0.04), rows, LOGP)
    np.testing.assert_allclose(grad, same[1], rtol=1e-12)


@pytest.mark.parametrize("fields", [{"beta": -1.0}, {"clip_low": 2.0}])
def test_bad_settings_raise_one_clear_line(fields):
    with pytest.raises(ValueError, match=r"^algorithm\.\w+=.*: expected [^\n]*$"):
        algorithms.make("bleuberi", **fields)
