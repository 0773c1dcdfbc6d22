"""`import rlhf_jax as rj`: the documentation's example files run, are as short as they are meant to be, and
mistakes are said in words of Python."""

import importlib.util
import json
import pathlib
import runpy
import subprocess
import sys

import jax
import numpy as np
import pytest
from letters import speaks_in_letters
from tiers import few

import rlhf_jax as rj
from rlhf_jax import models
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import OptimizerConfig
from rlhf_jax.data.sources import as_rows
from rlhf_jax.data.tokenizers import byte_tokenizer, character_tokenizer
from rlhf_jax.models import hf

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "docs" / "examples"
LINES = {"chat": 5, "grpo_lora": 12, "own_loss": 15, "own_model": 30, "own_data": 7}
SIZES = {"batch_size": 2, "max_new_tokens": 4, "steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder of a random decoder over bytes."""
    path, tokenizer = tmp_path_factory.mktemp("model") / "hf", byte_tokenizer()
    config = models.dense_config(
        vocab_size=tokenizer.vocab_size, width=16, num_layers=2, num_heads=2, tie_word_embeddings=False
    )
    hf.save(path, config, models.init_params(config, jax.random.key(0)), tokenizer)
    return path


@pytest.fixture(scope="module")
def policy(folder):
    """That decoder, loaded once."""
    return rj.load(folder)


def length(prompts, completions, **_):
    return [float(len(text)) for text in completions]


def code_lines(text):
    """Lines that are neither blank, nor comments, nor the docstring of the file."""
    lines = [line for line in text.splitlines() if line.strip() and not line.strip().startswith(("#", '"""'))]
    return len(lines)


def test_all_examples_have_a_limit():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(LINES)


@pytest.mark.parametrize("name", few(sorted(LINES), "chat", "own_loss"))
def test_examples_are_short_and_run(name, folder, tmp_path, monkeypatch):
    path = EXAMPLES / f"{name}.py"
    assert code_lines(path.read_text()) <= LINES[name]
    words = {"chat": [folder], "own_model": [tmp_path]}.get(name, [folder, tmp_path])
    monkeypatch.setattr(sys, "argv", [path.name, *map(str, words)])
    runpy.run_path(str(path), run_name="__main__")
    if name == "grpo_lora":
        saved, before = rj.load(tmp_path / "merged"), rj.load(folder)
        tokens = np.arange(4)[None]
        assert saved.logits(tokens).shape == before.logits(tokens).shape
        assert len(rj.load(tmp_path / "run").params) == len(before.params)


def test_import_is_light():
    program = "import rlhf_jax, sys; print(sorted(m for m in ('jax', 'flax', 'tyro') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_callbacks_loggers_and_own_evaluation(folder, tmp_path):
    seen, logged, sizes = [], [], []

    async def one_by_one(prompts, completions, **_):
        sizes.append(len(prompts))
        return [None] if prompts == ["a"] else length(prompts, completions)

    run = rj.grpo(
        rj.load(folder),
        [{"prompt": "a"}, {"prompt": "b"}],
        rewards=[(one_by_one, 2.0)],
        reward_workers=2,
        reward_timeout=60.0,
        group_size=2,
        out=tmp_path / "run",
        loggers=logged.append,
        on_step=lambda state, metrics, step: seen.append(step),
        eval_fn=lambda state, step: {"mine": step + 0.5},
        **SIZES,
    )
    assert seen == [1, 2]
    assert [line["eval/mine"] for line in run.metrics if "eval/mine" in line] == [0.5, 2.5]
    assert len(logged) == len(run.metrics)
    assert set(sizes) == {1}
    assert [line["unscorable"] for line in run.metrics if "unscorable" in line] == [2, 2]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["stage"] == "grpo"


def test_rows_of_every_kind(tmp_path):
    fields = [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}]
    pandas, pyarrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in fields))
    for rows in (fields, iter(fields), pandas.DataFrame(fields), pyarrow.Table.from_pylist(fields), path):
        assert [row.fields for row in as_rows(rows)] == fields
    missing = pandas.DataFrame([{"prompt": "a", "n": 1.5}, {"prompt": "b", "n": None}])
    assert [row.fields["n"] for row in as_rows(missing)] == [1.5, None]
    found = as_rows([{"n": np.int64(3), "names": np.array(["a"])}])[0].fields
    assert found == {"n": 3, "names": ["a"]}
    assert type(found["n"]) is int
    for rows, said in (({"prompt": "a"}, "list of dicts"), (["a"], "row 1 is a str"), ([], "is empty")):
        with pytest.raises(UserError, match=said):
            as_rows(rows)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rewards": length}, "give a list of functions"),
        ({"rewards": ["no_such"]}, "no_such"),
        ({"num_generations": 4}, "there is no setting num_generations: give group_size"),
        ({"lr": 0.1}, "there is no setting lr: give learning_rate"),
        ({"lora_r": 4}, r"give adapter=rlhf_jax.lora\(rank=...\)"),
        (
            {"warmup_steps": 4},
            r"give optimizer=rlhf_jax.core.train_state.OptimizerConfig\(warmup_steps=...\)",
        ),
        ({"train_dataset": []}, "there is no setting train_dataset: give rows"),
        ({"data": "rows.jsonl"}, "there is no setting data: give rows"),
        ({"rewards": [(length, "2")]}, "the weight of a reward is '2': give a number"),
        ({"rewards": [(length, 1, 2)]}, "is no function"),
        ({"loggers": [3]}, "3 is no logger"),
        ({"loggers": "wandb"}, "loggers is 'wandb': give a function of the metrics"),
        ({"on_step": 3}, "on_step is 3: give a function"),
        ({"mesh": "fsdp=4"}, "mesh is no setting from Python: enter a mesh"),
        (
            {"on_step": lambda state: None},
            r"on_step: the function <lambda> cannot be called with \(state, metrics",
        ),
        (
            {"eval_fn": lambda state: {}},
            r"eval_fn: the function <lambda> cannot be called with \(state, step\)",
        ),
        ({"loggers": [lambda: None]}, r"loggers: the function <lambda> cannot be called with \(metrics\)"),
        ({"rows": [{1: "a"}]}, "row 1 has a field 1, which is no text"),
        ({"rows": [{"prompt": "a", "n": float("nan")}]}, "row 1: field 'n' is nan"),
        ({"eval_fn": 3}, "eval_fn is 3: give a function or None"),
        ({"remat": "full"}, r"remat is no setting from Python: .* rlhf_jax.load\(path, remat=...\)"),
        ({"scale_rewards": "some"}, "scale_rewards is 'some': give "),
        ({"optimizer": "adam"}, r"optimizer is 'adam': give one such as .*OptimizerConfig\(...\)"),
        ({"rows": None}, "rows is None: give a list of dicts"),
        ({"out": 3}, "out is 3: give a text or a path or None"),
        ({"steps": 1.5}, r"steps is 1\.5: give a whole number or None"),
        ({"steps": True}, "steps is True"),
        ({"learning_rate": "1e-3"}, "learning_rate is '1e-3': give a number or None"),
        ({"seed": "x"}, "seed is 'x': give a whole number"),
        ({"adapter": "lora"}, "rlhf_jax.lora"),
        ({"rows": "missing.jsonl"}, "no such file"),
        ({"policy": "a/path"}, "rlhf_jax.load"),
        ({"steps": 0}, "steps 0 is out of range: give 1 or more"),
    ],
)
def test_mistakes_in_words_of_python(change, said, folder, tmp_path):
    call = {"policy": rj.load(folder), "rows": [{"prompt": "a"}], "rewards": [length], **SIZES}
    call |= {"out": tmp_path / "run", **change}
    with pytest.raises(UserError, match=said) as caught:
        rj.grpo(call.pop("policy"), call.pop("rows"), **call)
    assert "--" not in str(caught.value)


