"""The script of retrieval-augmented generation, from its command line."""

import json
import types

import pytest
import retrieval
import tyro

from rlhf_jax.core.errors import UserError
from rlhf_jax.data.chat import encode_prompt
from rlhf_jax.data.tokenizers import byte_tokenizer
from rlhf_jax.stages import option_checks, rag
from rlhf_jax.tool_use import Chunk

_SMALL = (
    "--arch.width 16 --arch.layers 1 --arch.heads 2 --arch.kv-heads 1 --people 4 --top-k 1 "
    "--max-new-tokens 4 --quiet"
)


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notes")
    (folder / "cats.md").write_text("The cat is 7 years old. It eats fish.")
    (folder / "dogs.txt").write_text("The dog is 12 years old.")
    (folder / "left_out.csv").write_text("The dog is 13 years old.")
    rows = [{"text": "Rain fell.", "source": "weather"}, {"text": "Snow fell."}]
    (folder / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = [{"question": "how old is the dog?", "answer": "12 years"}, {"question": "what fell?"}]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    return folder


def test_questions_about_documents_of_ones_own(tiny, notes, tmp_path, monkeypatch, capsys):
    usual = ["--model", tiny.finished("sft"), "--max-new-tokens", 4, "--chunk-size", 12]
    questions = ["--questions", notes / "questions.jsonl"]
    words = ["--out", tmp_path, *usual, "--top-k", 1, "--documents", notes, notes / "more.jsonl"]
    assert tiny.main("rag", [*words, *questions], monkeypatch) == 0
    assert "answer among the passages" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [line["given"] for line in lines] == [["dogs.txt#1"], ["weather#1"]]
    assert [line.get("found") for line in lines] == [True, None]
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["questions"], results["judged"], results["found"]) == (2, 1, 1)

    again = [
        "--out",
        tmp_path / "again",
        *usual,
        "--index",
        tmp_path / "index",
        "--ask",
        "how old is the cat?",
    ]
    assert tiny.main("rag", again, monkeypatch) == 0
    assert "[1] cats.md#1: The cat is 7 years old. It eats fish." in capsys.readouterr().out


@pytest.mark.parametrize(("top_k", "said"), [(0, "why?"), (2, "Cite.\n[1] Because.\nwhy?")])
def test_without_passages_the_instruction_about_them_is_left_out(top_k, said):
    options = rag.Options(model="x", instruction="Cite.", top_k=top_k)
    tokenizer = byte_tokenizer()
    chunks = [Chunk("Because.", "a#1")][:top_k]
    (example,) = rag.encode(
        options, types.SimpleNamespace(tokenizer=tokenizer), [{"question": "why?"}], [chunks]
    )
    assert example.ids.tolist() == encode_prompt(tokenizer, said)


def test_mistakes_are_one_sentence(tiny, notes, tmp_path, monkeypatch, capsys):
    def refused(*words):
        assert tiny.main("rag", ["--out", tmp_path, *words], monkeypatch) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert "Traceback" not in said
        return said

    model = ("--model", tiny.finished("sft"))
    assert "--model must be given" in refused("--documents", notes)
    assert "give something to answer" in refused(*model, "--documents", notes)
    assert "give something to answer" in refused(
        *model, "--documents", notes, "--ask", "a", "--questions", notes / "questions.jsonl"
    )
    assert "give the passages" in refused(*model, "--ask", "what?")
    assert "give the passages" in refused(*model, "--documents", notes, "--index", notes)
    assert "--top-k -1 is out of range: give 0 or more" in refused(
        *model, "--documents", notes, "--ask", "what?", "--top-k", "-1"
    )
    assert "no index" in refused(*model, "--index", notes, "--ask", "what?")
    assert "no .txt or .md file" in refused(*model, "--documents", tmp_path, "--ask", "what?")
    assert "no such file" in refused(*model, "--documents", notes / "x.jsonl", "--ask", "what?")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"words": "a"}\n')
    assert "bad.jsonl:1: no field `text`" in refused(
        *model, "--documents", tmp_path / "bad.jsonl", "--ask", "a"
    )
    wrong = ("--questions", bad)
    assert "bad.jsonl:1: `question`" in refused(*model, "--documents", notes, *wrong)


@pytest.mark.slow
def test_what_the_policy_is_taught():
    rows = retrieval.training_rows(retrieval.Options(top_k=2, missing_rate=0.3))
    sourced = [row for row in rows if row["completion"] != "unknown"]
    assert 0.1 < len(sourced) / len(rows) < 0.8
    for row in sourced[::500]:
        answer, number = row["completion"].removesuffix("]").split(" [")
        *chunks, question = row["prompt"].split("\n")
        cited = chunks[int(number) - 1]
        assert cited == f"[{number}] {answer}."
        assert " ".join(answer.split()[:2]) in question


def test_an_answer_is_judged_where_the_right_one_is_known():
    given = [Chunk("It is bo.", "a#1")]
    assert rag.judge({"question": "who?", "answer": "Bo"}, given, "bo [1] [2]", "none") == {
        "question": "who?",
        "text": "bo",
        "cited": ["a#1"],
        "invented": 1,
        "given": ["a#1"],
        "answer": "Bo",
        "found": True,
        "right": True,
        "sourced": True,
        "unknown": False,
    }
    assert rag.judge({"question": "who?", "answer": "Bo"}, given, "None", "none")["unknown"]
    assert "right" not in rag.judge({"question": "who?"}, given, "bo", "none")


def test_help_shows_every_option(tiny, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "110")
    assert tiny.main("rag", ["--help"], monkeypatch) == 0
    shown = capsys.readouterr().out
    for flag in option_checks.flags(option_checks.to_json(rag.Options(model="x"))):
        assert flag in shown, flag


def run_pipeline(words):
    retrieval.run(tyro.cli(retrieval.Options, args=words.split()))


def test_more_people_than_there_are(tmp_path):
    with pytest.raises(UserError, match="128 who are held out"):
        run_pipeline(f"--out {tmp_path} --people 129")


@pytest.mark.slow
def test_a_run_from_nothing(tmp_path):
    run_pipeline(f"--out {tmp_path} --sft-steps 4 {_SMALL}")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["0"]["questions"] == 16
    assert results["0"]["found"] == 0 < results["1"]["found"]


@pytest.mark.slow
def test_people_it_has_never_met(tmp_path):
    run_pipeline(f"--out {tmp_path} --quiet")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["0"]["right"] < 0.2 * results["0"]["judged"]
    assert results["4"]["right_and_sourced"] > 0.4 * results["4"]["judged"]
