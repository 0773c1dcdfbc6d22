"""The stages with --adapter: what they train, save and load, and one frozen base under four models."""

import json
import shutil

import jax
import numpy as np
import pytest

from rlhf_jax.checkpoint import read_manifest
from rlhf_jax.core.trees import named_leaves
from rlhf_jax.metrics import read_metrics
from rlhf_jax.models import adapters, forward
from rlhf_jax.training.run_folder import load_policy, load_reward_model

LORA = ("--adapter.kind", "lora", "--adapter.rank", 2, "--steps", 3)


def lines(folder):
    """Of the steps; the first evaluation, before them, has a line of its own."""
    steps = [line for line in read_metrics(folder) if line["step"]]
    return [{k: v for k, v in line.items() if not k.startswith("time")} for line in steps]


def saved(folder):
    leaves = read_manifest(folder / "checkpoints").leaves
    return {name.removeprefix("learner/params/") for name in leaves if name.startswith("learner/params/")}


def differs(a, b):
    return [name for name, leaf in named_leaves(a).items() if not np.array_equal(leaf, named_leaves(b)[name])]


@pytest.fixture(scope="module")
def lora_reward(tiny, tmp_path_factory):
    return tiny.run("reward_model", tmp_path_factory.mktemp("reward") / "run", *LORA)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "dpo", pytest.param("grpo", marks=pytest.mark.slow)])
def test_a_policy_s_adapter_alone_is_trained_saved_and_put_on_its_base_again(stage, tiny, tmp_path, capsys):
    base = tiny.finished("sft")
    words = ("--model", base, "--no-quiet", "--learning-rate", 1e-2)
    if stage == "grpo":  # the verifier finds no difference between answers of so small a model
        words += ("--rewards", tiny.finished("reward_model"))
    out = tiny.run(stage, tmp_path / "run", *LORA, *words)
    shown = capsys.readouterr().out
    assert "Trains 608 numbers in 14 leaves" in shown
    assert "layer_*/attention/query/lora_a" in shown
    assert {name.rpartition("/")[2] for name in saved(out)} == {"lora_a", "lora_b"}
    assert lines(out)[-1]["skipped"] == 0
    policy, before = load_policy(out), load_policy(base)
    assert jax.tree.structure(policy.params) == jax.tree.structure(before.params)
    assert {name.rpartition("/")[2] for name in differs(policy.params, before.params)} == {"kernel"}


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(words, id=words[0], marks=pytest.mark.slow)
        for words in (
            ("dora", "--adapter.quantize", "nf4"),
            ("pissa", "--adapter.rank", 2),
            ("adalora", "--adapter.rank", 2),
            ("prefix", "--adapter.length", 2),
            ("prompt", "--adapter.length", 2),
            ("bottleneck", "--adapter.width", 2),
            ("partial", "--adapter.train", "layer_0/.*|final_norm.*"),
        )
    ],
)
def test_every_kind_trains_and_comes_back(words, tiny, tmp_path):
    base = tiny.finished("sft")
    out = tmp_path / "run"
    tiny.run("sft", out, "--model", base, "--adapter.kind", *words, "--steps", 3, "--learning-rate", 1e-2)
    policy, before = load_policy(out), load_policy(base)
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6) % before.config.vocab_size
    change = np.abs(
        forward(policy.config, policy.params, tokens) - forward(before.config, before.params, tokens)
    )
    assert change.max() > 1e-4
    assert np.isfinite(lines(out)[-1]["eval/loss"])


@pytest.mark.slow
def test_resumed_is_unbroken_to_the_bit(tiny, tmp_path):
    base, constant = tiny.finished("sft"), ("--optimizer.schedule", "constant")
    words = ("--model", base, "--adapter.kind", "dora", *constant, "--eval-every", 100)
    whole = tiny.run("sft", tmp_path / "whole", *words, "--steps", 6)
    tiny.run("sft", tmp_path / "broken", *words, "--steps", 4)
    broken = tiny.run("sft", tmp_path / "broken", *words, "--steps", 6, "--resume")
    for ours, theirs in zip(lines(broken), lines(whole), strict=True):
        assert {k: v for k, v in ours.items() if "eval" not in k} == {
            k: v for k, v in theirs.items() if "eval" not in k
        }
    assert not differs(load_policy(broken).params, load_policy(whole).params)


