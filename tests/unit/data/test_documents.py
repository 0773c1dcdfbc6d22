"""Plain text to full rows: nothing lost, nothing twice, and middles that can be put back."""

import json

import jax
import numpy as np
import pytest

from rlhf_jax.core.errors import UserError
from rlhf_jax.data.documents import (
    FILL_MARKS,
    Document,
    FillInTheMiddle,
    fill_in_the_middle,
    full_rows,
    hold_out,
    read_documents,
    token_runs,
)
from rlhf_jax.data.tokenizers import byte_tokenizer, train_bpe

TEXTS = ["To be, or not to be: that is the question.", "ä ö ü", "Ay.", "x" * 50]
DOCUMENTS = [Document(text, f"here:{number}") for number, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer().with_special(FILL_MARKS)


def restored(tokenizer, ids):
    """The text before its middle was put last, whichever order it stands in."""
    marks = [tokenizer.special_tokens[mark] for mark in FILL_MARKS]
    prefix_at, suffix_at, middle_at = (ids.index(mark) for mark in marks)
    assert prefix_at == 0
    suffix, rest = ids[suffix_at + 1 : middle_at], ids[middle_at + 1 :]
    if suffix_at > 1:  # psm, with a prefix
        return tokenizer.decode(ids[1:suffix_at] + rest + suffix)
    return tokenizer.decode(rest + suffix)


@pytest.mark.parametrize("order", ["psm", "spm"])
def test_the_middle_can_be_put_back(tokenizer, order):
    for text in TEXTS:
        for cuts in ((0, 0), (0, len(text)), (1, 3), (2, 2), (len(text), len(text))):
            assert restored(tokenizer, fill_in_the_middle(tokenizer, text, cuts, order)) == text


def test_shares_of_what_is_rearranged(tokenizer):
    many = [Document("abcdefgh", str(number)) for number in range(2000)]
    runs = token_runs(many, tokenizer, FillInTheMiddle(0.5, 0.25), jax.random.key(0))
    marks = [tokenizer.special_tokens[mark] for mark in FILL_MARKS]
    moved = [run.ids.tolist() for run in runs if marks[0] in run.ids]
    psm = [ids for ids in moved if ids[2] != marks[1]]
    assert abs(len(moved) / len(runs) - 0.5) < 0.05
    # Of the psm ones, those with an empty prefix look like spm: 1 - (8/9)^2 of two uniform cuts.
    assert abs(len(psm) / len(moved) - 0.75 * (8 / 9) ** 2) < 0.05
    again = token_runs(many, tokenizer, FillInTheMiddle(0.5, 0.25), jax.random.key(0))
    other = token_runs(many, tokenizer, FillInTheMiddle(0.5, 0.25), jax.random.key(1))
    same = [np.array_equal(a.ids, b.ids) for a, b in zip(runs, again, strict=True)]
    assert all(same)
    assert not all(np.array_equal(a.ids, b.ids) for a, b in zip(runs, other, strict=True))


@pytest.mark.parametrize("make", [lambda: byte_tokenizer(), lambda: train_bpe(TEXTS, 270)])
def test_pieces_of_documents_hold_all_of_the_text(make):
    tokenizer = make().with_special(FILL_MARKS)
    for share in (0.0, 0.5, 1.0):
        runs = token_runs(DOCUMENTS, tokenizer, FillInTheMiddle(share, 0.0, chunk=7), jax.random.key(3))
        parts = {document.where: "" for document in DOCUMENTS}
        for run in runs:
            assert not run.mask[0]
            assert run.mask[1:].all()
            ids = [i for i in run.ids.tolist() if i != tokenizer.eos_id]
            is_moved = ids[0] == tokenizer.special_tokens[FILL_MARKS[0]]
            parts[run.where] += restored(tokenizer, ids) if is_moved else tokenizer.decode(ids)
        assert list(parts.values()) == TEXTS


@pytest.mark.parametrize("apart", [False, True])
def test_every_token_is_predicted_once(tokenizer, apart):
    runs = token_runs(DOCUMENTS, tokenizer)
    rows = full_rows(runs, 16, apart=apart)
    stream = np.concatenate([run.ids for run in runs])
    starts = np.concatenate([~run.mask for run in runs])
    np.testing.assert_array_equal(rows.tokens[rows.mask], stream[~starts])
    padding = rows.segment_ids == 0
    assert not padding[:-1].any()
    assert not (rows.mask & padding).any()
    for row in range(len(rows.tokens)):
        for segment in set(rows.segment_ids[row]) - {0}:
            inside = rows.segment_ids[row] == segment
            np.testing.assert_array_equal(rows.positions[row][inside], np.arange(inside.sum()))
            assert not rows.mask[row][np.argmax(inside)]  # what comes first is read, not predicted
    assert (rows.segment_ids.max() > 1) == apart


def test_held_out_text_is_the_rest(tokenizer):
    kept, rest = hold_out(DOCUMENTS, 0.6)
    assert "".join(d.text for d in kept + rest) == "".join(TEXTS)
    assert len("".join(d.text for d in rest)) == round(0.6 * len("".join(TEXTS)))


def test_reading(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\n\n\n three ")
    (tmp_path / "b.txt").write_text("four")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "five"}) + "\n")
    assert [d.text for d in read_documents(tmp_path)] == ["one\n\ntwo\n\n\n\n three ", "four"]
    split = read_documents(tmp_path / "a.txt", separator="\n\n")
    assert [d.text for d in split] == ["one", "two", "three"]
    assert read_documents(tmp_path / "rows.jsonl") == [Document("five", f"{tmp_path / 'rows.jsonl'}:1")]


def test_bad_text_is_one_sentence(tmp_path, tokenizer):
    (tmp_path / "bad.txt").write_bytes(b"ab\xff")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "x"}\n')
    (tmp_path / "folder").mkdir()
    for name, words in [
        ("bad.txt", "byte 3 is not UTF-8"),
        ("empty.txt", "no text"),
        ("rows.jsonl", "it has: prompt"),
        ("folder", "holds no .txt file"),
        ("none.txt", "cannot be read"),
    ]:
        with pytest.raises(UserError, match=words):
            read_documents(tmp_path / name)
    with pytest.raises(UserError, match="at least 2"):
        full_rows(token_runs(DOCUMENTS, tokenizer), 1)
