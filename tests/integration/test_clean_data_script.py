"""rlhf_jax/stages/clean.py: rows in, rows out, and a report that accounts for every row."""

import json

import pytest

from rlhf_jax.core.errors import UserError
from rlhf_jax.data.sources import read_rows
from rlhf_jax.stages import clean

QUESTION = "Janet has sixteen eggs and eats three of them, how many eggs are left for her friends?"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path):
    first = [
        {"question": "How many days has a week?", "answer": "It has 7 days."},
        {"question": "How many days has  a week?", "answer": "It has 7 days."},
        {"question": "Broken", "answer": ""},
        {"question": "Again: " + QUESTION.upper(), "answer": "13"},
    ]
    second = [{"prompt": "Say <b>hi</b>.", "completion": "hi", "source": "elsewhere"}]
    return write(tmp_path / "a.jsonl", first), write(tmp_path / "b.jsonl", second)


def test_every_row_is_kept_or_accounted_for(files, tmp_path):
    bench = write(tmp_path / "bench.jsonl", [{"question": QUESTION, "answer": "13"}])
    out = tmp_path / "out"
    clean.run(clean.Options(out=out, data=files, benchmarks=(bench,), quiet=True))
    kept = [row.fields for row in read_rows(out / "rows.jsonl")]
    assert [row["source"] for row in kept] == [files[0], "elsewhere"]
    dropped = [row.fields for row in read_rows(out / "dropped.jsonl")]
    seen = {d["where"].rpartition(":")[2]: d["reason"] for d in dropped}
    assert seen == {"2": "exact duplicate", "3": "format", "4": "contaminated"}
    report = json.loads((out / "report.json").read_text())
    assert (report["rows"], report["kept"]) == (5, 2)
    assert report["sources"][files[1]] == {"kept": 1}
    page = (out / "report.html").read_text()
    assert "2 of 5 rows kept" in page
    assert f"{files[0]}:4" in page
    assert "<script" not in page


def test_mistakes_are_one_sentence_with_the_place(files, tmp_path):
    with pytest.raises(UserError, match="give --data"):
        clean.run(clean.Options(out=tmp_path / "out"))
    with pytest.raises(UserError, match=r"none of 1 rows is left \(1 too long\)"):
        clean.run(
            clean.Options(
                out=tmp_path / "out", data=files[1:], limits=clean.Limits(longest_answer=1), quiet=True
            )
        )
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"question": "q", "answer": NaN}\n')
    with pytest.raises(UserError, match=r"broken\.jsonl:1: NaN is not JSON"):
        clean.run(clean.Options(out=tmp_path / "out", data=(str(broken),)))
    empty = write(tmp_path / "empty.jsonl", [{"words": "w"}])
    with pytest.raises(UserError, match=r"empty\.jsonl:1: "):
        clean.run(clean.Options(out=tmp_path / "out", data=files[1:], benchmarks=(empty,)))
