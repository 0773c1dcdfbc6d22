"""Tokenizers: a thin class over the `tokenizers` library, and makers of small ones."""

import copy
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlhf_jax.core import files
from rlhf_jax.core.arguments import told
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.files import PathLike
from rlhf_jax.data.images import ImageProcessor
from rlhf_jax.data.templates import CHATML, TemplateError, render
from rlhf_jax.data.tokenizer_files import chat_template, read_config, read_tokenizer_json, token_names

PAD, TURN_START, TURN_END = "<|pad|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (PAD, TURN_START, TURN_END)

# What BPE may merge within: a word or signs with the space before them, spaces; digits and newlines alone.
_PIECE = r"\n|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|[^\S\n]+(?!\S)|[^\S\n]+"


class Tokenizer:
    """Text to ids and back, with the few facts that training and chat need.

    Attributes:
      vocab_size: one more than the largest id.
      pad_id: the id that fills rows; where a checkpoint names none, `eos_id` (padding is always masked).
      eos_id: the id that ends an assistant's turn.
      bos_id: the id that opens a text, or None.
      chat_template: jinja2 source that lays out a conversation.
      special_tokens: text of each special token and its id.
      names: text of `bos_token`, `eos_token`, `pad_token`, ... as chat templates see them.
      image_processor: how images become tokens; None where the model reads none.
    """

    MADE_BY = "a tokenizer, such as rlhf_jax.data.tokenizers.load_tokenizer(path) returns"

    def __init__(self, backend: Any, names: Mapping[str, str], chat_template: str = CHATML) -> None:
        """Args: `backend` is a `tokenizers.Tokenizer`, `names` holds at least `eos_token`."""
        self.backend = backend
        self.names = dict(names)
        self.chat_template = chat_template
        added = backend.get_added_tokens_decoder()
        self.special_tokens = {token.content: index for index, token in added.items() if token.special}
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        eos_id = self._named_id("eos_token")
        if eos_id is None:
            raise UserError("the tokenizer names no eos_token; add one to its tokenizer_config.json")
        self.eos_id: int = eos_id
        pad_id = self._named_id("pad_token")
        self.pad_id: int = eos_id if pad_id is None else pad_id
        self.bos_id: int | None = self._named_id("bos_token")
        self.image_processor: ImageProcessor | None = None

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of `text`. Only with `special=True` does text such as `<|im_end|>` become a special id."""
        return self.encode_with_starts(text, special=special)[0]

    def encode_with_starts(self, text: str, *, special: bool = False) -> tuple[list[int], list[int]]:
        """Ids, and the index in `text` of the character where each of them starts.

        Raises:
          UserError: no text, a lone surrogate, or a character outside a character tokenizer's alphabet.
        """
        if not isinstance(text, str):
            raise UserError(f"text is {told(text)}: give a string")
        try:
            encoding = (self.backend if special else self._plain).encode(text, add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception for whatever its model refuses
            raise UserError(self._refusal(text, error)) from None
        return encoding.ids, [start for start, _ in encoding.offsets]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of `ids`, without the special tokens unless they are asked for."""
        return self.backend.decode([int(index) for index in ids], skip_special_tokens=skip_special)

    def token(self, index: int) -> str:
        """The token as the vocabulary writes it (byte-level tokens in their printable alphabet)."""
        token = self.backend.id_to_token(int(index))
        if token is None:
            raise UserError(
                f"there is no token {index} in a vocabulary of {self.vocab_size}; use ids below that"
            )
        return token

    def table(self, ids: Iterable[int], mask: Iterable[bool] | None = None) -> str:
        """Ids beside tokens, one a line: place, id, token, and `*` where `mask` counts the token."""
        ids = [int(index) for index in ids]
        marks = [False] * len(ids) if mask is None else list(mask)
        rows = enumerate(zip(ids, marks, strict=True))
        return "\n".join(
            f"{place:5d} {index:7d}  {'*' if counts else ' '} {self._shown(index)}"
            for place, (index, counts) in rows
        )

    def with_special(self, texts: Sequence[str]) -> "Tokenizer":
        """The tokenizer with these special tokens; those that it lacks come behind its last id."""
        backend = type(self.backend).from_str(self.backend.to_str())
        backend.add_special_tokens([text for text in texts if text not in self.special_tokens])
        other = Tokenizer(backend, self.names, self.chat_template)
        other.eos_id = self.eos_id
        return other

    def with_images(self, image_processor: ImageProcessor) -> "Tokenizer":
        """The tokenizer of a model that reads images."""
        other = copy.copy(self)
        other.image_processor = image_processor
        return other

    def save(self, folder: PathLike) -> None:
        """Writes tokenizer.json and tokenizer_config.json, the layout that Hugging Face tools read."""
        folder = files.as_path(folder)
        files.write_whole(folder / "tokenizer.json", self.backend.to_str(pretty=True))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "chat_template": self.chat_template,
            **self.names,
        }
        text = json.dumps(config, indent=2, ensure_ascii=False)
        files.write_whole(folder / "tokenizer_config.json", text + "\n")

    @functools.cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Matches any special token; the longest where one begins with another."""
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    @functools.cached_property
    def forgery_pattern(self) -> re.Pattern[str]:
        """Matches text that could pass for a special token once a template has put other text after it."""
        heads = {token[:end] for token in self.special_tokens for end in range(1, len(token))}
        longest_first = sorted(heads, key=len, reverse=True)
        at_end = "|".join(map(re.escape, longest_first)) or r"(?!)"
        return re.compile(rf"{self.special_pattern.pattern}|(?:{at_end})(?=\s*\Z)")

    @functools.cached_property
    def separable(self) -> bool:
        """True if the ids of a text are those of its parts, cut after a newline, one after the other.

        Not so where the tokenizer puts a space before every text it is given.
        """
        try:
            first, second, both = (self.encode(text) for text in ("\n", "a", "\na"))
        except UserError:  # an alphabet without these two: characters, which always stand alone
            return True
        return first + second == both

    @functools.cached_property
    def _plain(self) -> Any:
        """A twin that reads special tokens as ordinary text (the switch is state of the library's object)."""
        twin = type(self.backend).from_str(self.backend.to_str())
        twin.encode_special_tokens = True
        return twin

    def _named_id(self, name: str) -> int | None:
        return self.backend.token_to_id(self.names[name]) if name in self.names else None

    def _shown(self, index: int) -> str:
        token = self.backend.id_to_token(index)
        return "(no such token)" if token is None else token.encode("unicode_escape").decode("ascii")

    def _refusal(self, text: str, error: Exception) -> str:
        surrogate = re.search("[\ud800-\udfff]", text)
        if surrogate:
            found = f"{surrogate[0]!a} at character {surrogate.start()}"
            return f"text holds a lone surrogate ({found}); remove it"
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        for place, character in enumerate(text):
            if character not in vocabulary:
                return (
                    f"character {character!r} (at {place} of the text) is not in the tokenizer's alphabet; "
                    "add it to the alphabet or use a byte-level tokenizer"
                )
        return f"the tokenizer cannot encode this text ({error}); check its tokenizer.json"


def character_tokenizer(alphabet: str, words: Sequence[str] = ()) -> Tokenizer:
    """One token for each character of `alphabet` and for each of `words`, such as `####` or `assistant`.

    Ids: padding 0, the turn marks 1 and 2, then the alphabet and the words in the order given. A word
    is one token wherever it occurs, within longer words too.

    Raises:
      UserError: a character given twice, or a word that is empty, repeated or a single character.
    """
    from tokenizers import AddedToken, Regex, Tokenizer as Backend, decoders, models, pre_tokenizers

    entries = [*SPECIAL_TOKENS, *alphabet, *words]
    for entry in entries:
        if entries.count(entry) > 1:
            raise UserError(f"{entry!r} stands twice in the tokenizer's alphabet and words; keep one")
    for word in words:
        if len(word) < 2:
            raise UserError(f"the word {word!r} is shorter than two characters; put it into the alphabet")
    backend = Backend(models.WordLevel({entry: index for index, entry in enumerate(entries)}))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    backend.add_tokens([AddedToken(word, normalized=False) for word in words])
    return Tokenizer(backend, {"eos_token": TURN_END, "pad_token": PAD})


def byte_tokenizer() -> Tokenizer:
    """One token for each byte of UTF-8: 256 of them after the three special ones. Any text round-trips."""
    from tokenizers import Tokenizer as Backend, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    return Tokenizer(backend, {"eos_token": TURN_END, "pad_token": PAD})


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE learnt from `texts`; any text round-trips.

    Every digit and every newline is a token of its own. The newline makes a text cut after one have the
    ids of its two parts, so that a chat has the same ids whether it was sampled or encoded as a whole.
    The same texts give the same tokenizer. `vocab_size` counts the 256 bytes and three special tokens;
    where the texts are too few to fill it, the vocabulary is smaller.

    Raises:
      UserError: `vocab_size` below 259.
    """
    from tokenizers import Regex, Tokenizer as Backend, decoders, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    smallest = len(alphabet) + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise UserError(
            f"vocab_size {vocab_size} cannot hold the {smallest} bytes and special tokens; raise it"
        )
    backend = Backend(models.BPE())
    pieces = pre_tokenizers.Split(Regex(_PIECE), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pieces, to_bytes])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, {"eos_token": TURN_END, "pad_token": PAD})


def load_tokenizer(path: PathLike) -> Tokenizer:
    """Reads a Hugging Face tokenizer: a folder, or its tokenizer.json.

    From tokenizer_config.json beside it come the names of special tokens and the chat template, which a
    chat_template.jinja overrides; without a template the built-in ChatML stands in, whose turn marks must
    then be special tokens of the vocabulary if chat is to be used.

    Raises:
      UserError: a missing or malformed file, or no eos_token.
    """
    path = files.as_path(path)
    file = path / "tokenizer.json" if files.is_folder(path) else path
    if not files.is_file(file):
        raise UserError(f"{file}: no such tokenizer; give a folder that holds tokenizer.json")
    backend, config_file = read_tokenizer_json(file), file.with_name("tokenizer_config.json")
    config = read_config(config_file)
    names = token_names(config, config_file)
    if "eos_token" not in names and backend.token_to_id(TURN_END) is not None:
        names["eos_token"] = TURN_END
    template = chat_template(config, config_file, file.with_name("chat_template.jinja"))
    try:
        tokenizer = Tokenizer(backend, names, template)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    tokenizer.eos_id = turn_end(tokenizer)
    return tokenizer


def turn_end(tokenizer: Tokenizer) -> int:
    """The special token that the template writes after an assistant's words; else the named eos_token.

    They differ where a chat model is made from a base model: Gemma's turns end in `<end_of_turn>`, while
    its configuration still names `<eos>`.
    """
    said = {"user": "1", "assistant": "2"}
    texts = [{"role": role, "content": text} for role, text in said.items()]
    parts = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in said.items()]
    forms = [
        {**tokenizer.names, "messages": messages, "add_generation_prompt": False}
        for messages in (texts, parts)
    ]
    try:
        # Templates of models with vision may go through parts, and write nothing of a text.
        text = next((text for form in forms if "2" in (text := _rendered(tokenizer, form))), "")
    except TemplateError:  # said when the template is used, which may be never
        return tokenizer.eos_id
    found = tokenizer.special_pattern.search(text, text.rfind("2") + 1)
    return tokenizer.special_tokens[found.group()] if found else tokenizer.eos_id


def _rendered(tokenizer: Tokenizer, variables: Mapping[str, Any]) -> str:
    return render(tokenizer.chat_template, [dict(variables)], ("", ""))[0]
