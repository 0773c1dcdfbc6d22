import json
import os
import re

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings, strategies as st

from rlhf_jax.core.errors import UserError
from rlhf_jax.data.sources import read_rows

GOOD = b'{"prompt": "a"}\n'


def write(folder, content, name="data.jsonl"):
    path = folder / name
    path.write_bytes(content)
    return path


def refusal(spec):
    """The one sentence with which reading is refused."""
    with pytest.raises(UserError) as caught:
        read_rows(spec)
    sentence = str(caught.value)
    assert "\n" not in sentence
    sentence.encode("utf-8")  # printable: no lone surrogate in it
    return sentence


# After one good row, so that each must be found in line 2.
MALFORMED = {
    "no object": (b"nonsense", "not JSON"),
    "bare string": (b'"text"', "not a JSON object"),
    "bare number": (b"3", "not a JSON object"),
    "null": (b"null", "not a JSON object"),
    "true": (b"true", "not a JSON object"),
    "array": (b'[{"a": 1}]', "not a JSON object"),
    "open object": (b'{"a": 1', "not JSON"),
    "open string": (b'{"a": "x', "not JSON"),
    "open array": (b'{"a": [1, 2', "not JSON"),
    "lone brace": (b"{", "not JSON"),
    "lone closing brace": (b"}", "not JSON"),
    "mismatched": (b'{"a": [1, 2}', "not JSON"),
    "trailing comma": (b'{"a": 1,}', "not JSON"),
    "trailing comma in array": (b'{"a": [1,]}', "not JSON"),
    "leading comma": (b'{,"a": 1}', "not JSON"),
    "comma after": (b'{"a": 1},', "more after"),
    "two objects": (b'{"a": 1} {"b": 2}', "more after"),
    "text after": (b'{"a": 1} # note', "more after"),
    "comment": (b'{"a": 1 /* note */}', "not JSON"),
    "comment line": (b"// note", "not JSON"),
    "single quotes": (b"{'a': 1}", "not JSON"),
    "bare key": (b"{a: 1}", "not JSON"),
    "number key": (b"{1: 1}", "not JSON"),
    "no colon": (b'{"a" 1}', "not JSON"),
    "no value": (b'{"a": }', "not JSON"),
    "no comma": (b'{"a": 1 "b": 2}', "not JSON"),
    "python": (b'{"a": None}', "not JSON"),
    "python true": (b'{"a": True}', "not JSON"),
    "undefined": (b'{"a": undefined}', "not JSON"),
    "NaN": (b'{"a": NaN}', "NaN is not JSON"),
    "NaN within": (b'{"a": {"b": [1, NaN]}}', "NaN is not JSON"),
    "infinity": (b'{"a": Infinity}', "Infinity is not JSON"),
    "minus infinity": (b'{"a": -Infinity}', "-Infinity is not JSON"),
    "number too large": (b'{"a": 1e999}', "too large"),
    "digits": (b'{"a": ' + b"9" * 5000 + b"}", "cannot|can be read"),
    "leading zero": (b'{"a": 01}', "not JSON"),
    "plus": (b'{"a": +1}', "not JSON"),
    "hexadecimal": (b'{"a": 0x1}', "not JSON"),
    "point": (b'{"a": .5}', "not JSON"),
    "duplicate key": (b'{"a": 1, "b": 2, "a": 3}', "field 'a' stands twice"),
    "duplicate key within": (b'{"a": {"b": 1, "b": 1}}', "field 'b' stands twice"),
    "duplicate key in list": (b'{"a": [{"b": 1, "b": 1}]}', "field 'b' stands twice"),
    "high surrogate": (b'{"a": "x\\ud800"}', "field 'a' holds a lone surrogate"),
    "low surrogate": (b'{"a": "\\udc00x"}', "field 'a' holds a lone surrogate"),
    "reversed pair": (b'{"a": "\\udc00\\ud800"}', "lone surrogate"),
    "surrogate in list": (b'{"a": ["b", ["\\udfff"]]}', "field 'a' holds a lone surrogate"),
    "surrogate in message": (b'{"m": [{"content": "\\ud83d"}]}', "field 'content' holds a lone surrogate"),
    "surrogate key": (b'{"\\ud800": 1}', "lone surrogate"),
    "encoded surrogate": (b'{"a": "\xed\xa0\x80"}', "byte 8 of the line is not UTF-8"),
    "latin-1": (b'{"a": "\xe9"}', "not UTF-8"),
    "overlong": (b'{"a": "\xc0\x80"}', "not UTF-8"),
    "cut character": (b'{"a": "\xe6\x97"}', "not UTF-8"),
    "utf-16": ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
    "binary": (bytes(range(128, 256)), "not UTF-8"),
    "null bytes": (b"\x00\x00", "not JSON"),
    "tab in string": (b'{"a": "x\ty"}', "not JSON"),
    "bad escape": (b'{"a": "\\x41"}', "not JSON"),
    "bad unicode escape": (b'{"a": "\\u12g4"}', "not JSON"),
    "second byte order mark": (b"\xef\xbb\xbf{}", "not JSON"),
    "other space": ("\u2003{}".encode(), "not JSON"),
    "deep": (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "deep objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
    "html": (b"<html>404</html>", "not JSON"),
    "csv": (b"prompt,completion", "not JSON"),
}


@pytest.mark.parametrize(("line", "message"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_lines_are_named(line, message, tmp_path):
    for ending in (b"", b"\n", b"\r\n" + GOOD):
        path = write(tmp_path, GOOD + line + ending)
        sentence = refusal(path)
        assert sentence.startswith(f"{path}:2: ")
        assert re.search(message, sentence)
        assert ";" in sentence  # and how to mend it


def test_there_are_many_malformed_lines():
    assert len(MALFORMED) >= 40
    assert len({line for line, _ in MALFORMED.values()}) == len(MALFORMED)


def test_rows_and_where(tmp_path):
    text = '\ufeff{"a": 1}\r\n\n  {"a": "\u2028 \\ud83d\\ude00 \\u0000"}\n\t\n{"a": [null, {"b": 1e3}]}'
    path = write(tmp_path, text.encode())
    rows = read_rows(str(path))
    assert [row.fields for row in rows] == [
        {"a": 1},
        {"a": "\u2028 \U0001f600 \0"},
        {"a": [None, {"b": 1000.0}]},
    ]
    assert [row.where for row in rows] == [f"{path}:{line}" for line in (1, 3, 5)]


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abé\u2028", max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
json_rows = st.lists(
    st.dictionaries(st.text("abé\u2028", max_size=3), json_values, max_size=4), min_size=1, max_size=4
)


@settings(max_examples=60, deadline=None)
@given(rows=json_rows, ascii_only=st.booleans(), indent=st.sampled_from([None, 2]))
def test_what_json_writes_is_read(tmp_path_factory, rows, ascii_only, indent):
    folder = tmp_path_factory.mktemp("rows")
    lines = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    array = json.dumps(rows, ensure_ascii=ascii_only, indent=indent)
    for content, name in ((lines, "a.jsonl"), (lines, "a.json"), (array, "b.json")):
        assert [row.fields for row in read_rows(write(folder, content.encode(), name))] == rows


def test_rows_of_an_array_know_their_lines(tmp_path):
    path = write(tmp_path, b'\n[{"a": 1},\n\n{"a":\n 2}\n, {"a": 3}]\n', "data.json")
    rows = read_rows(path)
    assert [(row.fields["a"], row.where) for row in rows] == [
        (1, f"{path}:2"),
        (2, f"{path}:4"),
        (3, f"{path}:6"),
    ]


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (b'[{"a": 1},\n 3]', 2, "not a JSON object"),
        (b'[{"a": 1},\n{"a": NaN}]', 2, "NaN"),
        (b'[{"a": 1},\n{"a": 1, "a": 2}]', 2, "twice"),
        (b'[{"a": 1},\n{"a": "\xe9"}]', 2, "UTF-8"),
        (b'[{"a": 1}\n{"a": 1}]', 1, "comma"),
        (b'[{"a": 1},\n]', 2, "not JSON"),
        (b'[{"a": 1}', 1, "comma or ]"),
        (b'[{"a": 1}]\nmore', 2, "after the end"),
        (b"[", 1, "not JSON"),
        (b'{"a":\n 1}', 1, "not JSON"),
    ],
)
def test_malformed_arrays(content, line, message, tmp_path):
    path = write(tmp_path, content, "data.json")
    sentence = refusal(path)
    assert sentence.startswith(f"{path}:{line}: ")
    assert message in sentence


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", b""), ("a.jsonl", b"\n \n\r\n"), ("a.json", b"[ ]"), ("a.json", b"")]
)
def test_empty_files(name, content, tmp_path):
    assert "the data set is empty" in refusal(write(tmp_path, content, name))


