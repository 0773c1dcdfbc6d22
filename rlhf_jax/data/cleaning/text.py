"""Simple statistics of texts: words, runs of words, repetition, scripts, languages; all in linear time."""

import functools
import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np

from rlhf_jax.core.types import UInt

# Scripts without spaces between words: each character is a word there.
_WORD = re.compile(r"[぀-ヿ㐀-鿿豈-﫿]|[^\W_぀-ヿ㐀-鿿豈-﫿]+")
_WORD_OR_SIGN = re.compile(rf"{_WORD.pattern}|[-+*/^=<>%\u00d7\u00f7]")
# Words of LaTeX, tags and addresses are in Latin letters whatever language the text is in.
_NO_LANGUAGE = re.compile(r"\\[A-Za-z]+|</?[A-Za-z_]+>|https?://[^\s]+")

# The commonest words that only, or almost only, this language of the table has.
_FUNCTION_WORDS = {
    "en": "the and of to is that it was for with this are have from they which what how you his her",
    "de": "der das und ist nicht ein eine ich zu mit auf sich dem wird von wie auch werden",
    "fr": "le les des et est une dans que qui pas au ce il elle nous vous avec sont",
    "es": "el los las y es una que por con para del lo como pero su este está",
    "it": "il gli di che è una non sono con del della nel più anche questo ha alla",
    "pt": "os uma não que para com da em mais como dos das são você ele ela foi está",
    "nl": "het een dat niet te zijn voor hij aan ook maar wordt naar deze bij uit",
}
LANGUAGES = tuple(_FUNCTION_WORDS)
"""Languages that `language_of` tells apart."""

_LEAST_FUNCTION_WORDS = 3
_ENOUGH_WORDS = 16  # in English every fifth word is one of the table


# Words ---------------------------------------------------------------------------------------------


def words(text: str, *, signs: bool = False) -> list[str]:
    """Lower-case words and numbers, compatibility forms folded; signs of arithmetic where asked for."""
    return (_WORD_OR_SIGN if signs else _WORD).findall(unicodedata.normalize("NFKC", text).lower())


def run_hashes(units: Sequence[str], size: int) -> UInt[np.ndarray, " N"]:
    """One 64-bit number for each run of `size` words, in their order, the same in every process.

    A polynomial in the hashes of the words, mixed; two different runs agree with probability about 2^-64.
    """
    count = len(units) - size + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    numbers = np.array([_word_hash(word) for word in units], np.uint64)
    total = np.zeros(count, np.uint64)
    for offset in range(size):
        total = total * np.uint64(0x9E3779B97F4A7C15) + numbers[offset : offset + count]
    return mix(total)


def mix(numbers: UInt[np.ndarray, "..."]) -> UInt[np.ndarray, "..."]:
    """A fixed one-to-one scrambling of 64-bit numbers: the finaliser of SplitMix64."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


@functools.lru_cache(maxsize=1 << 18)
def _word_hash(word: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big"
    )


def repeated_share(text: str, size: int = 4) -> float:
    """Share of the runs of `size` words that stood in the text before; 0 where it has fewer.

    A text without spaces counts by characters, in runs five times as long.
    """
    units: Sequence[str] = text.split()
    if len(units) <= len(text) / 64:
        units, size = text, 5 * size
    runs = [tuple(units[start : start + size]) for start in range(len(units) - size + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def symbol_share(text: str) -> float:
    """Share of what is neither letter, digit, mark nor space; 0 of an empty text."""
    if not text:
        return 0.0
    return sum(
        unicodedata.category(letter)[0] not in "LNMZ" and letter not in "\n\t\r" for letter in text
    ) / len(text)


# Scripts and languages -----------------------------------------------------------------------------


def scripts(text: str) -> Counter[str]:
    """Letter counts by script: the first word of their Unicode names (LATIN, CYRILLIC, CJK, ...)."""
    letters = Counter(without_markup(text))
    found = Counter[str]()
    for letter, count in letters.items():
        if letter.isalpha():
            found[script_of(letter)] += count
    return found


def script_share(text: str, script: str | None) -> float:
    """Share of the letters that are of a script; 1 where there are no letters, or no script is asked for."""
    found = scripts(text)
    total = found.total()
    return found[script_family(script.upper())] / total if total and script else 1.0


def main_script(text: str) -> str | None:
    """The script of most letters; None where there are none."""
    found = scripts(text).most_common(1)
    return found[0][0] if found else None


@functools.lru_cache(maxsize=1 << 14)
def script_of(sign: str) -> str:
    """The script of a letter or digit."""
    return script_family(unicodedata.name(sign, "unknown").split()[0])


def script_family(script: str) -> str:
    """Japanese mixes three scripts, which count as one, and Arabic's digits are called ARABIC-INDIC."""
    first = script.partition("-")[0]
    return "CJK" if first in ("HIRAGANA", "KATAKANA") else first


def lacks_function_words(text: str, language: str) -> bool:
    """True if a text is too long to be in a language of whose function words it has none."""
    found = words(without_markup(text))
    long = sum(len(word) > 2 and word.isalpha() for word in found)
    return long >= _ENOUGH_WORDS and not set(found) & set(_FUNCTION_WORDS[language].split())


def without_markup(text: str) -> str:
    """The text without words of LaTeX, tags and addresses, which are Latin whatever language it is in."""
    return _NO_LANGUAGE.sub(" ", text)


def language_of(text: str) -> str | None:
    """The one of `LANGUAGES` whose function words stand in the text most often.

    None where fewer than three of them stand there, or two languages share the first place: short texts,
    formulas and languages that are not in the table.
    """
    counts = Counter(words(without_markup(text)))
    found = Counter(
        {name: sum(counts[word] for word in common.split()) for name, common in _FUNCTION_WORDS.items()}
    )
    (best, count), (_, second) = found.most_common(2)
    return best if count >= _LEAST_FUNCTION_WORDS and count > second else None
