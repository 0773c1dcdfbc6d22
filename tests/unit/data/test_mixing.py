import numpy as np
import pytest

from rlhf_jax.core.errors import UserError
from rlhf_jax.data.mixing import MixtureSampler, mixing_shares


def test_shares_follow_weights_sizes_temperature_and_cap():
    np.testing.assert_allclose(mixing_shares([9, 1], weights=[2, 6]), [0.25, 0.75])
    np.testing.assert_allclose(mixing_shares([90, 10]), [0.9, 0.1])
    np.testing.assert_allclose(mixing_shares([900, 100], temperature=2.0), [0.75, 0.25])
    np.testing.assert_allclose(mixing_shares([900, 100], temperature=1e9), [0.5, 0.5], atol=1e-6)
    np.testing.assert_allclose(mixing_shares([900, 100], cap=300), [0.75, 0.25])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": 0}, "temperature 0"),
        ({"weights": [1, 0]}, "not positive"),
        ({"weights": [1, 1], "temperature": 2.0}, "one or the other"),
    ],
)
def test_shares_that_make_no_sense_are_refused(options, said):
    with pytest.raises(UserError, match=said):
        mixing_shares([1, 1], **options)


@pytest.fixture(scope="module")
def sampler():
    return MixtureSampler((7, 300, 40), (0.6, 0.3, 0.1), 16, seed=3)


@pytest.fixture(scope="module")
def drawn(sampler):
    return np.concatenate([sampler.indices(step) for step in range(40)])


def test_every_stretch_holds_the_sources_in_their_shares(sampler, drawn):
    sources = sampler.source_of(drawn)
    for end in range(1, len(sources) + 1):
        counts = np.bincount(sources[:end], minlength=3)
        assert np.abs(counts - end * np.asarray(sampler.shares)).max() <= 1.5
    np.testing.assert_allclose(sampler.epochs(40), 640 * np.array([0.6 / 7, 0.3 / 300, 0.1 / 40]))


def test_every_source_goes_through_its_rows_before_it_repeats_one(drawn):
    small = drawn[drawn < 7]
    for start in range(0, len(small) - 7, 7):
        assert sorted(small[start : start + 7]) == list(range(7))
    large = drawn[(drawn >= 7) & (drawn < 307)]
    assert len(set(large)) == len(large)
    assert not np.array_equal(small[:7], small[7:14])


def test_batches_are_a_function_of_the_step_across_cycles(sampler):
    """A resume at any step continues the same stream, also where the order of sources begins anew."""
    step = 10_000 // 16  # the batch that ends one cycle and begins the next
    again = MixtureSampler(sampler.sizes, sampler.shares, 16, seed=3)
    before = [again.indices(s) for s in (step, step + 1)]
    assert np.array_equal(before[0], sampler.indices(step))
    assert np.array_equal(before[1], sampler.indices(step + 1))
    halves = MixtureSampler(sampler.sizes, sampler.shares, 8, seed=3)
    assert np.array_equal(before[0], np.concatenate([halves.indices(2 * step), halves.indices(2 * step + 1)]))
    assert not np.array_equal(
        before[0], MixtureSampler(sampler.sizes, sampler.shares, 16, seed=4).indices(step)
    )
    with pytest.raises(UserError, match="negative"):
        sampler.indices(-1)


def test_the_smallest_share_is_not_lost():
    sampler = MixtureSampler((5, 5, 5), (1e-7, 0.3, 0.7 - 1e-7), 100, seed=0)
    order, _, counts = sampler._pattern
    assert counts.tolist() == np.bincount(order).tolist() == [1, 3000, 6999]
