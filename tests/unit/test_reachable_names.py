"""No function is there for its tests alone: commands, pipelines, studies or documented code reach it.

Whatever a stage, a command, a script, or code in the README, the guides and the pages on extending says is
reached, and what reached definitions say. Words are followed, not bindings: too much is found, rather than
too little.
"""

import ast
import collections
import functools
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "rlhf_jax"
FROM = ("rlhf_jax/stages", "rlhf_jax/cli", "rlhf_jax/serve", "experiments", "tools", "docs/examples")
BY_REFLECTION = ("rlhf_jax/algorithms/grpo_variants.py", "rlhf_jax/losses/reward.py")
"""Files whose public functions are found by their names."""
OF_TASKS = ("tasks",)
"""Tasks with known truth, which tests are meant to use."""


WORD = re.compile(r"\b[A-Za-z_]\w*\b")


def words(node):
    """Names that a piece of code says, those in strings such as `module:function` too."""
    found = set()
    for child in ast.walk(node):
        match child:
            case ast.Name(id=name) | ast.Attribute(attr=name):
                found.add(name)
            case ast.alias(name=name):
                found.add(name.rpartition(".")[2])
            case ast.Constant(value=str(text)):
                found |= set(WORD.findall(text)) if ":" in text else {text}
    return found


def words_of_documents():
    """What stands in code, in blocks and between backticks."""
    pages = [ROOT / "README.md", ROOT / "docs" / "quickstart.md"]
    for folder in ("guide", "extend"):
        pages += (ROOT / "docs" / folder).rglob("*.md")
    for path in pages:
        for code in re.findall(r"```.*?```|`[^`\n]+`", path.read_text(encoding="utf-8"), re.DOTALL):
            yield from WORD.findall(code)


@functools.cache
def reached():
    says = collections.defaultdict(set)
    start = set()
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(ROOT).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if name.startswith(FROM) or name in BY_REFLECTION:
            start |= words(tree)
            start |= {
                node.name for node in tree.body if name in BY_REFLECTION and isinstance(node, ast.FunctionDef)
            }
            continue
        for node in tree.body:
            match node:
                case ast.FunctionDef(name=defined) | ast.ClassDef(name=defined):
                    says[defined] |= words(node)
                case ast.Assign(targets=[ast.Name(id=defined)]) | ast.AnnAssign(target=ast.Name(id=defined)):
                    says[defined] |= words(node) if defined != "__all__" else set()
                case ast.Import() | ast.ImportFrom() | ast.Expr():
                    pass
                case _:
                    start |= words(node)
    for folder in FROM[3:]:
        for path in (ROOT / folder).rglob("*.py"):
            start |= words(ast.parse(path.read_text(encoding="utf-8")))
    start |= set(words_of_documents())
    seen, waiting = set(), list(start)
    while waiting:
        word = waiting.pop()
        if word not in seen:
            seen.add(word)
            waiting.extend(says.get(word, ()))
    return seen


def public_names():
    for folder in sorted(path for path in PACKAGE.iterdir() if path.is_dir() and path.name not in OF_TASKS):
        names = [
            f"{path.relative_to(ROOT).as_posix()}:{node.name}"
            for path in sorted(folder.rglob("*.py"))
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        ]
        if names:
            yield pytest.param(names, id=folder.name)


@pytest.mark.parametrize("names", public_names())
def test_each_public_name_is_reached(names):
    assert [name for name in names if name.rpartition(":")[2] not in reached()] == []


def test_a_name_that_nothing_says_is_not_reached():
    assert "mean_of_all_that_is_never_called" not in reached()
    assert {"grpo_loss", "a_star", "sarsa_target"} <= reached()
