"""What the import hook of the tests checks with."""

from typing import Any

import beartype

check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))


def check_functions(function: Any) -> Any:
    """Functions and methods, and no fields of dataclasses."""
    return function if function.__name__ == "__init__" else check(function)
