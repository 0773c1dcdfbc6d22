"""Iterated RLHF on little data: prompts of rounds are apart, labels add up, and nothing is done twice."""

import dataclasses
import json

import iterated_rlhf
import pytest

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError

ANNOTATOR = """
def first_digit(prompts, completions, **_):
    return [float(next((c for c in text if c.isdigit()), "0")) + len(text) / 100 for text in completions]
"""
"""Likes large first digits and long answers, so that most answers to one prompt differ in worth."""


@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digit_annotator.py").write_text(ANNOTATOR)
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{a}+{b}=?"}) + "\n" for a in range(8) for b in range(5)))
    return iterated_rlhf.Options(
        tmp_path / "run",
        model="m",
        prompts=str(path),
        annotator="digit_annotator:first_digit",
        rounds=2,
        prompts_per_round=8,
        reward_steps=2,
        ppo_steps=1,
        max_new_tokens=6,
        batch_size=4,
        eval_prompts=4,
        quiet=True,
    )


def test_rounds_have_prompts_of_their_own(options, tmp_path):
    data = iterated_rlhf.write_prompts(options, tmp_path / "seed", 0)
    rounds = [{row["prompt"] for row in files.read_lines(path)} for path in data.of_rounds]
    held_out = {row["prompt"] for row in files.read_lines(data.held_out)}
    trained = {row["prompt"] for row in files.read_lines(data.prompts)}
    assert [len(side) for side in (*rounds, held_out, trained)] == [8, 8, 4, 36]
    assert not rounds[0] & rounds[1]
    assert not held_out & trained


def test_the_newest_policy_answers_and_ppo_begins_at_the_start(options, tmp_path):
    assert iterated_rlhf.policy_after(options, tmp_path, 0) == "m"
    assert iterated_rlhf.policy_after(options, tmp_path, 2) == str(tmp_path / "ppo_2")
    data = iterated_rlhf.write_prompts(options, tmp_path / "seed", 0)
    stages = list(iterated_rlhf.stage_runs(options, tmp_path, 0, data))
    kinds = ("pairs", "reward_model", "ppo")
    assert stages == ["start", *(f"{kind}_{number}" for number in (1, 2) for kind in kinds)]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompts": ""}, "--model and --prompts go together"),
        ({"samples_per_prompt": 1}, "leaves nothing to compare"),
        ({"prompts_per_round": 20}, "2 rounds of 20 prompts need 40, and there are 36"),
    ],
)
def test_mistakes_are_one_sentence(options, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        iterated_rlhf.run(dataclasses.replace(options, **changes))


@pytest.mark.slow
@pytest.mark.parametrize("continue_policy", [False, True])
def test_rounds_run_and_labels_add_up(options, talker, tiny, capsys, continue_policy):
    given = dataclasses.replace(options, model=str(talker), quiet=False, continue_policy=continue_policy)
    iterated_rlhf.run(given)
    assert "learnt reward" in capsys.readouterr().out
    folder = given.out / "seed_0"
    summary = json.loads((given.out / "summary.json").read_text())
    pairs = [summary[f"pairs_{number}"]["pairs"][0] for number in (1, 2)]
    assert min(pairs) > 0
    assert len(files.read_lines(folder / "data" / "pairs_until_2.jsonl")) == sum(pairs)
    config = json.loads((folder / "ppo_2" / "config.json").read_text())["config"]
    assert config["model"].endswith("ppo_1" if continue_policy else talker.name)
    assert -100 < summary["ppo_2"]["learnt_reward"][0] < 100
    before = tiny.digest(folder)
    iterated_rlhf.run(dataclasses.replace(given, resume=True, quiet=True))
    assert tiny.digest(folder) == before
