"""Completions of the OpenAI protocol as token ids: fields of a request, and checked reading of a reply."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from rlhf_jax.core.errors import UserError
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.generation import Sampling

AS_TOKEN_IDS: dict[str, Any] = {
    "logprobs": 1,  # of the token itself; SGLang takes 0 for none
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
    "skip_special_tokens": False,
    # The token that ends an answer stays in it: vLLM calls this so, SGLang no_stop_trim.
    "include_stop_str_in_output": True,
    "no_stop_trim": True,
}
"""Fields of a request whose answers are token ids with log-probs; extensions of vLLM and SGLang."""

_SENT = ("temperature", "top_k", "top_p", "min_p")
"""The rules of `Sampling` that both servers know alike."""
_UNREADABLE = (KeyError, IndexError, TypeError, ValueError, OverflowError, AttributeError)


@dataclasses.dataclass(frozen=True)
class Answer:
    """One completion: its tokens, their log-probs in nats, and whether it ended by itself."""

    ids: list[int]
    logp: list[float]
    finished: bool


def sampling_fields(sampling: Sampling) -> dict[str, Any]:
    """The rules of sampling as fields of a request.

    Raises:
      UserError: a rule that servers do not know, or not alike.
    """
    rules = {field.name: getattr(sampling, field.name) for field in dataclasses.fields(sampling)}
    others = [name for name, rule in rules.items() if rule is not None and name not in _SENT]
    if others:
        raise UserError(f"sampling: {', '.join(others)} is not known to servers: use the local engine")
    return {name: np.asarray(rules[name]).item() for name in _SENT if rules[name] is not None}


def read_choices(reply: Any, wanted: int, tokenizer: Tokenizer, *, where: str) -> list[Answer]:
    """The answers in a reply, in the order of what was asked.

    Raises:
      UserError: not so many came, or one cannot be read; names `where`.
    """
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or len(choices) != wanted:
        raise UserError(f"{where}: {wanted} answers were asked for and not as many choices came back")
    try:
        places = {_whole(choice["index"]): choice for choice in choices}
        if sorted(places) != list(range(wanted)):
            raise ValueError("indices of choices are not 0, 1, 2, ...")
        return [_read_choice(places[place], tokenizer) for place in range(wanted)]
    except _UNREADABLE as error:
        raise UserError(
            f"{where}: a choice cannot be read ({error!r}): the server must return token ids and "
            "log-probs (vLLM and SGLang: return_token_ids)"
        ) from error


def read_prompt_logps(reply: Any, length: int, *, where: str) -> list[float]:
    """Log-probs of the tokens of an echoed prompt after its first one.

    Raises:
      UserError: they cannot be read; names `where`.
    """
    try:
        values = reply["choices"][0]["logprobs"]["token_logprobs"][1:length]
        if len(values) != length - 1:
            raise ValueError(f"{len(values)} log-probs for {length - 1} tokens")
        return [_log_prob(value) for value in values]
    except _UNREADABLE as error:
        raise UserError(
            f"{where}: log-probs of a prompt cannot be read ({error!r}): the server must know echo with "
            "logprobs"
        ) from error


def _read_choice(choice: Mapping[str, Any], tokenizer: Tokenizer) -> Answer:
    logp = [_log_prob(value) for value in choice["logprobs"]["token_logprobs"]]
    ids = choice.get("token_ids")
    if ids is None:
        ids = [int(token.removeprefix("token_id:")) for token in choice["logprobs"]["tokens"]]
    if len(ids) != len(logp) or not ids:
        raise ValueError(f"{len(ids)} tokens with {len(logp)} log-probs")
    for index in ids:
        if not 0 <= _whole(index) < tokenizer.vocab_size:
            raise ValueError(f"{index!r} is no id of {tokenizer.vocab_size} tokens")
    ended = ids[-1] == tokenizer.eos_id
    # Another token may end an answer where the server knows more of them; a trimmed one may not be missing.
    if choice.get("finish_reason") == "stop" and not ended and choice.get("stop_reason") != ids[-1]:
        raise ValueError("the token that ends an answer was cut off")
    return Answer(list(ids), logp, ended or choice.get("finish_reason") == "stop")


def _whole(value: Any) -> int:
    if type(value) is not int:  # True is one, too, for isinstance
        raise ValueError(f"{value!r} is no whole number")
    return value


def _log_prob(value: Any) -> float:
    number = math.nan if isinstance(value, bool) else float(value)
    if not -1e30 < number <= 1e-3:
        raise ValueError(f"{value!r} is no log-prob")
    return number