ONE = [{"role": "user", "content": "a"}]
ROWS = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda p: p.generate("a", max_new_tokens=1), "prompts is 'a': give a list of texts"),
        (lambda p: p.generate(["a"], max_new_tokens=-1), "max_new_tokens -1 is out of range"),
        (lambda p: p.generate(["a"], max_tokens=8), "no argument max_tokens: give max_new_tokens"),
        (lambda p: p.generate(["a"], max_new_tokens=1, top_p=2), "top_p 2 is out of range"),
        (lambda p: p.chat("hi", max_new_tokens=1), "messages is 'hi': give a list such as"),
        (lambda p: p.chat([ONE[0] | {"role": "wizard"}], max_new_tokens=1), "'wizard'"),
        (lambda p: p.logits([1, 2]), r"tokens has shape \(2,\) of int32: give whole numbers \[B, T\]"),
        (lambda p: p.logits([[1.5]]), "give whole numbers"),
        (lambda p: p.logits([[1], [1, 2]]), "rows of one length"),
        (lambda p: p.logits([[1, 9999]]), "tokens holds 1 to 9999: give ids from 0 to 258"),
        (lambda p: p.logits([[-1]]), "tokens holds -1 to -1"),
        (lambda p: p.save(3), "path is 3: give a text or a path"),
        (lambda _: rj.load(3), "path is 3: give a text or a path"),
        (lambda _: rj.load("x", remat="sometimes"), "remat is 'sometimes': give one of none, dots"),
        (lambda _: rj.lora(r=8), "there is no argument r: give rank"),
        (lambda _: rj.lora(lora_alpha=8), "there is no argument lora_alpha: give alpha"),
        (lambda _: rj.lora(load_in_4bit=True), "give quantize='nf4'"),
        (lambda _: rj.lora(width="8"), "width is '8': give a whole number"),
        (lambda _: rj.lora(rank=0), "rank 0 is out of range"),
        (lambda _: rj.lora(kind="qlora"), "kind is 'qlora': give one of none, lora"),
        (lambda p: rj.distill(p, "path"), "teacher is 'path': give what rlhf_jax.load"),
        (lambda p: rj.distill(p, p), r"distill\(\) needs rows"),
        (lambda p: rj.grpo(p, ROWS, [length]), "by position it takes policy, rows"),
        (lambda p: rj.ppo(p, ROWS, reward_model="no"), "reward 'no': there is no such folder"),
        (
            lambda p: rj.ppo(p, ROWS, reward_model=p),
            "reward_model is a Policy: it names folders",
        ),
        (lambda p: p.tokenizer.encode(3), "text is 3: give a string"),
        (lambda p: rj.evaluate(p, ROWS, rewards=[length]), r"evaluate\(\) needs max_new_tokens"),
        (lambda p: rj.wrap(3, {}, p.tokenizer), "apply_fn is 3: give a function"),
        (lambda p: rj.wrap(lambda params, tokens: 1 / 0, {}, p.tokenizer), "raised ZeroDivisionError"),
        (lambda p: rj.wrap(length, {}, None), "tokenizer is None: give a tokenizer"),
    ],
)
def test_mistakes_in_calls(call, said, policy):
    with pytest.raises(UserError, match=said):
        call(policy)


