"""Verifiers: is the answer of a completion right? Pure text, no `eval`, time bounded for any input."""

import re
from collections.abc import Sequence
from fractions import Fraction

from rlhf_jax.data.arithmetic import ANSWER_MARK

# Only this much of a text is searched for a number, and longer numbers are none: both keep hostile
# completions cheap, and no honest answer comes near.
_WINDOW = 4096
_LONGEST_NUMBER = 64

# A sign counts only where it cannot be a minus between two numbers; grouping commas only in threes.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)])-)?\$?"
    r"(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+|(?=\.[0-9]))"
    r"(?P<decimals>\.[0-9]+)?"
    r"(?:/(?P<denominator>[0-9]+))?"
)


def exact_answer(completion: str, answer: str | int, *, finished: bool = True) -> bool:
    """Whether a completion ends with the line `#### {answer}`, to the letter.

    Strict, so that nothing but the answer is worth anything to a policy: the generation has finished,
    the last line is exactly the mark, one space and the canonical number (no sign `+`, no leading zero,
    nothing behind it), and `#` occurs nowhere else.

    Args:
      completion: the decoded completion without its end-of-sequence token.
      answer: the true answer.
      finished: whether generation ended with the end-of-sequence token, not at the length limit.
    """
    line = f"{ANSWER_MARK} {answer}"
    is_last_line = completion == line or completion.endswith("\n" + line)
    return finished and is_last_line and completion.count("#") == len(ANSWER_MARK)


def gsm8k_answer(completion: str, reference: str | int | float) -> bool:
    """Whether a completion gives the number that a GSM8K row gives (Cobbe et al. 2021).

    The number of either text is the first one behind its last `####` or, where it has no `####`, its last
    one. They are compared as exact fractions: `1,234`, `$1234`, `1234.` and `1234.0` are the same.
    """
    expected = final_number(str(reference))
    return expected is not None and final_number(completion) == expected


def final_number(text: str) -> Fraction | None:
    """The number a worked solution ends with: the first behind the last `####`, without one the last of all.

    Reads integers, decimals, fractions such as `3/4`, grouping commas and `$`. Only the last 4,096
    characters of a text without `####` are searched, and a number of more than 64 characters is none.
    """
    _, mark, tail = text.rpartition(ANSWER_MARK)
    if mark:
        found = _NUMBER.search(tail[:_WINDOW].replace("\N{MINUS SIGN}", "-"))
        return None if found is None else _fraction(found)
    window = text[-_WINDOW:].replace("\N{MINUS SIGN}", "-")
    numbers = list(_NUMBER.finditer(window))
    # A number that starts where the window does may have lost its first digits.
    if not numbers or (numbers[-1].start() == 0 and len(text) > _WINDOW):
        return None
    return _fraction(numbers[-1])


def _fraction(found: re.Match[str]) -> Fraction | None:
    if len(found[0]) > _LONGEST_NUMBER:
        return None
    number = Fraction((found["whole"].replace(",", "") or "0") + (found["decimals"] or ""))
    denominator = int(found["denominator"] or 1)
    if denominator == 0:
        return None
    return (-number if found["sign"] else number) / denominator


# Reward functions: name them by path, such as `rlhf_jax.rewards.verifiers:exact_answer_reward` --------


def exact_answer_reward(
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    answer: Sequence[str | int],
    finished: Sequence[bool] | None = None,
    **_: object,
) -> list[float]:
    """1 where `exact_answer` holds, else 0, for rows with a field `answer` (the embedded task)."""
    ended = finished if finished is not None else [True] * len(completions)
    rows = zip(completions, answer, ended, strict=True)
    return [float(exact_answer(text, expected, finished=bool(end))) for text, expected, end in rows]


def gsm8k_reward(
    prompts: Sequence[str], completions: Sequence[str], *, answer: Sequence[str | int | float], **_: object
) -> list[float]:
    """1 where `gsm8k_answer` holds, else 0, for rows with a field `answer` (GSM8K's worked solutions)."""
    pairs = zip(completions, answer, strict=True)
    return [float(gsm8k_answer(text, reference)) for text, reference in pairs]
