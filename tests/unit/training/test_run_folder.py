"""Run folders: what one stage writes, the next one reads; damage is named."""

import dataclasses
import json
import shutil
import subprocess

import jax
import numpy as np
import optax
import pytest

from rlhf_jax import models
from rlhf_jax.algorithms import sft
from rlhf_jax.checkpoint import CheckpointManager
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.files import write_json
from rlhf_jax.data.tokenizers import character_tokenizer
from rlhf_jax.training import run_folder as run_folders
from rlhf_jax.training.run_folder import (
    describe_run,
    load_policy,
    load_reward_model,
    read_held_run,
    write_model_files,
)

TOKENIZER = character_tokenizer("0123456789+=")
CONFIG = models.dense_config(vocab_size=TOKENIZER.vocab_size, width=8, num_layers=1, num_heads=2)


def params_of(kind):
    policy = models.init_params(CONFIG, jax.random.key(0))
    if kind == "policy":
        return policy
    scalar = models.init_scalar_model(CONFIG, jax.random.key(1), policy)
    return scalar if kind == "reward_model" else {"policy": policy, "value": scalar}


def write_run(folder, kind, params):
    write_model_files(folder, models.make_policy(CONFIG, None, TOKENIZER), kind)
    with CheckpointManager(folder / "checkpoints") as checkpoints:
        checkpoints.save(3, sft.init(params, optax.identity(), jax.random.key(2)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{kind: (folder, parameters)}"""
    written = {}
    for kind in ("policy", "actor_critic", "reward_model"):
        folder, params = tmp_path_factory.mktemp("runs") / kind, params_of(kind)
        write_run(folder, kind, params)
        written[kind] = folder, params
    return written


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_policies_and_reward_models_come_back(runs):
    for kind, load, part in (
        ("policy", load_policy, lambda params: params),
        ("actor_critic", load_policy, lambda params: params["policy"]),
        ("reward_model", load_reward_model, lambda params: params),
    ):
        folder, params = runs[kind]
        model = load(folder)
        assert_equal(model.params, part(params))
        assert model.config == CONFIG
        assert model.tokenizer.encode("12+3=") == TOKENIZER.encode("12+3=")
        assert (model.tokenizer.eos_id, model.tokenizer.pad_id) == (TOKENIZER.eos_id, TOKENIZER.pad_id)


@pytest.mark.parametrize(
    ("kind", "load", "message"),
    [
        ("reward_model", load_policy, "holds a reward model, not a policy"),
        ("policy", load_reward_model, "holds a policy, not a reward model"),
        ("actor_critic", load_reward_model, "holds a policy, not a reward model"),
    ],
)
def test_a_run_of_the_wrong_kind_is_refused(runs, kind, load, message):
    with pytest.raises(UserError, match=message) as refused:
        load(runs[kind][0])
    assert str(runs[kind][0]) in str(refused.value)


def edited(change):
    """A description that says something else, in a folder from before there were digests."""

    def damage(folder):
        (folder / "digests.json").unlink()
        data = json.loads((folder / "model.json").read_text())
        change(data)
        (folder / "model.json").write_text(json.dumps(data))

    return damage


DAMAGES = {
    "missing": (lambda folder: (folder / "model.json").unlink(), "model.json: no such file"),
    "torn": (lambda folder: (folder / "model.json").write_text('{"kind": "pol'), "not a model description"),
    "bytes": (lambda folder: (folder / "model.json").write_bytes(b"\xff\xfe"), "not a model description"),
    "a list": (lambda folder: (folder / "model.json").write_text("[1]"), "not a model description"),
    "no kind": (edited(lambda data: data.pop("kind")), "not a model description"),
    "unknown kind": (edited(lambda data: data.update(kind="oracle")), "'oracle' is none of policy"),
    "no field": (edited(lambda data: data["config"].pop("width")), "model.json: not a model"),
    "new field": (edited(lambda data: data["config"].update(shape=3)), "model.json: not a model"),
    "heads": (
        edited(lambda data: data["config"]["pattern"][0]["attention"].update(num_kv_heads=3)),
        "model.json: not a model description .*num_kv_heads=3",
    ),
    "width": (
        edited(lambda data: data["config"].update(width=16)),
        "does not fit this run's model: leaf `embedding`",
    ),
    "tokenizer": (lambda folder: shutil.rmtree(folder / "tokenizer"), "no such tokenizer"),
    "checkpoints": (lambda folder: shutil.rmtree(folder / "checkpoints"), "checkpoints"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(runs, tmp_path, damage):
    shutil.copytree(runs["policy"][0], tmp_path / "run")
    change, message = DAMAGES[damage]
    change(tmp_path / "run")
    with pytest.raises(UserError, match=message) as refused:
        load_policy(tmp_path / "run")
    assert str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_no_run_at_all(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(UserError, match=r"model\.json"):
            load_policy(path)


def test_descriptions_say_what_was_run(tmp_path):
    describe_run(tmp_path / "run", {"seed": 3, "path": tmp_path}, stage="sft")
    held = json.loads((tmp_path / "run" / "config.json").read_text())
    assert held["config"] == {"seed": 3, "path": str(tmp_path)}
    assert held["stage"] == "sft"
    assert held["versions"]["jax"] == jax.__version__
    assert {"command", "started", "commit"} <= held.keys()


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not here")
def test_the_commit_is_that_of_this_checkout_and_says_whether_files_differ(tmp_path, monkeypatch):
    def git(*words):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", tmp_path, *identity, *words], check=True, capture_output=True)

    inside = tmp_path / "rlhf_jax" / "training" / "runs.py"
    inside.parent.mkdir(parents=True)
    inside.write_text("1")
    monkeypatch.setattr(run_folders, "__file__", str(inside))
    commit = run_folders.commit.__wrapped__
    assert commit() is None  # no checkout
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    clean = commit()
    assert clean is not None
    assert len(clean) == 10
    inside.write_text("2")
    assert commit() == clean + "+"
    deeper = tmp_path / "site-packages" / "rlhf_jax" / "training" / "runs.py"  # of another's checkout
    monkeypatch.setattr(run_folders, "__file__", str(deeper))
    assert commit() is None


def test_files_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.json: cannot be written"):
        write_json(tmp_path / "file" / "data.json", {})
    (tmp_path / "run" / "tokenizer" / "tokenizer.json").mkdir(parents=True)
    with pytest.raises(UserError, match="tokenizer: cannot be written"):
        write_model_files(tmp_path / "run", models.make_policy(CONFIG, None, TOKENIZER), "policy")


def test_another_dtype_of_the_same_architecture_is_another_architecture(runs, tmp_path):
    shutil.copytree(runs["policy"][0], tmp_path / "run")
    (tmp_path / "run" / "digests.json").unlink()
    half = dataclasses.replace(CONFIG, param_dtype="bfloat16")
    (tmp_path / "run" / "model.json").write_text(
        json.dumps({"kind": "policy", "config": models.config_to_dict(half)})
    )
    with pytest.raises(UserError, match="bfloat16"):
        load_policy(tmp_path / "run")


def test_a_folder_that_holds_a_run_is_used_again_only_by_the_same_stage_resumed(runs, tmp_path):
    assert read_held_run(tmp_path / "new", "sft", resume=False) == {}
    folder = tmp_path / "run"
    shutil.copytree(runs["policy"][0], folder)
    describe_run(folder, {"seed": 3}, stage="sft")
    assert read_held_run(folder, "sft", resume=True) == {"seed": 3}
    with pytest.raises(UserError, match="already holds a run at step 3: add --resume"):
        read_held_run(folder, "sft", resume=False)
    with pytest.raises(UserError, match="holds a run of sft, not of ppo"):
        read_held_run(folder, "ppo", resume=True)
    for torn in ('{"stage": "sft"', '{"stage": "sft"}', "[]"):
        (folder / "config.json").write_text(torn)
        with pytest.raises(UserError, match=r"config\.json: .*: remove it, or choose another --out"):
            read_held_run(folder, "sft", resume=True)


def test_what_describes_checkpoints_stays_as_it_is(runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs["policy"][0], folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    write_model_files(folder, models.make_policy(CONFIG, None, TOKENIZER), "policy")
    deeper = models.make_policy(dataclasses.replace(CONFIG, num_layers=2), None, TOKENIZER)
    with pytest.raises(UserError, match=r"another architecture .*num_layers 1, not 2"):
        write_model_files(folder, deeper, "policy")
    other = models.make_policy(CONFIG, None, character_tokenizer("9876543210+="))
    with pytest.raises(UserError, match="another tokenizer"):
        write_model_files(folder, other, "policy")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def damaged_copies(path):
    """Contents of a file with a bit flipped at every few places, parts cut off, and another text."""
    whole = path.read_bytes()
    for place in range(0, len(whole), max(len(whole) // 60, 1)):
        content = bytearray(whole)
        content[place] ^= 1 << place % 7
        yield bytes(content)
    for part in range(4):
        yield whole[: len(whole) * part // 4]
    yield b"{}\n"


@pytest.mark.parametrize(
    "name", ["model.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"]
)
def test_no_damage_of_what_describes_a_model_is_believed(runs, tmp_path, name):
    shutil.copytree(runs["policy"][0], tmp_path / "run")
    path, sentences = tmp_path / "run" / name, []
    for content in list(damaged_copies(path)):
        path.write_bytes(content)
        with pytest.raises(UserError) as refused:
            load_policy(tmp_path / "run")
        sentences.append(str(refused.value))
    assert len(sentences) > 50
    assert all(str(tmp_path / "run") in sentence and "\n" not in sentence for sentence in sentences)


def test_a_digit_a_missing_file_and_another_chat_template_are_named(runs, tmp_path):
    def spoilt(change):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(runs["policy"][0], tmp_path / "run")
        change(tmp_path / "run")
        with pytest.raises(UserError) as refused:
            load_policy(tmp_path / "run")
        return str(refused.value)

    def more_theta(folder):
        text = (folder / "model.json").read_text()
        assert '"theta": 10000.0' in text
        (folder / "model.json").write_text(text.replace('"theta": 10000.0', '"theta": 90000.0'))

    assert "model.json: it was changed since it was written: put the old one back" in spoilt(more_theta)
    gone = spoilt(lambda folder: (folder / "tokenizer" / "tokenizer_config.json").unlink())
    assert "tokenizer_config.json: the file is gone: put it back" in gone
    added = spoilt(lambda folder: (folder / "tokenizer" / "chat_template.jinja").write_text("{{ messages }}"))
    assert "chat_template.jinja: the run did not write this file: remove it" in added


def test_a_folder_without_digests_loads_and_is_taken_as_it_is(runs, tmp_path):
    shutil.copytree(runs["policy"][0], tmp_path / "run")
    (tmp_path / "run" / "digests.json").unlink()
    assert_equal(load_policy(tmp_path / "run").params, runs["policy"][1])
