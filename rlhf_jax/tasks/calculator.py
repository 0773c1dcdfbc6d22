"""The calculator task: sums and products too large for the head, and a tool that does one at a time.

    prompt      47*8+6?
    completion  47*8=376           `376` and the line break behind it are the tool's
                376+6=382
                382

An equals sign rings the calculator, which reads the line so far and writes what it comes to, all inside one
traced program. Writers of demonstrations differ: some use it for both steps, some only for the first and do
the other in the head, some guess at once. What pays is left to be found out; the answer is the last line.
"""

import dataclasses
import functools
import itertools
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from rlhf_jax.core.types import Array, Bool, Float, Int, Sequences, ToolFn
from rlhf_jax.data.tokenizers import Tokenizer, character_tokenizer
from rlhf_jax.tasks.arithmetic import Split, in_split
from rlhf_jax.tasks.base import Task, first_tokens, tabulate

OPERATORS = "+*"
LARGEST = 9_999
"""The calculator shows no more than four digits."""
FIRST, OTHERS = range(11, 100), range(2, 10)
"""The numbers of a problem: the first, and those behind it."""
Habit = Literal["both", "first", "none"]
"""Steps for which a writer uses the calculator."""
COMPLETION_LENGTH = len("99*9=891\n891*9=8019\n8019") + 1

_ERROR, _BREAK = "?", "\n"
_CHARACTERS = "0123456789" + OPERATORS + _ERROR + "=" + _BREAK
_DIGITS = len(str(LARGEST))


def evaluate(expression: str) -> int | None:
    """Result of the calculator: the sum or product of two numbers of at most four digits; None
    where it is neither, or comes to more than four digits.
    """
    for sign in OPERATORS:
        left, found, right = expression.partition(sign)
        if found and all(side.isdecimal() and len(side) <= _DIGITS for side in (left, right)):
            result = int(left) + int(right) if sign == "+" else int(left) * int(right)
            return result if result <= LARGEST else None
    return None


def problems(split: Split) -> list[str]:
    """The problems of a split; one in every eight in a row is held out."""
    parts = itertools.product(map(str, FIRST), OPERATORS, map(str, OTHERS), OPERATORS, map(str, OTHERS))
    return in_split(["".join(part) for part in parts], split)


def steps(problem: str) -> tuple[str, str]:
    """The two lines that a problem comes to, from left to right: `47*8`, `376+6`."""
    first = problem[:-2]
    return first, f"{evaluate(first)}{problem[-2:]}"


def answer(problem: str) -> int:
    """The true answer."""
    found = evaluate(steps(problem)[1])
    assert found is not None  # the largest, 99*9*9, has four digits
    return found


