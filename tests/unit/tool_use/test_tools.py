"""Calls that models write, tools that answer them, and retrieval."""

import json
import math
import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from rlhf_jax.core.errors import UserError
from rlhf_jax.data.chat import encode_conversation
from rlhf_jax.data.tokenizers import byte_tokenizer
from rlhf_jax.retrieval.bm25 import words
from rlhf_jax.tool_use import (
    Call,
    CallError,
    Index,
    Tool,
    answer_calls,
    calculator,
    call_pattern,
    make_tools,
    parse_calls,
    retriever,
    worker_tool,
)
from rlhf_jax.tool_use.tools import write_number


def call(inside):
    return f"<tool_call>\n{inside}\n</tool_call>"


def compute(expression):
    inside = json.dumps({"name": "calculator", "arguments": {"expression": expression}})
    return answer_calls([calculator()], call(inside))[0]


def test_calls_are_read_as_the_template_writes_them():
    expected = Call("calculator", {"expression": '1 < 2 "é"'})
    turn = {"name": expected.name, "arguments": expected.arguments}
    messages = [
        {"role": "user", "content": "0"},
        {"role": "assistant", "content": "so", "tool_calls": [turn, turn]},
    ]
    tokenizer = byte_tokenizer()
    encoded = encode_conversation(tokenizer, messages)
    said = [index for index, counts in zip(encoded.ids, encoded.mask, strict=True) if counts]
    assert parse_calls(tokenizer.decode(said)) == [expected, expected]


def test_an_answer_has_no_calls():
    assert parse_calls("#### 42") == []
    assert parse_calls("</tool_call>") == []
    assert answer_calls([calculator()], "#### 42") == []


HOSTILE = {
    "unclosed": "<tool_call>",
    "unclosed json": '<tool_call>{"name": "calculator", "arguments": {"expression": "1"}}',
    "nothing": call(""),
    "broken": call('{"name": "calculator", '),
    "two values": call('{"name": "f", "arguments": {}} {}'),
    "list": call("[]"),
    "null": call("null"),
    "number": call("9" * 4000),
    "other keys": call('{"name": "calculator"}'),
    "more keys": call('{"name": "calculator", "arguments": {"expression": "1"}, "id": 1}'),
    "name is a number": call('{"name": 1, "arguments": {}}'),
    "arguments are text": call('{"name": "calculator", "arguments": "1"}'),
    "unknown tool": call('{"name": "python", "arguments": {"code": "1"}}'),
    "unknown argument": call('{"name": "calculator", "arguments": {"code": "1"}}'),
    "missing argument": call('{"name": "calculator", "arguments": {}}'),
    "argument of another type": call('{"name": "calculator", "arguments": {"expression": 1}}'),
    "key twice": call('{"name": "calculator", "name": "calculator", "arguments": {"expression": "1"}}'),
    "NaN": call('{"name": "calculator", "arguments": {"expression": NaN}}'),
    "infinity": call('{"name": "calculator", "arguments": {"expression": -Infinity}}'),
    "deep": call("[" * 2000 + "]" * 2000),
    "deep objects": call('{"a":' * 800 + "1" + "}" * 800),
    "long": call('{"name": "calculator", "arguments": {"expression": "' + "1+" * 10**6 + '1"}}'),
    "long name": call('{"name": "' + "x" * 4000 + '", "arguments": {}}'),
    "endless expression": call('{"name": "calculator", "arguments": {"expression": "' + "1+" * 1000 + '"}}'),
    "power": call('{"name": "calculator", "arguments": {"expression": "9^9^9^9"}}'),
    "brackets": call('{"name": "calculator", "arguments": {"expression": "' + "(" * 900 + '"}}'),
    "one over zero": call('{"name": "calculator", "arguments": {"expression": "1/0"}}'),
    "code": call('{"name": "calculator", "arguments": {"expression": "__import__(1)"}}'),
    "NUL": call('{"name": "calculator", "arguments": {"expression": "1\\u0000+1"}}'),
    "raw NUL": call('{"name": "calculator", "arguments": {"expression": "1\0"}}'),
    "surrogate": call('{"name": "\\ud800", "arguments": {}}'),
    "nested tags": call(call('{"name": "calculator", "arguments": {"expression": "1"}}')),
    "too many": call("{}") * 100,
}  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_calls_are_answered_with_an_error(text):
    said = answer_calls([calculator()], text)
    assert 0 < len(said) <= 4
    assert said[0].startswith("error: ")
    assert len(said[0]) < 300


