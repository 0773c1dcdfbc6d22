"""Solutions whose steps are judged: rows to examples, and rows made of GSM8K's socratic solutions.

    {"prompt": "7+8+6=?", "completions": ["7+8=15", "15+6=20", "#### 20"], "labels": [true, false, null]}

A label is true, false, or a share in [0, 1] of continuations that came out right; null where nobody judged.
Only the last step judged makes an outcome reward model of a process reward model.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import Bool, Float, Int
from rlhf_jax.data.chat import encode_prompt
from rlhf_jax.data.content_parts import load_images
from rlhf_jax.data.examples import ANSWER_MARK
from rlhf_jax.data.row_messages import tools_of
from rlhf_jax.data.sources import Row
from rlhf_jax.data.tokenizers import Tokenizer

STEP_END = "\n"
"""Stands between two steps; the last one ends with the turn."""

SOCRATIC_MARK = " ** "
"""Stands between a sub-question and its step."""

_CALCULATION = re.compile(r"<<(?P<left>[^<>=]*)=(?P<result>-?[0-9]+)>>(?P=result)")


@dataclasses.dataclass(frozen=True)
class ProcessExample:
    """A solution to judge.

    Attributes:
      ids: prompt and steps, each with the token that ends it.
      mask: True at the last token of each step that is judged.
      labels: whether that step is right; 0 elsewhere.
      where: the row it came from.
    """

    ids: Int[np.ndarray, " T"]
    mask: Bool[np.ndarray, " T"]
    labels: Float[np.ndarray, " T"]
    where: str


def process_examples(rows: Sequence[Row], tokenizer: Tokenizer) -> list[ProcessExample]:
    """Examples of rows with `prompt` (or `question`), `completions` and `labels`; see the module.

    Raises:
      UserError: a row without these fields or with others in them, or with no step judged.
    """
    return [_example(row, tokenizer) for row in rows]


def pad_labels(examples: Sequence[ProcessExample], length: int) -> Float[np.ndarray, "N T"]:
    """Labels laid out as `packing.pad_rows` lays out the tokens."""
    labels = np.zeros((len(examples), length), np.float32)
    for row, example in zip(labels, examples, strict=True):
        row[: len(example.labels)] = example.labels
    return labels


def step_tokens(tokenizer: Tokenizer) -> tuple[Bool[np.ndarray, " V"], Bool[np.ndarray, " V"]]:
    """(tokens that close a step, tokens without content), for `kernels.step_ends`.

    A step is closed by a token whose text ends in a new line, whatever else is in it, and by the end of the
    turn.
    """
    texts = [tokenizer.decode([index], skip_special=False) for index in range(tokenizer.vocab_size)]
    closing = np.array([text.endswith(STEP_END) for text in texts])
    blank = np.array([not text.strip() for text in texts])
    closing[tokenizer.eos_id] = blank[tokenizer.eos_id] = True
    return closing, blank


def until_first_mistake(row: Row) -> Row:
    """Labels of what stands so far instead of single steps: false from the first wrong step on."""
    labels, right = [], True
    for label in row.fields["labels"]:
        right = right and label is not False
        labels.append(None if label is None else right)
    return Row(row.fields | {"labels": labels}, row.where)


def solution_of(row: Row) -> tuple[str, str]:
    """(prompt, solution as one text) of a row whose labels need not be there yet.

    Raises:
      UserError: the row has no prompt, or no steps.
    """
    prompt, steps = _prompt_and_steps(row)
    return prompt, STEP_END.join(steps)


def outcome_row(row: Row, verdict: bool | None = None) -> Row:
    """The row with its outcome as the only label, at its last step.

    Args:
      verdict: whether the answer is right; None for the last of the row's labels.

    Raises:
      UserError: nobody judged the last step.
    """
    steps, labels = _prompt_and_steps(row)[1], row.fields.get("labels")
    if verdict is None:
        verdict = labels[-1] if isinstance(labels, list) and labels else None
    if verdict is None:
        raise UserError(f"{row.where}: the last of its labels is null: judge the last step, the answer")
    return Row(row.fields | {"labels": [None] * (len(steps) - 1) + [verdict]}, row.where)


def _example(row: Row, tokenizer: Tokenizer) -> ProcessExample:
    prompt, steps, labels = _fields(row)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if load_images(tokenizer, messages, row.fields)[1] is not None:
        raise UserError("process rewards cannot work with images yet: leave them out of the row")
    ids = encode_prompt(tokenizer, prompt, tools=tools_of(row))
    ends = []
    for number, step in enumerate(steps, start=1):
        ids += tokenizer.encode(step if number == len(steps) else step + STEP_END)
        ids += [tokenizer.eos_id] if number == len(steps) else []
        ends.append(len(ids) - 1)
    mask, values = np.zeros(len(ids), np.bool_), np.zeros(len(ids), np.float32)
    for end, label in zip(ends, labels, strict=True):
        if label is not None:
            mask[end], values[end] = True, label
    return ProcessExample(np.asarray(ids, np.int32), mask, values, row.where)


def _fields(row: Row) -> tuple[str, list[str], list[Any]]:
    prompt, steps = _prompt_and_steps(row)
    labels = row.fields.get("labels")
    if not isinstance(labels, list) or len(labels) != len(steps):
        raise UserError(f"{row.where}: field 'labels' is no list of {len(steps)}: give one label a step")
    judged = [label for label in labels if label is not None]
    if not judged or not all(isinstance(x, bool | int | float) and 0 <= x <= 1 for x in judged):
        raise UserError(f"{row.where}: labels are true, false, a share from 0 to 1, or null, not all null")
    return prompt, steps, labels


def _prompt_and_steps(row: Row) -> tuple[str, list[str]]:
    prompt = row.fields.get("prompt", row.fields.get("question"))
    steps = row.fields.get("completions")
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"{row.where}: field 'prompt' is no text: give one, or remove the row")
    if not isinstance(steps, list) or not steps or not all(isinstance(step, str) and step for step in steps):
        raise UserError(f"{row.where}: field 'completions' is no list of steps: give the steps as texts")
    return prompt, steps


# GSM8K ----------------------------------------------------------------------------------------------


def is_socratic(row: Row) -> bool:
    """True if a row is one of GSM8K's socratic solutions: `question` and `answer`, a line a sub-question."""
    answer = row.fields.get("answer")
    return "question" in row.fields and isinstance(answer, str) and SOCRATIC_MARK in answer


