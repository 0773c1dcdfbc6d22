import re

import numpy as np
import pytest

from rlhf_jax.core.errors import UserError
from rlhf_jax.metrics.pictures import name_ends, picture, spread


def test_places_are_apart_in_order_and_near():
    assert spread([0.5], 0.1) == [0.5]
    assert spread([0.1, 0.9, 0.5], 0.1) == [0.1, 0.9, 0.5]
    assert spread([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])
    found = spread([1.0, 0.2, 0.95, 0.9, 0.21], 0.1)
    assert np.all(np.diff(np.sort(found)) > 0.1 - 1e-9)
    assert np.argsort(found).tolist() == [1, 4, 3, 2, 0]
    assert np.mean([found[i] for i in (0, 2, 3)]) == pytest.approx(0.95)


def test_a_picture_has_words_names_and_the_same_bytes_again(tmp_path):
    def draw(path):
        with picture(path, 1, 2) as (left, right):
            (rising,) = left.plot([0, 1, 2], [0, 1, np.nan], linewidth=1)
            (level,) = left.plot([0, 1, 2], [1, 1, 1])
            left.set(title="Two curves", xlabel="steps")
            name_ends(left, {"rising": rising, "level": level})
        assert not right.axison  # nothing is in it
        return path.read_text()

    text = draw(tmp_path / "a.svg")
    words = re.findall(r"<text[^>]*>([^<]*)</text>", text)
    assert {"Two curves", "steps", "rising", "level"} <= set(words)
    assert draw(tmp_path / "a.svg") == text
    assert float(re.search(r'width="([\d.]+)pt"', text)[1]) <= 600  # points: 800 pixels


def test_names_of_lines_that_end_together_stand_apart(tmp_path):
    with picture(tmp_path / "a.svg", 1, 1) as (axes,):
        lines = {name: axes.plot(range(3), [0, 1, 1])[0] for name in ("one", "other")}
        lines["alone"] = axes.plot(range(3), [0, 0, 0.1])[0]
        axes.set(xlim=(0, 4), ylim=(0, 1.2))
        name_ends(axes, lines)
        heights = {text.get_text(): text.xyann[1] for text in axes.texts}
    assert abs(heights["one"] - heights["other"]) > 0.05  # beside the panel
    assert heights["alone"] == 0  # points from the line's end, within it


@pytest.mark.parametrize(("suffix", "begins"), [("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_the_suffix_decides_the_format(tmp_path, suffix, begins):
    path = tmp_path / f"a.{suffix}"
    with picture(path, 1, 1) as (axes,):
        axes.plot([0, 1], [0, 1])
    assert path.read_bytes().startswith(begins)


@pytest.mark.parametrize("name", ["a", "a.jpg2", "a.svg.bak"])
def test_other_suffixes_are_refused_before_anything_is_drawn(tmp_path, name):
    with pytest.raises(UserError, match="none of svg, png, pdf"), picture(tmp_path / name, 1, 1):
        pytest.fail("drawn")
    assert not list(tmp_path.iterdir())
