"""Docstrings begin with what the field calls the thing, and not with a question."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2] / "rlhf_jax"
QUESTION = re.compile(r"(What|Which|How|Whether|Where|When|Who|Their|Its|Those|Of)\b")


def docstrings(node, name="module"):
    """(name, docstring) of a module, its public functions and classes, and their public methods."""
    yield name, ast.get_docstring(node) or ""
    inside = [] if isinstance(node, ast.FunctionDef) else ast.iter_child_nodes(node)
    for child in inside:
        if isinstance(child, ast.FunctionDef | ast.ClassDef) and not child.name.startswith("_"):
            yield from docstrings(child, child.name)


@pytest.mark.parametrize("room", sorted(path.name for path in ROOT.iterdir() if path.name != "__pycache__"))
def test_docstrings_name_things(room):
    files = [ROOT / room] if room.endswith(".py") else sorted((ROOT / room).rglob("*.py"))
    found = [
        f"{file.relative_to(ROOT)}: {name}: {text.splitlines()[0]}"
        for file in files
        for name, text in docstrings(ast.parse(file.read_text()))
        if QUESTION.match(text)
    ]
    assert not found
