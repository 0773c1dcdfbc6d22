"""Retrieval-augmented generation around the model: documents cut into passages, an index of them on disk,
prompts with numbered passages, and the sources that an answer names.

Offline, once: `split_document`, `PassageIndex.build`, `save`. Online, for each question: `load`, `search`,
`numbered_prompt`, the model's answer, `read_answer`.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.retrieval.bm25 import Index

_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_CITATION = re.compile(r"\s*\[(\d{1,3})\]")
_FILE = "passages.jsonl"
_ANEW = "make the index anew"


@dataclasses.dataclass(frozen=True)
class Passage:
    """A piece of a document.

    Attributes:
      text: what it says.
      source: the document, and the piece's number in it, from 1.
    """

    text: str
    source: str


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer apart from the sources that it names.

    Attributes:
      text: without the citations.
      cited: places, from 0, of the passages named, in the order named, each once.
      invented: citations of passages that were not there.
    """

    text: str
    cited: tuple[int, ...]
    invented: int


def split_document(text: str, source: str, *, words: int, overlap: int = 0) -> list[Passage]:
    """A document in pieces of whole sentences.

    Args:
      words: of a passage at most; a longer sentence is cut.
      overlap: words of the end of a passage, in whole sentences, that begin the next one too.

    Raises:
      ValueError: `overlap` is not below `words`, or `words` not above 0.
    """
    if not 0 <= overlap < words:
        raise ValueError(f"overlap {overlap} is not from 0 to below {words} words")
    pieces: list[list[list[str]]] = [[]]
    for sentence in _sentences(text, words):
        if pieces[-1] and _length(pieces[-1]) + len(sentence) > words:
            pieces.append(_kept_for_next(pieces[-1], min(overlap, words - len(sentence))))
        pieces[-1].append(sentence)
    texts = [" ".join(word for sentence in piece for word in sentence) for piece in pieces]
    return [Passage(text, f"{source}#{number}") for number, text in enumerate(texts, start=1) if text]


def _sentences(text: str, words: int) -> list[list[str]]:
    split = [sentence.split() for sentence in _SENTENCE.split(text)]
    return [s[start : start + words] for s in split for start in range(0, len(s), words)]


def _length(sentences: Sequence[Sequence[str]]) -> int:
    return sum(map(len, sentences))


def _kept_for_next(sentences: Sequence[list[str]], room: int) -> list[list[str]]:
    kept: list[list[str]] = []
    for sentence in reversed(sentences[1:]):
        if _length(kept) + len(sentence) > room:
            break
        kept.insert(0, sentence)
    return kept


class PassageIndex:
    """Passages ranked by BM25 (`retrieval.Index`).

    Args:
      passages: at least one.
    """

    def __init__(self, passages: Sequence[Passage]) -> None:
        self.passages = list(passages)
        self._index = Index([passage.text for passage in passages])

    def search(self, question: str, count: int) -> list[Passage]:
        """The best passages, the best first; only such as share a word with the question."""
        return [self.passages[place] for place, _ in self._index.places(question, count)]

    def save(self, folder: Path) -> None:
        """Writes the passages, a line each."""
        files.write_lines(folder / _FILE, map(dataclasses.asdict, self.passages))

    @classmethod
    def load(cls, folder: Path) -> "PassageIndex":
        """The index that `save` wrote.

        Raises:
          UserError: there is none, or a line is not what `save` wrote.
        """
        file = folder / _FILE
        if not files.is_file(file):
            raise UserError(f"{folder}: no index ({_FILE}) here: make one with --documents")
        passages = []
        for number, fields in enumerate(files.read_lines(file, remedy=_ANEW), start=1):
            try:
                passages.append(Passage(**fields))
            except TypeError:
                raise UserError(f"{file}:{number}: not a passage: {_ANEW}") from None
        if not passages:
            raise UserError(f"{file}: holds no passage: {_ANEW}")
        return cls(passages)


def numbered_prompt(question: str, passages: Sequence[Passage], instruction: str = "") -> str:
    """The user's message: an instruction, passages numbered from 1, the question; each on its own line."""
    numbered = [f"[{number}] {passage.text}" for number, passage in enumerate(passages, start=1)]
    return "\n".join([*([instruction] if instruction else []), *numbered, question])


def read_answer(text: str, count: int) -> Answer:
    """An answer that names its sources as `[1]`.

    Args:
      count: of the passages that it was given.
    """
    numbers = list(dict.fromkeys(int(number) for number in _CITATION.findall(text)))
    real = tuple(number - 1 for number in numbers if 1 <= number <= count)
    return Answer(_CITATION.sub("", text).strip(), real, len(numbers) - len(real))