def socratic_rows(rows: Sequence[Row], seed: int, *, wrong_share: float = 0.5) -> list[Row]:
    """Judged steps from GSM8K's socratic solutions (Cobbe et al. 2021), whose own steps are all right.

    In a share of the solutions, the result of one calculation is replaced and the solution ends there, so
    that no step is judged that stands on a wrong one. The answer line is not judged.
    """
    rng = np.random.default_rng([seed, *b"socratic"])
    return [
        Row(_with_slip(row, rng) if rng.random() < wrong_share else _all_right(row), row.where)
        for row in rows
    ]


def _all_right(row: Row) -> dict[str, Any]:
    steps = row.fields["answer"].strip().split(STEP_END)
    labels = [None if step.startswith(ANSWER_MARK) else True for step in steps]
    return {"prompt": row.fields["question"], "completions": steps, "labels": labels}


def _with_slip(row: Row, rng: np.random.Generator) -> dict[str, Any]:
    whole = _all_right(row)
    places = [place for place, step in enumerate(whole["completions"]) if _CALCULATION.search(step)]
    if not places:
        return whole
    place = int(rng.choice(places))
    steps = whole["completions"][: place + 1]
    steps[place] = _CALCULATION.sub(lambda found: _slipped(found, rng), steps[place], count=1)
    # The turn goes on after a step, right or wrong: the line behind it must not tell them apart.
    return {
        "prompt": whole["prompt"],
        "completions": [*steps, ANSWER_MARK],
        "labels": [True] * place + [False, None],
    }


def _slipped(found: re.Match[str], rng: np.random.Generator) -> str:
    result = int(found["result"])
    digit = 10 ** int(rng.integers(len(str(abs(result)))))
    wrong = result + int(rng.choice([-1, 1])) * digit * int(rng.integers(1, 4))
    return f"<<{found['left']}={wrong}>>{wrong}"
