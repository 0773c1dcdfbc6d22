"""Rows to training examples, by the fields that people's data already have.

A plain string is what the user says (`prompt`, `question`) or what the assistant answers (`completion`,
`chosen`, `rejected`, `answer`); a list is messages. Everything goes through the tokenizer's chat template.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import Bool, Int, UInt8
from rlhf_jax.data.chat import encode_conversation, encode_prompt
from rlhf_jax.data.content_parts import load_images, message_text
from rlhf_jax.data.packing import Overlength
from rlhf_jax.data.row_messages import (
    Messages,
    conversation_messages,
    preference_messages,
    prompt_messages,
    row_messages,
    tools_of,
)
from rlhf_jax.data.sources import Row
from rlhf_jax.data.tokenizers import Tokenizer

_log = logging.getLogger(__name__)

ANSWER_MARK = "####"
"""Stands before the final answer in the last line of a solution, as in GSM8K."""

ImageRows: TypeAlias = UInt8[np.ndarray, "N S S 3"] | None
"""Images of a row, as the model takes them; None where it has none."""
Example = TypeVar("Example")


@dataclasses.dataclass(frozen=True)
class SupervisedExample:
    """A conversation to imitate.

    Attributes:
      ids: tokens up to the end of the last assistant turn.
      mask: True for the assistant's tokens.
      where: the row it came from.
      images: those that its image tokens stand for.
    """

    ids: Int[np.ndarray, " T"]
    mask: Bool[np.ndarray, " T"]
    where: str
    images: ImageRows = None


@dataclasses.dataclass(frozen=True)
class PreferenceExample:
    """A prompt with a better and a worse completion, each of which ends with the end of a turn.

    Attributes:
      prompt_ids: up to and including the words after which the assistant speaks.
      chosen_ids: the better completion.
      rejected_ids: the worse completion.
      chosen_mask: the assistant's tokens: all, unless the completion has tool turns within.
      rejected_mask: the same of the worse one.
      where: the row it came from.
      preference: how probably the better one is better, in [0, 1]: the field `preference` of the row, or 1.
      images: of the prompt.
    """

    prompt_ids: Int[np.ndarray, " P"]
    chosen_ids: Int[np.ndarray, " C"]
    rejected_ids: Int[np.ndarray, " R"]
    chosen_mask: Bool[np.ndarray, " C"]
    rejected_mask: Bool[np.ndarray, " R"]
    where: str
    preference: float = 1.0
    images: ImageRows = None

    @property
    def chosen(self) -> SupervisedExample:
        """Prompt and better completion as one sample, for `packing`."""
        completion = self.chosen_ids, self.chosen_mask
        return join_completion(self.prompt_ids, *completion, self.where, self.images)

    @property
    def rejected(self) -> SupervisedExample:
        """Prompt and worse completion as one sample, for `packing`."""
        completion = self.rejected_ids, self.rejected_mask
        return join_completion(self.prompt_ids, *completion, self.where, self.images)


@dataclasses.dataclass(frozen=True)
class LabelledExample:
    """A prompt with a completion that is wanted or not, which ends with the end of a turn.

    Attributes:
      prompt_ids: up to and including the words after which the assistant speaks.
      completion_ids: the completion.
      completion_mask: the assistant's tokens of it.
      desirable: whether it is wanted.
      where: the row it came from.
      images: of the prompt.
    """

    prompt_ids: Int[np.ndarray, " P"]
    completion_ids: Int[np.ndarray, " C"]
    completion_mask: Bool[np.ndarray, " C"]
    desirable: bool
    where: str
    images: ImageRows = None

    def after(self, other: "LabelledExample") -> SupervisedExample:
        """The completion after the prompt of an example, itself or another, as one sample for `packing`."""
        completion = self.completion_ids, self.completion_mask
        return join_completion(other.prompt_ids, *completion, self.where, other.images)


def join_completion(
    prompt_ids: Int[np.ndarray, " P"],
    ids: Int[np.ndarray, " C"],
    mask: Bool[np.ndarray, " C"],
    where: str,
    images: ImageRows = None,
) -> SupervisedExample:
    """Prompt, with its images, and completion as one sample, for `packing`."""
    silent = np.zeros(len(prompt_ids), np.bool_)
    whole = np.concatenate([prompt_ids, ids]), np.concatenate([silent, mask])
    return SupervisedExample(*whole, where, images)


@dataclasses.dataclass(frozen=True)
class PromptExample:
    """A prompt to answer.

    Attributes:
      ids: up to and including the words after which the assistant speaks.
      text: the user's last message.
      fields: the whole row, for reward functions that need its `answer` or else.
      where: the row it came from.
      images: those that its image tokens stand for.
    """

    ids: Int[np.ndarray, " T"]
    text: str
    fields: dict[str, Any]
    where: str
    images: ImageRows = None


def supervised_examples(
    rows: Sequence[Row], tokenizer: Tokenizer, *, max_length: int, overlength: Overlength = "error"
) -> list[SupervisedExample]:
    """Conversations of rows with `messages`, `prompt` and `completion`, or `question` and `answer`.

    Args:
      rows: as `sources.read_rows` gives them.
      max_length: tokens of the longest conversation allowed.
      overlength: "error" refuses a longer one, "drop" leaves it out and logs how many there were.

    Raises:
      UserError: a row without these fields, an empty field or one of the wrong type, no assistant turn, or
        too long; or nothing left.
    """

    def make(row: Row) -> SupervisedExample:
        messages, images = load_images(tokenizer, conversation_messages(row), row.fields)
        encoded = encode_conversation(tokenizer, messages, tools=tools_of(row))
        ids, mask = np.array(encoded.ids, np.int32), np.array(encoded.mask, np.bool_)
        if not mask.any():
            raise UserError("messages have no assistant turn to learn from; add one or remove the row")
        end = int(np.flatnonzero(mask)[-1]) + 1
        return SupervisedExample(ids[:end], mask[:end], row.where, images)

    return make_examples(
        rows, make, lambda example: len(example.ids), max_length, overlength, "the conversation"
    )


def preference_examples(
    rows: Sequence[Row], tokenizer: Tokenizer, *, max_length: int, overlength: Overlength = "error"
) -> list[PreferenceExample]:
    """Pairs of rows with `chosen` and `rejected`, after a `prompt` or after the messages both begin with.

    Args: as `supervised_examples`; `max_length` holds for a prompt with either completion.

    Raises:
      UserError: as `supervised_examples`, and where both completions are the same.
    """

    def make(row: Row) -> PreferenceExample:
        return preference_example(row, tokenizer)

    def size(example: PreferenceExample) -> int:
        return len(example.prompt_ids) + max(len(example.chosen_ids), len(example.rejected_ids))

    return make_examples(rows, make, size, max_length, overlength, "the prompt with its longer completion")


def preference_example(row: Row, tokenizer: Tokenizer) -> PreferenceExample:
    """One of `preference_examples`, of any length."""
    prompt, chosen, rejected = preference_messages(row)
    if chosen == rejected:
        raise UserError("chosen and rejected are the same; remove the row")
    tools = tools_of(row)
    prompt, images = load_images(tokenizer, prompt, row.fields)
    prompt_ids = encode_prompt(tokenizer, prompt, tools=tools)
    chosen_ids, chosen_mask = encode_completion(tokenizer, prompt, prompt_ids, chosen, tools)
    rejected_ids, rejected_mask = encode_completion(tokenizer, prompt, prompt_ids, rejected, tools)
    sides = chosen_ids, rejected_ids, chosen_mask, rejected_mask
    return PreferenceExample(np.array(prompt_ids, np.int32), *sides, row.where, _probability(row), images)


def labeled_examples(
    rows: Sequence[Row], tokenizer: Tokenizer, *, max_length: int, overlength: Overlength = "error"
) -> list[LabelledExample]:
    """Completions of rows with `prompt`, `completion` and a boolean `label`, or both sides of pairs.

    Args: as `preference_examples`, whose rows are taken where they hold `chosen`.

    Raises:
      UserError: as `supervised_examples`, and where a label is neither true nor false.
    """
    if any(row.fields.get("chosen") is not None for row in rows):
        pairs = preference_examples(rows, tokenizer, max_length=max_length, overlength=overlength)
        return [
            LabelledExample(pair.prompt_ids, *completion, pair.where, pair.images)
            for pair in pairs
            for completion in (
                (pair.chosen_ids, pair.chosen_mask, True),
                (pair.rejected_ids, pair.rejected_mask, False),
            )
        ]

    def make(row: Row) -> LabelledExample:
        prompt, completion = row_messages(row, "prompt", "user"), row_messages(row, "completion", "assistant")
        label = row.fields.get("label")
        if label not in (True, False):
            raise UserError(f"field 'label' is {label!r}; give true or false, or remove the row")
        tools = tools_of(row)
        prompt, images = load_images(tokenizer, prompt, row.fields)
        prompt_ids = encode_prompt(tokenizer, prompt, tools=tools)
        encoded = encode_completion(tokenizer, prompt, prompt_ids, completion, tools)
        return LabelledExample(np.array(prompt_ids, np.int32), *encoded, bool(label), row.where, images)

    def size(example: LabelledExample) -> int:
        return len(example.prompt_ids) + len(example.completion_ids)

    return make_examples(rows, make, size, max_length, overlength, "the prompt with its completion")


def prompt_examples(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    overlength: Overlength = "error",
    tools: Sequence[Mapping[str, Any]] = (),
) -> list[PromptExample]:
    """Prompts of rows with `messages`, `prompt` or `question`; all fields are kept for the reward.

    Messages that end with an assistant turn are a prompt without it.

    Args:
      max_length: tokens of the longest prompt allowed.
      overlength: as of `supervised_examples`.
      tools: JSON schemas of the functions that the chat template offers to the assistant; none for those in
        the field `tools` of each row.

    Raises:
      UserError: as `supervised_examples`.
    """

    def make(row: Row) -> PromptExample:
        messages, images = load_images(tokenizer, prompt_messages(row), row.fields)
        text = next((message_text(m) for m in reversed(messages) if m["role"] == "user"), "")
        ids = np.array(encode_prompt(tokenizer, messages, tools=tools or tools_of(row)), np.int32)
        return PromptExample(ids, text, row.fields, row.where, images)

    return make_examples(rows, make, lambda example: len(example.ids), max_length, overlength, "the prompt")


def make_examples(
    rows: Sequence[Row],
    make: Callable[[Row], Example],
    size: Callable[[Example], int],
    max_length: int,
    overlength: Overlength,
    what: str,
) -> list[Example]:
    """Examples of rows; errors name their row, and what is too long is refused or dropped (`overlength`)."""
    kept: list[Example] = []
    dropped: list[str] = []
    for row in rows:
        try:
            example = make(row)
            if size(example) <= max_length:
                kept.append(example)
            elif overlength == "drop":
                dropped.append(row.where)
            else:
                raise UserError(
                    f"{what} has {size(example)} tokens, more than {max_length}; "
                    "shorten it, raise the length or drop long rows"
                )
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from None
    if not kept:
        raise UserError(f"all {len(rows)} rows have more than {max_length} tokens; raise the length")
    if dropped:
        counts = (len(dropped), len(rows), max_length)
        _log.warning("dropped %d of %d rows longer than %d tokens, the first at %s", *counts, dropped[0])
    return kept


# Fields ---------------------------------------------------------------------------------------------


def _probability(row: Row) -> float:
    value = row.fields.get("preference", 1.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise UserError(f"field 'preference' is {value!r}; give a probability from 0 to 1")
    return float(value)


def encode_completion(
    tokenizer: Tokenizer,
    prompt: Messages,
    prompt_ids: list[int],
    completion: Messages,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[Int[np.ndarray, " T"], Bool[np.ndarray, " T"]]:
    """Ids and mask of what follows the prompt, up to the end of the last assistant turn."""
    encoded = encode_conversation(tokenizer, prompt + completion, tools=tools)
    if encoded.ids[: len(prompt_ids)] != prompt_ids or not any(encoded.mask[len(prompt_ids) :]):
        raise UserError(
            "the chat template does not lay the prompt out alike with and without a completion; "
            "use a template whose generation prompt begins every assistant turn"
        )
    mask = np.array(encoded.mask[len(prompt_ids) :], np.bool_)
    end = int(np.flatnonzero(mask)[-1]) + 1
    return np.array(encoded.ids[len(prompt_ids) :], np.int32)[:end], mask[:end]