def test_paths(tmp_path):
    write(tmp_path, GOOD, "train.jsonl")
    assert refusal(tmp_path / "trian.jsonl").endswith(f"did you mean {tmp_path / 'train.jsonl'}?")
    assert "check the path" in refusal(tmp_path / "nowhere" / "x.jsonl")
    assert "a folder, not a file" in refusal(tmp_path)
    for name in ("data.csv", "data", "data.jsonl.gz"):
        assert "cannot read a file of this kind" in refusal(write(tmp_path, GOOD, name))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_permission(tmp_path):
    path = write(tmp_path, GOOD)
    path.chmod(0)
    assert "cannot be read (Permission denied)" in refusal(path)


# Parquet --------------------------------------------------------------------------------------------


def write_parquet(folder, **columns):
    path = folder / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_parquet(tmp_path):
    messages = [[{"role": "user", "content": "é"}], [{"role": "user", "content": "b"}]]
    path = write_parquet(tmp_path, messages=messages, n=[1, None], raw=[b"x", b"\xc3\xa9"], f=[0.5, 2.0])
    rows = read_rows(path)
    assert [row.fields for row in rows] == [
        {"messages": messages[0], "n": 1, "raw": "x", "f": 0.5},
        {"messages": messages[1], "n": None, "raw": "é", "f": 2.0},
    ]
    assert [row.where for row in rows] == [f"{path}:row 1", f"{path}:row 2"]


