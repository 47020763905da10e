"""Layouts: different executions of the same rows, with the same views and the same gradient."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from learning import APART, COUPLED, GROUP, ROWS, SPEC, L, T, assert_close, gradient, rollouts

from jaxrl_llm.models import decoder
from jaxrl_llm.training import layouts
from jaxrl_llm.training.layouts import HostRows, Layout, arrange, choose, host_rows


def host(seed=0, **changes) -> HostRows:
    return host_rows(replace(rollouts(seed), **changes))


def layout(name, sequences=ROWS) -> Layout:
    return Layout(name, sequences, L, T, GROUP if name == "shared" else 1)


NAMES = ("padded", "packed", "shared")


@pytest.mark.parametrize("name", ["packed", "shared"])
def test_layouts_have_the_same_gradient_in_float64(name, x64):
    rows = rollouts(dtype=np.float64)
    padded, value = gradient(rows, COUPLED, route="joint")
    other, same = gradient(rows, COUPLED, route="joint", layout=name, microbatch_rows=4)
    assert_close(other, padded, 1e-10)
    assert same == pytest.approx(value, rel=1e-10)


@pytest.mark.parametrize("name", ["packed", "shared"])
def test_layouts_have_the_same_gradient_in_float32(name):
    padded, value = gradient(rollouts(), APART)
    other, same = gradient(rollouts(), APART, layout=name, microbatch_rows=4)
    assert_close(other, padded, 1e-5)
    assert same == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sequences", [1, 3, 8])
def test_every_completion_token_is_scored_once_after_the_right_tokens(name, sequences):
    """Read off the arrays alone: a token's predictor sees exactly its context and the tokens before it, in order."""
    rows = host()
    pieces, piece_of = arrange(layout(name, sequences), rows)
    scored = []
    for i, piece in enumerate(pieces):
        assert piece.tokens.shape == (sequences, layout(name).length)
        for s, k in np.argwhere(piece.slot < ROWS * T):
            row, t = divmod(int(piece.slot[s, k]), T)
            scored.append((row, t))
            assert piece_of[row] == i and piece.rows[row]
            assert piece.target[s, k] == rows.tokens[row, t]
            context = rows.prompt_tokens[rows.prompt[row], : rows.prompt_length[rows.prompt[row]]]
            seen = piece.at[s, k]
            mine = piece.segment[s, : seen + 1] == piece.segment[s, seen]
            if name == "shared":
                mine |= piece.segment[s, : seen + 1] == 1
            tokens = piece.tokens[s, : seen + 1][mine]
            assert tokens.tolist() == [*context, *rows.tokens[row, :t]]
            assert piece.positions[s, : seen + 1][mine].tolist() == list(range(len(tokens)))
    assert sorted(scored) == [(b, t) for b in range(ROWS) for t in range(rows.length[b])]


def test_the_shared_layout_runs_each_context_once_for_its_group():
    pieces, _ = arrange(layout("shared", 1), host())
    contexts = [tuple(p.tokens[0, :L][p.segment[0, :L] > 0]) for p in pieces]
    assert len(contexts) == len(set(contexts)) == 4


def test_a_context_with_more_rows_than_slots_runs_again():
    rows = host(prompt=np.zeros(ROWS, np.int32))
    pieces, _ = arrange(layout("shared", 2), rows)
    assert len(pieces) == 2, "seven rows with tokens in slots of two are four sequences"


def test_packing_fills_sequences_and_keeps_within_the_head():
    rows = host()
    pieces, _ = arrange(layout("packed", 1), rows)
    assert len(pieces) < np.count_nonzero(rows.length), "fewer sequences than rows"
    used = [np.count_nonzero(p.segment) for p in pieces]
    assert sum(used) == sum(rows.length[b] + rows.prompt_length[rows.prompt[b]] for b in np.flatnonzero(rows.length))
    assert all(np.count_nonzero(p.slot < ROWS * T) <= T for p in pieces)


@pytest.mark.parametrize("name", NAMES)
def test_empty_batches_are_one_piece_that_scores_nothing(name):
    pieces, piece_of = arrange(layout(name), host(length=np.zeros(ROWS, np.int32)))
    assert len(pieces) == 1 and np.all(pieces[0].slot == ROWS * T)
    assert np.all(piece_of == 0) and pieces[0].rows.all()


def test_an_empty_completion_belongs_to_the_piece_of_its_block():
    pieces, piece_of = arrange(layout("padded", 2), host())
    assert rollouts().length[5] == 0 and rollouts().block[5] == rollouts().block[4]
    assert piece_of[5] == piece_of[4] > 0
    assert np.array_equal(sum(p.rows.astype(int) for p in pieces), np.ones(ROWS))


