"""The commands: their help, unknown options, and what stands in tables about them."""

import contextlib
import dataclasses
import difflib
import fcntl
import importlib
import json
import os
import pty
import struct
import subprocess
import sys
import termios

import docstring_parser
import pytest

from rlhf_jax.cli import commands
from rlhf_jax.cli.options import flags_of, options_of
from rlhf_jax.cli.parsing import examples, parse
from rlhf_jax.core import foreign_names
from rlhf_jax.core.errors import UserError

NAMES = [name for group in commands.COMMANDS.values() for name in group]


def commands_in(text):
    """Commands that a text shows, a line each."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line.split("    # ")[0] for line in lines if line.lstrip().startswith(("rlhf ", "python "))]


def module_of(name):
    return importlib.import_module(commands.stage_module(name))


@pytest.fixture(scope="module")
def all_flags():
    return {name: flags_of(module_of(name).Options) for name in NAMES}


def test_the_overview_and_the_version_import_nothing_heavy():
    code = """
import sys
from rlhf_jax.cli.commands import main
main(["--help"])
main(["--version"])
heavy = {"jax", "numpy", "tyro", "yaml", "rich", "flax"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"  {name} " in done.stdout for name in NAMES)


def test_a_wrong_command_is_answered_with_the_nearest(capsys):
    with pytest.raises(SystemExit) as ended:
        commands.main(["gpro"])
    assert ended.value.code == 2
    assert "there is no command gpro: did you mean grpo?" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_flags_are_those_of_the_help(name, capsys, monkeypatch):
    """What is read off the dataclasses is what tyro makes of them, and the help ends with the examples."""
    monkeypatch.setenv("COLUMNS", "300")
    module = module_of(name)
    with pytest.raises(SystemExit) as ended:
        parse(module.Options, ["--help"], name=f"rlhf {name}", text=module.__doc__)
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: rlhf {name} ")
    body, _, end = shown.partition("\nexamples:\n")
    words = {word.strip("│,") for line in body.splitlines() for word in line.split()}
    known = set(flags_of(module.Options))
    printed = {word for line in body.splitlines() if line.startswith("│ --") for word in line[1:].split()[:2]}
    printed = {word.rstrip(",") for word in printed if word.startswith("--")}
    assert printed <= known, printed - known
    in_subcommands = {o.flag for o in options_of(module.Options) if o.path[0] in ("decoder", "task")}
    assert {o.flag for o in options_of(module.Options) if o.flag not in in_subcommands} - words <= {
        # Words without `--` in front of them: they are positions, not flags.
        "--folders",
        "--first",
        "--second",
        "--algorithm",
        "--file",
    }
    assert len(commands_in(end)) >= 3


@pytest.mark.parametrize("name", NAMES)
def test_examples_have_options_that_there_are(name, all_flags):
    for command in commands_in(examples(module_of(name).__doc__)):
        _, called, *words = command.split()
        flags = {word.split("=")[0] for word in words if word.startswith("--")}
        assert flags <= set(all_flags.get(called, flags)), command


@pytest.mark.parametrize("name", NAMES)
def test_an_option_that_may_be_none_says_what_that_means(name):
    for option in options_of(module_of(name).Options):
        if option.default is None:
            documented = docstring_parser.parse(option.owner.__doc__).params
            (text,) = [p.description for p in documented if p.arg_name == option.path[-1]]
            assert "None " in text, option.flag


def test_help_names_every_choice(capsys, monkeypatch):
    from rlhf_jax.algorithms.grpo_variants import grpo_variants
    from rlhf_jax.algorithms.preference import pair_losses
    from rlhf_jax.algorithms.reward import reward_losses
    from rlhf_jax.algorithms.unpaired import UNPAIRED_LOSSES
    from rlhf_jax.stages.adapting import OPTIONS_OF

    monkeypatch.setenv("COLUMNS", "300")
    for name, choices in (
        ("grpo", [*grpo_variants(), *OPTIONS_OF, "module:function"]),
        ("dpo", [*pair_losses(), *UNPAIRED_LOSSES, *OPTIONS_OF, "module:function"]),
        ("online-dpo", [*pair_losses(), "module:function"]),
        ("reward-model", [*reward_losses(), "module:function"]),
    ):
        module = module_of(name)
        with pytest.raises(SystemExit):
            parse(module.Options, ["--help"], name=f"rlhf {name}", text=module.__doc__)
        shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
        words = {word.strip(",;.:{}()") for word in shown.replace(",", " ").split()}
        assert set(choices) <= words, set(choices) - words


