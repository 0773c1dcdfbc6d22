"""Every number of every command, as words, in YAML and from Python: in range, or one sentence."""

import dataclasses
import functools
import importlib
import math
import types
import typing

import pytest
import tyro

from rlhf_jax.cli.commands import COMMANDS, stage_module
from rlhf_jax.cli.config_files import read_options
from rlhf_jax.cli.options import options_of
from rlhf_jax.cli.parsing import parse
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.ranges import Range, check_ranges, ranges_of
from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer
from rlhf_jax.data.cleaning.rules import Limits
from rlhf_jax.stages import sft
from rlhf_jax.stages.entry import options_of as options_from_keywords
from rlhf_jax.stages.option_checks import check_numbers

NAMES = [name for group in COMMANDS.values() for name in group]
EXTREMES = (-1, 0, 1e308, math.inf, math.nan)
# What the documentation of the options says of the extremes. Numbers that may be below 0:
SIGNED = """shots length_penalty frequency_penalty presence_penalty margin margin_scale reward_threshold
    threshold loss_weights alpha process_reward_coef positive_threshold""".split()  # noqa: SIM905
# Bounds that infinity takes away:
UNBOUNDED = """clip_norm cliprange_value epsilon epsilon_low epsilon_high target_kl is_clip_high
    rejection_high clip_cov_high""".split()  # noqa: SIM905
# Counts and sizes of which there must be one at least, and what is divided by:
NEEDED = """batch_size micro_batches num_minibatches num_iterations num_ppo_epochs num_epochs group_size
    answer_batch_size steps max_to_keep save_every init_timeout heartbeat_timeout num_train_epochs seeds
    chunks eval_episodes games num_simulations play_simulations max_num_considered_actions openings widths
    width layers heads kv_heads experts_per_token rank max_new_tokens new_tokens max_length n beams groups
    num_speculative_tokens demonstrations pair_count prompt_count row_count eval_count eval_rows
    max_seq_length rollouts samples_per_prompt pairs_per_prompt prompts_per_round rounds revisions chunk_size
    ngram_size decontamination_ngram batch devices length prompts samples resamples beam_width
    branching_factor depth expansions num_thoughts num_votes step_length max_turns tool_timeout
    dynamic_sampling_max_rounds beta tau noise mixture_temperature kl_target kl_horizon clip_norm
    cliprange_value epsilon epsilon_low epsilon_high target_kl temperature top_p typical_p repetition_penalty
    confidence decay_fraction alpha rows every ptx_batch_size ptx_max_length num_kept dro_tau pass_at kl_top_k
    reward_timeout gae_alpha ref_model_mixup_alpha top_entropy_fraction is_clip_high rejection_high
    clip_cov_fraction clip_cov_high kl_cov_fraction advantage_beta value_beta reference_samples
    target_entropy entropy_coef_step replay_capacity teacher_weights params flops isoflop_gap
    target_losses patch_size extra_share""".split()  # noqa: SIM905
ABOVE_0 = {"AdapterOptions", "Contrastive", "Choices", "Generate", "rule_rewards"}  # numbers of these names
# Of the same name, and with a use of 0: (owner, name).
ZERO_TOO = {
    ("PairOptions", "max_length"), ("sft", "max_length"), ("rl", "steps"), ("rl_offline", "steps"),
    ("Sample", "temperature"), ("Speculative", "temperature"), ("OptimizerConfig", "epsilon"),
    ("PromptOptions", "samples"), ("LossParams", "alpha"), ("Contrastive", "alpha"),
    ("VisionOptions", "width"),
}  # fmt: skip


def numbers():
    """(command, option, int or float) of every numeric option."""
    for name in NAMES:
        for option in options_of(importlib.import_module(stage_module(name)).Options):
            kind = number_type(option.type)
            if kind is not None:
                yield name, option, kind


