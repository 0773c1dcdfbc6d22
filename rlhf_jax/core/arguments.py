"""Arguments as people give them, looked at by the annotations of what takes them.

A hint says which values there are: `int | None`, `Literal["none", "full"]`, `Sequence[str]`, a number with a
range of `core.ranges`, a class. A text in `Annotated[..., "a list of functions"]` says what to give in words;
a class says how one comes by it in `MADE_BY`. What a hint leaves open (`Any`, arrays) is not looked at.
"""

import dataclasses
import difflib
import functools
import inspect
import math
import os
import pathlib
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union

import numpy as np

from rlhf_jax.core.errors import UserError, shown
from rlhf_jax.core.foreign_names import our_name
from rlhf_jax.core.ranges import range_of

P = ParamSpec("P")
R = TypeVar("R")

_TAKEN: dict[Any, tuple[tuple[type, ...], str]] = {
    int: ((int, np.integer), "a whole number"),
    float: ((int, float, np.integer, np.floating), "a number"),
    bool: ((bool, np.bool_), "True or False"),
    str: ((str, os.PathLike), "a text"),
    os.PathLike: ((os.PathLike,), "a path"),
    pathlib.Path: ((os.PathLike, str), "a path"),
    Mapping: ((Mapping,), "a dict"),
    types.NoneType: ((types.NoneType,), "None"),
}
"""What may be given where a hint has that type, and how it is called."""
_PLURAL = {str: "texts", int: "whole numbers", float: "numbers", Mapping: "dicts", Callable: "functions"}


# Values ---------------------------------------------------------------------------------------------


def typed(name: str, hint: Any, value: Any) -> Any:
    """The value, with NumPy's scalars as Python's own and lists as the tuples that a hint has.

    Raises:
      UserError: it is none that the hint allows, or a number out of its range.
    """
    kinds = alternatives(hint)
    if any(kind == tuple[str, ...] for kind in kinds) and isinstance(value, str | os.PathLike):
        value = (value,)
    if not all(map(_is_known, kinds)):
        return value
    fitting = next((kind for kind in kinds if _fits(kind, value)), None)
    if fitting is None:
        raise UserError(f"{name} is {told(value)}: give {words_for(hint)}")
    if isinstance(value, np.generic):
        value = value.item()
    if fitting is str:
        value = os.fspath(value)
    allowed = range_of(hint)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if allowed is not None and is_number and value not in allowed:
        said = "is not a number" if math.isnan(value) else f"{value:.12g} is out of range"
        raise UserError(f"{name} {said}: give {allowed}")
    if (item := _item(fitting)) is not None:
        listed: Iterable[Any] = value  # pyright: ignore[reportAssignmentType] (it fits its hint)
        items = [typed(f"{name}[{place}]", item, one) for place, one in enumerate(listed)]
        return tuple(items) if typing.get_origin(fitting) is tuple else value
    return value


def alternatives(hint: Any) -> list[Any]:
    """The types that a hint is a choice of, without what is annotated to them."""
    if typing.get_origin(hint) is Annotated:
        return alternatives(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (Union, types.UnionType):
        return [kind for part in typing.get_args(hint) for kind in alternatives(part)]
    return [hint]


def words_for(hint: Any) -> str:
    """Description of a type hint in words: `a whole number or None`."""
    if typing.get_origin(hint) is Annotated:
        inner, *metadata = typing.get_args(hint)
        return next((text for text in metadata if isinstance(text, str)), None) or words_for(inner)
    if typing.get_origin(hint) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(words_for(part) for part in typing.get_args(hint)))
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, typing.get_args(hint)))}"
    if hint in _TAKEN:
        return _TAKEN[hint][1]
    if _is_callable_hint(hint):
        return "a function"
    if typing.get_origin(hint) in _TAKEN:
        return _TAKEN[typing.get_origin(hint)][1]
    if (item := _item(hint)) is not None:
        (kind, *_) = alternatives(item)
        key = Callable if _is_callable_hint(kind) else typing.get_origin(kind) or kind
        return f"a list of {_PLURAL[key]}" if key in _PLURAL else "a list"
    return getattr(hint, "MADE_BY", f"one such as {maker_of(hint)}(...)")


def maker_of(kind: type) -> str:
    """Constructor of a class: the function that a class names in `MAKER`, or the class itself."""
    return getattr(kind, "MAKER", f"{kind.__module__}.{kind.__qualname__}")


def told(value: object) -> str:
    """A value in a sentence: itself where it is short, what kind of thing it is otherwise."""
    if isinstance(value, str | int | float | bool | bytes | np.generic | types.NoneType | list | tuple):
        return shown(value.item() if isinstance(value, np.generic) else value)
    if inspect.isroutine(value) or isinstance(value, type):
        return f"the {'class' if isinstance(value, type) else 'function'} {value.__name__}"
    return f"a {type(value).__name__}"


