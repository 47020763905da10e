"""The prompt order: deterministic, epochs shuffled anew, sharded, saved, weighted; overlong prompts."""

import json

import numpy as np
import pytest

from jaxrl_llm.config import Tokenizer
from jaxrl_llm.tasks.base import Prompt
from jaxrl_llm.tasks.data import Stream, tokenize
from jaxrl_llm.tasks.text import load_text


def prompts(n):
    return [Prompt(i, np.array([i], np.int32), {"prompt": str(i)}) for i in range(n)]


def ids(drawn):
    return [p.id for p in drawn]


def test_every_epoch_has_every_prompt_once_in_another_order():
    order = ids(Stream(prompts(10), seed=0).draw(30))
    epochs = [order[0:10], order[10:20], order[20:30]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(10))


def test_the_order_is_a_function_of_the_seed():
    assert ids(Stream(prompts(50), 1).draw(60)) == ids(Stream(prompts(50), 1).draw(60))
    assert ids(Stream(prompts(50), 1).draw(60)) != ids(Stream(prompts(50), 2).draw(60))


def test_draws_of_any_size_give_the_same_order():
    a, b = Stream(prompts(7), 3), Stream(prompts(7), 3)
    assert ids(a.draw(12)) == ids(b.draw(5)) + ids(b.draw(0)) + ids(b.draw(7))


def test_a_prompt_drawn_twice_in_a_batch_is_two_draws():
    drawn = ids(Stream(prompts(3), 0).draw(7))
    assert len(drawn) == 7 and max(drawn.count(i) for i in range(3)) >= 2


def test_processes_share_one_global_order_whatever_their_number():
    whole = ids(Stream(prompts(10), 5).draw(24))
    for processes in (2, 3, 4):
        shards = [ids(Stream(prompts(10), 5, p, processes).draw(24 // processes)) for p in range(processes)]
        assert [i for together in zip(*shards) for i in together] == whole


def test_a_restored_order_goes_on_where_it_was_saved():
    stream = Stream(prompts(10), 0)
    stream.draw(13)
    stream.draw_weighted(2, np.ones(10))
    saved = json.loads(json.dumps(stream.state()))
    rest = ids(stream.draw(9)), ids(stream.draw_weighted(4, np.ones(10)))
    again = Stream(prompts(10), 0)
    again.restore(saved)
    assert (ids(again.draw(9)), ids(again.draw_weighted(4, np.ones(10)))) == rest


def test_a_state_of_another_set_of_prompts_is_refused():
    with pytest.raises(ValueError, match="10 prompts, but the checkpoint was made with 9"):
        Stream(prompts(10), 0).restore(Stream(prompts(9), 0).state())


def test_weighted_draws_are_without_replacement_and_never_of_weight_zero():
    stream = Stream(prompts(10), 0)
    weights = np.array([0, 1, 1, 1, 0, 1, 5, 1, 1, 0.0])
    for _ in range(50):
        drawn = ids(stream.draw_weighted(5, weights))
        assert len(set(drawn)) == 5 and not {0, 4, 9} & set(drawn)


def test_weighted_draws_follow_the_weights():
    stream = Stream(prompts(4), 0)
    weights = np.array([1.0, 2.0, 3.0, 4.0])
    counts = np.bincount([stream.draw_weighted(1, weights)[0].id for _ in range(4000)], minlength=4)
    np.testing.assert_allclose(counts / 4000, weights / 10, atol=0.03)


def test_weighted_draws_of_processes_are_disjoint_parts_of_one_draw():
    weights = np.arange(1.0, 11.0)
    parts = [ids(Stream(prompts(10), 7, p, 2).draw_weighted(3, weights)) for p in range(2)]
    assert len({*parts[0], *parts[1]}) == 6
    assert sorted([*parts[0], *parts[1]]) == sorted(ids(Stream(prompts(10), 7).draw_weighted(6, weights)))


def test_weights_are_indexed_by_the_problem_not_by_the_prompts_that_were_kept():
    kept = [p for p in prompts(6) if p.id != 2]
    weights = np.array([0, 0, 9.0, 0, 0, 1.0])
    assert ids(Stream(kept, 0).draw_weighted(1, weights)) == [5]


@pytest.mark.parametrize(
    ("weights", "message"),
    [([1, 0, 0], "1 prompts have weight"), ([1, -1, 1], "negative"), ([1, np.nan, 1], "not finite")],
)
def test_weights_that_cannot_be_drawn_from_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        Stream(prompts(3), 0).draw_weighted(2, np.array(weights, float))


def test_no_prompts_are_refused():
    with pytest.raises(ValueError, match="no prompts"):
        Stream([], 0)


@pytest.fixture(scope="module")
def text():
    return load_text(Tokenizer(chars="0123456789"))


RECORDS = [{"prompt": "1"}, {"prompt": "12345"}, {"prompt": "123"}]


def test_overlong_prompts_are_dropped_and_counted_and_the_others_keep_their_index(text):
    kept, dropped = tokenize(RECORDS, text, 4)
    assert (ids(kept), dropped) == ([0, 2], 1)
    assert kept[1].tokens.tolist() == text.encode_prompt("123").tolist() and kept[1].record is RECORDS[2]


def test_a_prompt_of_exactly_the_limit_stays(text):
    assert tokenize(RECORDS, text, 6).dropped == 0


def test_overlong_prompts_are_refused_on_request(text):
    with pytest.raises(ValueError, match=r"rollout.max_prompt: 4, but 1 of 3 prompts are longer \(up to 6 tokens\)"):
        tokenize(RECORDS, text, 4, "error")


def test_a_limit_that_leaves_no_prompt_is_refused(text):
    with pytest.raises(ValueError, match="every prompt is longer"):
        tokenize(RECORDS, text, 1)
