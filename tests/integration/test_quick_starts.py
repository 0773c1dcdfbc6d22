"""The code and the commands of README and quick start, executed as they stand.

What they call MODEL, path/to/model, rows.jsonl and so on is in the folder in which they run: a random decoder
over bytes, and a few rows.
"""

import json
import pathlib
import re
import shlex
import shutil
import sys

import jax
import pytest

from rlhf_jax import models
from rlhf_jax.cli.commands import main
from rlhf_jax.data.tokenizers import byte_tokenizer
from rlhf_jax.models import hf

ROOT = pathlib.Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
ELSEWHERE = ("pip ", "bash tools/")
"""What installs, and the two commands that have tests of their own."""
ROWS = {
    "rows.jsonl": [{"prompt": f"{n}+1=?", "completion": str(n + 1)} for n in range(64)],
    "pairs.jsonl": [{"prompt": f"{n}+1=?", "chosen": str(n + 1), "rejected": "no"} for n in range(64)],
    "gsm8k/train.jsonl": [{"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(32)],
}


def blocks(page, language):
    return [code for found, code in FENCE.findall((ROOT / page).read_text()) if found == language]


def commands(block):
    lines = block.replace("\\\n", " ").splitlines()
    found = [line.partition("  #")[0].strip() for line in lines]
    return [line for line in found if line and not line.startswith(ELSEWHERE)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder that holds what the pages name."""
    folder, tokenizer = tmp_path_factory.mktemp("place"), byte_tokenizer()
    config = models.dense_config(
        vocab_size=tokenizer.vocab_size, width=16, num_layers=1, num_heads=2, tie_word_embeddings=False
    )
    hf.save(folder / "path/to/model", config, models.init_params(config, jax.random.key(0)), tokenizer)
    shutil.copytree(folder / "path/to/model", folder / "MODEL")
    for name, rows in ROWS.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_python_runs_as_it_stands(page, place, tmp_path, monkeypatch):
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    shutil.copytree(place / "MODEL", tmp_path / "runs/sft")  # of an earlier section
    monkeypatch.chdir(tmp_path)
    found = blocks(page, "python")
    assert len(found) >= 2
    for number, code in enumerate(found):
        if "runs/sft" in code and number > 0:
            shutil.rmtree(tmp_path / "runs/sft")
        exec(compile(code, f"{page}, block {number}", "exec"), {"__name__": "example"})


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_commands_run_as_they_stand(page, place, tmp_path, monkeypatch):
    for number, block in enumerate(blocks(page, "bash")):
        folder = tmp_path / str(number)
        shutil.copytree(place, folder)
        monkeypatch.chdir(folder)
        for command in commands(block):
            words = shlex.split(command)
            assert words[0] == "rlhf", command
            monkeypatch.setattr(sys, "argv", words)
            main()


def test_every_command_of_the_pages_is_looked_at():
    found = [
        command
        for page in ("README.md", "docs/quickstart.md")
        for block in blocks(page, "bash")
        for command in commands(block)
    ]
    assert len(found) >= 10
    assert all(command.startswith("rlhf ") for command in found), found
