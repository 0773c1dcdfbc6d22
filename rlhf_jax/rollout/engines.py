"""Rollout engines: servers that speak the OpenAI protocol (vLLM, SGLang) in the place of our own sampler.

An engine is a `GenerateFn`: `engine(params, prompts, key) -> Rollout`. It publishes parameters that it has
not seen to the server, proves that they arrived, and asks for completions as token ids.
"""

import concurrent.futures
import dataclasses
import functools
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.masks import masked_mean
from rlhf_jax.core.protocols import LogprobFn
from rlhf_jax.core.types import Array, Float, Params, PRNGKeyArray, Rollout, Sequences
from rlhf_jax.data.content_parts import refuse_images
from rlhf_jax.data.examples import PromptExample
from rlhf_jax.data.packing import completion_rows, left_pad
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.generation import Sampling
from rlhf_jax.rollout.http_json import HTTPOptions, NoAnswer, post_json
from rlhf_jax.rollout.openai_protocol import (
    AS_TOKEN_IDS,
    Answer,
    read_choices,
    read_prompt_logps,
    sampling_fields,
)
from rlhf_jax.rollout.sampler import check_full_support

PublishFn = Callable[[Params, int], None]
"""(params, version): makes the server use these parameters from now on."""
_PROBES = 4


def sampling_logp_diff(logprob_fn: LogprobFn, params: Params, rollout: Rollout) -> Float[Array, ""]:
    """Mean |delta log-prob| between a rollout and its rescoring, in nats a token."""
    rescored = logprob_fn(params, rollout.sequences).logp
    return masked_mean(jnp.abs(rescored - rollout.logp), rollout.sequences.mask)


def failed_rows(rollout: Rollout) -> np.ndarray:
    """[B] bool: rows for which no answer came. They hold no token; an answer has one at least, its end."""
    return np.asarray(~np.asarray(rollout.sequences.mask).any(axis=1))