@given(st.text(max_size=100))
@settings(max_examples=100, deadline=None)
def test_any_call_is_answered(text):
    for inside in (text, '{"name": "calculator", "arguments": {"expression": "' + text + '"}}'):
        said = answer_calls([calculator()], call(inside))
        assert all(isinstance(parsed, Call | CallError) for parsed in parse_calls(call(inside)))
        assert 0 < len(said) <= 4


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("473+298-655", "116"),
        ("12/8", "1.5"),
        ("1/3", "1/3"),
        ("-7/4 + 0", "-1.75"),
        ("(12.5 + 7) * 3 / 4", "14.625"),
        ("2^-3", "0.125"),
        ("10^20", "1" + "0" * 20),
        ("0 - 0.05", "-0.05"),
        ("sqrt(144)", "12"),
    ],
)
def test_the_calculator_is_exact(expression, value):
    assert compute(expression) == value


@given(st.fractions(max_denominator=1000))
@settings(max_examples=100, deadline=None)
def test_written_numbers_are_the_number(value):
    assert Fraction(write_number(value)) == value


def test_tools_describe_themselves_to_templates():
    schema = calculator().schema()
    assert schema["function"]["name"] == "calculator"
    assert schema["function"]["parameters"]["required"] == ["expression"]


SEARCH = Tool("find-it", "Finds.", {"query": "what", "place": "where"}, lambda query, place: query + place)
CALCULATION = '{"name": "calculator", "arguments": {"expression": "1+1"}}'


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("#### 7", True),
        ("", True),
        (call(CALCULATION), True),
        ("I look.\n" + call('{"name": "find-it", "arguments": {"query": "a \\"b\\"", "place": ""}}'), True),
        ("\n".join([call(CALCULATION)] * 4), True),
        ("\n".join([call(CALCULATION)] * 5), False),
        (call(CALCULATION) + "!", False),
        (call('{"name": "calculator", "arguments": {"expression": 1}}'), False),
        (call('{"name": "calculator", "arguments": {"expression": "</tool_call>"}}'), False),
        (call('{"name": "calculator", "arguments": {}}'), False),
        (call('{"name": "find_it", "arguments": {"query": "a", "place": "b"}}'), False),
        (call('{"name": "calculator", "arguments": {"expression": "a\nb"}}'), False),
        ("<tool_call>", False),
    ],
)
def test_turns_that_the_pattern_allows_have_calls_that_can_be_run(text, allowed):
    tools = [calculator(), SEARCH]
    assert (re.fullmatch(call_pattern(tools), text) is not None) == allowed
    if allowed:
        assert not any(said.startswith("error") for said in answer_calls(tools, text))


def test_tools_of_users_run_under_limits():
    tool = worker_tool("dedent", "Moves left.", {"text": "to move"}, "textwrap:dedent", seconds=20)
    assert answer_calls([tool], call('{"name": "dedent", "arguments": {"text": "  a"}}')) == ["a"]
    wrong = worker_tool("nap", "Sleeps.", {"x": "ignored"}, "time:sleep", seconds=20)
    said = answer_calls([wrong], call('{"name": "nap", "arguments": {"x": "1"}}'))
    assert said[0].startswith("error: nap raised TypeError")