def test_a_row_with_an_empty_context_is_refused():
    with pytest.raises(ValueError, match=r"prompt_length: row 2 has an empty context"):
        arrange(layout("padded"), host(prompt_length=np.array([5, 0, 1, 3], np.int32)))


def test_pieces_divide_over_devices():
    sizes = {"rows": 8, "context": L, "completion": T}
    assert choose("padded", microbatch_rows=0, **sizes).sequences == 8
    assert choose("padded", microbatch_rows=2, **sizes, shards=4).sequences == 4
    assert choose("packed", microbatch_rows=0, **sizes).sequences == 2
    assert choose("shared", microbatch_rows=4, group_size=2, **sizes) == Layout("shared", 2, L, T, 2)
    assert choose("shared", microbatch_rows=2, group_size=8, **sizes) == Layout("shared", 1, L, T, 2)


@pytest.mark.parametrize("name", NAMES)
def test_only_completion_positions_leave_the_model(name):
    pieces, _ = arrange(layout(name, 2), host())
    params = jax.eval_shape(lambda: decoder.init(SPEC, jax.random.key(0)))
    states, _ = jax.eval_shape(
        lambda p, piece: layouts.hidden(SPEC, p, layout(name, 2), piece, dtype=np.float32), params, pieces[0]
    )
    assert states.shape == (2, T * (GROUP if name == "shared" else 1), SPEC.embed)


def test_a_fitted_layout_holds_its_rows_and_no_more_than_it_must():
    whole = Layout("shared", 4, 16, 8, 4)
    lengths, prompt = np.array([8, 3, 3, 2, 1, 0]), np.array([0, 0, 0, 0, 1, 1])
    n = len(lengths)
    rows = HostRows(np.zeros((2, 16), int), np.array([5, 7]), prompt, np.zeros((n, 8), int), lengths, np.arange(n))
    assert layouts.fit(whole, rows) == Layout("shared", 2, 8, 8, 2), "3 + 3 + 2 tokens share the second slot"
    assert layouts.fit(whole, rows, shards=4).sequences == 4
    assert layouts.fit(whole, rows._replace(length=np.minimum(lengths, 2))) == Layout("shared", 2, 8, 2, 4)
    assert layouts.fit(whole._replace(name="padded", slots=1), rows) == Layout("padded", 4, 8, 8)
    assert layouts.fit(whole, rows._replace(length=lengths * 0)) == whole
    pieces, _ = arrange(layouts.fit(whole, rows), rows)
    assert len(pieces) == 1 and np.count_nonzero(pieces[0].slot < n * 8) == lengths.sum()
    alone = whole._replace(slots=1)
    assert layouts.fit(alone, rows).sequences == 2, "three sequences in two pieces of a third of the tokens"
    assert layouts.fit(alone, rows, whole=True).sequences == 3


def test_rows_of_any_lengths_meet_three_shapes():
    whole, rng, n = Layout("shared", 2, 64, 128, 8), np.random.default_rng(0), 32
    rows = HostRows(
        np.zeros((4, 64), int), np.full(4, 64), np.repeat(np.arange(4), 8), np.zeros((n, 128), int), None, np.arange(n)
    )
    met = {}
    for spread in np.repeat([0.005, 0.02, 0.05], 20):
        length = np.minimum(rng.geometric(spread, n), 128)
        length[0] = 128
        batch = rows._replace(length=length)
        fitted = layouts.fit(whole, batch, shards=2)
        pieces, _ = arrange(fitted, batch)
        met[fitted] = max(met.get(fitted, 0), len(pieces))
        assert fitted.sequences * fitted.length <= whole.sequences * whole.length and fitted.sequences % 2 == 0
        assert sum(np.count_nonzero(piece.slot < n * 128) for piece in pieces) == length.sum()
    assert {fitted.slots for fitted in met} == {8, 4, 2} and len(met) == 3
    assert max(met.values()) > 2, "what differs is how many pieces run"


@pytest.mark.parametrize("name", ["padded", "shared"])
def test_the_gradient_does_not_depend_on_how_tightly_rows_are_fitted(name, x64, monkeypatch):
    short = rollouts(dtype=np.float64)
    short = short.with_(length=np.minimum(short.length, T // 2), mask=short.mask & (np.arange(T) < T // 2))
    fitted, _ = gradient(short, COUPLED, layout=name)
    monkeypatch.setattr(layouts, "fit", lambda layout, rows, shards, whole: layout)
    loose, _ = gradient(short, COUPLED, layout=name)
    assert_close(fitted, loose, 1e-10)
