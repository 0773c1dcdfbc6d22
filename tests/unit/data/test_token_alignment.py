"""Two tokenizations of one text: spans of equal text, and the tokens that two vocabularies share."""

import numpy as np
import pytest

from rlhf_jax.data.token_alignment import align_positions, align_spans, matched_tokens, text_ends, token_texts
from rlhf_jax.data.tokenizers import Tokenizer, byte_tokenizer, character_tokenizer, train_bpe

BYTES = byte_tokenizer()
BPE = train_bpe(["the cat sat on the mat"] * 20, 290)
DIGITS = character_tokenizer("0123456789+= ", ["12", "+3"])


def sentencepiece(pieces):
    """Words with the space before them, which the decoder drops at the start of a text."""
    from tokenizers import Tokenizer as Backend, decoders, models, pre_tokenizers

    backend = Backend(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend, {"eos_token": "</s>"})


def texts_of(tokenizer, ids, spans):
    """What the tokens of each span decode to."""
    return [
        tokenizer.decode([i for i, s in zip(ids, spans, strict=True) if s == span])
        for span in range(max(spans, default=-1) + 1)
    ]


def test_spans_end_where_both_cut():
    text = "12+3=12"
    first, second = DIGITS.encode(text), BYTES.encode(text)
    spans = align_spans((DIGITS, first), (BYTES, second))
    assert [DIGITS.token(i) for i in first] == ["12", "+3", "=", "12"]
    assert spans == ([0, 1, 2, 3], [0, 0, 1, 1, 2, 3, 3])
    both = align_spans((BYTES, second), (DIGITS, first))
    assert both == spans[::-1]


@pytest.mark.parametrize("text", ["the cat sat", "on thé mat", "日本 the 🙂 mat", "", "\n\n  the"])
def test_spans_hold_the_same_text_and_all_of_it(text):
    ids = BPE.encode(text), BYTES.encode(text)
    spans = align_spans((BPE, ids[0]), (BYTES, ids[1]))
    found = [texts_of(side, *pair) for side, *pair in zip((BPE, BYTES), ids, spans, strict=True)]
    assert found[0] == found[1]
    assert "".join(found[0]) == text
    assert all(list(numbers) == sorted(numbers) for numbers in spans)
    # The shortest such spans: no cut of both is left out.
    ends = [{end for end in text_ends(side, i)[1] if end} for side, i in zip((BPE, BYTES), ids, strict=True)]
    assert len(found[0]) == len(ends[0] & ends[1])


def test_a_token_that_ends_within_a_character_ends_with_the_next():
    text, ends = text_ends(BYTES, BYTES.encode("aé!"))
    assert (text, ends) == ("aé!", [1, None, 2, 3])


def test_a_text_that_differs_is_aligned_up_to_there():
    first, second = BYTES.encode("12+4=7"), DIGITS.encode("12+3=7")
    assert align_spans((BYTES, first), (DIGITS, second)) == ([0, 0, -1, -1, -1, -1], [0, -1, -1, -1])
    # What was cut off on one side has no span on the other.
    assert align_spans((BYTES, first[:3]), (BYTES, first)) == ([0, 1, 2], [0, 1, 2, -1, -1, -1])


def test_tokens_that_are_no_text_never_fail():
    rng = np.random.default_rng(0)
    for _ in range(50):
        ids = rng.integers(BYTES.vocab_size, size=12).tolist()
        other = BPE.encode(BYTES.decode(ids))
        spans = align_spans((BYTES, ids), (BPE, other))
        assert (len(spans[0]), len(spans[1])) == (12, len(other))
        assert {*spans[0]} - {-1} == {*spans[1]} - {-1}


def test_positions_are_cut_to_the_shorter_side():
    assert align_positions(2, 4) == ([0, 1], [0, 1, -1, -1])
    assert align_positions(3, 0) == ([-1, -1, -1], [])


@pytest.mark.parametrize("tokenizer", [BYTES, BPE, DIGITS])
def test_a_vocabulary_matches_itself(tokenizer):
    first, second = matched_tokens(tokenizer, tokenizer)
    np.testing.assert_array_equal(first, np.arange(tokenizer.vocab_size))
    np.testing.assert_array_equal(second, first)


def test_tokens_match_by_their_text():
    spaced, space = "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}", "\N{LOWER ONE EIGHTH BLOCK}"
    words = sentencepiece([f"{space}the", "the", "a", f"{space}cat", "<0x0A>"])
    pairs = {words.token(i): BPE.token(j) for i, j in zip(*matched_tokens(words, BPE), strict=True)}
    assert BPE.encode(" the cat") == [BPE.backend.token_to_id(spaced + word) for word in ("the", "cat")]
    expected = {f"{space}the": f"{spaced}the", f"{space}cat": f"{spaced}cat", "a": "a", "</s>": "<|im_end|>"}
    assert {piece: pairs[piece] for piece in expected} == expected
    whole = BPE.backend.token_to_id("the")
    assert pairs.get("the") == (None if whole is None else "the")
    assert "<0x0A>" not in pairs


def test_each_token_is_matched_once():
    first, second = matched_tokens(BPE, BYTES)
    assert len({*first.tolist()}) == len(first) == len({*second.tolist()}) == BYTES.vocab_size


def test_texts_of_tokens_are_those_of_the_whole():
    assert token_texts(BYTES, BYTES.encode("aé!")) == ["a", "", "é", "!"]
    ids = BPE.encode("the cat sat")
    assert "".join(token_texts(BPE, [*ids, BPE.eos_id])) == "the cat sat"
    assert token_texts(BPE, [*ids, BPE.eos_id])[-1] == ""
    pieces = sentencepiece(["</s>", "▁a", "▁b"])
    assert token_texts(pieces, [1, 2, 1]) == ["a", " b", " a"]
