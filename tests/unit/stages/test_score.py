"""`rlhf score` as a user meets it."""

import json
import math
import pathlib
import sys

import numpy as np
import pytest

from rlhf_jax.cli.commands import main


@pytest.fixture
def score(monkeypatch, capsys, tmp_path):
    """Runs the command line on rows; returns what it prints, or the error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)

    def run(rows, *words, fails=False):
        pathlib.Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        line = ["score", "--data", "rows.jsonl", "--resamples", "50", *words]
        if fails:
            with pytest.raises(SystemExit, match="2"):
                main(line)
            return capsys.readouterr().err
        main(line)
        return capsys.readouterr().out

    return run


def test_texts_of_two_systems(score):
    said = ["a b c d e", "one two three four five", "x y z"]
    rows = [{"ours": {"text": text}, "theirs": text[:-2], "right": [text, "none"]} for text in said]
    words = ["--systems", "theirs", "ours.text", "--reference", "right", "--metrics", "bleu", "rougeL"]
    found = json.loads(score(rows, *words, "--json"))
    assert found["values"]["rougeL"]["ours.text"]["mean"] == 1
    assert found["values"]["bleu"]["theirs"]["mean"] < 1
    difference = found["differences"]["rougeL"]["ours.text"]
    assert difference["difference"]["mean"] > 0
    shown = score(rows, *words, "--plot", "scores.png")
    assert "Difference to theirs" in shown
    assert pathlib.Path("scores.png").stat().st_size > 1000


def test_scores_pools_and_preferences(score):
    chances = [0.9, 0.8, 0.3, 0.6, 0.1, 0.2]
    pools = [[chance > 0.5, False, True] + [False] * (chance > 0.25) for chance in chances]
    rows = [{"chance": c, "true": c > 0.5, "pool": pool} for c, pool in zip(chances, pools, strict=True)]
    ranked = ["--systems", "chance", "--reference", "true", "--metrics", "auc", "average_precision", "f1"]
    values = json.loads(score(rows, *ranked, "--json"))["values"]
    assert {name: by["chance"]["mean"] for name, by in values.items()} == dict.fromkeys(values, 1.0)
    pooled = json.loads(score(rows, "--systems", "pool", "--metrics", "pass@1", "pass@2", "--json"))["values"]
    # Three rows of two right among four, one of one among four, two of one among three.
    first = [1 - math.comb(n - c, 1) / n for n, c in [(4, 2)] * 3 + [(4, 1)] + [(3, 1)] * 2]
    assert pooled["pass@1"]["pool"]["mean"] == pytest.approx(sum(first) / 6)
    assert pooled["pass@2"]["pool"]["mean"] > pooled["pass@1"]["pool"]["mean"]
    wins = json.loads(score(rows, "--systems", "chance", "--metrics", "win_rate", "--json"))["values"]
    assert wins["win_rate"]["chance"]["mean"] == pytest.approx(sum(chances) / 6)


def test_wins_that_length_explains_are_no_wins(score):
    """A judge that asks for length alone: at equal length neither wins."""
    longer = np.linspace(-2, 3, 200)
    wins = 1 / (1 + np.exp(-np.tanh(longer / longer.std())))
    rows = [{"chance": float(w), "longer": float(x)} for w, x in zip(wins, longer, strict=True)]
    names = ("--metrics", "win_rate", "length_controlled_win_rate", "--reference", "longer", "--json")
    found = json.loads(score(rows, "--systems", "chance", *names))["values"]
    assert found["win_rate"]["chance"]["mean"] > 0.53
    assert found["length_controlled_win_rate"]["chance"]["mean"] == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--systems a --metrics blue", "there is no such metric"),
        ("--systems a --metrics bleu", "needs --reference"),
        ("--systems a --metrics bleu --reference b", "need texts"),
        ("--systems c --metrics mean", "field 'c' is missing"),
        ("--systems b --metrics pass@2", "needs a list of 2 verdicts"),
        ("--systems a --metrics win_rate", "must be a number"),
        ("--systems b --metrics auc --reference b", "true or false"),
        ("--systems b b --metrics mean", "names a field twice"),
    ],
)
def test_mistakes_are_one_sentence(score, words, message):
    error = score([{"a": "text", "b": 0.5}], *words.split(), fails=True)
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
