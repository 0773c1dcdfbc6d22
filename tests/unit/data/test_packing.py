import dataclasses
import logging

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from rlhf_jax.core.errors import UserError
from rlhf_jax.data.packing import bucket_batches, left_pad, pack_rows, pad_batch, pad_rows


@dataclasses.dataclass
class Sample:
    ids: list[int]
    mask: list[bool]
    where: str = "data.jsonl:1"


def sample(size, number=0):
    return Sample(
        [100 * number + place for place in range(1, size + 1)], [place % 2 == 1 for place in range(size)]
    )


def unpack(sequences):
    """The samples in the rows, as sorted (ids, mask, positions)."""
    found = []
    for row in range(sequences.tokens.shape[0]):
        for segment in range(1, sequences.segment_ids[row].max() + 1):
            here = sequences.segment_ids[row] == segment
            parts = (sequences.tokens, sequences.mask, sequences.positions)
            found.append(tuple(tuple(part[row][here].tolist()) for part in parts))
    return sorted(found)


def expected(samples):
    return sorted((tuple(s.ids), tuple(s.mask), tuple(range(len(s.ids)))) for s in samples)


def test_padded_rows():
    rows = pad_rows([sample(2), sample(3)], 4)
    np.testing.assert_array_equal(rows.tokens, [[1, 2, 0, 0], [1, 2, 3, 0]])
    np.testing.assert_array_equal(rows.positions, [[0, 1, 0, 0], [0, 1, 2, 0]])
    np.testing.assert_array_equal(rows.segment_ids, [[1, 1, 0, 0], [1, 1, 1, 0]])
    np.testing.assert_array_equal(rows.mask, [[0, 1, 0, 0], [0, 1, 0, 0]])
    assert [x.dtype for x in (rows.tokens, rows.positions, rows.segment_ids, rows.mask)] == [
        *(np.int32, np.int32, np.int32, np.bool_)
    ]


def test_first_fit_takes_the_first_row_with_room():
    rows = pack_rows([sample(3, 1), sample(4, 2), sample(2, 3), sample(1, 4)], 5)
    np.testing.assert_array_equal(rows.tokens, [[101, 102, 103, 301, 302], [201, 202, 203, 204, 401]])
    np.testing.assert_array_equal(rows.segment_ids, [[1, 1, 1, 2, 2], [1, 1, 1, 1, 2]])
    np.testing.assert_array_equal(rows.positions, [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]])


@settings(max_examples=150, deadline=None)
@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=150), spare=st.integers(0, 20))
def test_packing_keeps_every_token_and_no_two_half_empty_rows(sizes, spare):
    length = max(sizes) + spare
    samples = [sample(size, number) for number, size in enumerate(sizes)]
    rows = pack_rows(samples, length)
    assert unpack(rows) == expected(samples) == unpack(pad_rows(samples, length))
    assert np.array_equal(rows.segment_ids > 0, np.sort(rows.segment_ids > 0, axis=1)[:, ::-1])  # no gaps
    assert (np.diff(rows.segment_ids, axis=1) <= 1).all()
    assert not rows.mask[rows.segment_ids == 0].any()
    # First fit never leaves two rows whose tokens would fit one.
    fill = np.sort((rows.segment_ids > 0).sum(axis=1))
    assert len(fill) < 2 or fill[0] + fill[1] > length


def test_equal_samples_give_equal_rows():
    samples = [sample(size) for size in (3, 1, 4, 1, 5, 2)]
    for a, b in zip(unpack(pack_rows(samples, 6)), unpack(pack_rows(samples, 6)), strict=True):
        assert a == b


@pytest.mark.parametrize("make", [pad_rows, pack_rows])
def test_samples_that_do_not_fit(make, caplog):
    samples = [sample(2), dataclasses.replace(sample(7), where="data.jsonl:12"), sample(3)]
    with pytest.raises(UserError, match=r"data.jsonl:12: the sample has 7 tokens and a row holds 6"):
        make(samples, 6)
    with caplog.at_level(logging.WARNING):
        kept = make(samples, 6, overlength="drop")
    assert unpack(kept) == expected([samples[0], samples[2]])
    assert "dropped 1 of 3 samples longer than 6 tokens" in caplog.text
    with pytest.raises(UserError, match="all 3 samples are longer than 1"):
        make(samples, 1, overlength="drop")
    with pytest.raises(UserError, match="no samples"):
        make([], 6)
    with pytest.raises(UserError, match=r"data.jsonl:1: the sample has no tokens"):
        make([Sample([], [])], 6)


def test_batches_of_one_shape():
    rows = pad_batch(pack_rows([sample(3), sample(3)], 4), 4)
    assert rows.tokens.shape == rows.mask.shape == rows.positions.shape == rows.segment_ids.shape == (4, 4)
    assert not rows.segment_ids[2:].any()
    assert not rows.mask[2:].any()
    with pytest.raises(UserError, match="2 packed rows do not fit a batch of 1"):
        pad_batch(pack_rows([sample(3), sample(3)], 4), 1)


def test_left_padding():
    tokens, mask = left_pad([[5], np.array([6, 7, 8])], 4, pad_id=9)
    np.testing.assert_array_equal(tokens, [[9, 9, 9, 5], [9, 6, 7, 8]])
    np.testing.assert_array_equal(mask, [[0, 0, 0, 1], [0, 1, 1, 1]])
    assert (tokens.dtype, mask.dtype) == (np.int32, np.bool_)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompts"),
        ([[1], []], "prompt 1 has 0 tokens where 1 to 3 fit"),
        ([[1, 2, 3, 4]], "prompt 0 has 4 tokens where 1 to 3 fit"),
    ],
)
def test_prompts_that_do_not_fit(prompts, message):
    with pytest.raises(UserError, match=message):
        left_pad(prompts, 3)


def test_prompts_of_many_lengths_make_few_shapes():
    lengths = [*range(1, 200), 700]
    found = bucket_batches(lengths, size=8)
    assert all(lengths[place] <= columns for columns, places in found for place in places)
    assert {len(places) for _, places in found} == {8}
    assert {place for _, places in found for place in places} == set(range(len(lengths)))
    assert sorted({columns for columns, _ in found}) == [16, 32, 64, 128, 256, 1024]
