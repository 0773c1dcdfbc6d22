"""Images and workflows: what they copy, install and run exists, and images install what the README says."""

import importlib
import json
import pathlib
import re
import subprocess
import tomllib

import pytest
import tyro
import yaml

from rlhf_jax.cli.commands import stage_module

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCKERFILES = ("Dockerfile", "Dockerfile.gpu")
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LEFT_OUT = {"games", "constrained", "tfds", "math"}
"""Extras of `all` that an image may be without."""


def steps(name):
    """(instruction, its words) of a Dockerfile."""
    text = (ROOT / name).read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in lines]


def extras_of(command):
    return re.search(r"\[([\w$,]+)\]", command)[1].split(",")


def readme_installs():
    text = (ROOT / "README.md").read_text()
    return re.findall(r'^pip install "?(\.\S*?)"? ', text, re.M)


def bash_accepts(text):
    done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
    return done.returncode == 0 and not done.stderr


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_is_built_from_what_is_there(name):
    found = steps(name)
    (base,) = [words for instruction, words in found if instruction == "FROM"]
    version = re.fullmatch(r"python:(\d+)\.(\d+)-slim", base)
    oldest = re.search(r">=\s*(\d+)\.(\d+)", PROJECT["requires-python"])
    assert tuple(map(int, version.groups())) >= tuple(map(int, oldest.groups()))
    copied = [
        source for instruction, words in found if instruction == "COPY" for source in words.split()[:-1]
    ]
    assert all((ROOT / source).exists() for source in copied)
    needed = {"pyproject.toml", "rlhf_jax", PROJECT["readme"]}
    assert needed <= set(copied)
    assert json.loads(dict(found)["ENTRYPOINT"]) == ["rlhf"]
    assert "rlhf" in PROJECT["scripts"]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_installs_what_the_readme_does(name):
    (command,) = [words for instruction, words in steps(name) if instruction == "RUN"]
    assert bash_accepts(command)
    words = command.replace('"', "").split()
    assert words[:2] == ["pip", "install"]
    assert pathlib.Path(words[words.index("-c") + 1]).relative_to("/src") == pathlib.Path(
        "tools/constraints.txt"
    )
    extras = extras_of(command)
    known = PROJECT["optional-dependencies"]
    assert set(extras) - {"$CUDA"} <= known.keys()
    (everything,) = known["all"]
    assert set(extras_of(everything)) - set(extras) <= LEFT_OUT
    if name == "Dockerfile.gpu":
        assert ("ARG", "CUDA=cuda13") in steps(name)
        assert extras[0] == "$CUDA"
        assert {".", ".[cuda13]", ".[tpu]", ".[all]"} <= set(readme_installs())
        assert {"cuda12", "cuda13", "tpu"} <= known.keys()


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_command_beside_an_image_is_one(name):
    text = (ROOT / name).read_text()
    command = re.search(r"rlhf_jax(?::gpu)? (\w+) (--data .*)$", text, re.M)
    options = tyro.cli(importlib.import_module(stage_module(command[1])).Options, args=command[2].split())
    assert options.run.out == pathlib.Path("runs/sft")
    assert "$PWD/runs:/rlhf/runs" in text  # where it writes


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_steps_of_a_workflow_are_shell_and_call_what_is_there(path):
    workflow = yaml.safe_load(path.read_text())
    assert True in workflow  # `on`, which YAML reads so
    for job in workflow["jobs"].values():
        assert set(job.get("needs", "").split()) <= workflow["jobs"].keys()
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)
            if "run" in step:
                assert bash_accepts(step["run"])
                script = re.match(r"bash (\S+)", step["run"])[1]
                assert bash_accepts((ROOT / script).read_text())
            else:
                assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"])


def test_tests_run_on_the_oldest_python_and_slow_ones_every_night():
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())
    default, slow = workflow["jobs"]["default"], workflow["jobs"]["slow"]
    oldest = re.search(r">=\s*(\d+\.\d+)", PROJECT["requires-python"])[1]
    assert oldest in default["strategy"]["matrix"]["python"]
    assert len(default["strategy"]["matrix"]["python"]) >= 2
    assert workflow[True]["schedule"]
    assert slow["steps"][-1]["run"].endswith("-m slow")


def test_the_site_that_is_deployed_is_the_one_that_is_built():
    steps_of = yaml.safe_load((ROOT / ".github/workflows/docs.yml").read_text())["jobs"]["build"]["steps"]
    (folder,) = [step["with"]["path"] for step in steps_of if "upload-pages" in step.get("uses", "")]
    text = (ROOT / "mkdocs.yml").read_text()
    assert f"site_dir: {folder}\n" in text
