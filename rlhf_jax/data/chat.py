"""Conversations to token ids, and which of those tokens the assistant wrote.

A part `{"type": "image"}` of a message becomes the image token, as often as the model's tokenizer says; the
images themselves go beside the tokens (`data.content_parts`).

Two promises are kept here. Sampling and training see the same tokens: the ids of a prompt, then of a
completion, then the end of the turn are the ids of the whole conversation. And what stands in a message
is text: `<|im_end|>` written by a user does not become the token that ends a turn.
"""

import bisect
import dataclasses
import functools
import itertools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from rlhf_jax.core.errors import UserError, shown
from rlhf_jax.data.content_parts import (
    check_part,
    in_template_form,
    is_image,
    join_parts,
    without_sources,
)
from rlhf_jax.data.templates import has_generation_marks, render
from rlhf_jax.data.tokenizers import Tokenizer

_log = logging.getLogger(__name__)

Message: TypeAlias = Mapping[str, Any]
ROLES = ("system", "user", "assistant", "tool")
Span: TypeAlias = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class EncodedConversation:
    """A conversation as tokens.

    Attributes:
      ids: token ids, exactly as the template lays the conversation out.
      mask: True for the tokens of assistant turns, the token that ends each turn included.
    """

    ids: list[int]
    mask: list[bool]


def encode_conversation(
    tokenizer: Tokenizer, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None
) -> EncodedConversation:
    """Lays `messages` out with the tokenizer's chat template and encodes them.

    The assistant's tokens are those between the template's `{% generation %}` marks. A template without
    marks is rendered up to each assistant turn as well, and the difference tells what the turn wrote.
    Ids are those of the whole text, except that none spans the place where a turn begins: an answer that
    is sampled begins there too.

    Args:
      messages: `[{"role": ..., "content": ...}, ...]`; assistant messages may carry `tool_calls`.
      tools: JSON schemas of the functions that the template offers to the assistant.

    Raises:
      UserError: malformed messages, or a template that fails on them, is stopped at a limit, or has no
        marks and puts things where it cannot be told who wrote them.
    """
    found = _encode(tokenizer, check_messages(messages), tools, add_generation_prompt=False)
    _warn_of_endless_turns(tokenizer, found)
    return found


_endless: set[tuple[str, int]] = set()


def _warn_of_endless_turns(tokenizer: Tokenizer, found: EncodedConversation) -> None:
    """Warns, once for each template, where what is learnt of a turn holds nothing that ends it."""
    which = tokenizer.chat_template, tokenizer.eos_id
    if which in _endless or not any(found.mask):
        return
    if not any(
        index == tokenizer.eos_id for index, learnt in zip(found.ids, found.mask, strict=True) if learnt
    ):
        _endless.add(which)
        _log.warning(
            "the chat template ends an assistant's turn without %r: what learns from it never stops writing; "
            "write the token behind the assistant's words in the template",
            tokenizer.token(tokenizer.eos_id),
        )


def encode_prompt(
    tokenizer: Tokenizer,
    prompt: str | Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    """Ids of a prompt, up to and including the words after which the assistant speaks.

    Args:
      prompt: messages, or the text of a single user message.
      tools: JSON schemas of the functions that the template offers to the assistant.

    Raises:
      UserError: as `encode_conversation`, and where the last message is the assistant's.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else check_messages(prompt)
    if messages[-1]["role"] == "assistant":
        raise UserError("the prompt ends with an assistant message; end it with a user or tool message")
    return _encode(tokenizer, messages, tools, add_generation_prompt=True).ids


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """The messages with parts of text joined, unless an image is among them.

    Raises:
      UserError: one has no role or no text.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError('messages must be a non-empty list of {"role": ..., "content": ...}; mend the list')
    return [_check_message(message, number) for number, message in enumerate(messages)]


def _check_message(message: Any, number: int) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise UserError(f'message {number} is not an object; write it as {{"role": ..., "content": ...}}')
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise UserError(f'message {number} has no role; add "role": "user", "assistant", "system" or "tool"')
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = [check_part(part, number) for part in content]
        if any(map(is_image, parts)):
            if role == "assistant":
                raise UserError(f"message {number} (assistant) has an image; models write text alone here")
            return {**message, "content": parts}
        content = "".join(part["text"] for part in parts)
    message = dict(message)
    if message.get("tool_calls"):
        message["tool_calls"] = _check_calls(message["tool_calls"], number)
        if content is None and role == "assistant":
            return message
    if not isinstance(content, str):
        raise UserError(f"message {number} ({role}) has no text in its content; give it a string")
    return {**message, "content": content}


def _check_calls(calls: Any, number: int) -> list[dict[str, Any]]:
    """Calls in the one form that templates read: `{"type": "function", "function": {"name", "arguments"}}`.

    Arguments come as an object, or as its JSON text; a call may stand without `function` around it.
    """
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise UserError(f"message {number} has tool_calls that are no list; write [{{...}}]")
    return [_check_call(call, number) for call in calls]


def _check_call(call: Any, number: int) -> dict[str, Any]:
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise UserError(f'message {number} has a tool call without a name; write {{"name", "arguments"}}')
    arguments = inner.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, Mapping):
        raise UserError(f"message {number}: the arguments of {inner['name']} are no object; mend the call")
    kept = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**kept, "type": "function", "function": {"name": inner["name"], "arguments": dict(arguments)}}


