"""Stages from Python: objects where the command line has names, and what a stage leaves."""

import contextlib
import dataclasses
import difflib
import os
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import numpy as np

from rlhf_jax.core.errors import UserError, shortened
from rlhf_jax.core.files import as_path
from rlhf_jax.metrics import read_metrics
from rlhf_jax.models import Policy, ScalarModel
from rlhf_jax.stages import option_checks

Options = TypeVar("Options")
Rows = Any
"""Rows as `data.sources.as_rows` takes them."""
_REQUIRED = object()
FROM_PYTHON = "(from Python)"
"""What stands in a run's description for what was given as an object."""


@dataclasses.dataclass(frozen=True)
class Given:
    """Objects that take the place of names in the options of a stage.

    Attributes:
      policy: instead of loading one.
      rows: to train on.
      eval_rows: held out.
      rewards: what completions are worth.
      loss: on pairs, or of a reward model on rankings.
      teacher: to distill; several, or None where the policy teaches itself.
      process_reward: a process reward model, for rewards of steps.
      ptx_rows: text that is to stay likely (PPO-ptx), as rows.
      tools: that the policy may call: functions of texts, or `tool_use.Tool`s.
      loggers: beside those that the options name.
      on_step: called with (state, metrics, step) after every step.
      eval_fn: (state, step) -> numbers, beside the stage's own evaluation.
    """

    policy: Policy | None = None
    rows: Rows = None
    eval_rows: Rows = None
    rewards: Sequence[Any] = ()
    loss: Callable[..., Any] | None = None
    teacher: Policy | Sequence[Policy] | None = None
    process_reward: ScalarModel | None = None
    ptx_rows: Rows = None
    tools: Sequence[Any] = ()
    loggers: Sequence[Any] = ()
    on_step: Callable[..., Any] | Sequence[Callable[..., Any]] = ()
    eval_fn: Callable[[Any, int], Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        """Refuses a lone reward."""
        if not isinstance(self.rewards, Sequence) or isinstance(self.rewards, str):
            raise UserError(f"rewards is {self.rewards!r}: give a list of functions")


NOTHING = Given()


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """What a stage leaves.

    Attributes:
      folder: of the run.
      policy: as trained; of a reward model, its body.
      state: the last state: parameters, moments, keys.
      reward_model: where one was trained.
    """

    folder: Path
    policy: Policy
    state: Any = None
    reward_model: ScalarModel | None = None

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of the run's log, one a step."""
        return read_metrics(self.folder)


# Options from keywords -----------------------------------------------------------------------------


def options_of(options_type: type[Options], out: Any, settings: Mapping[str, Any]) -> Options:
    """Options of a stage from keywords: the names of the command line, with underscores.

    Groups whose options stand alone on the command line (`run`, `prompts`, `pairs`) are filled by their own
    names; other groups are given whole, such as `adapter=lora(rank=16)`.

    Args:
      out: the run folder; None for a temporary one.
      settings: the keywords. Required options that are not among them were given as objects.

    Raises:
      UserError: there is no such option.
    """
    folder = Path(tempfile.mkdtemp(prefix="rlhf_jax_")) / "run" if out is None else out
    left = {**settings, "out": as_path(folder)}
    options = _filled(options_type, left)
    if left:
        known = [name for name in _names(options_type) if name != "out"]
        near = difflib.get_close_matches(next(iter(left)), known, n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(
            f"there is no setting {next(iter(left))}: {hint}they are the options that the command's help "
            "lists, with underscores"
        )
    return options


def _check_type(name: str, kind: Any, value: Any) -> None:
    """Raises: UserError where a number, a switch or a text is meant, and something else is given."""
    kinds = get_args(kind) if get_origin(kind) in (types.UnionType, Union) else (kind,)
    if not set(kinds) <= _TAKEN.keys():
        return
    taken = tuple(one for one in kinds for one in _TAKEN[one])
    if not isinstance(value, taken) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join(_WORDS[one] for one in kinds)
        raise UserError(f"{name} is {shortened(repr(value))}: give {wanted}")


_TAKEN: dict[type, tuple[type, ...]] = {
    int: (int, np.integer),
    float: (int, float, np.number),
    bool: (bool, np.bool_),
    str: (str, os.PathLike),
    types.NoneType: (types.NoneType,),
}
"""What may be given for an option of that type."""
_WORDS: dict[type, str] = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a text",
    types.NoneType: "None",
}


def _filled(options_type: type[Any], left: dict[str, Any], default: Any = None) -> Any:
    """An instance, with what `left` has for it, which is taken out of there."""
    values: dict[str, Any] = {}
    for name, kind, otherwise in _fields(options_type, default):
        if name in left:
            values[name] = left.pop(name)
            _check_type(name, kind, values[name])
        elif name in option_checks.WITHOUT_PREFIX and dataclasses.is_dataclass(kind):
            values[name] = _filled(cast(Any, kind), left, None if otherwise is _REQUIRED else otherwise)
        elif otherwise is not _REQUIRED:
            values[name] = otherwise
        else:
            values[name] = (FROM_PYTHON,) if get_origin(kind) is tuple else FROM_PYTHON
    return options_type(**values)


def _names(options_type: type[Any]) -> Iterator[str]:
    for name, kind, _ in _fields(options_type, None):
        if name in option_checks.WITHOUT_PREFIX and dataclasses.is_dataclass(kind):
            yield from (field.name for field in dataclasses.fields(kind))
        else:
            yield name


def _fields(options_type: type[Any], instance: Any) -> Iterator[tuple[str, Any, Any]]:
    """(name, type, default) of each option; the defaults are those of `instance` where there is one."""
    hints = get_type_hints(options_type)
    for field in dataclasses.fields(options_type):
        if instance is not None:
            default = getattr(instance, field.name)
        elif field.default is not dataclasses.MISSING:
            default = field.default
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        else:
            default = _REQUIRED
        yield field.name, hints[field.name], default


@contextlib.contextmanager
def parameters_named() -> Iterator[None]:
    """Mistakes in words of Python: `--flag-name` in a message of the stages becomes `flag_name`."""
    try:
        yield
    except UserError as error:
        raise UserError(_without_flags(str(error))) from error.__cause__


def _without_flags(message: str) -> str:
    words = message.split(" ")
    return " ".join(_parameter(word) if word.startswith("--") else word for word in words)


def _parameter(word: str) -> str:
    return word.removeprefix("--").rpartition(".")[2].replace("-", "_") if word[2:3].isalpha() else word
