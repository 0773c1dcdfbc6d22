"""How a script reads its options and how it ends: statuses that a scheduler understands."""

import dataclasses
import pathlib
import signal
import sys

import pytest

from rlhf_jax.cli import command_line
from rlhf_jax.core.errors import UserError
from rlhf_jax.metrics import read_metrics
from rlhf_jax.stages import plan, sft
from rlhf_jax.training import Interrupted


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a script.

    Attributes:
      out: the run folder.
      resume: go on.
    """

    out: pathlib.Path
    resume: bool = False


@pytest.fixture
def main(monkeypatch):
    def call(run, *words):
        monkeypatch.setattr(sys, "argv", ["script.py", *words])
        monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
        monkeypatch.setattr(command_line, "use_compile_cache", lambda: None)
        monkeypatch.setattr(command_line, "choose_threads", lambda **_: None)
        command_line.run_command(run, Options, "A script.")

    return call


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Interrupted(signal.SIGINT, 3), 130),
        (Interrupted(signal.SIGTERM, 3), 75),
        (Interrupted(signal.SIGUSR1, 3), 75),
        (KeyboardInterrupt(), 130),
        (UserError("wrong"), 2),
    ],
)
def test_how_a_run_ended_is_its_status(main, capsys, error, status):
    def run(_):
        raise error

    with pytest.raises(SystemExit) as ended:
        main(run, "--out", "a folder", "--resume", "auto")
    assert ended.value.code == status
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    if status != 2:
        assert "To go on: python script.py --out 'a folder' --resume\n" in said


def test_what_cannot_go_on_is_not_told_to(monkeypatch, capsys):
    """Neither a command without --resume nor one with --plan."""

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "use_compile_cache", lambda: None)
    monkeypatch.setattr(command_line, "choose_threads", lambda **_: None)
    for words in ([], ["--data", "x", "--out", "y", "--plan", "here"]):
        stage = sft.Options if words else plan.Options
        with pytest.raises(SystemExit) as ended:
            command_line.run_command(stopped, stage, "A script.", plan=stopped, arguments=words)
        assert ended.value.code == 130
        assert capsys.readouterr().err == "Stopped.\n"


@pytest.mark.parametrize(
    ("words", "resume"),
    [
        ("", False),
        ("--resume", True),
        ("--resume auto", True),
        ("--resume=auto", True),
        ("--resume never", False),
        ("--no-resume", False),
    ],
)
@pytest.mark.parametrize("last", [False, True])
def test_ways_to_resume(main, words, resume, last):
    seen = []
    out = ["--out", "x"]
    main(seen.append, *([*out, *words.split()] if last else [*words.split(), *out]))
    assert seen == [Options(pathlib.Path("x"), resume)]


def test_an_unknown_way_to_resume_is_a_sentence(main, capsys):
    with pytest.raises(SystemExit) as ended:
        main(print, "--out", "x", "--resume", "sometimes")
    assert ended.value.code == 2
    assert "give auto or never" in capsys.readouterr().err


def test_addresses_are_paths_and_other_schemes_are_refused(main, capsys):
    pytest.importorskip("s3fs")
    seen = []
    main(seen.append, "--out", "s3://bucket/run")
    assert str(seen[0].out / "config.json") == "s3://bucket/run/config.json"
    with pytest.raises(SystemExit) as ended:
        main(seen.append, "--out", "memory://x")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: memory://x: ")


def test_a_yaml_file_stands_below_the_flags(main, tmp_path, capsys):
    seen, config = [], tmp_path / "run.yaml"
    config.write_text("out: a folder\nresume: true\n")
    main(seen.append, "--config", str(config))
    main(seen.append, "--out", "x", "--config", str(config), "--no-resume")
    assert seen == [Options(pathlib.Path("a folder"), True), Options(pathlib.Path("x"), False)]
    config.write_text("out: 3\n")
    with pytest.raises(SystemExit) as ended:
        main(seen.append, "--config", str(config))
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {config}: out is 3: give a path\n"


def test_a_name_of_elsewhere_is_answered_with_ours(main, capsys):
    with pytest.raises(SystemExit) as ended:
        main(print, "--output-dir", "x")
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "error: there is no option --output-dir: give --out (--help lists them all)\n"
    )


@pytest.mark.slow
def test_a_run_starts_again_from_its_config(tiny, tmp_path, monkeypatch, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert tiny.main("sft", tiny.words("sft", first), monkeypatch) == 0
    assert tiny.main("sft", ["--config", first / "config.yaml", "--out", second], monkeypatch) == 0
    losses = [[line.get("loss") for line in read_metrics(folder)] for folder in (first, second)]
    assert losses[0] == losses[1]
    assert len(losses[0]) >= 12
    assert tiny.main("diff", [first, second], monkeypatch) == 0
    assert "do not differ" in capsys.readouterr().out
    # Another command does not take it for its own.
    assert tiny.main("dpo", ["--config", first / "config.yaml"], monkeypatch) == 2
    assert f"it is for rlhf sft, not for rlhf dpo: start it with rlhf sft --config {first}" in (
        capsys.readouterr().err
    )
