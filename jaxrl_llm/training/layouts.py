"""How rows are executed: padded, packed, or with each context once. The gradient is the same.

A layout is arithmetic on the host: it places contexts and completions in sequences of one fixed length and records, for
each completion token, where the hidden state that predicts it will be. The device then runs `hidden` on one `Piece` (a
microbatch) after another; only completion positions leave it, so only they reach the output head.

  padded   a sequence is one row: context, completion, padding.
  packed   a sequence holds several rows, first-fit decreasing; segments keep them apart, positions restart.
  shared   a sequence is one context followed by slots for the completions of its group, several in one slot where they
           are short. The context runs forward and backward once; a completion attends to it and to itself in two parts
           joined exactly (`attention.joined`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.models import attention, decoder
from jaxrl_llm.models.spec import ModelSpec
from jaxrl_llm.sharding import target
from jaxrl_llm.types import Params, Rollouts


class Layout(NamedTuple):
    """Static description of how rows are executed.

    sequences: sequences of one piece.
    context, completion: room for a context and a completion, in tokens (L and T).
    slots: room for this many longest completions behind a context (shared layout; 1 otherwise).
    """

    name: Literal["padded", "packed", "shared"]
    sequences: int
    context: int
    completion: int
    slots: int = 1

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.context + self.slots * self.completion


class Piece(NamedTuple):
    """One microbatch as the model executes it: n sequences of S tokens, K completion tokens of each to score.

    `slot` says where a scored token belongs, as an index into the minibatch's flat [B * T]; B * T where there is none.
    `origin` says which token a place holds, as an index into the flat [B * (L + T)] of the rows' contexts and completions; of a
    context that is run for several rows, the first of them. B * (L + T) where there is none.
    """

    tokens: Int[Array, "n S"]
    positions: Int[Array, "n S"]
    segment: Int[Array, "n S"]  # tokens see tokens of their own segment only; 0 is padding
    at: Int[Array, "n K"]  # where in the sequence the hidden state is that predicts the token
    target: Int[Array, "n K"]
    slot: Int[Array, "n K"]
    origin: Int[Array, "n S"]
    rows: Bool[Array, "B"]  # rows of the minibatch this piece answers for


class Beside(NamedTuple):
    """What a model says of a piece besides its hidden states."""

    routes: Int[Array, "n S M k"] | None  # the experts of all its places
    inner: Float[Array, "n K D"] | None  # what the layer asked for leaves where a completion token is predicted


class RowPiece(NamedTuple):
    """One microbatch for a plug-in scorer, which reads rows as they are."""

    index: Int[Array, "b"]  # rows of the minibatch; -1 for none
    rows: Bool[Array, "B"]


class HostRows(NamedTuple):
    """What arranging needs of `Rollouts`, as numpy arrays."""

    prompt_tokens: np.ndarray  # [P, L]
    prompt_length: np.ndarray  # [P]
    prompt: np.ndarray  # [B]
    tokens: np.ndarray  # [B, T]
    length: np.ndarray  # [B]
    block: np.ndarray  # [B]

    def take(self, index: np.ndarray, block: np.ndarray) -> "HostRows":
        """Rows by index, in new blocks; -1 makes an empty row."""
        at = np.maximum(index, 0)
        length = np.where(index >= 0, self.length[at], 0)
        return HostRows(self.prompt_tokens, self.prompt_length, self.prompt[at], self.tokens[at], length, block)


def host_rows(rows: Rollouts) -> HostRows:
    return HostRows(*(np.asarray(getattr(rows, name)) for name in HostRows._fields))


def choose(
    name: Literal["padded", "packed", "shared"],
    *,
    rows: int,
    microbatch_rows: int,
    context: int,
    completion: int,
    group_size: int = 1,
    shards: int = 1,
    most: int | None = None,
) -> Layout:
    """The layout of minibatches of `rows` rows of any lengths; `fit` finds a smaller one for given rows.

    microbatch_rows: rows executed together; 0: all of them (packed: sequences executed together; 0: a quarter of the
      rows, since how many sequences packing needs is known only with the data), or `most`.
    shards: the number of sequences is a multiple of it (devices the batch is split over).
    """
    natural = -(-rows // 4) if name == "packed" else rows
    at_once = microbatch_rows or min(natural, most or natural)
    slots = max(1, min(group_size, at_once)) if name == "shared" else 1
    sequences = -(-at_once // slots)
    return Layout(name, -(-sequences // shards) * shards, context, completion, slots)


def most_rows(completion: int, couples: str, platform: str) -> int | None:
    """How many rows are worth executing together; None: as many as there are.

    On a CPU more than about 2,048 completion tokens are no faster and only take memory. A loss that couples rows keeps
    them together all the same, as rows that are apart cost it another forward pass.
    """
    return max(2048 // completion, 1) if platform == "cpu" and couples == "row" else None


def fit(layout: Layout, rows: HostRows, shards: int = 1, whole: bool = False) -> Layout:
    """The layout cut down to what these rows need, from a few choices, so that a run meets few shapes and compiles few.

    A piece never has more tokens than one of `layout`. Packed sequences keep their length: it is room, not padding.
    Room for contexts and completions is halved while all fit. Shared sequences keep their slots, or have half or a
    quarter of them, where completions are short enough to share slots, in pieces of a third of the tokens: how many
    pieces run depends on the rows, what a piece looks like only on the choice.

    whole: one piece is worth more than few tokens, as the loss couples rows: as many sequences as these rows need.
    """
    run = np.flatnonzero(rows.length > 0)
    if layout.name == "packed" or not len(run):
        return layout
    context = _halved(layout.context, rows.prompt_length[rows.prompt[run]].max())
    completion = _halved(layout.completion, rows.length[run].max())
    small = layout._replace(context=context, completion=completion)
    if layout.name == "padded":
        return small
    needed = np.array([place.max() + 1 for _, place, _ in _by_context(rows, run, completion)])  # slots of each context

    def cut(slots: int, share: int) -> tuple[int, Layout]:
        """How many tokens are executed in pieces of 1/share of the layout's, and such a piece."""
        tokens = context + slots * completion
        need = int(np.sum(-(-needed // slots)))
        most = _step(need) if whole else -(-len(rows.length) // slots)
        room = max(layout.sequences * layout.length // (share * tokens * shards), 1) * shards
        pieces = -(-most // room)
        sequences = -(-most // (pieces * shards)) * shards  # no more than `room`, which is a multiple of shards
        return -(-need // sequences) * sequences * tokens, small._replace(slots=slots, sequences=sequences)

    fewer = [max(layout.slots // n, 1) for n in (2, 4)]
    choices = [cut(layout.slots, 1), *(cut(slots, 1 if whole else 3) for slots in fewer)]
    return min(choices, key=lambda choice: choice[0])[1]


def _halved(room: int, need: int) -> int:
    """`room` halved while it still holds `need`."""
    while need <= -(-room // 2) < room:
        room = -(-room // 2)
    return room


def _step(n: Any) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, ..."""
    power = 1 << max(int(n) - 1, 0).bit_length()
    return power * 3 // 4 if power >= 4 and n <= power * 3 // 4 else power


def _ragged(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(owner, offset) of each element of concatenated runs of these lengths."""
    owner = np.repeat(np.arange(len(lengths)), lengths)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(lengths) - lengths, lengths)


class _Placed(NamedTuple):
    """Where contexts and completions go; arrays of one entry per context and per completion."""

    count: int  # sequences
    context: np.ndarray  # index of the context
    context_row: np.ndarray  # the first row it is placed for
    context_sequence: np.ndarray
    context_offset: np.ndarray
    context_segment: np.ndarray
    row: np.ndarray  # completions
    sequence: np.ndarray
    offset: np.ndarray  # of the first completion token in its sequence
    scored_offset: np.ndarray  # of the first completion token among the K scored ones
    before: np.ndarray  # offset of the context's last token, which predicts the first completion token
    segment: np.ndarray


def _place_own_context(
    rows: HostRows, run: np.ndarray, sequence: np.ndarray, start: np.ndarray, k: np.ndarray
) -> _Placed:
    """Rows that bring their own copy of the context, at `start` of `sequence`; each row is a segment."""
    context = rows.prompt[run]
    n = rows.prompt_length[context]
    segment = np.arange(len(run)) + 1
    count = int(sequence.max(initial=-1)) + 1
    return _Placed(count, context, run, sequence, start, segment, run, sequence, start + n, k, start + n - 1, segment)


def _padded(rows: HostRows, run: np.ndarray, layout: Layout) -> _Placed:
    zero = np.zeros(len(run), int)
    return _place_own_context(rows, run, np.arange(len(run)), zero, zero)


def _first_fit(size: np.ndarray, room: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Items of sizes [N, R] in bins with `room` of each resource, first-fit decreasing by the first of them.

    Returns: the bin of each item, and how much of the resources [N, R] is taken before it. An item that fits in no bin
    would be placed wrongly; layouts have room for the longest row.
    """
    used = np.zeros((len(size), len(room)), int)
    place, before = np.zeros(len(size), int), np.zeros_like(used)
    for i in np.argsort(-size[:, 0], kind="stable"):
        place[i] = b = int(np.argmax((used + size[i] <= room).all(-1)))
        before[i] = used[b]
        used[b] += size[i]
    return place, before


def _packed(rows: HostRows, run: np.ndarray, layout: Layout) -> _Placed:
    """A sequence also holds at most T completion tokens, so the head's work is bounded."""
    completion = rows.length[run]
    size = np.stack([rows.prompt_length[rows.prompt[run]] + completion, completion], -1)
    sequence, before = _first_fit(size, (layout.length, layout.completion))
    return _place_own_context(rows, run, sequence, before[:, 0], before[:, 1])


def _by_context(rows: HostRows, run: np.ndarray, width: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each context, in the order of first rows: its rows, their slots of `width` tokens, their places in those."""
    prompt = rows.prompt[run]
    _, first = np.unique(prompt, return_index=True)
    groups = [run[prompt == prompt[i]] for i in np.sort(first)]
    fits = [_first_fit(rows.length[group][:, None], (width,)) for group in groups]
    return [(group, place, before[:, 0]) for group, (place, before) in zip(groups, fits)]


def _shared(rows: HostRows, run: np.ndarray, layout: Layout) -> _Placed:
    """Rows of one context fill the slots behind it; a context that needs more slots than there are runs more than once."""
    count, parts, context = 0, [], []
    for group, place, before in _by_context(rows, run, layout.completion):
        k = place % layout.slots * layout.completion + before
        parts.append((group, count + place // layout.slots, k, np.arange(len(group)) + 2))
        sequences = -(-(int(place.max()) + 1) // layout.slots)
        context += [rows.prompt[group[0]]] * sequences
        count += sequences
    run, sequence, k, segment = (np.concatenate([part[i] for part in parts] or [np.zeros(0, int)]) for i in range(4))
    zero, one = np.zeros(count, int), np.ones(count, int)
    before = rows.prompt_length[rows.prompt[run]] - 1
    own, first = np.asarray(context, int), run[np.unique(sequence, return_index=True)[1]]
    return _Placed(
        count, own, first, np.arange(count), zero, one, run, sequence, layout.context + k, k, before, segment
    )


_PLACE: dict[str, Callable[[HostRows, np.ndarray, Layout], _Placed]] = {
    "padded": _padded,
    "packed": _packed,
    "shared": _shared,
}


def arrange(layout: Layout, rows: HostRows) -> tuple[list[Piece], np.ndarray]:
    """A minibatch as pieces of equal shapes, at least one, and the piece of each row [B].

    Rows without completion tokens are not executed; they belong to the piece of their block, or to the first.
    Raises ValueError when a row to execute has an empty context: nothing would predict its first token.
    """
    length = rows.length
    run = np.flatnonzero(length > 0)
    empty = run[rows.prompt_length[rows.prompt[run]] == 0]
    if len(empty):
        raise ValueError(f"prompt_length: row {empty[0]} has an empty context, expected at least one token")
    placed = _PLACE[layout.name](rows, run, layout)
    count = max(1, -(-placed.count // layout.sequences))
    n, S, K = count * layout.sequences, layout.length, layout.slots * layout.completion
    (B, T), L = rows.tokens.shape, rows.prompt_tokens.shape[1]
    tokens, positions, segment = (np.zeros((n, S), np.int32) for _ in range(3))
    if layout.name == "shared":
        segment[:, 0] = 1  # an unused sequence has a context of one pad token: no empty softmax anywhere
    at, target = (np.zeros((n, K), np.int32) for _ in range(2))
    slot, origin = np.full((n, K), B * T, np.int32), np.full((n, S), B * (L + T), np.int32)

    owner, t = _ragged(rows.prompt_length[placed.context])
    where = placed.context_sequence[owner], placed.context_offset[owner] + t
    tokens[where] = rows.prompt_tokens[placed.context[owner], t]
    positions[where], segment[where] = t, placed.context_segment[owner]
    origin[where] = placed.context_row[owner] * (L + T) + t

    owner, t = _ragged(length[placed.row])
    row, sequence = placed.row[owner], placed.sequence[owner]
    where = sequence, placed.offset[owner] + t
    tokens[where] = rows.tokens[row, t]
    positions[where] = rows.prompt_length[rows.prompt[row]] + t
    segment[where] = placed.segment[owner]
    origin[where] = row * (L + T) + L + t
    where = sequence, placed.scored_offset[owner] + t
    at[where] = np.where(t == 0, placed.before[owner], placed.offset[owner] + t - 1)
    target[where] = rows.tokens[row, t]
    slot[where] = row * T + t

    piece_of = np.full(B, -1)
    piece_of[placed.row] = placed.sequence // layout.sequences
    block = rows.block
    of_block = dict(zip(block[placed.row].tolist(), piece_of[placed.row].tolist()))
    for b in np.flatnonzero(piece_of < 0):
        piece_of[b] = of_block.get(int(block[b]), 0)
    split = [x.reshape(count, layout.sequences, -1) for x in (tokens, positions, segment, at, target, slot, origin)]
    return [Piece(*(x[i] for x in split), rows=piece_of == i) for i in range(count)], piece_of


def arrange_rows(at_once: int, rows: HostRows) -> tuple[list[RowPiece], np.ndarray]:
    """A minibatch as pieces of `at_once` rows for a plug-in scorer, and the piece of each row [B]."""
    count = -(-len(rows.length) // at_once)
    index = np.full(count * at_once, -1, np.int32)
    index[: len(rows.length)] = np.arange(len(rows.length))
    piece_of = np.arange(len(rows.length)) // at_once
    split = index.reshape(count, at_once)
    return [RowPiece(*(split[i], piece_of == i)) for i in range(count)], piece_of


def hidden(
    spec: ModelSpec,
    params: Params,
    layout: Layout,
    piece: Piece,
    *,
    dtype: Any,
    remat: decoder.Remat = "none",
    replay: Int[Array, "M n S k"] | None = None,
    inner: int | None = None,
) -> tuple[Float[Array, "n K D"], Beside]:
    """Hidden states after the final norm that predict the completion tokens of a piece, and what else the model says.

    replay: experts to go to (`training.routing`). inner: a layer whose output is wanted too.
    """
    states, kept = decoder.forward(
        spec,
        params,
        piece.tokens,
        piece.positions,
        _attend(layout, piece),
        dtype=dtype,
        remat=remat,
        replay=replay,
        inner=inner,
    )
    routes = None if kept.routes is None else jnp.moveaxis(kept.routes, 0, 2)
    predicting = partial(jnp.take_along_axis, indices=piece.at[..., None], axis=1)
    return predicting(states), Beside(routes, None if kept.inner is None else predicting(kept.inner))


def _attend(layout: Layout, piece: Piece) -> attention.Attend:
    shared = layout.name == "shared"
    attend = _attend_shared(layout, piece) if shared else attention.causal(piece.segment)
    if target.current().platform != "tpu":
        return attend
    from jaxrl_llm.models import splash  # Pallas would add to every start

    return splash.instead_of(attend, piece.segment, *((layout.context, layout.completion) if shared else ()))


def _attend_shared(layout: Layout, piece: Piece) -> attention.Attend:
    """Contexts attend to themselves; completions to their context and, causally, to themselves."""
    L, G, T = layout.context, layout.slots, layout.completion
    alone = attention.causal(piece.segment[:, :L])
    valid = piece.segment[:, None, None, :L] > 0
    position, segment = (x[:, L:].reshape(-1, G, T) for x in (piece.positions, piece.segment))
    mine = segment[..., :, None] == segment[..., None, :]

    def attend(info: attention.LayerInfo, q: Array, k: Array, v: Array) -> tuple[Array, None]:
        context, _ = alone(info, q[:, :L], k[:, :L], v[:, :L])
        q_own, k_own, v_own = (x[:, L:].reshape(-1, G, T, *x.shape[2:]) for x in (q, k, v))
        to_context = valid & attention.visible(position[..., None], jnp.arange(L), info.window)
        t = jnp.arange(T)
        to_own = mine & attention.visible(t[:, None], t[None, :], info.window)
        own = []
        for queries, keys in attention.causal_blocks(T, info.window):
            context_part = attention.Part(k[:, :L], v[:, :L], to_context[:, :, queries])
            own_part = attention.Part(k_own[:, :, keys], v_own[:, :, keys], to_own[:, :, queries, keys])
            own.append(attention.joined(q_own[:, :, queries], [context_part, own_part], info.scale))
        own = jnp.concatenate(own, axis=2)
        return jnp.concatenate([context, own.reshape(-1, G * T, *own.shape[3:])], axis=1), None

    return attend
