"""Every rule of the cleaning against sets and loops."""

import itertools

import numpy as np
import pytest

from rlhf_jax.core.errors import UserError
from rlhf_jax.data.cleaning import decontamination, dedup, rules
from rlhf_jax.data.cleaning.rules import Limits, RowText
from rlhf_jax.data.pairs import solution_rows
from rlhf_jax.data.sources import Row


def row(number=1, **fields):
    return Row(fields, f"data.jsonl:{number}")


def qa(prompt, answer, number=1):
    return RowText(row(number, question=prompt, answer=answer), prompt, answer)


# Format ----------------------------------------------------------------------------------------------


def test_all_kinds_of_rows_are_read():
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    rows = [
        row(question="q", answer="a"),
        row(prompt="p", completion="c"),
        row(messages=turns),
        row(prompt="p", chosen="good", rejected="bad"),
        row(question="only a prompt"),
    ]
    texts, dropped = rules.readable(rows)
    assert not dropped
    said = [(item.prompt, item.answer) for item in texts]
    assert said == [("q", "a"), ("p", "c"), ("hi", "hello"), ("p", "good\nbad"), ("only a prompt", "")]


def test_rows_that_no_script_would_take_are_dropped_with_the_reason():
    rows = [row(1, question="q", answer=" "), row(2, words="w"), row(3, prompt="p", chosen="x", rejected="x")]
    texts, dropped = rules.readable(rows)
    assert not texts
    assert [item.reason for item in dropped] == ["format"] * 3
    for item, said in zip(dropped, ("'answer' is empty", "none of the fields", "the same"), strict=True):
        assert said in item.detail


# Limits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "limits", "reason"),
    [
        (qa("q", "a"), Limits(shortest_prompt=2), "too short"),
        (qa("q", "w" * 41), Limits(longest_answer=40), "too long"),
        (qa("где", "там"), Limits(script="LATIN"), "other script"),
        (
            qa("Wie viele sind es?", "Das ist nicht so, und der ist es auch."),
            Limits(language="en"),
            "other language",
        ),
        (qa("q", "one two three four " * 9), Limits(), "repetitive"),
        (qa("q", "?!?!?!a"), Limits(), "symbols"),
        (qa("q", "torn \ufffd"), Limits(), "broken characters"),
        (qa("q", "As an AI language model, no."), Limits(banned=("as an ai",)), "banned words"),
    ],
)
def test_each_limit_drops_what_breaks_it_and_nothing_else(item, limits, reason):
    fine = qa("How many are there of them?", "There are 17 of them.", 2)
    kept, dropped = rules.drop_faulty([item, fine], limits)
    assert kept == [fine]
    assert [(d.row, d.reason) for d in dropped] == [(item.row, reason)]
    assert dropped[0].detail


@pytest.mark.parametrize(
    "said",
    [
        "Anna köpte tolv äpplen på torget och gav sedan hälften till sin bror, som åt upp tre av dem samma "
        "kväll medan hon räknade dem som var kvar i korgen.",
        "Mehmet bugün üç elma yedi, kardeşi Ayşe ise iki elma ve bir üzüm yedi; şimdi evde beş elma, on üzüm "
        "ve bir de şeftali var.",
        "Анна купила двенадцать яблок и отдала половину брату.",
        "アンナはりんごを十二個買って、半分を弟にあげました。",
        "安娜买了十二个苹果又把一半给了弟弟。",
    ],
    ids=["Swedish", "Turkish", "Russian", "Japanese", "Chinese"],
)
def test_languages_that_are_in_no_table_are_not_taken_for_english(said):
    kept, dropped = rules.drop_faulty([qa("?", said)], Limits(language="en"))
    assert not kept
    assert [item.reason for item in dropped] == ["other language"]


@pytest.mark.parametrize(
    "said",
    [
        "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May.",
        "Buy 12 apples, eat 3, give 4 away.",
        "5+4=9",
        r"\frac{x}{y} = \sqrt{2}, x = 3y",
    ],
)
def test_what_is_english_or_no_language_is_kept_or_counted(said):
    kept, _ = rules.drop_faulty([qa("?", said)], Limits(language="en"))
    assert kept
    _, dropped = rules.drop_faulty([qa("?", said)], Limits(language="en", unknown_language="drop"))
    assert [item.reason for item in dropped] == ([] if "her friends" in said else ["unknown language"])


def test_limits_that_make_no_sense_are_refused():
    for fields, said in (
        ({"symbol_share": 2.0}, "symbol_share 2 is out of range: give a number from 0 to 1"),
        ({"language": "xx"}, "not known"),
        ({"banned": ("(",)}, "no regular expression"),
    ):
        with pytest.raises(UserError, match=said):
            Limits(**fields)


# Duplicates -------------------------------------------------------------------------------------------


def test_the_first_of_equal_texts_stays():
    texts = [qa("a  b", "c", 1), qa("a b", "c", 2), qa("a b", "d", 3), qa("5+4", "c", 4), qa("5-4", "c", 5)]
    kept, dropped = rules.drop_exact_duplicates(texts)
    assert [item.row.where for item in dropped] == ["data.jsonl:2"]
    assert "like data.jsonl:1" in dropped[0].detail
    assert len(rules.drop_exact_duplicates(kept, by="prompt")[1]) == 1


