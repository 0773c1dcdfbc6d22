"""The documentation site: pages made from code are up to date, docstrings readable, links alive."""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import logging
import os
import pathlib
import re
import subprocess
import sys

import pytest

from rlhf_jax import losses
from rlhf_jax.algorithms.grpo_variants import grpo_variants

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def made():
    """Pages that are made from the code, by their path from the root."""
    spec = importlib.util.spec_from_file_location("docs_pages", ROOT / "tools/docs_pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.pages()


def build(folder, *, reference):
    """The site, every warning an error."""
    env = os.environ | {"DOCS_REFERENCE": str(reference).lower(), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_pages_made_from_the_code_are_up_to_date(made):
    for name, text in made.items():
        path = ROOT / name
        assert path.exists(), f"{name} is missing: python tools/docs_pages.py"
        assert path.read_text() == text, f"{name} is out of date: python tools/docs_pages.py"


def test_no_page_of_the_reference_is_of_a_room_that_is_gone(made):
    reference = {name for name in made if name.startswith("docs/reference/")}
    assert reference == {str(path.relative_to(ROOT)) for path in (ROOT / "docs/reference").glob("*.md")}


def test_the_reference_has_every_public_module():
    listed = "\n".join(path.read_text() for path in (ROOT / "docs/reference").glob("*.md"))
    for path in (ROOT / "rlhf_jax").rglob("*.py"):
        name = inspect.getmodulename(path.name)
        dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        defines = [line for line in path.read_text().splitlines() if line.startswith(("def ", "class "))]
        public = [line for line in defines if not line.split()[1].startswith("_")]
        in_a_room = path.parent != ROOT / "rlhf_jax"
        if public and in_a_room and not name.endswith("_worker"):
            assert f"\n::: {dotted}\n" in listed + "\n", dotted


def test_the_index_of_papers_has_every_loss_and_variant():
    page = (ROOT / "docs/papers.md").read_text()
    wanted = [name for name in losses.__all__ if name.endswith("_loss")]
    wanted += [function.__name__ for function in grpo_variants().values()]
    wanted += ["k1", "k2", "k3", "generalized_advantage_estimation", "vtrace", "sac"]
    assert not [name for name in wanted if f"[`{name}`]" not in page]


def test_docstrings_are_read_as_they_are_meant(caplog):
    import griffe

    def read(thing):
        for member in thing.members.values():
            if not member.is_alias:
                _ = member.docstring and member.docstring.parsed
                read(member)

    with caplog.at_level(logging.WARNING):
        read(griffe.load("rlhf_jax", search_paths=[str(ROOT)], docstring_parser="google"))
    assert not caplog.messages


def test_the_site_builds_without_a_warning(tmp_path):
    build(tmp_path, reference=False)
    front = (tmp_path / "index.html").read_text()
    assert 'href="quickstart/"' in front
    assert list(tmp_path.rglob("rl_curves.*"))  # pictures that stand beside their studies


def settings_of(module):
    """Paths of the settings of an RL algorithm, as `rlhf rl --set` takes them."""

    def walk(holder, prefix):
        for field in dataclasses.fields(holder):
            yield f"{prefix}{field.name}"
            value = getattr(holder, field.name)
            if dataclasses.is_dataclass(value):
                yield from walk(value, f"{prefix}{field.name}.")

    return {*walk(module.Config(), ""), *walk(module.Hyper(), "hyper.")}


@pytest.mark.parametrize("algorithm", ["ppo", "dqn", "sac"])
def test_settings_beside_those_of_stable_baselines_exist(algorithm):
    page = (ROOT / "docs/coming_from.md").read_text().partition("## Stable-Baselines3")[2]
    table = page.partition(f"| `{algorithm.upper()}` there | `--set` here |")[2].partition("\n\n")[0]
    ours = [name for line in table.splitlines()[2:] for name in re.findall(r"`([^`]+)`", line.split("|")[2])]
    known = settings_of(importlib.import_module(f"rlhf_jax.rl.algorithms.{algorithm}")) | {"auto"}
    assert len(ours) > 5
    assert set(ours) <= known, set(ours) - known


def messages():
    """Every text in the package, its parts that are filled in as a NUL."""
    for path in (ROOT / "rlhf_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(
                    str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_errors_that_are_explained_can_come():
    page = (ROOT / "docs/troubleshooting.md").read_text()
    table = page.partition("## Errors")[2].partition("## ")[0]
    firsts = [line.split("|")[1] for line in table.splitlines() if line.startswith("| ") and "`" in line]
    quoted = [words for first in firsts for words in re.findall(r"`([^`]+)`", first)]
    assert len(quoted) > 12
    known = list(messages())
    for words in quoted:
        pattern = re.compile(
            re.sub(r"(--[xy]|\bN\b|\\\.\\\.\\\.)", ".*", re.escape(words).replace(r"\-", "-")), re.S
        )
        assert any(pattern.search(text) for text in known), words


@pytest.mark.slow
def test_the_site_builds_with_the_reference(tmp_path):
    build(tmp_path, reference=True)
    page = (tmp_path / "reference/losses/index.html").read_text()
    assert 'id="rlhf_jax.losses.preference.dpo_loss"' in page
