"""Stages from Python: objects where the command line has names, and what a stage leaves."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_origin, get_type_hints

from rlhf_jax.core import arguments
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.files import as_path
from rlhf_jax.metrics import Logger, as_logger, read_metrics
from rlhf_jax.models import Policy, ScalarModel
from rlhf_jax.rollout.rewards import Rewards
from rlhf_jax.stages import option_checks

Options = TypeVar("Options")
Rows = Any
"""Rows as `data.sources.as_rows` takes them."""
Loggers = Annotated[
    Sequence[Any],
    "a function of the metrics such as print, an object with log(metrics, step) and close(), or a list of "
    'these; log=["wandb"] names one',
]
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
      loggers: one, or several, beside those that the options name.
      on_step: called with (state, metrics, step) after every step.
      eval_fn: (state, step) -> numbers, beside the stage's own evaluation.
    """

    policy: Policy | None = None
    rows: Rows = None
    eval_rows: Rows = None
    rewards: Rewards = ()
    loss: Callable[..., Any] | None = None
    teacher: Policy | Sequence[Policy] | None = None
    process_reward: ScalarModel | None = None
    ptx_rows: Rows = None
    tools: Sequence[Any] = ()
    loggers: Loggers = ()
    on_step: Callable[..., Any] | Sequence[Callable[..., Any]] = ()
    eval_fn: Callable[[Any, int], Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        """Raises: UserError where one is of another type than its annotation says."""
        if callable(self.loggers) or isinstance(self.loggers, Logger):
            object.__setattr__(self, "loggers", (self.loggers,))
        for name, hint in get_type_hints(Given, include_extras=True).items():
            arguments.typed(name, hint, getattr(self, name))
        for logger in self.loggers:
            as_logger(logger)
        for function in self.on_step if isinstance(self.on_step, Sequence) else (self.on_step,):
            arguments.check_call("on_step", function, "state", "metrics", "step")
        if self.eval_fn is not None:
            arguments.check_call("eval_fn", self.eval_fn, "state", "step")


NOTHING = Given()


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """Result of a stage.

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
    arguments.refuse_unknown(left, _places(options_type), "with underscores, there are", "setting")
    return options


def _filled(options_type: type[Any], left: dict[str, Any], default: Any = None) -> Any:
    """An instance, with what `left` has for it, which is taken out of there."""
    values: dict[str, Any] = {}
    for name, kind, otherwise in _fields(options_type, default):
        if name in left:
            values[name] = arguments.typed(name, kind, left.pop(name))
        elif name in option_checks.WITHOUT_PREFIX and dataclasses.is_dataclass(kind):
            values[name] = _filled(cast(Any, kind), left, None if otherwise is _REQUIRED else otherwise)
        elif otherwise is not _REQUIRED:
            values[name] = otherwise
        else:
            values[name] = (FROM_PYTHON,) if get_origin(kind) is tuple else FROM_PYTHON
    return options_type(**values)


AS_OBJECTS = {"model": "policy", "data": "rows"}
"""Options that are never settings, and the objects in their place."""
_BY_OBJECTS = {**AS_OBJECTS, "eval_data": "eval_rows"}
"""What is given from Python instead of an option, as messages say it."""


def _places(options_type: type[Any]) -> dict[str, str]:
    """Every option, with its group where it has one -> how it is given from Python."""
    places: dict[str, str] = {}
    for name, kind, _ in _fields(options_type, None):
        if not dataclasses.is_dataclass(kind):
            places[name] = _BY_OBJECTS.get(name, name)
            continue
        inner = [field.name for field in dataclasses.fields(kind)]
        if name in option_checks.WITHOUT_PREFIX:
            places |= {one: _BY_OBJECTS.get(one, one) for one in inner}
        else:
            maker = arguments.maker_of(cast(Any, kind))
            places[name] = name
            places |= {f"{name}.{one}": f"{name}={maker}({one}={{}})" for one in inner}
    return places


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
    return word.removeprefix("--").replace("-", "_") if word[2:3].isalpha() else word
