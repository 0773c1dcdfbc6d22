"""Rewards for how something is said: format, length, language, code, repetition. Pure text, linear time.

Each is a reward function to name by path with a weight, such as
`--rewards rlhf_jax.rewards.verifiers:tagged_reward rlhf_jax.rewards.rules:think_answer_reward=0.2`.
Penalties are negative numbers, so that their weights are positive.
"""

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")

OVERLONG_SHARE = 0.2
"""Share of the longest answer over which the overlong penalty grows: 4,096 of 20,480 tokens in DAPO."""

_LONGEST = 1 << 16  # characters of a completion that are looked at by the rules that count words
_NGRAM = 4

# `search`, anchored at the end: a line by itself, with digits that may be grouped, signed and broken.
_ANSWER_LINE = re.compile(r"(?:\A|\n)#### -?\$?[0-9][0-9,]{0,30}(?:\.[0-9]{1,30})?\Z")
# Words of LaTeX, tags and addresses are in Latin letters whatever language the text is in.
_NO_LANGUAGE = re.compile(r"\\[A-Za-z]+|</?[A-Za-z_]+>|https?://[^\s]+")
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
    pairs = zip(token_count, token_limit, strict=True)
    return [overlong_penalty(count, limit, limit * OVERLONG_SHARE) for count, limit in pairs]


def overlong_penalty(length: float, longest: float, cache: float) -> float:
    """The formula of `soft_overlong_reward` for lengths in any unit."""
    return max(-1.0, min(0.0, (longest - cache - length) / cache))


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
    return [_script_share(text, name or _main_script(prompt)) for prompt, text, name in rows]


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
    return [_step_share(text, name or _main_script(prompt)) for prompt, text, name in rows]


def _step_share(text: str, script: str | None) -> float:
    lines = _NO_LANGUAGE.sub(" ", _END_OF_THOUGHT.sub("\n", text)).split("\n")
    steps = [line for line in lines if any(map(_is_written, line))]
    if not steps:
        return 0.0
    expected = {_family(script.upper())} if script else set[str]()
    return sum(_step_scripts(step) <= expected for step in steps) / len(steps)


def _step_scripts(step: str) -> set[str]:
    return {_script(sign) for sign in set(step) - _DIGITS if _is_written(sign)}


def _is_written(sign: str) -> bool:
    return sign.isalpha() or sign.isdecimal()


def _script_share(text: str, script: str | None) -> float:
    scripts = _scripts(text)
    total = scripts.total()
    return scripts[_family(script.upper())] / total if total and script else 1.0


def _main_script(text: str) -> str | None:
    found = _scripts(text).most_common(1)
    return found[0][0] if found else None


def _scripts(text: str) -> Counter[str]:
    letters = Counter(_NO_LANGUAGE.sub(" ", text))
    scripts = Counter[str]()
    for letter, count in letters.items():
        if letter.isalpha():
            scripts[_script(letter)] += count
    return scripts


@functools.lru_cache(maxsize=1 << 14)
def _script(letter: str) -> str:
    return _family(unicodedata.name(letter, "unknown").split()[0])


def _family(script: str) -> str:
    """Japanese mixes three scripts, which count as one, and Arabic's digits are called ARABIC-INDIC."""
    first = script.partition("-")[0]
    return "CJK" if first in ("HIRAGANA", "KATAKANA") else first


# Code and repetition -------------------------------------------------------------------------------


def code_free_reward(prompts: Sequence[str], completions: Sequence[str], **_: object) -> list[float]:
    """1 where a completion has no code: no fence, and no line that opens as Python, C or JavaScript does."""
    return [float(_CODE.search(text[:_LONGEST]) is None) for text in completions]


def repetition_reward(prompts: Sequence[str], completions: Sequence[str], **_: object) -> list[float]:
    """-(share of a completion's runs of four words that stood in it before); 0 where it has fewer.

    A text without spaces counts by characters, in runs of twenty.
    """
    return [-_repeated_share(text[:_LONGEST]) for text in completions]


def _repeated_share(text: str) -> float:
    units: Sequence[str] = text.split()
    size = _NGRAM
    if len(units) <= len(text) / 64:
        units, size = text, 5 * _NGRAM
    runs = [tuple(units[start : start + size]) for start in range(len(units) - size + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
