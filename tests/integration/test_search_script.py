"""The comparison of searches, from its command line."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import search_accuracy as accuracy
import tyro

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.files import write_json
from rlhf_jax.search import interface
from rlhf_jax.stages import option_checks, process_reward, search as script

_TINY = (
    "--data arithmetic:1 --prompts 6 --samples 3 --batch-size 4 --max-new-tokens 12 --resamples 4 --quiet "
)
_TINY += "--search.branching-factor 2 --search.num-votes 2 --search.expansions 3 "
_TINY += "--search.num-simulations 1 --search.depth 2 "
_TINY += "--search.step-length 6"


def run(out, *more):
    words = f"--out {out} {_TINY}".split()
    script.run(tyro.cli(script.Options, args=[*words, *map(str, more)]))
    return json.loads((out / "results.json").read_text())


TRACED = []


def by_looking_up(options, tools, roots, key):
    """A search that is compiled at once: nothing is written."""
    TRACED.append(roots.tokens.shape)
    return interface.SearchResult(roots, roots.logp, ~roots.done, jnp.ones(roots.done.shape))


@pytest.mark.slow
def test_a_policy_alone_and_its_resume(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "METHODS", {"looked up": (by_looking_up, "")})
    sft = tiny.finished("sft")
    found = run(tmp_path / "run", "--model", sft)
    assert set(found["methods"]) == {"greedy", "looked up"}
    assert len(TRACED) == 1  # two batches, one program
    assert (tmp_path / "run" / "search.svg").stat().st_size > 10_000
    for row in found["table"]:
        assert 0 <= row["accuracy"]["low"] <= row["accuracy"]["high"] <= 1
        assert row["tokens"] > 0
        assert "best_of_n" not in row
    with np.load(tmp_path / "run" / "pool.npz") as pool:
        assert pool["answers"].shape == (6, 3)
    with pytest.raises(UserError, match="already holds a comparison"):
        run(tmp_path / "run", "--model", sft)
    with pytest.raises(UserError, match="another samples"):
        run(tmp_path / "run", "--model", sft, "--resume", "--samples", 5)
    # What was searched before the stop is read, the rest is done again, to the same result.
    stored = json.loads((tmp_path / "run" / "results.json").read_text())
    del stored["methods"]["looked up"]
    write_json(tmp_path / "run" / "results.json", stored)
    assert run(tmp_path / "run", "--model", sft, "--resume")["methods"] == found["methods"]


@pytest.mark.slow
def test_every_method(tiny, tmp_path):
    sft = tiny.finished("sft")
    words = [
        "--data",
        "arithmetic:1",
        "--learning-rate",
        1e-3,
        "--row-count",
        64,
        "--eval-count",
        16,
        "--batch-size",
        8,
        "--steps",
        4,
        "--quiet",
        "--no-report",
    ]
    for name, more in (("prm", []), ("orm", ["--outcome"])):
        args = ["--out", tmp_path / name, "--model", sft, "--optimizer.warmup-steps", 2, *words, *more]
        process_reward.run(tyro.cli(process_reward.Options, args=[str(arg) for arg in args]))
    judges = ("--process-reward", tmp_path / "prm", "--outcome-reward", tmp_path / "orm")
    asked = ("--search.value-prompt", "=", "--search.value-yes", "1", "--search.value-no")
    with pytest.raises(UserError, match=r"--search\.value-no '10' is 2 tokens"):
        run(tmp_path / "asked", "--model", sft, *asked, "10")
    found = run(tmp_path / "run", "--model", sft, *judges, *asked, "0")
    assert len(found["methods"]) == 1 + len(script.METHODS)
    assert len(found["accuracy_against_n"]) == len(script.CURVES)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--samples", 0], "--samples 0 is out of range: give 1 or more"),
        (["--search.branching-factor", 0], "--search.branching-factor 0 is out of range: give 1 or more"),
        (["--search.num-thoughts", 3], "odd"),
        (["--temperature", 0], "--temperature 0 is out of range: give a number from 0.01 to 100"),
    ],
)
def test_bad_options(tmp_path, words, said):
    with pytest.raises(UserError, match=said):
        run(tmp_path / "run", "--model", tmp_path, *words)


def test_accuracy_at_a_number_of_tokens():
    curve = np.array([[0.0, 0.5, 1.0]])
    for tokens, expected in ((5, 0.0), (10, 0.0), (15, 0.25), (20, 0.5), (30, 1.0), (99, 1.0)):
        assert script.at_tokens(curve, 10.0, tokens)[0] == pytest.approx(expected)


def published(tmp_path, *right):
    """Questions whose answer is 7, each with a solution of three writers, right or not."""
    rows = [
        {"question": "?", "ground_truth": "A: 7"}
        | {f"writer {k}": {"solution": f"so {7 if ok else 1}", "is_correct": ok} for k, ok in enumerate(row)}
        for row in right
    ]
    path = tmp_path / "solutions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_votes_among_published_solutions(tmp_path):
    path = published(tmp_path, (True, True, False), (True, False, False), (True, True, True))
    options = accuracy.Options(out=tmp_path / "out", solutions=path, quiet=True)
    accuracy.run(options)
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["published_writers"] == pytest.approx({"writer 0": 1, "writer 1": 2 / 3, "writer 2": 1 / 3})
    curves = found["published"]
    assert curves["pass@k (some sample is right)"] == pytest.approx([2 / 3, 8 / 9, 1])
    assert curves["majority vote"][2] == pytest.approx(2 / 3)
    # The first writer is right on the other questions: of two or three, its solution is the chosen one.
    assert curves["the best writer's"][2] == 1
    assert (tmp_path / "out" / "search_accuracy.svg").stat().st_size > 10_000
    for words, said in (({}, "nothing to show"), ({"search": str(tmp_path)}, "no finished run of search.py")):
        with pytest.raises(UserError, match=said):
            accuracy.run(accuracy.Options(out=tmp_path / "none", **words))


@pytest.mark.slow
def test_direct_answers_beside_chains_of_thought(tiny, tmp_path):
    run(tmp_path / "search", "--model", tiny.finished("sft"))
    options = accuracy.Options(out=tmp_path / "out", search=str(tmp_path / "search"), steps=24, quiet=True)
    accuracy.run(options)
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["direct_answers"].keys() <= found["chains_of_thought"].keys()
    assert all(len(curve) == 3 for curve in found["direct_answers"].values())
    lines = (tmp_path / "out" / "direct.jsonl").read_text().splitlines()
    assert all(json.loads(line)["messages"][1]["content"].startswith("#### ") for line in lines[:9])


def test_help_shows_every_option(tiny, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "110")
    for stage, options in (("search", script.Options(model="x", data="x")), ("alphazero", None)):
        assert tiny.main(stage, ["--help"], monkeypatch) == 0
        shown = capsys.readouterr().out
        if options is None:
            from rlhf_jax.stages import alphazero

            options = alphazero.Options()
        for flag in option_checks.flags(option_checks.to_json(options)):
            assert flag in shown, flag