@pytest.mark.slow
def test_four_models_on_one_frozen_base(tiny, tmp_path, lora_reward, monkeypatch):
    """Policy, value, reference and reward: the base stands in memory once, never moves, never changes."""
    from rlhf_jax.stages import session

    seen, run_loop = [], session.run_loop

    def watched(state, step, *rest, **options):
        expected = jax.tree.map(np.array, state.learner.frozen["base"])

        def counted(state, number):
            state, metrics = step(state, number)
            jax.tree.map(np.testing.assert_array_equal, state.learner.frozen["base"], expected)
            arrays = {n: x for n, x in named_leaves(state).items() if "key" not in str(x.dtype)}
            seen.append({name: array.unsafe_buffer_pointer() for name, array in arrays.items()})
            return state, metrics

        return run_loop(state, counted, *rest, **options)

    base = tiny.finished("sft")
    tiny.finished("reward_model")
    monkeypatch.setattr(session, "run_loop", watched)
    out = tiny.run("ppo", tmp_path / "run", *LORA, "--reward-model", lora_reward, "--learning-rate", 1e-2)
    buffers = seen[-1]
    assert len(set(buffers.values())) == len(buffers)
    base_names = [name for name in buffers if name.startswith("learner/frozen/base/")]
    assert [buffers[name] for name in base_names] == [seen[0][name] for name in base_names]
    kernels = [name for name in buffers if name.endswith("kernel") and "head" not in name]
    assert kernels
    assert set(kernels) <= set(base_names)
    roles = {name.split("/")[2] for name in buffers if name.startswith("learner/frozen")}
    assert roles == {"base", "policy", "value", "reward"}
    names = saved(out)
    assert {name.split("/")[0] for name in names} == {"policy", "value"}
    assert not [name for name in names if "kernel" in name and "head" not in name]
    assert differs(load_policy(out).params, load_policy(base).params)
    assert load_reward_model(lora_reward).params.keys() == {"decoder", "head"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "adapter", [(), pytest.param(("--adapter.kind", "prefix", "--adapter.length", 2), marks=pytest.mark.slow)]
)
def test_a_second_head_on_the_policy_s_body(tiny, tmp_path, adapter):
    out = tiny.run("ppo", tmp_path / "run", "--value", "shared", "--steps", 3, *adapter)
    assert {name for name in saved(out) if name.startswith("value")} == {
        "value/head/kernel",
        "value/head/bias",
    }
    assert all(np.isfinite(line["loss"]) for line in lines(out))


# Mistakes --------------------------------------------------------------------------------------------


def sentence(tiny, stage, words, monkeypatch, capsys):
    assert tiny.main(stage, words, monkeypatch) == 2
    return capsys.readouterr().err


def test_mistakes_are_sentences(tiny, tmp_path, monkeypatch, capsys):
    base = tiny.finished("sft")
    start = ("--model", base)

    def refused(*words, stage="sft"):
        return sentence(tiny, stage, tiny.words(stage, tmp_path / "out", *words), monkeypatch, capsys)

    nowhere = ("--data", tmp_path / "nowhere.jsonl")  # said before data is looked for
    assert "needs a model to adapt" in refused(*LORA, *nowhere)
    assert "--adapter.rank means nothing to --adapter.kind prefix" in refused(
        *start, "--adapter.kind", "prefix", "--adapter.rank", 3
    )
    assert "say what with --adapter.train" in refused(*start, "--adapter.kind", "partial")
    nothing = refused(*start, "--adapter.kind", "partial", "--adapter.train", "nothing")
    assert "nothing would be trained" in nothing
    assert "match no linear layer" in refused(*start, *LORA, "--adapter.targets", "q_proj")


@pytest.mark.slow
def test_a_base_that_is_gone_or_another(tiny, tmp_path, monkeypatch, capsys):
    base, out = tmp_path / "base", tmp_path / "run"
    shutil.copytree(tiny.finished("sft"), base)
    tiny.run("dpo", out, "--model", base, *LORA)
    described = json.loads((out / "model.json").read_text())
    assert described["base"]["folder"] == "../base"
    assert adapters.can_merge(load_policy(out).params)
    shutil.rmtree(base)
    words = tiny.words("dpo", tmp_path / "next", "--model", out)
    assert f"the model that it adapts is not at {base}" in sentence(tiny, "dpo", words, monkeypatch, capsys)
    tiny.run("sft", base, "--steps", 3)
    assert "which now holds another model" in sentence(tiny, "dpo", words, monkeypatch, capsys)
    resume = tiny.words("dpo", out, "--model", base, *LORA, "--resume")
    assert "was trained on another model" in sentence(tiny, "dpo", resume, monkeypatch, capsys)


def test_nothing_is_trained_on_what_cannot_be_merged(tiny, tmp_path, monkeypatch, capsys):
    prefix = ("--adapter.kind", "prefix", "--steps", 3)
    first = tiny.run("sft", tmp_path / "first", "--model", tiny.finished("sft"), *prefix)
    words = tiny.words("dpo", tmp_path / "next", "--model", first)
    assert "nothing is trained on top of these" in sentence(tiny, "dpo", words, monkeypatch, capsys)


@pytest.mark.slow
def test_an_adapter_goes_to_peft_and_comes_back(tiny, tmp_path, monkeypatch):
    def converted(**options):
        command = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        assert tiny.main("convert", [w for w in command if w != "True"], monkeypatch) == 0

    base = tiny.finished("sft")
    first = tiny.run("dpo", tmp_path / "first", "--model", base, *LORA, "--learning-rate", 1e-2)
    converted(source=first, out=tmp_path / "peft", adapter=True)
    converted(source=tmp_path / "peft", base=base, out=tmp_path / "second")
    expected = load_policy(first).params
    assert differs(expected, load_policy(base).params)
    assert not differs(load_policy(tmp_path / "second").params, expected)
    converted(source=first, out=tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").is_file()
