"""rlhf_jax/stages/generate.py as a user meets it: every decoder, files, a chat, JSON, mistakes."""

import io
import json

import pytest

from rlhf_jax.stages import generate


@pytest.fixture
def say(tiny, monkeypatch, capsys, tmp_path):
    """Runs the script's command line; returns what it prints, or the error."""
    monkeypatch.chdir(tmp_path)

    def run(*words, typed=None, model="sft"):
        if typed is not None:
            monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        folder = tiny.finished(model)
        capsys.readouterr()
        status = tiny.main("generate", ["--model", folder, "--max-new-tokens", 6, *words], monkeypatch)
        shown = capsys.readouterr()
        assert status == (2 if shown.err else 0), shown.err
        return shown.err or shown.out

    return run


DECODERS = [
    ["sample", "--temperature", 0.7, "--top-k", 5, "--repetition-penalty", 1.2],
    pytest.param(["beam", "--beams", 3], marks=pytest.mark.slow),
    pytest.param(["sample", "--dola", 0], marks=pytest.mark.slow),
    pytest.param(["contrastive"], marks=pytest.mark.slow),
    pytest.param(["speculative", "--draft", "prompt", "--num-speculative-tokens", 2], marks=pytest.mark.slow),
]


@pytest.mark.slow
@pytest.mark.parametrize("words", DECODERS)
def test_every_decoder_answers_in_json(say, words):
    count = 1 if words[0] == "contrastive" else 2
    shown = say("--prompt", "1+2+3=?", "--json", "--logprobs", "--n", count, *words)
    reply = json.loads(shown)
    assert reply["prompt"] == "1+2+3=?"
    assert len(reply["answers"]) == count
    for answer in reply["answers"]:
        assert 1 <= answer["tokens"] == len(answer["ids"]) == len(answer["logprobs"]) <= 6
        assert sum(answer["logprobs"]) == pytest.approx(answer["logp"], abs=1e-4)
        assert ("score" in answer) == (words[0] == "beam")
        assert ("filtered_logprobs" in answer) == (words[0] in ("sample", "speculative"))


@pytest.mark.slow
def test_a_file_of_prompts_and_what_answers_must_look_like(say, tmp_path):
    rows = [{"prompt": "1+2=?"}, {"prompt": "1+2+3+4+5+6+7+8+9=?"}, {"question": "2+2=?"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--file", "rows.jsonl", "--json", "--regex", "[0-9]{2}", "sample", "--temperature", 2)
    lines = [json.loads(line) for line in say(*words).splitlines()]
    assert [line["prompt"] for line in lines] == [next(iter(row.values())) for row in rows]
    texts = [line["answers"][0]["text"] for line in lines]
    assert all(len(text) == 2 and text.isdecimal() for text in texts), texts
    # A prompt's answer does not depend on what else is in the file.
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert json.loads(say(*words))["answers"] == lines[0]["answers"]


def test_a_chat_goes_on_until_the_input_ends(say):
    shown = say("--stop", "7", typed="1+2=?\n3+4=?\n\n1+2=?\n")
    lines = shown.splitlines()
    assert len(lines) >= 3
    assert "7" not in shown


@pytest.mark.slow
def test_answers_for_people(say):
    shown = say("--prompt", "1+2=?", "--logprobs")
    assert shown.startswith("> 1+2=?\n")
    assert "tokens, log-prob -" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "1", "--file", "x.jsonl"], "--prompt and --file exclude each other"),
        (["--prompt", "1", "--regex", "1", "--json-schema", "x"], "--regex and --json-schema exclude"),
        (["--prompt", "1", "--json-schema", "nowhere"], "--json-schema nowhere: cannot be read"),
        (["--prompt", "1", "--regex", "("], "regular expression '('"),
        (["--prompt", "1", "--n", "0"], "--n 0 is out of range: give 1 or more"),
        (["--prompt", "1", "--n", "2", "--majority-vote"], "among 2 answers says nothing"),
        (["--prompt", "1", "--n", "9", "beam"], "--n 9 is more than the 4 beams"),
        (["--prompt", "1", "--n", "2", "contrastive"], "contrastive search finds one answer"),
        (["--raw"], "--raw has no meaning in a chat"),
        (["--prompt", "1", "--image", "x.png", "--raw"], "--image and --raw exclude each other"),
        (["--file", "x.jsonl", "--image", "x.png"], "--image and --file exclude each other"),
        (["--prompt", "1", "--image", "x.png", "contrastive"], "--image is read by sample"),
        (["--prompt", "1", "--image", "x.png"], "the model reads none: give a model with vision"),
        (["--prompt", "1", "sample", "--dola", "5"], "the model has layers 0 to 0"),
        (["--prompt", "1", "speculative", "--draft", "nowhere"], "nowhere: no such file or folder"),
        (["--prompt", "\u00e9"], "not in the tokenizer's alphabet"),
        (["--file", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    ],
)
def test_mistakes_are_one_sentence(say, words, message):
    shown = say(*words)
    assert message in shown
    assert shown.count("\n") == 1


def test_a_folder_that_is_no_model(tiny, monkeypatch, capsys, tmp_path):
    assert tiny.main("generate", ["--model", tmp_path, "--prompt", "1"], monkeypatch) == 2
    assert "neither a run folder (model.json) nor a Hugging Face folder" in capsys.readouterr().err


def test_the_majority_of_last_numbers_is_shown():
    answers = [{"text": text} for text in ("so 5", "none", "7 and then 4", "is 5.0", "4", "#### 4")]
    assert generate.voted(answers) == [{"text": "7 and then 4", "votes": 0.5}]
    assert generate.voted(answers[1:2]) == answers[1:2]
