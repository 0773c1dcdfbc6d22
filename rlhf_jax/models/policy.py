"""A language model as everything above `models/` takes it: parameters, tokenizer, and typed callables."""

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from rlhf_jax.core.arguments import checked, told
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.files import Path as FolderPath
from rlhf_jax.core.protocols import (
    CandidateFn,
    DecodeFn,
    DistributionFn,
    ExtendFn,
    GreedyMatchFn,
    HiddenFn,
    LogitsFn,
    LogprobFn,
    PrefillFn,
    RewardFn,
    TopKFn,
    ValueFn,
)
from rlhf_jax.core.ranges import GreedyTemperature, Length, PositiveInt, Range, Seed
from rlhf_jax.core.trees import named_leaves
from rlhf_jax.core.types import Array, Float, Images, Int, Params, PRNGKeyArray, Rollout, Scalar
from rlhf_jax.data.chat import check_messages, encode_prompt
from rlhf_jax.data.content_parts import load_images
from rlhf_jax.data.packing import left_pad, length_bucket, stack_images
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.distributed import PARAMETER_AXES
from rlhf_jax.generation import Sampling, generate
from rlhf_jax.models import (
    adapters,
    decode_fns,
    flops,
    from_logits,
    gguf_writing,
    hf,
    logprob_fns,
    routing_replay,
)
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.gguf_writing import Outtype
from rlhf_jax.models.heads import init_head, init_scalar_model
from rlhf_jax.models.hf import peft
from rlhf_jax.models.vision.tokens import image_processor

Messages: TypeAlias = Annotated[
    Sequence[Mapping[str, Any]], 'a list such as [{"role": "user", "content": "Hello"}]'
]
TopP: TypeAlias = Annotated[float, Range(0, 1, above=True)]
AxesTable = Sequence[tuple[str, tuple[str | None, ...]]]
"""(pattern of the end of a leaf's name, logical axes of its last dimensions); the first match counts."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Source of parameters: the checkpoint that they were read from.

    Attributes:
      folder: of the run.
      step: of the checkpoint.
      digest: of the checkpoint's files.
    """

    folder: FolderPath
    step: int
    digest: str


