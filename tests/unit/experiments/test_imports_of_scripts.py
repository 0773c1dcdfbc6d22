"""What scripts import lies in the package, in their own folder, or in a folder that they name."""

import ast
import pathlib
import re

import pytest

EXPERIMENTS = pathlib.Path(__file__).resolve().parents[3] / "experiments"
SCRIPTS = sorted(EXPERIMENTS.rglob("*.py"))
PLACES = {script.stem: script.parent for script in SCRIPTS}
NAMED = re.compile(r'sys\.path\.append\(str\(Path\(__file__\)\.resolve\(\)\.parents\[1\] / "(\w+)"\)\)')


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_finds_its_neighbours(script):
    text = script.read_text()
    named = {(script.parents[1] / folder).resolve() for folder in NAMED.findall(text)}
    assert all(folder.is_dir() for folder in named)
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        for name in names:
            assert PLACES.get(name, script.parent) in {script.parent, *named}, name
