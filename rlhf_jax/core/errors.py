"""The one exception a user is meant to read, and how the errors of others are told in its sentence."""

import traceback


class UserError(Exception):
    """A mistake in what the user gave: a file, a field, an option, a checkpoint.

    The message is one sentence that says what is wrong, where (`file:line`, field, option) and how
    to mend it. Scripts print it without a traceback and exit with status 2.
    """


def error_summary(error: BaseException) -> str:
    """Type of an error and the first line of its message."""
    try:
        lines = str(error).splitlines()
    except Exception:  # of a user's own class
        lines = []
    return type(error).__name__ + (f" ({shortened(lines[0])})" if lines else "")


def error_place(error: BaseException) -> str:
    """` at file:line` of the innermost Python line that ran; of the source itself for a syntax error."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" at {error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    return f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def shown(value: object) -> str:
    """At most 100 characters of a value's `repr`, whatever that does."""
    try:
        return shortened(repr(value[:100]) if isinstance(value, str) else " ".join(repr(value).split()))
    except Exception as error:
        return f"a {type(value).__name__} (whose repr raises {type(error).__name__})"


def shortened(text: str) -> str:
    """At most 100 characters of a text."""
    return text if len(text) <= 100 else text[:97] + "..."
