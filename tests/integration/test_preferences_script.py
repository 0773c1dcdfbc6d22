"""Pairs from the command line: by rewards, by a judge, and from solutions that are there already."""

import json

import pytest
import tyro

from rlhf_jax.core.errors import UserError
from rlhf_jax.data.pairs import REASONS
from rlhf_jax.data.sources import read_rows
from rlhf_jax.stages import preferences

SMALL = "--data arithmetic:1 --prompt-count 24 --max-new-tokens 8 --batch-size 16 --quiet"
FUNCTIONS = """
def mixed(prompts, completions, **_):
    return [sum(map(ord, text)) % 7 / 7 for text in completions]

def longer(prompts, completions, opponents, **_):
    return [0.5 + 0.5 * ((len(a) > len(b)) - (len(a) < len(b))) for a, b in zip(completions, opponents)]
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pair_functions.py").write_text(FUNCTIONS)
    return "pair_functions"


def run(out, *more):
    words = [*f"--out {out} {SMALL}".split(), *map(str, more)]
    preferences.run(tyro.cli(preferences.Options, args=words))
    rows = [row.fields for row in read_rows(out / "pairs.jsonl")]
    return rows, json.loads((out / "counts.json").read_text())


@pytest.mark.slow
def test_pairs_by_rewards_go_on_after_a_stop_and_train_dpo(
    tmp_path, tiny, talker, functions, stop_within_a_line
):
    words = ["--model", talker, "--rewards", f"{functions}:mixed", "--pairs-per-prompt", 2]
    rows, counts = run(tmp_path / "pairs", *words)
    assert counts["judged"] == len((tmp_path / "pairs" / "judged.jsonl").read_text().split('"prompt"')) - 1
    assert counts["pairs"] + counts["held_out"] + sum(counts[r] for r in REASONS) == counts["judged"]
    assert all(
        row["chosen_score"] > row["rejected_score"] and row["chosen"] != row["rejected"] for row in rows
    )
    # The second batch is missing, and the line behind it is torn: both are made again, as they were.
    judged = tmp_path / "pairs" / "judged.jsonl"
    whole = judged.read_text()
    stop_within_a_line(judged, 1)
    assert run(tmp_path / "pairs", *words) == (rows, counts)
    assert judged.read_text() == whole
    # Cleaning again samples nothing.
    stricter, fewer = run(tmp_path / "pairs", *words, "--min-margin", 0.4)
    assert 0 < len(stricter) < len(rows)
    assert fewer["tie"] > counts["tie"]
    with pytest.raises(UserError, match="pairs made with other temperature"):
        run(tmp_path / "pairs", *words, "--temperature", 0.5)
    tiny.run("dpo", tmp_path / "dpo", "--model", talker, "--data", tmp_path / "pairs" / "pairs.jsonl")


@pytest.mark.slow
def test_pairs_by_a_judge(tmp_path, talker, functions):
    words = ["--model", talker, "--judge", f"{functions}:longer", "--samples-per-prompt", 2]
    rows, counts = run(tmp_path / "pairs", *words)
    assert counts["judged"] == 24
    assert rows
    assert all(len(row["chosen"]) > len(row["rejected"]) for row in rows)
    assert {(row["chosen_score"], row["rejected_score"]) for row in rows} == {(1.0, 0.0)}


def test_pairs_of_solutions(tmp_path):
    lines = [
        {
            "question": f"{n}?",
            "a": {"solution": f"yes {n}", "is_correct": True},
            "b": {"solution": "no", "is_correct": ok},
        }
        for n, ok in enumerate([False] * 30 + [True] * 10)
    ]
    (tmp_path / "solutions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows, counts = run(
        tmp_path / "pairs", "--solutions", tmp_path / "solutions.jsonl", "--held-out-share", 0.3
    )
    assert counts["pairs"] + counts["held_out"] == 30
    assert counts["held_out"] > 0
    assert all(row["chosen"].startswith("yes") for row in rows)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "a", "--solutions", "b"], "give either --model"),
        (["--model", "a", "--samples-per-prompt", 3, "--pairs-per-prompt", 2], "--samples-per-prompt 4"),
        (
            ["--model", "a", "--held-out-share", 1.0],
            "--held-out-share 1 is out of range: give a number from 0 to below 1",
        ),
        (["--model", "a", "--batch-size", 0], "--batch-size 0"),
        (
            ["--model", "a", "--judge", "m:f", "--rewards", "m:g"],
            "--judge and --judge-model exclude --rewards",
        ),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, words, said):
    with pytest.raises(UserError, match=said):
        run(tmp_path / "pairs", *words)
