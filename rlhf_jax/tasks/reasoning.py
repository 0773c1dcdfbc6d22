"""A world to learn reasoning in: sums that are guessed at once or worked in steps, in two languages.

    prompt      5+4+3+2=?
    completion  <think>5+4=9
                ९+३=१२
                12+2=14</think><answer>14</answer>

A base model that has read all its writers guesses, thinks, mixes languages (European or Devanagari digits)
and uses tags or not, as they do. Who writes a step in the second language is careful there, and careless in
the first, so that rewards for right answers alone lead to mixed thoughts. Beside the sums stand prompts of
another kind, those of `style`, whose answers only a taste can judge.
"""

import dataclasses
from typing import Any

import numpy as np

from rlhf_jax.data.examples import ANSWER_MARK
from rlhf_jax.data.tokenizers import Tokenizer, character_tokenizer
from rlhf_jax.tasks import style
from rlhf_jax.tasks.arithmetic import (
    Level,
    Problem,
    Split,
    draw_problems,
    num_problems,
    solution,
)

LEVEL = Level(operands=4, low=0, high=5, operators="+")
SCRIPT = "LATIN"
"""Of the language that prompts are in, whose digits are 0 to 9."""
REASONING, GENERAL = "reasoning", "general"
"""The kinds of prompts, in the field `kind` of rows."""

_OTHER_DIGITS = "०१२३४५६७८९"
_SECOND_LANGUAGE = str.maketrans("0123456789", _OTHER_DIGITS)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


@dataclasses.dataclass(frozen=True)
class Writers:
    """Whom the base model has read, as shares of solutions or of steps.

    Attributes:
      thinking: write steps; the others guess.
      tagging: put thought and answer into tags; the others mark the answer with `####`.
      mixing: of those who think, write each step in either language.
      slip_rate: of the steps in the first language, those where a carry would be forgotten.
      second_slip_rate: the same in the second language.
      guess_within: how far a guess may be off.
    """

    thinking: float = 0.6
    tagging: float = 0.5
    mixing: float = 0.5
    slip_rate: float = 0.8
    second_slip_rate: float = 0.05
    guess_within: int = 6


CAREFUL = Writers(1.0, 1.0, 0.0, 0.0, 0.0, 0)
"""Those who write what a reader wants: steps without slips, in tags and one language."""


def completion(problem: Problem, writers: Writers, rng: np.random.Generator) -> str:
    """Completion of one of the writers."""
    thinks, tags, mixes = rng.random(3) < (writers.thinking, writers.tagging, writers.mixing)
    if not thinks:
        guess = problem.answer + int(rng.integers(-writers.guess_within, writers.guess_within + 1))
        return _laid_out([], max(guess, 0), tags)
    count = len(problem.operators)
    second = (rng.random(count) < 0.5) & mixes
    careless = rng.random(count) < np.where(second, writers.second_slip_rate, writers.slip_rate)
    written = solution(problem, careless.tolist())
    pairs = zip(written.steps, second, strict=True)
    steps = [step.translate(_SECOND_LANGUAGE) if other else step for step, other in pairs]
    return _laid_out(steps, written.answer, tags)


def _laid_out(steps: list[str], answer: int, tags: bool) -> str:
    if not tags:
        return "\n".join([*steps, f"{ANSWER_MARK} {answer}"])
    lines = "\n".join(steps)
    thought = f"<think>{lines}</think>" if steps else ""
    return f"{thought}<answer>{answer}</answer>"


def widest_completion() -> str:
    """A text as long as the longest answer of any writer to any problem."""
    high, count = LEVEL.high, LEVEL.operands
    steps = [f"{terms * high}+{high}={(terms + 1) * high}" for terms in range(1, count)]
    return _laid_out(steps, count * high, True)


# Rows ----------------------------------------------------------------------------------------------


def solution_rows(count: int, seed: int, *, writers: Writers) -> list[dict[str, Any]]:
    """Rows to imitate: `prompt` and `completion` of training problems."""
    rng = np.random.default_rng([seed, *b"solution"])
    problems = draw_problems(rng, LEVEL, "train", count)
    return [{"prompt": drawn.text, "completion": completion(drawn, writers, rng)} for drawn in problems]


def general_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows to imitate of the other kind: letters, as average writers choose them."""
    rng = np.random.default_rng([seed, *b"general"])
    wanted = style.prompts("train")
    chosen = [wanted[number] for number in rng.integers(len(wanted), size=count)]
    return [
        {"prompt": style.prompt_row(letters)["prompt"], "completion": style.demonstration(letters, rng)}
        for letters in chosen
    ]


def prompt_rows(split: Split, count: int, seed: int) -> list[dict[str, Any]]:
    """Problems for RL and evaluation: `prompt`, `kind`, and for the rewards `answer` and `script`.

    None twice, and no more than there are.
    """
    rng = np.random.default_rng([seed, *b"prompt"])
    problems = draw_problems(rng, LEVEL, split, min(count, num_problems(LEVEL, split)))
    known = {"kind": REASONING, "script": SCRIPT}
    return [{"prompt": drawn.text, "answer": str(drawn.answer), **known} for drawn in problems]


def general_prompt_rows(split: Split, count: int) -> list[dict[str, Any]]:
    """Prompts of the other kind: `prompt`, `kind`, and the letters that are `wanted`."""
    return [style.prompt_row(letters) | {"kind": GENERAL} for letters in style.prompts(split)[:count]]


# Tokens --------------------------------------------------------------------------------------------


def reasoning_tokenizer() -> Tokenizer:
    """One token for each sign, digit of either language, letter, tag, name of a role, and `####`."""
    alphabet = "\n 0123456789+=?," + style.LETTERS + _OTHER_DIGITS
    return character_tokenizer(alphabet, [ANSWER_MARK, *_TAGS, "system", "user", "assistant", "tool"])
