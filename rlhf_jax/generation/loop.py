"""Cached generation: one loop over `prefill` and `decode`, ended when every row has ended."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Int, Params, PRNGKeyArray, Rollout, Sequences
from rlhf_jax.generation.sampling import Sampling, sample_token


@pytree_dataclass
class _Carry:
    step: Int[Array, ""]
    key: PRNGKeyArray
    tokens: Int[Array, "B T"]
    logp: Float[Array, "B T"]
    lengths: Int[Array, "B"]
    finished: Bool[Array, "B"]
    logits: Float[Array, "B V"]
    cache: Any


def generate(
    prefill: Callable,
    decode: Callable,
    params: Params,
    prompts: Int[Array, "B P"],
    prompt_mask: Bool[Array, "B P"],
    key: PRNGKeyArray,
    *,
    max_new_tokens: int,
    eos_id: int,
    pad_id: int,
    sampling: Sampling = Sampling(),
) -> Rollout:
    """Samples a completion for each prompt.

    The loop runs until every row has produced `eos_id` or `max_new_tokens` tokens. Rows that have
    ended get `pad_id`, out of the mask.

    Args:
      prefill: `prefill(params, tokens, positions, segment_ids, length) -> (logits, cache)`.
      decode: `decode(params, cache, token, position) -> (logits, cache)`.
      prompts: left-padded, so that every completion begins in column P.
      prompt_mask: True where `prompts` holds a token; at least the last column of each row.

    Returns:
      A `Rollout` of T = P + max_new_tokens columns.
    """
    batch, width = prompts.shape
    positions = jnp.maximum(jnp.cumsum(prompt_mask, axis=1) - 1, 0)
    logits, cache = prefill(params, prompts, positions, prompt_mask.astype(jnp.int32), width + max_new_tokens)
    carry = _Carry(
        step=jnp.int32(0),
        key=key,
        tokens=jnp.full((batch, max_new_tokens), pad_id, prompts.dtype),
        logp=jnp.zeros((batch, max_new_tokens), logits.dtype),
        lengths=jnp.zeros(batch, jnp.int32),
        finished=jnp.zeros(batch, bool),
        logits=logits,
        cache=cache,
    )
    prompt_lengths = jnp.sum(prompt_mask, axis=1)

    def step(carry: _Carry) -> _Carry:
        key, sample_key = jax.random.split(carry.key)
        token, logp = sample_token(sample_key, carry.logits, sampling)
        token = jnp.where(carry.finished, pad_id, token).astype(carry.tokens.dtype)
        logits, cache = decode(params, carry.cache, token, prompt_lengths + carry.step)
        return _Carry(
            step=carry.step + 1,
            key=key,
            tokens=carry.tokens.at[:, carry.step].set(token),
            logp=carry.logp.at[:, carry.step].set(jnp.where(carry.finished, 0, logp)),
            lengths=carry.lengths + ~carry.finished,
            finished=carry.finished | (token == eos_id),
            logits=logits,
            cache=cache,
        )

    def unfinished(carry: _Carry) -> Bool[Array, ""]:
        return (carry.step < max_new_tokens) & ~jnp.all(carry.finished)

    end = jax.lax.while_loop(unfinished, step, carry)
    return _assemble(prompts, prompt_mask, end)


def _assemble(prompts: Int[Array, "B P"], prompt_mask: Bool[Array, "B P"], end: _Carry) -> Rollout:
    sampled = jnp.arange(end.tokens.shape[1]) < end.lengths[:, None]
    valid = jnp.concatenate([prompt_mask, sampled], axis=1)
    prompt_zeros = jnp.zeros(prompts.shape, end.logp.dtype)
    sequences = Sequences(
        tokens=jnp.concatenate([prompts, end.tokens], axis=1),
        positions=jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0),
        segment_ids=valid.astype(jnp.int32),
        mask=jnp.concatenate([jnp.zeros_like(prompt_mask), sampled], axis=1),
    )
    return Rollout(sequences, jnp.concatenate([prompt_zeros, end.logp], axis=1), end.finished)
