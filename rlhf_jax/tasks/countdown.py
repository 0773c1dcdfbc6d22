"""The countdown task: reach a number with so many of the given numbers, each used once, from left to right.

    prompt      2,5,7>19?     three of three        2,5,7>14?     two of three
    completion  7*2+5                               7*2

Problems are all (numbers, target) that can be solved, listed once; right answers are rare among well-formed
ones, so a policy that only knows the form scores low, and a reward is sparse.
"""

import collections
import functools
import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import Array, Bool, Float, Int
from rlhf_jax.data.tokenizers import Tokenizer, character_tokenizer
from rlhf_jax.tasks.arithmetic import Split, in_split
from rlhf_jax.tasks.base import Task, first_tokens, tabulate

OPERATORS = "+-*"
HIGHEST_TARGET = 99
_APPLY = (lambda a, b: a + b, lambda a, b: a - b, lambda a, b: a * b)
Problem = tuple[tuple[int, ...], int]


def value(expression: str) -> int | None:
    """Value of an expression of single digits, worked from left to right; None where it is none."""
    digits, operators = expression[::2], expression[1::2]
    well_formed = (
        len(expression) % 2 == 1
        and all(digit in "0123456789" for digit in digits)
        and all(sign in OPERATORS for sign in operators)
    )
    if not well_formed or len(expression) > 99:
        return None
    total = int(digits[0])
    for sign, digit in zip(operators, digits[1:], strict=True):
        total = _APPLY[OPERATORS.index(sign)](total, int(digit))
    return total


@functools.cache
def solutions(count: int, used: int) -> dict[Problem, tuple[str, ...]]:
    """Every problem of `count` numbers from 1 to 9 and a target from 1 to 99, with all its solutions."""
    found: dict[Problem, list[str]] = {}
    for numbers in itertools.combinations_with_replacement(range(1, 10), count):
        for order in sorted(set(itertools.permutations(numbers, used))):
            for signs in itertools.product(OPERATORS, repeat=used - 1):
                expression = str(order[0]) + "".join(f"{s}{n}" for s, n in zip(signs, order[1:], strict=True))
                target = value(expression)
                if target is not None and 1 <= target <= HIGHEST_TARGET:
                    found.setdefault((numbers, target), []).append(expression)
    return {problem: tuple(found[problem]) for problem in sorted(found)}


def problems(count: int, used: int, split: Split) -> list[Problem]:
    """The problems of a split; one in every eight in a row is held out."""
    return in_split(list(solutions(count, used)), split)


def prompt(problem: Problem) -> str:
    """A problem as text."""
    numbers, target = problem
    return f"{','.join(map(str, numbers))}>{target}?"


def demonstration(problem: Problem, used: int, rng: np.random.Generator, *, solution_rate: float) -> str:
    """A solution with probability `solution_rate`, else a well-formed expression of `used` of the numbers."""
    if rng.random() < solution_rate:
        return str(rng.choice(solutions(len(problem[0]), used)[problem]))
    order = rng.permutation(problem[0])[:used]
    signs = rng.choice(list(OPERATORS), len(order) - 1)
    return str(order[0]) + "".join(f"{s}{n}" for s, n in zip(signs, order[1:], strict=True))


def is_solution(completion: str, problem: Problem, used: int) -> bool:
    """True if a completion uses so many of the numbers, each of them once, and comes to the target."""
    numbers, target = problem
    digits = completion[::2]
    are_given = collections.Counter(digits) <= collections.Counter(map(str, numbers))
    return value(completion) == target and len(digits) == used and are_given


def countdown_tokenizer() -> Tokenizer:
    """One token a character, and the names of roles."""
    return character_tokenizer("\n0123456789,>?" + OPERATORS, ["system", "user", "assistant", "tool"])


def countdown_task(
    count: int = 3,
    used: int = 3,
    *,
    demonstrations: int,
    solution_rate: float,
    heldout: int = 512,
    seed: int = 0,
    name: str = "countdown",
) -> Task:
    """The task as arrays; the score is 1 for a solution, else 0.

    Args:
      count: numbers of a problem.
      used: of them by a solution, no more and no fewer.
      demonstrations: how many; each is right with probability `solution_rate`, or by luck.
      heldout: held-out problems at most.
    """
    if not 1 <= used <= count:
        raise UserError(f"countdown with {used} of {count} numbers: use 1 to {count} of them")
    tokenizer = countdown_tokenizer()
    rng = np.random.default_rng([seed, count])
    train = problems(count, used, "train")
    chosen = [train[index] for index in rng.integers(len(train), size=demonstrations)]
    held = problems(count, used, "heldout")
    kept = rng.permutation(len(held))[:heldout]

    def row(problem: Problem) -> dict[str, Any]:
        return {"prompt": prompt(problem), "numbers": list(problem[0]), "target": problem[1]}

    def conversation(problem: Problem) -> dict[str, Any]:
        answer = demonstration(problem, used, rng, solution_rate=solution_rate)
        turns = [{"role": "user", "content": prompt(problem)}, {"role": "assistant", "content": answer}]
        return {"messages": turns}

    return tabulate(
        name,
        tokenizer,
        train_rows=[row(problem) for problem in train],
        heldout_rows=[row(held[index]) for index in sorted(kept)],
        demonstration_rows=[conversation(problem) for problem in chosen],
        truth_fn=lambda fields: np.asarray([*fields["numbers"], fields["target"]], np.int32),
        score=functools.partial(_score, _kinds(tokenizer), tokenizer.eos_id, used),
        best=1.0,
        completion_length=2 * used,
    )


def _kinds(tokenizer: Tokenizer) -> np.ndarray:
    """Of each token: its digit, 10 + the number of its operator, or -1."""
    kinds = np.full(tokenizer.vocab_size, -1, np.int32)
    for kind, character in enumerate("0123456789" + OPERATORS):
        kinds[tokenizer.encode(character)[0]] = kind
    return kinds


def _score(
    kinds: np.ndarray,
    eos_id: int,
    used: int,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    truth: Int[Array, "B K+1"],
) -> Float[Array, " B"]:
    """1 where the completion is a solution and has ended, else 0: `is_solution` on arrays."""
    written = first_tokens(tokens, mask, 2 * used, fill=eos_id)
    has_ended = (jnp.sum(mask, axis=1) == 2 * used) & (written[:, -1] == eos_id)
    of_tokens = jnp.asarray(kinds)[written[:, :-1]]
    digits, signs = of_tokens[:, ::2], of_tokens[:, 1::2] - 10
    well_formed = jnp.all((digits >= 0) & (digits < 10), axis=1) & jnp.all(signs >= 0, axis=1)
    total = digits[:, 0]
    for place in range(used - 1):
        number, sign = digits[:, place + 1], signs[:, place]
        total = jnp.select([sign == 0, sign == 1], [total + number, total - number], total * number)
    written_times, given_times = (
        jnp.sum(row[:, :, None] == jnp.arange(10), axis=1) for row in (digits, truth[:, :-1])
    )
    are_given = jnp.all(written_times <= given_times, axis=1)
    return (has_ended & well_formed & are_given & (total == truth[:, -1])).astype(jnp.float32)
