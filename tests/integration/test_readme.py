"""What the README and the documentation say is so: code, commands with their options, paths, links, names."""

import ast
import functools
import importlib
import importlib.util
import itertools
import pathlib
import re
import shlex

import numpy as np
import pytest
import tyro
import yaml

import rlhf_jax
from rlhf_jax.algorithms import preference
from rlhf_jax.cli import parsing
from rlhf_jax.cli.commands import COMMANDS, stage_module
from rlhf_jax.core.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "experiments/README.md",
    *DOCS,
]
EVERYWHERE = {"--help", "--config", "--resume", "--no-resume"}
"""Options that every command has, or that are read before its own."""
RUN_FOLDER = {"config.yaml", "tokenizer", "checkpoints", "tensorboard", "profile"}
FENCE = re.compile(
    r"^(?P<mark><!-- (?:not )?run -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S
)
FOLDERS = ("experiments", "tools", "tests", "docs", "rlhf_jax")
HOUSE = ROOT / "rlhf_jax"
OF_OTHERS = ("examples/scripts/",)
"""Folders of other projects whose files are named as sources."""


def name_of(page):
    return str(page.relative_to(ROOT))


def fences(page, *languages):
    return [found for found in FENCE.finditer(page.read_text()) if found["language"] in languages]


def inline_code(page):
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text()))


def marked(page, mark):
    return [
        found["code"]
        for found in fences(page, "python")
        if (found["mark"] or "").strip() == f"<!-- {mark} -->"
    ]


PYTHON = [
    pytest.param(found["code"], id=f"{name_of(page)}-{index}")
    for page in PAGES
    for index, found in enumerate(fences(page, "python"))
    if (found["mark"] or "").strip() != "<!-- not run -->"
]
WITH_A_TEST = {"own_loss.md", "own_reward.md", "own_model.md", "rl_algorithm.md"}
"""Pages whose block is also looked at, below."""
TAKE_LONG = {"rl.md", "own_environment.md"}
RUNNABLE = [
    pytest.param(code, id=f"{name_of(page)}-{index}", marks=[pytest.mark.slow] * (page.name in TAKE_LONG))
    for page in PAGES
    if page.name not in WITH_A_TEST
    for index, code in enumerate(marked(page, "run"))
]
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=name_of)


# Code ------------------------------------------------------------------------------------------------


def has(module, name):
    return hasattr(module, name) or importlib.util.find_spec(f"{module.__name__}.{name}") is not None


def unresolved(tree):
    """What a block imports, or takes from the package itself, and does not exist."""
    packages = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            packages |= {alias.asname for alias in node.names if alias.name == "rlhf_jax"}
            yield from (alias.name for alias in node.names if not importlib.util.find_spec(alias.name))
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            yield from (f"{node.module}.{alias.name}" for alias in node.names if not has(module, alias.name))
    for node in ast.walk(tree):
        of_package = (
            isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in packages
        )
        if of_package and not has(rlhf_jax, node.attr):
            yield f"rlhf_jax.{node.attr}"


@pytest.mark.parametrize("code", PYTHON)
def test_python_compiles_and_what_it_imports_exists(code):
    assert not list(unresolved(ast.parse(code)))


@pytest.mark.parametrize("code", RUNNABLE)
def test_complete_examples_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "example", "exec"), {"__name__": "example"})


@pytest.mark.slow
def test_own_loss_in_20_lines_trains():
    (block,) = marked(ROOT / "docs/extend/own_loss.md", "run")
    assert len(block.split("def margin_dpo_loss")[1].splitlines()) <= 20
    names = {}
    exec(block, names)
    first = float(names["metrics"]["loss"])
    np.testing.assert_allclose(first, np.log1p(np.exp(0.5)), rtol=1e-5)  # no lead yet, a margin of 0.5
    state = names["state"]
    for _ in range(5):
        hyper = preference.Hyper(learning_rate=1e-3, beta=0.5)
        state, metrics = names["update"](state, hyper, names["batch"])
    assert float(metrics["loss"]) < first


def test_own_reward_is_scored():
    (block,) = marked(ROOT / "docs/extend/own_reward.md", "run")
    names = {}
    exec(block, names)
    fields = {
        "answer": ["4", "5"],
        "token_count": [10, 20],
        "token_limit": [40, 40],
        "finished": [True, True],
    }
    rewards = names["brevity"](["2+2=?", "2+3=?"], ["4", "6"], **fields)
    np.testing.assert_allclose(rewards, [1 - 0.025, -0.05])


def test_own_model_is_a_distribution():
    (block,) = marked(ROOT / "docs/extend/own_model.md", "run")
    names = {}
    exec(block, names)
    assert names["logp"].shape == (2, 6)
    assert np.all(np.asarray(names["logp"][:, 1:]) < 0)


def test_own_algorithm_prefers_the_greater_learning_rate():
    (block,) = marked(ROOT / "docs/extend/rl_algorithm.md", "run")
    names = {}
    exec(block, names)
    slow, fast = names["summaries"]
    assert fast.mean > slow.mean + 0.1


# Commands --------------------------------------------------------------------------------------------


def command_lines(page):
    """(command, words behind it) of every `rlhf COMMAND ...` in code."""
    shell = "\n".join(
        found["code"].replace("\\\n", " ")
        for found in fences(page, "bash", "")
        if found["mark"] != "<!-- not run -->\n"
    )
    for text in [*shell.splitlines(), *inline_code(page)]:
        for found in re.finditer(r"(?:^|[\s\"'(=])rlhf ([a-z][\w-]*)((?:\s+[^\s#;|&]+)*)", text):
            yield found[1], found[2].replace('"', " ").replace("'", " ")


