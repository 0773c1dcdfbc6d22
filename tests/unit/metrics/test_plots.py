import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from rlhf_jax.metrics.plots import Curve, curve_svg, mean_curve, smooth, thin_out


def curve(steps, values):
    return Curve(np.asarray(steps), np.asarray(values, float))


def texts(svg):
    return [node.text for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_the_last_value_stands_at_the_end_of_the_curve():
    svg = curve_svg([curve([1, 2, 3], [3.0, 2.0, 1.25]), curve([1, 2, 3], [3.0, 2.0, 1.75])])
    assert texts(svg)[-1] == "1.5"


def test_shares_are_drawn_from_0_to_100_percent():
    svg = curve_svg([curve([1, 2], [0.2, 0.4])], percent=True)
    assert texts(svg)[-4:] == ["0 %", "50 %", "100 %", "40 %"]


def test_colours_are_left_to_the_page():
    svg = curve_svg([curve([1, 2, 3], [1, 2, 3])])
    for name in ("line", "grid", "text"):
        assert f"var(--chart-{name})" in svg
    assert "#0a0b" not in svg
    assert "<style" not in svg
    assert "font-family" not in svg


@pytest.mark.parametrize("values", [[2.0], [2.0, 2.0, 2.0], [0.0, 0.0], [1e-9, 2e-9], [1e12, 3e12]])
def test_degenerate_curves_are_drawn(values):
    svg = curve_svg([curve(range(1, len(values) + 1), values)])
    assert texts(svg)
    assert "nan" not in svg.lower()


def test_thinning_keeps_the_mean_and_the_order():
    rng = np.random.default_rng(0)
    whole = curve(np.arange(1, 1001), rng.normal(size=1000))
    thin = thin_out(whole, 100)
    assert len(thin.steps) == 100
    np.testing.assert_allclose(thin.values.mean(), whole.values.mean(), atol=1e-12)
    np.testing.assert_allclose(thin.values[1], whole.values[10:20].mean(), atol=1e-12)
    assert np.all(np.diff(thin.steps) > 0)
    assert thin_out(thin, 100) is thin


def test_the_mean_is_taken_where_all_seeds_have_steps():
    mean = mean_curve([curve([0, 2, 4], [0, 2, 4]), curve([1, 3], [5, 7])])
    assert mean.steps.tolist() == [1, 2, 3]
    np.testing.assert_allclose(mean.values, [3, 4, 5])


def test_seeds_without_common_steps_show_the_longest():
    longest = curve([5, 6, 7], [1, 2, 3])
    assert mean_curve([curve([1, 2], [0, 0]), longest]) is longest


def test_smoothing_keeps_constants_and_short_curves_and_quiets_noise():
    flat = smooth(curve(np.arange(100), np.full(100, 0.7)))
    np.testing.assert_allclose(flat.values, 0.7, atol=1e-12)
    short = curve([1, 2, 3], [1, 5, 1])
    assert smooth(short) is short
    noise = np.random.default_rng(0).normal(size=150)
    assert smooth(curve(np.arange(150), noise)).values.std() < 0.5 * noise.std()
