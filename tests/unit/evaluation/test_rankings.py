"""Metrics of scores against ranks, by hand."""

import numpy as np

from rlhf_jax.evaluation.rankings import pair_leads, top1_accuracy


def test_pairs_in_order_and_the_best_on_top():
    scores = np.array([[3.0, 1.0, 2.0], [0.0, 1.0, 9.0]], np.float32)
    ranks, mask = np.array([[0, 1, 1], [0, 1, 0]]), np.array([[True] * 3, [True, True, False]])
    np.testing.assert_array_equal(pair_leads(scores, ranks, mask), [2.0, 1.0, -1.0])
    assert top1_accuracy(scores, ranks, mask) == 0.5
    assert top1_accuracy(scores, np.array([[2, 0, 1], [1, 0, 0]]), mask) == 0.5
    # Equal scores choose nothing.
    assert top1_accuracy(np.zeros((2, 3)), ranks, mask) == 0
