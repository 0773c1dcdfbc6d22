"""Who answers the prompts of a training run: this process, or a server that speaks the OpenAI protocol."""

import concurrent.futures
import dataclasses
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.masks import masked_mean
from rlhf_jax.core.types import Array, Float, Params, PRNGKeyArray, Rollout, ScoreFn, Sequences
from rlhf_jax.data.examples import PromptExample
from rlhf_jax.data.packing import left_pad
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.models import ModelConfig, hf
from rlhf_jax.rollout.sampler import GenerateFn


@runtime_checkable
class RolloutEngine(Protocol):
    """Answers prompts with the parameters that it was given last."""

    def update_params(self, params: Params, version: int) -> None:
        """Answers from now on are those of `params`."""
        ...

    def generate(self, params_version: int, prompts: Sequence[PromptExample], key: PRNGKeyArray) -> Rollout:
        """One answer for each prompt: tokens, mask, and the log-probs that the sampler reports.

        Raises:
          ValueError: the engine holds parameters of another version.
        """
        ...


class LocalEngine:
    """Answers in this process; the oracle of the others."""

    def __init__(self, generate: GenerateFn) -> None:
        """Args: `generate` is what `rollouts.make_generate_fn` gives."""
        self._generate = generate
        self._params: Params = None
        self._version: int | None = None

    def update_params(self, params: Params, version: int) -> None:
        """Keeps a reference to `params`."""
        self._params, self._version = params, version

    def generate(self, params_version: int, prompts: Sequence[PromptExample], key: PRNGKeyArray) -> Rollout:
        """See `RolloutEngine`."""
        _check_version(self._version, params_version)
        return self._generate(self._params, prompts, key)


def _check_version(held: int | None, wanted: int) -> None:
    if held != wanted:
        raise ValueError(f"the engine holds parameters of version {held}, not {wanted}: call update_params")


def sampler_mismatch(score_fn: ScoreFn, params: Params, rollout: Rollout) -> Float[Array, ""]:
    """Mean |delta log-prob| between a rollout and its rescoring, in nats a token."""
    rescored = score_fn(params, rollout.sequences).logp
    return masked_mean(jnp.abs(rescored - rollout.logp), rollout.sequences.mask)


# Over HTTP -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class HTTPOptions:
    """How a server is asked.

    Attributes:
      url: where it listens, such as http://localhost:8000.
      model: the name that it serves.
      timeout: seconds to wait for an answer.
      retries: more attempts after one that failed on the way or at the server.
      backoff: seconds before the first of them; doubled each time.
      prompts_per_request: prompts in one request.
      connections: requests at a time.
    """

    url: str
    model: str = "default"
    timeout: float = 600.0
    retries: int = 3
    backoff: float = 1.0
    prompts_per_request: int = 16
    connections: int = 8