def test_bad_parquet(tmp_path):
    assert "row 2: field 'a' is nan" in refusal(write_parquet(tmp_path, a=[1.0, float("nan")]))
    assert "row 1: field 'a' is inf" in refusal(write_parquet(tmp_path, a=[[1.0, float("inf")]]))
    assert "row 2: field 'a' is not UTF-8" in refusal(write_parquet(tmp_path, a=[b"x", b"\xff"]))
    assert "the data set is empty" in refusal(write_parquet(tmp_path, a=pyarrow.array([], pyarrow.int32())))
    assert "not a Parquet file" in refusal(write(tmp_path, GOOD, "other.parquet"))
    assert "not a Parquet file" in refusal(write(tmp_path, b"", "empty.parquet"))
    path = write_parquet(tmp_path, a=["x" * 100] * 50)
    path.write_bytes(path.read_bytes()[:-20])
    assert "not a Parquet file" in refusal(path)


def test_a_bit_of_a_parquet_file_never_ends_in_a_traceback(tmp_path):
    path, refused = write_parquet(tmp_path, a=["x", "é"], b=[[1], None]), []
    whole = path.read_bytes()
    for place in range(0, len(whole), 2):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            read_rows(path)
        except UserError as error:
            refused.append(str(error))
    assert len(refused) > 10
    assert not any("\n" in text for text in refused)


# tensorflow-datasets --------------------------------------------------------------------------------


class RowsForTests(tfds.core.GeneratorBasedBuilder):
    """Two splits of rows, with nested messages."""

    VERSION = tfds.core.Version("1.2.0")
    url_infos = None

    def _info(self):
        text = tfds.features.Text()
        messages = tfds.features.Sequence({"role": text, "content": text})
        features = {
            "question": text,
            "n": np.int64,
            "messages": messages,
            "tags": tfds.features.Sequence(text),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(3), "held-out": self._generate_examples(1)}

    def _generate_examples(self, count):
        for number in range(count):
            messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hö"}]
            yield number, {"question": f"é{number}", "n": number, "messages": messages, "tags": ["x", "y"]}


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    return tmp_path


def test_tfds_rows(prepared, capsys):
    rows = read_rows("tfds:rows_for_tests")
    assert len(rows) == 3
    assert rows[2].where == "tfds:rows_for_tests:row 3"
    assert rows[2].fields == {
        "question": "é2",
        "n": 2,
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hö"}],
        "tags": ["x", "y"],
    }
    assert len(read_rows("tfds:rows_for_tests:held-out")) == 1
    assert len(read_rows("tfds:rows_for_tests:1.2.0:train[1:]")) == 2


def test_bad_tfds_names(prepared, capsys):
    assert refusal("tfds:rows_for_test").endswith("did you mean tfds:rows_for_tests?")
    assert "not a data set's name" in refusal("tfds:")
    assert "split 'nope' cannot be read" in refusal("tfds:rows_for_tests:nope")


def test_the_real_rows_where_they_are_at_hand():
    folder = os.path.join(os.path.dirname(__file__), *[".."] * 4, "shared", "data", "gsm8k")
    if not os.path.isdir(folder):
        pytest.skip("../shared/data is absent")
    rows = read_rows(os.path.join(folder, "test.jsonl"))
    assert len(rows) == 800
    assert all("####" in row.fields["answer"] for row in rows)
