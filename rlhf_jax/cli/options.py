"""Options of a command, read off its dataclasses as tyro reads them: flags, places in a YAML file, types."""

import dataclasses
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Union, cast

import tyro


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a command.

    Attributes:
      flag: on the command line, such as `--adapter.rank`.
      path: in a YAML file, such as ("adapter", "rank").
      type: what it holds.
      owner: the dataclass whose field it is, and whose docstring tells of it.
      default: of its field; `dataclasses.MISSING` where there is none.
    """

    flag: str
    path: tuple[str, ...]
    type: Any
    owner: Any
    default: Any

    @property
    def key(self) -> str:
        """Key in a YAML file, in one word."""
        return ".".join(self.path)


def options_of(options_type: type, path: tuple[str, ...] = (), prefix: str = "") -> Iterator[Option]:
    """All options of a command, groups of options opened."""
    for field, hint, without_prefix in fields_of(options_type):
        place = (*path, field.name)
        groups = [member for member in members(hint) if dataclasses.is_dataclass(member)]
        for group in groups:
            yield from options_of(
                cast(Any, group), place, prefix if without_prefix else f"{prefix}{field.name}."
            )
        if not groups:
            flag = f"--{prefix}{field.name}".replace("_", "-")
            yield Option(flag, place, hint, _owner(options_type, field.name), field.default)


def _owner(options_type: type, name: str) -> type:
    """The class in which a field is written, which may be one that `options_type` extends."""
    return next(kind for kind in options_type.__mro__ if name in vars(kind).get("__annotations__", {}))


def required_flags(options_type: type, prefix: str = "") -> Iterator[str]:
    """Flags that have no default, neither of their own nor by a group's."""
    whole = typing.get_type_hints(options_type, include_extras=True)
    for field, hint, without_prefix in fields_of(options_type):
        if tyro.conf.Positional in getattr(whole[field.name], "__metadata__", ()):
            continue
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            kinds = members(hint)
            if not any(map(dataclasses.is_dataclass, kinds)):
                yield f"--{prefix}{field.name}".replace("_", "-")
            elif len(kinds) == 1:
                yield from required_flags(kinds[0], prefix if without_prefix else f"{prefix}{field.name}.")


def subcommands_with(options_type: type, flag: str) -> list[str]:
    """The words behind which a flag may stand: of the choices of groups, those whose group has it."""
    found: list[str] = []
    for field, hint, without_prefix in fields_of(options_type):
        for member in typing.get_args(hint) if len(members(hint)) > 1 else ():
            named = [getattr(item, "name", None) for item in getattr(member, "__metadata__", ())]
            prefix = "" if without_prefix else f"{field.name}."
            if named and named[0] and flag in {o.flag for o in options_of(_bare(member), prefix=prefix)}:
                found.append(named[0])
    return found


def fields_of(options_type: type) -> Iterator[tuple[dataclasses.Field[Any], Any, bool]]:
    """(field, its type, whether the flags of a group stand without its name)."""
    hints = typing.get_type_hints(options_type, include_extras=True)
    for field in dataclasses.fields(options_type):
        hint, without_prefix = hints[field.name], False
        while typing.get_origin(hint) is Annotated:
            without_prefix |= tyro.conf.OmitArgPrefixes in hint.__metadata__
            hint = typing.get_args(hint)[0]
        yield field, hint, without_prefix


def members(hint: Any) -> list[Any]:
    """The types that a union is made of; the type itself where it is none."""
    if typing.get_origin(hint) not in (Union, types.UnionType):
        return [hint]
    return [_bare(member) for member in typing.get_args(hint)]


def _bare(hint: Any) -> Any:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def flags_of(options_type: type) -> list[str]:
    """Every flag of a command, and those that tyro and `run_command` add."""
    found: list[str] = []
    for option in options_of(options_type):
        found.append(option.flag)
        if option.type is bool:
            group, _, name = option.flag.removeprefix("--").rpartition(".")
            found.append(f"--{group + '.' if group else ''}no-{name}")
    return [*found, "--config", "--help"]