class HTTPEngine:
    """Answers of an OpenAI-compatible server, such as vLLM or SGLang, through `/v1/completions`.

    Prompts are sent as token ids and answers are taken as token ids (`token_ids` of a choice, or
    `token_id:N` in its log-probs); text is never tokenised again. The reported log-probs must be those of
    the full distribution at the sampling temperature: `sampler_mismatch` says whether they are.
    """

    def __init__(
        self,
        options: HTTPOptions,
        tokenizer: Tokenizer,
        *,
        prompt_length: int,
        max_new_tokens: int,
        temperature: float = 1.0,
        publish: Callable[[Params, int], None],
    ) -> None:
        """Args: `publish(params, version)` makes the server use new parameters (`publish_from_disk`)."""
        self._options, self._tokenizer, self._publish = options, tokenizer, publish
        self._prompt_length, self._new_tokens = prompt_length, max_new_tokens
        self._temperature = temperature
        self._version: int | None = None

    def update_params(self, params: Params, version: int) -> None:
        """Publishes `params` to the server."""
        self._publish(params, version)
        self._version = version

    def generate(self, params_version: int, prompts: Sequence[PromptExample], key: PRNGKeyArray) -> Rollout:
        """See `RolloutEngine`.

        Raises:
          UserError: the server cannot be reached, refuses, or answers something else than was asked.
        """
        _check_version(self._version, params_version)
        size = self._options.prompts_per_request
        parts = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        seeds = np.asarray(jax.random.randint(key, (len(parts),), 0, 2**31 - 1)).tolist()
        with concurrent.futures.ThreadPoolExecutor(self._options.connections) as pool:
            answers = [a for part in pool.map(self._ask, parts, seeds) for a in part]
        return self._rollout(prompts, answers)

    def _ask(self, prompts: Sequence[PromptExample], seed: int) -> list["_Answer"]:
        url = f"{self._options.url.rstrip('/')}/v1/completions"
        reply = post_json(
            url,
            {
                "model": self._options.model,
                "prompt": [prompt.ids.tolist() for prompt in prompts],
                "max_tokens": self._new_tokens,
                "temperature": self._temperature,
                "seed": seed,
                "logprobs": 0,
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,
                "skip_special_tokens": False,
            },
            self._options,
        )
        choices = reply.get("choices")
        if not isinstance(choices, list) or len(choices) != len(prompts):
            raise UserError(f"{url}: {len(prompts)} prompts were sent and not as many choices came back")
        try:
            ordered = sorted(choices, key=lambda choice: choice["index"])
            return [_read_choice(choice, self._tokenizer.vocab_size) for choice in ordered]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{url}: a choice cannot be read ({error!r}): the server must return token ids and "
                "log-probs (in vLLM: return_token_ids)"
            ) from error

    def _rollout(self, prompts: Sequence[PromptExample], answers: Sequence["_Answer"]) -> Rollout:
        width, new = self._prompt_length, self._new_tokens
        ids, mask = left_pad([p.ids for p in prompts], width, pad_id=self._tokenizer.pad_id)
        tokens = np.full((len(prompts), width + new), self._tokenizer.pad_id, np.int32)
        valid, logp = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, np.float32)
        tokens[:, :width], valid[:, :width] = ids, mask
        for row, answer in enumerate(answers):
            if len(answer.ids) > new:
                raise UserError(f"{self._options.url}: an answer has {len(answer.ids)} tokens, not {new}")
            end = width + len(answer.ids)
            tokens[row, width:end], valid[row, width:end], logp[row, width:end] = (
                answer.ids,
                True,
                answer.logp,
            )
        finished = [answer.ids[-1:] == [self._tokenizer.eos_id] for answer in answers]
        sequences = Sequences(
            tokens=jnp.asarray(tokens),
            positions=jnp.asarray(np.maximum(np.cumsum(valid, axis=1) - 1, 0), jnp.int32),
            segment_ids=jnp.asarray(valid, jnp.int32),
            mask=jnp.asarray(valid & (np.arange(width + new) >= width)),
        )
        return Rollout(sequences, jnp.asarray(logp), jnp.asarray(finished))


@dataclasses.dataclass(frozen=True)
class _Answer:
    ids: list[int]
    logp: list[float]


def _read_choice(choice: Mapping[str, Any], vocab_size: int) -> _Answer:
    logp = [float(value) for value in choice["logprobs"]["token_logprobs"]]
    ids = choice.get("token_ids")
    if ids is None:
        ids = [int(token.removeprefix("token_id:")) for token in choice["logprobs"]["tokens"]]
    if len(ids) != len(logp):
        raise ValueError(f"{len(ids)} tokens with {len(logp)} log-probs")
    for index, value in zip(ids, logp, strict=True):
        if not (isinstance(index, int) and 0 <= index < vocab_size):
            raise ValueError(f"{index!r} is no id of {vocab_size} tokens")
        if not (math.isfinite(value) and value <= 1e-3):
            raise ValueError(f"{value} is no log-prob")
    return _Answer(ids, logp)


def post_json(url: str, body: Mapping[str, Any], options: HTTPOptions) -> Mapping[str, Any]:
    """The JSON object that a server answers a POST with.

    Raises:
      UserError: no answer after all attempts, a refusal, or no JSON object.
    """
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    problem = ""
    for attempt in range(options.retries + 1):
        try:
            with urllib.request.urlopen(request, timeout=options.timeout) as response:
                reply = json.loads(response.read())
        except urllib.error.HTTPError as error:
            problem = f"status {error.code}: {error.read(500).decode(errors='replace').strip()}"
            if error.code < 500 and error.code not in (408, 429):
                raise UserError(f"{url}: the server refuses ({problem}): mend the request") from error
        except (OSError, ValueError) as error:  # no connection, time-out, torn or malformed answer
            problem = str(error) or type(error).__name__
        else:
            if isinstance(reply, dict):
                return reply
            problem = "the answer is no JSON object"
        if attempt < options.retries:
            time.sleep(options.backoff * 2**attempt)
    raise UserError(f"{url}: no answer in {options.retries + 1} attempts ({problem}): is the server up?")


def publish_from_disk(
    options: HTTPOptions, folder: Path, config: ModelConfig, tokenizer: Tokenizer
) -> Callable[[Params, int], None]:
    """`publish(params, version)` that writes a Hugging Face folder and has SGLang read it
    (`/update_weights_from_disk`); both sides must see `folder`.
    """

    def publish(params: Params, version: int) -> None:
        hf.save(folder, config, params, tokenizer)
        url = f"{options.url.rstrip('/')}/update_weights_from_disk"
        reply = post_json(url, {"model_path": str(folder.resolve())}, options)
        if not reply.get("success", True):
            raise UserError(f"{url}: version {version} was not taken ({reply.get('message')})")

    return publish