def number_type(hint):
    """`int` or `float` where a type is one, or one for each of a list, or one or None."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return number_type(arguments[0])
    if origin in (typing.Union, types.UnionType, tuple):
        return next((kind for part in arguments if (kind := number_type(part))), None)
    return hint if hint in (int, float) else None


def is_right(option, value):
    """Whether the documentation allows an extreme."""
    owner, name = option.owner, option.path[-1]
    places = {owner.__name__, owner.__module__.rpartition(".")[2]}
    if value == -1:
        return name in SIGNED and not places & ABOVE_0
    if value == 0:
        if (owner.__name__, name) == ("Contrastive", "top_k"):
            return False
        return name not in NEEDED or any((place, name) in ZERO_TOO for place in places)
    return (value == math.inf and name in UNBOUNDED and owner is not OptimizerConfig) or (
        value == math.inf and name == "clip_norm"
    )


@functools.cache
def usual(command):
    """Options of a command with anything that is required."""
    kind = importlib.import_module(stage_module(command)).Options
    return fill(kind)


def fill(kind):
    values = {}
    for field in dataclasses.fields(kind):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            hint = typing.get_type_hints(kind)[field.name]
            parts = [hint, *typing.get_args(hint)]
            group = next((part for part in parts if dataclasses.is_dataclass(part)), None)
            values[field.name] = fill(group) if group else "x"
    return kind(**values)


def replaced(options, path, value, owner):
    """Options with one number changed; a group that may be of several kinds becomes that of the number."""
    name, *rest = path
    if not rest:
        held = (value,) if isinstance(getattr(options, name), tuple) else value
        return dataclasses.replace(options, **{name: held})
    group = getattr(options, name)
    if len(rest) == 1 and not isinstance(group, owner):
        group = fill(owner)
    return dataclasses.replace(options, **{name: replaced(group, rest, value, owner)})


def test_every_number_has_a_range():
    without = [
        f"{command} {option.key}"
        for command, option, _ in numbers()
        if ranges_of(option.owner)[option.path[-1]] is None
    ]
    assert without == []


@pytest.mark.parametrize("command", sorted({command for command, _, _ in numbers()}))
def test_extremes_from_python_are_right_or_one_sentence(command):
    for name, option, kind in numbers():
        if name != command:
            continue
        for value in EXTREMES:
            number = int(value) if kind is int and math.isfinite(value) else value
            try:
                options = replaced(usual(command), option.path, number, option.owner)
                check_numbers(options)
                accepted = True
            except UserError as error:
                accepted, said = False, str(error)
                assert said.startswith(option.flag if option.owner is not Limits else option.path[-1])
                assert "give" in said
                assert "\n" not in said
            assert accepted == is_right(option, value), (option.key, value)


LINES = [
    ("sft", "--learning-rate -1", "--learning-rate -1 is out of range: give a number from 0 to 1,000"),
    ("sft", "--optimizer.b1 2", "--optimizer.b1 2 is out of range: give a number from 0 to below 1"),
    ("sft", "--save-every 0", "--save-every 0 is out of range: give 1 or more"),
    ("grpo", "--temperature 1e-30", "--temperature 1e-30 is out of range: give a number from 0.01 to 100"),
    ("grpo", "--epsilon-low nan", "--epsilon-low is not a number: give a number above 0, or inf"),
    ("ppo", "--kl-coef 1e308", "--kl-coef 1e+308 is out of range: give 0 or more"),
    ("dpo", "--tau 0", "--tau 0 is out of range"),
    ("generate", "--prompt x sample --top-p -1", "--top-p -1 is out of range"),
    ("rl", "--seeds 0", "--seeds 0 is out of range"),
    ("alphazero", "--widths 32 -5", "--widths -5 is out of range"),
    ("distill", "--arch.width 2147483648", "--arch.width"),
]


@pytest.mark.parametrize(("command", "words", "said"), LINES)
def test_a_command_line_is_answered_before_anything_is_read(command, words, said):
    kind = importlib.import_module(stage_module(command)).Options
    given = [word for flag in required(kind) for word in (flag, "x")]
    with pytest.raises(UserError) as caught:
        parse(kind, [*given, *words.split()], name=f"rlhf {command}")
    assert said in str(caught.value)


def required(kind):
    from rlhf_jax.cli.options import required_flags

    return list(required_flags(kind))


def test_yaml_is_held_to_the_same_ranges(tmp_path):
    (tmp_path / "run.yaml").write_text("data: x\nrun: {out: x, save_every: -1}\n")
    with pytest.raises(UserError, match="--save-every -1 is out of range"):
        parse(sft.Options, ["--config", str(tmp_path / "run.yaml")])
    (tmp_path / "run.yaml").write_text("data: x\nrun: {out: x}\noptimizer: {weight_decay: .inf}\n")
    options = read_options(str(tmp_path / "run.yaml"), sft.Options)
    with pytest.raises(UserError, match=r"--optimizer\.weight-decay inf is out of range: give 0 or more"):
        check_numbers(options)


def test_keywords_are_held_to_the_same_ranges(tmp_path):
    settings = {"optimizer": OptimizerConfig(b2=1.0)}
    with pytest.raises(UserError, match=r"b2 1 is out of range"):
        check_numbers(options_from_keywords(sft.Options, tmp_path, settings))
    with pytest.raises(UserError, match="Optimizer: epsilon -1 is out of range: give 0 or more"):
        make_optimizer(OptimizerConfig(epsilon=-1))


@dataclasses.dataclass(frozen=True)
class Numbers:
    """One of each kind of range."""

    plain: float = 0.0
    count: int = 0
    open: typing.Annotated[float, Range(0, 2, above=True, below=True)] = 1.0
    either: typing.Annotated[float, Range(1, or_zero=True, infinite=True)] | None = None
    several: tuple[typing.Annotated[int, Range(high=3)], ...] = ()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"plain": 1e39}, "plain 1e+39 is out of range: give a number"),
        ({"count": 2**31}, "count 2147483648 is out of range: give a number"),
        ({"open": 0.0}, "open 0 is out of range: give a number above 0 to below 2"),
        ({"open": 2.0}, "open 2 is out of range"),
        ({"either": 0.5}, "either 0.5 is out of range: give 0, or 1 or more, or inf"),
        ({"either": -math.inf}, "either -inf is out of range"),
        ({"several": (1, 4)}, "several 4 is out of range: give at most 3"),
    ],
)
def test_ranges_say_what_is_in_them(given, said):
    with pytest.raises(UserError) as caught:
        check_ranges(Numbers(**given))
    assert str(caught.value).startswith(said)


def test_what_is_in_range_passes():
    check_ranges(Numbers(plain=-3e38, count=-5, open=1.9, either=math.inf, several=(3, -9)))
    check_ranges(Numbers(either=0.0))


@pytest.mark.slow
def test_every_extreme_on_every_command_line():
    """The same verdicts from words; those of int cannot be read where they are no whole numbers."""
    once = {(option.owner, option.path[-1]): (command, option, kind) for command, option, kind in numbers()}
    for command, option, kind in once.values():
        options_type = importlib.import_module(stage_module(command)).Options
        if command == "benchmark" or option.owner.__module__.endswith("decoders"):
            continue  # their options follow a subcommand
        given = [word for flag in required(options_type) if flag != option.flag for word in (flag, "x")]
        for value in EXTREMES:
            word = str(int(value)) if kind is int and value in (-1, 0) else repr(float(value))
            try:
                parse(options_type, [*given, option.flag, word], name=f"rlhf {command}")
                accepted = True
            except (UserError, SystemExit, tyro.constructors.UnsupportedTypeAnnotationError):
                accepted = False
            assert accepted == (is_right(option, value) and (kind is float or value in (-1, 0))), option.flag
