"""Ejected scripts: short, with the loop in sight, importing nothing but the library, and they run."""

import ast
import json
import runpy
import sys

import jax
import pytest

from rlhf_jax.algorithms import reward, sft
from rlhf_jax.checkpoint import CheckpointManager
from rlhf_jax.cli.commands import main
from rlhf_jax.cli.eject import template
from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer
from rlhf_jax.metrics import read_metrics
from rlhf_jax.models import dense_config, init_params, make_policy
from rlhf_jax.tasks.arithmetic import arithmetic_tokenizer
from rlhf_jax.training.run_folder import load_policy, write_model_files

ALGORITHMS = ("sft", "dpo", "ppo", "grpo")


@pytest.fixture
def ejected(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)

    def eject(algorithm):
        path = tmp_path / f"my_{algorithm}.py"
        main(["eject", algorithm, str(path)])
        return path

    return eject


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_script_is_short_and_stands_on_the_library_alone(ejected, algorithm, capsys):
    path = ejected(algorithm)
    text = path.read_text()
    assert str(path) in capsys.readouterr().out
    assert len(text.splitlines()) <= 150
    assert f"python {path.name} --model" in text
    tree = ast.parse(text)
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    roots = {name.split(".")[0] for name in imported | modules}
    assert roots - set(sys.stdlib_module_names) == {"jax", "rlhf_jax"}
    # Nothing of what a command is made of: a floor is missing, not hidden.
    assert not {name for name in modules if name.startswith(("rlhf_jax.stages", "rlhf_jax.cli"))}
    loops = [node for node in ast.walk(tree) if isinstance(node, ast.For)]
    (loop,) = [node for node in loops if "steps" in ast.unparse(node.iter)]
    called = [ast.unparse(node.func) for node in ast.walk(loop) if isinstance(node, ast.Call)]
    wanted = {
        "sft": ["update"],
        "dpo": ["update", "make_batch"],
        "ppo": ["generate", "reward_fn.score", "make_batch", "update"],
        "grpo": ["generate", "reward_fn.score", "make_batch", "update"],
    }
    assert set(wanted[algorithm]) <= set(called)


def test_a_file_that_is_there_stays(ejected, capsys):
    path = ejected("sft")
    path.write_text("mine")
    with pytest.raises(SystemExit) as ended:
        main(["eject", "sft", str(path)])
    assert ended.value.code == 2
    assert "there is such a file already" in capsys.readouterr().err
    assert path.read_text() == "mine"
    assert template("sft").startswith('"""Supervised fine-tuning')


# Running --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(run folder of a tiny policy, that of a reward model on it)."""
    root = tmp_path_factory.mktemp("tiny")
    tokenizer = arithmetic_tokenizer()
    shape = {"width": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}
    config = dense_config(vocab_size=tokenizer.vocab_size, **shape)
    policy = make_policy(config, init_params(config, jax.random.key(0)), tokenizer)
    scorer = policy.init_scalar_model(jax.random.key(1))
    tx, key = make_optimizer(OptimizerConfig()), jax.random.key(2)
    for name, kind, state in (
        ("sft", "policy", sft.init(policy.params, tx, key)),
        ("reward_model", "reward_model", reward.init(scorer, tx, key)),
    ):
        write_model_files(root / name, policy, kind)
        with CheckpointManager(root / name / "checkpoints") as checkpoints:
            checkpoints.save(1, state)
    return root / "sft", root / "reward_model"


ROWS = {
    "sft": [{"prompt": f"{n}+1=?", "completion": f"#### {n + 1}"} for n in range(8)],
    "dpo": [{"prompt": f"{n}+1=?", "chosen": f"#### {n + 1}", "rejected": f"#### {n}"} for n in range(8)],
    "ppo": [{"prompt": f"{n}+1=?"} for n in range(8)],
    "grpo": [{"prompt": f"{n}+1=?", "answer": f"#### {n + 1}"} for n in range(8)],
}
MORE = {
    "sft": "",
    "dpo": "",
    "ppo": "--max-new-tokens 4 --num-minibatches 1 --num-ppo-epochs 1",
    "grpo": "--max-new-tokens 4 --group-size 2",
}


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_script_trains_and_goes_on(ejected, folders, algorithm, tmp_path, monkeypatch, capsys):
    path, data, out = ejected(algorithm), tmp_path / "rows.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS[algorithm]))
    # A random policy is never right: the user's own reward tells the answers of a group apart.
    own = "return [float(number % 2) for number in range(len(completions))]"
    path.write_text(path.read_text().replace("return gsm8k_reward(prompts, completions, **fields)", own))
    model, reward_model = folders
    words = ["--model", model, "--data", data, "--out", out, "--batch-size", 4, *MORE[algorithm].split()]
    words += ["--reward-model", reward_model] if algorithm == "ppo" else []
    for steps in (2, 3):
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, words), "--steps", str(steps)])
        runpy.run_path(str(path), run_name="__main__")
        said = capsys.readouterr().out
        assert f"step {steps}/{steps}" in said
        # The second call goes on where the first one ended.
        assert ("step 1/" in said) == (steps == 2)
        assert [line["step"] for line in read_metrics(out)] == list(range(1, steps + 1))
    assert (out / "report.html").is_file()
    before, after = load_policy(model).params, load_policy(out).params
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
    assert any(jax.tree.leaves(moved))
