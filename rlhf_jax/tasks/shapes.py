"""Coloured shapes on a grid, and sums written in pixels: questions that only an image answers.

    image     a red square at the top left, a blue cross in the middle, a red cross at the bottom
    question  how many red?        what is at top left?        where is blue cross?        name all.
    answer    2                    red square                  middle                      red square, ...

The image is 24 pixels a side: nine cells of eight, with a shape in some of them, on a ground that is never
the same. A sum is an image of two digits and a plus; the question is `sum?`. Every answer follows from how
the image was made, and the questions alone leave all answers open.
"""

import dataclasses
import itertools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np

from rlhf_jax.core.types import UInt8
from rlhf_jax.data.tokenizers import Tokenizer, character_tokenizer
from rlhf_jax.tasks.arithmetic import Split

COLOURS = {"red": (200, 40, 40), "green": (40, 160, 60), "blue": (50, 70, 210), "yellow": (220, 200, 40)}
KINDS = ("square", "cross", "ring")
PLACES = ("nw", "n", "ne", "w", "c", "e", "sw", "s", "se")
"""Cells by their direction from the centre, row by row."""
CELL = 8
IMAGE_SIZE = 3 * CELL
MOST = 4
"""Things in an image at most."""

Thing: TypeAlias = tuple[str, str]
"""(colour, kind)."""
Question = Literal["count", "what", "where", "sum", "name"]
QUESTIONS: tuple[Question, ...] = ("count", "what", "where", "sum", "name")

_FONT = {
    "0": "757557", "1": "262227", "2": "717477", "3": "717177", "4": "557117", "5": "747177",
    "6": "747577", "7": "711222", "8": "757577", "9": "757177", "+": "002720",
}  # fmt: skip
"""Rows of each sign, three pixels each, as octal digits."""


@dataclasses.dataclass(frozen=True)
class Scene:
    """An image before it is drawn.

    Attributes:
      things: what stands in each of the nine cells; None where nothing does.
      digits: the terms of a sum, in whose image nothing else stands; None for shapes.
    """

    things: tuple[Thing | None, ...] = (None,) * 9
    digits: tuple[int, int] | None = None

    @property
    def names(self) -> list[str]:
        """Names of the things, cell by cell."""
        return [" ".join(thing) for thing in self.things if thing is not None]

    @property
    def is_held_out(self) -> bool:
        """True for one in eight scenes, by what is in them."""
        return zlib.crc32(repr((self.things, self.digits)).encode()) % 8 == 0


