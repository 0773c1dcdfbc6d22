"""Continuous batching: a row that ends makes room for the next prompt, so that long ones hold up nobody."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.core.protocols import ExtendFn, PrefillFn
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Int, Key, Params, PRNGKeyArray, Rollout
from rlhf_jax.generation.caches import experts_of, put_rows, row_axes
from rlhf_jax.generation.loop import Generation, assemble, run_loop, sample_step, start
from rlhf_jax.generation.processors import Context
from rlhf_jax.generation.sampling import Sampling, row_keys


@pytree_dataclass
class _Results:
    """Finished completions, by prompt."""

    context: Context
    logp: Float[Array, "N T"]
    filtered_logp: Float[Array, "N T"]
    finished: Bool[Array, "N"]
    experts: Int[Array, "N S R k"] | None


@pytree_dataclass
class _Carry:
    """Attributes: `prompt` of each slot (N where it has none), and the `next` to be read."""

    slots: Generation
    prompt: Int[Array, "B"]
    next: Int[Array, ""]
    results: _Results


def continuous_batching_generate(
    prefill: PrefillFn,
    extend: ExtendFn,
    params: Params,
    prompts: Int[Array, "N P"],
    prompt_mask: Bool[Array, "N P"],
    key: PRNGKeyArray | Key[Array, "N"],
    *,
    max_num_seqs: int,
    max_new_tokens: int,
    eos_id: int,
    pad_id: int,
    prefill_batch_size: int = 1,
    sampling: Sampling = Sampling(),
) -> Rollout:
    """Samples what `generate` would sample of these prompts, `max_num_seqs` of them at a time.

    Args:
      prefill: as for `generate`.
      extend: `extend(params, cache, tokens [B, 1], positions, columns [B]) -> (logits [B, 1, V], cache)`.
      max_num_seqs: rows that run side by side.
      prefill_batch_size: prompts read at a time, once so many rows are free. 1 wastes no row; more make fewer
        and larger passes over prompts.
    """
    prompts, prompt_mask = jnp.asarray(prompts), jnp.asarray(prompt_mask)
    count = prompts.shape[0]
    slots = min(max_num_seqs, count)
    prefill_batch_size = min(prefill_batch_size, slots)
    keys = row_keys(key, count) if key.ndim == 0 else key
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "pad_id": pad_id}

    def begin(which: Int[Array, "R"]) -> Generation:
        chosen = jnp.minimum(which, count - 1)
        return start(prefill, params, prompts[chosen], prompt_mask[chosen], keys[chosen], sampling, **options)

    axes = row_axes(lambda rows: _with_key_data(begin(jnp.zeros(rows, jnp.int32))))
    first = begin(jnp.arange(slots))
    empty = jax.tree.map(lambda x: jnp.zeros((count, *x.shape[1:]), x.dtype), _results(first))
    carry = _Carry(first, jnp.arange(slots), jnp.int32(slots), empty)

    def decode(cache: Any, token: Int[Array, "B"], position: Int[Array, "B"], length: Int[Array, "B"]):
        columns = prompts.shape[1] + length
        logits, cache = extend(params, cache, token[:, None], position[:, None], columns)
        return logits[:, 0], cache

    def fill(carry: _Carry) -> _Carry:
        """Reads the next prompts into free slots, whose answers are put away."""
        results = _store(carry)
        free = ~carry.slots.running()
        chosen = jnp.argsort(~free, stable=True)[:prefill_batch_size]
        which = carry.next + jnp.arange(prefill_batch_size)
        # Beyond the last prompt, or where there are fewer free slots than that: nowhere.
        fits = (which < count) & free[chosen]
        place = jnp.where(fits, chosen, slots)
        new = put_rows(_with_key_data(carry.slots), axes, place, _with_key_data(begin(which)))
        prompt = jnp.where(free, count, carry.prompt).at[place].set(which, mode="drop")
        return _Carry(_with_keys(new), prompt, carry.next + jnp.sum(fits), results)

    def step(carry: _Carry) -> _Carry:
        rows = sample_step(decode, carry.slots, sampling, eos_id=eos_id, pad_id=pad_id)
        carry = dataclasses.replace(carry, slots=rows)
        free = jnp.sum(~rows.running())
        wanted = jnp.minimum(prefill_batch_size, count - carry.next)
        return jax.lax.cond((wanted > 0) & (free >= wanted), fill, lambda carry: carry, carry)

    end = run_loop(step, lambda carry: carry.slots.running(), carry)
    done = _store(end)
    return assemble(done.context, done.logp, done.filtered_logp, done.finished, experts=done.experts)


def _results(slots: Generation) -> _Results:
    return _Results(slots.context, slots.logp, slots.filtered_logp, slots.finished, experts_of(slots.cache))


def _store(carry: _Carry) -> _Results:
    """The results with those of the slots that have stopped."""
    slots = carry.slots
    count = carry.results.finished.shape[0]
    place = jnp.where(slots.running(), count, carry.prompt)
    new = _results(slots)
    return jax.tree.map(lambda held, rows: held.at[place].set(rows, mode="drop"), carry.results, new)


def _with_key_data(rows: Generation) -> Generation:
    return dataclasses.replace(rows, keys=jax.random.key_data(rows.keys))


def _with_keys(rows: Generation) -> Generation:
    return dataclasses.replace(rows, keys=jax.random.wrap_key_data(rows.keys))