def _is_callable_hint(kind: Any) -> bool:
    return Callable in (kind, typing.get_origin(kind))


def _item(kind: Any) -> Any:
    """The hint of the items of a list; None for what is no list."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    is_even = origin is tuple and len(inner) == 2 and inner[1] is ...
    return inner[0] if origin in (Sequence, list) or is_even else None


def _is_known(kind: Any) -> bool:
    """True if values can be told apart by this hint."""
    if typing.get_origin(kind) is Literal or _is_callable_hint(kind) or _item(kind) is not None:
        return True
    is_class = inspect.isclass(kind) and (dataclasses.is_dataclass(kind) or hasattr(kind, "MADE_BY"))
    return (typing.get_origin(kind) or kind) in _TAKEN or is_class


def _fits(kind: Any, value: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return any(value == choice and type(value) is type(choice) for choice in typing.get_args(kind))
    if _is_callable_hint(kind):
        return callable(value)
    if _item(kind) is not None:
        is_listed = hasattr(value, "__len__") and isinstance(value, Iterable)
        return is_listed and not isinstance(value, str | bytes | Mapping)
    kind = typing.get_origin(kind) or kind
    if isinstance(value, bool | np.bool_) and kind in (int, float):
        return False
    return isinstance(value, _TAKEN[kind][0] if kind in _TAKEN else kind)


# Functions ------------------------------------------------------------------------------------------


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: a call with a wrong, a missing or an unknown argument is answered by one sentence."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = _bound(function, args, kwargs)
        return function(*bound.args, **bound.kwargs)

    return call


def _bound(function: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
    name, parameters = getattr(function, "__name__", "it"), inspect.signature(function).parameters
    takes_more = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if not takes_more:
        refuse_unknown(kwargs, {p: p for p in parameters if p != "self"}, f"{name}() takes", "argument")
    try:
        bound = inspect.signature(function).bind_partial(*args, **kwargs)
    except TypeError as error:  # too many by position, or one that is given twice
        order = [
            p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"
        ]
        raise UserError(
            f"{name}(): {error}: by position it takes {', '.join(order)}; give the others by name"
        ) from None
    hints = _hints(function)
    for given, value in bound.arguments.items():
        if given in hints and parameters[given].kind is not inspect.Parameter.VAR_KEYWORD:
            bound.arguments[given] = typed(given, hints[given], value)
    for p in parameters.values():
        is_needed = p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        if is_needed and p.name not in bound.arguments:
            hint = hints.get(p.name, Any)
            wanted = words_for(hint) if all(map(_is_known, alternatives(hint))) else f"{p.name}=..."
            raise UserError(f"{name}() needs {p.name}: give {wanted}")
    return bound


@functools.cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    return typing.get_type_hints(function, include_extras=True)


def check_call(name: str, function: Callable[..., Any], *takes: str) -> None:
    """Raises: UserError where a function of a user's does not take these arguments by position.

    Args:
      name: of the argument that it is.
      takes: what they are called, for the message.
    """
    try:
        inspect.signature(function).bind(*takes)
    except ValueError:  # some built-in functions have no signature
        return
    except TypeError as error:
        raise UserError(
            f"{name}: {told(function)} cannot be called with ({', '.join(takes)}) ({error}): let it take them"
        ) from None


def refuse_unknown(given: Collection[str], known: Mapping[str, str], among: str, kind: str) -> None:
    """Raises: UserError where a name is not known; with ours where it is known elsewhere, or the nearest.

    Args:
      known: what may be given: its name as an option has it (`adapter.rank`) -> how it is written, with {} in
        the place of a value, if that is more than its name.
      among: begins the list of what there is.
      kind: `argument` or `setting`.
    """
    flags = {_flag(name): name for name in known}
    for name in given:
        if name in known:
            continue
        ours = our_name(_flag(name), flags)
        if ours is not None:
            flag, _, value = ours.partition(" ")
            hint = _written(known[flags[flag]], value)
            raise UserError(f"there is no {kind} {name}: give {hint}")
        plain = [other for other in known if "." not in other]
        near = difflib.get_close_matches(name, plain, n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(_written(known[other]) for other in near)}? " if near else ""
        listed = ", ".join(plain) if len(plain) < 20 else "the options that its command's help lists"
        raise UserError(f"there is no {kind} {name}: {hint}{among} {listed}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _written(pattern: str, value: str = "") -> str:
    if "{}" in pattern:
        return pattern.format(repr(value) if value else "...")
    return f"{pattern}={value!r}" if value else pattern
