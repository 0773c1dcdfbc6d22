"""The tokenizer in the metadata of a GGUF file: byte-level BPE, or the BPE of SentencePiece."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.core.errors import UserError
from rlhf_jax.data.tokenizers import CHATML, Tokenizer, turn_end

# How texts are cut before BPE, as the tokenizer.json of these models says it.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {"llama-bpe": _WORDS % r"\p{N}{1,3}", "qwen2": _WORDS % r"\p{N}"}
PLAIN = ("gpt-2", "smollm")
"""Cut as by GPT-2; `smollm` cuts digits from one another first."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of tokens."""
NAMES = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
SPACE = "▁"


def tokenizer_of(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    """The tokenizer that `tokenizer.ggml.*` and `tokenizer.chat_template` describe.

    Args:
      metadata: by the name behind `tokenizer.`, None or absent for what the file lacks.
      where: the file, for messages.

    Raises:
      UserError: its kind is not supported, or something is missing.
    """
    tokens = metadata.get("ggml.tokens")
    if not tokens:
        raise UserError(f"{where}: holds no vocabulary: put the model's tokenizer.json beside it.")
    match metadata.get("ggml.model"):
        case "gpt2":
            backend = _byte_level(metadata, tokens, where)
        case "llama":
            backend = _sentencepiece(metadata, tokens)
        case other:
            raise UserError(
                f"{where}: a tokenizer of the kind {other!r} is not supported: put the model's "
                "tokenizer.json beside the file."
            )
    _add_special(backend, tokens, metadata.get("ggml.token_type") or [])
    ids = {name: metadata.get(f"ggml.{key}_token_id") for name, key in NAMES.items()}
    names = {name: tokens[index] for name, index in ids.items() if index is not None}
    opened = metadata.get("ggml.add_bos_token")
    if "bos_token" in names and (metadata["ggml.model"] == "llama" if opened is None else opened):
        _open_with(backend, names["bos_token"])
    try:
        tokenizer = Tokenizer(backend, names, metadata.get("chat_template") or CHATML)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    tokenizer.eos_id = turn_end(tokenizer)
    return tokenizer


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str], where: str) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    kind = metadata.get("ggml.pre")
    if kind not in (*PATTERNS, *PLAIN):
        raise UserError(
            f"{where}: its tokenizer cuts texts in the way of {kind!r}, which is not supported "
            f"({', '.join((*PATTERNS, *PLAIN))} are): put the model's tokenizer.json beside the file."
        )
    merges = [tuple(merge.split(" ")) for merge in metadata.get("ggml.merges") or []]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=kind == "llama-bpe"))
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind in PLAIN)]
    if kind == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    if kind in PATTERNS:
        steps.insert(0, pre_tokenizers.Split(Regex(PATTERNS[kind]), "isolated"))
    if kind == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Any:
    """SentencePiece merges the pair whose union has the highest score; BPE wants the pairs in that order."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    ids = {token: index for index, token in enumerate(tokens)}
    scores = metadata.get("ggml.scores") or [0.0] * len(tokens)
    found = []
    for token, index in ids.items():
        for cut in range(1, len(token)):
            left, right = ids.get(token[:cut]), ids.get(token[cut:])
            if left is not None and right is not None:
                found.append((-scores[index], left, right))
    merges: list[Any] = [(tokens[left], tokens[right]) for _, left, right in sorted(found)]
    unknown = tokens[metadata.get("ggml.unknown_token_id") or 0]
    backend = Tokenizer(models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = metadata.get("ggml.add_space_prefix") is not False
    spaces: list[Any] = [normalizers.Replace(" ", SPACE)]
    back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        spaces.insert(0, normalizers.Prepend(SPACE))
        back.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(spaces)
    backend.decoder = decoders.Sequence(back)
    return backend


def _open_with(backend: Any, token: str) -> None:
    """Makes other programs, to which the tokenizer is exported, put a token before every text."""
    from tokenizers import processors

    backend.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, backend.token_to_id(token))]
    )


def is_byte(token: str) -> bool:
    """True if SentencePiece writes a byte so."""
    return re.fullmatch(r"<0x[0-9A-F]{2}>", token) is not None


def _add_special(backend: Any, tokens: Sequence[str], types: Sequence[int]) -> None:
    from tokenizers import AddedToken

    special = [AddedToken(t, normalized=False) for t, k in zip(tokens, types, strict=False) if k == CONTROL]
    plain = [
        AddedToken(t, normalized=False) for t, k in zip(tokens, types, strict=False) if k == USER_DEFINED
    ]
    backend.add_special_tokens(special)
    backend.add_tokens(plain)
