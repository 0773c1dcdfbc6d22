"""Reward functions row by row in threads, with a time limit; and functions that are awaited."""

import asyncio
import threading

import numpy as np
import pytest

from rlhf_jax.core.errors import UserError
from rlhf_jax.rewards.calls import RewardCalls, TooLate, awaited, call_each
from rlhf_jax.rewards.functions import Scored, score_rows

NUMBERS = ["3", "1", "2", "5"]
FIELDS = {"answer": ["3", "0", "2", "0"]}


def length(prompts, completions, **_):
    return [float(text) for text in completions]


async def awaited_length(prompts, completions, **_):
    await asyncio.sleep(0)
    return length(prompts, completions)


class Object:
    async def __call__(self, prompts, completions, **_):
        return length(prompts, completions)


def score(reward_fn, completions=NUMBERS, where=None, **calls):
    prompts = [f"p{row}" for row in range(len(completions))]
    fields = {name: values[: len(completions)] for name, values in FIELDS.items()}
    return score_rows(reward_fn, prompts, completions, fields, where=where, calls=RewardCalls(**calls))


@pytest.mark.parametrize("reward_fn", [length, awaited_length, Object()])
@pytest.mark.parametrize("calls", [{}, {"workers": 1}, {"workers": 3, "timeout": 60.0}])
def test_numbers_come_in_the_order_of_the_rows(reward_fn, calls):
    scored = score(reward_fn, **calls)
    assert scored.rewards.tolist() == [3, 1, 2, 5]
    assert not scored.unscorable.any()


def test_each_row_comes_with_its_own_fields():
    seen = []

    def reward(prompts, completions, *, answer):
        seen.append((*prompts, *completions, *answer))
        return [float(completions == answer)]

    assert score(reward, workers=2).rewards.tolist() == [1, 0, 1, 0]
    assert sorted(seen) == [(f"p{i}", NUMBERS[i], FIELDS["answer"][i]) for i in range(4)]


@pytest.mark.parametrize("is_async", [False, True])
def test_as_many_rows_as_there_are_workers_are_on_their_way(is_async):
    """Rows that wait for each other: with fewer workers none would ever return."""
    waiting, together = [], threading.Event()

    def arrive():
        waiting.append(0)
        if len(waiting) == 3:
            together.set()

    def reward(prompts, completions, **_):
        arrive()
        assert together.wait(30)
        return [1.0]

    async def reward_async(prompts, completions, **_):
        arrive()
        while not together.is_set():
            await asyncio.sleep(0.001)
        return [1.0]

    assert score(reward_async if is_async else reward, NUMBERS[:3], workers=3).rewards.tolist() == [1] * 3


def test_no_more_rows_than_workers_are_on_their_way():
    lock, now, most = threading.Lock(), [0], [0]

    def reward(prompts, completions, **_):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        threading.Event().wait(0.005)
        with lock:
            now[0] -= 1
        return [1.0]

    score(reward, ["0"] * 4, workers=2)
    assert most[0] <= 2


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_row_that_hangs_has_no_score_and_the_others_have_theirs(is_async, workers):
    released = threading.Event()

    def reward(prompts, completions, **_):
        if completions == ["1"]:
            released.wait()
        return length(prompts, completions)

    async def reward_async(prompts, completions, **_):
        if completions == ["1"]:
            await asyncio.Event().wait()
        return length(prompts, completions)

    scored = score(reward_async if is_async else reward, workers=workers, timeout=0.5)
    released.set()
    assert scored.unscorable.tolist() == [False, True, False, False]
    assert scored.rewards.tolist() == [3, 0, 2, 5]


def test_a_coroutine_that_blocks_its_loop_is_given_up():
    released = threading.Event()

    async def reward(prompts, completions, **_):
        released.wait(30)  # no await: nothing can cancel it
        return [1.0]

    assert score(reward, ["0"], workers=1, timeout=0.1).unscorable.tolist() == [True]
    released.set()


def test_a_coroutine_that_is_too_late_is_cancelled():
    cancelled = threading.Event()

    async def hang():
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    with pytest.raises(TooLate):
        awaited(hang(), 0.01)
    assert cancelled.wait(30)


@pytest.mark.parametrize("is_async", [False, True])
def test_an_error_of_one_row_names_the_first_of_them(is_async):
    def reward(prompts, completions, **_):
        if float(completions[0]) < 3:
            raise ValueError("too short")
        return [1.0]

    async def reward_async(prompts, completions, **_):
        return reward(prompts, completions)

    where = [f"my.jsonl:{row}" for row in range(4)]
    with pytest.raises(
        UserError, match=r"ValueError \(too short\).* on row 1 \(my\.jsonl:1\), completion '1'"
    ):
        score(reward_async if is_async else reward, where=where, workers=4)


def test_an_async_function_that_raises_is_named_without_workers_too():
    async def reward(prompts, completions, **_):
        if "2" in completions:
            raise TimeoutError("of its own")
        return [1.0] * len(completions)

    with pytest.raises(UserError, match=r"raised TimeoutError \(of its own\).* on row 2"):
        score(reward)
    with pytest.raises(UserError, match=r"raised TimeoutError \(of its own\).* on row 2"):
        score(reward, workers=2, timeout=60.0)


def test_none_and_scored_of_one_row_count_as_they_do_of_all():
    def reward(prompts, completions, **_):
        value = float(completions[0])
        return [None] if value == 1 else Scored(np.float32([value]), np.array([value == 5]))

    scored = score(reward, workers=2)
    assert scored.unscorable.tolist() == [False, True, False, True]
    assert scored.rewards.tolist() == [3, 0, 2, 0]


@pytest.mark.parametrize("returned", [1.0, None, [1.0, 2.0], []])
def test_what_is_no_list_of_one_number_is_refused(returned):
    with pytest.raises(UserError, match="expected a list of one number"):
        score(lambda prompts, completions, **_: returned, workers=2, timeout=60.0)


def test_a_limit_without_calls_of_rows_is_refused():
    with pytest.raises(UserError, match="give reward_workers"):
        RewardCalls(timeout=1.0)


def test_nothing_is_called_for_no_rows():
    assert call_each(lambda row: row, 0, RewardCalls(2)) == []
