"""Constitutional AI in one command: its stages, on the embedded task and on data of one's own."""

import dataclasses
import itertools
import json
from pathlib import Path

import constitutional as pipeline
import constitutional_own
import constitutional_stages
import own_data
import pytest

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.data.sources import read_rows
from rlhf_jax.feedback.constitution import constitution_rows
from rlhf_jax.stages import constitutional, option_groups, sft
from rlhf_jax.tasks import arithmetic_harm as harm
from rlhf_jax.tasks.arithmetic import widest_completion
from rlhf_jax.tasks.arithmetic_reviews import CONSTITUTION

BEFORE_RL = ["sl_cai", "ai_labels", "reward_model", "rl_cai"]
COMPARED = ["dpo_human", "dpo_ai", "ppo_ai", "grpo_ai", "grpo_ratings"]
OF_OWN = {"revision_steps": 2, "reward_steps": 2, "dpo_steps": 2, "ppo_steps": 1, "grpo_steps": 1}
OWN = own_data.OwnData(model="m", prompts="p")
PRINCIPLE = dataclasses.asdict(CONSTITUTION[0]) | {"critique": "So?", "revision": "Say."}
# Said in digits, which a model that has seen nothing but sums can tell apart.
PRINCIPLE |= {"choices": ["1", "2"], "ratings": ["0", "9"]}
SMALL = {
    "skill_rows": 200,
    "labelled": 16,
    "human_pairs": 80,
    "ranked": 8,
    "prompt_count": 40,
    "eval_prompts": 8,
}


def options(tmp_path, **more):
    return pipeline.Options(tmp_path / "run", quiet=True, **(SMALL | more))


@pytest.fixture
def reviser(tiny, tmp_path):
    """A policy that ends its answers, its critiques and its revisions."""
    rows = []
    for a, b in itertools.product(range(8), range(8)):
        said = [f"{a}+{b}=?", str(a + b), PRINCIPLE["critique"], "ok", PRINCIPLE["revision"], str(a + b)]
        turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]
        rows.append({"messages": turns})
    files.write_lines(tmp_path / "reviews.jsonl", rows)
    words = "--data", tmp_path / "reviews.jsonl", "--steps", 60, "--learning-rate", 2e-2
    return tiny.run("sft", tmp_path / "reviser", *words, "--tokenizer", tiny.finished("sft") / "tokenizer")


@pytest.fixture
def own(tmp_path):
    """Files of sums for a model of one's own, by the options that name them."""
    sums = [(a, b) for a in range(5) for b in range(4)]
    rows = {
        "sft_data": [{"prompt": f"{a}+{b}=?", "completion": f"{a + b}"} for a, b in sums],
        "preference_data": [
            {"prompt": f"{a}+{b}=?", "chosen": f"{a + b}", "rejected": f"{a + b + 1}"} for a, b in sums
        ],
        "prompts": [{"prompt": f"{a}+{b}=?", "answer": f"{a + b}"} for a, b in sums],
    }
    for name in rows:
        files.write_lines(tmp_path / f"{name}.jsonl", rows[name])
    files.write_lines(tmp_path / "principles.jsonl", [PRINCIPLE])
    return {name: str(tmp_path / f"{name}.jsonl") for name in rows}


def own_options(tmp_path, own, model="m", **more):
    data = own_data.OwnData(model=model, max_new_tokens=6, batch_size=4, group_size=2, **own)
    given = {"eval_prompts": 4, "constitution": str(tmp_path / "principles.jsonl"), "own": data, **OF_OWN}
    return pipeline.Options(tmp_path / "run", quiet=True, **(given | more))


def stages_of(job, folder):
    data = pipeline.write_data(job, folder, 0)
    return constitutional_stages.Stages(job, data, folder, 0)


# What the stages read ----------------------------------------------------------------------------------


def test_stages_come_in_order_and_comparisons_can_be_left_out(tmp_path, own):
    stages = stages_of(options(tmp_path), tmp_path / "seed")
    assert list(stages.in_order()) == [*BEFORE_RL, *COMPARED, "rules", "grpo_rules"]
    stages = stages_of(options(tmp_path, compare=False), tmp_path / "seed")
    assert list(stages.in_order()) == BEFORE_RL
    job = own_options(tmp_path, own)
    data = constitutional_own.data_of(job, tmp_path / "seed")
    assert list(constitutional_stages.Stages(job, data, tmp_path, 0).in_order()) == [*BEFORE_RL, *COMPARED]