@functools.cache
def options_of(command):
    """Options of a command and of its subcommands, as `--help` lists them; None where it is no stage."""
    if importlib.util.find_spec(stage_module(command)) is None:
        return None
    module = importlib.import_module(stage_module(command))
    parsers, names = [tyro.extras.get_parser(module.Options)], set()
    while parsers:
        parser = parsers.pop()
        for action in parser._actions:
            names |= set(action.option_strings)
            parsers += action.choices.values() if isinstance(action.choices, dict) else []
    return names | {name.replace("--no-", "--") for name in names}


@EACH_PAGE
def test_commands_and_their_options_exist(page):
    known = set(itertools.chain(*COMMANDS.values()))
    for command, words in command_lines(page):
        assert command in known, f"{page}: there is no command rlhf {command}"
        options = options_of(command)
        if options is None:
            continue
        for word in shlex.split(words):
            flag = word.split("=")[0]
            if flag.startswith("--") and flag not in EVERYWHERE:
                assert flag in options, f"{page}: rlhf {command} has no option {flag}"


@EACH_PAGE
def test_whole_commands_are_read(page):
    """What stands on a line of its own is a command to copy: nothing it needs is missing."""
    shell = "\n".join(found["code"].replace("\\\n", " ") for found in fences(page, "bash"))
    for line in shell.splitlines():
        command, *words = shlex.split(line, comments=True)[1:] if line.startswith("rlhf ") else [""]
        of_a_shell = {"|", ">", "&&", "&"} & set(words) or "$" in line or "..." in line
        if of_a_shell or "--config" in words or options_of(command) is None:
            continue
        module = importlib.import_module(stage_module(command))
        try:
            parsing.parse(module.Options, words, name=f"rlhf {command}", text=module.__doc__)
        except UserError as error:
            pytest.fail(f"{page}: {line}: {error}")


def test_every_command_is_documented():
    found = {command for page in PAGES for command, _ in command_lines(page)}
    assert set(itertools.chain(*COMMANDS.values())) <= found


# Paths, links, names ---------------------------------------------------------------------------------


@functools.cache
def file_names():
    return {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")}


def stands_somewhere(path):
    """Whether it is a file or folder from the root, or below the package; a pattern must match something."""
    bases = (ROOT, HOUSE)
    return any(any(base.glob(path)) if "*" in path else (base / path).exists() for base in bases)


@EACH_PAGE
def test_paths_exist(page):
    text = page.read_text()
    full = re.findall(rf"(?<![\w/.])((?:{'|'.join(FOLDERS)})/[\w./*-]*\w)", text)
    bare = [
        code
        for code in inline_code(page)
        if re.fullmatch(r"[\w./*-]+\.(?:py|sh|yaml)|[a-z_]+(?:/[a-z_]+)*/", code)
    ]
    for path in {*full, *bare}:
        if path.startswith(OF_OTHERS):
            continue
        neighbour = (
            "/" not in path and path in file_names()
        )  # in a list, behind the path of another in its folder
        beside = (page.parent / path).exists()
        in_a_run = path.removesuffix("/") in RUN_FOLDER
        assert stands_somewhere(path) or neighbour or beside or in_a_run, f"{page}: {path}"


def slug(heading):
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@EACH_PAGE
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"\w+://", target):
            continue
        path, _, anchor = target.partition("#")
        # From a file of main, GitHub finds its own pages two folders up, whatever the repository is called.
        path = re.sub(
            r"^\.\./\.\./actions/workflows/(\w+\.yml)(/badge\.svg)?$", r".github/workflows/\1", path
        )
        file = page.parent / path if path else page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", FENCE.sub("", file.read_text()), re.M)
            assert anchor in map(slug, headings), f"{page}: {target}"


def resolve(dotted):
    """The module or attribute of that name."""
    module, rest = importlib.import_module("rlhf_jax"), dotted.split(".")[1:]
    for name in rest:
        if not hasattr(module, name):
            importlib.import_module(f"{module.__name__}.{name}")
        module = getattr(module, name)
    return module


@EACH_PAGE
def test_names_of_the_package_exist(page):
    for code in re.findall(r"(?<![\w/.])rlhf_jax(?:\.\w+)+(?::\w+)?(?!\w)", page.read_text()):
        assert resolve(code.replace(":", ".")) is not None, f"{page}: {code}"


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md"])
def test_the_tree_has_every_room(page):
    (tree,) = re.findall(r"```\nrlhf_jax/\n(.*?)(?:```|^\S)", (ROOT / page).read_text(), re.S | re.M)
    drawn = {line.split("#")[0].strip().rstrip("/") for line in tree.splitlines() if line.strip()}
    assert drawn == {init.parent.name for init in HOUSE.glob("*/__init__.py")}


def test_the_readme_fits_on_a_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    assert "bash tools/run.sh" in text
    assert "bash tools/test.sh" in text


def test_every_page_is_in_the_navigation():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text().replace("!ENV ", ""))

    def pages(entry):
        if isinstance(entry, str):
            return [entry]
        children = entry.values() if isinstance(entry, dict) else entry
        return [page for child in children for page in pages(child)]

    assert sorted(pages(site["nav"])) == [str(page.relative_to(ROOT / "docs")) for page in DOCS]