def demonstration(problem: str, habit: Habit, rng: np.random.Generator) -> str:
    """Demonstration of a writer with some habit, with the calculator's results; heads err by a tenth."""
    right, lines = answer(problem), steps(problem)
    guess = right + int(rng.integers(-max(right // 10, 1), max(right // 10, 1) + 1))
    used = {"both": lines, "first": lines[:1], "none": ()}[habit]
    written = "".join(f"{line}={evaluate(line)}{_BREAK}" for line in used)
    return written + str(right if habit == "both" else guess)


def calculator_tokenizer() -> Tokenizer:
    """One token a character, and the names of roles."""
    return character_tokenizer(_CHARACTERS, ["system", "user", "assistant", "tool"])


def calculator_task(
    *,
    train: int,
    heldout: int,
    demonstrations: int,
    habits: dict[Habit, float],
    seed: int = 0,
    name: str = "calculator",
) -> Task:
    """The task as arrays; the score is 1 for the right answer, else 0.

    Args:
      train: training prompts.
      heldout: held-out prompts.
      demonstrations: how many.
      habits: shares of their writers.
    """
    tokenizer = calculator_tokenizer()
    ids = {character: tokenizer.encode(character)[0] for character in _CHARACTERS}
    rng = np.random.default_rng(seed)
    drawn = {split: rng.permutation(problems(split)) for split in ("train", "heldout")}
    shown = rng.choice(drawn["train"], demonstrations)

    def row(problem: str) -> dict[str, Any]:
        return {"prompt": f"{problem}?", "answer": str(answer(problem))}

    def conversation(problem: str) -> dict[str, Any]:
        habit = list(habits)[rng.choice(len(habits), p=list(habits.values()))]
        turns = [
            {"role": "user", "content": f"{problem}?"},
            {"role": "assistant", "content": demonstration(problem, habit, rng)},
        ]
        return {"messages": turns}

    def truth(fields: dict[str, Any]) -> np.ndarray:
        ids = [*tokenizer.encode(fields["answer"]), tokenizer.eos_id]
        return np.pad(np.asarray(ids, np.int32), (0, _DIGITS + 1 - len(ids)), constant_values=-1)

    task = tabulate(
        name,
        tokenizer,
        train_rows=[row(str(problem)) for problem in drawn["train"][:train]],
        heldout_rows=[row(str(problem)) for problem in drawn["heldout"][:heldout]],
        demonstration_rows=[conversation(str(problem)) for problem in shown],
        truth_fn=truth,
        score=functools.partial(_score, ids["="]),
        best=1.0,
        completion_length=COMPLETION_LENGTH,
    )
    own = _without_tool(task.demonstrations, rings=ids["="], ends=ids[_BREAK])
    return dataclasses.replace(task, demonstrations=own, tool_fn=make_calculator(ids))


def _without_tool(demonstrations: Sequences, *, rings: int, ends: int) -> Sequences:
    """Takes what stands between an equals sign and the end of its line out of the mask."""
    tokens, mask = demonstrations.tokens, demonstrations.mask
    rung, ended = (np.cumsum(mask & (tokens == token), axis=1) for token in (rings, ends))
    by_tool = (rung > ended) & (tokens != rings) | (tokens == ends)
    return dataclasses.replace(demonstrations, mask=mask & ~by_tool)


# On arrays -------------------------------------------------------------------------------------------


def make_calculator(ids: dict[str, int]) -> ToolFn:
    """The calculator of `generation.generate`: `evaluate` of the line so far, where an equals sign ends it; a
    question mark where that is no sum or product that it can do.

    Args:
      ids: of the characters of completions.
    """
    digits = jnp.asarray([ids[digit] for digit in "0123456789"])
    powers = 10 ** jnp.arange(_DIGITS)

    def number(tokens: Int[Array, "B T"], where: Bool[Array, "B T"]) -> Int[Array, " B"]:
        values = jnp.argmax(tokens[..., None] == digits, axis=-1)
        behind = jnp.cumsum(where[:, ::-1], axis=1)[:, ::-1] - 1
        return jnp.sum(jnp.where(where, values * powers[jnp.clip(behind, 0, _DIGITS - 1)], 0), axis=1)

    def shown(result: Int[Array, " B"]) -> Int[Array, "B R"]:
        count = 1 + jnp.sum(result[:, None] >= powers[1:], axis=1, keepdims=True)
        place = jnp.arange(_DIGITS + 1)
        figures = result[:, None] // powers[jnp.clip(count - 1 - place, 0, _DIGITS - 1)] % 10
        return jnp.select([place < count, place == count], [digits[figures], ids[_BREAK]], -1)

    def calculator(tokens: Int[Array, "B T"], length: Int[Array, " B"]) -> Int[Array, "B R"]:
        place, last = jnp.arange(tokens.shape[1]), length[:, None] - 1
        rings = jnp.any((tokens == ids["="]) & (place == last), axis=1)
        begins = jnp.max(jnp.where((tokens == ids[_BREAK]) & (place < last), place + 1, 0), axis=1)
        line = (place >= begins[:, None]) & (place < last)
        is_digit = line & jnp.any(tokens[..., None] == digits, axis=-1)
        plus, times = (line & (tokens == ids[sign]) for sign in OPERATORS)
        sign = jnp.argmax(plus | times, axis=1)[:, None]
        sides = is_digit & (place < sign), is_digit & (place > sign)
        left, right = (number(tokens, side) for side in sides)
        result = jnp.where(jnp.any(plus, axis=1), left + right, left * right)
        counts = [jnp.sum(side, axis=1) for side in sides]
        can = (jnp.sum(plus | times, axis=1) == 1) & (sum(counts) + 1 == jnp.sum(line, axis=1))
        for count in counts:
            can &= (count >= 1) & (count <= _DIGITS)
        can &= result <= LARGEST
        error = jnp.asarray([ids[_ERROR], ids[_BREAK]] + [-1] * (_DIGITS - 1))
        reply = jnp.where(can[:, None], shown(result), error)
        return jnp.where(rings[:, None], reply, -1)

    return calculator


def _score(
    equals_id: int, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"], truth: Int[Array, "B A"]
) -> Float[Array, " B"]:
    """1 where the policy's own tokens behind its last equals sign are the answer and the end, else 0."""
    own = first_tokens(tokens, mask, COMPLETION_LENGTH, fill=-1)
    begins = jnp.max(jnp.where(own == equals_id, jnp.arange(own.shape[1]) + 1, 0), axis=1)
    columns = begins[:, None] + jnp.arange(truth.shape[1])
    written = jnp.take_along_axis(own, columns, axis=1, mode="fill", fill_value=-1)
    return jnp.all((written == truth) | (truth < 0), axis=1).astype(jnp.float32)
