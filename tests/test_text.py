"""Tokenizers: built over characters or loaded, prompts, chat templates, stop ids, and token-in-token-out turns."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from jaxrl_llm.config import Tokenizer
from jaxrl_llm.tasks.text import load_text

STORIES = Path(__file__).parents[2] / "shared" / "data" / "stories260k"
CHARS = "0123456789+-= \n"
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}:{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def chars():
    return load_text(Tokenizer(chars=CHARS))


@pytest.fixture(scope="module")
def chat_directory(tmp_path_factory):
    """A byte-level BPE tokenizer that merges "a" and "b", with a chat template, no bos, and pad == eos."""
    from tokenizers import Tokenizer as Core
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate([*alphabet, "ab"])}
    core = Core(models.BPE(vocab=vocab, merges=[("a", "b")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|start|>", "<|end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = TEMPLATE
    path = tmp_path_factory.mktemp("chat")
    tokenizer.save_pretrained(str(path))
    return path


@pytest.fixture(scope="module")
def chat(chat_directory):
    return load_text(Tokenizer(path=str(chat_directory), chat=True, system="Be brief."))


def test_a_character_tokenizer_has_one_token_per_character(chars):
    assert chars.vocab == len(CHARS) + 3
    assert len(chars.encode("12 + 3 =\n")) == 9
    assert chars.decode(chars.encode("12 + 3 =\n")) == "12 + 3 =\n"


def test_a_start_with_a_character_tokenizer_does_not_wait_for_transformers():
    code = f"""
        import sys
        from jaxrl_llm.config import Tokenizer
        from jaxrl_llm.tasks.text import load_text
        text = load_text(Tokenizer(chars={CHARS!r}))
        assert text.decode(text.encode_prompt("1+1="), special=True) == "<bos>1+1="
        assert "transformers" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_a_prompt_of_the_character_tokenizer_starts_with_bos(chars):
    tokens = chars.encode_prompt({"prompt": "1+1="})
    assert tokens.dtype == np.int32
    assert chars.decode(tokens, special=True) == "<bos>1+1="
    assert chars.decode(tokens) == "1+1="


def test_a_saved_character_tokenizer_loads_from_its_directory_and_is_the_same(chars, tmp_path):
    chars.save(tmp_path)
    again = load_text(Tokenizer(path=str(tmp_path)))
    assert again.encode_prompt("7 - 12 =").tolist() == chars.encode_prompt("7 - 12 =").tolist()
    assert (again.vocab, again.eos_ids, again.pad_id, again.bos_id) == (chars.vocab, chars.eos_ids, chars.pad_id, 1)
    assert again.decode(again.encode("7 - 12 =")) == "7 - 12 ="


