"""The seam to the built-in tasks: what `arithmetic:LEVEL` names, and who knows of it."""

import ast
from pathlib import Path

import pytest

from rlhf_jax import stages
from rlhf_jax.core.errors import UserError
from rlhf_jax.stages import embedded


def test_levels():
    assert embedded.find_level("rows.jsonl") is None
    assert embedded.find_level("arithmetic:1") != embedded.find_level("arithmetic:2")
    with pytest.raises(UserError, match="no such level: choose one of arithmetic:"):
        embedded.find_level("arithmetic:99")
    assert embedded.task_tokenizer("rows.jsonl") is None


def test_no_other_stage_knows_the_tasks():
    importing = set()
    for path in Path(next(iter(stages.__path__))).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rlhf_jax.tasks"):
                importing.add(path.stem)
    assert importing == {"embedded"}
