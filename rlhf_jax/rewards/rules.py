"""Rewards for how something is said: format, length, language, code, repetition. Pure text, linear time.

Each is a reward function to name by path with a weight, such as
`--rewards rlhf_jax.rewards.verifiers:tagged_reward rlhf_jax.rewards.rules:think_answer_reward=0.2`.
Penalties are negative numbers, so that their weights are positive.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_jax.data.cleaning.text import (
    main_script,
    repeated_share,
    script_family,
    script_of,
    script_share,
    without_markup,
)

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")

OVERLONG_SHARE = 0.2
"""Share of the longest answer over which the overlong penalty grows: 4,096 of 20,480 tokens in DAPO."""

_LONGEST = 1 << 16  # characters of a completion that are looked at by the rules that count words
_NGRAM = 4

# `search`, anchored at the end: a line by itself, with digits that may be grouped, signed and broken.
_ANSWER_LINE = re.compile(r"(?:\A|\n)#### -?\$?[0-9][0-9,]{0,30}(?:\.[0-9]{1,30})?\Z")
_END_OF_THOUGHT = re.compile(r"</think>")
_DIGITS = frozenset("0123456789")
_CODE = re.compile(
    r"```|~~~|^\s{0,32}(?:import\s+\w|from\s+[\w.]+\s+import\b|def\s+\w+\s*\(|class\s+\w+\s*[:(]|#include\b|"
    r"print\s*\(|return\b|for\s+\w+\s+in\s.{0,80}:$|while\s.{0,80}:$|(?:const|let|var)\s+\w+\s*=|function\s+\w+\()",
    re.MULTILINE,
)


def think_answer_reward(prompts: Sequence[str], completions: Sequence[str], **_: object) -> list[float]:
    """1 where a completion is `<think>...</think><answer>...</answer>` and nothing else (DeepSeek-R1).

    Each tag stands exactly once, in this order; both parts hold more than spaces, and only spaces stand
    outside them. A template that opens the thought itself leaves `<think>` out: see `think_reward`.
    """
    return [float(_is_thought_and_answer(text)) for text in completions]


def think_reward(prompts: Sequence[str], completions: Sequence[str], **_: object) -> list[float]:
    """1 where a completion is `...</think>...`, for prompts that end with `<think>`: one end, two parts."""
    return [float(_is_thought(text)) for text in completions]


def answer_line_reward(prompts: Sequence[str], completions: Sequence[str], **_: object) -> list[float]:
    """1 where the last line is `#### NUMBER`, the only one with that mark, whatever the number."""
    return [float(_ANSWER_LINE.search(text) is not None and text.count("####") == 1) for text in completions]


def _is_thought_and_answer(text: str) -> bool:
    if any(text.count(tag) != 1 for tag in _TAGS):
        return False
    pieces, rest = [], text
    for tag in _TAGS:
        piece, mark, rest = rest.partition(tag)
        if not mark:  # it stands before one that it should follow
            return False
        pieces.append(piece.strip())
    before, thought, between, answer = pieces
    return bool(thought and answer and not (before or between or rest.strip()))


def _is_thought(text: str) -> bool:
    thought, mark, answer = text.partition("</think>")
    again = "<think>" in text or "</think>" in answer
    return bool(mark and thought.strip() and answer.strip() and not again)


# Length --------------------------------------------------------------------------------------------


def soft_overlong_reward(
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    token_count: Sequence[int],
    token_limit: Sequence[int],
    **_: object,
) -> list[float]:
    """Soft overlong punishment of DAPO (Yu et al. 2025, eq. 13), from 0 down to -1.

        0                                    |y| <= L_max - L_cache
        ((L_max - L_cache) - |y|) / L_cache  L_max - L_cache < |y| <= L_max
        -1                                   L_max < |y|

    L_cache is a fifth of L_max, as there.

    Args:
      token_count: |y|, tokens of each completion, which training gives.
      token_limit: L_max, the most tokens that a completion may have, which training gives.
    """
    return overlong_penalties(np.asarray(token_count), np.asarray(token_limit)).tolist()


def overlong_penalties(lengths: Any, longest: Any) -> Any:
    """Soft overlong punishment of lengths, as NumPy or JAX arrays; see `soft_overlong_reward`."""
    cache = longest * OVERLONG_SHARE
    return ((longest - cache - lengths) / cache).clip(-1.0, 0.0)


def target_length_reward(
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    token_count: Sequence[int],
    target_length: Sequence[int],
    **_: object,
) -> list[float]:
    """-|n_target - |y||, in tokens: with weight alpha the length term of L1 (Aggarwal & Welleck 2025).

    Args:
      target_length: a field of the rows.
    """
    return [-float(abs(target - count)) for count, target in zip(token_count, target_length, strict=True)]


# Language ------------------------------------------------------------------------------------------


def language_reward(
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    script: Sequence[str | None] | None = None,
    **_: object,
) -> list[float]:
    """Share of a completion's letters that are in the expected script; 1 where it has no letters.

    DeepSeek-R1 rewards the share of words in the target language; letters need no dictionary, and a
    word with one letter of another alphabet in it does not pass whole.

    Args:
      script: the first word of Unicode's names of its letters (LATIN, CYRILLIC, CJK, ...), a field of the
        rows; where it is missing, the script that most letters of the prompt are in.
    """
    expected = script if script is not None else [None] * len(completions)
    rows = zip(prompts, completions, expected, strict=True)
    return [script_share(text, name or main_script(prompt)) for prompt, text, name in rows]


def step_language_reward(
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    script: Sequence[str | None] | None = None,
    **_: object,
) -> list[float]:
    """Share of a completion's steps, its lines, that are wholly in the expected script; 0 where it has none.

    As `language_reward`, but by steps, so that one foreign numeral costs a step as one foreign word does, and
    an empty text earns nothing. Digits count too, but for those that all languages use, 0 to 9. Tags are
    no part of a step, and `</think>` ends one.

    Args:
      script: as in `language_reward`.
    """
    expected = script if script is not None else [None] * len(completions)
    rows = zip(prompts, completions, expected, strict=True)
    return [_step_share(text, name or main_script(prompt)) for prompt, text, name in rows]


def _step_share(text: str, script: str | None) -> float:
    lines = without_markup(_END_OF_THOUGHT.sub("\n", text)).split("\n")
    steps = [line for line in lines if any(map(_is_written, line))]
    if not steps:
        return 0.0
    expected = {script_family(script.upper())} if script else set[str]()
    return sum(_step_scripts(step) <= expected for step in steps) / len(steps)


def _step_scripts(step: str) -> set[str]:
    return {script_of(sign) for sign in set(step) - _DIGITS if _is_written(sign)}


def _is_written(sign: str) -> bool:
    return sign.isalpha() or sign.isdecimal()


# Code and repetition -------------------------------------------------------------------------------


def code_free_reward(prompts: Sequence[str], completions: Sequence[str], **_: object) -> list[float]:
    """1 where a completion has no code: no fence, and no line that opens as Python, C or JavaScript does."""
    return [float(_CODE.search(text[:_LONGEST]) is None) for text in completions]


def repetition_reward(prompts: Sequence[str], completions: Sequence[str], **_: object) -> list[float]:
    """-(share of a completion's runs of four words that stood in it before); 0 where it has fewer.

    A text without spaces counts by characters, in runs of twenty.
    """
    return [-repeated_share(text[:_LONGEST], _NGRAM) for text in completions]
