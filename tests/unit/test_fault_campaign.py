"""A share of the campaign of faults, and its bookkeeping. The whole is `python tools/faults.py`."""

import errno
import json
import random
import shutil
import signal

import fault_server
import faults
import faults_in_runs
import pytest

IN_PROCESS = [
    "rows",
    "command_lines",
    "extremes",
    "rewards",
    "servers",
    "checkpoints_of_others",
    "tokenizers",
    "judges",
    "tools",
    "tables",
    "adapters_of_others",
]


@pytest.mark.parametrize("name", IN_PROCESS)
def test_what_is_drawn_is_right_or_one_sentence(tmp_path, name):
    campaign = faults.Campaign(tmp_path, 20, [name])
    campaign.run(60, cases=25 if name != "servers" else 8)
    assert [case for case in campaign.found if case["outcome"] != "right"] == []
    ((_, tried, right, unexplained, silent),) = campaign.table()
    assert tried == right > 5
    assert unexplained == silent == 0


def test_a_campaign_goes_on_where_it_was_stopped(tmp_path):
    whole = faults.Campaign(tmp_path / "whole", 1, ["rows", "rewards"])
    whole.run(60, cases=6)
    first = faults.Campaign(tmp_path / "parts", 1, ["rows", "rewards"])
    first.run(60, cases=2)
    with open(tmp_path / "parts" / "cases.jsonl", "a", encoding="utf-8") as file:
        file.write('{"kind": "ro')  # killed in the middle of a line
    second = faults.Campaign(tmp_path / "parts", 1, ["rows", "rewards"])
    second.run(60, cases=6)

    def by_kind(path):
        lines = map(json.loads, (path / "cases.jsonl").read_text().splitlines())
        return sorted((line["kind"], line["number"], line["what"], line["outcome"]) for line in lines)

    assert by_kind(tmp_path / "parts") == by_kind(tmp_path / "whole")


def test_a_case_of_several_faults_counts_as_many(tmp_path, monkeypatch):
    several = lambda world, rng, scratch: ("killed 3 times", "right", "", 3)  # noqa: E731
    monkeypatch.setitem(faults.fault_world.KINDS, "several", several)
    campaign = faults.Campaign(tmp_path, 0, ["several"])
    campaign.run(60, cases=2)
    assert campaign.table() == [("several", 6, 6, 0, 0)]
    assert faults.Campaign(tmp_path, 0, ["several"]).table() == [("several", 6, 6, 0, 0)]


def test_a_finding_is_counted_and_told(tmp_path, monkeypatch):
    def broken(world, rng, scratch):
        raise ZeroDivisionError

    monkeypatch.setitem(faults.fault_world.KINDS, "broken", broken)
    campaign = faults.Campaign(tmp_path, 0, ["broken", "rewards"])
    campaign.run(60, cases=2)
    assert campaign.table() == [("broken", 2, 0, 2, 0), ("rewards", 2, 2, 0, 0)]
    page = faults.page(campaign, faults.counted(None, campaign))
    assert "| broken | 2 | 0 | 2 | 0 |" in page
    assert "| all | 4 | 2 | 2 | 0 |" in page
    assert "`broken:0` unexplained" in page
    assert "ZeroDivisionError" in page


def test_counts_of_other_seeds_are_added(tmp_path):
    tally, again = tmp_path / "faults.json", faults.Campaign(tmp_path / "5", 5, ["rewards"])
    for seed, cases in ((4, 2), (5, 3)):
        campaign = faults.Campaign(tmp_path / str(seed), seed, ["rewards"])
        campaign.run(60, cases=cases)
        seeds = faults.counted(tally, campaign)
    assert list(seeds) == ["4", "5"] == list(json.loads(tally.read_text()))
    assert faults.total(seeds) == [("rewards", 5, 5, 0, 0)]
    assert "| 5 | 5 | 0 | 0 |" in faults.page(campaign, seeds)
    again.run(60, cases=4)
    assert faults.total(faults.counted(tally, again)) == [
        ("rewards", 6, 6, 0, 0)
    ]  # its own are not added twice


def test_what_changes_in_silence_is_found(tmp_path, monkeypatch):
    """A judge that never fails would say nothing of what it judges."""
    judged = faults.fault_world.judged
    assert judged(lambda: 1, 1)[0] == "right"
    assert judged(lambda: 2, 1)[0] == "silent"
    assert judged(lambda: 1 / 0)[0] == "unexplained"
    assert judged(lambda: random.Random(0).sample([], 1))[0] == "unexplained"
    assert not faults_in_runs.fits(1, "Traceback (most recent call last):")
    assert not faults_in_runs.fits(1, "")


@pytest.mark.slow
@pytest.mark.skipif(not fault_server.HAS_COMPILER, reason="the shim is compiled")
def test_a_fault_is_at_the_change_that_was_asked_for(tmp_path):
    """The server's own promise: counted from 1, the same in every run, and felt by the command."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "1+1=?", "completion": "2 and more words"}) + "\n")
    server, out = fault_server.Server(tmp_path / "server"), tmp_path / "out"
    words = ["clean", "--quiet", "--data", str(rows), "--out", str(out)]
    code, said, calls = server.run(words, below=out)
    assert (code, said) == (0, "")
    assert calls > 20
    shutil.rmtree(out)
    code, said, _ = server.run(words, below=out, at=calls + 1, how=errno.ENOSPC)
    assert (code, said) == (0, "")
    shutil.rmtree(out)
    code, said, _ = server.run(words, below=out, at=1, how=errno.EROFS, lasting=True)
    assert code == 2
    assert "Read-only file system" in said
    assert not out.exists()
    assert server.run(words, below=out, at=calls // 2, how=-signal.SIGKILL)[0] == -signal.SIGKILL
    assert out.exists()
    server.close()


@pytest.mark.slow
def test_files_and_processes(tmp_path):
    """Kills, signals, two processes, full disks, and every kind of damage to files, for two minutes."""
    campaign = faults.Campaign(tmp_path, 7, [])
    campaign.run(120)
    assert [case for case in campaign.found if case["outcome"] != "right"] == []
