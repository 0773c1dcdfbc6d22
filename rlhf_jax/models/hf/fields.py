"""Reading config.json: fields by name, with a default or a demand; errors name file and field."""

from pathlib import Path
from typing import Any

from rlhf_jax.core.errors import UserError, shown

MOST, MOST_POSITIONS = 2**20, 2**30
"""No model has more of anything, nor more positions: what is above is a mistake, and would fill memory."""


class Fields:
    """The fields of one config.json.

    Args:
      data: the parsed object.
      path: where it was read, for messages.
    """

    def __init__(self, data: dict[str, Any], path: Path) -> None:
        self._data = data
        self._path = path

    def get(self, *names: str) -> Any:
        """The first of these fields that is there and not null; None where none is."""
        return next((self._data[name] for name in names if self._data.get(name) is not None), None)

    def integer(self, *names: str, default: int | None = None, most: int = MOST) -> int:
        """A whole number above 0 under one of these names, of which no model has more than `most`."""
        value = self._or_default(names, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(names[0], f"is {shown(value)}, not a whole number above 0")
        if value > most:
            raise self.error(names[0], f"is {shown(value)}, more than the {most:,} that a model may have")
        return value

    def number(self, *names: str, default: float | None = None) -> float:
        """A finite number under one of these names."""
        value = self._or_default(names, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < float("inf"):
            raise self.error(names[0], f"is {shown(value)}, not a number")
        return float(value)

    def flag(self, name: str, *, default: bool) -> bool:
        """True or false."""
        value = self._or_default((name,), default)
        if not isinstance(value, bool):
            raise self.error(name, f"is {shown(value)}, not true or false")
        return value

    def expect(self, name: str, *allowed: Any) -> None:
        """Refuses a field that is there, is not null and is none of `allowed`."""
        value = self.get(name)
        if value is not None and value not in allowed:
            known = " or ".join(repr(value) for value in allowed)
            raise self.error(name, f"is {shown(value)}, and only {known} is supported")

    def inner(self, data: Any, name: str) -> "Fields":
        """The fields of an object inside this one."""
        if not isinstance(data, dict):
            raise self.error(name, f"is {shown(data)}, not an object")
        return Fields(data, self._path)

    def error(self, name: str, problem: str) -> UserError:
        """One sentence about one field."""
        return UserError(f"{self._path}: `{name}` {problem}; mend the file or choose another checkpoint.")

    def _or_default(self, names: tuple[str, ...], default: Any) -> Any:
        value = self.get(*names)
        if value is None:
            if default is None:
                raise self.error(names[0], "is missing")
            return default
        return value
