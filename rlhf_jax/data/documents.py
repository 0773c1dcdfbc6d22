"""Plain text for pre-training: documents, fill-in-the-middle, and rows that are full of tokens."""

import bisect
import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.files import Path, PathLike
from rlhf_jax.core.types import Bool, Int, PRNGKeyArray, Sequences
from rlhf_jax.data.sources import Row, read_rows
from rlhf_jax.data.tokenizers import Tokenizer

PREFIX_MARK, SUFFIX_MARK, MIDDLE_MARK = "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"
FILL_MARKS = (PREFIX_MARK, SUFFIX_MARK, MIDDLE_MARK)
Order = Literal["psm", "spm"]


@dataclasses.dataclass(frozen=True)
class Document:
    """A text, and where it came from."""

    text: str
    where: str


@dataclasses.dataclass(frozen=True)
class TokenRun:
    """A document, or a part of one, as tokens.

    Attributes:
      ids: the start, the text, and the end where it is the document's.
      mask: True for what is to be predicted: all but the start.
      where: the document.
    """

    ids: Int[np.ndarray, " T"]
    mask: Bool[np.ndarray, " T"]
    where: str


@dataclasses.dataclass(frozen=True)
class FillInTheMiddle:
    """Fill-in-the-middle rates (Bavarian et al. 2022).

    Attributes:
      rate: share of the pieces that are rearranged.
      spm_rate: of these, the share in which the suffix stands first.
      chunk: tokens of a piece; 0 for whole documents.
    """

    rate: float = 0.5
    spm_rate: float = 0.5
    chunk: int = 0


# Reading -------------------------------------------------------------------------------------------


def read_documents(spec: PathLike, *, separator: str = "") -> list[Document]:
    """Documents of text files, or of rows with a field `text`.

    Args:
      spec: a .txt file, a folder of them, or what `sources.read_rows` takes.
      separator: what stands between documents within a text file; empty where each file is one. Whitespace
        around a document is dropped then, and so are documents of nothing else.

    Raises:
      UserError: nothing to read, text that is not UTF-8, or a row without `text`.
    """
    path = files.as_path(spec)
    is_folder = files.is_folder(path)
    found = files.list_folder(path) if is_folder else [path]
    texts = [file for file in found if file.suffix.lower() == ".txt"]
    if is_folder and not texts:
        raise UserError(f"{path}: the folder holds no .txt file; name a file, or put text files into it")
    if texts:
        documents = [document for file in texts for document in _read_text(file, separator)]
    else:
        documents = documents_of(read_rows(spec))
    documents = [document for document in documents if document.text]
    if not documents:
        raise UserError(f"{spec}: there is no text; give data with some")
    return documents


def documents_of(rows: Sequence[Row]) -> list[Document]:
    """Documents of rows with a field `text`.

    Raises:
      UserError: a row without it.
    """
    documents = []
    for row in rows:
        text = row.fields.get("text")
        if not isinstance(text, str):
            present = ", ".join(sorted(row.fields)) or "none"
            raise UserError(f"{row.where}: the row has no field 'text' of text (it has: {present})")
        documents.append(Document(text, row.where))
    return documents