def look_up(word: str, language: str = "en") -> str:
    """Finds a word
    in a dictionary.

    Args:
      word: what to look for.
    """
    if not word:
        raise KeyError(word)
    return f"{word} ({language})"


def add(a: int, b: int) -> int:
    """Adds."""
    return a + b


def silent(x: str) -> str:
    return x


def ready() -> Tool:
    return calculator()


def test_a_function_is_told_by_its_docstring_and_signature():
    (tool,) = make_tools([look_up], seconds=1)
    assert tool.schema() == {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Finds a word in a dictionary.",
            "parameters": {
                "type": "object",
                "properties": {
                    "word": {"type": "string", "description": "what to look for."},
                    "language": {"type": "string", "description": "language"},
                },
                "required": ["word", "language"],
            },
        },
    }
    asked = '{"name": "look_up", "arguments": {"word": "%s", "language": "de"}}'
    assert answer_calls([tool], call(asked % "Rad")) == ["Rad (de)"]
    assert answer_calls([tool], call(asked % ""))[0].startswith("error: look_up raised KeyError")
    made, same = make_tools([ready, retriever(Index(["a"]))], seconds=1)
    assert (made.name, same.name) == ("calculator", "search")


def test_a_function_by_its_path_runs_under_limits(tmp_path, monkeypatch):
    (tmp_path / "tools_of_a_user.py").write_text(
        "import time\n\n\ndef nap(seconds: str) -> str:\n"
        '    """Sleeps."""\n    time.sleep(float(seconds))\n    return "awake"\n'
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tool,) = make_tools(["tools_of_a_user:nap"], seconds=2)
    asked = '{"name": "nap", "arguments": {"seconds": "%s"}}'
    assert answer_calls([tool], call(asked % "0")) == ["awake"]
    assert answer_calls([tool], call(asked % "100")) == ["error: nap ran for more than 2 s"]


def test_functions_that_are_no_tools():
    for tools, said in (
        ([silent], "tool 'silent' has no docstring"),
        ([add], "tool 'add': its parameter a is not a text by name"),
        ([look_up, look_up], "two tools are called look_up"),
        (["textwrap:dedend"], "nearest name is dedent"),
        ([7], "tool 7 is no function"),
    ):
        with pytest.raises(UserError, match=said):
            make_tools(tools, seconds=1)


# Retrieval -----------------------------------------------------------------------------------------

TEXTS = [
    "The cat sat on the mat.",
    "Dogs and cats: a dog, a cat, another cat.",
    "Nothing of interest",
    "the the the the",
    "A mat is a mat",
]


def naive_bm25(texts, query, k1=1.2, b=0.75):
    split = [words(text) for text in texts]
    mean = sum(map(len, split)) / len(split)
    scores = []
    for text in split:
        score = 0.0
        for word in words(query):
            frequency, count = text.count(word), sum(word in other for other in split)
            idf = math.log(1 + (len(texts) - count + 0.5) / (count + 0.5))
            score += idf * frequency * (k1 + 1) / (frequency + k1 * (1 - b + b * len(text) / mean))
        scores.append(score)
    return scores


@pytest.mark.parametrize("query", ["cat", "the cat", "mat mat", "CAT, dog!", "unknown", ""])
def test_bm25_against_a_loop(query):
    np.testing.assert_allclose(Index(TEXTS).scores(query), naive_bm25(TEXTS, query), rtol=1e-12, atol=1e-12)


def test_the_best_texts_come_first():
    assert [text for _, text in Index(TEXTS).search("mat", 2)] == [TEXTS[4], TEXTS[0]]
    assert Index(TEXTS).search("unknown") == []
    with pytest.raises(UserError, match="at least one text"):
        Index([])
    search = retriever(Index(TEXTS), count=1)
    assert answer_calls([search], call('{"name": "search", "arguments": {"query": "cat"}}')) == [TEXTS[1]]
    said = answer_calls([search], call('{"name": "search", "arguments": {"query": "zebra"}}'))
    assert said == ["error: nothing found"]