def draw(scene: Scene, rng: np.random.Generator) -> UInt8[np.ndarray, "24 24 3"]:
    """The image of a scene; the ground differs each time."""
    image = rng.integers(225, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    cells = [np.s_[CELL * row : CELL * (row + 1), CELL * column : CELL * (column + 1)]
             for row in range(3) for column in range(3)]  # fmt: skip
    for cell, thing in zip(cells, scene.things, strict=True):
        if thing is not None:
            image[cell][_stencil(thing[1])] = COLOURS[thing[0]]
    if scene.digits is not None:
        for cell, sign in zip(cells[3:6], f"{scene.digits[0]}+{scene.digits[1]}", strict=True):
            image[cell][_glyph(sign)] = 20
    return image


def _stencil(kind: str) -> np.ndarray:
    """Pixels of a cell that a shape covers."""
    y, x = np.mgrid[:CELL, :CELL] - (CELL - 1) / 2
    distance = np.maximum(np.abs(y), np.abs(x))
    match kind:
        case "square":
            return distance < 3
        case "ring":
            return (distance < 3.6) & (distance > 2)
        case _:
            return (np.minimum(np.abs(y), np.abs(x)) < 1) & (distance < 3.6)


def _glyph(sign: str) -> np.ndarray:
    """Pixels of a cell that a sign covers."""
    cell = np.zeros((CELL, CELL), bool)
    for row, bits in enumerate(_FONT[sign], start=1):
        cell[row, 2:5] = [int(bits) >> place & 1 for place in (2, 1, 0)]
    return cell


# Questions ------------------------------------------------------------------------------------------


def make_scene(question: Question, split: Split, rng: np.random.Generator, most: int = MOST) -> Scene:
    """A scene of a split that the question can be asked of, of `most` things at most."""
    while True:
        if question == "sum":
            scene = Scene(digits=(int(rng.integers(10)), int(rng.integers(10))))
        else:
            scene = _shapes(question, rng, most)
        if scene.is_held_out == (split == "heldout"):
            return scene


def _shapes(question: Question, rng: np.random.Generator, most: int) -> Scene:
    things: list[Thing | None] = [None] * 9
    pool = list(itertools.product(COLOURS, KINDS))
    count = int(rng.integers(1, most + 1))
    # No two alike where things are called by name.
    chosen = rng.choice(len(pool), count, replace=question == "count")
    for cell, number in zip(rng.choice(9, count, replace=False), chosen, strict=True):
        things[cell] = pool[number]
    return Scene(tuple(things))


def ask(question: Question, scene: Scene, rng: np.random.Generator) -> tuple[str, str, str]:
    """(question, its answer, an answer of the same form that is wrong)."""
    filled = [cell for cell, thing in enumerate(scene.things) if thing is not None]
    match question:
        case "sum":
            assert scene.digits is not None
            return "sum?", *_with_another(str(sum(scene.digits)), list(map(str, range(19))), rng)
        case "count":
            colour = _drawn(list(COLOURS), rng)
            right = sum(name.startswith(colour) for name in scene.names)
            numbers = list(map(str, range(MOST + 1)))
            return f"how many {colour}?", *_with_another(str(right), numbers, rng)
        case "what":
            cell = filled[rng.integers(len(filled))]
            thing = " ".join(scene.things[cell] or ())
            return f"what is at {PLACES[cell]}?", *_with_another(thing, all_names(), rng)
        case "where":
            cell = filled[rng.integers(len(filled))]
            thing = " ".join(scene.things[cell] or ())
            return f"where is {thing}?", *_with_another(PLACES[cell], PLACES, rng)
        case "name":
            absent = _drawn([name for name in all_names() if name not in scene.names], rng)
            place = int(rng.integers(len(scene.names) + 1))
            more = [*scene.names[:place], absent, *scene.names[place:]]
            return "name all.", ", ".join(scene.names), ", ".join(more)


def _drawn(choices: Sequence[str], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]


def _with_another(right: str, choices: Sequence[str], rng: np.random.Generator) -> tuple[str, str]:
    return right, _drawn([choice for choice in choices if choice != right], rng)


def all_names() -> list[str]:
    """Names of all things that there may be."""
    return [f"{colour} {kind}" for colour, kind in itertools.product(COLOURS, KINDS)]


# Rows -----------------------------------------------------------------------------------------------


def rows(
    split: Split,
    count: int,
    seed: int,
    *,
    questions: Sequence[Question] = QUESTIONS,
    most: int = MOST,
    slip_rate: float = 0.0,
    make: Callable[[str, str, str], dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Questions with their images, as data files have them: `prompt`, `images`, `answer`, and `objects`, the
    names of what is there.

    Args:
      questions: kinds to ask, each as often as the others.
      most: things in an image at most, from 1 to 4.
      slip_rate: how often the answer that `make` gets as given is a wrong one.
      make: (question, answer given, a wrong one) -> further fields.
    """
    rng = np.random.default_rng([seed, *b"shapes", *split.encode()])
    found = []
    for number in range(count):
        question = questions[number % len(questions)]
        scene = make_scene(question, split, rng, most)
        text, answer, mistaken = ask(question, scene, rng)
        given = mistaken if rng.random() < slip_rate else answer
        row = {"prompt": text, "images": [draw(scene, rng)], "answer": answer, "objects": scene.names}
        found.append(row | (make(text, given, mistaken) if make else {}))
    return found


def prompt_rows(split: Split, count: int, seed: int, **options: Any) -> list[dict[str, Any]]:
    """Prompts whose rewards are `right_answer`; `options` are those of `rows`."""
    return rows(split, count, seed, **options)


def demonstration_rows(
    split: Split, count: int, seed: int, *, slip_rate: float = 0.0, **options: Any
) -> list[dict[str, Any]]:
    """Conversations to imitate, of which a share is wrong."""
    return rows(
        split, count, seed, slip_rate=slip_rate, make=lambda _, given, __: {"completion": given}, **options
    )


def preference_rows(split: Split, count: int, seed: int, **options: Any) -> list[dict[str, Any]]:
    """Pairs: the right answer, and a wrong one of the same form; to `name all.`, with a thing too many."""
    return rows(
        split,
        count,
        seed,
        make=lambda _, given, mistaken: {"chosen": given, "rejected": mistaken},
        **options,
    )


def text_only(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows without images: what is left is what the question alone says."""
    return [{name: value for name, value in row.items() if name != "images"} for row in found]


def shapes_tokenizer() -> Tokenizer:
    """One token a character, and one for every word of questions and answers."""
    asked = ["how many ", "what is at ", "where is ", "name all.", "sum?", "go to "]
    places = [place for place in PLACES if len(place) > 1]
    words = [*COLOURS, *KINDS, *places, *asked, "system", "user", "assistant", "tool"]
    return character_tokenizer("\n0123456789 ,?.+nwces", words)


# Judgement ------------------------------------------------------------------------------------------


def right_answer(
    prompts: Sequence[str], completions: Sequence[str], *, answer: Sequence[str], **_: Any
) -> list[float]:
    """1 for the answer to the letter, else 0; a reward function."""
    del prompts
    return [float(said == expected) for said, expected in zip(completions, answer, strict=True)]


def hallucination_rates(completions: Sequence[str], objects: Sequence[Sequence[str]]) -> dict[str, float]:
    """CHAIR (Rohrbach et al. 2018): things named that are not there.

    Args:
      completions: lists of names, parted by commas.
      objects: names of what is in each image.

    Returns:
      `per_object`, the share of names that nothing in the image has; `per_answer`, the share of answers with
      such a name; `recall`, the share of things that are named.
    """
    named = [[name.strip() for name in text.split(",") if name.strip()] for text in completions]
    absent = [
        [name for name in names if name not in there] for names, there in zip(named, objects, strict=True)
    ]
    seen = [len(set(names) & set(there)) for names, there in zip(named, objects, strict=True)]
    return {
        "per_object": sum(map(len, absent)) / max(sum(map(len, named)), 1),
        "per_answer": sum(map(bool, absent)) / max(len(absent), 1),
        "recall": sum(seen) / max(sum(map(len, objects)), 1),
    }
