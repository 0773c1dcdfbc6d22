"""Words of a command line that tyro refuses, answered in one sentence rather than in its box."""

import contextlib
import dataclasses
import io
import itertools
import re
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import tyro

from rlhf_jax.cli.options import Option, options_of
from rlhf_jax.core.arguments import alternatives, words_for
from rlhf_jax.core.errors import UserError


@contextlib.contextmanager
def in_one_sentence(words: Sequence[str], options_type: type, name: str | None) -> Iterator[None]:
    """Turns what tyro says when it ends the process within into a `UserError`.

    Args:
      words: of the command line.
      name: of the command.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as end:
        if not end.code:
            raise
        sentence = _mistake_in(words, options_type) or _missing_position(words, options_type, name)
        raise UserError(sentence or _first_part(said.getvalue())) from None
    sys.stderr.write(said.getvalue())


def _mistake_in(words: Sequence[str], options_type: type) -> str | None:
    by_flag = {option.flag: option for option in options_of(options_type)}
    for place, word in enumerate(words):
        flag, equals, value = word.partition("=")
        option = by_flag.get(flag.replace("_", "-")) if flag.startswith("--") else None
        if option is None or option.type is bool:
            continue
        behind = itertools.takewhile(lambda other: not other.startswith("--"), words[place + 1 :])
        sentence = _mistake_of(option, [value] if equals else list(behind))
        if sentence is not None:
            return sentence
    return None


def _mistake_of(option: Option, values: Sequence[str]) -> str | None:
    """What is wrong with the values of an option; None where nothing is."""
    hint, counted = option.type, values[:1]
    if typing.get_origin(hint) is tuple:
        hint, counted = typing.get_args(hint)[0], values
    elif not values:
        return f"{option.flag} needs a value: give {words_for(hint)}"
    wrong = next((value for value in counted if not any(_reads(k, value) for k in alternatives(hint))), None)
    return None if wrong is None else f"{option.flag} {wrong}: give {words_for(hint)}"


def _reads(kind: Any, text: str) -> bool:
    """True if tyro makes a value of this type of the text."""
    if kind in (int, float):
        try:
            kind(text)
        except ValueError:
            return False
        return True
    if typing.get_origin(kind) is Literal:
        return text in map(str, typing.get_args(kind))
    choices = {bool: ("True", "False"), types.NoneType: ("None",)}
    return text in choices.get(kind, (text,))


def _missing_position(words: Sequence[str], options_type: type, name: str | None) -> str | None:
    """What is said where words without `--` are missing, in a command that has only these."""
    hints = typing.get_type_hints(options_type, include_extras=True)
    fields = dataclasses.fields(options_type)
    names = [f.name for f in fields if tyro.conf.Positional in getattr(hints[f.name], "__metadata__", ())]
    missing = [other.upper() for other in names[len(words) :]]
    if not missing or any(word.startswith("--") for word in words):
        return None
    whole = " ".join([name or "", *(other.upper() for other in names)]).strip()
    return f"{' and '.join(missing)} must be given: {whole}"


def _first_part(box: str) -> str:
    """What a box of tyro's says behind its title and up to its first rule, as a sentence.

    Where standard output is not UTF-8, spaces and dashes stand for the box; a terminal has colors.
    """
    title, *lines = re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines() or [""]
    stripped = itertools.dropwhile(lambda line: not set(line) - _RULE, (line.strip("│ ") for line in lines))
    text = " ".join(itertools.takewhile(lambda line: not line or set(line) - _RULE, stripped)).strip()
    flags = re.findall(r"--[\w.-]+", text) if "Required" in title else []
    if flags:
        return f"{' and '.join(flags)} must be given: --help says what with"
    return f"{' '.join(text.split()).rstrip('.')}: --help says more"


_RULE = set("─-")
