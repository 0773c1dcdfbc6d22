"""Tools of Python functions: their names, signatures and docstrings are what the model is told of them."""

import inspect
import re
import typing
from collections.abc import Callable, Sequence
from typing import Any

from rlhf_jax.core.errors import UserError, error_summary
from rlhf_jax.core.importing import load_function
from rlhf_jax.tool_use.tools import Tool, ToolError, worker_tool


def make_tools(tools: Sequence[Tool | Callable[..., Any] | str], *, seconds: float) -> list[Tool]:
    """Tools of functions, of their import paths, or ready made.

    A function takes texts by name and returns a text. The model is told its name, the first paragraph of
    its docstring, and of each parameter the line `name: ...` there. By its path, `module:function`, it runs
    in a process of its own under limits on time and memory; given as an object it runs in this one, and is
    to end by itself. A function that is annotated to return a `Tool` is called once, and makes it.

    Args:
      tools: each a `Tool`, a function, or a path.
      seconds: wall time of a call of a function by its path.

    Raises:
      UserError: a path names no function, a function cannot be told to a model, or two have one name.
    """
    made = [_make_tool(tool, seconds) for tool in tools]
    names = [tool.name for tool in made]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"two tools are called {twice}: give each a name of its own")
    return made


def _make_tool(tool: Tool | Callable[..., Any] | str, seconds: float) -> Tool:
    if isinstance(tool, Tool):
        return tool
    path = tool if isinstance(tool, str) else None
    function = load_function(tool, kind="tool", example="my_tools:search") if isinstance(tool, str) else tool
    if not callable(function):
        raise UserError(f"tool {tool!r} is no function: give one that takes texts by name and returns a text")
    if _hints(function).get("return") is Tool:
        return function()
    name = getattr(function, "__name__", type(function).__name__)
    description, parameters = describe_function(function, path or name)
    if path is not None:
        return worker_tool(name, description, parameters, path, seconds=seconds)
    return Tool(name, description, parameters, _guarded(name, function))


def describe_function(function: Callable[..., Any], what: str) -> tuple[str, dict[str, str]]:
    """(description, parameters) of a function, out of its docstring and signature.

    Args:
      what: how to call it in messages.

    Raises:
      UserError: it has no docstring, or a parameter that is not a text by name.
    """
    text = inspect.getdoc(function)
    if not text:
        raise UserError(f"tool '{what}' has no docstring: write in it what the tool does, for the model")
    hints, parameters = _hints(function), {}
    for name, parameter in inspect.signature(function).parameters.items():
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if not named or hints.get(name, str) is not str:
            raise UserError(
                f"tool '{what}': its parameter {name} is not a text by name: annotate it as str, and convert "
                "it inside"
            )
        line = re.search(rf"^\s*{name}\s*(?:\([^)]*\))?:\s*(.+)$", text, re.MULTILINE)
        parameters[name] = line[1].strip() if line else name
    return " ".join(text.split("\n\n")[0].split()), parameters


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):  # names that only a type checker knows, or no annotations at all
        return {}


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., str]:
    """The function as a tool runs it: what it raises is told to the model."""

    def run(**arguments: str) -> str:
        try:
            return str(function(**arguments))
        except ToolError:
            raise
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit, too
            raise ToolError(f"{name} raised {error_summary(error)}") from None

    return run
