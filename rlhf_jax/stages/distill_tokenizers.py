"""Distillation from a teacher with another tokenizer: the same texts in the tokens of both; the losses."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from rlhf_jax import distributed, losses
from rlhf_jax.algorithms.distillation import TwoTokenizations
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import Rollout, Sequences
from rlhf_jax.data.examples import PromptExample, prompt_examples
from rlhf_jax.data.packing import completion_rows
from rlhf_jax.data.sources import Row
from rlhf_jax.data.token_alignment import align_positions, align_spans, matched_tokens
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.losses.distillation import Divergence
from rlhf_jax.models import Policy
from rlhf_jax.rollout.dynamic_sampling import Answers
from rlhf_jax.stages.inputs import UNBOUNDED, Prompts

if TYPE_CHECKING:
    from rlhf_jax.stages.distill import Options

Alignment = Literal["spans", "positions"]
Matched = Literal["js", "forward_kl", "reverse_kl"]
ALIGNMENT: dict[str, Alignment] = {"uld": "positions", "gold": "spans"}
"""What the losses across tokenizers are published with."""
DIVERGENCES: dict[Matched, Divergence] = {
    "js": losses.generalized_js_loss,
    "forward_kl": losses.forward_kl_loss,
    "reverse_kl": losses.reverse_kl_loss,
}
_LONGEST = 4
"""Times --max-new-tokens that a text may have in the tokens of the one who did not write it."""


def cross_tokenizer_loss(
    loss: str, student: Policy, teacher: Policy, divergence: Matched | None, matched_weight: float | None
) -> Divergence:
    """`--loss uld` or `gold` for these two models.

    Raises:
      UserError: the tokenizers share no token.
    """
    if loss == "uld":
        return losses.uld_loss
    student_ids, teacher_ids = matched_tokens(student.tokenizer, teacher.tokenizer)
    return functools.partial(
        losses.gold_loss,
        student_ids=student_ids,
        teacher_ids=teacher_ids,
        matched_weight=matched_weight,
        divergence_fn=DIVERGENCES[divergence or "js"],
    )


def prompts_of_teacher(prompts: Prompts, tokenizer: Tokenizer) -> Prompts:
    """The same prompts, in the same order, as the teacher's chat template and tokenizer have them."""
    rows = [Row(prompt.fields, prompt.where) for prompt in prompts.train]
    return dataclasses.replace(prompts, train=prompt_examples(rows, tokenizer, max_length=UNBOUNDED))


@dataclasses.dataclass(frozen=True)
class _Side:
    """What reads texts: a tokenizer, its prompts by number, and the columns of the longest."""

    tokenizer: Tokenizer
    prompts: Prompts

    @functools.cached_property
    def numbers(self) -> dict[int, int]:
        return {id(prompt): number for number, prompt in enumerate(self.prompts.train)}


