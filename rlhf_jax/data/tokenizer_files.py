"""Files of a Hugging Face tokenizer, looked at before anything is made of them.

The library that reads tokenizer.json believes its ids: it takes the last of two tokens with one id, gives an
added token another id than the file does, and makes room for as many tokens as the largest id says.
"""

import collections
import json
import re
from collections.abc import Mapping
from typing import Any

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.files import Path
from rlhf_jax.data.templates import CHATML

_SURROGATE = re.compile("[\ud800-\udfff]")
_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


def read_tokenizer_json(file: Path) -> Any:
    """The tokenizer of the library `tokenizers` that a tokenizer.json describes.

    Raises:
      UserError: it is no JSON, or describes none whose ids can be trusted.
    """
    from tokenizers import Tokenizer as Backend

    text = _text(file)
    data = _json_object(file, text)
    try:
        _check_ids(_ids_of_model(data.get("model")), data.get("added_tokens") or [])
        backend = Backend.from_str(text)
    except UserError as error:
        raise UserError(f"{file}: {error}; fetch the file again") from None
    except Exception as error:  # the library raises bare Exception for a malformed file
        raise UserError(f"{file}: not a tokenizer.json ({error}); fetch it again") from None
    for token in data.get("added_tokens") or []:
        given = backend.token_to_id(token["content"])
        if given != token["id"]:
            raise UserError(
                f"{file}: the added token {token['content']!r} has the id {token['id']} in the file and "
                f"{given} beside the other tokens; fetch the file again"
            )
    return backend


def _ids_of_model(model: Any) -> dict[str, Any]:
    """Ids by token, where the file gives them so: of lists of tokens they are the places."""
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocabulary, list):
        pieces = [entry[0] for entry in vocabulary if isinstance(entry, list) and entry]
        return {piece: place for place, piece in enumerate(pieces) if isinstance(piece, str)}
    return vocabulary if isinstance(vocabulary, dict) else {}


def _check_ids(vocabulary: Mapping[str, Any], added: Any) -> None:
    """Raises: UserError, without the file's name, where ids are no numbers of their tokens alone."""
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise UserError("`added_tokens` is no list of tokens")
    whole = dict(vocabulary)
    for token in added:
        content, index = token.get("content"), token.get("id")
        if not isinstance(content, str):
            raise UserError(f"an added token has the content {content!r}, which is no text")
        if whole.setdefault(content, index) != index:
            raise UserError(f"the token {content!r} has two ids, {whole[content]} and {index}")
    owners: dict[int, str] = {}
    for content, index in whole.items():
        if _SURROGATE.search(content):
            raise UserError(f"the token {content!a} holds a lone surrogate")
        if type(index) is not int or index < 0:
            raise UserError(f"the token {content!r} has the id {index!r:.40}, no whole number from 0")
        if owners.setdefault(index, content) != content:
            raise UserError(f"the tokens {owners[index]!r} and {content!r} have both the id {index}")
    if not owners:
        raise UserError("not a tokenizer.json, as it has no tokens")
    # Published vocabularies have gaps, but none as large as themselves.
    if (largest := max(owners)) >= 2 * len(owners):
        raise UserError(
            f"the token {owners[largest]!r} has the id {largest}, far beyond its {len(owners)} tokens"
        )


# tokenizer_config.json and the chat template --------------------------------------------------------


def read_config(file: Path) -> dict[str, Any]:
    """Fields of a tokenizer_config.json; nothing where there is none.

    Raises:
      UserError: it is no JSON object.
    """
    return _json_object(file, _text(file)) if files.is_file(file) else {}


def token_names(config: Mapping[str, Any], file: Path) -> dict[str, str]:
    """Texts of `eos_token` and the like, which a configuration gives plain or as an object.

    Raises:
      UserError: one is no text.
    """
    names = {}
    for name, value in config.items():
        if not re.fullmatch(r"[a-z]+_token", name):
            continue
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            names[name] = _without_surrogates(text, name, file)
        elif name in _ROLES and value is not None:
            raise UserError(f"{file}: {name} is {value!r:.40}, which is no text; fetch the file again")
    return names


def chat_template(config: Mapping[str, Any], config_file: Path, file: Path) -> str:
    """The template of chat_template.jinja, else of the configuration, else the built-in one.

    Raises:
      UserError: it is no text.
    """
    if files.is_file(file):
        return _text(file)
    template = config.get("chat_template")
    if template is None:
        return CHATML
    if isinstance(template, list):  # several named ones: take the default
        named = [entry for entry in template if isinstance(entry, dict)]
        template = next((x.get("template") for x in named if x.get("name") == "default"), None)
    if not isinstance(template, str):
        raise UserError(
            f"{config_file}: chat_template is no text, nor a list with a template called default; mend it, "
            f"or put the template into {file.name}"
        )
    return _without_surrogates(template, "chat_template", config_file)


def _without_surrogates(text: str, name: str, file: Path) -> str:
    if found := _SURROGATE.search(text):
        place = f"{found[0]!a} at character {found.start()}"
        raise UserError(f"{file}: {name} holds a lone surrogate ({place}); fetch the file again")
    return text


def _text(file: Path) -> str:
    try:
        return files.read_text(file)
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error}); check the file") from None


def _json_object(file: Path, text: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs) and file.name == "tokenizer.json":
            twice, _ = collections.Counter(name for name, _ in pairs).most_common(1)[0]
            raise ValueError(f"{twice!a} stands twice")
        return fields

    try:
        data = json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise UserError(f"{file}: nested too deeply; fetch the file again") from None
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); fetch the file again") from None
    if not isinstance(data, dict):
        raise UserError(f"{file}: not a JSON object; fetch the file again")
    return data