def test_people_know_nothing_of_harm_and_the_judge_nothing_else(tmp_path):
    """AI feedback is on red-team prompts and labels of people on problems, none of them held out."""
    data = stages_of(options(tmp_path), tmp_path / "seed").data
    names = "red_team", "labelled", "pairs", "demonstrations", "prompts", "held_out", "red_team_held_out"
    texts = {name: [json.dumps(row.fields) for row in read_rows(getattr(data, name))] for name in names}
    marked = {name: {harm.MARK in text for text in some} for name, some in texts.items()}
    assert marked["red_team"] == marked["labelled"] == marked["red_team_held_out"] == {True}
    assert marked["pairs"] == marked["demonstrations"] == marked["held_out"] == {False}
    both = [harm.MARK in text for text in texts["prompts"]]
    assert sum(both) == len(both) // 2 == 40
    asked = {
        name: {json.loads(text)["prompt"].removeprefix(harm.MARK) for text in texts[name]}
        for name in ("prompts", "pairs", "held_out", "red_team_held_out")
    }
    assert asked["held_out"] == asked["red_team_held_out"]
    assert not (asked["prompts"] | asked["pairs"]) & asked["held_out"]


def test_labels_of_both_are_mixed(tmp_path):
    stages = stages_of(options(tmp_path), tmp_path / "seed")
    pair = {"prompt": "for harm: 1+1=?", "chosen": harm.REFUSAL, "rejected": "1+1=2", "preference": 0.9}
    files.write_lines(tmp_path / "seed" / "ai_labels" / "pairs.jsonl", [pair])
    files.write_lines(tmp_path / "seed" / "ai_labels" / "held_out.jsonl", [])
    pairs = stages.mixed_pairs()
    assert pairs.soft_labels
    rows = [row.fields for row in read_rows(pairs.data)]
    assert [row.get("preference") for row in rows] == [0.9] + [None] * 80
    assert len(read_rows(pairs.eval_data)) == 256
    assert stages.human_pairs().data == stages.data.pairs


def test_rules_are_measured_by_kinds_of_pairs(tmp_path):
    (tmp_path / "rules.json").write_text(
        json.dumps(
            {
                "kind": "rules",
                "propositions": [
                    {
                        "name": "harmless",
                        "function": "rlhf_jax.tasks.arithmetic_harm:harmless_reward",
                        "weight": 1.0,
                    }
                ],
            }
        )
    )
    rows = harm.ranked_rows(pipeline.LEVEL, "train", 8, 0)
    found = pipeline.pairs_in_order(tmp_path / "rules.json", rows)
    # Who looks at harm alone ranks answers to red-teamers, and finds all answers to problems alike.
    assert found == {"in_order_problem": 0.0, "in_order_red_team": 1.0, "in_order_refused": 0.0}


