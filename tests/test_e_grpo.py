"""E-GRPO, arXiv 2510.24694: the known answers of its specification, in float64, and its reward part."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import loss_and_grad, rollouts

from jaxrl_llm import algorithms
from jaxrl_llm.tasks.rewards import resolve
from jaxrl_llm.tasks.transcripts import match_rate

ENTITIES = ["Leonardo", "Titanic"]
TRANSCRIPTS = [
    "<think>Leonardo won; the film is Titanic</think><answer>James Cameron</answer>",
    "<think>maybe Leonardo</think><tool_response>Titanic ...</tool_response><answer>Gus Van Sant</answer>",
    "<think>no idea</think><answer>Baz</answer>",
    "<think>Leonardo and Titanic",
]
LOGP = [[-0.9, -0.2, -0.2], [-1.1, -1.1, -0.3], [-1.7, -0.7, -0.1], [-0.4, -0.9, -0.05]]
OLD = [[-1.0, -0.5, -0.2], [-0.7, -1.1, -0.4], [-2.0, -0.4, -0.3], [-0.6, -0.8, -0.1]]
MASK = np.array([[1, 0, 1], [1, 1, 1], [1, 1, 0], [1, 1, 1]], bool)
KEY = jax.random.key(0)

pytestmark = pytest.mark.usefixtures("x64")


def close(actual, expected, tol=6e-9):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tol)


def batch(correct=(1, 0, 0, 0), match=(1.0, 0.5, 0, 0), overlong=(0, 0, 0, 1), group=(0, 0, 0, 0), more=()):
    parts = jnp.stack([jnp.array(x, float) for x in (correct, match, *more)], -1)
    return rollouts(MASK, group=group, old_logp=OLD).with_(reward=parts, truncated=jnp.array(overlong, bool))


def credit(rows, **fields):
    return algorithms.make("e_grpo", **fields).credit((), rows, KEY)


def test_only_thoughts_count_for_the_match_rate():
    assert [match_rate(text, ENTITIES) for text in TRANSCRIPTS] == [1.0, 0.5, 0.0, 0.0]
    assert match_rate("<think>leonardo</think>", ENTITIES) == 0.0
    assert match_rate("<think>a\nLeonardo</think>..<think>Titanic</think>", ENTITIES) == 1.0
    assert match_rate(TRANSCRIPTS[0], []) == 0.0


def test_the_match_rate_is_a_reward_part():
    reward = resolve("entities")
    assert reward(TRANSCRIPTS[1], {"entities": ENTITIES}) == 0.5
    assert resolve("entities", {"field": "gold"})(TRANSCRIPTS[0], {"gold": ["Titanic"]}) == 1.0
    with pytest.raises(ValueError, match="entities='Titanic', expected a list of strings"):
        reward(TRANSCRIPTS[0], {"entities": "Titanic"})


def test_rewards_and_advantages():
    got = credit(batch())
    close(got.extras["reward"], [1, 0.15, 0, 0], 1e-14)
    close(got.advantage[:, 0], [1.48364765, -0.28631797, -0.59866484, -0.59866484])


def test_a_group_that_is_all_wrong_learns_from_its_entities():
    got = credit(batch(correct=(0,) * 4, match=(0.25, 0.5, 0, 0.5), overlong=(0,) * 4))
    close(got.extras["reward"], [0.15, 0.3, 0, 0.3], 1e-14)
    close(got.advantage[:, 0], [-0.26111467, 0.783344, -1.30557333, 0.783344])


def test_loss_and_gradient():
    value, grad = loss_and_grad(algorithms.make("e_grpo"), batch(), LOGP)
    close(value, -0.14349777)
    expected = [[-0.2342406, 0, -0.21194966], [0, 0.04090257, 0.04520433], [0.11544472, 0, 0], [0, 0, 0]]
    close(grad, expected)


def test_the_mean_over_groups_leaves_out_a_group_that_was_all_cut_off():
    rows = batch(group=(0, 0, 1, 1), overlong=(0, 0, 1, 1))
    weight = algorithms.make("e_grpo").weigh((), rows, credit(rows)).weight
    close(weight, np.where(MASK & (np.arange(4) < 2)[:, None], 1 / 5, 0), 1e-14)
    both = batch(group=(0, 0, 1, 1), overlong=(0, 0, 0, 1))
    by_group = algorithms.make("e_grpo").weigh((), both, credit(both)).weight
    close(by_group, np.where(MASK, np.array([1 / 10, 1 / 10, 1 / 4, 0])[:, None], 0), 1e-14)
    by_batch = algorithms.make("e_grpo", agg="batch").weigh((), both, credit(both)).weight
    close(by_batch, np.where(MASK & (np.arange(4) < 3)[:, None], 1 / 7, 0), 1e-14)


def test_an_error_has_no_reward_but_its_entities_are_in_the_maximum():
    got = credit(batch(correct=(0, 1, 0, 0), overlong=(0,) * 4, more=((0, 0, 1, 1),)), format_part=True)
    close(got.extras["reward"], [0, 0, 0, 0], 1e-14)
    got = credit(batch(match=(0, 0.5, 0.25, 1.0), correct=(0,) * 4, more=((1, 1, 1, 1),)), format_part=True)
    close(got.extras["reward"], [0, 0.15, 0.075, 0], 1e-14)


def test_without_alpha_it_is_grpo_on_outcomes_with_clip_higher():
    rows = batch(correct=(1, 0, 1, 0), overlong=(0,) * 4)
    ours = loss_and_grad(algorithms.make("e_grpo", alpha=0.0), rows, LOGP)
    plain = algorithms.make("grpo", clip_high=0.28, aggregation="token-mean")
    for a, b in zip(ours, loss_and_grad(plain, rows.with_(reward=rows.reward[:, :1]), LOGP)):
        close(a, b, 1e-14)


def test_a_common_factor_of_the_match_rates_changes_nothing():
    one, other = (credit(batch(match=np.array([1, 0.5, 0.25, 0]) * f)).advantage for f in (1, 0.5))
    close(one, other, 1e-14)


def test_rewards_without_its_parts_are_refused_in_one_line():
    rows = rollouts(MASK, [1.0, 0, 0, 0])
    with pytest.raises(ValueError) as error:
        credit(rows)
    assert str(error.value) == (
        "rewards.parts: e_grpo was given 1 reward parts, expected the task's own (correct), `entities`"
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": 1.5}, "algorithm.alpha=1.5: expected 0 to 1"),
        ({"agg": "row"}, "algorithm.agg='row': expected one of group, batch"),
    ],
)
def test_contradictory_settings_raise_one_clear_line(fields, message):
    with pytest.raises(ValueError) as error:
        algorithms.make("e_grpo", **fields)
    assert str(error.value) == message
