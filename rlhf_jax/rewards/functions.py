"""Reward functions of the user: found by path, called with care, combined with weights.

A reward function is any callable

    (prompts: list[str], completions: list[str], **fields: list) -> B numbers, or None for a row

where `fields` are the other fields of the rows the prompts came from, one list of length B each, and what
training knows of each completion: `finished`, `token_count` and `token_limit`. Take the fields you need by
name and the rest with `**_`. None says that a row cannot be scored: it gets `UNSCORABLE_SCORE` and is
counted. An `async` function is awaited.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from rlhf_jax.core.errors import UserError, error_place, error_summary, shown
from rlhf_jax.core.importing import load_function
from rlhf_jax.rewards.calls import ALL_AT_ONCE, RewardCalls, RowError, awaited, call_each

REWARD_LIMIT = 1e15
"""No reward is larger: sums of squares of rewards, in float32, must stay finite and keep the others' bits."""

RewardFn: TypeAlias = Callable[..., Any]

UNSCORABLE_SCORE = 0.0
"""What an answer is worth that its verifier cannot score: no more than a wrong one, so that nothing is
gained by writing one."""


@dataclasses.dataclass(frozen=True)
class Scored:
    """Rewards of a batch.

    Attributes:
      rewards: [B] float32, all finite.
      unscorable: [B] bool, rows that could not be scored and have the stated score.
      terms: name -> [B], what the rewards are the weighted sum of; NaN in rows that a term is not meant for.
    """

    rewards: np.ndarray
    unscorable: np.ndarray
    terms: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


# Finding -------------------------------------------------------------------------------------------


def load_reward(path: str) -> RewardFn:
    """Reward function by its path `module:function`; see `core.importing.load_function`."""
    return load_function(path, kind="reward", example="my_rewards:exact_match")


