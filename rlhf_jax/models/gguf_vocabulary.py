"""The metadata of a GGUF file that say what a tokenizer is: the inverse of `gguf_tokenizer`.

GGUF names how texts are cut before BPE, instead of saying it. The name is found as llama.cpp's converter
finds it: by the ids of a text that they all cut differently.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf_jax.core.errors import UserError
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.models.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NAMES,
    NORMAL,
    PATTERNS,
    PLAIN,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    is_byte,
    tokenizer_of,
)

PROBE = (
    "The river's 3 bridges (built 1987-2024) DON'T  close;\n\n\tsee   https://a.b/c?d=1_2 \r\n"
    " naïve cafe\u0301 Ǆ ﬁ ½ — “quotes” … 12345 ٣٤٥ १२३ السلام عليكم привет, 世界。 สวัสดี 👩‍👧 🚀🚀"
    " x=[i**2 for i in range(10)]; e.g. I'll we've HE'S 1,000.50 \u00a0\u3000   "
)
"""Contractions, digits of three scripts, runs of spaces and newlines, accents that combine, signs, code."""


def metadata_of(tokenizer: Tokenizer, vocab_size: int, where: str) -> dict[str, Any]:
    """GGUF metadata of a tokenizer by the names behind `tokenizer.`, as `gguf_tokenizer` reads it.

    Args:
      vocab_size: of the model; ids that the tokenizer lacks are filled.
      where: the file, for messages.

    Raises:
      UserError: it has more tokens than the model, or GGUF has no name for what it does.
    """
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} tokens and the model {vocab_size}: they are "
            "not of one model"
        )
    model = json.loads(tokenizer.backend.to_str())["model"]
    kind = model.get("type", "BPE")
    if kind != "BPE":
        raise UserError(
            f"{where}: GGUF has no place for a tokenizer of the kind {kind}, only for BPE: save a Hugging "
            "Face folder, whose path does not end in .gguf"
        )
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    tokens, types = _tokens(tokenizer, vocab_size)
    common = {"ggml.tokens": tokens, "ggml.token_type": types, **_special(tokenizer)}
    kinds = _sentencepiece(tokens, merges) if model.get("byte_fallback") else _byte_level(merges)
    found = [
        (metadata, theirs)
        for metadata in ({**common, **kind} for kind in kinds)
        if _same(theirs := tokenizer_of(metadata, where), tokenizer)
    ]
    if found:
        # Of several that cut the text alike, the one that says it in the same words.
        return max(found, key=lambda pair: _cutting(pair[1]) == _cutting(tokenizer))[0]
    raise UserError(
        f"{where}: the tokenizer cuts texts in none of the ways that GGUF has a name for here "
        f"({', '.join((*PLAIN, *PATTERNS))}, SentencePiece): save a Hugging Face folder, whose path does not "
        "end in .gguf"
    )


def _same(theirs: Tokenizer, ours: Tokenizer) -> bool:
    """True if texts get the same ids, with what opens them and with special tokens among them."""
    text = PROBE + "".join(ours.special_tokens) + PROBE
    return theirs.eos_id == ours.eos_id and all(
        theirs.encode(text, special=special) == ours.encode(text, special=special)
        for special in (False, True)
    )


def _cutting(tokenizer: Tokenizer) -> Any:
    return json.loads(tokenizer.backend.to_str())["pre_tokenizer"]


def _tokens(tokenizer: Tokenizer, vocab_size: int) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [UNUSED] * vocab_size
    added = tokenizer.backend.get_added_tokens_decoder()
    for token, index in tokenizer.backend.get_vocab(with_added_tokens=True).items():
        tokens[index] = token
        types[index] = BYTE if is_byte(token) else NORMAL
        if index in added:
            types[index] = CONTROL if added[index].special else USER_DEFINED
    unknown = tokenizer.backend.token_to_id(tokenizer.names.get("unk_token", ""))
    if unknown is not None and types[unknown] == NORMAL:
        types[unknown] = UNKNOWN
    return tokens, types


def _special(tokenizer: Tokenizer) -> dict[str, Any]:
    """Ids of named tokens, the template, and whether a text is opened by a token."""
    ids = {key: tokenizer.backend.token_to_id(tokenizer.names.get(name, "")) for name, key in NAMES.items()}
    found: dict[str, Any] = {f"ggml.{key}_token_id": index for key, index in ids.items() if index is not None}
    if tokenizer.eos_id != ids["eos"]:
        found["ggml.eot_token_id"] = tokenizer.eos_id
    opened = tokenizer.backend.encode("a", add_special_tokens=True).ids[:1]
    found["ggml.add_bos_token"] = tokenizer.bos_id is not None and opened == [tokenizer.bos_id]
    return {**found, "chat_template": tokenizer.chat_template}


def _byte_level(merges: Sequence[Sequence[str]]) -> Iterator[Mapping[str, Any]]:
    for kind in (*PLAIN, *PATTERNS):
        joined = [" ".join(merge) for merge in merges]
        yield {"ggml.model": "gpt2", "ggml.pre": kind, "ggml.merges": joined}


def _sentencepiece(tokens: Sequence[str], merges: Sequence[Sequence[str]]) -> Iterator[Mapping[str, Any]]:
    """Scores in the order of the merges that make the tokens; those that none makes come last."""
    rank: dict[str, int] = {}
    for place, merge in enumerate(merges):
        rank.setdefault("".join(merge), place)
    scores = [-float(rank.get(token, len(merges))) for token in tokens]
    for prefix in (True, False):
        yield {
            "ggml.model": "llama",
            "ggml.pre": "default",
            "ggml.scores": scores,
            "ggml.add_space_prefix": prefix,
        }
