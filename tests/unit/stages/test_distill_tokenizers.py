"""Answers in the tokens of student and teacher: rows of both, and the columns of their spans."""

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.core.types import Rollout, Sequences
from rlhf_jax.data.examples import prompt_examples
from rlhf_jax.data.packing import completion_rows
from rlhf_jax.data.sources import Row
from rlhf_jax.data.tokenizers import byte_tokenizer, character_tokenizer
from rlhf_jax.rewards.functions import Scored
from rlhf_jax.rollout.dynamic_sampling import Answers
from rlhf_jax.stages.distill_tokenizers import BothTokenizers, prompts_of_teacher
from rlhf_jax.stages.inputs import Prompts

STUDENT = character_tokenizer("0123456789+= \nuseraitn", ["12", "+3"])
TEACHER = byte_tokenizer()
ROWS = [Row({"prompt": "1+2="}, "a:1"), Row({"prompt": "12+3=", "answer": "15"}, "a:2")]
PROMPTS = Prompts(prompt_examples(ROWS, STUDENT, max_length=100), None, list)
THEIRS = prompts_of_teacher(PROMPTS, TEACHER)
NEW = 4


def answers(writer, prompts, texts):
    """The second prompt, then the first. A row of less than four tokens has come to its end."""
    asked = prompts.train[::-1]
    ids = [writer.encode(text) for text in texts]
    ids = [row if len(row) == NEW else [*row, writer.eos_id] for row in ids]
    shape = {"prompt_length": prompts.length, "max_new_tokens": NEW, "pad_id": writer.pad_id}
    rows = completion_rows([prompt.ids for prompt in asked], ids, **shape)
    rows = Sequences(*map(jnp.asarray, (rows.tokens, rows.positions, rows.segment_ids, rows.mask)))
    finished = jnp.array([row[-1] == writer.eos_id for row in ids])
    return Answers(
        asked, Rollout(rows, jnp.zeros(rows.mask.shape), finished), Scored(np.zeros(2), np.zeros(2, bool))
    )


def both(alignment):
    sides = (STUDENT, PROMPTS), (TEACHER, THEIRS)
    return BothTokenizers(*sides, alignment=alignment, max_new_tokens=NEW)


def words(tokenizer, sequences, row):
    """(whole row, completion) as text."""
    there = np.asarray(sequences.segment_ids[row]) > 0
    ids, mask = np.asarray(sequences.tokens[row]), np.asarray(sequences.mask[row])
    return tokenizer.decode(ids[there], skip_special=False), tokenizer.decode(ids[mask], skip_special=False)


@pytest.mark.parametrize("by_student", [True, False])
def test_both_sides_read_the_same_texts(by_student):
    writer, prompts = (STUDENT, PROMPTS) if by_student else (TEACHER, THEIRS)
    texts = ["12+3", "1=12="] if by_student else ["12", "12=1"]
    found = both("spans")(answers(writer, prompts, texts), by_student=by_student)
    sides = (STUDENT, found.student, PROMPTS), (TEACHER, found.teacher, THEIRS)
    for tokenizer, sequences, own in sides:
        for row, prompt in enumerate(own.train[::-1]):
            asked = tokenizer.decode(prompt.ids, skip_special=False)
            whole, said = words(tokenizer, sequences, row)
            assert whole == asked + said
            assert said.removesuffix("<|im_end|>") == texts[row]
        np.testing.assert_array_equal(
            sequences.mask, (sequences.segment_ids > 0) & (np.arange(sequences.mask.shape[1]) >= own.length)
        )


def test_spans_stand_in_the_columns_of_the_student():
    found = both("spans")(answers(STUDENT, PROMPTS, ["12+3", "1=12="]), by_student=True)
    start, theirs = PROMPTS.length, THEIRS.length
    none = -np.ones(start, int), -np.ones(theirs, int)
    ours = [[0, 1, 2, -1], [0, 1, 2, 3]]  # "12", "+3", the end; then four tokens without an end
    other = [[0, 0, 1, 1, 2, -1, -1, -1], [0, 1, 2, 2, 3, -1, -1, -1]]
    for row in (0, 1):
        spans = np.array(ours[row]), np.array(other[row])
        expected = [np.where(numbers < 0, -1, numbers + start) for numbers in spans]
        np.testing.assert_array_equal(found.student_spans[row], [*none[0], *expected[0]])
        np.testing.assert_array_equal(found.teacher_spans[row], [*none[1], *expected[1]])


def test_what_is_much_longer_in_the_tokens_of_the_reader_is_cut_off():
    long = character_tokenizer("0123456789+= \nuseraitn", ["121212121212", "+3"])
    prompts = Prompts(prompt_examples(ROWS, long, max_length=100), None, list)
    sides = (TEACHER, prompts_of_teacher(prompts, TEACHER)), (long, prompts)
    translate = BothTokenizers(*sides, alignment="spans", max_new_tokens=NEW)
    found = translate(answers(long, prompts, ["121212121212" * 2 + "3", "1"]), by_student=False)
    start = found.student.tokens.shape[1] - 4 * NEW
    assert np.sum(found.student.mask, axis=1).tolist() == [4 * NEW, 2]
    # The first long token is a span of twelve bytes; of the second there are only four.
    assert found.student_spans[0, start:].tolist() == [start] * 12 + [-1] * 4
    assert found.teacher_spans[0].tolist()[-NEW:] == [start, -1, -1, -1]


def test_positions_pair_tokens_from_the_left():
    found = both("positions")(answers(STUDENT, PROMPTS, ["12+3", "1"]), by_student=True)
    start, theirs = PROMPTS.length, THEIRS.length
    assert found.student_spans[:, start:].tolist() == [
        [start, start + 1, start + 2, -1],
        [start, start + 1, -1, -1],
    ]
    assert found.teacher_spans[0, theirs:].tolist()[:4] == [start, start + 1, start + 2, -1]
