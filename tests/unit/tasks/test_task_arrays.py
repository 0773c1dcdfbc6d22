"""Traceable tasks agree with their text form."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.core.errors import UserError
from rlhf_jax.tasks import arithmetic, base, calculator, countdown, style


@functools.cache
def small_tasks():
    return {
        "arithmetic": base.arithmetic_task(
            arithmetic.Level(3, 1, 9, "+"), train=64, heldout=32, demonstrations=40, slip_rate=0.5
        ),
        "calculator": calculator.calculator_task(
            train=64, heldout=32, demonstrations=60, habits={"both": 0.5, "first": 0.25, "none": 0.25}
        ),
        "countdown": countdown.countdown_task(3, 3, demonstrations=200, solution_rate=0.3, heldout=64),
        "style": style.style_task(demonstrations=200),
    }


NAMES = ["arithmetic", "calculator", "countdown", "style"]


def spell(task, texts, *, end=True):
    """Completions behind a column of prompt, as tokens and mask."""
    ids = [task.tokenizer.encode(text) + [task.tokenizer.eos_id] * end for text in texts]
    width = max(map(len, ids)) + 2
    tokens = np.full((len(ids), width), task.tokenizer.pad_id, np.int32)
    mask = np.zeros((len(ids), width), bool)
    for row, part in enumerate(ids):
        tokens[row, 1 : 1 + len(part)] = part
        mask[row, 1 : 1 + len(part)] = True
    return jnp.asarray(tokens), jnp.asarray(mask)


@pytest.mark.parametrize("name", NAMES)
def test_tables_are_chat_prompts_that_end_in_the_last_column_and_splits_are_disjoint(name):
    task = small_tasks()[name]
    rows = {}
    for split in (task.train, task.heldout):
        assert np.all(np.diff(split.mask.astype(int), axis=1) >= 0)
        rows[id(split)] = {tuple(t[m]) for t, m in zip(split.tokens, split.mask, strict=True)}
    assert rows[id(task.train)].isdisjoint(rows[id(task.heldout)])


def test_training_demonstrations_never_show_a_held_out_prompt():
    for task in small_tasks().values():
        held = {tuple(t[m]) for t, m in zip(task.heldout.tokens, task.heldout.mask, strict=True)}
        for tokens, mask in zip(task.demonstrations.tokens, task.demonstrations.mask, strict=True):
            assert tuple(tokens[: np.argmax(mask)]) not in held


@pytest.mark.parametrize("name", NAMES)
def test_drawn_rows_are_rows_of_the_table(name):
    task = small_tasks()[name]
    drawn = jax.jit(task.draw, static_argnums=1)(jax.random.key(0), 16)
    known = {tuple(row) for row in np.asarray(task.train.tokens)}
    assert all(tuple(row) in known for row in np.asarray(drawn.tokens))
    assert len({tuple(row) for row in np.asarray(drawn.tokens)}) > 8


@pytest.mark.parametrize("used", [2, 3])
def test_countdown_scores_are_those_of_texts(used):
    task = countdown.countdown_task(3, used, demonstrations=8, solution_rate=0.3, heldout=8)
    rng = np.random.default_rng(0)
    problems = countdown.problems(3, used, "heldout")
    texts, truths, expected = [], [], []
    for index in rng.integers(len(problems), size=120):
        problem = problems[index]
        right = str(rng.choice(countdown.solutions(3, used)[problem]))
        wrong = countdown.demonstration(problem, used, rng, solution_rate=0.0)
        mangled = right[:-1], right + "1", right.replace(right[1], "?"), right[::-1], "9" + right[1:], ""
        twice = right[:-1] + right[0]
        for text in (right, wrong, twice, *mangled):
            texts.append(text)
            truths.append([*problem[0], problem[1]])
            expected.append(countdown.is_solution(text, problem, used))
    scores = task.score(*spell(task, texts), jnp.asarray(truths))
    np.testing.assert_array_equal(np.asarray(scores, bool), expected)
    assert 100 < sum(expected) < len(expected) / 2
    unfinished = task.score(*spell(task, texts, end=False), jnp.asarray(truths))
    assert not np.any(unfinished)


@pytest.mark.parametrize("used", [2, 3])
def test_countdown_lists_each_problem_once_with_solutions_that_hold(used):
    everything = countdown.solutions(3, used)
    assert len(everything) > 1000
    for problem, answers in list(everything.items())[::37]:
        assert all(countdown.is_solution(answer, problem, used) for answer in answers)
    assert countdown.value("2+3*4") == 20  # from left to right
    assert countdown.value("2**4") is None


def test_countdown_takes_each_number_once_and_as_many_as_are_wanted():
    assert countdown.is_solution("2*7", ((2, 5, 7), 14), 2)
    assert not countdown.is_solution("2*7", ((2, 5, 7), 14), 3)
    assert not countdown.is_solution("7*2+5-5", ((2, 5, 7), 14), 4)
    assert not countdown.is_solution("7+7", ((2, 5, 7), 14), 2)
    with pytest.raises(UserError, match="4 of 3 numbers"):
        countdown.countdown_task(3, 4, demonstrations=8, solution_rate=0.3)


SAID = {"12+7": 19, "99*9": 891, "9999+0": 9999, "0*7": 0, "007+1": 8}
SAID |= dict.fromkeys(("9999+1", "100*100", "12345+1", "1+2+3", "1*2+3", "1+2*3", "+3", "3+", ""))


def test_the_calculator_on_arrays_writes_what_it_evaluates():
    task, rng = small_tasks()["calculator"], np.random.default_rng(0)
    lines = [*SAID, "12", "1?2", "1=2", "+", "*", "++"]
    sizes = itertools.product("+*", range(1, 6), range(1, 6))
    lines += [f"{rng.integers(10**i)}{sign}{rng.integers(10**j)}" for sign, i, j in sizes]
    lines += ["".join(rng.choice(list("0123456789+*?="), rng.integers(1, 9))) for _ in range(200)]
    begins = ["", "1+2=3\n", "5\n\n", "=?\n"]
    texts = [begins[number % 4] + line + "=" for number, line in enumerate(lines)]
    tokens, _ = spell(task, [text + "77" for text in texts], end=False)  # what follows is not there yet
    lengths = jnp.asarray([len(text) for text in texts])
    replies = task.tool_fn(tokens[:, 1:], lengths)
    expected = [calculator.evaluate(line) for line in lines]
    for line, number, reply in zip(lines, expected, np.asarray(replies), strict=True):
        said = task.tokenizer.decode(reply[reply >= 0].tolist())
        assert said == ("?" if number is None else str(number)) + "\n", line
    assert sum(number is not None for number in expected) > 30
    assert np.all(np.asarray(task.tool_fn(tokens[:, 1:], lengths + 1)) == -1)  # a 7 rings nothing
    assert np.all(np.asarray(task.tool_fn(tokens[:, 1:], 0 * lengths)) == -1)


def test_the_calculator_evaluates_one_sum_or_product():
    assert {line: calculator.evaluate(line) for line in SAID} == SAID
    assert calculator.steps("47*8+6") == ("47*8", "376+6")
    assert calculator.answer("47*8+6") == 382
    assert calculator.answer("47+8*6") == 330  # from left to right


def test_calculator_problems_are_each_listed_once_and_fit():
    everything = calculator.problems("train") + calculator.problems("heldout")
    assert len(set(everything)) == len(everything) == 89 * 8 * 8 * 4
    rng = np.random.default_rng(0)
    longest = max(len(calculator.demonstration(problem, "both", rng)) for problem in everything)
    assert longest + 1 == calculator.COMPLETION_LENGTH


@pytest.mark.slow
def test_nothing_is_learned_from_what_the_calculator_wrote():
    task, asked = small_tasks()["calculator"], 0
    for tokens, mask in zip(task.demonstrations.tokens, task.demonstrations.mask, strict=True):
        begins = int(np.argmax(mask))
        ends = int(np.flatnonzero(mask)[-1]) + 1
        assert tokens[ends - 1] == task.tokenizer.eos_id
        written, place = tokens[begins:ends], 0
        while place < len(written):
            assert mask[begins + place]
            place += 1
            reply = np.asarray(task.tool_fn(jnp.asarray(written[None]), jnp.asarray([place])))[0]
            reply = reply[reply >= 0]
            np.testing.assert_array_equal(written[place : place + len(reply)], reply)
            assert not mask[begins + place : begins + place + len(reply)].any()
            asked, place = asked + bool(len(reply)), place + len(reply)
    assert asked > 30


@pytest.mark.slow
def test_calculator_scores_are_of_the_policy_s_own_last_line():
    task, rng = small_tasks()["calculator"], np.random.default_rng(1)
    texts, truths, expected = [], [], []
    for row in range(len(task.heldout.tokens)):
        prompt = task.tokenizer.decode(task.heldout.tokens[row].tolist())
        problem = next(p for p in calculator.problems("heldout") if f"{p}?" in prompt)
        right = calculator.answer(problem)
        first, second = calculator.steps(problem)
        for text in (
            str(right),
            f"{first}={second}={right}",
            f"{first}={right}",
            f"0{right}",
            f"{right}0",
            f"{right + 1}",
            f"{first}={second}=",
            f"{right}=",
            f"{first}",
            "",
            calculator.demonstration(problem, "none", rng),
        ):
            texts.append(text)
            truths.append(task.heldout.truth[row])
            expected.append(text.rpartition("=")[2] == str(right))
    scores = task.score(*spell(task, texts), jnp.asarray(truths))
    np.testing.assert_array_equal(np.asarray(scores, bool), expected)
    assert len(expected) / 5 < sum(expected) < len(expected) / 2
    assert not np.any(task.score(*spell(task, texts, end=False), jnp.asarray(truths)))
    # What a tool wrote is out of the mask: there may be anything.
    tokens, mask = spell(task, [f"376\n{text}" for text in texts[:3]])
    mask = mask.at[:, 1:5].set(False)
    np.testing.assert_array_equal(task.score(tokens, mask, jnp.asarray(truths[:3])), [1, 1, 1])


def test_style_scores_are_those_of_texts():
    task = small_tasks()["style"]
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list(style.LETTERS), rng.integers(0, 17))) for _ in range(50)] + ["a?b"]
    wanted = ["".join(rng.choice(list(style.LETTERS), 3, replace=False)) for _ in texts]
    truth = jnp.asarray([[letter in letters for letter in style.LETTERS] for letters in wanted])
    scores = task.score(*spell(task, texts), truth)
    expected = [style.text_reward(text, letters) for text, letters in zip(texts, wanted, strict=True)]
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)


def test_the_best_style_is_balanced_and_of_its_own_length():
    letters = "bfk"
    best = max(
        style.text_reward("b" * i + "f" * j + "k" * k, letters)
        for i in range(8)
        for j in range(8)
        for k in range(8)
        if i + j + k <= style.LONGEST
    )
    assert best == pytest.approx(style.best_reward(), abs=1e-9)
    assert best > style.text_reward("b" * 14, letters)
    assert best > style.text_reward("bfk", letters)


def test_preferences_follow_bradley_terry():
    first, second = jnp.full(20_000, 1.5), jnp.full(20_000, 1.0)
    share = jnp.mean(style.prefers_first(jax.random.key(0), first, second, noise=0.5))
    assert share == pytest.approx(1 / (1 + np.exp(-1.0)), abs=0.01)


def test_arithmetic_scores_are_the_verifier_s():
    task = small_tasks()["arithmetic"]
    assert task.best == 1.0
    tokens, mask = jnp.asarray(task.demonstrations.tokens), jnp.asarray(task.demonstrations.mask)
    assert tokens.shape == mask.shape
    level = arithmetic.Level(3, 1, 9, "+")
    solved = [arithmetic.solution(arithmetic.problem(level, "train", i)) for i in range(20)]
    answers = jnp.asarray([s.answer for s in solved])
    spelled = spell(task, [s.text for s in solved])
    np.testing.assert_array_equal(task.score(*spelled, answers), 1)
    np.testing.assert_array_equal(task.score(*spelled, answers + 1), 0)
