"""The comparison of searches, from its command line."""

import json

import common
import numpy as np
import process_reward
import pytest
import search as script
import tyro

from rlhf_jax.core.errors import UserError

_TINY = "--prompts 6 --samples 3 --batch-size 4 --max-new-tokens 12 --resamples 4 --quiet "
_TINY += "--search.ways 2 --search.votes 2 --search.expansions 3 --search.simulations 1 --search.depth 2 "
_TINY += "--search.step-length 6"


def run(out, *more):
    words = f"--out {out} {_TINY}".split()
    script.run(tyro.cli(script.Options, args=[*words, *map(str, more)]))
    return json.loads((out / "results.json").read_text())


def test_a_policy_alone_and_its_resume(tiny, tmp_path):
    sft = tiny.finished("sft")
    found = run(tmp_path / "run", "--init", sft)
    assert set(found["methods"]) == {"greedy", "tree of thoughts, votes"}
    assert (tmp_path / "run" / "search.png").stat().st_size > 10_000
    for row in found["table"]:
        assert 0 <= row["accuracy"]["low"] <= row["accuracy"]["high"] <= 1
        assert row["tokens"] > 0
        assert "best_of_n" not in row
    with np.load(tmp_path / "run" / "pool.npz") as pool:
        assert pool["answers"].shape == (6, 3)
    with pytest.raises(UserError, match="already holds a comparison"):
        run(tmp_path / "run", "--init", sft)
    with pytest.raises(UserError, match="another samples"):
        run(tmp_path / "run", "--init", sft, "--resume", "--samples", 5)
    # What was searched before the stop is read, the rest is done again, to the same result.
    stored = json.loads((tmp_path / "run" / "results.json").read_text())
    del stored["methods"]["tree of thoughts, votes"]
    (tmp_path / "run" / "results.json").write_text(json.dumps(stored))
    assert run(tmp_path / "run", "--init", sft, "--resume")["methods"] == found["methods"]


@pytest.mark.slow
def test_every_method(tiny, tmp_path):
    sft = tiny.finished("sft")
    words = ["--row-count", 64, "--eval-count", 16, "--batch-size", 8, "--steps", 4, "--quiet", "--no-report"]
    for name, more in (("prm", []), ("orm", ["--outcome"])):
        args = ["--out", tmp_path / name, "--init", sft, "--optimizer.warmup-steps", 2, *words, *more]
        process_reward.run(tyro.cli(process_reward.Options, args=[str(arg) for arg in args]))
    judges = ("--process-reward", tmp_path / "prm", "--outcome-reward", tmp_path / "orm")
    found = run(tmp_path / "run", "--init", sft, *judges)
    assert len(found["methods"]) == 1 + len(script.METHODS)
    assert len(found["accuracy_against_n"]) == len(script.CURVES)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--samples", 0], "--samples 0 is not positive"),
        (["--search.ways", 0], "--search.ways 0 is not positive"),
        (["--search.thoughts", 3], "odd"),
        (["--temperature", 0], "equal samples"),
    ],
)
def test_bad_options(tmp_path, words, said):
    with pytest.raises(UserError, match=said):
        run(tmp_path / "run", "--init", tmp_path, *words)


def test_accuracy_at_a_number_of_tokens():
    curve = np.array([[0.0, 0.5, 1.0]])
    for tokens, expected in ((5, 0.0), (10, 0.0), (15, 0.25), (20, 0.5), (30, 1.0), (99, 1.0)):
        assert script.at_tokens(curve, 10.0, tokens)[0] == pytest.approx(expected)


def test_help_shows_every_option(tiny, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "110")
    for stage, options in (("search", script.Options(init="x")), ("alphazero", None)):
        assert tiny.main(stage, ["--help"], monkeypatch) == 0
        shown = capsys.readouterr().out
        if options is None:
            import alphazero

            options = alphazero.Options()
        for flag in common.flags(common.to_json(options)):
            assert flag in shown, flag
