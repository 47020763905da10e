"""Stop strings as one automaton over token ids, so that the decode loop can follow them on the device.

Matching is on the bytes that tokens write, so a string is found across token borders and inside a token. A completion
ends with the token in which the string completes; that token is kept, also where it runs past the string.
"""

from collections.abc import Sequence

import numpy as np


def stop_table(strings: Sequence[str], pieces: Sequence[bytes]) -> np.ndarray:
    """Transitions int32 [states, V] of the automaton that finds any of `strings` (Aho and Corasick 1975).

    A completion starts in state 0; the last state means found, and is never left.

    Args:
      pieces: the bytes every token writes (`tasks.text.Text.token_bytes`).
    Raises:
      ValueError: an empty stop string.
    """
    if "" in strings:
        raise ValueError("rollout.stop: '' is in every completion, expected non-empty strings")
    delta = _automaton([s.encode() for s in strings])
    lengths = np.array([len(p) for p in pieces])
    order = np.argsort(-lengths, kind="stable")  # long pieces first: column j concerns a prefix of this order
    text = np.zeros((len(pieces), max(lengths.max(initial=0), 1)), np.uint8)
    for row, token in enumerate(order):
        text[row, : lengths[token]] = np.frombuffer(pieces[token], np.uint8)
    table = np.empty((len(delta), len(pieces)), np.int32)
    for start in range(len(delta)):
        state = np.full(len(pieces), start, np.int32)
        for j in range(text.shape[1]):
            n = np.count_nonzero(lengths > j)
            state[:n] = delta[state[:n], text[:n, j]]
        table[start, order] = state
    return table


def _automaton(strings: Sequence[bytes]) -> np.ndarray:
    """Transitions [states, 256] over bytes; the last state is absorbing and means that a string was found."""
    nodes = sorted({s[:i] for s in strings for i in range(len(s))}, key=len)  # proper prefixes: b"" comes first
    index = {node: i for i, node in enumerate(nodes)}
    found = len(nodes)
    delta = np.full((found + 1, 256), found, np.int32)
    for node, i in index.items():
        for byte in range(256):
            seen = node + bytes([byte])
            if not any(s in seen for s in strings):
                delta[i, byte] = next(index[seen[j:]] for j in range(len(seen) + 1) if seen[j:] in index)
    return delta
