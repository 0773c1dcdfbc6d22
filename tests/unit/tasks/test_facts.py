"""The embedded people."""

import pytest

from rlhf_jax.tasks import facts


def test_a_document_answers_every_question_about_its_person():
    for person in facts.people("heldout", 20, 0):
        answers = [answer for _, answer in person.questions()]
        assert person.document == ". ".join(answers) + "."
        for (question, answer), value in zip(person.questions(), person.values, strict=True):
            assert person.name in question
            assert answer.startswith(person.name)
            assert answer.endswith(f" {value}")


def test_nobody_is_in_both_splits():
    names = {
        split: {person.name for person in facts.people(split, facts.num_people(split), 1)}
        for split in ("train", "heldout")
    }
    assert not names["train"] & names["heldout"]
    assert (len(names["train"]), len(names["heldout"])) == (896, 128)


def test_what_is_true_depends_on_the_seed_alone():
    assert facts.people("train", 5, 3) == facts.people("train", 5, 3)
    worlds = [
        {person.name: person.values for person in facts.people("heldout", 128, seed)} for seed in (0, 1)
    ]
    assert sum(worlds[0][name] == worlds[1][name] for name in worlds[0]) < 5


def test_more_people_than_there_are():
    with pytest.raises(ValueError, match="heldout has 128 people, not 129"):
        facts.people("heldout", 129, 0)


def test_the_tokenizer_writes_it_in_few_tokens():
    tokenizer = facts.facts_tokenizer()
    for person in facts.people("train", 20, 0):
        for text in (person.document, *(question for question, _ in person.questions()), "[12] {unknown}\n"):
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
        assert len(tokenizer.encode(person.name)) == 5
        assert {len(tokenizer.encode(value)) for value in person.values} == {2}
