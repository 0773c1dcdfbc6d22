import hashlib

import numpy as np
import pytest

from rlhf_jax.data.cleaning import text


def test_words_fold_forms_and_leave_punctuation_out():
    assert text.words("Don't pay 3.50, ﬁne?") == ["don", "t", "pay", "3", "50", "fine"]
    assert text.words("日本 is_it") == ["日", "本", "is", "it"]
    assert text.words("5-4=1", signs=True) == ["5", "-", "4", "=", "1"]


def test_runs_have_equal_numbers_where_their_words_are_equal_and_only_there():
    first, second = list("abcdabc"), list("xabc")
    numbers, others = text.run_hashes(first, 3), text.run_hashes(second, 3)
    assert len(numbers) == 5
    assert numbers[0] == numbers[4] == others[1]
    assert len(np.unique(numbers)) == 4
    assert len(text.run_hashes(first, 8)) == 0


def test_numbers_of_runs_are_the_same_in_every_process():
    number = int.from_bytes(hashlib.blake2b(b"a", digest_size=8).digest(), "big")
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        number = (number ^ (number >> shift)) * factor % 2**64
    assert int(text.run_hashes(["a"], 1)[0]) == number ^ (number >> 31)


def test_shares_of_a_text():
    assert text.repeated_share("a b c d a b c d") == pytest.approx(1 / 5)
    assert text.repeated_share("a b") == 0
    assert text.symbol_share("a+b= 1\n") == pytest.approx(2 / 7)
    assert text.script_share("abc где", "latin") == pytest.approx(1 / 2)


@pytest.mark.parametrize(
    ("said", "language"),
    [
        ("How many clips did she sell to her friends in April and in May?", "en"),
        ("Wie viele Bücher hat sie mit den Freunden verkauft, und wie viel ist das?", "de"),
        ("Combien de livres est-ce que Marie a vendus avec ses amis dans le village ?", "fr"),
        ("¿Cuántos libros vendió María con los amigos en la ciudad y por qué?", "es"),
        ("Quanti libri ha venduto il ragazzo con gli amici, e che cosa è la somma?", "it"),
        ("Hoeveel boeken heeft hij aan het meisje verkocht, dat ook naar school gaat?", "nl"),
        ("5+4=9", None),
        ("Сколько книг она продала друзьям?", None),
    ],
)
def test_the_language_is_that_of_the_function_words(said, language):
    assert text.language_of(said) == language