class HTTPEngine:
    """OpenAI-compatible rollout engine, through `/v1/completions`.

    Prompts are sent as token ids and answers are taken as token ids (`token_ids` of a choice, or
    `token_id:N` in its log-probs); text is never tokenized again. The reported log-probs must be those of
    the full distribution at the sampling temperature (vLLM: `--logprobs-mode processed_logprobs`):
    `sampling_logp_diff` says whether they are.

    Rows whose request failed after all retries come back empty (`failed_rows`).
    """

    def __init__(
        self,
        options: HTTPOptions,
        tokenizer: Tokenizer,
        *,
        prompt_length: int,
        max_new_tokens: int,
        group_size: int = 1,
        sampling: Sampling = Sampling(),
        publish: PublishFn | None = None,
        logprob_fn: LogprobFn | None = None,
        tolerance: float = 0.05,
        allow_filters: bool = False,
    ) -> None:
        """Sets up the client; nothing is sent.

        Args:
          group_size: how often each prompt stands in `prompts`, one after the other; it is sent once.
          publish: None for a server whose weights never change.
          logprob_fn: our own log-probs at temperature 1, against which published weights are proven; None to
            take the server's word.
          tolerance: mean |delta log-prob| between us and the server that still passes, in nats a token.
          allow_filters: sends top-k, top-p and min-p; see `rollout.sampler.make_generate_fn`.
        """
        self._options, self._tokenizer, self._publish = options, tokenizer, publish
        self._prompt_length, self._new_tokens, self._group_size = prompt_length, max_new_tokens, group_size
        self._sampling, self._allow_filters = sampling, allow_filters
        self._score = (
            None if logprob_fn is None else jax.jit(lambda params, rows: logprob_fn(params, rows).logp)
        )
        self._tolerance, self._probe = tolerance, None
        self._held: list[Any] | None = None
        self._problem = NoAnswer("nothing was asked")
        self.version = 0
        """Publications so far."""

    def __call__(
        self,
        params: Params,
        prompts: Sequence[PromptExample],
        key: PRNGKeyArray,
        sampling: Sampling | None = None,
        /,
    ) -> Rollout:
        """One answer for each prompt.

        Raises:
          UserError: the server cannot be reached at all, refuses, answers something else than was asked, or
            does not hold `params`.
        """
        size = self._group_size
        refuse_images(prompts, f"the server of {self._options.url}")
        equal = all(prompt is prompts[row - row % size] for row, prompt in enumerate(prompts))
        if not equal or len(prompts) % size:
            raise ValueError(f"prompts do not come in groups of {size} equal ones")
        self._update(params, prompts)
        sampling = self._sampling if sampling is None else sampling
        if not self._allow_filters:
            check_full_support(sampling)
        fields = sampling_fields(sampling)
        count = size if fields["temperature"] > 0 else 1  # vLLM refuses several most likely answers
        answers = self._ask_all(prompts[::count], count, fields, key)
        if all(answer is None for answer in answers):
            raise self._problem
        return self._rollout(prompts, answers)

    # Weights -----------------------------------------------------------------------------------------

    def _update(self, params: Params, prompts: Sequence[PromptExample]) -> None:
        """Publishes parameters that are not those of the last call."""
        leaves = jax.tree.leaves(params)
        # Held, so that no other array can have the identity of one that is gone.
        held = self._held or []
        if len(held) == len(leaves) and all(map(operator.is_, held, leaves)):
            return
        if self._publish is None and self._held is not None:
            raise UserError(
                f"{self._options.url}: an openai server cannot be given new weights: train with a vllm or "
                "sglang server, or with the local engine"
            )
        if self._publish is not None:
            self._publish(params, self.version + 1)
        self._held, self.version = leaves, self.version + 1
        if self._score is not None:
            self._prove(params, prompts)

    def _prove(self, params: Params, prompts: Sequence[PromptExample]) -> None:
        """Compares the server's log-probs of some prompts with ours.

        Weights that moved little pass any tolerance, also where the server kept the old ones. So where ours
        moved by more than the noise between the two, the server's must have moved, too.
        """
        if self._probe is None:
            self._probe = _Probe.of(prompts, self._prompt_length, self._tokenizer.pad_id)
        probe = self._probe
        if probe is None or self._score is None:
            return
        ours = np.asarray(self._score(params, probe.sequences))[np.asarray(probe.sequences.mask)]
        theirs = np.array([x for ids in probe.ids for x in self._logp_of(ids)], np.float64)
        gap = float(np.abs(ours - theirs).mean())
        if not gap <= self._tolerance:
            raise UserError(
                f"{self._options.url}: the server's log-probs are not those of weights {self.version} (they "
                f"differ by {gap:.2g} nats a token): does it serve this model, and did it load them?"
            )
        if probe.ours is not None and probe.theirs is not None:
            moved = float(np.abs(ours - probe.ours).mean())
            followed = float(np.abs(theirs - probe.theirs).mean())
            if moved > max(4 * probe.gap, 1e-5) and followed < moved / 4:
                raise UserError(
                    f"{self._options.url}: weights {self.version} did not arrive: ours moved by {moved:.2g} "
                    f"nats a token, the server's by {followed:.2g}"
                )
        probe.ours, probe.theirs, probe.gap = ours, theirs, gap

    def _logp_of(self, ids: Sequence[int]) -> list[float]:
        """Log-probs of the tokens after the first one."""
        body = {"prompt": [list(ids)], "max_tokens": 1, "temperature": 1.0, "logprobs": 1, "echo": True}
        reply = self._post("/v1/completions", body)
        return read_prompt_logps(reply, len(ids), where=self._options.url)

    # Answers -----------------------------------------------------------------------------------------

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        return post_json(path, {"model": self._options.model, **body}, self._options)

    def _ask_all(
        self, prompts: Sequence[PromptExample], count: int, fields: Mapping[str, Any], key: PRNGKeyArray
    ) -> list["Answer | None"]:
        size = self._options.prompts_per_request
        parts = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        key = jax.random.fold_in(key.reshape(-1)[0], jax.process_index())  # a key, or one for each row
        seeds = np.asarray(jax.random.randint(key, (len(parts),), 0, 2**31 - 1)).tolist()
        ask = functools.partial(self._ask, count, fields)
        with concurrent.futures.ThreadPoolExecutor(self._options.connections) as pool:
            return [answer for part in pool.map(ask, parts, seeds) for answer in part]

    def _ask(
        self, count: int, fields: Mapping[str, Any], prompts: Sequence[PromptExample], seed: int
    ) -> Sequence["Answer | None"]:
        """The answers to some prompts, None each where there was none in all attempts."""
        url, wanted = self._options.at("/v1/completions"), len(prompts) * count
        body = {
            "prompt": [prompt.ids.tolist() for prompt in prompts],
            "n": count,
            "max_tokens": self._new_tokens,
            **fields,
            "seed": seed,
            "stop_token_ids": [self._tokenizer.eos_id],
            **AS_TOKEN_IDS,
        }
        try:
            reply = self._post("/v1/completions", body)
        except NoAnswer as problem:
            self._problem = problem
            return [None] * wanted
        return read_choices(reply, wanted, self._tokenizer, where=url)

    def _rollout(self, prompts: Sequence[PromptExample], answers: Sequence["Answer | None"]) -> Rollout:
        width, new = self._prompt_length, self._new_tokens
        logp = np.zeros((len(prompts), width + new), np.float32)
        for row, answer in enumerate(answers):
            if answer is None:
                continue
            if len(answer.ids) > new:
                raise UserError(f"{self._options.url}: an answer has {len(answer.ids)} tokens, not {new}")
            logp[row, width : width + len(answer.ids)] = answer.logp
        sequences = completion_rows(
            [prompt.ids for prompt in prompts],
            [() if answer is None else answer.ids for answer in answers],
            prompt_length=width,
            max_new_tokens=new,
            pad_id=self._tokenizer.pad_id,
        )
        finished = [answer is not None and answer.finished for answer in answers]
        return Rollout(jax.tree.map(jnp.asarray, sequences), jnp.asarray(logp), jnp.asarray(finished))


