"""Between text and tokens: loading or building a tokenizer, chat templates, prompts, targets and turns.

Token in, token out: what the policy sampled is never decoded and encoded again, because that may give other tokens than
the ones the policy was scored on. A later turn is appended to the sampled tokens (`Text.next_turn`).
"""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_llm.config import Tokenizer
from jaxrl_llm.tasks.base import Record

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
# Stands for a completion while a chat template is rendered; cut out again, so any text that templates leave alone will do.
_COMPLETION = "COMPLETION"


@dataclass(frozen=True)
class Text:
    """A Hugging Face fast tokenizer and how this run uses it."""

    core: Any  # tokenizers.Tokenizer
    pretrained: Callable[[], Any]  # the same with its chat template and files, as transformers has it: slow to import
    eos_ids: tuple[int, ...]  # any of them ends a completion; the first ends a supervised target
    pad_id: int
    bos_id: int | None  # put before every prompt without a chat template; None: the tokenizer adds none
    chat: bool = False
    system: str | None = None

    @property
    def vocab(self) -> int:
        """Number of token ids, added tokens included: the rows an embedding needs."""
        return max(self.core.get_vocab().values()) + 1

    def encode(self, text: str) -> np.ndarray:
        """Text as int32 [n] tokens, nothing added. Raises ValueError for a character the tokenizer cannot represent."""
        try:
            return np.array(self.core.encode(text, add_special_tokens=False).ids, np.int32)
        except Exception as error:  # `tokenizers` raises bare Exception
            known = self.core.get_vocab()
            strange = sorted({c for c in text if c not in known})
            raise ValueError(f"tokenizer: cannot encode {text[:60]!r}: {error}; unknown: {strange[:10]}") from None

    def encode_prompt(self, prompt: Record | str) -> np.ndarray:
        """A problem's prompt as int32 [n] tokens: through the chat template, or with the tokenizer's bos in front."""
        text = prompt if isinstance(prompt, str) else prompt["prompt"]
        if self.chat:
            system = [{"role": "system", "content": self.system}] if self.system is not None else []
            return self.encode(self._render([*system, {"role": "user", "content": text}]))
        bos = [] if self.bos_id is None else [self.bos_id]
        tokens = np.concatenate([np.array(bos, np.int32), self.encode(text)])
        if not len(tokens):
            raise ValueError("prompt: is empty and the tokenizer adds no bos token; nothing to continue")
        return tokens

    def next_turn(
        self, context: np.ndarray, completion: np.ndarray, turn: str | Sequence[Mapping[str, str]]
    ) -> np.ndarray:
        """The context of the next turn, int32 [n]: exactly the tokens seen and sampled, then those of `turn`.

        `turn` is text, or chat messages when the template is on: then what the template puts after an assistant's words
        (an end token the completion was cut off before, separators) and before the next ones comes between. Raises
        ValueError when the template does not repeat an assistant's words.
        """
        if isinstance(turn, str):
            between = turn
        else:
            asked = {"role": "user", "content": ""}
            text = self._render([asked, {"role": "assistant", "content": _COMPLETION}, *turn])
            _, found, between = text.partition(_COMPLETION)
            if not found:
                raise ValueError("tokenizer.chat: this chat template leaves out earlier assistant messages")
            if len(completion) and int(completion[-1]) in self.eos_ids:  # the policy ended its turn itself
                end = self.core.id_to_token(int(completion[-1]))
                between = between.lstrip().removeprefix(end)
        return np.concatenate([context, completion, self.encode(between)]).astype(np.int32)

    def decode(self, tokens: Sequence[int] | np.ndarray, special: bool = False) -> str:
        """Text of tokens; special tokens are left out unless `special`."""
        return self.core.decode([int(t) for t in tokens], skip_special_tokens=not special)

    def token_bytes(self) -> list[bytes]:
        """The bytes every id writes, what stop strings are matched against; special and added tokens literally."""
        core = json.loads(self.core.to_str())
        decoder = json.dumps(core.get("decoder"), ensure_ascii=False)
        added = {token["id"] for token in core.get("added_tokens", [])}
        alphabet = _byte_level_alphabet() if '"ByteLevel"' in decoder else None
        pieces = [b""] * self.vocab
        for token, i in self.core.get_vocab().items():
            if i in added:
                pieces[i] = token.encode()
            elif alphabet:
                pieces[i] = b"".join(alphabet[c] if c in alphabet else c.encode() for c in token)
            elif '"ByteFallback"' in decoder and re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
                pieces[i] = bytes([int(token[3:5], 16)])
            else:
                pieces[i] = (token.replace("▁", " ") if "▁" in decoder else token).encode()
        return pieces

    def save(self, path: str | Path) -> None:
        """Write the tokenizer's files into a Hugging Face directory."""
        self.pretrained().save_pretrained(str(path))

    def _render(self, messages: Sequence[Mapping[str, str]]) -> str:
        return self.pretrained().apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)


