"""Steps of answers: where they end, and the advantages of process supervision, against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import kernels

WORD, LINE, SPACE, END, WORD_AND_LINE = range(5)
CLOSING = jnp.array([False, True, False, True, True])
BLANK = jnp.array([False, True, True, True, False])


def ends_by_a_loop(tokens, mask):
    ends = np.zeros(mask.shape, bool)
    for row in range(len(mask)):
        content = False
        for column in np.flatnonzero(mask[row]):
            token = tokens[row, column]
            content |= token in (WORD, WORD_AND_LINE)
            if token in (LINE, END, WORD_AND_LINE):
                ends[row, column] = content
                content = False
    return ends


def test_ends_of_steps_equal_a_loop():
    rng = np.random.default_rng(0)
    tokens, mask = rng.integers(0, 5, (64, 12)), rng.random((64, 12)) < 0.8
    found = kernels.step_ends(jnp.asarray(tokens), jnp.asarray(mask), CLOSING, BLANK)
    np.testing.assert_array_equal(found, ends_by_a_loop(tokens, mask))
    assert 0.1 < found.mean() < 0.5


@pytest.mark.parametrize(
    ("tokens", "ends"),
    [
        ([WORD, LINE, WORD, END], [1, 3]),
        ([WORD, LINE, LINE, SPACE, LINE, END], [1]),  # empty lines are no steps, nor is an end after a line
        ([LINE, SPACE, LINE, WORD], []),  # nor is what was cut
        ([WORD_AND_LINE, WORD_AND_LINE, END], [0, 1]),
    ],
)
def test_steps_of_an_answer(tokens, ends):
    row = jnp.asarray([tokens])
    found = kernels.step_ends(row, jnp.ones(row.shape, bool), CLOSING, BLANK)
    np.testing.assert_array_equal(np.flatnonzero(found), ends)


def process_case(seed=0, group_size=3, groups=4, width=7):
    """Rewards of steps, NaN where none ends; the last group has no step at all."""
    rng = np.random.default_rng(seed)
    shape = (groups * group_size, width)
    mask = rng.random(shape) < 0.8
    ends = rng.random(shape) < 0.4
    ends[-group_size:] = False
    return np.where(ends, rng.random(shape), np.nan), ends, mask


def process_advantages(rewards, ends, mask, group_size=3):
    arrays = map(jnp.asarray, (rewards, ends, mask))
    return np.asarray(kernels.process_supervision_advantages(*arrays, group_size=group_size))


def test_process_supervision_equals_a_loop_over_steps():
    rewards, ends, mask = process_case()
    expected = np.zeros(mask.shape)
    for group in range(0, len(mask), 3):
        answers = range(group, group + 3)
        steps = {b: [t for t in range(mask.shape[1]) if ends[b, t] and mask[b, t]] for b in answers}
        every = [rewards[b, t] for b in answers for t in steps[b]]
        for b in answers:
            for t in np.flatnonzero(mask[b]):
                later = [rewards[b, step] for step in steps[b] if step >= t]
                if later:
                    spread = np.std(every, ddof=1) + 1e-4
                    expected[b, t] = sum((r - np.mean(every)) / spread for r in later)
    found = process_advantages(rewards, ends, mask)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert np.abs(found[:-3]).max() > 1
    assert not found[-3:].any()


def test_answers_of_a_group_may_stand_in_any_order():
    rewards, ends, mask = process_case()
    order = np.concatenate([3 * group + np.array([2, 0, 1]) for group in (1, 3, 0, 2)])
    found = process_advantages(*(x[order] for x in (rewards, ends, mask)))
    np.testing.assert_allclose(found, process_advantages(rewards, ends, mask)[order], rtol=1e-5, atol=1e-6)


def test_one_step_at_the_end_of_each_answer_is_outcome_supervision():
    rng = np.random.default_rng(1)
    mask = np.arange(6) < rng.integers(1, 7, (8, 1))
    last = mask & ~np.pad(mask, ((0, 0), (0, 1)))[:, 1:]
    outcomes = rng.random(8)
    found = process_advantages(np.where(last, outcomes[:, None], np.nan), last, mask, group_size=4)
    expected = kernels.group_relative_advantages(jnp.asarray(outcomes.reshape(2, 4))).reshape(-1, 1)
    np.testing.assert_allclose(found, np.where(mask, expected, 0), rtol=1e-4, atol=1e-5)


def test_process_advantages_have_no_gradient():
    rewards, ends, mask = map(jnp.asarray, process_case())

    def total(rewards):
        return jnp.sum(kernels.process_supervision_advantages(rewards, ends, mask, group_size=3) ** 2)

    assert not jax.grad(total)(rewards).any()