def test_a_file_is_no_folder_to_save_to(policy, tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match="file is a file where a folder is meant"):
        policy.save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize(
    ("returned", "said"),
    [(3.0, "returned 3.0 at step 0: give a dict"), ({"a": "b"}, "returned 'b' for a at step 0")],
)
def test_an_evaluation_of_no_numbers(returned, said, policy, tmp_path):
    rows = [{"prompt": "a", "completion": "b"}] * 2
    evaluation = {"eval_fn": lambda state, step: returned, "out": tmp_path / "run", "quiet": True}
    with pytest.raises(UserError, match=f"eval_fn {said}"):
        rj.sft(policy, rows, steps=1, batch_size=2, report=False, **evaluation)


def own_loss(returned):
    """A loss on pairs that returns this of the chosen log-probs."""
    return lambda pairs, *, beta, mask, denominator: returned(pairs.policy_chosen)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (3, "loss is 3: give a text or a function"),
        (lambda x: x, r"cannot be called .*'beta'.*: give a function \(pairs, \*, beta, mask, denominator\)"),
        (own_loss(lambda x: x.sum()), r"returned an array \(\): give a function"),
        (own_loss(lambda x: (x, {})), r"its loss is of shape \(2,\) and float32: reduce it to one number"),
        (own_loss(lambda x: (x.sum(), None)), r"returned an array \(\) and None"),
        (own_loss(lambda x: (x.sum(), {"a": x})), r"its metric a is of shape \(2,\)"),
        (own_loss(lambda x: x.nothing), "raised AttributeError .* on two rows: mend the function"),
    ],
)
def test_a_loss_that_is_none_is_refused_before_anything_is_compiled(loss, said, policy, tmp_path):
    with pytest.raises(UserError, match=said):
        rj.dpo(policy, ROWS, loss=loss, steps=1, batch_size=2, out=tmp_path / "run")


