import logging

import numpy as np
import pytest

from rlhf_jax.core.errors import UserError
from rlhf_jax.data.chat import encode_prompt
from rlhf_jax.data.examples import preference_examples, prompt_examples, supervised_examples
from rlhf_jax.data.packing import pack_rows
from rlhf_jax.data.sources import Row
from rlhf_jax.data.tokenizers import byte_tokenizer

TOKENIZER = byte_tokenizer()
USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "ho"}


def row(line=7, /, **fields):
    return Row(fields, f"data.jsonl:{line}")


def text(ids):
    return TOKENIZER.decode(ids, skip_special=False)


def supervised(*rows, **options):
    return supervised_examples(rows, TOKENIZER, **{"max_length": 500, **options})


def preference(*rows, **options):
    return preference_examples(rows, TOKENIZER, **{"max_length": 500, **options})


def prompts(*rows, **options):
    return prompt_examples(rows, TOKENIZER, **{"max_length": 500, **options})


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [USER, ASSISTANT]},
        {"prompt": "hi", "completion": "ho"},
        {"prompt": [USER], "completion": "ho"},
        {"prompt": "hi", "completion": [ASSISTANT]},
        {"question": "hi", "answer": "ho", "level": 3},
        {"messages": None, "question": "hi", "answer": "ho"},
        {"messages": [USER, ASSISTANT, USER]},
    ],
    ids=["messages", "plain", "chat prompt", "chat completion", "question", "null", "last word by user"],
)
def test_supervised_fields(fields):
    [example] = supervised(row(**fields))
    assert text(example.ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>"
    assert text(example.ids[example.mask]) == "ho<|im_end|>"
    assert (example.ids.dtype, example.mask.dtype, example.where) == (np.int32, np.bool_, "data.jsonl:7")


def test_supervised_turns_all_count():
    [example] = supervised(row(messages=[USER, ASSISTANT, USER, ASSISTANT]))
    assert text(example.ids[example.mask]) == "ho<|im_end|>" * 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"none of the fields messages, prompt, question \(it has: none\)"),
        ({"text": "a", "id": 1}, r"it has: id, text\)"),
        ({"prompt": "a"}, "field 'completion' is missing"),
        ({"prompt": "a", "completion": None}, "field 'completion' is missing"),
        ({"question": "a", "solution": "b"}, "field 'answer' is missing"),
        ({"prompt": "", "completion": "b"}, "field 'prompt' is empty"),
        ({"prompt": "a", "completion": " \n"}, "field 'completion' is empty"),
        ({"prompt": "a", "completion": 3}, "field 'completion' is a number"),
        ({"prompt": "a", "completion": True}, "field 'completion' is a boolean"),
        ({"prompt": {"a": 1}, "completion": "b"}, "field 'prompt' is an object"),
        ({"question": [USER], "answer": "b"}, "field 'question' is a list"),
        ({"question": "a", "answer": 42}, "field 'answer' is a number"),
        ({"messages": []}, "field 'messages': messages must be a non-empty list"),
        ({"messages": "a"}, "field 'messages' is text, not a list"),
        ({"messages": ["a"]}, "field 'messages': message 0 is not an object"),
        ({"messages": [USER, {"role": "assistant"}]}, r"message 1 \(assistant\) has no text"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, r"message 1 \(assistant\) is empty"),
        ({"messages": [USER]}, "no assistant turn"),
        ({"prompt": "a", "completion": "b\ud800"}, "lone surrogate"),
    ],
)
def test_bad_supervised_rows(fields, message):
    with pytest.raises(UserError, match=message) as caught:
        supervised(row(1, prompt="a", completion="b"), row(2, **fields))
    assert str(caught.value).startswith("data.jsonl:2: ")


