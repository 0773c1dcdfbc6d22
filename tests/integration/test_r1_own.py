"""R1 on a model and data of one's own: the stages that the data allow, and what is refused."""

import json

import pytest
import r1
import r1_own

from rlhf_jax.core.errors import UserError
from rlhf_jax.stages import adapting

EXACT = "rlhf_jax.rewards.verifiers:exact_answer_reward"
STEPS = {"zero_steps": 1, "cold_steps": 2, "reasoning_steps": 1, "chosen_steps": 2, "final_steps": 1}


@pytest.fixture
def data(tmp_path):
    sums = [(a, b) for a in range(6) for b in range(5)]
    rows = {
        "prompts": [{"prompt": f"{a}+{b}=?", "answer": str(a + b)} for a, b in sums],
        "traces": [{"prompt": f"{a}+{b}=?", "completion": str(a + b)} for a, b in sums],
    }
    for name, side in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in side))
    return {name: str(tmp_path / f"{name}.jsonl") for name in rows}


def options(tmp_path, adapter="none", **own):
    given = r1_own.OwnReasoning(max_new_tokens=6, group_size=2, rewards=(EXACT,), **own)
    sizes = {"batch_size": 8, "chosen_prompts": 24, "eval_prompts": 4}
    kind = adapting.AdapterOptions(adapter)
    return r1.Options(tmp_path / "run", quiet=True, own=given, adapter=kind, **sizes, **STEPS)


def test_traces_decide_where_reasoning_begins(tmp_path, data):
    short = options(tmp_path, model="m", prompts=data["prompts"])
    assert list(r1_own.stage_runs(short, tmp_path, 0)) == ["start", "zero", "chosen_sft", "r1"]
    stages = list(r1_own.stage_runs(options(tmp_path, model="m", **data), tmp_path, 0))
    assert stages == ["start", "zero", "cold_start", "reasoning", "chosen_sft", "r1"]


@pytest.mark.parametrize(
    ("own", "sentence"),
    [
        ({"traces": "x"}, "--traces is of a model of your own: give --model"),
        ({"model": "m", "prompts": "x"}, "give --prompts, and the --rewards"),
        ({"model": "m", "prompts": "x", "rewards": (EXACT,), "group_size": 3}, "--group-size 3"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, own, sentence):
    with pytest.raises(UserError, match=sentence):
        r1.run(r1.Options(tmp_path / "run", own=r1_own.OwnReasoning(**own)))


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_all_stages_run_and_are_measured(talker, tmp_path, data, capsys, adapter):
    job = options(tmp_path, adapter, model=str(talker), **data, reward_threshold=-1.0)
    r1.run(job)
    said = capsys.readouterr().out
    summary = json.loads((job.out / "summary.json").read_text())
    assert set(summary) == {"start", "zero", "cold_start", "reasoning", "chosen_sft", "r1"}
    assert all(0 <= numbers["score"][0] <= 1 for numbers in summary.values())
    assert summary["start"]["kl"] == [0.0]
    assert "chosen_sft/round_1" in said
    held = json.loads((job.out / "seed_0" / "chosen_sft" / "round_1" / "model.json").read_text())
    assert bool(held.get("adapter")) == (adapter == "lora")
