"""The hyperbola of steps and examples, and where a curve of losses comes to one."""

import math

import numpy as np
import pytest

from rlhf_jax.evaluation import critical_batch


def test_the_hyperbola_of_steps_and_examples():
    sizes = np.array([16, 64, 256, 1024, 4096])
    steps = 500 * (1 + 300 / sizes)
    law = critical_batch.fit_critical_batch(sizes, steps)
    assert (law.min_steps, law.min_examples) == (pytest.approx(500), pytest.approx(150_000))
    assert law.batch_size == pytest.approx(300)
    np.testing.assert_allclose(law(sizes), steps)
    np.testing.assert_allclose((law(sizes) / 500 - 1) * (sizes * law(sizes) / 150_000 - 1), 1)
    at = law(law.batch_size)
    assert (at, at * law.batch_size) == (pytest.approx(1000), pytest.approx(300_000))
    # More examples the smaller the batch: no hyperbola has that.
    assert math.isnan(critical_batch.fit_critical_batch([16, 64], [1000, 100]).batch_size)
    with pytest.raises(ValueError, match="two batch sizes"):
        critical_batch.fit_critical_batch([16, 16], [1000, 900])


def test_where_a_curve_first_is_at_a_loss():
    places, losses = [0, 10, 20, 30], [5.0, 4.0, 3.0, 3.5]
    assert critical_batch.first_reached(places, losses, 3.25) == pytest.approx(17.5)
    assert critical_batch.first_reached(places, losses, 6) == 0
    assert math.isnan(critical_batch.first_reached(places, losses, 2.9))
