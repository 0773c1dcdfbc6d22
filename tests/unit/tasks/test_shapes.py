"""The shapes task: images show their scenes, answers follow from them, and questions alone do not tell."""

import collections

import numpy as np
import pytest

from rlhf_jax.tasks import shapes

CELLS = [
    np.s_[8 * row : 8 * (row + 1), 8 * column : 8 * (column + 1)] for row in range(3) for column in range(3)
]
MASKS = {
    "square": lambda y, x: 1 <= y <= 6 and 1 <= x <= 6,
    "ring": lambda y, x: (y in (0, 7) or x in (0, 7)) or (y in (1, 6) or x in (1, 6)),
    "cross": lambda y, x: y in (3, 4) or x in (3, 4),
}


def things_in(image):
    """Names of what is in each cell, read from its pixels; None where there is nothing."""
    found = []
    for cell in CELLS:
        dark = image[cell].min(axis=-1) < 225
        if not dark.any():
            found.append(None)
            continue
        colour = {tuple(pixel) for pixel in image[cell][dark].tolist()}
        assert len(colour) == 1
        named = {value: name for name, value in shapes.COLOURS.items()}
        covered = {
            kind: {(y, x) for y in range(8) for x in range(8) if mask(y, x)} for kind, mask in MASKS.items()
        }
        kinds = [kind for kind, place in covered.items() if place == set(zip(*np.nonzero(dark), strict=True))]
        assert len(kinds) == 1
        found.append(f"{named[colour.pop()]} {kinds[0]}")
    return found


def answer_to(question, image):
    """The answer, from pixels and words alone."""
    things = things_in(image)
    words = question.rstrip("?.").split()
    if words[0] == "how":
        return str(sum(thing is not None and thing.startswith(words[2]) for thing in things))
    if words[0] == "what":
        return things[shapes.PLACES.index(words[3])]
    if words[0] == "where":
        return shapes.PLACES[things.index(" ".join(words[2:]))]
    return ", ".join(thing for thing in things if thing is not None)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_answers_follow_from_the_pixels(split):
    for row in shapes.rows(split, 60, 0, questions=["count", "what", "where", "name"]):
        (image,) = row["images"]
        assert row["answer"] == answer_to(row["prompt"], image)
        assert row["objects"] == [thing for thing in things_in(image) if thing is not None]


def test_sums_are_written_in_pixels_that_differ_by_their_digits():
    seen = {}
    for row in shapes.rows("train", 300, 0, questions=["sum"]):
        ink = row["images"][0].max(axis=-1) < 128
        key = ink.tobytes()
        assert seen.setdefault(key, row["answer"]) == row["answer"]
    assert len(seen) > 60  # of 100 sums, an eighth of which is held out


def test_splits_share_no_scene_and_seeds_make_rows():
    def content(row):
        return row["images"][0].max(axis=-1).clip(0, 224).tobytes()

    train, heldout = (shapes.rows(split, 400, 0, questions=["where"]) for split in ("train", "heldout"))
    assert not set(map(content, train)) & set(map(content, heldout))
    again = shapes.rows("train", 400, 0, questions=["where"])
    assert all(np.array_equal(a["images"][0], b["images"][0]) for a, b in zip(train, again, strict=True))


@pytest.mark.slow
def test_the_question_alone_leaves_the_answer_open():
    """What guesses the most frequent answer to each question is right in few cases."""
    for question, most in (("count", 0.65), ("what", 0.25), ("where", 0.25), ("sum", 0.25), ("name", 0.15)):
        answers = collections.defaultdict(collections.Counter)
        found = shapes.rows("train", 1000, 0, questions=[question])
        for row in found:
            answers[row["prompt"]][row["answer"]] += 1
        assert sum(max(counts.values()) for counts in answers.values()) / len(found) < most


def test_slips_and_rejected_answers_are_wrong_and_of_the_same_form():
    found = shapes.demonstration_rows("train", 500, 0, slip_rate=0.3)
    wrong = np.mean([row["completion"] != row["answer"] for row in found])
    assert 0.2 < wrong < 0.4
    for row in shapes.preference_rows("train", 100, 0, questions=["name"]):
        named, absent = row["rejected"].split(", "), set(row["rejected"].split(", ")) - set(row["objects"])
        assert row["chosen"] == row["answer"]
        assert len(absent) == 1
        assert [name for name in named if name not in absent] == row["objects"]


def test_every_question_and_answer_has_tokens():
    tokenizer = shapes.shapes_tokenizer()
    for row in shapes.preference_rows("train", 100, 0):
        for text in (row["prompt"], row["chosen"], row["rejected"]):
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_hallucinations_are_counted_as_chair_counts_them():
    said = ["red ring, blue cross", "red ring", ""]
    rates = shapes.hallucination_rates(said, [["red ring"], ["red ring", "green ring"], ["blue cross"]])
    assert rates == {"per_object": 1 / 3, "per_answer": 1 / 3, "recall": 0.5}


def test_right_answers_are_to_the_letter():
    got = shapes.right_answer(["a", "b"], ["red ring", "red"], answer=["red ring", "red ring"], objects=[])
    assert got == [1.0, 0.0]
