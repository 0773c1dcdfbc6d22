"""One text in the tokens of two tokenizers: which of them stand for the same part, and which are in both."""

from collections.abc import Sequence

import numpy as np

from rlhf_jax.core.types import Int
from rlhf_jax.data.tokenizers import Tokenizer


def text_ends(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, list[int | None]]:
    """The text of `ids`, and after how many of its characters each of them ends.

    None for a token that ends within a character, and for one without a text, such as a special token: the
    next one ends for both.
    """
    from tokenizers.decoders import DecodeStream

    stream, text, ends = DecodeStream(skip_special_tokens=True), "", []
    for index in ids:
        piece = stream.step(tokenizer.backend, int(index))
        text += piece or ""
        ends.append(len(text) if piece else None)
    return text, ends


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Texts that each of `ids` adds; empty for one that ends within a character, which the next one
    that does not brings, and for a special token.
    """
    text, ends = text_ends(tokenizer, ids)
    pieces, start = [], 0
    for end in ends:
        pieces.append("" if end is None else text[start:end])
        start = start if end is None else end
    return pieces


def align_spans(
    first: tuple[Tokenizer, Sequence[int]], second: tuple[Tokenizer, Sequence[int]]
) -> tuple[list[int], list[int]]:
    """Spans of tokens that decode to the same text: the shortest between places at which both tokenizers cut.

    Returns:
      The number of the span of each token, from 0, on either side; -1 for tokens behind the last place at
      which both cut, or behind which the texts differ.
    """
    (text, ends), (other_text, other_ends) = text_ends(*first), text_ends(*second)
    pairs = enumerate(zip(text, other_text, strict=False))
    same = next((place for place, (a, b) in pairs if a != b), min(len(text), len(other_text)))
    cuts = sorted({end for end in {*ends} & {*other_ends} if end is not None and end <= same})
    return _numbered(ends, cuts), _numbered(other_ends, cuts)


def _numbered(ends: Sequence[int | None], cuts: Sequence[int]) -> list[int]:
    numbers, span = [], 0
    for end in ends:
        numbers.append(span if span < len(cuts) else -1)
        span += span < len(cuts) and end == cuts[span]
    return numbers


def align_positions(first: int, second: int) -> tuple[list[int], list[int]]:
    """Token by token from the left, whatever they stand for; what is left of the longer side is -1 (ULD)."""
    shared = [*range(min(first, second))]
    return shared + [-1] * (first - len(shared)), shared + [-1] * (second - len(shared))


# Vocabularies ------------------------------------------------------------------------------------------


def matched_tokens(
    first: Tokenizer, second: Tokenizer
) -> tuple[Int[np.ndarray, " M"], Int[np.ndarray, " M"]]:
    """Ids of the tokens that both vocabularies have: of the same text within a sentence, spaces included, or
    special tokens of the same name; and their ends of turn, whatever they are called.

    Each id stands once at most; of tokens with one text those of the same spelling belong together.
    """
    sides = [_spellings(tokenizer) for tokenizer in (first, second)]
    pairs = {first.eos_id: second.eos_id}
    for parts in (3, 2):  # the spelling as well, then the text alone
        taken = {*pairs.values()}
        free: dict[tuple[str, ...], int] = {}
        for index, key in sides[1].items():
            if index not in taken:
                free.setdefault(key[:parts], index)
        for index, key in sides[0].items():
            if index not in pairs and key[:parts] in free:
                pairs[index] = free.pop(key[:parts])
    ids = np.array(sorted(pairs.items()), np.int64)
    return ids[:, 0], ids[:, 1]


def _spellings(tokenizer: Tokenizer) -> dict[int, tuple[str, str, str]]:
    """(kind, text, how the vocabulary writes it) of each token; the text behind a letter, so that a decoder
    which strips the space at the start of a text leaves it.
    """
    backend = tokenizer.backend
    pieces = {index: piece for piece, index in backend.get_vocab(with_added_tokens=True).items()}
    special = {*tokenizer.special_tokens.values()}
    plain = [index for index in sorted(pieces) if index not in special]
    alone = zip(plain, backend.decode_batch([[index] for index in plain]), strict=True)
    letter = [index for index, text in alone if len(text) == 1 and text.isalnum()][:1]
    skip = len(backend.decode(letter))
    found = {index: ("special", pieces[index], pieces[index]) for index in special}
    behind = backend.decode_batch([[*letter, index] for index in plain])
    for index, whole in zip(plain, behind, strict=True):
        piece, text = pieces[index], whole[skip:]
        # A part of a character has no text of its own, only a spelling.
        is_text = text and "\N{REPLACEMENT CHARACTER}" not in text
        found[index] = ("text", text, piece) if is_text else ("piece", piece, piece)
    return found
