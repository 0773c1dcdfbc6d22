"""Contrastive search: likely tokens that are unlike what stands before them."""

from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.core.protocols import HiddenExtendFn, HiddenPrefillFn
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Int, Params, Rollout, Scalar
from rlhf_jax.generation.caches import row_axes, take_rows
from rlhf_jax.generation.loop import append_token, assemble, prompt_inputs, run_loop, start_context
from rlhf_jax.generation.processors import Context
from rlhf_jax.generation.sampling import Sampling, full_logp, process_logits


@pytree_dataclass
class _Carry:
    context: Context
    logp: Float[Array, "B T"]
    finished: Bool[Array, "B"]
    logits: Float[Array, "B V"]
    hidden: Float[Array, "B S D"]
    cache: Any

    def running(self) -> Bool[Array, "B"]:
        return ~self.finished & (self.context.length < self.logp.shape[1])


def contrastive_search(
    prefill: HiddenPrefillFn,
    extend: HiddenExtendFn,
    params: Params,
    prompts: Int[Array, "B P"],
    prompt_mask: Bool[Array, "B P"],
    *,
    max_new_tokens: int,
    eos_id: int,
    pad_id: int,
    top_k: int = 4,
    alpha: Scalar = 0.6,
    sampling: Sampling = Sampling(),
) -> Rollout:
    """Takes, of the k likeliest tokens v, the one of the best (Su et al. 2022)

        (1 - alpha) p(v) - alpha max_j cos(h_v, h_j)

    with h the final hidden states, after v and after every token j before it. Each step runs the model on
    all k candidates.

    Args:
      prefill: `prefill(params, tokens, positions, segment_ids, length) -> (logits [B, V], hidden [B, P, D],
        cache)`.
      extend: `extend(params, cache, tokens [B, 1], positions, columns) -> (logits [B, 1, V], hidden, cache)`.
      top_k: k; all tokens where it is more than there are.
      alpha: weight of the penalty; 0 is greedy search.
      sampling: the rules; nothing is drawn.

    Returns:
      A rollout without `filtered_logp`: no distribution was drawn from.
    """
    prompts, prompt_mask = jnp.asarray(prompts), jnp.asarray(prompt_mask)
    batch, width = prompts.shape
    length = width + max_new_tokens
    logits, hidden, cache = prefill(params, prompts, *prompt_inputs(prompt_mask), length)
    top_k = min(top_k, logits.shape[-1])

    def empty_cache(rows: int) -> Any:
        zeros = jnp.zeros((rows, 1), jnp.int32)
        return prefill(params, zeros, zeros, zeros, 2)[2]

    axes = row_axes(empty_cache)
    # Every row has k copies of its cache, one for each candidate.
    copies = jnp.repeat(jnp.arange(batch), top_k)
    room = jnp.zeros((batch, max_new_tokens, hidden.shape[-1]), hidden.dtype)
    carry = _Carry(
        context=start_context(prompts, prompt_mask, sampling, max_new_tokens=max_new_tokens, pad_id=pad_id),
        logp=jnp.zeros((batch, max_new_tokens), logits.dtype),
        finished=jnp.zeros(batch, bool),
        logits=logits,
        hidden=jnp.concatenate([hidden, room], axis=1),
        cache=take_rows(cache, axes, copies),
    )

    def step(carry: _Carry) -> _Carry:
        active, context = carry.running(), carry.context
        processed = process_logits(carry.logits, sampling, context, eos_id=eos_id)
        probs, tokens = jax.lax.top_k(jax.nn.softmax(processed, axis=-1), top_k)
        position = jnp.sum(context.prompt, axis=1) + context.length
        column = width + context.length
        logits, new, cache = extend(
            params, carry.cache, tokens.reshape(-1, 1), position[copies, None], column[copies]
        )
        new = new.reshape(batch, top_k, -1)
        seen = jnp.pad(context.prompt, ((0, 0), (0, max_new_tokens))) | context.generated()
        penalty = jnp.max(jnp.where(seen[:, None], _cosine(new, carry.hidden), -1), axis=-1)
        choice = jnp.argmax((1 - alpha) * probs - alpha * penalty, axis=1)
        rows, at = jnp.arange(batch), jnp.arange(batch) * top_k + choice
        token = tokens[rows, choice]
        place = jnp.where(active, context.length, max_new_tokens)
        logp = full_logp(carry.logits, sampling)[rows, token]
        context, ended = append_token(context, token, active, sampling, eos_id=eos_id)
        return _Carry(
            context=context,
            logp=carry.logp.at[rows, place].set(logp, mode="drop"),
            finished=carry.finished | ended,
            logits=logits[at, 0],
            hidden=carry.hidden.at[rows, column].set(new[rows, choice], mode="drop"),
            cache=take_rows(cache, axes, jnp.repeat(at, top_k)),
        )

    end = run_loop(step, _Carry.running, carry)
    return assemble(end.context, end.logp, None, end.finished)


def _cosine(a: Float[Array, "B k D"], b: Float[Array, "B S D"]) -> Float[Array, "B k S"]:
    a, b = (x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12) for x in (a, b))
    return jnp.einsum("bkd,bsd->bks", a, b)
