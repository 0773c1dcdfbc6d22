"""Retrieval-augmented generation around the model: documents cut into chunks, an index of them on disk,
prompts with numbered chunks, and the sources that an answer names.

Offline, once: `split_document`, `RetrievalIndex`, `save`. Online, for each question: `load`, `search`,
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
class Chunk:
    """A piece of a document.

    Attributes:
      text: what it says.
      source: the document, and the piece's number in it, from 1.
    """

    text: str
    source: str


@dataclasses.dataclass(frozen=True)
class CitedAnswer:
    """An answer apart from the sources that it names.

    Attributes:
      text: without the citations.
      cited: places, from 0, of the passages named, in the order named, each once.
      hallucinated_citations: citations of passages that were not there.
    """

    text: str
    cited: tuple[int, ...]
    hallucinated_citations: int


def split_document(text: str, source: str, *, chunk_size: int, chunk_overlap: int = 0) -> list[Chunk]:
    """A document in pieces of whole sentences.

    Args:
      chunk_size: words of a chunk at most; a longer sentence is cut.
      chunk_overlap: words of the end of a chunk, in whole sentences, that begin the next one too.

    Raises:
      ValueError: `chunk_overlap` is not below `chunk_size`, or that is not above 0.
    """
    if not 0 <= chunk_overlap < chunk_size:
        raise ValueError(f"chunk_overlap {chunk_overlap} is not from 0 to below chunk_size {chunk_size}")
    pieces: list[list[list[str]]] = [[]]
    for sentence in _sentences(text, chunk_size):
        if pieces[-1] and _length(pieces[-1]) + len(sentence) > chunk_size:
            pieces.append(_kept_for_next(pieces[-1], min(chunk_overlap, chunk_size - len(sentence))))
        pieces[-1].append(sentence)
    texts = [" ".join(word for sentence in piece for word in sentence) for piece in pieces]
    return [Chunk(text, f"{source}#{number}") for number, text in enumerate(texts, start=1) if text]


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


class RetrievalIndex:
    """Passages ranked by BM25 (`retrieval.Index`).

    Args:
      chunks: at least one.
    """

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self.chunks = list(chunks)
        self._index = Index([chunk.text for chunk in chunks])

    def search(self, question: str, count: int) -> list[Chunk]:
        """The best passages, the best first; only such as share a word with the question."""
        return [self.chunks[place] for place, _ in self._index.places(question, count)]

    def save(self, folder: Path) -> None:
        """Writes the passages, a line each."""
        files.write_lines(folder / _FILE, map(dataclasses.asdict, self.chunks))

    @classmethod
    def load(cls, folder: Path) -> "RetrievalIndex":
        """The index that `save` wrote.

        Raises:
          UserError: there is none, or a line is not what `save` wrote.
        """
        file = folder / _FILE
        if not files.is_file(file):
            raise UserError(f"{folder}: no index ({_FILE}) here: make one with --documents")
        chunks = []
        for number, fields in enumerate(files.read_lines(file, remedy=_ANEW), start=1):
            try:
                chunks.append(Chunk(**fields))
            except TypeError:
                raise UserError(f"{file}:{number}: not a passage: {_ANEW}") from None
        if not chunks:
            raise UserError(f"{file}: holds no passage: {_ANEW}")
        return cls(chunks)


def numbered_prompt(question: str, chunks: Sequence[Chunk], instruction: str = "") -> str:
    """The user's message: an instruction, passages numbered from 1, the question; each on its own line."""
    numbered = [f"[{number}] {chunk.text}" for number, chunk in enumerate(chunks, start=1)]
    return "\n".join([*([instruction] if instruction else []), *numbered, question])


def read_answer(text: str, count: int) -> CitedAnswer:
    """An answer that names its sources as `[1]`.

    Args:
      count: of the passages that it was given.
    """
    numbers = list(dict.fromkeys(int(number) for number in _CITATION.findall(text)))
    real = tuple(number - 1 for number in numbers if 1 <= number <= count)
    return CitedAnswer(_CITATION.sub("", text).strip(), real, len(numbers) - len(real))
