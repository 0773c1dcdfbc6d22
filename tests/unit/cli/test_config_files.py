"""Options from YAML files: what is written is read back; a mistake is a sentence with file and key."""

import dataclasses
import pathlib
from typing import Literal

import pytest
import tyro
import yaml

from rlhf_jax.cli.config_files import read_options, take_config
from rlhf_jax.cli.parsing import parse
from rlhf_jax.core.errors import UserError
from rlhf_jax.stages.option_checks import to_json
from rlhf_jax.training import run_folder


@dataclasses.dataclass(frozen=True)
class Group:
    """A group.

    Attributes:
      out: where.
      resume: go on.
      steps: how many.
    """

    out: pathlib.Path
    resume: bool = False
    steps: int = 10


@dataclasses.dataclass(frozen=True)
class Wide:
    """One way.

    Attributes:
      width: of it.
    """

    width: int = 1


@dataclasses.dataclass(frozen=True)
class Deep:
    """Another way.

    Attributes:
      depth: of it.
    """

    depth: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options.

    Attributes:
      model: to start from.
      run: the run.
      adapter: a group whose flags have its name.
      way: one of two groups.
      group_size: a whole number.
      learning_rate: a number.
      kl_coef: a number; None for none.
      rewards: names.
      loss: a choice.
      quick: a switch.
    """

    model: str
    run: tyro.conf.OmitArgPrefixes[Group] = Group(pathlib.Path("runs/x"), steps=7)
    adapter: Wide = Wide()
    way: Wide | Deep = Wide()
    group_size: int = 8
    learning_rate: float = 1e-3
    kl_coef: float | None = None
    rewards: tuple[str, ...] = ("a",)
    loss: Literal["dpo", "ipo"] = "dpo"
    quick: bool = False


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"

    def write(text):
        path.write_text(text)
        return str(path)

    return write


EVERYTHING = """
model: runs/sft
run:
  out: runs/y
  steps: 100
adapter: {width: 3}
way:
  deep: {depth: 5}
group-size: 4
learning_rate: 1e-4
kl_coef: 0
rewards: [b, c]
loss: ipo
quick: true
"""


def test_every_kind_of_value_is_read(config):
    read = read_options(config(EVERYTHING), Options)
    assert read == Options(
        model="runs/sft",
        run=Group(pathlib.Path("runs/y"), steps=100),
        adapter=Wide(3),
        way=Deep(5),
        group_size=4,
        learning_rate=1e-4,
        kl_coef=0.0,
        rewards=("b", "c"),
        loss="ipo",
        quick=True,
    )


def test_options_without_a_prefix_may_stand_at_the_top(config):
    read = read_options(config("model: m\nsteps: 3\nrun: {out: runs/z}\ngroup_size: 4"), Options)
    assert read.run == Group(pathlib.Path("runs/z"), steps=3)
    assert read.group_size == 4


def test_flags_override_the_file_and_the_file_the_defaults(config):
    path = config("model: m\ngroup_size: 4\nrun: {steps: 100}\nquick: true\nrewards: [b]")
    words = ["--group-size", "2", f"--config={path}", "--no-quick", "--rewards", "x", "y"]
    read = parse(Options, words)
    assert (read.group_size, read.quick, read.rewards) == (2, False, ("x", "y"))
    # What the file says of a group leaves the rest of it as the command has it.
    assert read.run == Group(pathlib.Path("runs/x"), steps=100)


def test_what_is_required_may_come_from_either(config):
    empty = config("group_size: 4")
    assert parse(Options, ["--model", "m", "--config", empty]).model == "m"
    with pytest.raises(UserError, match="--model"):
        parse(Options, ["--config", empty])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: m", "there is no option modle: did you mean model?"),
        ("steps: 3\nrun: {steps: 4}", "steps stands at the top and in run: give it once"),
        ("run: {stepz: 3}", "there is no option run.stepz: did you mean run.steps?"),
        ("num_generations: 3", "there is no option num_generations: did you mean group_size?"),
        ("zzzzz: 3", "there is no option zzzzz: --help lists them all"),
        ("group_size: many", "group_size is 'many': give a whole number"),
        ("group_size: 1.5", "group_size is 1.5: give a whole number"),
        ("group_size: true", "group_size is true: give a whole number"),
        ("learning_rate: fast", "learning_rate is 'fast': give a number"),
        ("kl_coef: [1]", "kl_coef is the list [1]: give a number, or null"),
        ("model: 3", "model is 3: give text"),
        ("quick: 1", "quick is 1: give true or false"),
        ("loss: dop", "loss is 'dop': give one of dpo, ipo"),
        ("rewards: x", "rewards is 'x': give a list, in [ ]"),
        ("rewards: [1]", "rewards is the list [1]: give a list, each of it text"),
        ("run: 3", "run is 3, not a group of options"),
        ("run: {out: 3}", "run.out is 3: give a path"),
        ("way: {height: 3}", "way does not say which it is: give one of wide, deep"),
        ("- model", "it holds the list ['model']: give options"),
        ("model: [", "not YAML"),
        ("group_size: 1\ngroup-size: 2", ":2: not YAML (the key group-size stands twice)"),
        ("command: sft", "it is for rlhf sft, not for rlhf grpo"),
    ],
)
def test_a_mistake_is_one_sentence_with_file_and_key(config, text, message):
    path = config(text)
    with pytest.raises(UserError) as error:
        read_options(path, Options, "grpo")
    assert str(error.value).startswith(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_an_option_without_one(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_options(str(tmp_path / "gone.yaml"), Options)
    for words in (["--config"], ["--config", "--model"]):
        with pytest.raises(UserError, match="--config names no file"):
            take_config(words)
    with pytest.raises(UserError, match="given 2 times"):
        take_config(["--config", "a", "--config=b"])


def test_the_config_of_a_run_folder_starts_the_same_run(tmp_path, monkeypatch):
    options = Options(
        model="m",
        run=Group(tmp_path / "run", resume=True, steps=3),
        way=Deep(2),
        learning_rate=1e-7,
        kl_coef=float("inf"),
        rewards=(),
    )
    monkeypatch.setattr("sys.argv", ["/usr/bin/rlhf", "grpo", "--model", "m"])
    run_folder.describe_run(options.run.out, to_json(options), stage="grpo")
    path = options.run.out / "config.yaml"
    first, *_ = path.read_text().splitlines()
    assert first.startswith("# ")
    assert f"rlhf grpo --config {path}" in first
    again = read_options(str(path), Options, "grpo")
    # Whether it went on with an earlier run is not what the run is.
    assert again == dataclasses.replace(options, run=dataclasses.replace(options.run, resume=False))
    with pytest.raises(UserError, match="it is for rlhf grpo, not for rlhf sft: start it with rlhf grpo"):
        read_options(str(path), Options, "sft")
    assert yaml.safe_load(path.read_text())["command"] == "grpo"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asking:
    """Options with a group that is required as a whole.

    Attributes:
      run: the run.
    """

    run: tyro.conf.OmitArgPrefixes[Group]


def test_a_group_without_a_default_asks_for_no_more_than_it_must(config):
    assert parse(Asking, ["--config", config("{}"), "--out", "y"]).run == Group(pathlib.Path("y"))
    assert parse(Asking, ["--config", config("run: {out: y}")]).run == Group(pathlib.Path("y"))
    with pytest.raises(UserError, match="--out"):
        parse(Asking, ["--config", config("run: {steps: 3}")])
