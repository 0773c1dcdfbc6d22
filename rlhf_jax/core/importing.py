"""Functions of the user by import path, `module:function`: rewards, losses, variants, judges."""

import difflib
import importlib
import os
import pkgutil
import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from rlhf_jax.core.errors import UserError, error_place, error_summary


def is_import_path(text: str) -> bool:
    """True if the text has the form `module:function`."""
    module, colon, function = text.partition(":")
    return bool(colon) and all(part.isidentifier() for part in [*module.split("."), function])


def optional(module: str, *, extra: str) -> Any:
    """A module that comes with an extra of the package.

    Raises:
      UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        raise UserError(f"{module} is not installed: pip install 'rlhf_jax[{extra}]'") from None


def load_function(
    path: str, *, kind: str = "function", example: str = "my_module:mine"
) -> Callable[..., Any]:
    """Imports `module:function`, from the current folder or any installed package.

    Args:
      kind: what the function is to be, for messages.
      example: of a path, for messages.
    Raises:
      UserError: the path is not of that form, or names nothing that can be called; with the nearest name.
    """
    if not is_import_path(path):
        raise UserError(f"{kind} '{path}' is not of the form module:function, such as {example}")
    module_name, _, function_name = path.partition(":")
    module = _import_module(module_name, f"{kind} '{path}'")
    function = getattr(module, function_name, None)
    if callable(function):
        return function
    problem = "is not a function" if hasattr(module, function_name) else "does not exist"
    names = [name for name, value in vars(module).items() if callable(value) and not isinstance(value, type)]
    hint = nearest_name(function_name, names)
    where = module.__file__ or module_name
    raise UserError(f"{kind} '{path}': {function_name} {problem} in {where}{hint}")


def nearest_name(name: str, names: Iterable[str]) -> str:
    """`; the nearest name is ...` for the end of a message, or nothing."""
    found = difflib.get_close_matches(name, list(names), n=1)
    return f"; the nearest name is {found[0]}" if found else ""


def _import_module(name: str, subject: str) -> ModuleType:
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.append(folder)  # last, so that a file of the user's never hides an installed package
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name != missing and not name.startswith(missing + "."):
            raise UserError(f"{subject}: {name} needs the module {missing}: install it") from error
        hint = nearest_name(missing, _sibling_modules(missing, folder))
        raise UserError(f"{subject}: no module {missing} in {folder} or installed{hint}") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit of a module would end the run in silence
        raise UserError(
            f"{subject}: importing {name} fails{error_place(error)} with {error_summary(error)}"
        ) from error


def _sibling_modules(name: str, folder: str) -> list[str]:
    """Full names of the modules that stand where `name` would."""
    parent = name.rpartition(".")[0]
    if not parent:
        return [module.name for module in pkgutil.iter_modules([folder])]
    package = sys.modules.get(parent)  # imported on the way to the module that is missing
    paths = getattr(package, "__path__", [])
    return [module.name for module in pkgutil.iter_modules(paths, parent + ".")]