# Names of elsewhere ---------------------------------------------------------------------------------


def test_every_name_that_is_told_exists(all_flags):
    everywhere = {flag for flags in all_flags.values() for flag in flags}
    told = {ours.split()[0] for names in foreign_names.FOREIGN_NAMES.values() for ours in names}
    assert told - everywhere == set()


def test_every_name_of_elsewhere_is_answered_by_some_command(all_flags):
    for foreign in foreign_names.FOREIGN_NAMES:
        answered = [name for name, flags in all_flags.items() if foreign_names.our_name(foreign, flags)]
        owned = [name for name, flags in all_flags.items() if foreign in flags]
        assert answered or owned, foreign


@pytest.mark.parametrize(
    ("command", "given", "ours"),
    [
        ("grpo", "--num-generations", "--group-size"),
        ("grpo", "--num_generations", "--group-size"),
        ("grpo", "--beta", "--kl-coef"),
        ("grpo", "--epsilon", "--epsilon-low"),
        ("grpo", "--max-completion-length", "--max-new-tokens"),
        ("grpo", "--gradient-accumulation-steps", "--micro-batches"),
        ("grpo", "--per-device-train-batch-size", "--batch-size"),
        ("grpo", "--report-to", "--log"),
        ("grpo", "--wandb", "--log wandb"),
        ("grpo", "--use-vllm", "--engine vllm:URL"),
        ("grpo", "--lora-r", "--adapter.rank"),
        ("grpo", "--behind", "--one-step-off-policy"),
        ("grpo", "--clip-high", "--epsilon-high"),
        ("grpo", "--epochs", "--num-iterations"),
        ("ppo", "--epochs", "--num-ppo-epochs"),
        ("ppo", "--clip-range", "--epsilon"),
        ("sft", "--num-epochs", "--num-train-epochs"),
        ("sft", "--warmup-ratio", "--optimizer.warmup-ratio"),
    ],
)
def test_a_name_of_elsewhere_is_told_ours_before_anything_else(command, given, ours):
    # What is required is missing here, too: that is not said first.
    with pytest.raises(UserError) as error:
        parse(module_of(command).Options, [given, "8"], name=f"rlhf {command}")
    flag = given.replace("_", "-")
    assert str(error.value) == f"there is no option {flag}: give {ours} (--help lists them all)"


def test_an_option_that_a_command_has_is_never_answered_away(all_flags):
    # What is required is asked for, and --beta is no mistake.
    with pytest.raises(UserError, match="--model and --data must be given"):
        parse(module_of("dpo").Options, ["--beta", "0.3"])
    for flags in all_flags.values():
        assert not [flag for flag in flags if foreign_names.our_name(flag, flags)]


def test_an_unknown_option_has_the_nearest_known_one(all_flags):
    with pytest.raises(UserError, match=r"no option --learning-rat: did you mean --learning-rate\?"):
        parse(module_of("sft").Options, ["--data", "rows.jsonl", "--learning-rat", "1"])
    assert difflib.get_close_matches("--learning-rat", all_flags["sft"], n=1) == ["--learning-rate"]


# Folders --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Folder:
    """A run folder that describes a run.

    Attributes:
      path: of it.
    """

    path: object

    def write(self, **config):
        self.path.mkdir(parents=True, exist_ok=True)
        described = {"stage": "grpo", "config": config, "versions": {"jax": "1"}, "commit": "abc"}
        (self.path / "config.json").write_text(json.dumps(described))
        return str(self.path)


def ended_with(words):
    with pytest.raises(SystemExit) as ended:
        commands.main(words)
    return ended.value.code


def test_a_misspelt_option_that_is_required_is_told_its_name():
    options = module_of("grpo").Options
    with pytest.raises(UserError, match="no option --modle: did you mean --model"):
        parse(options, ["--modle", "runs/sft", "--data", "x.jsonl"], name="rlhf grpo")
    with pytest.raises(UserError, match="--model must be given"):
        parse(options, ["--data", "x.jsonl"], name="rlhf grpo")


