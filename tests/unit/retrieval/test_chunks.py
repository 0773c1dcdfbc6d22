"""Documents in passages, an index on disk, numbered prompts and cited answers."""

import itertools

import numpy as np
import pytest
from hypothesis import given, strategies as st

from rlhf_jax.core.errors import UserError
from rlhf_jax.retrieval.bm25 import Index
from rlhf_jax.tool_use import Chunk, RetrievalIndex, numbered_prompt, read_answer, split_document

_LENGTHS = st.lists(st.integers(1, 9), max_size=8)


def numbered_words(lengths):
    """Sentences of these lengths, whose words are 0, 1, 2, ..."""
    ends = np.cumsum([0, *lengths])
    sentences = [
        " ".join(map(str, range(start, end))) + "." for start, end in itertools.pairwise(ends.tolist())
    ]
    return " ".join(sentences)


def numbers(chunk):
    return [int(word.strip(".")) for word in chunk.text.split()]


@given(_LENGTHS, st.integers(1, 7))
def test_every_word_stands_in_one_passage(lengths, words):
    chunks = split_document(numbered_words(lengths), "notes", chunk_size=words)
    assert [number for chunk in chunks for number in numbers(chunk)] == list(range(sum(lengths)))
    assert all(0 < len(numbers(chunk)) <= words for chunk in chunks)
    assert [chunk.source for chunk in chunks] == [f"notes#{n + 1}" for n in range(len(chunks))]


@given(_LENGTHS, st.integers(1, 9), st.data())
def test_overlap_repeats_the_end_and_loses_nothing(lengths, words, data):
    overlap = data.draw(st.integers(0, words - 1))
    chunks = split_document(numbered_words(lengths), "notes", chunk_size=words, chunk_overlap=overlap)
    done = 0
    for chunk in chunks:
        found = numbers(chunk)
        assert found == list(range(found[0], found[0] + len(found)))
        assert len(found) <= words
        assert done - overlap <= found[0] <= done <= found[-1]
        done = found[-1] + 1
    assert done == sum(lengths)


def test_sentences_stay_whole():
    text = "One two three. Four five. Six!\n\nSeven eight nine ten eleven twelve."
    pieces = [chunk.text for chunk in split_document(text, "a", chunk_size=5)]
    assert pieces == ["One two three. Four five.", "Six!", "Seven eight nine ten eleven", "twelve."]
    overlapping = [chunk.text for chunk in split_document(text, "a", chunk_size=5, chunk_overlap=2)]
    assert overlapping[:2] == ["One two three. Four five.", "Four five. Six!"]


def test_an_overlap_must_leave_room():
    with pytest.raises(ValueError, match="chunk_overlap 4 is not from 0 to below chunk_size 4"):
        split_document("a b", "a", chunk_size=4, chunk_overlap=4)


PASSAGES = [
    Chunk("the cat sat on the mat", "cats#1"),
    Chunk("a dog ate", "dogs#1"),
    Chunk("ein Hund \u2028 aß", "dogs#2"),
]


def test_an_index_on_disk_is_the_index(tmp_path):
    RetrievalIndex(PASSAGES).save(tmp_path / "index")
    loaded = RetrievalIndex.load(tmp_path / "index")
    assert loaded.chunks == PASSAGES
    for question in ("what did the dog eat", "cat mat", "hund", "nothing of that"):
        found = loaded.search(question, 2)
        assert found == RetrievalIndex(PASSAGES).search(question, 2)
        texts = [text for _, text in Index([chunk.text for chunk in PASSAGES]).search(question, 2)]
        assert [chunk.text for chunk in found] == texts


def test_an_index_that_is_none(tmp_path):
    with pytest.raises(UserError, match="no index"):
        RetrievalIndex.load(tmp_path)
    RetrievalIndex(PASSAGES).save(tmp_path)
    with (tmp_path / "passages.jsonl").open("a") as file:
        file.write('{"text": "half\n')
    with pytest.raises(UserError, match=r"passages\.jsonl:4: not JSON .*: make the index anew"):
        RetrievalIndex.load(tmp_path)


def test_what_the_model_reads():
    shown = numbered_prompt("who ate?", PASSAGES[:2], "Cite.")
    assert shown == "Cite.\n[1] the cat sat on the mat\n[2] a dog ate\nwho ate?"
    assert numbered_prompt("who ate?", []) == "who ate?"


@pytest.mark.parametrize(
    ("text", "answer", "cited", "hallucinated_citations"),
    [
        ("a dog [2]", "a dog", (1,), 0),
        ("a dog [2][1] or so [2]", "a dog or so", (1, 0), 0),
        ("a dog", "a dog", (), 0),
        ("a dog [0] [3] [999]", "a dog", (), 3),
        ("[1]", "", (0,), 0),
        ("a[i] [x] [1", "a[i] [x] [1", (), 0),
    ],
)
def test_answers_and_their_sources(text, answer, cited, hallucinated_citations):
    read = read_answer(text, 2)
    assert (read.text, read.cited, read.hallucinated_citations) == (answer, cited, hallucinated_citations)