def _read_text(path: Path, separator: str) -> list[Document]:
    try:
        text = files.read_text(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
    if not separator:
        return [Document(text, str(path))]
    parts = [part.strip() for part in text.split(separator)]
    return [Document(part, f"{path}:document {number}") for number, part in enumerate(parts, 1) if part]


def hold_out(documents: Sequence[Document], share: float) -> tuple[list[Document], list[Document]]:
    """(all but the last `share` of the characters, the rest); at most one document is cut in two."""
    room = round((1 - share) * sum(len(document.text) for document in documents))
    kept: list[Document] = []
    rest: list[Document] = []
    for document in documents:
        here = min(max(room, 0), len(document.text))
        room -= len(document.text)
        for part, side in ((document.text[:here], kept), (document.text[here:], rest)):
            if part:
                side.append(dataclasses.replace(document, text=part))
    return kept, rest


# Fill in the middle --------------------------------------------------------------------------------


def fill_in_the_middle(
    tokenizer: Tokenizer, text: str, cuts: tuple[int, int], order: Order = "psm"
) -> list[int]:
    """A text with its middle last, so that it is written with both sides in view (Bavarian et al. 2022).

        psm    PREFIX prefix SUFFIX suffix MIDDLE middle
        spm    PREFIX SUFFIX suffix MIDDLE prefix middle

    The second order is the one in which prefix and middle stand together, as they are typed. Texts are cut
    between characters and each part is encoded by itself, so that a hole may begin within what would have
    been one token.

    Args:
      tokenizer: has the three marks as special tokens (`Tokenizer.with_special`).
      cuts: index of the middle's first character, and of the first behind it.
    """
    low, high = cuts
    prefix, middle, suffix = (tokenizer.encode(part) for part in (text[:low], text[low:high], text[high:]))
    marks = [tokenizer.special_tokens[mark] for mark in FILL_MARKS]
    if order == "psm":
        return [marks[0], *prefix, marks[1], *suffix, marks[2], *middle]
    return [marks[0], marks[1], *suffix, marks[2], *prefix, *middle]


def start_id(tokenizer: Tokenizer) -> int:
    """Beginning-of-sequence id of a text: the token that opens texts, or else the one that ends them."""
    return tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id


def token_runs(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    fill: FillInTheMiddle = FillInTheMiddle(rate=0.0),
    key: PRNGKeyArray | None = None,
) -> list[TokenRun]:
    """Documents as tokens, some of them, or of their pieces, rearranged.

    Of a document in pieces, neighbours that are left as they are stay together; every rearranged piece is a
    run of its own, with start and end.

    Args:
      key: decides which pieces are rearranged, where they are cut, and in which order they stand.

    Raises:
      UserError: a character that the tokenizer does not know.
    """
    pieces = [_pieces(document, tokenizer, fill.chunk) for document in documents]
    count = sum(map(len, pieces))
    draws = np.ones((count, 4))
    if fill.rate and key is not None:
        draws = np.asarray(jax.random.uniform(key, (count, 4)), np.float64)
    start, end, runs, number = start_id(tokenizer), tokenizer.eos_id, [], 0

    def add(ids: Sequence[int], where: str) -> None:
        mask = np.ones(len(ids), np.bool_)
        mask[0] = False
        runs.append(TokenRun(np.asarray(ids, np.int32), mask, where))

    for document, parts in zip(documents, pieces, strict=True):
        open_run: list[int] = [start]
        for text, ids in parts:
            rearranged, spm, *cuts = draws[number]
            number += 1
            if rearranged >= fill.rate:
                open_run += ids
                continue
            if len(open_run) > 1:
                add(open_run, document.where)
                open_run = [start]
            low, high = sorted(int(cut * (len(text) + 1)) for cut in cuts)
            order: Order = "spm" if spm < fill.spm_rate else "psm"
            add([start, *fill_in_the_middle(tokenizer, text, (low, high), order), end], document.where)
        if len(open_run) > 1:
            add([*open_run, end], document.where)
    return runs


def _pieces(document: Document, tokenizer: Tokenizer, chunk: int) -> list[tuple[str, list[int]]]:
    """The document's text with its tokens, whole or in pieces of about `chunk` tokens."""
    try:
        ids, starts = tokenizer.encode_with_starts(document.text)
    except UserError as error:
        raise UserError(f"{document.where}: {error}") from None
    if not chunk:
        return [(document.text, ids)]
    # A character of several tokens is not torn: pieces end where one begins.
    cuts = [0, *sorted(set(starts[chunk::chunk]) - {0}), len(document.text)]
    places = [bisect.bisect_left(starts, cut) for cut in cuts]
    sides = zip(cuts[:-1], cuts[1:], places[:-1], places[1:], strict=True)
    return [(document.text[low:high], ids[first:last]) for low, high, first, last in sides]


# Rows ----------------------------------------------------------------------------------------------


def full_rows(runs: Sequence[TokenRun], length: int, *, apart: bool = False) -> Sequences:
    """Runs of tokens one after the other, cut into rows of `length`; only the last row may have padding.

    A row begins with the last token of the row before, which it does not count again: so every token is
    predicted exactly once, from all that stands before it in its row.

    Args:
      apart: attention stays within a run, whose positions begin at 0 in each row; else a row is one segment
        and what stands before a run is seen from it.

    Returns:
      Sequences of NumPy arrays, [rows needed, length].

    Raises:
      UserError: rows of fewer than two tokens, or nothing to put into them.
    """
    if length < 2:
        raise UserError(f"rows of {length} tokens predict nothing; give a length of at least 2")
    if not runs:
        raise UserError("there are no texts to put into rows; give at least one")
    ids, counted = (np.concatenate([getattr(run, name) for run in runs]) for name in ("ids", "mask"))
    number = np.repeat(np.arange(len(runs)), [len(run.ids) for run in runs])
    rows = max(-(-(len(ids) - 1) // (length - 1)), 1)
    place = np.arange(rows)[:, None] * (length - 1) + np.arange(length)
    inside = place < len(ids)
    place = np.minimum(place, len(ids) - 1)
    column = np.broadcast_to(np.arange(length), place.shape)
    segment, first = np.ones_like(place), np.zeros_like(place)
    if apart:
        segment = number[place] - number[place][:, :1] + 1
        begins = np.diff(segment, axis=1, prepend=0) > 0
        first = np.maximum.accumulate(np.where(begins, column, 0), axis=1)
    mask = counted[place] & inside & (column > 0)

    def filled(values: np.ndarray) -> np.ndarray:
        return np.where(inside, values, 0).astype(np.int32)

    return Sequences(filled(ids[place]), filled(column - first), filled(segment), mask)  # pyright: ignore[reportArgumentType] (of NumPy, as those of `packing`)
