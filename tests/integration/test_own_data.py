"""The main job on a model and data of one's own: the stages that the data allow, and what is refused."""

import dataclasses
import json
from pathlib import Path

import own_data
import pytest
import rlhf

from rlhf_jax.core.errors import UserError

EXACT = "rlhf_jax.rewards.verifiers:exact_answer_reward"
STEPS = {"sft_steps": 2, "reward_steps": 2, "ppo_steps": 1, "dpo_steps": 2, "grpo_steps": 1}


@pytest.fixture
def data(tmp_path):
    """Files of sums, by what they are."""
    sums = [(a, b) for a in range(5) for b in range(4)]
    rows = {
        "sft_data": [{"prompt": f"{a}+{b}=?", "completion": f"{a + b}"} for a, b in sums],
        "preference_data": [
            {"prompt": f"{a}+{b}=?", "chosen": f"{a + b}", "rejected": f"{a + b + 1}"} for a, b in sums
        ],
        "prompts": [{"prompt": f"{a}+{b}=?", "answer": f"{a + b}"} for a, b in sums],
    }
    paths = {name: tmp_path / f"{name}.jsonl" for name in rows}
    for name, path in paths.items():
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
    return {name: str(path) for name, path in paths.items()}


def options(tmp_path, **own):
    sizes = {"max_new_tokens": 4, "batch_size": 4, "group_size": 2}
    given = own_data.OwnData(**sizes, **own)
    return rlhf.Options(tmp_path / "run", eval_prompts=4, quiet=True, own=given, **STEPS)


def test_the_data_decide_which_stages_there_are(tmp_path, data):
    def stages(*names, **more):
        chosen = {name: data[name] for name in names}
        return list(own_data.stage_runs(options(tmp_path, model="m", **chosen, **more), tmp_path, 0))

    assert stages("sft_data") == ["start", "sft"]
    assert stages("preference_data") == ["start", "reward_model", "dpo"]
    assert stages("preference_data", "prompts") == ["start", "reward_model", "dpo", "ppo"]
    assert stages("prompts", rewards=(EXACT,)) == ["start", "ppo", "grpo"]


def test_prompts_are_held_out_and_never_trained_on(tmp_path, data):
    job = options(tmp_path, model="m", prompts=data["prompts"], rewards=(EXACT,))
    trained, held_out = (Path(path).read_text().splitlines() for path in own_data.split_prompts(job))
    every = Path(data["prompts"]).read_text().splitlines()
    assert len(held_out) == 2
    assert sorted(json.loads(line)["prompt"] for line in trained + held_out) == sorted(
        json.loads(line)["prompt"] for line in every
    )


@pytest.mark.parametrize(
    ("own", "sentence"),
    [
        ({"sft_data": "x"}, "--sft-data is of a model of your own: give --model"),
        ({"model": "m"}, "nothing says what to learn"),
        ({"model": "m", "rewards": (EXACT,)}, "give the --prompts that are answered"),
        (
            {"model": "m", "sft_data": "x", "batch_size": 3},
            "--batch-size 3 is not divisible by",
        ),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, own, sentence):
    with pytest.raises(UserError, match=sentence):
        rlhf.run(rlhf.Options(tmp_path / "run", own=own_data.OwnData(**own)))


@pytest.mark.slow
def test_all_stages_run_and_are_measured_and_nothing_is_done_twice(tiny, tmp_path, data, capsys):
    job = options(tmp_path, model=str(tiny.finished("sft")), rewards=(EXACT,), **data)
    rlhf.run(job)
    said = capsys.readouterr().out
    summary = json.loads((job.out / "summary.json").read_text())
    policies = ("start", "sft", "dpo", "ppo", "grpo")
    assert set(summary) == {*policies, "reward_model"}
    for name in policies:
        assert 0 <= summary[name]["score"][0] <= 1
        assert f"Talk to {name}: rlhf generate --model" in said
    assert summary["sft"]["kl"] == [0.0]
    assert summary["reward_model"]["pair_accuracy"][0] >= 0
    assert "grpo" in (job.out / "report.html").read_text()
    before = tiny.digest(job.out / "seed_0")
    rlhf.run(dataclasses.replace(job, resume=True))
    assert tiny.digest(job.out / "seed_0") == before


@pytest.mark.slow
def test_without_rewards_the_reward_model_is_the_measure(tiny, tmp_path, data, capsys):
    chosen = {name: data[name] for name in ("preference_data", "prompts")}
    job = options(tmp_path, model=str(tiny.finished("sft")), **chosen)
    rlhf.run(job)
    assert "score by reward_model" in capsys.readouterr().out
    summary = json.loads((job.out / "summary.json").read_text())
    assert set(summary) == {"start", "reward_model", "dpo", "ppo"}
    assert summary["start"]["kl"] == [0.0]