def test_in_a_terminal_help_is_as_wide_as_it_and_without_colours_on_request():
    def in_a_terminal(words, columns, **environment):
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        code = f"from rlhf_jax.cli.commands import main; main({words})"
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=theirs,
            env={name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
            | {"TERM": "xterm"}
            | environment,
        )
        os.close(theirs)
        said = b""
        with contextlib.suppress(OSError):  # which is how a terminal ends
            while part := os.read(ours, 65536):
                said += part
        os.close(ours)
        assert process.wait() == 0
        return said.decode()

    lines = in_a_terminal(["--help"], 80).splitlines()
    assert max(map(len, lines)) <= 80
    assert all(any(line.startswith(f"  {name} ") for line in lines) for name in NAMES)
    assert "\x1b[" in in_a_terminal(["eject", "--help"], 80)
    assert "\x1b[" not in in_a_terminal(["eject", "--help"], 80, NO_COLOR="1")


def test_diff_tells_what_differs_by_its_status_and_a_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setenv("COLUMNS", "200")
    first = Folder(tmp_path / "a").write(run={"out": "a", "steps": 1}, kl_coef=None, rewards=["x", "y"])
    second = Folder(tmp_path / "b").write(run={"out": "b", "steps": 2}, kl_coef=0.1, rewards=["x", "y"])
    commands.main(["diff", first, first])
    assert "do not differ" in capsys.readouterr().out
    assert ended_with(["diff", first, second]) == 1
    rows = [line.strip("│┃ ").split("│") for line in capsys.readouterr().out.splitlines() if "--" in line]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["--steps", "1", "2"],
        ["--kl-coef", "None", "0.1"],
    ]
    assert ended_with(["diff", first, str(tmp_path / "gone")]) == 2
    assert "there is no such file" in capsys.readouterr().err


def test_report_is_written_anew(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    folder = Folder(tmp_path / "a").write(run={"steps": 1})
    (tmp_path / "a" / "metrics.jsonl").write_text('{"stage": "sft", "step": 1, "time": 0, "loss": 1.5}\n')
    commands.main(["report", folder])
    said = capsys.readouterr().out.strip()
    assert said == f"{folder}/report.html"
    assert "<html" in (tmp_path / "a" / "report.html").read_text()
    assert ended_with(["report", str(tmp_path / "gone")]) == 2
    (tmp_path / "empty").mkdir()
    assert ended_with(["report", str(tmp_path / "empty")]) == 2
    assert "empty holds no run: give the folder" in capsys.readouterr().err


# Values ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "words", "said"),
    [
        ("sft", "--data x --learning-rate abc", "--learning-rate abc: give a number or None"),
        ("sft", "--data x --learning_rate=abc", "--learning-rate abc: give a number or None"),
        ("sft", "--data x --steps", "--steps needs a value: give a whole number or None"),
        ("sft", "--data x --scan-layers", "--scan-layers needs a value: give True or False or None"),
        ("sft", "--data x --scan-layers maybe", "--scan-layers maybe: give True or False or None"),
        ("sft", "--data x --seed 1.5", "--seed 1.5: give a whole number"),
        ("sft", "--data x --remat some", "--remat some: give one of none, dots, attention, full or None"),
        ("dpo", "--model m --data x --loss-weights 1 b", "--loss-weights b: give a number"),
        (
            "generate",
            "--model m --prompt a --temperature 0.7",
            "--temperature must stand behind sample or speculative: ... sample --temperature VALUE",
        ),
        ("rl", "--out", "--out needs a value: give a path or None"),
        ("diff", "a", "SECOND must be given: rlhf diff FIRST SECOND"),
        ("benchmark", "--model m --out x", "Expected one of {choices, generate, harness}: --help says more"),
    ],
)
def test_what_an_option_cannot_take_is_said_in_one_sentence(command, words, said, capsys):
    with pytest.raises(UserError) as error:
        parse(module_of(command).Options, words.split(), name=f"rlhf {command}")
    assert str(error.value) == said
    assert capsys.readouterr() == ("", "")


def test_the_help_of_a_model_names_every_kind_that_loads():
    kinds = ("run folder", "Hugging Face folder", "GGUF file", "name in the hub cache")
    for name in NAMES:
        for option in options_of(module_of(name).Options):
            if option.flag == "--model" and name not in ("inspect", "plan"):  # which need no parameters
                documented = docstring_parser.parse(option.owner.__doc__).params
                (text,) = [p.description for p in documented if p.arg_name == "model"]
                assert not [kind for kind in kinds if kind not in " ".join(text.split())], name


@pytest.mark.parametrize("value", ["False", "true"])
def test_a_switch_with_a_value_is_told_its_opposite(value):
    words = ["--model", "m", "--data", "rows.jsonl", "--report", value]
    with pytest.raises(UserError, match="--report takes no value: give --report, or --no-report"):
        parse(module_of("sft").Options, words)