def test_long_rows(caplog):
    rows = [row(1, prompt="a", completion="b" * 90), row(2, prompt="a", completion="b")]
    with pytest.raises(UserError, match=r"data.jsonl:1: the conversation has 11\d tokens, more than 100;"):
        supervised(*rows, max_length=100)
    with caplog.at_level(logging.WARNING):
        [example] = supervised(*rows, max_length=100, overlength="drop")
    assert example.where == "data.jsonl:2"
    assert "dropped 1 of 2 rows longer than 100 tokens, the first at data.jsonl:1" in caplog.text
    with pytest.raises(UserError, match="all 2 rows have more than 5 tokens"):
        supervised(*rows, max_length=5, overlength="drop")
    assert supervised(rows[1], max_length=len(example.ids))  # the limit itself fits


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "hi", "chosen": "ho", "rejected": "no"},
        {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [{"role": "assistant", "content": "no"}]},
        {"chosen": [USER, ASSISTANT], "rejected": [USER, {"role": "assistant", "content": "no"}]},
        {
            "prompt": "hi",
            "chosen": [USER, ASSISTANT],
            "rejected": [USER, {"role": "assistant", "content": "no"}],
        },
    ],
    ids=["plain", "chat", "shared beginning", "prompt given twice"],
)
def test_preference_fields(fields):
    [example] = preference(row(**fields))
    assert example.prompt_ids.tolist() == encode_prompt(TOKENIZER, "hi")
    assert [text(example.chosen_ids), text(example.rejected_ids)] == ["ho<|im_end|>", "no<|im_end|>"]
    assert example.chosen_ids.tolist() == [*TOKENIZER.encode("ho"), TOKENIZER.eos_id]
    assert text(example.chosen.ids) == text(example.prompt_ids) + "ho<|im_end|>"
    assert text(example.rejected.ids[example.rejected.mask]) == "no<|im_end|>"
    packed = pack_rows([example.chosen, example.rejected], 100)
    assert packed.mask.sum() == 6


def test_preferences_share_as_many_messages_as_they_can():
    tool = [{"role": "assistant", "content": "call"}, {"role": "tool", "content": "42"}, ASSISTANT]
    [example] = preference(
        row(chosen=[USER, ASSISTANT, USER, *tool], rejected=[USER, ASSISTANT, USER, ASSISTANT])
    )
    assert example.prompt_ids.tolist() == encode_prompt(TOKENIZER, [USER, ASSISTANT, USER])
    assert text(example.chosen_ids[example.chosen_mask]) == "call<|im_end|>ho<|im_end|>"
    assert "42" in text(example.chosen_ids)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "field 'rejected' is missing"),
        ({"prompt": "a", "rejected": "b"}, "field 'chosen' is missing"),
        ({"chosen": "a", "rejected": "b"}, "field 'prompt' is missing"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "field 'rejected' is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        ({"prompt": "a", "chosen": 1, "rejected": "b"}, "field 'chosen' is a number"),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]}, "the same"),
        (
            {"chosen": [USER, ASSISTANT], "rejected": [{"role": "user", "content": "x"}, ASSISTANT]},
            "same prompt",
        ),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER, USER]}, "differ before the assistant's turn"),
        ({"prompt": [USER, ASSISTANT], "chosen": "b", "rejected": "c"}, "ends with an assistant message"),
    ],
)
def test_bad_preference_rows(fields, message):
    with pytest.raises(UserError, match=message) as caught:
        preference(row(4, **fields))
    assert str(caught.value).startswith("data.jsonl:4: ")


def test_long_preferences():
    with pytest.raises(UserError, match="the prompt with its longer completion has 1"):
        preference(row(prompt="a", chosen="b", rejected="c" * 100), max_length=100)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "hi", "answer": 42},
        {"prompt": [USER]},
        {"question": "hi", "answer": "#### 2"},
        {"messages": [USER]},
        {"messages": [USER, ASSISTANT]},
    ],
)
def test_prompt_fields(fields):
    [example] = prompts(row(**fields))
    assert example.ids.tolist() == encode_prompt(TOKENIZER, "hi")
    assert (example.text, example.fields, example.where) == ("hi", fields, "data.jsonl:7")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"answer": "a"}, "none of the fields messages, prompt, question"),
        ({"prompt": " "}, "field 'prompt' is empty"),
        ({"messages": [ASSISTANT]}, "nothing before the assistant's turn"),
        ({"prompt": "a" * 600}, r"the prompt has 61\d tokens, more than 500; shorten it"),
    ],
)
def test_bad_prompts(fields, message):
    with pytest.raises(UserError, match=message) as caught:
        prompts(row(9, **fields))
    assert str(caught.value).startswith("data.jsonl:9: ")
