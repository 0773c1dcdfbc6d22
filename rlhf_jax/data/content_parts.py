"""Content parts of messages: texts, and the images among them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from rlhf_jax.core.errors import UserError
from rlhf_jax.data.images import FIELDS, PART_SOURCES
from rlhf_jax.data.tokenizers import Tokenizer

Messages = list[dict[str, Any]]


def check_part(part: Any, number: int) -> dict[str, Any]:
    """A part of message `number`: `{"type": "text", "text"}`, or `{"type": "image"}` its source in it or not.

    Raises:
      UserError: it is neither.
    """
    if isinstance(part, Mapping):
        if isinstance(part.get("text"), str) and part.get("type", "text") == "text":
            return {"type": "text", "text": part["text"]}
        if part.get("type") in ("image", "image_url"):
            return {**part, "type": "image"}
    raise UserError(f"message {number} has a content part that is neither text nor an image; mend it")


def is_image(part: Any) -> bool:
    """True for the part of a message's content that is an image."""
    return isinstance(part, Mapping) and part.get("type") == "image"


def message_text(message: Mapping[str, Any]) -> str:
    """Text of a message, without its images."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


# For templates --------------------------------------------------------------------------------------


def without_sources(messages: Messages) -> Messages:
    """Messages whose image parts say only that they are one."""

    def bare(content: Any) -> Any:
        if not isinstance(content, list):
            return content
        return [{"type": "image"} if is_image(part) else part for part in content]

    return [{**m, "content": bare(m["content"])} if "content" in m else m for m in messages]


def in_template_form(tokenizer: Tokenizer, messages: Messages) -> Messages:
    """Messages with all content in parts, where the template of a model with vision goes through these."""
    if not _reads_parts(tokenizer):
        return messages
    return [
        {**m, "content": [{"type": "text", "text": m["content"]}]} if isinstance(m.get("content"), str) else m
        for m in messages
    ]


def join_parts(tokenizer: Tokenizer, messages: Messages) -> Messages:
    """Messages with the image token in the place of each image part, where the template takes texts alone.

    Raises:
      UserError: there are images, and the model reads none.
    """
    processor = tokenizer.image_processor
    if _reads_parts(tokenizer) or all(isinstance(m.get("content"), str | None) for m in messages):
        return messages
    if processor is None:
        raise UserError("the messages have images and the model reads none: give a model with vision")
    token = tokenizer.token(processor.token_id)

    def joined(content: Any) -> Any:
        if not isinstance(content, list):
            return content
        return "".join(token if is_image(part) else part["text"] for part in content)

    return [{**m, "content": joined(m["content"])} if "content" in m else m for m in messages]


def _reads_parts(tokenizer: Tokenizer) -> bool:
    """True where the template asks a part whether it is an image."""
    template = tokenizer.chat_template
    named = "'image'" in template or '"image"' in template
    return named and tokenizer.image_processor is not None


# Of rows --------------------------------------------------------------------------------------------


def load_images(
    tokenizer: Tokenizer, messages: Messages, fields: Mapping[str, Any]
) -> tuple[Messages, UInt8[np.ndarray, "N S S 3"] | None]:
    """(messages as of `place_images`, the images as the model takes them; None where there are none).

    Raises:
      UserError: as `place_images`; an image cannot be read, or the model reads none.
    """
    messages, sources = place_images(messages, fields)
    if not sources:
        return messages, None
    if tokenizer.image_processor is None:
        raise UserError("the row has images and the model reads none: give a model with vision")
    return messages, tokenizer.image_processor.pixels(sources)


def refuse_images(examples: Iterable[Any], what: str) -> None:
    """Raises: UserError where one of the examples has images, for `what`, which would leave them out."""
    if any(example.images is not None for example in examples):
        raise UserError(f"{what} cannot work with images yet: leave them out of the rows, or leave that out")


def place_images(messages: Messages, fields: Mapping[str, Any]) -> tuple[Messages, list[Any]]:
    """(messages with a part for every image, the images in the order of their parts).

    An image is in its part, or in the field `images` (or `image`) of the row. Where no part asks for those,
    they stand before the text of the first message of the user.

    Raises:
      UserError: there are more image parts than images, or fewer.
    """
    given = _images_of(fields)
    parts = [part for m in messages if isinstance(m.get("content"), list) for part in m["content"]]
    if given and not any(map(is_image, parts)):
        messages = _before_first_text(messages, len(given))
        parts = [{"type": "image"}] * len(given)
    rest, sources = list(given), []
    for part in filter(is_image, parts):
        held = any(part.get(name) is not None for name in PART_SOURCES)
        if not held and not rest:
            raise UserError(f"the messages have more image parts than the row has images ({len(given)})")
        sources.append(part if held else rest.pop(0))
    if rest:
        raise UserError(
            f"the row has {len(given)} images and its messages only {len(given) - len(rest)} parts for them: "
            'add {"type": "image"} parts, or remove images'
        )
    return messages, sources


def _images_of(fields: Mapping[str, Any]) -> Sequence[Any]:
    held = [fields[name] for name in FIELDS if fields.get(name) is not None]
    if len(held) > 1:
        raise UserError(f"the row has both {' and '.join(FIELDS)}: keep one of them")
    if not held:
        return []
    if fields.get("images") is None:
        return held
    if not isinstance(held[0], Sequence) or isinstance(held[0], str | bytes):
        raise UserError("field 'images' is no list of images: give a list, or the field 'image'")
    return held[0]


def _before_first_text(messages: Messages, count: int) -> Messages:
    first = next((number for number, m in enumerate(messages) if m["role"] == "user"), None)
    if first is None:
        raise UserError("the row has images and no message of the user to put them in: add one")
    texts = [{"type": "text", "text": message_text(messages[first])}]
    content = [*({"type": "image"} for _ in range(count)), *texts]
    return [*messages[:first], {**messages[first], "content": content}, *messages[first + 1 :]]
