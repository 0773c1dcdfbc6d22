"""Rows with calls and tools, in the shapes in which they come: one form is learnt, or the row is named."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from rlhf_jax.core.errors import UserError
from rlhf_jax.data.examples import preference_examples, prompt_examples, supervised_examples
from rlhf_jax.data.rankings import ranking_examples
from rlhf_jax.data.sources import Row, as_rows, read_rows
from rlhf_jax.data.tokenizers import byte_tokenizer, load_tokenizer
from rlhf_jax.tool_use.calls import Call, parse_calls

TOKENIZER = byte_tokenizer()
TOOL = {
    "type": "function",
    "function": {"name": "move", "description": "d", "parameters": {"type": "object"}},
}
CALL = {"name": "f", "arguments": {"x": 1}}


def learnt(calls):
    message = {"role": "assistant", "content": None, "tool_calls": calls}
    row = Row({"messages": [{"role": "user", "content": "go"}, message]}, "rows.jsonl:1")
    (example,) = supervised_examples([row], TOKENIZER, max_length=9999)
    return parse_calls(
        TOKENIZER.decode([int(i) for i, m in zip(example.ids, example.mask, strict=True) if m])
    )


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        {"function": CALL},
        {"type": "function", "function": CALL},
        {"type": "function", "id": "c1", "function": {"name": "f", "arguments": '{"x": 1}'}},
        {"id": "c1", **CALL},
        {"type": "function", "function": CALL, "index": 0, "extra": None},
    ],
)
def test_every_shape_of_a_call_is_learnt_as_the_one_that_is_read_back(call):
    assert learnt([call]) == [Call("f", {"x": 1})]
    assert learnt([call, call]) == [Call("f", {"x": 1})] * 2


@pytest.mark.parametrize(
    ("calls", "said"),
    [
        (CALL, "tool_calls that are no list"),
        ([None], "a tool call without a name"),
        (["f(1)"], "a tool call without a name"),
        ([{"name": 5, "arguments": {}}], "a tool call without a name"),
        ([{"name": "f", "arguments": None}], "the arguments of f are no object"),
        ([{"name": "f", "arguments": "x=1"}], "the arguments of f are no object"),
        ([{"name": "f", "arguments": "[" * 100_000}], "the arguments of f are no object"),
        ([{"name": "f", "arguments": [1]}], "the arguments of f are no object"),
    ],
)
def test_what_is_no_call_is_refused_by_its_row(calls, said):
    with pytest.raises(UserError, match=rf"^rows\.jsonl:1: .*{said}"):
        learnt(calls)


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])], ids=["list", "text"])
def test_the_tools_of_a_row_reach_the_template(tools):
    tokenizer = load_tokenizer("tests/golden/chat_chatml")
    messages = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "gone"}]
    sides = {"chosen": "gone", "rejected": "no", "prompt": "go"}
    ranked = {"prompt": "go", "completions": ["gone", "no"], "ranks": [0, 1]}

    def ids_of(make, fields):
        (example,) = make([Row({**fields, "tools": tools}, "f:1")], tokenizer, max_length=9999)
        for name in ("ids", "prompt_ids"):
            if hasattr(example, name):
                return getattr(example, name)
        return example.answers[0].ids

    for make, fields in (
        (supervised_examples, {"messages": messages}),
        (prompt_examples, {"messages": messages[:1]}),
        (preference_examples, sides),
        (ranking_examples, ranked),
    ):
        text = tokenizer.decode(list(map(int, ids_of(make, fields))), skip_special=False)
        assert '"name": "move"' in text, make.__name__


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"messages": [{"role": "user", "content": "go"}], "tools": "move(x)"}, "text that is not JSON"),
        ({"messages": [{"role": "user", "content": "go"}], "tools": {"name": "move"}}, "no list of objects"),
        ({"messages": [{"role": "user", "content": "go"}], "tools": ["move"]}, "no list of objects"),
        ({"messages": '[{"role": "user", "content": "go"}]'}, "give it as a list, not as JSON"),
    ],
)
def test_rows_of_unexpected_shape_are_refused(fields, said):
    with pytest.raises(UserError, match=rf"^f:1: .*{said}"):
        prompt_examples([Row(fields, "f:1")], TOKENIZER, max_length=9999)


def test_the_nulls_that_arrow_puts_into_calls_and_schemas_are_not_learnt(tmp_path):
    calls = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"y": 2, "z": None}}]
    message = {"role": "assistant", "content": None, "tool_calls": calls}
    schemas = [
        {"name": name, "parameters": {"properties": {argument: {"type": "integer"}}}}
        for name, argument in (("f", "x"), ("g", "y"))
    ]
    row = {"messages": [{"role": "user", "content": "go"}, message], "tools": schemas, "answer": None}
    table = pyarrow.Table.from_pylist([row])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    for (found,) in (read_rows(tmp_path / "rows.parquet"), as_rows(table)):
        assert learnt(found.fields["messages"][1]["tool_calls"]) == [Call("f", {"x": 1}), Call("g", {"y": 2})]
        assert found.fields["tools"] == schemas
        assert found.fields["messages"][1]["content"] is found.fields["answer"] is None
    # In JSON a null is there because somebody wrote it.
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    (found,) = read_rows(path)
    assert found.fields["messages"][1]["tool_calls"] == calls
