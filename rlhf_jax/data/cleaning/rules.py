"""Cleaning of rows to learn from: each rule takes rows and gives (those to keep, those dropped and why).

    texts, dropped = readable(rows)
    texts, more = drop_faulty(texts, Limits(language="en"))
    texts, more = drop_exact_duplicates(texts)
    texts, more = drop_near_duplicates(texts, jaccard_threshold=0.8)
    texts, more = drop_contaminated(texts, questions)

Nothing is changed within a row: a row is kept as it is or dropped whole. Order is kept.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.ranges import Count, Share, check_ranges
from rlhf_jax.data.cleaning import text as statistics
from rlhf_jax.data.cleaning.decontamination import find_ngram_overlaps
from rlhf_jax.data.cleaning.dedup import Repeat, exact_duplicates, near_duplicates
from rlhf_jax.data.row_messages import Messages, conversation_messages, preference_messages, prompt_messages
from rlhf_jax.data.sources import Row

Part: TypeAlias = Literal["all", "prompt", "answer"]
Progress: TypeAlias = Callable[[int], None]

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f�]")


@dataclasses.dataclass(frozen=True)
class RowText:
    """Text of a row: prompt and answer.

    Attributes:
      row: itself.
      prompt: all that is not the assistant's.
      answer: what the assistant says; both answers of a pair; empty where the row is a prompt alone.
    """

    row: Row
    prompt: str
    answer: str

    def part(self, part: Part) -> str:
        """The text that a rule looks at."""
        return {"all": f"{self.prompt}\n{self.answer}", "prompt": self.prompt, "answer": self.answer}[part]


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A row that was left out.

    Attributes:
      reason: in a word or two, the same for all rows that the same rule dropped.
      detail: what was seen in this row.
    """

    row: Row
    reason: str
    detail: str


Outcome: TypeAlias = tuple[list[RowText], list[Dropped]]


# Format --------------------------------------------------------------------------------------------


def readable(rows: Sequence[Row]) -> Outcome:
    """Rows that a training script would take: pairs, conversations, or prompts alone, without empty turns."""
    kept, dropped = [], []
    for row in rows:
        try:
            kept.append(read_text(row))
        except UserError as error:
            dropped.append(Dropped(row, "format", str(error)))
    return kept, dropped


def read_text(row: Row) -> RowText:
    """Reads prompt and answer of a row.

    Raises:
      UserError: it is no pair, no conversation and no prompt, or a part of it is empty.
    """
    fields = row.fields
    if fields.get("chosen") is not None:
        prompt, *sides = preference_messages(row)
        if sides[0] == sides[1]:
            raise UserError("chosen and rejected are the same; remove the row")
        return RowText(row, _said(prompt), "\n".join(map(_said, sides)))
    answered = any(fields.get(name) is not None for name in ("messages", "completion", "answer"))
    messages = conversation_messages(row) if answered else prompt_messages(row)
    by_role = [[m for m in messages if (m["role"] == "assistant") is own] for own in (False, True)]
    return RowText(row, *map(_said, by_role))


def _said(messages: Messages) -> str:
    return "\n".join(_content(message) for message in messages)


def _content(message: dict[str, Any]) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""