@dataclasses.dataclass
class _Probe:
    """Prompts whose log-probs show which weights a server holds, and what they were the last time."""

    ids: list[list[int]]
    sequences: Sequences
    ours: np.ndarray | None = None
    theirs: np.ndarray | None = None
    gap: float = 0.0

    @classmethod
    def of(cls, prompts: Sequence[PromptExample], length: int, pad_id: int) -> "_Probe | None":
        unique = {prompt.ids.tobytes(): prompt.ids for prompt in prompts if len(prompt.ids) > 1}
        chosen = list(unique.values())[:_PROBES]
        if not chosen:
            return None
        tokens, mask = left_pad(chosen, length, pad_id=pad_id)
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        sequences = Sequences(
            tokens=jnp.asarray(tokens, jnp.int32),
            positions=jnp.asarray(positions, jnp.int32),
            segment_ids=jnp.asarray(mask, jnp.int32),
            mask=jnp.asarray(mask & (positions > 0)),
        )
        return cls([ids.tolist() for ids in chosen], sequences)


# Weights by way of a folder ------------------------------------------------------------------------


def publish_from_disk(
    options: HTTPOptions, folder: Path, write: Callable[[Path, Params], None], *, kind: str
) -> PublishFn:
    """`publish(params, version)` that writes a Hugging Face folder and has the server read it.

    SGLang does so by `/update_weights_from_disk`, vLLM by `/collective_rpc` with `reload_weights` (it needs
    VLLM_SERVER_DEV_MODE=1). Both sides must see `folder`.

    Args:
      write: (folder, params) -> None.
      kind: "vllm" or "sglang".
    """

    def publish(params: Params, version: int) -> None:
        path = folder / f"weights_{version % 2}"  # never the one that the server read last
        write(path, params)
        where = str(files.resolved(path))
        if kind == "sglang":
            reply = post_json("/update_weights_from_disk", {"model_path": where}, options)
            if not isinstance(reply, dict) or reply.get("success", True) is not True:
                said = reply.get("message") if isinstance(reply, dict) else reply
                raise UserError(f"{options.url}: version {version} was not taken ({said})")
        else:
            body = {"method": "reload_weights", "kwargs": {"weights_path": where}}
            post_json("/collective_rpc", body, options)
            post_json("/reset_prefix_cache", {}, options)  # what it holds is of the old weights

    return publish


def parse_engine(spec: str) -> tuple[str, str]:
    """(kind, url) of `local`, `vllm:URL`, `sglang:URL` or `openai:URL`.

    Raises:
      UserError: it is none of them.
    """
    if spec == "local":
        return spec, ""
    kind, _, url = spec.partition(":")
    if kind not in ("vllm", "sglang", "openai") or not url.startswith(("http://", "https://")):
        raise UserError(
            f"engine {spec!r}: give local, vllm:http://HOST:PORT, sglang:http://HOST:PORT or "
            "openai:http://HOST:PORT, and #MODEL behind it where the server does not call the model default"
        )
    return kind, url


def make_engine(
    spec: str,
    tokenizer: Tokenizer,
    *,
    prompt_length: int,
    max_new_tokens: int,
    group_size: int = 1,
    sampling: Sampling = Sampling(),
    logprob_fn: LogprobFn | None = None,
    write: Callable[[Path, Params], None] | None = None,
    folder: Path | None = None,
) -> HTTPEngine:
    """The engine that a text names, a `GenerateFn`.

    Args:
      spec: `vllm:URL`, `sglang:URL` or `openai:URL`, each with `#MODEL` behind it where the server's name of
        the model is not `default`. An `openai` server keeps its weights. OPENAI_API_KEY is sent where it is
        set.
      logprob_fn: our log-probs at temperature 1, which prove that weights arrived.
      write: (folder, params) writes a Hugging Face folder; needed by vllm and sglang.
      folder: where weights are written; the server must see it, too.

    Raises:
      UserError: it names none, or several processes train.
    """
    kind, address = parse_engine(spec)
    if jax.process_count() > 1:
        raise UserError(f"engine {spec!r}: one process can use a server, not {jax.process_count()}")
    url, _, model = address.partition("#")
    options = HTTPOptions(url, model or "default", api_key=os.environ.get("OPENAI_API_KEY", ""))
    publish = None
    if kind != "openai":
        if write is None or folder is None:
            raise ValueError(f"{kind} servers need write and folder")
        publish = publish_from_disk(options, folder, write, kind=kind)
    return HTTPEngine(
        options,
        tokenizer,
        prompt_length=prompt_length,
        max_new_tokens=max_new_tokens,
        group_size=group_size,
        sampling=sampling,
        publish=publish,
        logprob_fn=logprob_fn,
    )
