"""What a stage says at its end."""

import importlib
import re

import pytest
import tyro

from rlhf_jax.cli.commands import stage_module
from rlhf_jax.stages import edges
from rlhf_jax.stages.option_groups import RunOptions


def said(folder, capsys, **options):
    run = RunOptions(folder, **{"report": False, **options.pop("run", {})})
    edges.finish(run, **options)
    return capsys.readouterr().out.splitlines()


def test_the_end_says_what_to_do_next(tmp_path, capsys):
    lines = said(tmp_path, capsys)
    assert [line.partition(":")[0] for line in lines] == ["Talk to it", "Evaluate it", "Take it away"]
    (line,) = said(tmp_path, capsys, kind="reward_model")
    assert line.split(":", 1)[1].split()[:2] == ["rlhf", "ppo"]
    assert line.endswith(f"--reward-model {tmp_path}")
    assert said(tmp_path, capsys, run={"quiet": True}) == []


def test_the_report_comes_first(tmp_path, capsys):
    first, *_ = said(tmp_path, capsys, run={"report": True})
    assert first.split() == ["Report:", str(tmp_path / "report.html"), "(open", "it", "in", "a", "browser)"]
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize("kind", ["policy", "reward_model"])
@pytest.mark.filterwarnings("ignore:get_parser")
def test_what_it_says_can_be_typed(kind, tmp_path, capsys):
    for line in said(tmp_path, capsys, kind=kind):
        name, words = re.search(r"rlhf (\S+) (.*)", line).groups()
        parser = tyro.extras.get_parser(importlib.import_module(stage_module(name)).Options)
        parsers, known = [parser], set()
        while parsers:
            one = parsers.pop()
            for action in one._actions:
                known |= set(action.option_strings)
                parsers += action.choices.values() if isinstance(action.choices, dict) else []
        assert set(re.findall(r"--[\w-]+", words)) <= known