def test_extra_data_are_mixed_by_their_share(tmp_path):
    given = constitutional.Options(
        model="m", constitution="c", prompts=option_groups.PromptOptions("d"), extra_data="b.jsonl"
    )
    assert constitutional.mixture(given, Path("rows.jsonl")) == "rows.jsonl,b.jsonl"
    shared = dataclasses.replace(given, extra_share=0.25)
    assert constitutional.mixture(shared, Path("rows.jsonl")) == "rows.jsonl=0.75,b.jsonl=0.25"
    alone = dataclasses.replace(given, extra_data="")
    assert constitutional.mixture(alone, Path("rows.jsonl")) == "rows.jsonl"
    with pytest.raises(UserError, match=r"b\.jsonl: no such file"):
        constitutional.check_extra_data(dataclasses.replace(given, extra_data=str(tmp_path / "b.jsonl")))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"constitution": "c"}, "--constitution is of a model of your own"),
        ({"red_team": "r"}, "--red-team is of a model of your own"),
        ({"own": OWN}, "give --constitution"),
        ({"own": OWN, "constitution": "c"}, "--preference-data is missing"),
        ({"skill_steps": 0}, "--skill-steps 0"),
        ({"labelled": 41}, "--labelled 41: there are 40 prompts"),
        ({"human_share": 1.0}, "--human-share 1 is out of range"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        pipeline.run(options(tmp_path, **changes))


def test_a_share_of_nothing_is_refused(tmp_path):
    given = constitutional.Options(
        run=option_groups.RunOptions(tmp_path / "run"),
        model="m",
        constitution="c",
        prompts=option_groups.PromptOptions("d"),
        extra_share=0.5,
    )
    with pytest.raises(UserError, match="--extra-share is that of --extra-data"):
        constitutional.run(given)


def test_the_longest_answer_has_room():
    tokenizer = harm.harm_tokenizer()
    widest = [widest_completion(pipeline.LEVEL), harm.REFUSAL, harm.DOES_HARM]
    assert max(len(tokenizer.encode(text)) for text in widest) < pipeline.MAX_NEW_TOKENS


# Whole runs --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_data_of_ones_own_go_the_whole_way_and_nothing_is_done_twice(tmp_path, own, reviser, tiny, capsys):
    job = own_options(tmp_path, own, model=str(reviser), labels_of="sl_cai")
    pipeline.run(job)
    said = capsys.readouterr().out
    summary = json.loads((job.out / "summary.json").read_text())
    assert set(summary) == {"start", *BEFORE_RL, *COMPARED}
    assert summary["start"]["kl"] == [0.0]
    assert summary["ai_labels"].keys() == {"seconds"}
    for name in ("start", "sl_cai", "rl_cai", *COMPARED):
        assert f"Talk to {name}: rlhf generate --model" in said
        assert abs(summary[name]["score"][0]) < 100  # of a reward model; NaN is none
    folder = job.out / "seed_0"
    config = json.loads((folder / "rl_cai" / "config.json").read_text())["config"]
    assert config["model"] == str(folder / "sl_cai" / "policy")
    assert config["reward_model"] == [str(folder / "reward_model")]
    labelled = json.loads((folder / constitutional_stages.LABELS / "config.json").read_text())["config"]
    assert labelled["model"] == str(folder / "sl_cai" / "policy")
    learned = json.loads((folder / "sl_cai" / "policy" / "config.json").read_text())["config"]["data"]
    assert learned.endswith(f"rows.jsonl=0.5,{own['sft_data']}=0.5")
    before = tiny.digest(folder)
    pipeline.run(dataclasses.replace(job, resume=True))
    assert tiny.digest(folder) == before


def stop(_):
    raise KeyboardInterrupt


@pytest.mark.slow
def test_constitutional_ai_lessens_harm_and_keeps_help(tmp_path, monkeypatch):
    # The recipe, with less to measure on, and GRPO too short to say anything.
    job = pipeline.Options(tmp_path / "run", grpo_steps=2, eval_prompts=256, quiet=True)
    # Stopped in the middle: what is whole stays, and --resume does the rest.
    with monkeypatch.context() as patched:
        patched.setattr(constitutional_stages.Stages, "label", stop)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(job)
    monkeypatch.setattr(sft, "run", lambda *_: pytest.fail("skills and SL-CAI are there"))
    pipeline.run(dataclasses.replace(job, resume=True))

    summary = json.loads((job.out / "summary.json").read_text())
    number = {name: {key: values[0] for key, values in found.items()} for name, found in summary.items()}
    before, revised, after = (number[name] for name in ("skills", "sl_cai", "rl_cai"))
    # Demonstrators refuse a fifth of red-teamers: sampled imitation does so too, greedy imitation hardly.
    assert before["harm"] > 0.8
    assert 0.65 < before["sampled_harm"] < 0.95
    # What is asked of constitutional AI: most of the harm goes, and help does not pay for it.
    assert revised["harm"] < 0.5 * before["harm"]
    assert after["harm"] < 0.2
    assert after["exact_match"] > before["exact_match"] - 0.05
    assert after["refused"] < 0.1
    # People label help alone: without AI labels harm stays, with them most of it goes.
    assert number["dpo_human"]["harm"] > 0.8
    assert number["dpo_ai"]["harm"] < 0.5
    assert number["ai_labels"]["accuracy"] > 0.8
    # Not reached on every seed: docs/results/feedback.md.
    assert number["rules"]["in_order_problem"] > 0.8
    assert number["rules"]["in_order_red_team"] > 0.8
    found = json.loads((job.out / "seed_0" / "sl_cai" / "results.json").read_text())
    assert found["train"]["revisions"] > found["train"]["answers"] + 0.1
    assert found["after"]["score"] > found["before"]["score"] + 0.1
    rules = json.loads((job.out / "seed_0" / "rules" / "rules.json").read_text())
    assert [rule["name"] for rule in rules["propositions"]] == list(harm.PROPOSITIONS)
    page = (job.out / "report.html").read_text()
    assert "rl cai" in page
    assert "Harm, sampled" in page


@pytest.mark.slow
def test_revisions_of_sums_mend_them_and_teach(tmp_path):
    job, folder = pipeline.Options(tmp_path / "run", quiet=True), tmp_path / "seed"
    pipeline.write_data(job, folder, 0)
    pipeline.train_skills(job, folder, 0)
    files.write_lines(tmp_path / "principles.jsonl", constitution_rows(CONSTITUTION))
    run = option_groups.RunOptions(out=tmp_path / "revised", steps=60, eval_every=0, quiet=True, report=False)
    prompts = option_groups.PromptOptions(
        data="arithmetic:0",
        rewards=("rlhf_jax.rewards.verifiers:exact_answer_reward",),
        max_new_tokens=32,
        eval_count=256,
    )
    constitutional.run(
        constitutional.Options(
            run=run,
            model=str(folder / "skills"),
            constitution=str(tmp_path / "principles.jsonl"),
            prompts=prompts,
            revised=256,
            batch_size=64,
            **pipeline.REVISIONS,
        )
    )
    found = json.loads((tmp_path / "revised" / "results.json").read_text())
    assert found["train"]["revisions"] > found["train"]["answers"] + 0.1
    assert found["after"]["score"] > found["before"]["score"] + 0.1
