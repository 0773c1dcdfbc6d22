"""The one exception a user is meant to read."""


class UserError(Exception):
    """A mistake in what the user gave: a file, a field, an option, a checkpoint.

    The message is one sentence that says what is wrong, where (`file:line`, field, option) and how
    to mend it. Scripts print it without a traceback and exit with status 2.
    """
