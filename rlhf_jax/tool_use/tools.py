"""Tools: a name, a schema and a function from arguments to a text, each bounded in time and size."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from rlhf_jax.retrieval.bm25 import Index
from rlhf_jax.rewards.algebra import Unreadable
from rlhf_jax.rewards.expressions import calculate
from rlhf_jax.sandbox.workers import LimitedWorker
from rlhf_jax.tool_use.calls import CLOSING, MAX_CALLS, OPENING, Call, CallError, parse_calls

MAX_OUTPUT_CHARACTERS = 1000


class ToolError(ValueError):
    """Error of a tool about arguments that it cannot work with; the model gets to see it."""


@dataclasses.dataclass(frozen=True)
class Tool:
    """Something that a model may call.

    Attributes:
      name: what it is called by.
      description: what it does, for the model.
      parameters: names of its arguments, all of them texts and all needed, with what each is.
      function: takes the arguments by name and returns a text. It is bounded in time for any arguments by
        what it does, or runs in a process under limits (`worker_tool`). It may raise `ToolError`.
    """

    name: str
    description: str
    parameters: Mapping[str, str]
    function: Callable[..., str]

    def schema(self) -> dict[str, Any]:
        """The JSON schema that chat templates take as one of `tools`."""
        properties = {name: {"type": "string", "description": text} for name, text in self.parameters.items()}
        parameters = {"type": "object", "properties": properties, "required": list(self.parameters)}
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


_STRING = r'"([^"\\<\x00-\x1f]|\\["\\/bfnrt])*"'


def call_pattern(tools: Sequence[Tool]) -> str:
    """The regular expression of turns in which every call can be run, for constrained decoding.

    A turn is any text, and then at most four calls, a line apart, of these tools with their arguments in
    order. No `<` stands in the text or in an argument, where it could begin or end a call.
    """
    calls = []
    for tool in tools:
        arguments = ", ".join(f'"{re.escape(name)}": {_STRING}' for name in tool.parameters)
        calls.append(rf'\{{"name": "{re.escape(tool.name)}", "arguments": \{{{arguments}\}}\}}')
    call = rf"{OPENING}\n({'|'.join(calls)})\n{CLOSING}"
    return rf"[^<]*({call}(\n{call}){{0,{MAX_CALLS - 1}}})?"


def answer_calls(tools: Sequence[Tool], text: str) -> list[str]:
    """Answers of the tools to the calls in a model's turn, one text each; none where it calls nothing.

    A call that is malformed, of no tool, or with the wrong arguments is answered by a text that begins
    with `error: `. An answer of more than 1,000 characters is cut.
    """
    named = {tool.name: tool for tool in tools}
    return [_cut(_answer(named, call)) for call in parse_calls(text)]


def _answer(named: Mapping[str, Tool], call: Call | CallError) -> str:
    if isinstance(call, CallError):
        return f"error: {call.message}"
    tool = named.get(call.name)
    if tool is None:
        return f"error: there is no tool {call.name[:40]!r}, only {', '.join(named) or 'none'}"
    wrong = call.arguments.keys() != tool.parameters.keys()
    if wrong or not all(isinstance(value, str) for value in call.arguments.values()):
        return f"error: {tool.name} takes {', '.join(tool.parameters)}, as strings"
    try:
        return tool.function(**call.arguments)
    except ToolError as error:
        return f"error: {error}"


def _cut(text: str) -> str:
    return text if len(text) <= MAX_OUTPUT_CHARACTERS else text[: MAX_OUTPUT_CHARACTERS - 3] + "..."


# Tools ---------------------------------------------------------------------------------------------


def calculator() -> Tool:
    """Exact arithmetic: `+ - * / ^`, brackets, percent and roots that are rational.

    It is the verifiers' parser: nothing is evaluated as code, and length, depth and size are bounded.
    """

    def compute(expression: str) -> str:
        try:
            return write_number(calculate(expression))
        except Unreadable as error:
            raise ToolError(str(error)) from None

    return Tool("calculator", "Computes exactly.", {"expression": "such as (12.5 + 7) * 3 / 4"}, compute)


def write_number(value: Fraction) -> str:
    """A whole number or a decimal where there is one that ends, else a fraction in lowest terms."""
    rest, twos, fives = value.denominator, 0, 0
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    places = max(twos, fives)
    if rest > 1 or places > 30:
        return str(value)
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    sign = "-" if value < 0 else ""
    return sign + (f"{digits[:-places]}.{digits[-places:]}" if places else digits)


def retriever(index: Index, *, count: int = 3) -> Tool:
    """The best texts of a local collection, one a line.

    Args:
      count: how many texts.
    """

    def search(query: str) -> str:
        found = index.search(query, count)
        if not found:
            raise ToolError("nothing found")
        return "\n".join(" ".join(text.split()) for _, text in found)

    return Tool("search", "Finds texts by words.", {"query": "words to look for"}, search)


def worker_tool(
    name: str,
    description: str,
    parameters: Mapping[str, str],
    path: str,
    *,
    seconds: float = 2.0,
    environment: Sequence[str] = (),
) -> Tool:
    """A tool of the user's that may do anything, in a process of its own with limits on time and memory.

    It may start processes, which are ended with each call. Its environment holds no keys but those named.

    Args:
      path: `module:function` of a function that takes the arguments by name and returns a text.
      seconds: wall time of a call.
      environment: names of variables that it needs, such as the key of a search engine.
    """
    worker = LimitedWorker(path, seconds=seconds, by_keywords=True, processes=True, environment=environment)

    def run(**arguments: str) -> str:
        outcome = worker.run([arguments])[0]
        if outcome.status != "done":
            raise ToolError(f"{name} {outcome.message}")
        return str(outcome.value)

    return Tool(name, description, parameters, run)