@dataclasses.dataclass(frozen=True, eq=False)
class Policy:
    """A language model. `make_policy` makes one of our decoders, `wrap` one of any other.

    The callables take parameters as their first argument, and need not be given `params`.

    Attributes:
      params: nested dictionaries of arrays; None where every call brings its own.
      tokenizer: of its vocabulary.
      logits_fn: logits of whole rows.
      make_logprob_fn: (temperature=1.0, collision=False) -> `LogprobFn`.
      make_greedy_match_fn: () -> `GreedyMatchFn`.
      make_distribution_fn: (temperature=1.0) -> `DistributionFn`.
      prefill: reads prompts for sampling.
      decode: reads a token more.
      extend: reads tokens behind any column; None where the model cannot.
      hidden_fn: final hidden states, for value and reward heads; None where the model does not say.
      num_features: how many a hidden state has; None likewise.
      compute_dtype: of matmuls and activations.
      param_dtype: of the parameters, and of heads that are put on them.
      axes: logical sharding axes of its parameters, by the end of their names.
      takes_packed_rows: whether a row may hold several samples.
      source: where the parameters come from; None where they are new.
      config: the architecture of a decoder of ours; None for other models.
      rank_stabilized: whether adapter leaves in the parameters are rsLoRA's, whose scale is another.
    """

    MADE_BY: ClassVar[str] = "what rlhf_jax.load(path) or rlhf_jax.wrap() returns, or the .policy of a run"

    params: Params
    tokenizer: Tokenizer
    logits_fn: LogitsFn
    make_logprob_fn: Callable[..., LogprobFn]
    make_greedy_match_fn: Callable[..., GreedyMatchFn]
    make_distribution_fn: Callable[..., DistributionFn]
    prefill: PrefillFn
    decode: DecodeFn
    extend: ExtendFn | None = None
    hidden_fn: HiddenFn | None = None
    num_features: int | None = None
    compute_dtype: str = "float32"
    param_dtype: str = "float32"
    axes: AxesTable = PARAMETER_AXES
    takes_packed_rows: bool = True
    source: Source | None = None
    config: ModelConfig | None = None
    rank_stabilized: bool = False

    @property
    def architecture(self) -> ModelConfig:
        """`config`, for what is only of decoders of ours.

        Raises:
          UserError: the model is none.
        """
        if self.config is None:
            raise UserError("a model from wrap() has no architecture that is known here: give one of ours")
        return self.config

    @property
    def vocab_size(self) -> int:
        """Tokens that its logits tell apart; the tokenizer may have fewer."""
        if self.config is not None:
            return self.config.vocab_size
        token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        return jax.eval_shape(self.logits_fn, self.params, token, token, token).shape[-1]

    # What updates and samplers are made of -----------------------------------------------------------

    def make_logprob_fn_with_auxiliaries(self) -> LogprobFn:
        """`make_logprob_fn()` that also tells what only learning by likelihood wants to know."""
        if self.config is None:
            return self.make_logprob_fn()
        return logprob_fns.make_logprob_fn_with_auxiliaries(self.config)

    def make_top_k_fn(self, k: int) -> TopKFn:
        """The k likeliest tokens at each place, in chunks: models from `wrap` hold [B, T, V]."""
        if self.config is None:
            return from_logits.top_k_from_logits_fn(self.logits_fn, k)
        return logprob_fns.make_top_k_fn(self.config, k)

    def make_candidate_fn(self) -> CandidateFn:
        """Log-probs of given tokens at each place, in chunks: models from `wrap` hold [B, T, V]."""
        if self.config is None:
            return from_logits.candidates_from_logits_fn(self.logits_fn)
        return logprob_fns.make_candidate_fn(self.config)

    def make_recording_fns(self) -> tuple[PrefillFn, DecodeFn, ExtendFn]:
        """`routing_replay.make_recording_fns` of this model."""
        return routing_replay.make_recording_fns(self.architecture)

    def make_value_fn(self) -> ValueFn:
        """Values of the states in which tokens are chosen, by a scalar model on this one."""
        return logprob_fns.make_value_fn(self._hidden_fn())

    def make_reward_fn(self) -> RewardFn:
        """Rewards of whole rows, by a scalar model on this one."""
        return logprob_fns.make_reward_fn(self._hidden_fn())

    def make_process_reward_fn(self) -> ValueFn:
        """Rewards after each token, by a scalar model on this one."""
        return logprob_fns.make_process_reward_fn(self._hidden_fn())

    def make_shared_reward_fn(self) -> RewardFn:
        """`make_reward_fn` for `params["reward"]`, a scalar model on the `"base"` beside it."""
        return logprob_fns.make_shared_reward_fn(self._hidden_fn())

    def make_actor_critic_fn(self, *, temperature: Scalar = 1.0) -> LogprobFn:
        """Log-probs, and the values of a model of its own: `scoring.actor_critic_of`."""
        return logprob_fns.actor_critic_of(
            self.make_logprob_fn(temperature=temperature), self.make_value_fn()
        )

    def make_shared_trunk_actor_critic_fn(self, *, temperature: Scalar = 1.0) -> LogprobFn:
        """Log-probs, and the values of a head on the same states: `scoring.shared_trunk_actor_critic_of`."""
        if self.config is not None:
            return logprob_fns.make_shared_trunk_actor_critic_fn(self.config, temperature=temperature)
        logprob_fn = self.make_logprob_fn(temperature=temperature)
        return logprob_fns.shared_trunk_actor_critic_of(logprob_fn, self.make_value_fn())

    def init_scalar_head(self, key: PRNGKeyArray) -> Params:
        """A fresh head for values or rewards."""
        self._hidden_fn()
        assert self.num_features is not None
        return init_head(self.num_features, key, jnp.dtype(self.param_dtype))

    def init_scalar_model(self, key: PRNGKeyArray, decoder: Params | None = None) -> Params:
        """`{"decoder", "head"}` with a fresh head; the body is `decoder`, or this model's parameters."""
        body = self.params if decoder is None else decoder
        if self.config is not None:
            return init_scalar_model(self.config, key, body)
        return {"decoder": body, "head": self.init_scalar_head(jax.random.split(key)[1])}

    def _hidden_fn(self) -> HiddenFn:
        if self.hidden_fn is None:
            raise UserError(
                "the model gives no hidden states, on which value and reward heads stand: "
                "give wrap(..., hidden_fn=...)"
            )
        return self.hidden_fn

    def forward_flops(self, *, rows: int, length: int, start: int = 0) -> float:
        """Operations of a forward pass; 0 where they are not known."""
        return (
            0.0
            if self.config is None
            else flops.forward_flops(self.config, rows=rows, length=length, start=start)
        )

    def training_flops(self, *, rows: int, length: int) -> float:
        """Operations of a gradient; 0 where they are not known."""
        return 0.0 if self.config is None else flops.training_flops(self.config, rows=rows, length=length)

    # For people ----------------------------------------------------------------------------------------

    def with_params(self, params: Params) -> "Policy":
        """The same model with other parameters, which come from nowhere; adapters may come or go.

        Raises:
          UserError: one of the model's is missing, or has another shape.
        """
        if params is not None:
            _check_leaves(self.params, params)
        return dataclasses.replace(self, params=params, source=None)

    def logits(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Logits after every token of rows without padding.

        Raises:
          UserError: the tokens are no rows of the model's ids.
        """
        tokens = _rows_of_ids(tokens, self.vocab_size)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return self.logits_fn(self.params, tokens, positions, jnp.ones_like(tokens))

    @checked
    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: Length,
        temperature: GreedyTemperature = 1.0,
        top_p: TopP | None = None,
        top_k: PositiveInt | None = None,
        seed: Seed = 0,
    ) -> list[str]:
        """Continuations of texts, without the texts. A temperature of 0 takes the most likely tokens."""
        rows = [self._opened(self.tokenizer.encode(prompt)) for prompt in prompts]
        sampling = Sampling(temperature, top_p=top_p, top_k=top_k)
        return self._continue(rows, sampling, max_new_tokens, seed)

    @checked
    def chat(
        self,
        messages: Messages,
        *,
        max_new_tokens: Length,
        temperature: GreedyTemperature = 1.0,
        top_p: TopP | None = None,
        top_k: PositiveInt | None = None,
        seed: Seed = 0,
    ) -> str:
        """The assistant's answer to a conversation, laid out by the tokenizer's chat template.

        A message may hold images, from whatever `data.images` reads: its content is a list of parts, such as
        `[{"type": "image", "image": "cat.png"}, {"type": "text", "text": "What is this?"}]`.
        """
        sampling = Sampling(temperature, top_p=top_p, top_k=top_k)
        checked_messages, seen = load_images(self.tokenizer, check_messages(list(messages)), {})
        ids = encode_prompt(self.tokenizer, checked_messages)
        return self._continue([ids], sampling, max_new_tokens, seed, stack_images([[seen]]))[0]

    @checked
    def save(self, path: str | os.PathLike[str], *, outtype: Outtype | None = None) -> None:
        """Writes a Hugging Face folder, or a GGUF file where the path ends in `.gguf`.

        Args:
          outtype: type of the matrices in a GGUF file; None for f16.

        Raises:
          UserError: the model is none of ours, no family has its parts, or the files cannot be written.
        """
        if self.config is None:
            raise UserError(
                f"{path}: a model from wrap() has no Hugging Face layout: save policy.params yourself"
            )
        params = adapters.merge_adapter(self.params) if adapters.can_merge(self.params) else self.params
        if os.fspath(path).endswith(".gguf"):
            gguf_writing.save(path, self.config, params, self.tokenizer, outtype=outtype or "f16")
            return
        if outtype is not None:
            raise UserError(f"outtype={outtype!r} is of GGUF files: give a path that ends in .gguf")
        hf.save(path, self.config, params, self.tokenizer)

    @checked
    def save_adapter(self, folder: str | os.PathLike[str]) -> None:
        """Writes the adapter that was trained, in PEFT's layout.

        Raises:
          UserError: there is none, PEFT has no layout for it, or the folder cannot be written.
        """
        if self.config is None:
            raise UserError(f"{folder}: a model from wrap() has no PEFT layout: save policy.params yourself")
        peft.save(folder, self.config, self.params, rank_stabilized=self.rank_stabilized)

    def _opened(self, ids: list[int]) -> list[int]:
        """Ids of a text with what opens one, where the tokenizer has it; never empty."""
        bos_id = self.tokenizer.bos_id
        return [bos_id, *ids] if bos_id is not None else ids or [self.tokenizer.eos_id]

    def _continue(
        self,
        rows: list[list[int]],
        sampling: Sampling,
        max_new_tokens: int,
        seed: int,
        images: Images | None = None,
    ) -> list[str]:
        if not rows:
            return []
        width = length_bucket(max(map(len, rows)))
        tokens, mask = left_pad(rows, width, pad_id=self.tokenizer.pad_id)
        ends = self.tokenizer.eos_id, self.tokenizer.pad_id
        sample = _compiled(self.prefill, self.decode, max_new_tokens, *ends)
        inputs = {"sampling": sampling} | ({} if images is None else {"images": images})
        rollout = jax.device_get(sample(self.params, tokens, mask, jax.random.key(seed), **inputs))
        sampled = zip(rollout.sequences.tokens, np.asarray(rollout.sequences.mask), strict=True)
        return [self.tokenizer.decode(row[kept].tolist()) for row, kept in sampled]


def _check_leaves(held: Params, given: Params) -> None:
    leaves, others = named_leaves(held), named_leaves(given)
    # A kernel may be there in few bits.
    present = {re.sub("kernel_(values|scale)$", "kernel", name) for name in others}
    for name, leaf in leaves.items():
        if adapters.is_adapter_leaf(name):
            continue
        if re.sub("kernel_(values|scale)$", "kernel", name) not in present:
            raise UserError(
                f"params has no leaf {name!r} ({len(others)} leaves, of which the model has {len(leaves)}): "
                "give all of the model's"
            )
        if name in others and jnp.shape(others[name]) != jnp.shape(leaf):
            raise UserError(
                f"params[{name!r}] has shape {jnp.shape(others[name])}, the model's {jnp.shape(leaf)}: give "
                "parameters of this model"
            )


def _rows_of_ids(tokens: Any, vocab_size: int) -> Array:
    """The tokens as an array [B, T]. Raises: UserError where they are none, or a model has no such ids."""
    try:
        rows = jnp.asarray(tokens)
    except (TypeError, ValueError):  # texts, or rows of different lengths
        raise UserError(f"tokens is {told(tokens)}: give ids [B, T], rows of one length") from None
    if rows.ndim != 2 or not rows.size or not jnp.issubdtype(rows.dtype, jnp.integer):
        raise UserError(f"tokens has shape {rows.shape} of {rows.dtype}: give whole numbers [B, T]")
    if not isinstance(rows, Tracer) and not 0 <= int(rows.min()) <= int(rows.max()) < vocab_size:
        raise UserError(
            f"tokens holds {int(rows.min())} to {int(rows.max())}: give ids from 0 to {vocab_size - 1}"
        )
    return rows


@functools.lru_cache(maxsize=16)
def _compiled(
    prefill: PrefillFn, decode: DecodeFn, max_new_tokens: int, eos_id: int, pad_id: int
) -> Callable[..., Rollout]:
    """One program for all policies that share their callables, whatever their parameters."""
    ends = {"max_new_tokens": max_new_tokens, "eos_id": eos_id, "pad_id": pad_id}
    return jax.jit(functools.partial(generate, prefill, decode, **ends))


def make_policy(
    config: ModelConfig, params: Params, tokenizer: Tokenizer, *, source: Source | None = None
) -> Policy:
    """A decoder of ours as a `Policy`.

    Raises:
      UserError: the tokenizer has ids that the model has no embedding for, which would be taken for the last.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model {config.vocab_size}: they are "
            "not of one model: give the tokenizer that it was trained with"
        )
    if config.vision is not None:
        tokenizer = tokenizer.with_images(image_processor(config.vision, tokenizer))
    prefill, decode = decode_fns.make_decode_fns(config)
    return Policy(
        params=params,
        tokenizer=tokenizer,
        logits_fn=logprob_fns.make_logits_fn(config),
        make_logprob_fn=functools.partial(logprob_fns.make_logprob_fn, config),
        make_greedy_match_fn=functools.partial(logprob_fns.make_greedy_match_fn, config),
        make_distribution_fn=functools.partial(logprob_fns.make_distribution_fn, config),
        prefill=prefill,
        decode=decode,
        extend=decode_fns.make_extend_fn(config),
        hidden_fn=logprob_fns.make_hidden_fn(config),
        num_features=config.width,
        compute_dtype=config.compute_dtype,
        param_dtype=config.param_dtype,
        source=source,
        config=config,
    )
