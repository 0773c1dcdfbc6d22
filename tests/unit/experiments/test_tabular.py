"""The tabular study: its rules agree where theory says so, and its numbers are those of the book."""

import numpy as np
import pytest
import tabular_methods


@pytest.fixture(scope="module")
def errors():
    return tabular_methods.prediction_errors(tabular_methods.Options(seeds=8, episodes=10))


@pytest.mark.slow
def test_the_corners_of_both_families_are_the_same_rule(errors):
    """n = 1 and lambda = 0 are TD(0), online as well as offline; lambda = 1, offline, is Monte Carlo."""
    for way in ("", ", offline"):
        one, zero = errors[f"n-step TD{way}"]["n = 1"], errors[f"TD(lambda){way}"]["lambda = 0"]
        np.testing.assert_allclose(one, zero, rtol=1e-5)


@pytest.mark.slow
def test_a_middle_n_is_best_as_in_figure_7_2_of_the_book(errors):
    best = {name: row.min() for name, row in errors["n-step TD"].items()}
    assert min(best, key=best.__getitem__) in ("n = 4", "n = 8")
    assert 0.2 < best["n = 4"] < 0.35


def test_a_star_is_as_short_as_dynamic_programming_and_looks_at_less():
    found = tabular_methods.shortest_paths()
    assert all(moves == exact for moves, _, exact in found.values())
    for maze in ("Dyna maze", "four rooms"):
        assert found[f"{maze}, A*, city blocks"][1] < found[f"{maze}, Dijkstra"][1]


@pytest.mark.slow
def test_demonstrations_are_explained():
    lacking = tabular_methods.inverse_shortfalls(tabular_methods.Options(seeds=2), (10,))
    assert np.abs(lacking[10]).max() < 0.01
