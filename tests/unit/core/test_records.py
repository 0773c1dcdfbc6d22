"""What a run writes is read back as it was, or named: JSON, lines and arrays, with their digests."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError

ROWS = [{"prompt": "a\u2028b", "n": 1}, {"prompt": "ä", "n": 2}, {"prompt": "\ud800", "n": 3}]
ARRAYS = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "y": np.array(3), "name": np.array("text")}


def one_sentence(refused, path):
    text = str(refused.value)
    assert str(path) in text
    assert "\n" not in text


def test_what_is_written_comes_back(tmp_path):
    files.write_json(tmp_path / "new" / "data.json", {"a": [1, None, float("inf")]})
    assert files.read_json(tmp_path / "new" / "data.json") == {"a": [1, None, float("inf")]}
    files.write_lines(tmp_path / "rows.jsonl", ROWS)
    assert files.read_lines(tmp_path / "rows.jsonl") == ROWS
    files.append_lines(tmp_path / "rows.jsonl", ROWS[:1])
    files.append_lines(tmp_path / "other.jsonl", ROWS[:2])
    files.append_lines(tmp_path / "other.jsonl", [])
    files.append_lines(tmp_path / "other.jsonl", ROWS[2:])
    assert files.read_lines(tmp_path / "rows.jsonl") == [*ROWS, ROWS[0]]
    assert files.read_lines(tmp_path / "other.jsonl") == ROWS
    files.write_arrays(tmp_path / "arrays.npz", ARRAYS)
    found = files.read_arrays(tmp_path / "arrays.npz")
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "arrays.npz",
        "digests.json",
        "new",
        "other.jsonl",
        "rows.jsonl",
    ]


def test_files_of_earlier_versions_are_read(tmp_path):
    (tmp_path / "data.json").write_text("[1]")
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": 2}\n{"a"')
    np.savez(tmp_path / "arrays.npz", **ARRAYS)
    assert files.read_json(tmp_path / "data.json") == [1]
    assert files.read_lines(tmp_path / "rows.jsonl") == [{"a": 1}, {"a": 2}]
    assert (tmp_path / "rows.jsonl").read_text() == '{"a": 1}\n{"a": 2}\n'
    assert files.read_arrays(tmp_path / "arrays.npz")["y"] == 3


def test_what_is_not_there(tmp_path):
    assert files.read_json(tmp_path / "none.json", otherwise=7) == 7
    assert files.read_lines(tmp_path / "none.jsonl") == []
    for read in (files.read_json, files.read_arrays):
        with pytest.raises(files.DamagedFile, match="no such file: run it first") as refused:
            read(tmp_path / "none", remedy="run it first")
        one_sentence(refused, tmp_path / "none")


def grow(path):
    for rows in (ROWS[:2], ROWS[2:]):
        files.append_lines(path, rows)


READERS = {
    "data.json": (
        lambda path: files.write_json(path, {"score": 0.25, "many": list(range(9))}),
        files.read_json,
    ),
    "rows.jsonl": (lambda path: files.write_lines(path, ROWS), files.read_lines),
    "grown.jsonl": (grow, files.read_lines),
    "arrays.npz": (lambda path: files.write_arrays(path, ARRAYS), files.read_arrays),
}


def equal(found, expected):
    if not isinstance(expected, dict) or not any(isinstance(x, np.ndarray) for x in expected.values()):
        return found == expected
    return found.keys() == expected.keys() and all(np.array_equal(found[n], expected[n]) for n in expected)


@pytest.mark.parametrize("name", READERS)
def test_no_flipped_bit_is_believed(tmp_path, name):
    write, read = READERS[name]
    path = tmp_path / name
    write(path)
    expected, whole, named = read(path), path.read_bytes(), 0
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            found = read(path)
        except files.DamagedFile as error:
            named += str(path) in str(error)
        else:  # parts of a zip file mean nothing
            assert name == "arrays.npz"
            assert equal(found, expected)
            named += 1
    assert named == len(whole)


@pytest.mark.parametrize("name", READERS)
def test_no_other_damage_is_believed(tmp_path, name):
    write, read = READERS[name]
    path = tmp_path / name
    write(path)
    whole = path.read_bytes()
    # Behind the lines that were there before the last ones, a kill may have cut a file that grew.
    end = len("".join(json.dumps(row, ensure_ascii=False) for row in ROWS[:2]).encode()) + 2
    cut = [whole[: (end if name == "grown.jsonl" else len(whole)) * part // 9] for part in range(9)]
    twice = [] if name == "arrays.npz" else [whole * 2]  # of two archives the last one counts
    for content in (*cut, *twice, b"[" * 100_000, b"\xff" * 50, b"null"):
        path.write_bytes(content)
        with pytest.raises(files.DamagedFile) as refused:
            read(path, remedy="make it again")
        one_sentence(refused, path)
    path.unlink()
    path.mkdir()
    with pytest.raises(files.DamagedFile, match="make it again"):
        read(path, remedy="make it again")


def test_keys_that_must_be_there(tmp_path):
    (tmp_path / "data.json").write_text('{"config": {}}')
    assert files.read_json(tmp_path / "data.json", keys=("config",))
    for text in ("[]", "3", '{"other": 1}'):
        (tmp_path / "data.json").write_text(text)
        with pytest.raises(files.DamagedFile, match=r"data\.json: damaged \(it has no 'config'\)"):
            files.read_json(tmp_path / "data.json", keys=("config",))
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"b": 1}\n')
    with pytest.raises(files.DamagedFile, match=r"rows\.jsonl:2: damaged \(it has no 'a'\)"):
        files.read_lines(tmp_path / "rows.jsonl", keys=("a",))


def test_digests_that_cannot_be_read_are_named(tmp_path):
    files.write_json(tmp_path / "data.json", {})
    for text in ("{", "[]", '{"data.json": [1]}', '{"data.json": [{"bytes": 1}]}', '{"data.json": 3}'):
        (tmp_path / "digests.json").write_text(text)
        for call in (files.read_json, lambda path: files.write_json(path, {})):
            with pytest.raises(files.DamagedFile, match=r"digests\.json: no digests can be read") as refused:
                call(tmp_path / "data.json")
            one_sentence(refused, tmp_path)
    (tmp_path / "digests.json").unlink()  # which the message says
    assert files.read_json(tmp_path / "data.json") == {}


KILLED = """
import os, signal, sys
from rlhf_jax.core import files
path, events = sys.argv[1], int(sys.argv[2])
def count(event, args):
    global events
    if event in ("open", "os.rename") and str(args[0]).startswith(os.path.dirname(path)):
        events -= 1
        if events == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(count)
