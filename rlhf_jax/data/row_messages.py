"""Messages of rows, by the fields that people's data already have."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from rlhf_jax.core.errors import UserError
from rlhf_jax.data.chat import check_messages, check_tools
from rlhf_jax.data.content_parts import message_text
from rlhf_jax.data.sources import Row, kind_of

Messages: TypeAlias = list[dict[str, Any]]


def prompt_messages(row: Row) -> Messages:
    """Messages of a row's prompt, as `prompt_examples` takes them.

    Raises:
      UserError: the row has none.
    """
    field = _first_field(row, ("messages", "prompt", "question"), "a prompt")
    messages = row_messages(row, field, "user")
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise UserError(f"field {field!r} has nothing before the assistant's turn; add a user message")
    return messages


def conversation_messages(row: Row) -> Messages:
    """Messages of a row's conversation, as `supervised_examples` takes them.

    Raises:
      UserError: the row has none, or an empty field.
    """
    answers = {"prompt": "completion", "question": "answer"}
    wanted = "messages, prompt and completion, or question and answer"
    field = _first_field(row, ("messages", *answers), wanted)
    messages = row_messages(row, field, "user")
    return messages if field == "messages" else messages + row_messages(row, answers[field], "assistant")


def preference_messages(row: Row) -> tuple[Messages, Messages, Messages]:
    """Prompt, chosen and rejected of a row, where either side may repeat the prompt.

    Raises:
      UserError: a side is missing or empty, or they do not begin with the same prompt.
    """
    chosen, rejected = row_messages(row, "chosen", "assistant"), row_messages(row, "rejected", "assistant")
    if all(side[0]["role"] == "assistant" for side in (chosen, rejected)):
        return row_messages(row, "prompt", "user"), chosen, rejected
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if not shared or chosen[shared]["role"] != "assistant" or rejected[shared]["role"] != "assistant":
        raise UserError(
            "fields 'chosen' and 'rejected' differ before the assistant's turn; "
            "let both begin with the same prompt"
        )
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _first_field(row: Row, names: Sequence[str], wanted: str) -> str:
    for name in names:
        if row.fields.get(name) is not None:
            return name
    present = ", ".join(sorted(row.fields)) or "none"
    raise UserError(f"the row has none of the fields {', '.join(names)} (it has: {present}); give {wanted}")


def tools_of(row: Row) -> list[Mapping[str, Any]] | None:
    """Schemas of the functions that a row offers to the assistant, in its field `tools`."""
    return check_tools(row.fields.get("tools"))


def row_messages(row: Row, field: str, role: str) -> Messages:
    """The messages in `field`; a plain string is one message by `role`."""
    value = row.fields.get(field)
    if value is None:
        present = ", ".join(sorted(row.fields)) or "none"
        raise UserError(f"field {field!r} is missing (the row has: {present}); add it or remove the row")
    if isinstance(value, str):
        if not value.strip():
            raise UserError(f"field {field!r} is empty; fill it or remove the row")
        if field == "messages":
            raise UserError(
                "field 'messages' is text, not a list of messages; give it as a list, not as JSON"
            )
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or field in ("question", "answer"):
        raise UserError(f"field {field!r} is {kind_of(value)}; give it text or remove the row")
    try:
        messages = check_messages(value)
    except UserError as error:
        raise UserError(f"field {field!r}: {error}") from None
    for number, message in enumerate(messages):
        silent = not message_text(message).strip() and not message.get("tool_calls")
        if message["role"] == "assistant" and silent:
            raise UserError(
                f"field {field!r}: message {number} (assistant) is empty; fill it or remove the row"
            )
    return messages
