import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from rlhf_jax.core.errors import UserError
from rlhf_jax.data.pipeline import BatchSampler, fingerprint


def stream(sampler, steps):
    return np.concatenate([sampler.indices(step) for step in range(steps)])


@settings(max_examples=30, deadline=None)
@given(num_examples=st.integers(1, 40), data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_each_epoch_holds_every_example_once(num_examples, data, seed):
    batch_size = data.draw(st.integers(1, num_examples))
    order = stream(BatchSampler(num_examples, batch_size, seed), -(-3 * num_examples // batch_size))
    for epoch in range(3):
        part = order[epoch * num_examples : (epoch + 1) * num_examples]
        assert sorted(part) == list(range(num_examples))


def test_a_step_alone_decides_its_batch():
    order = stream(BatchSampler(50, 8, 3), 30)
    for step in (29, 0, 7, 13):
        np.testing.assert_array_equal(BatchSampler(50, 8, 3).indices(step), order[8 * step : 8 * step + 8])


def test_epochs_and_seeds_differ():
    first, second = stream(BatchSampler(64, 64, 0), 2).reshape(2, 64)
    assert (first != second).any()
    assert (first != np.arange(64)).any()
    assert (BatchSampler(64, 64, 1).indices(0) != first).any()
    assert BatchSampler(64, 24, 0).steps_per_epoch == 64 / 24


def test_late_steps_are_as_quick_as_early_ones():
    batch = BatchSampler(10**9, 4, 0).indices(10**12)
    assert batch.dtype == np.int64
    assert ((batch >= 0) & (batch < 10**9)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 5, 0), "batch of 5 is larger than the data set of 4 examples"),
        ((0, 1, 0), "larger than the data set of 0"),
        ((4, 0, 0), "batch size 0 is not positive"),
        ((4, 2, -1), "seed -1 is out of range"),
        ((4, 2, 2**32), "seed 4294967296 is out of range"),
    ],
)
def test_sizes_out_of_range(arguments, message):
    with pytest.raises(UserError, match=message):
        BatchSampler(*arguments)


def test_negative_step():
    with pytest.raises(UserError, match="step -1 is negative"):
        BatchSampler(4, 2, 0).indices(-1)


ROW = {"question": "1+1?", "answer": "2", "tests": [{"in": 1, "out": None}], "weight": 0.5}


@pytest.mark.parametrize(
    "change",
    [
        {"answer": "3"},
        {"answer": 2},
        {"tests": [{"in": 1, "out": 0}]},
        {"weight": 0.5000001},
        {"more": ""},
        {"question": "1+1?\ud800"},
        {"answer": None},
    ],
)
def test_every_field_of_every_row_is_in_the_fingerprint(change):
    ids = [np.arange(3), np.arange(2)]
    before = fingerprint(ids, [ROW, ROW])
    assert before == fingerprint(ids, [dict(reversed(ROW.items())), ROW])
    assert before != fingerprint(ids, [ROW, ROW | change])
    assert fingerprint(ids, [ROW | change, ROW]) != fingerprint(ids, [ROW, ROW | change])


def test_fingerprints_are_those_of_another_process():
    """Objects whose text has their address say what they are, and arrays what they hold."""
    rows = [{"x": np.arange(3), "y": np.float32(1.5), "z": object()}]
    again = [{"x": np.arange(3), "y": np.float32(1.5), "z": object()}]
    assert fingerprint([], rows) == fingerprint([], again)
    assert fingerprint([], rows) != fingerprint([], [rows[0] | {"x": np.arange(1, 4)}])
