"""AI feedback from the command line: skills, revisions, a judge's pairs, rules, and rewards from both."""

import dataclasses
import json
from pathlib import Path

import pytest
import tyro

from rlhf_jax.core.errors import UserError
from rlhf_jax.data.examples import prompt_examples
from rlhf_jax.data.sources import Row, read_rows
from rlhf_jax.data.tokenizers import byte_tokenizer
from rlhf_jax.feedback.revisions import Review, Turn
from rlhf_jax.rewards.verifiers import exact_answer_reward
from rlhf_jax.stages import constitutional, option_groups, preferences, rule_rewards
from rlhf_jax.stages.entry import NOTHING, Given
from rlhf_jax.stages.reward_specs import make_reward_fn
from rlhf_jax.tasks.arithmetic_reviews import CONSTITUTION, PROPOSITIONS, REVIEW_LEVEL, ranked_rows
from rlhf_jax.training.run_folder import load_policy

_PROMPTS = "--prompt-count 40 --eval-count 8 --samples 2 --max-new-tokens 6 --data arithmetic:0"
_EXACT = "rlhf_jax.rewards.verifiers:exact_answer_reward"


def call(script, words):
    script.run(tyro.cli(script.Options, args=words.split()))


@pytest.fixture(scope="module")
def words(talker, tmp_path_factory):
    """Words for a tiny run of the supervised stage, by a policy that has never heard of critiques."""
    folder = tmp_path_factory.mktemp("rlaif")
    rows = [
        dataclasses.asdict(CONSTITUTION[0]),
        {"principle": "Be right.", "name": "right", "critique": "So?", "revision": "Say."},
    ]
    (folder / "principles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = f"--out {folder / 'run'} --model {talker} --constitution {folder / 'principles.jsonl'} {_PROMPTS}"
    words += " --steps 2 --revised 24 --batch-size 4 --answer-batch-size 16 --optimizer.warmup-steps 0"
    words += f" --learning-rate 3e-4 --rewards {_EXACT}"
    return words + " --review-temperature 1 --quiet --no-report"


@pytest.fixture(scope="module")
def revised(words):
    """The run, and its words."""
    call(constitutional, words)
    return Path(words.split()[1]), words


@pytest.mark.slow
def test_revisions_can_be_read_and_are_not_made_twice(revised, stop_within_a_line):
    out, words = revised
    text = (out / "revisions.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert len(rows) == 24
    assert all(row["revision"] == row["turns"][-1]["revision"] for row in rows)
    assert {row["turns"][0]["principle"] for row in rows} == {"lines", "right"}
    learned = [row.fields["completion"] for row in read_rows(out / "rows.jsonl")]
    assert learned == [row["revision"] for row in rows if row["finished"] and row["revision"].strip()]
    results = json.loads((out / "results.json").read_text())
    # The second batch is torn: it is made again as it was.
    stop_within_a_line(out / "revisions.jsonl", 20)
    call(constitutional, words + " --resume")
    assert (out / "revisions.jsonl").read_text() == text
    assert json.loads((out / "results.json").read_text()) == results
    with pytest.raises(UserError, match="already holds a run"):
        call(constitutional, words)


@pytest.mark.slow
def test_a_model_judges_pairs_and_rewards_answers(revised, tmp_path, tiny, talker):
    out, _ = revised
    call(
        preferences,
        f"--out {tmp_path / 'pairs'} --model {talker} --judge-model {talker} {_PROMPTS} --quiet "
        f"--constitution {out / 'constitution.jsonl'} --samples-per-prompt 2 --batch-size 40 "
        "--eval-reward rlhf_jax.rewards.rules:repetition_reward",
    )
    counts = json.loads((tmp_path / "pairs" / "counts.json").read_text())
    rows = [row.fields for row in read_rows(tmp_path / "pairs" / "pairs.jsonl")]
    assert rows
    assert all(0.5 < row["preference"] < 1 and -1 < row["order_gap"] < 1 for row in rows)
    assert 0 <= counts["judge"]["inconsistent"] <= 1
    assert counts["judge"]["order_gap"] >= abs(counts["judge"]["first_advantage"])
    soft = ("--soft-labels", "--data", tmp_path / "pairs" / "pairs.jsonl", "--batch-size", 4)
    tiny.run("dpo", tmp_path / "dpo", "--model", talker, *soft)
    for words, said in ((("--loss", "simpo"), "simpo has no soft labels"), ((), "no row of arithmetic:1")):
        with pytest.raises(UserError, match=said):
            tiny.run("dpo", tmp_path / "refused", "--soft-labels", *words)

    rules = [{"name": name, "question": text} for name, text in PROPOSITIONS.items()]
    (tmp_path / "propositions.jsonl").write_text("".join(json.dumps(rule) + "\n" for rule in rules))
    ranked = ranked_rows(REVIEW_LEVEL, "train", 12, 0)
    (tmp_path / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ranked))
    call(
        rule_rewards,
        f"--out {tmp_path / 'rules'} --grader {talker} --count 8 --steps 20 --quiet "
        f"--propositions {tmp_path / 'propositions.jsonl'} --data {tmp_path / 'ranked.jsonl'}",
    )
    fitted = json.loads((tmp_path / "rules" / "rules.json").read_text())
    assert [rule["name"] for rule in fitted["propositions"]] == ["steps", "follows"]
    terms = make_reward_fn(
        [str(out / "judge.json"), f"{tmp_path / 'rules' / 'rules.json'}=0.5"], load_policy(talker).tokenizer
    ).terms
    assert [term.weight for term in terms] == [1.0, 0.5]


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        (constitutional, "--model a --constitution b --data c --revisions 0", "--revisions 0"),
        (constitutional, "--model a --constitution b --data c --revised -1", "--revised -1"),
        (preferences, "--model a --data d --judge-model b", "--judge-model and --constitution go together"),
        (preferences, "--model a --data d --judge m:f --judge-model b --constitution c", "--judge excludes"),
        (rule_rewards, "--data d --propositions p --steps 0", "--steps 0"),
        (rule_rewards, "--data d --propositions p --count -1", "--count -1"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, script, words, said):
    with pytest.raises(UserError, match=said):
        call(script, f"--out {tmp_path / 'run'} {words}")


@pytest.mark.parametrize(
    ("command", "required"),
    [
        ("constitutional", "--model and --constitution and --data must be given"),
        ("rule_rewards", "--out and --propositions and --data must be given"),
    ],
)
def test_what_must_be_given(tiny, monkeypatch, capsys, command, required):
    assert tiny.main(command, [], monkeypatch) == 2
    assert required in capsys.readouterr().err


@pytest.mark.slow
def test_more_revisions_than_prompts(words, tmp_path):
    words = words.replace("--revised 24", "--revised 41").split()[2:]
    with pytest.raises(UserError, match="--revised 41: there are 40 prompts"):
        call(constitutional, f"--out {tmp_path / 'run'} {' '.join(words)}")


def test_revisions_are_measured_only_where_something_measures_texts(tmp_path):
    def judge(prompts, completions, answer, **_):
        return [float(text == right) for text, right in zip(completions, answer, strict=True)]

    rows = [Row({"prompt": "1+1=?", "answer": "2"}, f"row {number}") for number in range(2)]
    prompts = prompt_examples(rows, byte_tokenizer(), max_length=99)
    talk = [{"role": "user", "content": "1+1=?"}]
    reviews = [
        Review(talk, "3", (Turn("right", "no", "2"),), True),
        Review(talk, "2", (Turn("right", "yes", "2"),), False),
    ]
    assert constitutional.describe(None, prompts, reviews) == {"changed": 0.5, "finished": 0.5}
    found = constitutional.describe(judge, prompts, reviews)
    assert found == {
        "changed": 0.5,
        "finished": 0.5,
        "answers": 0.5,
        "revisions": 1.0,
        "mended": 0.5,
        "spoilt": 0.0,
    }

    def reward(given=NOTHING, **prompts):
        options = constitutional.Options(
            model="m", constitution="c", prompts=option_groups.PromptOptions("d", **prompts)
        )
        return constitutional.text_reward(options, given)

    assert reward() is None
    assert reward(rewards=("runs/reward_model",)) is None
    assert reward(rewards=(f"{_EXACT}@sum=0.5",)) is exact_answer_reward
    assert reward(Given(rewards=[(judge, 2.0)])) is judge
