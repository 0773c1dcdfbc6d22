"""The calls in what a model wrote: JSON within tags, as the built-in chat template lays `tool_calls` out.

    <tool_call>
    {"name": "calculator", "arguments": {"expression": "12 * 34"}}
    </tool_call>

The reader is strict and bounded: what is not such a call is an error that the model gets to see, never an
exception, and never a guess at what was meant.
"""

import dataclasses
import json
from typing import Any

OPENING, CLOSING = "<tool_call>", "</tool_call>"
MAX_CALLS = 4
MAX_CHARACTERS = 4096


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of the function `name`; whether there is one is not yet known."""

    name: str
    arguments: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class CallError:
    """Error in a tool call, as a sentence for the model."""

    message: str


def parse_calls(text: str) -> list[Call | CallError]:
    """The calls in a turn, in order; none where the turn is an answer.

    At most four calls of 4,096 characters each are read. Text outside the tags is the model's own.
    """
    pieces = text.split(OPENING, MAX_CALLS + 1)[1:]
    if len(pieces) > MAX_CALLS:
        return [CallError(f"more than {MAX_CALLS} calls in a turn")]
    return [_parse(piece) for piece in pieces]


def _parse(piece: str) -> Call | CallError:
    inside, closing, _ = piece.partition(CLOSING)
    if not closing:
        return CallError(f"a call without {CLOSING}")
    if len(inside) > MAX_CHARACTERS:
        return CallError(f"a call of more than {MAX_CHARACTERS} characters")
    try:
        value = json.loads(inside, object_pairs_hook=_without_repeats, parse_constant=_refuse)
    except RecursionError:
        return CallError("a call with too many brackets in each other")
    except ValueError as error:
        return CallError(f"a call that is not JSON ({str(error)[:100]})")
    if not isinstance(value, dict) or value.keys() != {"name", "arguments"}:
        return CallError('a call that is not {"name": ..., "arguments": {...}}')
    if not isinstance(value["name"], str) or not isinstance(value["arguments"], dict):
        return CallError("a call whose name is not a string or whose arguments are not an object")
    return Call(value["name"], value["arguments"])


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")