class BothTokenizers:
    """Puts what one side has written into the tokens of the other, and says which tokens belong together.

    Args:
      alignment: by spans of equal text, or by positions.
      max_new_tokens: of an answer, in the tokens of its writer.
    """

    def __init__(
        self,
        student: tuple[Tokenizer, Prompts],
        teacher: tuple[Tokenizer, Prompts],
        *,
        alignment: Alignment,
        max_new_tokens: int,
    ) -> None:
        self._student, self._teacher = _Side(*student), _Side(*teacher)
        self._alignment: Alignment = alignment
        self._max_new_tokens = max_new_tokens

    def __call__(self, answers: Answers, *, by_student: bool) -> TwoTokenizations:
        """The answers in both, where the mesh wants them.

        The writer's tokens are taken as they were sampled. The other side's columns come in powers of two, so
        that few programs are compiled; what is longer than four times the writer's limit is cut off.
        """
        writer, reader = (self._student, self._teacher) if by_student else (self._teacher, self._student)
        written = _completions(answers.rollout)
        finished = distributed.local_values(answers.rollout.finished)
        read = [
            self._translate(writer, reader, ids, bool(done))
            for ids, done in zip(written, finished, strict=True)
        ]
        sequences = distributed.shard_batch(self._rows(reader, writer, answers.prompts, read))
        starts = writer.prompts.length, reader.prompts.length
        columns = [side.tokens.shape[1] for side in (answers.rollout.sequences, sequences)]
        spans = [self._spans(writer, reader, *pair) for pair in zip(written, read, finished, strict=True)]
        # Spans stand in the student's columns, at its first token of each.
        own = 0 if by_student else 1
        firsts = [_first_columns(pair[own], starts[own]) for pair in spans]
        placed = [
            _placed([pair[side] for pair in spans], firsts, starts[side], columns[side]) for side in (0, 1)
        ]
        rows = [answers.rollout.sequences, sequences]
        rows, placed = (rows, placed) if by_student else (rows[::-1], placed[::-1])
        return TwoTokenizations(*rows, *distributed.shard_batch(placed))

    def _translate(self, writer: _Side, reader: _Side, ids: list[int], finished: bool) -> list[int]:
        """The text of `ids` in the reader's tokens, with its end of turn where the writer came to one."""
        found = reader.tokenizer.encode(writer.tokenizer.decode(ids))
        found += [reader.tokenizer.eos_id] * finished
        return found[: _LONGEST * self._max_new_tokens]

    def _rows(
        self, reader: _Side, writer: _Side, asked: Sequence[PromptExample], completions: list[list[int]]
    ) -> Sequences:
        longest = int(distributed.all_rows(np.array([len(ids) for ids in completions])).max())
        width = self._max_new_tokens
        while width < longest:
            width *= 2
        prompts = [reader.prompts.train[writer.numbers[id(prompt)]].ids for prompt in asked]
        shape = {"prompt_length": reader.prompts.length, "max_new_tokens": width}
        return completion_rows(prompts, completions, **shape, pad_id=reader.tokenizer.pad_id)

    def _spans(
        self, writer: _Side, reader: _Side, written: list[int], read: list[int], finished: bool
    ) -> tuple[list[int], list[int]]:
        if self._alignment == "positions":
            return align_positions(len(written), len(read))
        whole = finished and read[-1:] == [reader.tokenizer.eos_id]
        sides = [
            (side.tokenizer, ids[: len(ids) - whole]) for side, ids in ((writer, written), (reader, read))
        ]
        spans = align_spans(*sides)
        if not whole:
            return spans
        end = max(spans[0], default=-1) + 1  # both ends of turn are a span
        return [*spans[0], end], [*spans[1], end]


def _completions(rollout: Rollout) -> list[list[int]]:
    tokens, mask = map(distributed.local_values, (rollout.sequences.tokens, rollout.sequences.mask))
    return [row[kept].tolist() for row, kept in zip(tokens, mask, strict=True)]


def _first_columns(spans: Sequence[int], start: int) -> dict[int, int]:
    """Column of the first token of each span; those of none stay of none."""
    first = {-1: -1}
    for place, span in enumerate(spans):
        first.setdefault(span, start + place)
    return first


def _placed(
    spans: Sequence[Sequence[int]], firsts: Sequence[dict[int, int]], start: int, columns: int
) -> np.ndarray:
    """[B, columns]: the column of its span for every token, -1 elsewhere."""
    found = np.full((len(spans), columns), -1, np.int32)
    for row, (numbers, first) in enumerate(zip(spans, firsts, strict=True)):
        found[row, start : start + len(numbers)] = [first[number] for number in numbers]
    return found


def check_tokenizer_options(options: "Options", teachers: int) -> None:
    """Checks the options of losses across tokenizers.

    Args:
      teachers: how many there are beside the policy.

    Raises:
      UserError: an option of theirs with another loss, or one that does not go with them.
    """
    loss, across = options.loss, options.loss in ALIGNMENT
    if not across and options.alignment:
        raise UserError("--alignment is for --loss gold and --loss uld: leave it out")
    if loss != "gold" and (options.gold_divergence or options.gold_matched_weight is not None):
        raise UserError("--gold-divergence and --gold-matched-weight are for --loss gold: leave them out")
    if across and teachers != 1:
        raise UserError(f"--loss {loss} learns from another model, and from one: give one --teacher")
    if across and (options.teacher_context or options.top_k):
        raise UserError(f"--loss {loss} goes without --teacher-context and --top-k: leave them out")
