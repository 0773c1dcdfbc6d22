"""Token automata: regular expressions, JSON schemas and stop strings as tables on the device.

Text is matched byte by byte, whatever the borders of tokens are, while the loop needs one look-up a token and
no trip to the host. A table has a row for each state and a column for each class of tokens that behave alike
in every state, which keeps it small: of 150,000 tokens only a few hundred differ to most expressions.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.importing import optional
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Int
from rlhf_jax.data.tokenizers import Tokenizer


@pytree_dataclass
class Automaton:
    """States that tokens lead from one to the next. Every row begins in state 0.

    Attributes:
      token_class: of each token.
      table: the state after a token of each class; -1 where it may not come.
      final: states in which the text is complete.
    """

    token_class: Int[Array, "V"]
    table: Int[Array, "N C"]
    final: Bool[Array, "N"]


def allowed_tokens(automaton: Automaton, state: Int[Array, "B"], *, eos_id: int) -> Bool[Array, "B V"]:
    """Tokens that may come next; the end of the answer where the text is complete."""
    allowed = jnp.take(automaton.table[state] >= 0, automaton.token_class, axis=-1)
    ends = jnp.arange(allowed.shape[-1]) == eos_id
    return jnp.where(ends, automaton.final[state][:, None], allowed)


def next_state(automaton: Automaton, state: Int[Array, "B"], token: Int[Array, "B"]) -> Int[Array, "B"]:
    """The state after a token; the same one where the token may not come."""
    following = automaton.table[state, automaton.token_class[token]]
    return jnp.where(following < 0, state, following)


# Tokens as bytes -----------------------------------------------------------------------------------


def token_bytes(tokenizer: Tokenizer) -> list[bytes | None]:
    """Bytes that each token writes; None for special tokens and for ids without a token.

    Byte-level vocabularies write bytes in a printable alphabet, others text in which a low line stands for a
    space, or `<0x0A>` for a byte.
    """
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    added = tokenizer.backend.get_added_tokens_decoder()
    decoder = json.loads(tokenizer.backend.to_str()).get("decoder") or {}
    parts = [decoder, *decoder.get("decoders", ())]
    kinds = {part.get("type") for part in parts}
    spaced = "Metaspace" in kinds or any(part.get("pattern") == {"String": "▁"} for part in parts)
    texts: list[bytes | None] = [None] * tokenizer.vocab_size
    for token, index in vocabulary.items():
        if index in added:
            texts[index] = None if added[index].special else added[index].content.encode()
        elif "ByteLevel" in kinds:
            texts[index] = bytes(_byte_alphabet().get(character, 63) for character in token)
        elif "ByteFallback" in kinds and len(token) == 6 and token.startswith("<0x"):
            texts[index] = bytes([int(token[3:5], 16)])
        else:
            texts[index] = (token.replace("▁", " ") if spaced else token).encode()
    return texts


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """The printable character for each byte in byte-level vocabularies (Radford et al. 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = printable + [256 + place for place in range(len(others))]
    return {chr(character): byte for character, byte in zip(characters, printable + others, strict=True)}


# Stop strings --------------------------------------------------------------------------------------


def stop_automaton(tokenizer: Tokenizer, strings: Sequence[str]) -> Automaton:
    """Is final as soon as the text holds one of `strings`, wherever tokens begin and end (Aho and Corasick
    1975, over bytes).

    Raises:
      UserError: an empty string, or none.
    """
    if not strings or not all(strings):
        raise UserError("a stop string is empty: give at least one character")
    following, final = _string_matcher([text.encode() for text in strings])
    texts = [text or b"" for text in token_bytes(tokenizer)]
    padded = np.zeros((len(texts), max(map(len, texts), default=0)), np.int64)
    for token, text in enumerate(texts):
        padded[token, : len(text)] = list(text)
    lengths = np.array([len(text) for text in texts])
    states = np.repeat(np.arange(len(final))[:, None], len(texts), axis=1)
    for column in range(padded.shape[1]):
        states = np.where(column < lengths, following[states, padded[:, column]], states)
    columns, token_class = np.unique(states, axis=1, return_inverse=True)
    return _automaton(token_class.reshape(-1), columns, final)


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string."""
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]


def _string_matcher(strings: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """(state after each byte [N, 256], final [N]): the state is the longest end of the text that begins a
    string; a final state is never left.
    """
    prefixes = sorted({text[:end] for text in strings for end in range(len(text) + 1)}, key=len)
    number = {prefix: state for state, prefix in enumerate(prefixes)}
    final = np.array([any(prefix.endswith(text) for text in strings) for prefix in prefixes])
    following = np.zeros((len(prefixes), 256), np.int64)
    for prefix, state in number.items():
        for byte in range(256):
            text = prefix + bytes([byte])
            ends = (text[start:] for start in range(len(text) + 1))
            following[state, byte] = next(number[end] for end in ends if end in number)
    following[final] = np.flatnonzero(final)[:, None]
    return following, final


# Constraints ---------------------------------------------------------------------------------------


# The index of outlines_core 0.2.14 loses the ways from a text that matches to a longer one that does not yet
# (from "ab" to "aba" for "(ab)+"). With a character at the end that no text holds, none matches early;
# its first byte is that of the last private plane of Unicode, which no answer may write then.
_END = "\U0010ffff"


def regex_automaton(tokenizer: Tokenizer, pattern: str) -> Automaton:
    """Allows the texts that `pattern` matches as a whole, by way of `outlines_core`.

    Raises:
      UserError: no regular expression, or one that no text of this vocabulary matches.
    """
    outlines_core = optional("outlines_core", extra="constrained")

    tokens: dict[bytes, list[int]] = {_END.encode(): [tokenizer.eos_id]}
    for token, text in enumerate(token_bytes(tokenizer)):
        if text and token != tokenizer.eos_id and _END.encode()[0] not in text:
            tokens.setdefault(text, []).append(token)
    try:
        index = outlines_core.Index(
            f"(?:{pattern}){_END}", outlines_core.Vocabulary(tokenizer.vocab_size, tokens)
        )
    except Exception as error:  # the library raises ValueError or bare Exception
        raise UserError(f"regular expression {pattern!r}: {error}: mend or simplify it") from None
    return _from_transitions(index, tokenizer)


def json_automaton(tokenizer: Tokenizer, schema: Mapping[str, Any] | str) -> Automaton:
    """Allows JSON texts that satisfy a JSON schema, with single spaces at most.

    Raises:
      UserError: no JSON schema, or one with parts that are not supported.
    """
    json_schema = optional("outlines_core.json_schema", extra="constrained")

    text = schema if isinstance(schema, str) else json.dumps(schema)
    try:
        pattern = json_schema.build_regex_from_schema(text)
    except Exception as error:
        raise UserError(f"JSON schema: {error}: mend or simplify it") from None
    return regex_automaton(tokenizer, pattern)


def _from_transitions(index: Any, tokenizer: Tokenizer) -> Automaton:
    transitions, ended = index.get_transitions(), index.get_final_states()
    states = [index.get_initial_state()]
    states += sorted(set(transitions) - ended - set(states))
    final = np.array([transitions[state].get(tokenizer.eos_id) in ended for state in states])
    number = {state: row for row, state in enumerate(states)}
    # Tokens whose columns are equal have equal sums of random weights, and, but for a chance of about 2^-64,
    # only those: so no table of all tokens is ever held.
    rng = np.random.default_rng(0)
    weights = rng.integers(0, 2**63, (len(states), 2), np.uint64)
    sums = np.zeros(tokenizer.vocab_size, np.uint64)
    rows = []
    for row, state in enumerate(states):
        edges = {token: number[target] for token, target in transitions[state].items() if target in number}
        edges.pop(tokenizer.eos_id, None)
        tokens, targets = (np.fromiter(x, np.int64, len(edges)) for x in (edges.keys(), edges.values()))
        rows.append((row, tokens, targets))
        with np.errstate(over="ignore"):
            sums[tokens] += weights[row, 0] * (weights[targets, 1] | np.uint64(1))
    _, token_class = np.unique(sums, return_inverse=True)
    table = np.full((len(states), int(token_class.max()) + 1), -1)
    for row, tokens, targets in rows:
        table[row, token_class[tokens]] = targets
    return _automaton(token_class, table, final)


def _automaton(token_class: np.ndarray, table: np.ndarray, final: np.ndarray) -> Automaton:
    return Automaton(jnp.asarray(token_class, jnp.int32), jnp.asarray(table, jnp.int32), jnp.asarray(final))
