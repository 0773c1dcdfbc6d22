"""Calls of reward functions: all rows at once, or each row by itself in a thread, with a time limit.

A function that hangs cannot be stopped from outside: its thread is left behind, and ends with the process at
the latest. A coroutine is cancelled, unless it blocks the loop that all coroutines share.
"""

import asyncio
import dataclasses
import inspect
import math
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from rlhf_jax.core.errors import UserError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class RewardCalls:
    """Concurrency and time limit of reward functions.

    Attributes:
      workers: rows that are scored at a time, each by a call of its own, in a thread of its own; 0 for all
        rows in one call.
      timeout: seconds that a row may take; a row that takes longer counts as one without a score. None for
        no limit.
    """

    workers: int = 0
    timeout: float | None = None

    def __post_init__(self) -> None:
        """Raises: UserError for a limit of rows that have no call of their own."""
        if self.timeout is not None and not self.workers:
            raise UserError("reward_timeout limits the call of one row: give reward_workers, too")


ALL_AT_ONCE = RewardCalls()


class RowError(Exception):
    """A call failed in one row, by an error of the function's own."""

    def __init__(self, row: int, error: BaseException) -> None:
        super().__init__(f"row {row}: {error!r}")
        self.row, self.error = row, error


class TooLate(Exception):
    """A coroutine was cancelled at its time limit."""


class _Coroutines:
    """One event loop for all that is awaited, in a thread of its own: what a function keeps between its
    calls, such as a session of HTTP, belongs to a loop, and a notebook's own is running already.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, coroutine: Any) -> Any:
        """What the coroutine returns."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="rewards", daemon=True).start()
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


_COROUTINES = _Coroutines()


def awaited(returned: Any, timeout: float | None = None) -> Any:
    """Result of a function, awaited where it is `async`.

    Raises:
      TooLate: nothing came within `timeout` seconds.
    """
    if not inspect.isawaitable(returned):
        return returned

    async def wait() -> Any:
        limit = asyncio.timeout(timeout)
        try:
            async with limit:
                return await returned
        except TimeoutError:
            if limit.expired():
                raise TooLate from None
            raise  # the function's own

    return _COROUTINES.run(wait())


def call_each(function: Callable[[int], T], count: int, calls: RewardCalls) -> list[T | None]:
    """`function(row)` of each of `count` rows, in their order; None where it took too long.

    Raises:
      RowError: the function failed; of several rows, names the first.
    """
    said: queue.SimpleQueue[tuple[int, T | None, BaseException | None]] = queue.SimpleQueue()
    deadlines: dict[int, float] = {}
    values: list[T | None] = [None] * count
    failed: dict[int, BaseException] = {}
    rows = iter(range(count))

    def work(row: int) -> None:
        try:
            said.put((row, function(row), None))
        except BaseException as error:  # SystemExit of a reward would end its thread in silence
            said.put((row, None, error))

    while True:
        # Rows begin in order: once one has failed, no later one can be the first.
        while not failed and len(deadlines) < calls.workers and (row := next(rows, None)) is not None:
            deadlines[row] = time.monotonic() + (math.inf if calls.timeout is None else calls.timeout)
            threading.Thread(target=work, args=(row,), daemon=True).start()
        if not deadlines:
            break
        left = min(deadlines.values()) - time.monotonic()
        try:
            row, value, error = said.get(timeout=None if left == math.inf else max(left, 0))
        except queue.Empty:
            now = time.monotonic()
            deadlines = {row: deadline for row, deadline in deadlines.items() if deadline > now}
            continue
        if deadlines.pop(row, None) is None:  # given up before
            continue
        values[row] = value
        if error is not None and not isinstance(error, TooLate):
            failed[row] = error
    if failed:
        first = min(failed)
        raise RowError(first, failed[first])
    return values