def no_reward(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """0 for every completion: of runs whose rewards come from elsewhere, or are none."""
    del prompts
    return [0.0] * len(completions)


# Calling -------------------------------------------------------------------------------------------


def call_reward(
    reward_fn: RewardFn,
    prompts: Sequence[str],
    completions: Sequence[str],
    fields: Mapping[str, Sequence[Any]],
    *,
    where: Sequence[str] | None = None,
    calls: RewardCalls = ALL_AT_ONCE,
) -> np.ndarray:
    """The rewards of `score_rows` alone: [B] float32, all finite."""
    return score_rows(reward_fn, prompts, completions, fields, where=where, calls=calls).rewards


def score_rows(
    reward_fn: RewardFn,
    prompts: Sequence[str],
    completions: Sequence[str],
    fields: Mapping[str, Sequence[Any]],
    *,
    where: Sequence[str] | None = None,
    calls: RewardCalls = ALL_AT_ONCE,
) -> Scored:
    """Calls a reward function and checks what it returns.

    Args:
      fields: other fields of the rows, a sequence of length B each; passed by name.
      where: where each row stands (`file:line`), for messages.
      calls: all rows in one call, or several calls at a time, with a time limit.
    Returns:
      The rewards, and which rows got `UNSCORABLE_SCORE` because the function returned None for them or took
      too long.
    Raises:
      UserError: the function raises, or does not return B finite numbers or None; names function, row and
        value.
    """
    lists = {name: list(values) for name, values in fields.items()}
    texts = list(prompts), list(completions)
    _check_arguments(reward_fn, lists)
    one_row = _make_row_fn(reward_fn, *texts, lists, calls.timeout)
    try:
        if calls.workers:
            returned = call_each(one_row, len(texts[1]), calls)
        else:
            returned = awaited(reward_fn(*texts, **lists))
    except (UserError, KeyboardInterrupt):
        raise
    except RowError as failed:
        raise _failure(reward_fn, failed.error, failed.row, texts[1], where) from failed.error
    except BaseException as error:  # SystemExit of a reward would end the run in silence
        row = _first_failing_row(one_row, len(texts[1]))
        raise _failure(reward_fn, error, row, texts[1], where) from error
    unscorable = np.zeros(len(texts[1]), bool)
    if isinstance(returned, Scored):  # of functions that call others
        returned, unscorable = returned.rewards, returned.unscorable
    elif isinstance(returned, list | tuple) and len(returned) == len(texts[1]):
        unscorable = np.array([value is None for value in returned], bool)
        returned = [UNSCORABLE_SCORE if value is None else value for value in returned]
    return Scored(_checked(_name(reward_fn), returned, texts[1], where), unscorable)


def _check_arguments(reward_fn: RewardFn, fields: Mapping[str, Any]) -> None:
    """Refuses a function that cannot take the fields of the rows, or needs one that they do not have."""
    try:
        signature = inspect.signature(reward_fn)
    except ValueError:  # some built-in functions have none; calling them will tell
        return
    try:
        signature.bind([], [], **fields)
    except TypeError as error:
        given = ", ".join(["prompts", "completions", *fields])
        raise UserError(
            f"reward function {_name(reward_fn)} cannot be called with {given} ({error}): "
            "let it take the fields it needs by name and the rest with **_, or add the field to the data"
        ) from error


def _checked(name: str, returned: Any, completions: list[str], where: Sequence[str] | None) -> np.ndarray:
    """The returned value as [B] float32."""
    expected = f"expected {len(completions)} finite numbers below {REWARD_LIMIT:g}, one for each completion"
    try:
        rewards = np.asarray(returned, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:  # OverflowError: a whole number of 400 digits
        raise UserError(f"reward function {name} returned {shown(returned)}: {expected}") from error
    if rewards.shape != (len(completions),):
        text = f"{shown(returned)}, of shape {rewards.shape}"
        raise UserError(f"reward function {name} returned {text}: {expected}")
    is_bad = ~(np.abs(rewards) <= REWARD_LIMIT)  # NaN and infinity, too
    if is_bad.any():
        row = int(np.argmax(is_bad))
        raise UserError(
            f"reward function {name} returned {rewards[row]} for {_row_name(row, where)}, "
            f"completion {shown(completions[row])}: {expected}"
        )
    return rewards.astype(np.float32)


def _failure(
    reward_fn: RewardFn,
    error: BaseException,
    row: int | None,
    completions: list[str],
    where: Sequence[str] | None,
) -> BaseException:
    """What to raise for an error of the function."""
    if isinstance(error, UserError):
        return error
    at = "" if row is None else f" on {_row_name(row, where)}, completion {shown(completions[row])}"
    return UserError(
        f"reward function {_name(reward_fn)} raised {error_summary(error)}{error_place(error)}{at}: "
        "mend the function"
    )


def _make_row_fn(
    reward_fn: RewardFn,
    prompts: list[str],
    completions: list[str],
    fields: dict[str, list[Any]],
    timeout: float | None,
) -> Callable[[int], Any]:
    """`one_row(row)`: what the function says of this row alone, a number or None."""

    def one_row(row: int) -> Any:
        chosen = {name: [values[row]] for name, values in fields.items()}
        returned = awaited(reward_fn([prompts[row]], [completions[row]], **chosen), timeout)
        if isinstance(returned, Scored):
            return None if returned.unscorable[0] else returned.rewards[0]
        try:
            (value,) = returned
        except (TypeError, ValueError) as error:
            raise UserError(
                f"reward function {_name(reward_fn)} returned {shown(returned)} for the one completion "
                f"{shown(completions[row])}: expected a list of one number"
            ) from error
        return value

    return one_row


def _first_failing_row(one_row: Callable[[int], Any], count: int) -> int | None:
    """Calls the function row by row, which only a run that is about to stop pays for."""
    for row in range(count):
        try:
            one_row(row)
        except UserError:  # of what it returns, where it has raised before
            continue
        except KeyboardInterrupt:
            raise
        except BaseException:
            return row
    return None


def _name(function: RewardFn) -> str:
    """`module:function` where the function has both."""
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    module = getattr(function, "__module__", None)
    return f"{module}:{name}" if module else name


def _row_name(row: int, where: Sequence[str] | None) -> str:
    return f"row {row}" if where is None else f"row {row} ({where[row]})"
