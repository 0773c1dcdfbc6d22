"""Made-up people and what is known of them: questions that only a document can answer.

    document  balo mike lives in tasi. balo mike speaks nedo. balo mike trades lobi. balo mike fears mesa.
    question  what does balo mike speak?
    answer    balo mike speaks nedo

People who are held out are met for the first time when their documents are read. All words for places and the
like are made up too, drawn anew for each seed from a thousand, so a right answer comes from the documents.
First and last names are shared, so that passages about others look alike.
"""

import dataclasses
import itertools
import math
import re

import numpy as np

from rlhf_jax.data.tokenizers import Tokenizer, character_tokenizer
from rlhf_jax.tasks.arithmetic import Split, in_split

UNKNOWN = "unknown"
"""What is answered where no passage says."""

_SYLLABLES = tuple(map("".join, itertools.product("bdklmnst", "aeio")))
_WORDS = tuple(map("".join, itertools.product(_SYLLABLES, repeat=2)))
_FIRST, _LAST = _WORDS[5::31][:32], _WORDS[11::31][:32]
_RELATIONS = (
    ("lives in", "where does {} live?"),
    ("speaks", "what does {} speak?"),
    ("trades", "what does {} trade?"),
    ("fears", "what does {} fear?"),
)


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
        return [(form.format(self.name), f"{self.name} {verb} {value}") for (verb, form), value in pairs]


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
    values = rng.choice(_WORDS, size=(count, len(_RELATIONS)))
    return [Person(names[place], tuple(row)) for place, row in zip(chosen, values.tolist(), strict=True)]


def num_people(split: Split) -> int:
    """Number of people in a split."""
    return len(in_split(range(math.prod(map(len, (_FIRST, _LAST)))), split))


def facts_tokenizer() -> Tokenizer:
    """One token for each letter, digit, sign, syllable, word of the questions, and verb with its spaces."""
    verbs = [f" {verb} " for verb, _ in _RELATIONS]
    asked = sorted({word for _, form in _RELATIONS for word in re.findall("[a-z]{2,}", form)})
    alphabet = "abcdefghijklmnopqrstuvwxyz0123456789 \n.?[]{}"
    roles = ["system", "user", "assistant", "tool"]
    return character_tokenizer(alphabet, [*roles, UNKNOWN, *verbs, *asked, *_SYLLABLES])