# Length, language, quality -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Limits:
    """Quality filters on a row by itself. Lengths are in characters.

    Attributes:
      shortest_prompt: least length of a prompt.
      longest_prompt: most; 0 for any.
      shortest_answer: least length of an answer, where the row has one.
      longest_answer: most; 0 for any.
      script: the script that letters must be of: LATIN, CYRILLIC, CJK, ...; empty for any.
      script_share: least share of them.
      language: en, de, fr, es, it, pt or nl: texts that are plainly in another language are dropped; empty
        for any.
      unknown_language: keep or drop what is too short, or too formal, to tell its language.
      repeated_share: most of an answer's runs of four words that may have stood in it before.
      symbol_share: most of an answer's characters that may be neither letters, digits nor spaces.
      banned: regular expressions that may stand nowhere in an answer, in any case.
    """

    shortest_prompt: Count = 1
    longest_prompt: Count = 0
    shortest_answer: Count = 1
    longest_answer: Count = 0
    script: str = ""
    script_share: Share = 0.9
    language: str = ""
    unknown_language: Literal["keep", "drop"] = "keep"
    repeated_share: Share = 0.5
    symbol_share: Share = 0.5
    banned: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises: UserError for a share, language or expression that makes no sense."""
        check_ranges(self)
        if self.language and self.language not in statistics.LANGUAGES:
            known = ", ".join(statistics.LANGUAGES)
            raise UserError(f"language {self.language!r} is not known: give one of {known}, or a script")
        for pattern in self.banned:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"banned {pattern!r} is no regular expression ({error}): mend it") from None


def drop_faulty(texts: Sequence[RowText], limits: Limits) -> Outcome:
    """Rows that keep within the limits."""
    kept, dropped = [], []
    for item in texts:
        fault = find_fault(item, limits)
        if fault is None:
            kept.append(item)
        else:
            dropped.append(Dropped(item.row, *fault))
    return kept, dropped


def find_fault(item: RowText, limits: Limits) -> tuple[str, str] | None:
    """(reason, detail) of the first limit that a row breaks; None where it breaks none."""
    return _length_fault(item, limits) or _language_fault(item, limits) or _quality_fault(item, limits)


def _length_fault(item: RowText, limits: Limits) -> tuple[str, str] | None:
    sides = [("prompt", item.prompt, limits.shortest_prompt, limits.longest_prompt)]
    if item.answer:
        sides.append(("answer", item.answer, limits.shortest_answer, limits.longest_answer))
    for name, text, least, most in sides:
        if len(text) < least:
            return "too short", f"{name} of {len(text)} characters, fewer than {least}"
        if most and len(text) > most:
            return "too long", f"{name} of {len(text)} characters, more than {most}"
    return None


def _language_fault(item: RowText, limits: Limits) -> tuple[str, str] | None:
    text = item.part("all")
    if limits.script:
        share = statistics.script_share(text, limits.script)
        if share < limits.script_share:
            return "other script", f"{share:.0%} of the letters are {limits.script.upper()}"
    if limits.language:
        found = statistics.language_of(text)
        if found not in (None, limits.language):
            return "other language", f"the function words are those of {found}"
        if statistics.script_share(text, "LATIN") < 0.5:  # in which all languages of the table are
            return "other language", f"most letters are {statistics.main_script(text)}"
        if statistics.lacks_function_words(text, limits.language):
            return "other language", f"no function word is one of {limits.language}"
        if found is None and limits.unknown_language == "drop":
            return "unknown language", "too few function words tell which it is"
    return None


def _quality_fault(item: RowText, limits: Limits) -> tuple[str, str] | None:
    broken = _CONTROL.search(item.part("all"))
    if broken:
        return "broken characters", f"{broken[0]!a} stands in it"
    repeated, symbols = statistics.repeated_share(item.answer), statistics.symbol_share(item.answer)
    if repeated > limits.repeated_share:
        return "repetitive", f"{repeated:.0%} of the answer's runs of four words are repeated"
    if symbols > limits.symbol_share:
        return "symbols", f"{symbols:.0%} of the answer's characters are neither letters, digits nor spaces"
    for pattern in limits.banned:
        found = re.search(pattern, item.answer, re.IGNORECASE)
        if found:
            return "banned words", f"{found[0][:80]!r} stands in the answer"
    return None


# Among each other ----------------------------------------------------------------------------------


def drop_exact_duplicates(texts: Sequence[RowText], *, by: Part = "all") -> Outcome:
    """Rows whose text did not stand in an earlier row, spaces apart."""
    return _without(texts, exact_duplicates([item.part(by) for item in texts]), "exact duplicate")


def drop_near_duplicates(
    texts: Sequence[RowText],
    *,
    jaccard_threshold: float = 0.8,
    ngram_size: int = 3,
    by: Part = "all",
    seed: int = 0,
    progress: Progress = lambda done: None,
) -> Outcome:
    """Rows that are not nearly an earlier one: see `duplicates.near_duplicates`."""
    parts = [item.part(by) for item in texts]
    repeats = near_duplicates(
        parts, jaccard_threshold=jaccard_threshold, ngram_size=ngram_size, seed=seed, progress=progress
    )
    return _without(texts, repeats, "near duplicate")


def _without(texts: Sequence[RowText], repeats: Sequence[Repeat], reason: str) -> Outcome:
    dropped = [
        Dropped(texts[r.place].row, reason, f"{r.similarity:.2f} like {texts[r.first].row.where}")
        for r in repeats
    ]
    return _all_but(texts, {repeat.place for repeat in repeats}), dropped


def drop_contaminated(
    texts: Sequence[RowText],
    benchmark: Sequence[RowText],
    *,
    size: int = 8,
    least_share: float = 0.5,
    most_rows: int = 0,
    progress: Progress = lambda done: None,
) -> Outcome:
    """Rows that do not give a benchmark's prompts away, in prompt or answer: `find_ngram_overlaps`."""
    found = find_ngram_overlaps(
        [item.part("all") for item in texts],
        [item.prompt for item in benchmark],
        size=size,
        least_share=least_share,
        most_rows=most_rows,
        progress=progress,
    )
    dropped = [
        Dropped(texts[o.place].row, "contaminated", f"{o.share:.0%} of {benchmark[o.question].row.where}")
        for o in found
    ]
    return _all_but(texts, {overlap.place for overlap in found}), dropped


def _all_but(texts: Sequence[RowText], places: set[int]) -> list[RowText]:
    return [item for place, item in enumerate(texts) if place not in places]
