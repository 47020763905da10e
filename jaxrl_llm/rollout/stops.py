"""Stop strings as one automaton over token ids, so that the decode loop can follow them on the device.

Matching is on the bytes that tokens write, so a string is found across token borders and inside a token. A completion
ends with the token in which the string completes; that token is kept, also where it runs past the string.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np


def stop_table(strings: Sequence[str], pieces: Sequence[bytes]) -> np.ndarray:
    """Transitions int32 [states, V] of the automaton that finds any of `strings` (Aho and Corasick 1975).

    A completion starts in state 0; the last state means found, and is never left.

    Args:
      pieces: the bytes every token writes.
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


def token_bytes(tokenizer: Any) -> list[bytes]:
    """The bytes each id writes, special tokens included literally, for a fast Hugging Face tokenizer.

    Byte-level pieces are mapped back through their alphabet; sentencepiece pieces through `▁` and `<0xAB>`.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    described = json.loads(backend.to_str())
    decoder = json.dumps(described.get("decoder") or {})
    special = {t["id"] for t in described.get("added_tokens", [])}
    alphabet = _byte_alphabet() if '"ByteLevel"' in decoder else None
    pieces = []
    for i in range(backend.get_vocab_size(with_added_tokens=True)):
        text = backend.id_to_token(i) or ""
        if i in special:
            pieces.append(text.encode())
        elif alphabet is not None:
            pieces.append(b"".join(alphabet[c] if c in alphabet else c.encode() for c in text))
        elif '"ByteFallback"' in decoder and len(text) == 6 and text.startswith("<0x"):
            pieces.append(bytes([int(text[3:5], 16)]))
        else:
            pieces.append((text.replace("▁", " ") if "▁" in decoder else text).encode())
    return pieces


def _byte_alphabet() -> dict[str, bytes]:
    """The printable stand-ins of byte-level BPE (Radford et al. 2019): character -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): bytes([b]) for b in printable} | {chr(256 + i): bytes([b]) for i, b in enumerate(others)}
