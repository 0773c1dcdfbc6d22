"""Made-up people and what is known of them: questions that only a document can answer.

    document  balo mike lives in oslo. balo mike works as a baker. balo mike likes figs. balo mike owns a cat.
    question  where does balo mike live?
    answer    balo mike lives in oslo

People who are held out are met for the first time when their documents are read, so a right answer comes from
there; a guess among the values of a relation is right once in `len(VALUES)`. First and last names are shared,
so that passages about others look alike.
"""

import dataclasses
import itertools
import math

import numpy as np

from rlhf_jax.data.arithmetic import Split, in_split
from rlhf_jax.data.tokenizers import Tokenizer, character_tokenizer

UNKNOWN = "unknown"
"""What is answered where no passage says."""

_SYLLABLES = tuple(map("".join, itertools.product("bdklmnst", "aeio")))
_FIRST = tuple(
    first + second for first, second in zip(_SYLLABLES, _SYLLABLES[5:] + _SYLLABLES[:5], strict=True)
)
_LAST = tuple(
    first + second for first, second in zip(_SYLLABLES, _SYLLABLES[11:] + _SYLLABLES[:11], strict=True)
)
_CITIES = ("oslo", "lima", "rome", "cairo", "delhi", "paris", "quito", "tokyo")
_JOBS = ("baker", "judge", "pilot", "nurse", "clerk", "poet", "vet", "miner")
_JOYS = ("figs", "chess", "jazz", "rugby", "opera", "yoga", "plums", "judo")
_PETS = ("cat", "fox", "yak", "hen", "pug", "owl", "elk", "pig")
_RELATIONS = (
    ("lives in", "where does {} live?", _CITIES),
    ("works as a", "what does {} work as?", _JOBS),
    ("likes", "what does {} like?", _JOYS),
    ("owns a", "what does {} own?", _PETS),
)
VALUES = len(_RELATIONS[0][2])


@dataclasses.dataclass(frozen=True)
class Person:
    """One of the people.

    Attributes:
      name: first and last.
      values: one for each relation.
    """

    name: str
    values: tuple[str, ...]

    @property
    def document(self) -> str:
        """All that is known, in a sentence for each relation."""
        return " ".join(f"{answer}." for _, answer in self.questions())

    def questions(self) -> list[tuple[str, str]]:
        """(question, answer) for each relation; the answer is the document's sentence."""
        pairs = zip(_RELATIONS, self.values, strict=True)
        return [(form.format(self.name), f"{self.name} {verb} {value}") for (verb, form, _), value in pairs]


def people(split: Split, count: int, seed: int) -> list[Person]:
    """Some of the people of a split, with values drawn at random.

    Raises:
      ValueError: the split has fewer.
    """
    names = in_split([f"{first} {last}" for first in _FIRST for last in _LAST], split)
    if count > len(names):
        raise ValueError(f"{split} has {len(names)} people, not {count}")
    rng = np.random.default_rng([seed, *b"people", *split.encode()])
    chosen = rng.choice(len(names), count, replace=False)
    values = rng.integers(VALUES, size=(count, len(_RELATIONS)))
    return [
        Person(
            names[place], tuple(relation[2][value] for relation, value in zip(_RELATIONS, row, strict=True))
        )
        for place, row in zip(chosen, values, strict=True)
    ]


def num_people(split: Split) -> int:
    """How many there are."""
    return len(in_split(range(math.prod(map(len, (_FIRST, _LAST)))), split))


def facts_tokenizer() -> Tokenizer:
    """One token for each letter, digit, sign, syllable of a name, and word of the task."""
    words = {
        word for verb, form, values in _RELATIONS for word in [*verb.split(), *values, *_question_words(form)]
    }
    alphabet = "abcdefghijklmnopqrstuvwxyz0123456789 \n.?[]{}"
    roles = ["system", "user", "assistant", "tool"]
    longer = sorted(word for word in words if len(word) > 1)
    return character_tokenizer(alphabet, [*roles, UNKNOWN, *longer, *_SYLLABLES])


def _question_words(form: str) -> list[str]:
    return [word.strip("?") for word in form.split() if word != "{}"]
