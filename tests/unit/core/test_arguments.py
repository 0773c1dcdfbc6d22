"""Arguments against their annotations: what is wrong with a call, in one sentence."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import pytest

from rlhf_jax.core.arguments import checked, refuse_unknown, typed, words_for
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.ranges import PositiveInt, Share


@dataclasses.dataclass(frozen=True)
class Group:
    """A group of settings."""

    rank: int = 8


class Made:
    """A class that says how one comes by it."""

    MADE_BY = "what make() returns"


@pytest.mark.parametrize(
    ("hint", "value", "taken"),
    [
        (int, np.int64(3), 3),
        (float, 2, 2),
        (float, np.float32(0.5), 0.5),
        (bool, np.bool_(True), True),
        (str, pathlib.PurePosixPath("a/b"), "a/b"),
        (int | None, None, None),
        (Literal["none", "full"] | None, "full", "full"),
        (tuple[str, ...], ["a", "b"], ("a", "b")),
        (tuple[str, ...], "a", ("a",)),
        (Sequence[str], ["a"], ["a"]),
        (Callable[..., Any], print, print),
        (Any, 3, 3),
        (Group, Group(2), Group(2)),
        (Share, 1, 1),
    ],
)
def test_what_a_hint_allows_is_taken_as_pythons_own(hint, value, taken):
    found = typed("it", hint, value)
    assert found == taken
    assert type(found) is type(taken)


@pytest.mark.parametrize(
    ("hint", "value", "said"),
    [
        (int, 1.5, "it is 1.5: give a whole number"),
        (int, True, "it is True: give a whole number"),
        (float | None, "1", "it is '1': give a number or None"),
        (bool, 1, "it is 1: give True or False"),
        (Literal["none", "full"], "some", "it is 'some': give one of none, full"),
        (Sequence[str], "abc", "it is 'abc': give a list of texts"),
        (Sequence[str], ["a", 3], "it[1] is 3: give a text"),
        (Sequence[Any], print, "it is the function print: give a list"),
        (Sequence[Any], (x for x in "ab"), "it is a generator: give a list"),
        (Annotated[Sequence[Any], "a list of messages"], {}, "it is a dict: give a list of messages"),
        (Sequence[Mapping[str, Any]], 3, "it is 3: give a list of dicts"),
        (Callable[..., Any] | None, 3, "it is 3: give a function or None"),
        (Made, "path", "it is 'path': give what make() returns"),
        (Group, "lora", f"it is 'lora': give one such as {__name__}.Group(...)"),
        (PositiveInt, 0, "it 0 is out of range: give 1 or more"),
        (Share, float("nan"), "it is not a number: give a number from 0 to 1"),
    ],
)  # fmt: skip
def test_what_it_does_not_allow_is_refused_in_words(hint, value, said):
    with pytest.raises(UserError) as error:
        typed("it", hint, value)
    assert str(error.value) == said


def test_a_choice_is_told_once():
    assert words_for(int | float | int | None) == "a whole number or a number or None"


@checked
def answer(
    prompts: Sequence[str], *, max_new_tokens: PositiveInt, temperature: float = 1.0, **more: Any
) -> Any:
    """Gives back what it was given."""
    return prompts, max_new_tokens, temperature, more


@checked
def load(path: str, *, dtype: str | None = None) -> Any:
    """Gives back what it was given."""
    return path, dtype


def test_a_call_that_is_right_goes_through():
    assert answer(["a"], max_new_tokens=np.int32(2), other=3) == (["a"], 2, 1.0, {"other": 3})
    assert load("a", dtype=None) == ("a", None)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: answer(["a"]), "answer() needs max_new_tokens: give a whole number"),
        (lambda: answer(3), "prompts is 3: give a list of texts"),
        (lambda: load(), "load() needs path: give a text"),
        (lambda: load("a", torch_dtype="x"), "there is no argument torch_dtype: give dtype"),
        (
            lambda: load("a", dtpe="x"),
            "there is no argument dtpe: did you mean dtype? load() takes path, dtype",
        ),
        (
            lambda: answer(["a"], 3),
            "answer(): too many positional arguments: by position it takes prompts; give the others by name",
        ),
        (
            lambda: load("a", path="b"),
            "load(): multiple values for argument 'path': by position it takes path; give the others by name",
        ),
    ],
)  # fmt: skip
def test_a_call_that_is_wrong_is_answered(call, said):
    with pytest.raises(UserError) as error:
        call()
    assert str(error.value) == said


def test_names_of_elsewhere_are_told_as_they_are_written_here():
    known = {"steps": "steps", "adapter": "adapter", "adapter.rank": "adapter=lora(rank={})"}
    known |= {"adapter.kind": "adapter=lora(kind={})", "compute_dtype": "compute_dtype"}
    for given, said in {
        "max_steps": "give steps",
        "lora_r": "give adapter=lora(rank=...)",
        "use_dora": "give adapter=lora(kind='dora')",
        "bf16": "give compute_dtype='bfloat16'",
        "stps": "did you mean steps? there are steps, adapter, compute_dtype",
    }.items():
        with pytest.raises(UserError) as error:
            refuse_unknown({given: 1}, known, "there are", "setting")
        assert str(error.value) == f"there is no setting {given}: {said}"
    refuse_unknown(known, known, "there are", "setting")
