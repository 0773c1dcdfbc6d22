"""Win rates against scikit-learn (frozen) and by identities."""

import json
import pathlib

import numpy as np
import pytest

from rlhf_jax.evaluation.win_rate import both_orders, length_controlled_win_rate, order_bias, win_rate

GOLDEN = json.loads(
    (pathlib.Path(__file__).parents[2] / "golden" / "evaluation_peers.json").read_text(encoding="utf-8")
)["labels"]


def test_a_judge_who_favours_a_place_makes_ties():
    true = np.array([1.0, 0.0, 0.5])
    assert both_orders(true, 1 - true).tolist() == true.tolist()
    assert both_orders([1.0, 1.0], [1.0, 1.0]).tolist() == [0.5, 0.5]
    assert order_bias(true, 1 - true) == 0
    assert order_bias([1.0, 1.0], [1.0, 1.0]) == 1
    assert win_rate([1.0, 0.5, 0.5, 0.0, 0.0]) == 0.4


def test_length_controlled_fit_is_that_of_sklearn():
    wins = np.array(GOLDEN["wins"], float)
    found = length_controlled_win_rate(wins, GOLDEN["longer_by"])
    assert found == pytest.approx(GOLDEN["win_rate_at_equal_length"], abs=1e-5)
    assert abs(found - win_rate(wins)) > 0.05


def test_length_control_by_identities():
    rng = np.random.default_rng(0)
    wins, longer = rng.integers(3, size=40) / 2, rng.normal(size=40)
    found = length_controlled_win_rate(wins, longer)
    assert length_controlled_win_rate(1 - wins, -longer) == pytest.approx(1 - found)
    assert length_controlled_win_rate(wins, 100 * longer) == pytest.approx(found)  # in any unit
    assert length_controlled_win_rate(wins, np.full(40, 7.0)) == win_rate(wins)
    both = np.concatenate([wins, wins]), np.concatenate([longer, -longer])
    assert length_controlled_win_rate(*both) == pytest.approx(win_rate(wins))  # lengths say nothing
    assert length_controlled_win_rate(np.ones(40), longer) > 0.999


def test_bad_input():
    with pytest.raises(ValueError, match="from 0 to 1"):
        win_rate([1.5])
    with pytest.raises(ValueError, match="both orders"):
        both_orders([0.5], [0.5, 0.5])
    with pytest.raises(ValueError, match="a length for each"):
        length_controlled_win_rate([0.5, 1.0], [3.0])
