"""The embedded task in text form: splits, slips, rows."""

import itertools
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from rlhf_jax.data.examples import preference_examples, prompt_examples, supervised_examples
from rlhf_jax.data.sources import read_rows
from rlhf_jax.rewards.verifiers import exact_answer
from rlhf_jax.tasks import arithmetic
from rlhf_jax.tasks.arithmetic import LEVELS, Level, Problem, num_problems, problem, solution

EASY, LONG, SIGNED = Level(3, 1, 9, "+"), Level(3, 1, 99, "+"), Level(4, 1, 99, "+-")
SMALL_LEVELS = st.builds(
    lambda operands, low, span, operators: Level(operands, low, low + span, operators),
    st.integers(2, 3),
    st.integers(0, 30),
    st.integers(2, 8),
    st.sampled_from(["+", "-", "+-", "-+"]),
)
PROBLEMS = st.builds(
    lambda numbers, signs: Problem(tuple(numbers), "".join(signs[: len(numbers) - 1])),
    st.lists(st.integers(0, 120), min_size=2, max_size=5),
    st.lists(st.sampled_from("+-"), min_size=4, max_size=4),
)


def all_problems(level, split):
    return [problem(level, split, index) for index in range(num_problems(level, split))]


def sum_of(text):
    """The value of a chain of sums, by another way than the task's own."""
    return sum(int(term) for term in re.findall(r"(?:^-|[+-]|^)\d+", text.replace("=?", "")))


def test_splits_of_an_easy_level_are_disjoint_and_cover_it():
    train, heldout = (all_problems(EASY, split) for split in ("train", "heldout"))
    everything = {Problem(numbers, "++") for numbers in itertools.product(range(1, 10), repeat=3)}
    assert len(train) + len(heldout) == EASY.size == len(everything)
    assert set(train) | set(heldout) == everything
    assert len({row.text for row in train + heldout}) == len(everything)


@given(SMALL_LEVELS)
@settings(max_examples=30, deadline=None)
def test_splits_of_any_level_are_disjoint_and_cover_it(level):
    train, heldout = (all_problems(level, split) for split in ("train", "heldout"))
    assert len(heldout) == level.size // 8
    assert len({*train, *heldout}) == len(train) + len(heldout) == level.size
    for row in train + heldout:
        assert len(row.operands) == level.operands
        assert all(level.low <= number <= level.high for number in row.operands)
        assert set(row.operators) <= set(level.operators)