def test_a_character_outside_the_tokenizer_is_named(chars):
    with pytest.raises(ValueError, match=r"cannot encode '1 x 2'.*\['x'\]"):
        chars.encode("1 x 2")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chars": "aa"}, "repeats"),
        ({"chars": ""}, "at least one"),
        ({"chars": "ab", "path": "x"}, "contradicts"),
        ({}, "is missing"),
        ({"path": "/nowhere"}, "no tokenizer.json"),
        ({"chars": "ab", "chat": True}, "no chat template"),
    ],
)
def test_a_tokenizer_that_cannot_be_is_refused_in_one_line(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        load_text(Tokenizer(**settings))
    assert "\n" not in str(error.value)


def test_an_empty_prompt_is_refused_without_bos(chat_directory):
    with pytest.raises(ValueError, match="empty"):
        load_text(Tokenizer(path=str(chat_directory))).encode_prompt("")


def test_a_chat_prompt_goes_through_the_template_with_the_system_message(chat):
    assert (
        chat.decode(chat.encode_prompt("hi"), special=True)
        == "<|start|>system:Be brief.<|end|><|start|>user:hi<|end|><|start|>assistant:"
    )


def test_special_tokens_of_a_template_are_single_tokens_and_no_bos_is_added(chat):
    tokens = chat.encode_prompt("hi")
    assert (tokens == chat.eos_ids[0]).sum() == 2
    assert chat.bos_id is None


def test_a_sampled_completion_enters_the_next_turn_with_exactly_its_tokens(chat):
    """decode -> encode gives other tokens: a, b sampled one by one encode to the merged "ab"."""
    end = chat.eos_ids[0]
    a, b = (int(chat.encode(c)[0]) for c in "ab")
    completion = np.array([a, b, end], np.int32)
    assert chat.encode(chat.decode(completion)).tolist() != completion[:-1].tolist()
    context = chat.encode_prompt("hi")
    after = chat.next_turn(context, completion, [{"role": "user", "content": "more"}])
    n = len(context)
    assert after[:n].tolist() == context.tolist()
    assert after[n : n + 3].tolist() == [a, b, end]
    assert chat.decode(after[n:], special=True) == "ab<|end|><|start|>user:more<|end|><|start|>assistant:"


def test_a_completion_cut_off_by_length_is_closed_before_the_next_turn(chat):
    context, completion = chat.encode_prompt("hi"), chat.encode("xy")
    after = chat.next_turn(context, completion, [{"role": "tool", "content": "42"}])
    assert chat.decode(after[len(context) :], special=True) == "xy<|end|><|start|>tool:42<|end|><|start|>assistant:"


def test_a_turn_of_plain_text_is_appended_as_tokens(chars):
    context, completion = chars.encode_prompt("1+1="), chars.encode("2")
    after = chars.next_turn(context, completion, "\n2+2=")
    assert after.tolist() == [*context, *completion, *chars.encode("\n2+2=")]
    assert after.dtype == np.int32


def test_a_template_that_drops_earlier_completions_is_refused(chat_directory):
    text = load_text(Tokenizer(path=str(chat_directory)))
    text.pretrained().chat_template = "{{ messages[-1].content }}"
    with pytest.raises(ValueError, match="leaves out"):
        text.next_turn(np.zeros(1, np.int32), np.zeros(1, np.int32), [{"role": "user", "content": "x"}])


def test_bytes_of_a_character_tokenizer_are_its_characters(chars):
    pieces = chars.token_bytes()
    assert len(pieces) == chars.vocab
    assert b"".join(pieces[t] for t in chars.encode("1+1=\n")) == b"1+1=\n"


def test_bytes_of_a_byte_level_tokenizer_join_to_the_utf8_text(chat):
    pieces = chat.token_bytes()
    text = "ab é\n 漢🙂"
    assert b"".join(pieces[t] for t in chat.encode(text)) == text.encode()
    assert pieces[chat.eos_ids[0]] == b"<|end|>"


def test_stop_ids_come_from_the_model_too_and_the_tokenizers_own_is_first(chat_directory, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 256]}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 9}))
    text = load_text(Tokenizer(path=str(chat_directory)), str(tmp_path))
    own = text.pretrained().eos_token_id
    assert text.eos_ids == (own, 7, 256)
    (tmp_path / "generation_config.json").unlink()
    assert load_text(Tokenizer(path=str(chat_directory)), str(tmp_path)).eos_ids == (own, 9)


def test_a_pad_token_may_be_the_eos_token(chat):
    assert chat.pad_id == chat.eos_ids[0]


@pytest.mark.skipif(not STORIES.is_dir(), reason="no stories260k in ../shared/data")
def test_a_real_tokenizer_starts_prompts_with_bos_and_stops_on_both_ids():
    text = load_text(Tokenizer(), str(STORIES))
    assert text.encode_prompt("Once upon a time").tolist()[0] == 1
    assert text.eos_ids == (2, 1)
    assert text.vocab == 512
    story = "Once upon a time, there was é 🙂\n"
    tokens = text.encode(story)
    assert text.decode(tokens) == story
    pieces = text.token_bytes()
    assert b"".join(pieces[t] for t in tokens) == (" " + story).encode()
