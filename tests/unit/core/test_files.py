"""Paths, and files that are written whole, on a disk; object stores have a test of their own."""

import errno
import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError


def test_local_paths_stay_what_they_are(tmp_path):
    for text in ("a/b", "/a/b", "a:b", "tfds:name"):
        assert files.as_path(text) == pathlib.Path(text)
        assert not files.is_remote(text)
    assert files.as_path(tmp_path) is tmp_path


@pytest.mark.parametrize("made", [str, pathlib.Path], ids=["text", "path"])
def test_a_tilde_is_the_home_folder(made, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.as_path(made("~/runs/x")) == tmp_path / "runs" / "x"
    assert files.as_path(made("~")) == tmp_path
    for other in ("~nobody_of_that_name/x", "a/~/x", "a~"):
        assert files.as_path(made(other)) == pathlib.Path(other)
    files.write_json(made("~/x.json"), [1])
    assert (tmp_path / "x.json").is_file()
    assert files.exists(made("~/x.json"))


def test_an_empty_path_is_not_the_folder_one_happens_to_be_in():
    for function in (files.as_path, files.exists, files.read_bytes):
        with pytest.raises(UserError, match=r"^the path is empty: name a file or a folder"):
            function("")


@pytest.mark.parametrize("made", [str, pathlib.Path], ids=["text", "path"])
def test_addresses_survive_being_parsed_as_local_paths(made):
    path = files.as_path(made("s3://bucket/run"))
    assert str(path / "config.json") == "s3://bucket/run/config.json"
    assert files.as_path(path) == path
    assert files.is_remote(made("s3://bucket/run"))


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("memory://x", "gs://, s3://, az://"),
        ("hdfs://host/x", "give a local path"),
        ("s3://", "names no bucket"),
        ("az://bucket/x", "pip install adlfs"),
    ],
)
def test_other_addresses_are_refused_in_a_sentence_and_make_no_folder(address, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if importlib.util.find_spec("adlfs") and address.startswith("az"):
        pytest.skip("the package is here")
    for given in (address, pathlib.Path(address)):
        with pytest.raises(UserError, match=words) as error:
            files.write_whole(given, "x")
        assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file.txt"
    files.write_whole(path, "ä\u2028")
    assert path.read_bytes() == "ä\u2028".encode()
    assert files.read_text(path) == "ä\u2028"

    def disk_full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", disk_full)
        with pytest.raises(OSError, match="No space"):
            files.write_whole(path, b"other")
    assert files.read_text(path) == "ä\u2028"
    assert files.list_files(tmp_path) == ["new/file.txt"]


KILLED = """
import os, signal, sys
from rlhf_jax.core import files
events = int(sys.argv[2])
def count(event, args):
    global events
    if event in ("open", "os.rename") and str(args[0]).startswith(sys.argv[1]):
        events -= 1
        if events == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(count)
files.write_whole(sys.argv[1] + "/file", b"new" * 1000)
"""


@pytest.mark.parametrize("event", [1, 2, 3, 4])
def test_a_kill_leaves_the_old_file_or_the_new_one(tmp_path, event):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(event)]
    killed = subprocess.run(command, check=False).returncode == -9
    assert path.read_bytes() == (b"old" if killed and event <= 2 else b"new" * 1000)
    assert killed == (event <= 3)


def test_a_name_too_long_for_the_system_is_one_of_no_file(tmp_path):
    for path in (tmp_path / ("a" * 300), tmp_path / ("a/" * 3000), tmp_path / "a\0b"):
        assert not files.exists(path)
        assert not files.is_file(path)
        assert not files.is_folder(path)


def test_what_is_not_there(tmp_path):
    assert files.list_folder(tmp_path / "none") == []
    assert not files.exists(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        files.read_bytes(tmp_path / "none")
    files.remove_file(tmp_path / "none")
    files.remove_tree(tmp_path / "none")
