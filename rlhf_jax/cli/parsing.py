"""Words of a command line to options: a YAML file below the flags, unknown options answered, help."""

import contextlib
import difflib
import os
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from rlhf_jax.cli.config_files import read_options, take_config
from rlhf_jax.cli.options import flags_of, required_flags, subcommands_with
from rlhf_jax.cli.refusals import in_one_sentence
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.files import as_path
from rlhf_jax.core.foreign_names import our_name
from rlhf_jax.stages.option_checks import check_numbers

Options = TypeVar("Options")

_PATHS = tyro.constructors.ConstructorRegistry()
"""How options of type `Path` are read: as local paths, or addresses of object stores."""

_CONFIG_HELP = (
    "--config FILE reads options from YAML, such as the config.yaml of a run folder; flags override it."
)


@_PATHS.primitive_rule
def _path_rule(info: Any) -> Any:
    if info.type is not Path:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: as_path(words[0]),
        is_instance=lambda value: isinstance(value, os.PathLike),
        str_from_instance=lambda value: [str(value)],
    )


_RESUME = {"auto": "--resume", "never": "--no-resume"}


def parse(
    options_type: type[Options], words: Sequence[str], *, name: str | None = None, text: str | None = None
) -> Options:
    """The options that the words of a command line say; ends the process where help is asked for.

    Args:
      name: of the command, such as `rlhf grpo`.
      text: docstring that tells of it: its first paragraph begins the help, its examples end it.

    Raises:
      UserError: an option that there is not or that lacks its value, a value of another type or out of its
        range, or a YAML file with a mistake.
    """
    config, rest = take_config(with_plain_resume(words))
    known = flags_of(options_type)
    for word in rest:
        _answer_foreign_name(word, known)
    if config is None:
        _ask_for_required(options_type, rest, known)
    command = name.removeprefix("rlhf ") if name and name.startswith("rlhf ") else None
    default = read_options(config, options_type, command) if config else tyro.MISSING_NONPROP
    try:
        with in_one_sentence(rest, options_type, name), _in_plain_text():
            options, unknown = tyro.cli(
                options_type,
                prog=name,
                args=rest,
                default=default,
                description=f"{_first_paragraph(text)}\n\n{_CONFIG_HELP}",
                registry=_PATHS,
                return_unknown_args=True,
            )
    except SystemExit as end:
        if not end.code and (shown := examples(text)):
            print(f"\nexamples:\n{textwrap.indent(shown, '  ')}")
        raise
    if unknown:
        before = words[list(words).index(unknown[0]) - 1] if unknown[0] in words[1:] else ""
        if before == "--resume":
            raise _unknown_resume(unknown[0])
        if before.startswith("--") and unknown[0].lower() in ("true", "false"):
            raise UserError(f"{before} takes no value: give {before}, or --no-{before[2:]} for the opposite")
        _refuse(unknown[0], known, subcommands_with(options_type, unknown[0].split("=")[0].replace("_", "-")))
    check_numbers(options)
    return options


def examples(text: str | None) -> str:
    """The first indented block of a docstring: commands to copy."""
    blocks = [block for block in textwrap.dedent(text or "").split("\n\n") if block.startswith("    ")]
    return textwrap.dedent(blocks[0]).strip("\n") if blocks else ""


def _answer_foreign_name(word: str, known: Sequence[str]) -> None:
    """Before anything else: tyro would first ask for the options that are required."""
    given = word.split("=")[0].replace("_", "-")
    ours = our_name(given, known) if given.startswith("--") else None
    if ours is not None:
        raise UserError(f"there is no option {given}: give {ours} (--help lists them all)")


@contextlib.contextmanager
def _in_plain_text() -> Iterator[None]:
    """Help without colours where NO_COLOR asks for it; tyro looks at the kind of terminal alone."""
    terminal = os.environ.get("TERM")
    if not os.environ.get("NO_COLOR") or terminal is None:
        yield
        return
    os.environ["TERM"] = "dumb"
    try:
        yield
    finally:
        os.environ["TERM"] = terminal


def _ask_for_required(options_type: type[Any], words: Sequence[str], known: Sequence[str]) -> None:
    given = {word.split("=")[0].replace("_", "-") for word in words}
    missing = [flag for flag in required_flags(options_type) if flag not in given]
    if missing and not given & {"--help", "-h"}:
        for flag in (word.split("=")[0].replace("_", "-") for word in words):
            if (
                flag.startswith("--")
                and flag not in known
                and difflib.get_close_matches(flag, missing, n=1, cutoff=0.6)
            ):
                _refuse(flag, missing, ())
        raise UserError(f"{' and '.join(missing)} must be given: --help says what with")


def _refuse(word: str, known: Sequence[str], subcommands: Sequence[str]) -> None:
    given = word.split("=")[0]
    if subcommands:
        raise UserError(
            f"{given} must stand behind {' or '.join(subcommands)}: ... {subcommands[0]} {given} VALUE"
        )
    near = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"there is no option {given}: {hint}--help lists them all")


def _unknown_resume(value: str) -> UserError:
    return UserError(f"--resume {value}: there is no such way to resume: give auto or never")


def with_plain_resume(words: Sequence[str]) -> list[str]:
    """Words of a command line in which `--resume auto` is `--resume`, and `--resume never` is `--no-resume`.

    Raises:
      UserError: another word follows `--resume=`.
    """
    plain, rest = [], list(words)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if name != "--resume":
            plain.append(name + equals + value)
            continue
        if not equals:
            # Another word may be a subcommand.
            value = rest.pop(0) if rest and rest[0] in _RESUME else "auto"
        if value not in _RESUME:
            raise _unknown_resume(value)
        plain.append(_RESUME[value])
    return plain


def _first_paragraph(text: str | None) -> str:
    return (text or "").strip().split("\n\n")[0]
