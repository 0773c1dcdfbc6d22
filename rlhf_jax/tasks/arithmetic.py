"""The embedded task, text form: chains of operations on whole numbers, answered in written steps.

    prompt      7+8+6=?
    completion  7+8=15
                15+6=21
                #### 21

Every problem of a `Level` has an index, so a split is arithmetic on indices: nothing is listed, sampled
until it fits, or leaked. `arithmetic_arrays` is the same task in traceable JAX, `arithmetic_tfds` the
same rows as a dataset on disk. Rows made here have the fields that JSONL files of users have.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import numpy as np

from rlhf_jax.data.examples import ANSWER_MARK
from rlhf_jax.data.tokenizers import Tokenizer, character_tokenizer

Split = Literal["train", "heldout"]
Row = dict[str, Any]
Item = TypeVar("Item")

BLOCK = 8
"""One problem in every block of this many consecutive indices is held out."""


@dataclasses.dataclass(frozen=True)
class Level:
    """Difficulty of the problems.

    Attributes:
      operands: how many numbers a problem has, >= 2.
      low: the least number, >= 0.
      high: the greatest number, inclusive.
      operators: which signs may stand between them: "+", "-" or both.
    """

    operands: int
    low: int
    high: int
    operators: str

    def __post_init__(self):
        """Refuses a level without problems, or with more than an int32 can number."""
        signs_ok = self.operators and set(self.operators) <= set("+-")
        if self.operands < 2 or not 0 <= self.low <= self.high or not signs_ok:
            raise ValueError(f"not a level: {self}")
        if len(set(self.operators)) != len(self.operators):
            raise ValueError(f"an operator stands twice: {self}")
        if not BLOCK <= self.size < 2**31:
            raise ValueError(f"a level has {BLOCK} to 2^31 - 1 problems, not {self.size}: {self}")
        if self.operands * self.high >= 2**31:
            raise ValueError(f"sums of {self.operands} numbers up to {self.high} overflow an int32: {self}")

    @property
    def size(self) -> int:
        """Number of problems, both splits together."""
        numbers = self.high - self.low + 1
        return numbers**self.operands * len(self.operators) ** (self.operands - 1)


LEVELS = {
    1: Level(operands=5, low=0, high=5, operators="+"),
    2: Level(operands=4, low=1, high=9, operators="+-"),
    3: Level(operands=4, low=1, high=99, operators="+-"),
    0: Level(operands=4, low=0, high=7, operators="+"),  # last, as the first is what tfds gives unasked
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """Numbers and the operators between them, worked from left to right."""

    operands: tuple[int, ...]
    operators: str

    @property
    def text(self) -> str:
        """The prompt, such as `7+8+6=?`."""
        pairs = zip(self.operators, self.operands[1:], strict=True)
        return str(self.operands[0]) + "".join(f"{sign}{number}" for sign, number in pairs) + "=?"

    @property
    def answer(self) -> int:
        """The true answer."""
        total = self.operands[0]
        for sign, number in zip(self.operators, self.operands[1:], strict=True):
            total = _apply(total, sign, number)
        return total


@dataclasses.dataclass(frozen=True)
class Solution:
    """Solution of a simulated writer.

    Attributes:
      steps: one equation each, such as `7+8=15`.
      step_labels: whether each step is right, given its own left-hand side.
      answer: the number on the last line: what the steps reach, but in some of `wrong_solution`.
    """

    steps: tuple[str, ...]
    step_labels: tuple[bool, ...]
    answer: int

    @property
    def text(self) -> str:
        """The completion: a line for each step and the line `#### answer`."""
        return "\n".join([*self.steps, f"{ANSWER_MARK} {self.answer}"])


def _apply(total: int, sign: str, number: int) -> int:
    return total + number if sign == "+" else total - number


# Problems and splits -------------------------------------------------------------------------------


def num_problems(level: Level, split: Split) -> int:
    """Size of a split: an eighth of the level is held out, rounded down."""
    heldout = level.size // BLOCK
    return heldout if split == "heldout" else level.size - heldout


def heldout_slot(block: Any) -> Any:
    """Held-out slot of a block of 8 consecutive indices: an integer hash of the block's number.

    Args:
      block: array of uint32, of NumPy or of JAX: both give the same slots.
    """
    # The two-round mixer "lowbias32" (C. Wellons, hash-prospector).
    mixed = (block ^ (block >> 16)) * np.uint32(0x7FEB352D)
    mixed = (mixed ^ (mixed >> 15)) * np.uint32(0x846CA68B)
    return (mixed ^ (mixed >> 16)) % BLOCK


def in_split(everything: Sequence[Item], split: Split) -> list[Item]:
    """The items of a split, of a list of all: one in every eight in a row is held out."""
    places = np.arange(len(everything))
    held = heldout_slot((places // BLOCK).astype(np.uint32)) == places % BLOCK
    return [item for item, out in zip(everything, held, strict=True) if out == (split == "heldout")]


def level_index(level: Level, split: Split, index: int) -> int:
    """The place in the whole level, 0 ... `level.size - 1`, of the `index`-th problem of a split."""
    if not 0 <= index < num_problems(level, split):
        raise IndexError(f"{split} has {num_problems(level, split)} problems, no number {index}")
    if split == "heldout":
        return BLOCK * index + _heldout_slot(index)
    block, slot = divmod(index, BLOCK - 1)
    is_whole = block < level.size // BLOCK  # problems beyond the last whole block are all for training
    return BLOCK * block + slot + (is_whole and slot >= _heldout_slot(block))


def _heldout_slot(block: int) -> int:
    return int(heldout_slot(np.asarray([block], np.uint32))[0])  # an array, since scalars warn of overflow


def problem(level: Level, split: Split, index: int) -> Problem:
    """The `index`-th problem of a split.

    The level's problems are numbered by mixed radix: the operands are the leading digits, first operand
    first, and the operators the trailing ones. Each index is one problem as written: `7+8+6` and `8+7+6`
    are two problems, and one may be held out while the other is trained on.
    """
    rest = level_index(level, split, index)
    signs, numbers = [], []
    for _ in range(level.operands - 1):
        rest, digit = divmod(rest, len(level.operators))
        signs.append(level.operators[digit])
    for _ in range(level.operands):
        rest, digit = divmod(rest, level.high - level.low + 1)
        numbers.append(level.low + digit)
    return Problem(operands=tuple(reversed(numbers)), operators="".join(reversed(signs)))


# Solutions -----------------------------------------------------------------------------------------


def slip_error(total: int, sign: str, number: int) -> int:
    """Slip of a writer who forgets the carry or the borrow adds to the result of a step; 0 if there is none.

    A sum of non-negative numbers whose units carry comes out 10 too small (7+8=5, 15+6=11). A difference
    of non-negative numbers that is not negative and whose units borrow comes out 10 too large (15-6=19).
    Steps that involve a negative number, on either side, never slip.
    """
    if total < 0:
        return 0
    if sign == "+":
        return -10 if total % 10 + number % 10 >= 10 else 0
    return 10 if total >= number and total % 10 < number % 10 else 0


def solution(problem: Problem, slips: Sequence[bool] | None = None) -> Solution:
    """Writes the steps of a problem, slipping where asked and possible (see `slip_error`).

    Args:
      slips: for each step, whether the writer is careless there; by default never. After a slip the
        writer goes on consistently from the wrong number, which decides where later steps can slip.
    """
    careless = slips if slips is not None else [False] * len(problem.operators)
    return _write(problem, lambda step, *equation: slip_error(*equation) if careless[step] else 0)


def _write(problem: Problem, error_fn: Callable[[int, int, str, int], int]) -> Solution:
    """Writes the steps; `error_fn(step, total, sign, number)` is added to the result of each."""
    total, steps, labels = problem.operands[0], [], []
    for step, (sign, number) in enumerate(zip(problem.operators, problem.operands[1:], strict=True)):
        error = error_fn(step, total, sign, number)
        result = _apply(total, sign, number) + error
        steps.append(f"{total}{sign}{number}={result}")
        labels.append(error == 0)
        total = result
    return Solution(steps=tuple(steps), step_labels=tuple(labels), answer=total)


def wrong_solution(problem: Problem, rng: np.random.Generator) -> Solution:
    """A plausible solution with a wrong answer, of one of three kinds.

    Half of them slip, where a step can: at one drawn from those that can, and half of the time at each later
    one. A quarter get the result of some step wrong, mostly by 10, else by 1, and go on from there. A quarter
    are right up to the last line, which states an answer that is off by as much. A judge who has seen but one
    kind of mistake takes the others for right, and a policy finds out.
    """
    kind, right = rng.random(), _slippable_steps(problem)
    if kind < 0.5 and right:
        return _slipped(problem, int(rng.choice(right)), rng)
    off = int(rng.choice([-10, 10, -10, 10, -1, 1]))
    if kind < 0.75:
        place = rng.integers(len(problem.operators))
        return _write(problem, lambda step, *term: _within(off, _apply(*term)) if step == place else 0)
    return dataclasses.replace(solution(problem), answer=problem.answer + _within(off, problem.answer))


def _slipped(problem: Problem, first: int, rng: np.random.Generator) -> Solution:
    again = rng.random(len(problem.operators)) < 0.5
    steps = range(len(problem.operators))
    wrong = solution(problem, [step == first or bool(step > first and again[step]) for step in steps])
    if wrong.answer == problem.answer:  # a forgotten borrow made up for a forgotten carry
        wrong = solution(problem, [step == first for step in steps])
    return wrong


def _within(error: int, number: int) -> int:
    """An error that makes no number negative that was not."""
    return error if number < 0 or number + error >= 0 else -error


def _slippable_steps(problem: Problem) -> list[int]:
    """The steps that can slip where all those before them are right."""
    totals = itertools.accumulate(
        zip(problem.operators, problem.operands[1:], strict=True),
        lambda total, term: _apply(total, *term),
        initial=problem.operands[0],
    )
    terms = zip(totals, problem.operators, problem.operands[1:], strict=False)
    return [step for step, term in enumerate(terms) if slip_error(*term)]


def widest_completion(level: Level) -> str:
    """A text as long as the longest completion of a level, with slips or without; it is no solution."""
    sign = "-" if "-" in level.operators else ""
    totals = [str(level.high)] + [f"{sign}{terms * level.high}" for terms in range(2, level.operands + 1)]
    steps = [f"{left}+{level.high}={right}" for left, right in itertools.pairwise(totals)]
    return "\n".join([*steps, f"{ANSWER_MARK} {totals[-1]}"])


# Rows ----------------------------------------------------------------------------------------------


def prompt_rows(level: Level, split: Split, count: int, seed: int) -> list[Row]:
    """Rows for RL and evaluation: `prompt`, and the true `answer` as text, for the reward function."""
    rng = _generator(seed, "prompt")
    return [{"prompt": p.text, "answer": str(p.answer)} for p in draw_problems(rng, level, split, count)]


def demonstration_rows(
    level: Level,
    count: int,
    seed: int,
    *,
    slip_rate: float,
    late_slip_rate: float | None = None,
    split: Split = "train",
) -> list[Row]:
    """Rows for supervised fine-tuning: `messages`, and the true `answer` as text.

    Args:
      slip_rate: probability that the writer is careless in a step, which shows where a step can slip.
      late_slip_rate: the same in the second half of the steps, where writers may be tired; None for
        `slip_rate`. One well below 1/2 and one well above leave no doubt what greedy imitation does.
      split: `heldout` is for measuring a loss, never for training.
    """
    rng, rows = _generator(seed, "demonstration"), []
    for drawn in draw_problems(rng, level, split, count):
        slips = demonstrator_slips(rng, level, slip_rate=slip_rate, late_slip_rate=late_slip_rate)
        written = solution(drawn, slips)
        turns = [{"role": "user", "content": drawn.text}, {"role": "assistant", "content": written.text}]
        rows.append({"messages": turns, "answer": str(drawn.answer)})
    return rows


def demonstrator_slips(
    rng: np.random.Generator, level: Level, *, slip_rate: float, late_slip_rate: float | None = None
) -> list[bool]:
    """In which steps a demonstrator is careless; the rates are those of `demonstration_rows`."""
    late = slip_rate if late_slip_rate is None else late_slip_rate
    steps = level.operands - 1
    rates = np.where(np.arange(steps) < steps - steps // 2, slip_rate, late)
    return (rng.random(steps) < rates).tolist()


def preference_rows(level: Level, split: Split, count: int, seed: int) -> list[Row]:
    """Pairs for reward models and DPO: `prompt`, a right `chosen`, and a `rejected` with a wrong answer."""
    rng = _generator(seed, "preference")
    return [
        {"prompt": p.text, "chosen": solution(p).text, "rejected": wrong_solution(p, rng).text}
        for p in draw_problems(rng, level, split, count)
    ]


def choice_rows(level: Level, split: Split, count: int, seed: int, *, choices: int = 4) -> list[Row]:
    """Multiple choice: `question`, `choices` of which one solution is right, the place of it as `answer`, and
    as `subject` in how many steps a careless writer would slip.
    """
    rng, rows = _generator(seed, "choice"), []
    for drawn in draw_problems(rng, level, split, count):
        right, wrong = solution(drawn).text, dict[str, None]()
        while len(wrong) < choices - 1:
            wrong[wrong_solution(drawn, rng).text] = None
        place, slips = int(rng.integers(choices)), len(_slippable_steps(drawn))
        texts = [*list(wrong)[:place], right, *list(wrong)[place:]]
        rows.append({"question": drawn.text, "choices": texts, "answer": place, "subject": f"slips: {slips}"})
    return rows


def step_rows(level: Level, split: Split, count: int, seed: int, *, slip_rate: float) -> list[Row]:
    """Rows for process rewards: `prompt`, `completions` (a list of steps) and `labels` (one bool each).

    A label says whether its step is right given its own left-hand side, so a step that goes on
    correctly from a wrong number is right. The answer line is no step.
    """
    return [
        {"prompt": drawn.text, "completions": list(written.steps), "labels": list(written.step_labels)}
        for drawn, written in _careless(level, split, count, seed, slip_rate)
    ]


def judged_rows(
    level: Level, split: Split, count: int, seed: int, *, slip_rate: float, outcome: bool = False
) -> list[Row]:
    """Rows as those of `step_rows`, with the answer line as a last step: whole solutions, some lines judged.

    They also have the true `answer` as text.

    Args:
      outcome: judge only the answer line, by the true answer; else only the steps, and the line has None.
    """
    rows = []
    for drawn, written in _careless(level, split, count, seed, slip_rate):
        steps, final = list(written.step_labels), written.answer == drawn.answer
        labels = [None] * len(steps) + [final] if outcome else [*steps, None]
        row = {"prompt": drawn.text, "completions": written.text.split("\n"), "labels": labels}
        rows.append(row | {"answer": str(drawn.answer)})
    return rows


def _careless(
    level: Level, split: Split, count: int, seed: int, slip_rate: float
) -> Iterator[tuple[Problem, Solution]]:
    rng = _generator(seed, "step")
    for drawn in draw_problems(rng, level, split, count):
        yield drawn, solution(drawn, (rng.random(len(drawn.operators)) < slip_rate).tolist())


def _generator(seed: int, maker: str) -> np.random.Generator:
    """A generator for each kind of row, so that the same seed does not give all kinds the same problems."""
    return np.random.default_rng([seed, *maker.encode()])


def draw_problems(rng: np.random.Generator, level: Level, split: Split, count: int) -> Iterator[Problem]:
    """`count` problems, none twice before all of the split have come once."""
    size = num_problems(level, split)
    passes = [rng.permutation(size) for _ in range(count // size)]
    indices = np.concatenate([*passes, rng.choice(size, count % size, replace=False)])
    return (problem(level, split, int(index)) for index in indices)


# Tokens --------------------------------------------------------------------------------------------


def arithmetic_tokenizer(words: Sequence[str] = ()) -> Tokenizer:
    """Every printable ASCII character is one token, and so are the newline, `####` and the names of roles.

    Args:
      words: more of what is one token each.
    """
    alphabet = "\n" + "".join(map(chr, range(ord(" "), ord("~") + 1)))
    return character_tokenizer(alphabet, [ANSWER_MARK, "system", "user", "assistant", "tool", *words])
