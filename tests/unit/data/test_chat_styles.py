"""Styles of chat against `apply_chat_template` of `transformers` (tools/goldens/make_goldens_chat.py)."""

import functools
import json
import pathlib
import re

import pytest

from rlhf_jax.core.errors import UserError
from rlhf_jax.data.chat import encode_conversation, encode_prompt
from rlhf_jax.data.templates import has_generation_marks
from rlhf_jax.data.tokenizers import Tokenizer, load_tokenizer

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "golden"
STYLES = sorted(folder.name.removeprefix("chat_") for folder in GOLDEN.glob("chat_*"))


@functools.cache
def tokenizer_of(style):
    return load_tokenizer(GOLDEN / f"chat_{style}")


@functools.cache
def cases_of(style):
    return json.loads((GOLDEN / f"chat_{style}" / "expected.json").read_text(encoding="utf-8"))


def without_marks(tokenizer):
    """The tokenizer with a template that does not say what the assistant wrote."""
    template = re.sub(
        r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}",
        lambda mark: "{" + f"%{mark[1]} if true {mark[2]}%" + "}{% endif %}",
        tokenizer.chat_template,
    )
    assert not has_generation_marks(template)
    return Tokenizer(tokenizer.backend, tokenizer.names, template)


def test_the_five_styles_are_there():
    assert STYLES == ["chatml", "deepseek", "gemma", "llama3", "mistral"]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("marked", [True, False], ids=["marked", "unmarked"])
def test_ids_and_masks_are_those_of_transformers(style, marked):
    tokenizer = tokenizer_of(style)
    end = tokenizer.eos_id
    tokenizer = tokenizer if marked else without_marks(tokenizer)
    tokenizer.eos_id = end
    for case in cases_of(style):
        if case["add_generation_prompt"]:
            ids = encode_prompt(tokenizer, case["messages"], tools=case["tools"])
            assert ids == case["ids"]
        else:
            encoded = encode_conversation(tokenizer, case["messages"], tools=case["tools"])
            assert encoded.ids == case["ids"]
            assert encoded.mask == [bool(counts) for counts in case["mask"]], case["messages"]
            assert sum(encoded.mask) > 0


@pytest.mark.parametrize("style", ["gemma", "mistral"])
def test_characters_outside_the_vocabulary_become_bytes_and_come_back(style):
    tokenizer = tokenizer_of(style)
    text = "日本語 🙂 naïve"
    ids = tokenizer.encode(text)
    assert {"<0xE6>", "<0x97>", "<0xA5>"} <= {tokenizer.token(index) for index in ids}
    assert tokenizer.decode(ids) == text


def test_gemmas_turns_end_with_their_own_token():
    tokenizer = tokenizer_of("gemma")
    assert tokenizer.token(tokenizer.eos_id) == "<end_of_turn>"
    assert tokenizer.names["eos_token"] == "<eos>"


def test_tools_are_text_too():
    """A description that quotes a special token does not become one."""
    tokenizer = tokenizer_of("chatml")
    tool = {"type": "function", "function": {"name": "f", "description": "<|im_end|>"}}
    ids = encode_prompt(tokenizer, "hi", tools=[tool])
    assert ids.count(tokenizer.eos_id) == 2
    assert "<|im_end|>" in tokenizer.decode(ids, skip_special=True)


def test_a_layout_without_marks_that_cannot_be_told_is_refused():
    """The system's words move into the last question, and answers carry no mark of their end."""
    template = (
        "{% for m in messages[1:] %}{% if m.role == 'user' %}"
        "{{ '[INST]' + (messages[0].content if loop.revindex <= 2 else '') + m.content + '[/INST]' }}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    base = tokenizer_of("mistral")
    tokenizer = Tokenizer(base.backend, base.names, template)
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    with pytest.raises(UserError, match=r"message 2 out so that its beginning.*generation %} marks"):
        encode_conversation(tokenizer, [{"role": "system", "content": "be brief"}, *turns, *turns])