def check_tools(tools: Any) -> list[Mapping[str, Any]] | None:
    """The schemas in a row's `tools`: a list of objects, or its JSON text; None where there are none.

    Raises:
      UserError: they are something else.
    """
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError):
            raise UserError("field 'tools' is text that is not JSON; give a list of schemas") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise UserError("field 'tools' is no list of objects; give the schemas of the functions")
    return tools


def _check_roles(tokenizer: Tokenizer, messages: Sequence[Message]) -> None:
    """Raises: UserError for a role that neither everybody knows nor the template names."""
    template = tokenizer.chat_template
    for number, message in enumerate(messages):
        role = message["role"]
        if role not in ROLES and f"'{role}'" not in template and f'"{role}"' not in template:
            raise UserError(
                f"message {number} has the role {shown(role)}, which the chat template does not know: give "
                f"one of {', '.join(ROLES)}"
            )


def _encode(
    tokenizer: Tokenizer,
    messages: list[dict[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    *,
    add_generation_prompt: bool,
) -> EncodedConversation:
    _check_roles(tokenizer, messages)
    messages = in_template_form(tokenizer, without_sources(messages))
    armour, opening, closing, probe = _unused_characters([messages, tools], tokenizer.chat_template)
    disarmed, disarmed_tools = _map_strings(
        # One character inside it is enough to keep the text from being read as a special token.
        lambda text: tokenizer.forgery_pattern.sub(lambda m: m[0][0] + armour + m[0][1:], text),
        [messages, tools],
    )
    disarmed = join_parts(tokenizer, disarmed)

    def lay_out(requests: Sequence[tuple[list[Any], bool]]) -> list[str]:
        common = {"tools": disarmed_tools, "documents": None, **tokenizer.names}
        variables = [{**common, "messages": part, "add_generation_prompt": add} for part, add in requests]
        return render(tokenizer.chat_template, variables, (opening, closing))

    if has_generation_marks(tokenizer.chat_template):
        marked = lay_out([(disarmed, add_generation_prompt)])[0]
        text, spans = _read_marks(marked, opening, closing)
        spans = [(start, _with_turn_end(tokenizer, text, end)) for start, end in spans]
    else:
        text, spans = _compare(tokenizer, lay_out, disarmed, add_generation_prompt, probe)
    encode = functools.partial(_encode_armoured, armour=armour) if armour in text else _encode_text
    found = encode(tokenizer, text, spans)
    if tokenizer.image_processor is None:
        return found
    return EncodedConversation(*tokenizer.image_processor.expand(found.ids, found.mask))


def _unused_characters(given: list[Any], template: str) -> list[str]:
    """Four private-use characters that occur neither in what is given nor in the template."""
    text = json.dumps(given, ensure_ascii=False, default=str) + template
    private = map(chr, range(0xF0000, 0xFFFFE))
    return [character for character, _ in zip((c for c in private if c not in text), range(4), strict=False)]


def _map_strings(function: Callable[[str], str], value: Any) -> Any:
    if isinstance(value, str):
        return function(value)
    if isinstance(value, Mapping):
        return {key: _map_strings(function, item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_map_strings(function, item) for item in value]
    return value


def _read_marks(marked: str, opening: str, closing: str) -> tuple[str, list[Span]]:
    """The text without the marks, and the spans that stood between them."""
    first, *rest = marked.split(opening)
    text, spans = first, []
    for piece in rest:
        inside, _, outside = piece.partition(closing)
        spans.append((len(text), len(text) + len(inside)))
        text += inside + outside
    return text, spans


def _with_turn_end(tokenizer: Tokenizer, text: str, end: int) -> int:
    """Moves `end` behind the token that ends the turn, where the template left it outside its marks."""
    turn_end = tokenizer.special_pattern.match(text, end)
    ends = turn_end is not None and tokenizer.special_tokens[turn_end.group()] == tokenizer.eos_id
    return turn_end.end() if turn_end is not None and ends else end


def _compare(
    tokenizer: Tokenizer,
    lay_out: Callable[[Sequence[tuple[list[Any], bool]]], list[str]],
    messages: list[Any],
    add_generation_prompt: bool,
    probe: str,
) -> tuple[str, list[Span]]:
    """The text, and the spans of the assistant's turns found by rendering the messages before each."""
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    requests: list[tuple[list[Any], bool]] = [(messages, add_generation_prompt)]
    for turn in turns:
        before = messages[:turn]
        requests += [
            (before, True),
            ([*before, *in_template_form(tokenizer, [{"role": "assistant", "content": probe}])], False),
        ]
        requests += [(messages[: turn + 1], False)]
    text, *others = lay_out(requests)
    starts: list[int] = []
    for turn, prompt, probed, through in zip(turns, others[::3], others[1::3], others[2::3], strict=True):
        start = _find_turn_start(tokenizer, text, prompt, probed, through, after=[0, *starts][-1])
        if start is None:
            raise _no_marks(turn, "beginning")
        starts.append(start)
    limits = [*starts, len(text)][1:]
    spans = []
    for turn, start, limit, through in zip(turns, starts, limits, others[2::3], strict=True):
        if limit < start:
            raise _no_marks(turn, "end")
        spans.append((start, _find_turn_end(tokenizer, text, through, start, limit)))
    return text, spans


def _no_marks(turn: int, what: str) -> UserError:
    return UserError(
        f"the chat template lays message {turn} out so that its {what} cannot be told; "
        "put {% generation %} marks around the assistant's words in the template"
    )


def _find_turn_start(
    tokenizer: Tokenizer, text: str, prompt: str, probed: str, through: str, *, after: int
) -> int | None:
    """Where in `text` the turn begins that follows `prompt`, and the turn before began at `after`.

    Args:
      probed: the prompt's conversation with something else as the assistant's words.
      through: the same with the turn itself.
    """
    if text.startswith(prompt):
        return len(prompt)
    words = through.removeprefix(prompt)
    if words != through and tokenizer.special_pattern.search(words):
        # What stands before the turn changed with later messages; its words, which nobody else can have
        # written as they hold a special token, did not.
        start = text.find(words, after + 1)
        if start >= 0:
            return start
    # The prompt may open a thought that this turn does not have: then keep what all turns begin with.
    shared = _common_start(text, prompt, probed)
    return shared if shared > after and shared >= _common_start(prompt, probed) else None


def _common_start(*texts: str) -> int:
    """How many characters all texts begin with alike."""
    alike = (len(set(column)) == 1 for column in zip(*texts, strict=False))
    return sum(1 for _ in itertools.takewhile(bool, alike))


def _find_turn_end(tokenizer: Tokenizer, text: str, through: str, start: int, limit: int) -> int:
    """Where the turn that begins at `start` ends; `through` is the conversation up to and with it."""
    unchanged = text.startswith(through)
    limit = min(limit, len(through)) if unchanged else limit
    specials = list(tokenizer.special_pattern.finditer(text, start, limit))
    for match in specials:  # messages hold none, so the first is the template's
        if tokenizer.special_tokens[match.group()] == tokenizer.eos_id:
            return match.end()
    if unchanged:
        return specials[-1].end() if specials else limit
    # Later messages made another mark end the turn: it is the first that ends after the change.
    change = _common_start(text, through)
    return next((match.end() for match in specials if match.end() > change), limit)


def _encode_text(tokenizer: Tokenizer, text: str, spans: list[Span]) -> EncodedConversation:
    """Cuts the text where the assistant begins, as a prompt is cut there when it is sampled from."""
    starts, ends = [start for start, _ in spans], [end for _, end in spans]
    edges = [0, *starts, len(text)] if tokenizer.separable else [0, len(text)]
    ids: list[int] = []
    mask: list[bool] = []
    for begin, end in itertools.pairwise(edges):
        piece_ids, places = tokenizer.encode_with_starts(text[begin:end], special=True)
        ids += piece_ids
        mask += [_inside(begin + place, starts, ends) for place in places]
    return EncodedConversation(ids, mask)


def _encode_armoured(tokenizer: Tokenizer, text: str, spans: list[Span], armour: str) -> EncodedConversation:
    """As `_encode_text`, where messages quote special tokens: only the template's own become special."""
    starts, ends = [start for start, _ in spans], [end for _, end in spans]
    specials = {match.start(): match.end() for match in tokenizer.special_pattern.finditer(text)}
    edges = sorted({0, len(text), *starts, *ends, *specials, *specials.values()})
    ids: list[int] = []
    mask: list[bool] = []
    for begin, end in itertools.pairwise(edges):
        piece = text[begin:end]
        if specials.get(begin) == end:
            piece_ids = [tokenizer.special_tokens[piece]]
        else:
            piece_ids = tokenizer.encode(piece.replace(armour, ""))
        ids += piece_ids
        mask += [_inside(begin, starts, ends)] * len(piece_ids)
    return EncodedConversation(ids, mask)


def _inside(place: int, starts: list[int], ends: list[int]) -> bool:
    span = bisect.bisect_right(starts, place) - 1
    return span >= 0 and place < ends[span]