files.write_json(path, {"number": 2}) if path.endswith(".json") else files.append_lines(path, [3, 4])
"""


@pytest.mark.parametrize("name", ["data.json", "rows.jsonl"])
def test_a_kill_at_any_moment_leaves_a_file_that_is_believed(tmp_path, name):
    path, seen = tmp_path / name, []
    for event in range(1, 20):
        if name == "data.json":
            files.write_json(path, {"number": 1})
        else:
            path.unlink(missing_ok=True)
            files.forget_digests(tmp_path, name)
            files.append_lines(path, [1, 2])
        command = [sys.executable, "-c", KILLED, str(path), str(event)]
        killed = subprocess.run(command, check=False).returncode == -signal.SIGKILL
        found = files.read_json(path)["number"] if name == "data.json" else len(files.read_lines(path)) // 2
        seen.append(found)
        if not killed:
            break
    assert seen[-1] == 2
    assert seen == sorted(seen)
    assert seen.count(1) >= 3
    assert event >= 5


def test_what_a_kill_left_of_lines_is_cut_off(tmp_path):
    path = tmp_path / "rows.jsonl"
    files.append_lines(path, [{"a": 1}])
    files.append_lines(path, [{"a": 2}, {"a": 3}])
    whole = path.read_bytes()
    for length in range(len(b'{"a": 1}\n'), len(whole)):
        path.write_bytes(whole[:length])
        assert files.read_lines(path) == [{"a": 1}]
        files.append_lines(path, [{"a": 2}, {"a": 3}])
        assert path.read_bytes() == whole


@pytest.mark.parametrize("write", [files.write_json, files.write_text, files.append_lines, files.write_lines])
def test_where_there_is_no_room_a_sentence_says_so(tmp_path, write, monkeypatch):
    data = "x" if write is files.write_text else [1]
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "a", tmp_path / "file" / "b" / "a"):
        with pytest.raises(
            UserError, match=r"cannot be written, as .*file is a file where a folder"
        ) as refused:
            write(path, data)
        one_sentence(refused, path)

    def full(_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\): free") as refused:
        write(tmp_path / "new", data)
    one_sentence(refused, tmp_path / "new")


def test_libraries_that_write_themselves(tmp_path):
    with files.writing(tmp_path / "new" / "a.png") as local:
        assert local.suffix == ".png"
        local.write_bytes(b"picture")
        assert not (tmp_path / "new" / "a.png").exists()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]

    def fails(path):
        with files.writing(path) as local:
            local.write_bytes(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails(tmp_path / "new" / "a.png")
    assert (tmp_path / "new" / "a.png").read_bytes() == b"picture"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="is a file where a folder is meant"),
        files.writing(tmp_path / "file" / "a"),
    ):
        pass


def test_a_folder_is_what_was_written(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    for name in ("a.json", "b.json"):
        (tmp_path / "tokenizer" / name).write_text(json.dumps(name))
    files.check_digests(tmp_path, "tokenizer/")  # nothing is known: all is believed
    files.note_folder(tmp_path, "tokenizer/")
    files.check_digests(tmp_path, "tokenizer/")
    (tmp_path / "tokenizer" / ".DS_Store").write_text("")
    files.check_digests(tmp_path, "tokenizer/")
    (tmp_path / "tokenizer" / "c.jinja").write_text("")
    with pytest.raises(files.DamagedFile, match=r"c\.jinja: the run did not write this file"):
        files.check_digests(tmp_path, "tokenizer/")
    (tmp_path / "tokenizer" / "c.jinja").unlink()
    (tmp_path / "tokenizer" / "b.json").unlink()
    with pytest.raises(files.DamagedFile, match=r"b\.json: the file is gone"):
        files.check_digests(tmp_path, "tokenizer/")
    files.forget_digests(tmp_path, "tokenizer/")
    files.check_digests(tmp_path, "tokenizer/")