def load_text(config: Tokenizer, model_path: str | None = None) -> Text:
    """The tokenizer of a run: built over `config.chars`, or loaded from `config.path`, or from the model's directory.

    Stop tokens come from generation_config.json or config.json of the model, and the tokenizer. Raises ValueError when
    nothing is named, a directory has no tokenizer, it has no end-of-sequence token, or no chat template is there to apply.
    """
    if config.chars is not None:
        if config.path is not None:
            raise ValueError(f"tokenizer.path: {config.path!r} contradicts tokenizer.chars, expected one of the two")
        if config.chat:
            raise ValueError("tokenizer.chat: true, but tokenizer.chars has no chat template, expected false")
        return _character_text(config.chars)
    path = config.path or model_path
    if path is None:
        raise ValueError("tokenizer.path: is missing, expected a directory (or tokenizer.chars, or model.path)")
    if not (Path(path) / "tokenizer.json").is_file():
        raise ValueError(f"tokenizer.path: {path!r} has no tokenizer.json, expected a Hugging Face directory")
    _transformers_without_advice()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    if config.chat and not tokenizer.chat_template:
        raise ValueError("tokenizer.chat: true, but this tokenizer has no chat template, expected false")
    eos_ids = _eos_ids(tokenizer.eos_token_id, [Path(p) for p in (model_path, path) if p])
    if not eos_ids:
        raise ValueError("tokenizer.path: neither the tokenizer nor the model's config names an end-of-sequence token")
    # A tokenizer says by its post-processor whether prompts start with bos; an eos it appends there is no prompt's business.
    adds_bos = tokenizer.bos_token_id is not None and tokenizer.bos_token_id in tokenizer.encode("")[:1]
    core = tokenizer.backend_tokenizer
    core.no_truncation()  # which its file may ask for
    core.no_padding()
    return Text(
        core,
        lambda: tokenizer,
        eos_ids,
        eos_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        tokenizer.bos_token_id if adds_bos else None,
        config.chat,
        config.system,
    )


def _character_text(chars: str) -> Text:
    """One token per character of `chars`, after <pad> <bos> <eos>; prompts get bos. Saved, it is a directory that
    `AutoTokenizer` loads. Raises ValueError for no or repeated characters.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    repeated = sorted(c for c, n in Counter(chars).items() if n > 1)
    if not chars or repeated:
        raise ValueError(f"tokenizer.chars: {chars!r} repeats {repeated}, expected distinct characters, at least one")
    vocab = {token: i for i, token in enumerate([PAD, BOS, EOS, *chars])}
    core = tokenizers.Tokenizer(models.WordLevel(vocab))  # no unknown token: a character outside raises
    core.add_special_tokens([PAD, BOS, EOS])
    core.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")  # type: ignore[assignment]
    core.decoder = decoders.Fuse()  # type: ignore[assignment]
    core.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocab[BOS])]
    )

    def pretrained() -> Any:
        _transformers_without_advice()
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(
            tokenizer_object=core, pad_token=PAD, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False
        )

    return Text(core, pretrained, (vocab[EOS],), vocab[PAD], vocab[BOS])


def _transformers_without_advice() -> None:
    """Before its first import: don't tell a user of ours that PyTorch is missing."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def _eos_ids(own: int | None, places: Sequence[Path]) -> tuple[int, ...]:
    """The tokenizer's eos first, then those of the first of generation_config.json, config.json that names any."""
    for place in places:
        for name in ("generation_config.json", "config.json"):
            if (place / name).is_file():
                named = json.loads((place / name).read_text()).get("eos_token_id")
                if named is not None:
                    more = named if isinstance(named, list) else [named]
                    return tuple(dict.fromkeys([*([] if own is None else [own]), *map(int, more)]))
    return () if own is None else (own,)


def _byte_level_alphabet() -> dict[str, bytes]:
    """Characters of GPT-2's byte-level BPE and the bytes they stand for: printable bytes themselves, others from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): bytes([b]) for b in printable} | {chr(256 + i): bytes([b]) for i, b in enumerate(others)}
