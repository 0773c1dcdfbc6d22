"""The wheel builds, holds everything it needs, and imports outside the checkout."""

import os
import pathlib
import subprocess
import sys
import venv
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_wheel_builds_and_imports_elsewhere(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", str(ROOT), "-w", str(tmp_path)]
    subprocess.run(build, check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("rlhf_jax-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    program = (
        "import rlhf_jax, rlhf_jax.losses, rlhf_jax.models, rlhf_jax.algorithms.ppo, rlhf_jax.training\n"
        "from rlhf_jax.metrics import write_report\n"
        "print(rlhf_jax.__file__)\n"
        "write_report('.')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "site") in done.stdout
    assert (tmp_path / "report.html").exists()


@pytest.mark.slow
def test_the_wheel_alone_in_an_empty_environment(tmp_path):
    """What a newcomer has, the wheel and what it depends on: example files, commands, an ejected script."""
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", str(ROOT), "-w", str(tmp_path)]
    subprocess.run(build, check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("rlhf_jax-*.whl")
    venv.create(tmp_path / "env", with_pip=True)
    bin_folder = tmp_path / "env" / "bin"
    install = [bin_folder / "pip", "install", "--quiet", "-c", ROOT / "tools" / "constraints.txt", wheel]
    subprocess.run(install, check=True, cwd=tmp_path)

    def run(*words):
        # A path of the tests' own process would put the checkout before the wheel.
        alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run([*map(str, words)], cwd=tmp_path, capture_output=True, text=True, env=alone)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    python, rlhf = bin_folder / "python", bin_folder / "rlhf"
    (tmp_path / "make.py").write_text(
        "import jax\n"
        "from rlhf_jax import models\n"
        "from rlhf_jax.models import hf\n"
        "from rlhf_jax.data.tokenizers import byte_tokenizer\n"
        "t = byte_tokenizer()\n"
        "c = models.dense_config(vocab_size=t.vocab_size, width=16, num_layers=2, num_heads=2, "
        "tie_word_embeddings=False)\n"
        "hf.save('model', c, models.init_params(c, jax.random.key(0)), t)\n"
    )
    run(python, "make.py")
    examples = ROOT / "docs" / "examples"
    run(python, examples / "chat.py", "model")
    run(python, examples / "grpo_lora.py", "model", "grpo")
    run(python, examples / "own_loss.py", "model", "loss")
    run(python, examples / "own_model.py", "own")
    assert "grpo" in run(rlhf, "--help")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    sft = (rlhf, "sft", "--model", "model", "--data", "rows.jsonl", "--steps", 2, "--batch-size", 2)
    run(*sft, "--out", "sft", "--quiet")
    run(rlhf, "sft", "--config", "sft/config.yaml", "--out", "again")
    assert run(rlhf, "generate", "--model", "again", "--prompt", "a") is not None
    run(rlhf, "eject", "sft", "mine.py")
    mine = (python, "mine.py", "--model", "model", "--data", "rows.jsonl", "--out", "mine")
    run(*mine, "--steps", 2, "--batch-size", 2)