@pytest.fixture(scope="module")
def corpus():
    """Sixty texts, of which some are others with words changed."""
    rng = np.random.default_rng(0)
    vocabulary = [f"w{number}" for number in range(400)]
    texts = [rng.choice(vocabulary, 40).tolist() for _ in range(40)]
    for source in range(20):
        changed = list(texts[source])
        for place in rng.choice(40, source // 2, replace=False):
            changed[place] = str(rng.choice(vocabulary))
        texts.append(changed)
    return [" ".join(text) for text in texts]


def shingles(text, size):
    units = text.split()
    return {tuple(units[i : i + size]) for i in range(len(units) - size + 1)}


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_near_duplicates_are_those_of_a_loop_over_all_pairs(corpus, threshold):
    sets, kept, expected = [shingles(text, 3) for text in corpus], [], {}
    for place, found in enumerate(sets):
        alike = {other: len(found & sets[other]) / len(found | sets[other]) for other in kept}
        best = max(alike, key=lambda other: (alike[other], -other), default=None)
        if best is not None and alike[best] >= threshold:
            expected[place] = (best, alike[best])
        else:
            kept.append(place)
    found = dedup.near_duplicates(corpus, jaccard_threshold=threshold)
    assert 3 < len(expected) < 20
    assert {r.place: r.first for r in found} == {place: first for place, (first, _) in expected.items()}
    for repeat in found:
        assert repeat.similarity == pytest.approx(expected[repeat.place][1])
    assert found == dedup.near_duplicates(corpus, jaccard_threshold=threshold)


def test_signatures_agree_as_often_as_sets_overlap():
    """P(min h(A) = min h(B)) = J(A, B): over many hash functions, within four standard errors."""
    first, second = (dedup.shingle_set(" ".join(map(str, range(a, a + 60))), 1) for a in (0, 20))
    multipliers, shifts = dedup._hash_functions(4096, 3)
    agree = np.mean(
        np.equal(
            *(np.min((x[:, None] * multipliers + shifts) >> np.uint64(32), axis=0) for x in (first, second))
        )
    )
    likeness = dedup.jaccard(first, second)
    assert likeness == 0.5
    assert abs(agree - likeness) < 4 * np.sqrt(likeness * (1 - likeness) / 4096)


def test_bands_find_a_pair_at_the_threshold():
    for threshold, hashes in itertools.product((0.3, 0.5, 0.8, 0.95), (64, 128)):
        rows = dedup.band_rows(threshold, hashes)
        assert 1 - (1 - threshold**rows) ** (hashes // rows) >= 0.98
    assert dedup.band_rows(0.8, 128) > dedup.band_rows(0.5, 128) >= 1


def test_signs_of_arithmetic_keep_sums_apart():
    assert not dedup.near_duplicates(["5+4=?", "5-4=?", "5*4=?"])
    with pytest.raises(UserError, match="threshold 0"):
        dedup.near_duplicates(["a"], jaccard_threshold=0)


# Decontamination --------------------------------------------------------------------------------------


def naive_share(text, question, size):
    """The share of a question's words in runs that the text has too, place by place."""
    runs = shingles(text, size)
    units = question.split()
    covered = {
        place
        for start in range(len(units) - size + 1)
        if tuple(units[start : start + size]) in runs
        for place in range(start, start + size)
    }
    return len(covered) / len(units)


@pytest.mark.parametrize(("size", "least_share"), [(3, 0.0), (3, 0.3), (5, 0.5)])
def test_overlaps_are_those_of_a_loop(corpus, size, least_share):
    rng = np.random.default_rng(1)
    questions = []
    for text in corpus[:8]:
        units = text.split()
        start = int(rng.integers(20))
        questions.append(" ".join([*units[start : start + int(rng.integers(4, 15))], *map(str, range(9))]))
    expected = {}
    for place, text in enumerate(corpus):
        shares = [naive_share(text, question, size) for question in questions]
        if max(shares) > least_share:
            expected[place] = (shares.index(max(shares)), max(shares))
    found = decontamination.find_ngram_overlaps(corpus, questions, size=size, least_share=least_share)
    assert 3 < len(expected) < len(corpus)
    assert {o.place: (o.question, pytest.approx(o.share)) for o in found} == expected


def test_case_and_punctuation_hide_nothing_and_phrases_count_for_nothing():
    question = "Janet sells 16 eggs a day; how many in a week?"
    texts = ["JANET sells 16 eggs, a day... How MANY in a week", "something else altogether"]
    assert [o.place for o in decontamination.find_ngram_overlaps(texts, [question], size=8)] == [0]
    assert decontamination.find_ngram_overlaps(texts[:1] * 3, [question], size=8, most_rows=2) == []
    assert len(decontamination.find_ngram_overlaps(texts[:1] * 3, [question], size=8, most_rows=3)) == 3


def test_short_questions_are_only_themselves():
    found = decontamination.find_ngram_overlaps(
        ["what is 2 + 2", "what is 2 2", "so what is 2 + 2 now"], ["What is 2+2?"], size=8
    )
    assert [o.place for o in found] == [0, 1]
    assert decontamination.find_ngram_overlaps(["a b c"], [], size=2) == []
    with pytest.raises(UserError, match="at least 1"):
        decontamination.find_ngram_overlaps([], [], size=0)


def test_rows_are_dropped_by_what_their_prompt_or_answer_gives_away():
    asked = "if a train leaves at noon and travels for three hours when does it arrive"
    texts = [qa("x", f"They say {asked}.", 1), qa("y", "fine", 2)]
    kept, dropped = rules.drop_contaminated(texts, [qa(asked, "at three", 7)])
    assert kept == [texts[1]]
    assert (dropped[0].reason, dropped[0].detail) == ("contaminated", "100% of data.jsonl:7")


def test_solutions_become_rows_of_their_own():
    given = row(
        3, question="q", one={"solution": "s", "is_correct": True}, two={"solution": "t", "is_correct": False}
    )
    made = solution_rows([given])
    assert [r.fields["answer"] for r in made] == ["s", "t"]
    assert made[1].fields == {"question": "q", "answer": "t", "is_correct": False, "writer": "two"}
    assert made[1].where == "data.jsonl:3 (two)"