@pytest.mark.parametrize("level", [LONG, SIGNED, Level(2, 0, 46339, "+")])
def test_splits_of_large_levels_are_disjoint(level):
    rng = np.random.default_rng(0)
    blocks = [0, level.size // 8 - 1, *rng.integers(level.size // 8, size=200).tolist()]
    for block in blocks:
        heldout = arithmetic.level_index(level, "heldout", block)
        train = [arithmetic.level_index(level, "train", 7 * block + slot) for slot in range(7)]
        assert sorted([heldout, *train]) == list(range(8 * block, 8 * block + 8))
    last = arithmetic.level_index(level, "train", num_problems(level, "train") - 1)
    assert last in (level.size - 1, level.size - 2)


@pytest.mark.parametrize("level", LEVELS.values())
def test_indices_beyond_a_split_are_refused(level):
    for split in ("train", "heldout"):
        for index in (-1, num_problems(level, split)):
            with pytest.raises(IndexError, match=split):
                problem(level, split, index)


def test_heldout_slots_are_even():
    counts = np.bincount(arithmetic.heldout_slot(np.arange(80_000, dtype=np.uint32)), minlength=8)
    assert len(counts) == 8
    assert np.all(np.abs(counts - 10_000) < 5 * np.sqrt(10_000))


@pytest.mark.parametrize(
    "arguments",
    [
        (1, 1, 9, "+"),
        (3, 9, 1, "+"),
        (3, -1, 9, "+"),
        (3, 1, 9, ""),
        (3, 1, 9, "*"),
        (3, 1, 9, "++"),
        (2, 1, 2, "+"),
        (6, 1, 99, "+"),
        (3, 10**9, 10**9 + 3, "+"),
    ],
)
def test_impossible_levels_are_refused(arguments):
    with pytest.raises(ValueError, match=r"level|twice|overflow"):
        Level(*arguments)


@given(PROBLEMS)
@settings(max_examples=200, deadline=None)
def test_answers_are_true(drawn):
    assert drawn.answer == sum_of(drawn.text)
    assert drawn.text.endswith("=?")


@pytest.mark.parametrize(
    ("total", "sign", "number", "error"),
    [
        (7, "+", 8, -10),
        (15, "+", 6, -10),
        (95, "+", 5, -10),
        (10, "+", 9, 0),
        (0, "+", 0, 0),
        (-7, "+", 8, 0),
        (15, "-", 6, 10),
        (15, "-", 5, 0),
        (20, "-", 11, 10),
        (5, "-", 8, 0),  # a negative result
        (12, "-", 19, 0),
        (-15, "-", 6, 0),
    ],
)
def test_which_steps_slip(total, sign, number, error):
    assert arithmetic.slip_error(total, sign, number) == error


def test_solutions_are_written_as_documented():
    task = Problem((7, 8, 6), "++")
    assert task.text == "7+8+6=?"
    assert solution(task).text == "7+8=15\n15+6=21\n#### 21"
    slipped = solution(task, [True, False])
    assert slipped.text == "7+8=5\n5+6=11\n#### 11"
    assert slipped.step_labels == (False, True)
    assert solution(task, [True, True]).text == "7+8=5\n5+6=1\n#### 1"
    assert solution(Problem((5, 8, 4), "-+"), [True, True]).text == "5-8=-3\n-3+4=1\n#### 1"


@given(PROBLEMS, st.lists(st.booleans(), min_size=4, max_size=4))
@settings(max_examples=300, deadline=None)
def test_solutions_go_on_from_what_they_wrote(drawn, slips):
    written = solution(drawn, slips)
    left = str(drawn.operands[0])
    terms = zip(drawn.operators, drawn.operands[1:], strict=True)
    for (sign, number), step, is_right, slip in zip(
        terms, written.steps, written.step_labels, slips, strict=False
    ):
        equation, right = step.split("=")
        assert equation == f"{left}{sign}{number}"
        assert is_right == (sum_of(equation) == int(right))
        error = arithmetic.slip_error(int(left), sign, number)
        assert int(right) - sum_of(equation) == (error if slip else 0)
        left = right
    assert written.text == "\n".join([*written.steps, f"#### {left}"])
    assert written.answer == int(left)
    assert exact_answer(solution(drawn).text, drawn.answer)


@given(PROBLEMS, st.integers(0, 2**31))
@settings(max_examples=300, deadline=None)
def test_wrong_solutions_are_wrong(drawn, seed):
    wrong = arithmetic.wrong_solution(drawn, np.random.default_rng(seed))
    assert wrong.answer != drawn.answer
    first = [*wrong.step_labels, False].index(False)  # where every step is right, the last line is wrong
    assert wrong.steps[:first] == solution(drawn).steps[:first]


def test_wrong_solutions_are_of_three_kinds():
    rng, task = np.random.default_rng(0), Problem((9, 4, 5), "++")
    drawn = [arithmetic.wrong_solution(task, rng) for _ in range(400)]
    last_line = [all(wrong.step_labels) for wrong in drawn]
    slipped = [wrong.steps[0] == "9+4=3" for wrong in drawn]
    assert 0.2 < np.mean(last_line) < 0.3
    assert 0.45 < np.mean(slipped) < 0.6
    assert all(abs(wrong.answer - task.answer) in (1, 10) for wrong in itertools.compress(drawn, last_line))


def test_two_slips_that_cancel_are_not_a_wrong_solution():
    task = Problem((9, 4, 5), "+-")  # 9+4=3 cannot slip again, so make the second slip possible first
    assert solution(task, [True, True]).answer != task.answer
    cancelling = Problem((29, 4, 5), "+-")  # 29+4=23, 23-5=28: both wrong, the answer right
    assert solution(cancelling, [True, True]).answer == cancelling.answer
    for seed in range(20):
        wrong = arithmetic.wrong_solution(cancelling, np.random.default_rng(seed))
        assert wrong.answer != cancelling.answer


@pytest.mark.parametrize(
    "make",
    [
        lambda level, count, seed: arithmetic.prompt_rows(level, "train", count, seed),
        lambda level, count, seed: arithmetic.demonstration_rows(level, count, seed, slip_rate=0.5),
        lambda level, count, seed: arithmetic.preference_rows(level, "train", count, seed),
        lambda level, count, seed: arithmetic.step_rows(level, "train", count, seed, slip_rate=0.5),
    ],
    ids=["prompt", "demonstration", "preference", "step"],
)
@pytest.mark.parametrize("level", LEVELS.values())
def test_rows_are_strict_json_and_deterministic(make, level):
    rows = make(level, 50, 3)
    assert rows == make(level, 50, 3) != make(level, 50, 4)
    assert [json.loads(json.dumps(row, allow_nan=False)) for row in rows] == rows
    prompts = [row["prompt"] if "prompt" in row else row["messages"][0]["content"] for row in rows]
    assert len(set(prompts)) == 50
    heldout = {
        problem(level, "heldout", index).text for index in range(min(num_problems(level, "heldout"), 200))
    }
    assert not heldout & set(prompts)


def test_rows_repeat_only_after_the_whole_split():
    size = num_problems(EASY, "heldout")
    prompts = [row["prompt"] for row in arithmetic.prompt_rows(EASY, "heldout", 2 * size + 5, 0)]
    assert len(set(prompts[:size])) == len(set(prompts[size : 2 * size])) == size
    assert set(prompts) == {row.text for row in all_problems(EASY, "heldout")}
    assert len(set(prompts[2 * size :])) == 5


def test_training_rows_never_show_a_heldout_problem():
    heldout = {row.text for row in all_problems(EASY, "heldout")}
    everything = num_problems(EASY, "train")
    rows = arithmetic.demonstration_rows(EASY, 2 * everything, 0, slip_rate=0.5)
    assert not heldout & {row["messages"][0]["content"] for row in rows}


@pytest.mark.parametrize("level", LEVELS.values())
def test_prompt_rows_hold_true_answers(level):
    for row in arithmetic.prompt_rows(level, "heldout", 60, 0):
        assert int(row["answer"]) == sum_of(row["prompt"])


def test_slip_rate_decides_how_many_demonstrations_are_wrong():
    def share_right(slip_rate):
        rows = arithmetic.demonstration_rows(LONG, 300, 0, slip_rate=slip_rate)
        return np.mean([exact_answer(row["messages"][1]["content"], row["answer"]) for row in rows])

    assert share_right(0) == 1
    assert 0.4 < share_right(0.5) < 0.8
    rows = arithmetic.demonstration_rows(LONG, 300, 0, slip_rate=1)
    for row in rows:  # right only where no step could slip
        task = Problem(tuple(map(int, re.findall(r"\d+", row["messages"][0]["content"]))), "++")
        assert row["messages"][1]["content"] == solution(task, [True, True]).text


def test_tired_writers_slip_in_the_second_half():
    rows = arithmetic.demonstration_rows(LEVELS[1], 400, 0, slip_rate=0, late_slip_rate=1)
    for row in rows:
        task = Problem(tuple(map(int, re.findall(r"\d+", row["messages"][0]["content"]))), "++++")
        assert row["messages"][1]["content"] == solution(task, [False, False, True, True]).text


@pytest.mark.parametrize("level", LEVELS.values())
def test_pairs_are_right_and_wrong(level):
    for row in arithmetic.preference_rows(level, "heldout", 80, 0):
        truth = sum_of(row["prompt"])
        assert exact_answer(row["chosen"], truth)
        assert not exact_answer(row["rejected"], truth)
        assert len(row["rejected"].split("\n")) == len(row["chosen"].split("\n"))


def test_step_labels_are_true():
    rows = arithmetic.step_rows(SIGNED, "train", 200, 0, slip_rate=0.5)
    labels = list(itertools.chain.from_iterable(row["labels"] for row in rows))
    assert 0.5 < np.mean(labels) < 0.98
    for row in rows:
        for step, label in zip(row["completions"], row["labels"], strict=True):
            left, right = step.split("=")
            assert label == (sum_of(left) == int(right))


@given(SMALL_LEVELS, st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_no_completion_is_longer_than_the_widest(level, seed):
    rows = arithmetic.demonstration_rows(level, 8, seed, slip_rate=0.5)
    longest = max(len(row["messages"][1]["content"]) for row in rows)
    assert longest <= len(arithmetic.widest_completion(level))


def test_the_widest_completion_is_reached_where_sums_are_largest():
    task = Problem((9, 9, 9), "++")
    assert len(solution(task).text) == len(arithmetic.widest_completion(EASY))


def test_the_tokenizer_writes_every_row():
    tokenizer = arithmetic.arithmetic_tokenizer()
    for row in arithmetic.preference_rows(SIGNED, "train", 20, 0):
        for text in row.values():
            assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("#### 21")) == 4


def test_rows_pass_through_the_reading_path(tmp_path):
    """Written as JSONL and read as a user's files are, they give the tokens that training sees."""
    tokenizer = arithmetic.arithmetic_tokenizer()

    def read(rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read_rows(path)

    prompts = arithmetic.prompt_rows(SIGNED, "heldout", 20, 0)
    for example, row in zip(prompt_examples(read(prompts), tokenizer, max_length=64), prompts, strict=True):
        assert example.text == row["prompt"]
        assert example.fields["answer"] == row["answer"]
    demonstrations = arithmetic.demonstration_rows(SIGNED, 20, 0, slip_rate=0.5)
    examples = supervised_examples(read(demonstrations), tokenizer, max_length=128)
    for example, row in zip(examples, demonstrations, strict=True):
        assert tokenizer.decode(example.ids[example.mask]) == row["messages"][1]["content"]
        assert example.ids[-1] == tokenizer.eos_id
    pairs = arithmetic.preference_rows(SIGNED, "train", 20, 0)
    for example, row in zip(preference_examples(read(pairs), tokenizer, max_length=128), pairs, strict=True):
        assert tokenizer.decode(example.chosen_ids) == row["chosen"]
        assert tokenizer.decode(example.rejected_ids) == row["rejected"]
