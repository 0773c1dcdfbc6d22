"""Standard output that may be lost without losing the run: a full disk, a reader that has left."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


class _Output:
    """A text stream that goes on, into nothing, after the first error."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """Writes what can be written."""
        with self._noting_errors():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flushes what can be flushed."""
        with self._noting_errors():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _noting_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = self.error or error
            # What is still buffered would fail again when the process ends.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def whole_output() -> Iterator[None]:
    """Whatever is printed within costs no run its life.

    Where the disk under standard output is full, that is said at the end, with status 2. A pipe whose reader
    has left, as `head` does, is nobody's mistake.
    """
    if isinstance(sys.stdout, _Output):
        yield
        return
    output = _Output(sys.stdout)
    with contextlib.redirect_stdout(output):  # pyright: ignore[reportArgumentType]
        try:
            yield
        finally:
            output.flush()
    if output.error is not None and not isinstance(output.error, BrokenPipeError):
        print(
            f"error: standard output cannot be written ({output.error.strerror}): free the disk under it; "
            "what the command wrote into files is whole",
            file=sys.stderr,
        )
        sys.exit(2)
