"""Options from a YAML file: `--config run.yaml` sets them, and flags override what it says.

The file has the nesting of the options' dataclasses, which is that of `config.yaml` in a run folder:

    command: grpo
    run: {out: runs/grpo, steps: 100}
    prompts:
      data: gsm8k.jsonl
      max_new_tokens: 256
    kl_coef: 0.01

Options whose flags have no prefix (`--steps`, `--data`) may stand at the top as well: `steps: 100`. Keys may
be spelled with `-` or `_`. A key `command` says which command the file is for, and is compared.
"""

import dataclasses
import difflib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import tyro

from rlhf_jax.cli.options import Option, fields_of, members, options_of
from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError, shortened
from rlhf_jax.core.foreign_names import our_name
from rlhf_jax.stages.option_checks import WITHOUT_PREFIX

Options = TypeVar("Options")


def take_config(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """(the file that `--config FILE` names, the other words) of a command line.

    Raises:
      UserError: no file follows, or there are several.
    """
    found, others, rest = [], [], list(words)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if name != "--config":
            others.append(name + equals + value)
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError("--config names no file: give the path of a YAML file behind it")
            value = rest.pop(0)
        found.append(value)
    if len(found) > 1:
        raise UserError(f"--config is given {len(found)} times: give one file, and flags for what differs")
    return (found[0] if found else None), others


def read_options(path: str, options_type: type[Options], command: str | None = None) -> Options:
    """Options as a YAML file sets them; those that are required and not set are `tyro.MISSING`.

    Args:
      command: which the options are of; None to compare nothing.

    Raises:
      UserError: the file cannot be read, is for another command, has a key that is no option, or a value of
        the wrong type.
    """
    data = dict(_read_yaml(path))
    meant = data.pop("command", command)
    if command is not None and meant != command:
        raise UserError(
            f"{path}: it is for rlhf {meant}, not for rlhf {command}: start it with "
            f"rlhf {meant} --config {path}, or change its key command"
        )
    grouped = _in_groups(path, options_type, data)
    return _Reader(path, options_type).instance(options_type, grouped, tyro.MISSING, ())


def _in_groups(path: str, options_type: type, data: Mapping[str, Any]) -> dict[str, Any]:
    """The same with options at the top, whose flags have no prefix, in their groups.

    Raises:
      UserError: one stands at the top and in its group.
    """
    found = {str(key).replace("-", "_"): value for key, value in data.items()}
    known = {field.name for field, _, _ in fields_of(options_type)}
    for field, hint, _ in fields_of(options_type):
        if field.name not in WITHOUT_PREFIX or not dataclasses.is_dataclass(hint):
            continue
        inner = {option.name for option, _, _ in fields_of(cast(Any, hint))}
        moved = {key: found.pop(key) for key in list(found) if key in inner - known}
        group = found.get(field.name, {})
        if not moved or not isinstance(group, Mapping):
            continue
        if twice := {str(key).replace("-", "_") for key in group} & moved.keys():
            raise UserError(f"{path}: {min(twice)} stands at the top and in {field.name}: give it once")
        found[field.name] = {**group, **moved}
    return found


def _read_yaml(path: str) -> Mapping[str, Any]:
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that stands twice, of which YAML's loaders keep the last."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen: set[str] = set()
            for key, _ in node.value:
                name = str(key.value).replace("-", "_")
                if name in seen:
                    problem = f"the key {key.value} stands twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(name)
            return super().construct_mapping(node, deep)

    try:
        data = yaml.load(files.read_text(files.as_path(path)), Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file: give --config the path of a YAML file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): give --config a YAML file") from error
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or shortened(str(error).split("\n")[0])
        raise UserError(f"{path}{where}: not YAML ({problem}): mend the file") from error
    if data is None:
        return {}
    if not isinstance(data, Mapping):
        raise UserError(f"{path}: it holds {_kind(data)}: give options with their values, such as steps: 100")
    return data


class _WrongType(Exception):
    """The value is not of this type; the message says what would be."""


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Makes options of what stands in a file, for messages that name it."""

    file: str
    whole: type

    def instance(self, group: type, data: Any, default: Any, path: tuple[str, ...]) -> Any:
        """A group of options: what the file says, else what `default` has, else the fields' own defaults."""
        if not isinstance(data, Mapping):
            raise UserError(
                f"{self.file}: {'.'.join(path)} is {_kind(data)}, not a group of options: indent its options "
                "below it"
            )
        given = {str(key).replace("-", "_"): value for key, value in data.items()}
        values: dict[str, Any] = {}
        for field, hint, _ in fields_of(group):
            usual = _default(field) if default is tyro.MISSING else getattr(default, field.name)
            # Of a group that is required as a whole, only what has no default of its own is.
            required_group = usual is tyro.MISSING and dataclasses.is_dataclass(hint)
            if field.name in given or required_group:
                usual = self.value(hint, given.pop(field.name, {}), usual, (*path, field.name))
            values[field.name] = usual
        for key in given:
            raise UserError(self.unknown((*path, key)))
        return group(**values)

    def value(self, hint: Any, value: Any, default: Any, path: tuple[str, ...]) -> Any:
        """One option, or a group."""
        groups = [member for member in members(hint) if dataclasses.is_dataclass(member)]
        if groups:
            group, value = self.choose(groups, value, path) if len(groups) > 1 else (groups[0], value)
            return self.instance(
                cast(Any, group), value, default if type(default) is group else tyro.MISSING, path
            )
        try:
            return _convert(hint, value)
        except _WrongType as wrong:
            raise UserError(f"{self.file}: {'.'.join(path)} is {_kind(value)}: give {wrong}") from None

    def choose(self, groups: list[Any], data: Any, path: tuple[str, ...]) -> tuple[Any, Any]:
        """(which of several groups is meant, its options): by its name as the only key, or by its options."""
        names = {group.__name__.lower(): group for group in groups}
        if isinstance(data, Mapping) and len(data) == 1:
            (name,) = data
            if name in names:
                return names[name], data[name] or {}
        keys = {str(key).replace("-", "_") for key in data} if isinstance(data, Mapping) else set()
        fields = [(group, {field.name for field in dataclasses.fields(group)}) for group in groups]
        fitting = [group for group, own in fields if own == keys] or [g for g, own in fields if own >= keys]
        if not keys or len(fitting) != 1:
            raise UserError(
                f"{self.file}: {'.'.join(path)} does not say which it is: give one of {', '.join(names)} "
                "as its only key, and the options below that"
            )
        return fitting[0], data

    def unknown(self, path: tuple[str, ...]) -> str:
        """The sentence about a key that is no option, with the one that was probably meant."""
        known = list(options_of(self.whole))
        near = _named_alike(path, known)
        hint = f"did you mean {near}?" if near else "--help lists them all"
        return f"{self.file}: there is no option {'.'.join(path)}: {hint}"


def _named_alike(path: tuple[str, ...], known: Sequence[Option]) -> str | None:
    """The option of that name in another group, that of its foreign name, or the nearest one."""
    same = [option.key for option in known if option.path[-1] == path[-1]]
    if same:
        return same[0]
    flags = [option.flag for option in known]
    for word in (".".join(path), path[-1]):
        ours = our_name(f"--{word}".replace("_", "-"), flags)
        if ours is not None:
            flag, *value = ours.split()
            key = next(option.key for option in known if option.flag == flag)
            return f"{key}: {value[0]}" if value else key
    words = [".".join(path), path[-1]]
    for table in ({option.key: option.key for option in known}, {o.path[-1]: o.key for o in known}):
        for word in words:
            near = difflib.get_close_matches(word, list(table), n=1, cutoff=0.6)
            if near:
                return table[near[0]]
    return None


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return tyro.MISSING if field.default_factory is dataclasses.MISSING else field.default_factory()


# Values ---------------------------------------------------------------------------------------------


def _convert(hint: Any, value: Any) -> Any:
    """The value as a type wants it.

    Raises:
      _WrongType: it is of another.
    """
    if typing.get_origin(hint) is typing.Annotated:  # within a tuple
        return _convert(typing.get_args(hint)[0], value)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if len(kinds := members(hint)) > 1:
        return _convert_union(kinds, value)
    if origin is Literal:
        return _convert_choice(arguments, value)
    if origin in (tuple, list):
        return _convert_list(origin, arguments, value)
    if hint is type(None):
        if value is not None:
            raise _WrongType("null")
        return None
    if hint is float:
        return _convert_number(value)
    if not isinstance(hint, type):
        return value
    if issubclass(hint, Path):
        if not isinstance(value, str) or not value:
            raise _WrongType("a path")
        return files.as_path(value)
    # For Python, True is a number; for whoever writes a file it is not.
    if type(value) is not hint:
        wanted = {bool: "true or false", int: "a whole number", str: "text, in quotes where it looks else"}
        raise _WrongType(wanted.get(hint, f"a value of type {hint.__name__}"))
    return value


def _convert_union(kinds: Sequence[Any], value: Any) -> Any:
    wanted = []
    for kind in kinds:
        try:
            return _convert(kind, value)
        except _WrongType as wrong:
            wanted.append(str(wrong))
    raise _WrongType(", or ".join(wanted))


def _convert_choice(choices: Sequence[Any], value: Any) -> Any:
    for choice in choices:
        if type(value) is type(choice) and value == choice:
            return choice
    raise _WrongType(
        "one of " + ", ".join(repr(choice) if choice == "" else str(choice) for choice in choices)
    )


def _convert_list(origin: Any, arguments: Sequence[Any], value: Any) -> Any:
    if not isinstance(value, list):
        raise _WrongType("a list, in [ ]")
    kinds = (
        arguments
        if len(arguments) == len(value) and arguments[-1] is not ...
        else [*arguments[:1]] * len(value)
    )
    try:
        return origin(map(_convert, kinds, value))
    except _WrongType as wrong:
        raise _WrongType(f"a list, each of it {wrong}") from None


def _convert_number(value: Any) -> float:
    # YAML 1.1 takes 1e-4 for text, as it has no point.
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _WrongType("a number")
    try:
        return float(value)
    except ValueError:
        raise _WrongType("a number") from None


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "a group of options"
    if isinstance(value, list):
        return f"the list {shortened(str(value))}"
    return shortened(repr(value))