def test_a_loss_on_rankings_that_is_none(policy, tmp_path):
    with pytest.raises(UserError, match=r"cannot be called .*: give a function \(rewards, ranks, mask"):
        rj.reward_model(policy, ROWS, loss=lambda x: x, steps=1, batch_size=2, out=tmp_path / "run")


@pytest.mark.slow
def test_preferences_rewards_and_distillation(folder, tmp_path):
    policy, pairs = rj.load(folder), [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4
    dpo = rj.dpo(policy, pairs, loss="ipo", steps=2, batch_size=2, out=tmp_path / "dpo")
    assert np.isfinite(dpo.metrics[-1]["loss"])
    judge = rj.reward_model(policy, pairs, steps=2, batch_size=2, out=tmp_path / "rm").reward_model
    run = rj.online_dpo(policy, [{"prompt": "a"}] * 2, rewards=[judge], out=tmp_path / "online", **SIZES)
    assert np.isfinite(run.metrics[-1]["loss"])
    run = rj.distill(policy, dpo.policy, [{"prompt": "a"}] * 2, out=tmp_path / "distill", **SIZES)
    assert np.isfinite(run.metrics[-1]["loss"])


STAGE_ROWS = {
    "sft": [{"prompt": "a", "completion": "b"}],
    "reward_model": [{"prompt": "a", "chosen": "b", "rejected": "c"}],
    "process_reward": [{"prompt": "a", "completions": ["b", "c"], "labels": [1, 0]}],
    "dpo": [{"prompt": "a", "chosen": "b", "rejected": "c"}],
    **{name: [{"prompt": "a"}] for name in ("ppo", "grpo", "online_dpo", "rounds")},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGE_ROWS)
def test_every_stage_runs_from_python(name, tmp_path):
    """With a reward function as an object where it takes one, and rows that no option names."""
    settings = {"steps": 1, "batch_size": 2, "report": False}
    if name in ("ppo", "grpo", "online_dpo", "rounds"):
        settings |= {"rewards": [length], "max_new_tokens": 4}
    if name == "rounds":
        settings |= {"prompts_per_round": 4, "rounds": 1, "method": "expert_iteration"}
        settings |= {"reward_threshold": -1.0, "samples_per_prompt": 8}
    if name == "grpo":
        settings["group_size"] = 2
    rows = STAGE_ROWS[name] * 8
    speaks_in_letters().save(tmp_path / "start")
    run = getattr(rj, name)(rj.load(tmp_path / "start"), rows, out=tmp_path / "run", **settings)
    assert run.metrics
    assert run.folder == tmp_path / "run"


def test_rounds_of_more_prompts_than_there_are(policy):
    with pytest.raises(UserError, match=r"prompts_per_round 512 is more than the 2 prompts"):
        rj.rounds(policy, STAGE_ROWS["rounds"] * 2, rewards=[length], batch_size=2, max_new_tokens=4)


def test_rows_are_not_packed_for_a_model_that_takes_one_sample_a_row(policy, tmp_path):
    wrapped = rj.wrap(lambda params, tokens: policy.logits(tokens), {"w": np.zeros(2)}, policy.tokenizer)
    few = {"steps": 1, "batch_size": 2}
    with pytest.raises(UserError, match="packing puts several conversations in a row"):
        rj.sft(wrapped, STAGE_ROWS["sft"] * 4, packing=True, max_length=64, out=tmp_path / "run", **few)
    with pytest.raises(UserError, match="no linear layer of this package's models"):
        rj.sft(wrapped, STAGE_ROWS["sft"] * 4, adapter=rj.lora(rank=2), out=tmp_path / "lora", **few)


@pytest.mark.slow
def test_a_teacher_with_another_tokenizer(folder, tmp_path):
    tokenizer = character_tokenizer("abcdefghijklmnopqrstuvwxyz \n", ["one", "th"])
    config = models.dense_config(vocab_size=tokenizer.vocab_size, width=8, num_layers=1, num_heads=2)
    params = jax.tree.map(lambda x: 8 * x, models.init_params(config, jax.random.key(1)))  # it is sure
    teacher = models.make_policy(config, params, tokenizer)
    student, rows = rj.load(folder), [{"prompt": "one"}, {"prompt": "two three"}] * 4
    with pytest.raises(UserError, match=r"tokenizer .* is not the policy's .*: give loss gold or uld"):
        rj.distill(student, teacher, rows, out=tmp_path / "js", loss="js", **SIZES)
    words = {"loss": "gold", "learning_rate": 1e-2, "optimizer": OptimizerConfig(warmup_steps=0)}
    sizes = SIZES | {"batch_size": 8, "steps": 12}
    run = rj.distill(student, teacher, rows, out=tmp_path / "run", **words, **sizes)
    lines = [line for line in run.metrics if line["step"]]
    assert all(line["spans"] > 0 and line["skipped"] == 0 for line in lines)
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="pip install 'rlhf_jax[reasoning-gym]'"
)
def test_problems_of_reasoning_gym_are_scored_by_its_verifiers(folder, tmp_path):
    reward, data = "rlhf_jax.rewards.verifiers:reasoning_gym_reward", "reasoning-gym:gcd+letter_counting:4:3"
    run = rj.grpo(rj.load(folder), data, rewards=[reward], eval_count=2, out=tmp_path / "run", **SIZES)
    # Of bytes at random some verifiers think a little, none nothing.
    assert all(line["unscorable"] == 0 for line in run.metrics if line["step"])
    assert all(0 <= line["reward"] < 0.2 for line in run.metrics if line["step"])


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["ema", "initial"])
def test_a_policy_that_teaches_itself_without_rewards(teacher, folder, tmp_path):
    """At first both are one model, and only what the teacher sees sets them apart."""
    rows = [{"prompt": "a", "hint": "say b"}] * 2
    own = {"self_teacher": teacher, "loss": "reverse_kl", "top_k": 8, "learning_rate": 0.1}
    run = rj.distill(
        rj.load(folder), None, rows, eval_rows=rows[:1], teacher_context="hint", out=tmp_path, **own, **SIZES
    )
    assert run.metrics[-1]["student_writes"] == 1
    assert all(line["loss"] > 0 and line["skipped"] == 0 for line in run.metrics if line["step"])
    assert "eval/length" in run.metrics[-1]
    assert not [name for line in run.metrics for name in line if "reward" in name or "score" in name]
    samples = json.loads((tmp_path / "samples.json").read_text())
    before, after = samples[0]["completions"].values()
    assert before.keys() == {"text", "logp", "token/text", "token/logp"}
    assert after.keys() == before.keys() | {"kl", "token/kl"}
    with pytest.raises(UserError, match="the field 'no' of teacher_context holds no text"):
        rj.distill(rj.load(folder), None, rows, teacher_context="no", **own, **SIZES)
