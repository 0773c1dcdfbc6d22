"""Verifiers: is the answer of a completion right? Pure text, no `eval`, time bounded for any input.

`exact_answer` takes one spelling only, `gsm8k_answer` any spelling of a number, `symbolic_answer`
mathematics (see `answers`), `math_verify_reward` whatever the package math-verify takes, in a process
under limits, as `reasoning_gym_reward` the verifiers of reasoning-gym. The functions named `*_reward` are
reward functions to name by path, such as `rlhf_jax.rewards.verifiers:symbolic_reward`; None is an answer
that cannot be scored (see `functions`).
"""

import functools
import importlib.util
from collections.abc import Sequence

from rlhf_jax.core.errors import UserError
from rlhf_jax.data.examples import ANSWER_MARK
from rlhf_jax.data.sources import is_reference
from rlhf_jax.rewards.algebra import TooLarge
from rlhf_jax.rewards.answers import answers_equal
from rlhf_jax.rewards.extraction import Rule, boxed, final_answer, final_number, reference_answer, tagged
from rlhf_jax.sandbox.workers import LimitedWorker

MATH_VERIFY_SECONDS = 1.0
MATH_VERIFY_CHARACTERS = 4096
REASONING_GYM_SECONDS = 2.0
REASONING_GYM_CHARACTERS = 4096


def exact_answer(completion: str, answer: str | int, *, finished: bool = True) -> bool:
    """True if a completion ends with the line `#### {answer}`, to the letter.

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
    """True if a completion gives the number that a GSM8K row gives (Cobbe et al. 2021).

    The number of either text is the first one behind its last `####` or, where it has no `####`, its last
    one. They are compared as exact fractions: `1,234`, `$1234`, `1234.` and `1234.0` are the same.
    """
    expected = final_number(str(reference))
    return expected is not None and final_number(completion) == expected


def symbolic_answer(
    completion: str, reference: str | int | float, *, rule: Rule = final_answer
) -> bool | None:
    """True if a completion gives the reference's answer, as mathematics (see `answers` for what is equal).

    Args:
      reference: the answer itself, or a worked solution that marks it (`####`, box or tag).
      rule: where in the completion the answer stands (see `extraction`); no answer is a wrong one.

    Returns:
      None where it cannot be told: the reference has no answer, or one of the two is beyond the limits.
    """
    expected = reference_answer(reference)
    if expected is None:
        return None
    answer = rule(completion)
    try:
        return answer is not None and answers_equal(answer, expected)
    except TooLarge:
        return None


# Reward functions ----------------------------------------------------------------------------------


def exact_answer_reward(
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    answer: Sequence[str | int],
    finished: Sequence[bool] | None = None,
    **_: object,
) -> list[float | None]:
    """1 where `exact_answer` holds, else 0, for rows with a field `answer` (the embedded task)."""
    ended = finished if finished is not None else [True] * len(completions)
    rows = zip(completions, answer, ended, strict=True)
    return [
        float(exact_answer(text, expected, finished=bool(end))) if is_reference(expected) else None
        for text, expected, end in rows
    ]


def gsm8k_reward(
    prompts: Sequence[str], completions: Sequence[str], *, answer: Sequence[str | int | float], **_: object
) -> list[float | None]:
    """1 where `gsm8k_answer` holds, else 0, for rows with a field `answer` (GSM8K's worked solutions)."""
    pairs = zip(completions, answer, strict=True)
    return [
        float(gsm8k_answer(text, reference))
        if is_reference(reference) and final_number(str(reference)) is not None
        else None
        for text, reference in pairs
    ]


def symbolic_reward(
    prompts: Sequence[str], completions: Sequence[str], *, answer: Sequence[str | int | float], **_: object
) -> list[float | None]:
    """1 where `symbolic_answer` holds, wherever the answer stands, for rows with a field `answer`."""
    return _symbolic(completions, answer, final_answer)


def boxed_reward(
    prompts: Sequence[str], completions: Sequence[str], *, answer: Sequence[str | int | float], **_: object
) -> list[float | None]:
    r"""1 where `symbolic_answer` holds of the last `\boxed{}`, for rows with a field `answer`."""
    return _symbolic(completions, answer, boxed)


def tagged_reward(
    prompts: Sequence[str], completions: Sequence[str], *, answer: Sequence[str | int | float], **_: object
) -> list[float | None]:
    """1 where `symbolic_answer` holds of the one `<answer>`, for rows with a field `answer`."""
    return _symbolic(completions, answer, tagged)


def _symbolic(
    completions: Sequence[str], answers: Sequence[str | int | float], rule: Rule
) -> list[float | None]:
    pairs = zip(completions, answers, strict=True)
    verdicts = [
        symbolic_answer(text, reference, rule=rule) if is_reference(reference) else None
        for text, reference in pairs
    ]
    return [None if verdict is None else float(verdict) for verdict in verdicts]


def math_verify_reward(
    prompts: Sequence[str], completions: Sequence[str], *, answer: Sequence[str | int | float], **_: object
) -> list[float | None]:
    """1 where the package math-verify finds the answers equal, for rows with a field `answer`.

    It builds expressions with sympy, which may take for ever: it runs in a process of its own, on the last
    4,096 characters, for a second and in 512 MiB at most. What does not end by then cannot be scored.

    Raises:
      UserError: the package is not installed.
    """
    tasks = [
        [
            text[-MATH_VERIFY_CHARACTERS:],
            (reference_answer(reference) if is_reference(reference) else None) or "",
        ]
        for text, reference in zip(completions, answer, strict=True)
    ]
    outcomes = _math_verify_worker().run(tasks)
    return [None if outcome.value is None else float(outcome.value) for outcome in outcomes]


@functools.cache
def _math_verify_worker() -> LimitedWorker:
    if importlib.util.find_spec("math_verify") is None:
        raise UserError("math_verify_reward needs the package math-verify: pip install 'rlhf_jax[math]'")
    return LimitedWorker("rlhf_jax.rewards.math_verify_worker:verify", seconds=MATH_VERIFY_SECONDS)


def reasoning_gym_reward(
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    reasoning_gym: Sequence[str],
    index: Sequence[int],
    **_: object,
) -> list[float | None]:
    """Score by reasoning-gym's own verifiers, from 0 to 1, for rows of `reasoning-gym:...` data.

    The answer is what stands in the one `<answer>`, else the whole completion, of either the last 4,096
    characters. The verifiers run in a process of their own, for two seconds an answer at most; what does not
    end by then cannot be scored.

    Raises:
      UserError: the package is not installed.
    """
    tasks = [
        [(tagged(text) or text.strip())[-REASONING_GYM_CHARACTERS:], spec, place]
        for text, spec, place in zip(completions, reasoning_gym, index, strict=True)
    ]
    return [outcome.value for outcome in _reasoning_gym_worker().run(tasks)]


@functools.cache
def _reasoning_gym_worker() -> LimitedWorker:
    if importlib.util.find_spec("reasoning_gym") is None:
        raise UserError(
            "reasoning_gym_reward needs the package reasoning-gym: pip install 'rlhf_jax[reasoning-gym]'"
        )
    return LimitedWorker("rlhf_jax.rewards.reasoning_gym_worker:score", seconds=REASONING_GYM_SECONDS)
