"""Cached generation: one loop over `prefill` and `decode`, ended when every row has ended.

What differs between decoders are the functions on logits and state that a step is made of. Beam search,
contrastive search and speculative decoding run their own steps in the same loop.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.core.protocols import DecodeFn, PrefillFn
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import (
    Array,
    Bool,
    Float,
    Images,
    Int,
    Key,
    Params,
    PRNGKeyArray,
    Rollout,
    Sequences,
    ToolFn,
    UInt32,
)
from rlhf_jax.generation.automata import next_state
from rlhf_jax.generation.caches import experts_of, row_axes, take_rows
from rlhf_jax.generation.processors import Context
from rlhf_jax.generation.sampling import Sampling, process_logits, row_keys, sample_token, step_keys

Carry = TypeVar("Carry")


@pytree_dataclass
class ToolTurn:
    """Tool call in progress in each row.

    Attributes:
      pending: what it has still to write, -1 beyond its end.
      written: generated tokens that are its own.
    """

    pending: Int[Array, "B R"]
    written: Bool[Array, "B T"]

    @property
    def writes(self) -> Bool[Array, "B"]:
        """Rows whose next token is the tool's."""
        return self.pending[:, 0] >= 0


@pytree_dataclass
class Generation:
    """Rows on their way.

    Attributes:
      keys: one a row; their words where rows are written in place (`generation.continuous`).
      context: what each row has read and written.
      logp: see `Rollout`; of generated tokens only.
      filtered_logp: the same.
      finished: rows that have ended by themselves.
      logits: of the next token.
      cache: the model's.
      tool: the tool's turn, where there is a tool.
    """

    keys: Key[Array, "B"] | UInt32[Array, "B W"]
    context: Context
    logp: Float[Array, "B T"]
    filtered_logp: Float[Array, "B T"]
    finished: Bool[Array, "B"]
    logits: Float[Array, "B V"]
    cache: Any
    tool: ToolTurn | None = None

    def running(self) -> Bool[Array, "B"]:
        """Rows that are to go on."""
        return ~self.finished & (self.context.length < self.logp.shape[1])

    def position(self) -> Int[Array, "B"]:
        """Position of the next token."""
        return jnp.sum(self.context.prompt, axis=1) + self.context.length


def run_loop(step: Callable[[Carry], Carry], running: Callable[[Carry], Array], carry: Carry) -> Carry:
    """The decode loop: steps while any row is running."""
    return jax.lax.while_loop(lambda carry: jnp.any(running(carry)), step, carry)


def prompt_inputs(prompt_mask: Bool[Array, "B P"]) -> tuple[Int[Array, "B P"], Int[Array, "B P"]]:
    """(positions, segment_ids) of left-padded prompts."""
    return jnp.maximum(jnp.cumsum(prompt_mask, axis=1) - 1, 0), prompt_mask.astype(jnp.int32)


def start_context(
    prompts: Int[Array, "B P"],
    prompt_mask: Bool[Array, "B P"],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    pad_id: int,
) -> Context:
    """The context before the first token."""
    batch = prompts.shape[0]
    room = jnp.full((batch, max_new_tokens), pad_id, prompts.dtype)
    zeros = jnp.zeros(batch, jnp.int32)
    return Context(
        tokens=jnp.concatenate([prompts, room], axis=1),
        prompt=prompt_mask,
        length=zeros,
        constraint=None if sampling.constraint is None else zeros,
        stop=None if sampling.stop is None else zeros,
    )


def append_token(
    context: Context, token: Int[Array, "B"], active: Bool[Array, "B"], sampling: Sampling, *, eos_id: int
) -> tuple[Context, Bool[Array, "B"]]:
    """The context with a token more in active rows, and which of them end with it."""
    columns = context.prompt.shape[1] + context.length
    columns = jnp.where(active, columns, context.tokens.shape[1])
    rows = jnp.arange(token.shape[0])
    ends = token == eos_id
    moved = {}
    for name, automaton in (("constraint", sampling.constraint), ("stop", sampling.stop)):
        if automaton is not None:
            state = getattr(context, name)
            moved[name] = jnp.where(active, next_state(automaton, state, token), state)
    if sampling.stop is not None:
        ends |= sampling.stop.final[moved["stop"]]
    context = dataclasses.replace(
        context,
        tokens=context.tokens.at[rows, columns].set(token.astype(context.tokens.dtype), mode="drop"),
        length=context.length + active,
        **moved,
    )
    return context, active & ends


def start(
    prefill: PrefillFn,
    params: Params,
    prompts: Int[Array, "N P"],
    prompt_mask: Bool[Array, "N P"],
    keys: Key[Array, "B"],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    pad_id: int,
    group_size: int = 1,
    tool_fn: ToolFn | None = None,
    images: Images | None = None,
) -> Generation:
    """Reads the prompts, each once, and repeats what they left for every answer to them."""

    def read(tokens: Int[Array, "R P"], mask: Bool[Array, "R P"], seen: Images | None):
        length, seen_inputs = tokens.shape[1] + max_new_tokens, {} if seen is None else {"images": seen}
        return prefill(params, tokens, *prompt_inputs(mask), length, **seen_inputs)

    prompts, prompt_mask = jnp.asarray(prompts), jnp.asarray(prompt_mask)
    whole = prompts, prompt_mask, images
    logits, cache = read(*whole)
    if group_size > 1:
        axes = row_axes(lambda rows: read(*jax.tree.map(lambda x: x[:1].repeat(rows, axis=0), whole)))
        repeated = jnp.repeat(jnp.arange(prompts.shape[0]), group_size)
        logits, cache = take_rows((logits, cache), axes, repeated)
        prompts, prompt_mask = prompts[repeated], prompt_mask[repeated]
    context = start_context(prompts, prompt_mask, sampling, max_new_tokens=max_new_tokens, pad_id=pad_id)
    zeros = jnp.zeros((prompts.shape[0], max_new_tokens), logits.dtype)
    rows = Generation(keys, context, zeros, zeros, jnp.zeros(prompts.shape[0], bool), logits, cache)
    if tool_fn is None:
        return rows
    pending = tool_fn(context.tokens[:, prompts.shape[1] :], context.length)
    return dataclasses.replace(rows, tool=ToolTurn(pending, jnp.zeros(zeros.shape, bool)))


def sample_step(
    decode: Callable[[Any, Int[Array, "B"], Int[Array, "B"], Int[Array, "B"]], tuple[Array, Any]],
    rows: Generation,
    sampling: Sampling,
    *,
    eos_id: int,
    pad_id: int,
    tool_fn: ToolFn | None = None,
) -> Generation:
    """One more token in every running row, of a tool where one has still to write, else of the policy.

    Args:
      decode: `decode(cache, token, position, length) -> (logits, cache)`.
      tool_fn: asked behind every token of the policy's.
    """
    active, length = rows.running(), rows.context.length
    processed = process_logits(rows.logits, sampling, rows.context, eos_id=eos_id)
    keys = step_keys(rows.keys, length)
    token, logp, filtered_logp = sample_token(keys, rows.logits, processed, sampling)
    place = jnp.arange(length.shape[0]), jnp.where(active, length, rows.logp.shape[1])
    if rows.tool is not None:
        writes = rows.tool.writes
        token = jnp.where(writes, rows.tool.pending[:, 0], token)
        logp, filtered_logp = (jnp.where(writes, 0, drawn) for drawn in (logp, filtered_logp))
    token = jnp.where(active, token, pad_id)
    context, ended = append_token(rows.context, token, active, sampling, eos_id=eos_id)
    tool = rows.tool
    if tool is not None and tool_fn is not None:
        asked = tool_fn(context.tokens[:, context.prompt.shape[1] :], context.length)
        rest = jnp.roll(tool.pending, -1, axis=1).at[:, -1].set(-1)
        written = tool.written.at[place].set(tool.writes, mode="drop")
        tool = ToolTurn(jnp.where(tool.writes[:, None], rest, asked), written)
    logits, cache = decode(rows.cache, token, rows.position(), length)
    return Generation(
        keys=rows.keys,
        context=context,
        logp=rows.logp.at[place].set(logp, mode="drop"),
        filtered_logp=rows.filtered_logp.at[place].set(filtered_logp, mode="drop"),
        finished=rows.finished | ended,
        logits=logits,
        cache=cache,
        tool=tool,
    )


def generate(
    prefill: PrefillFn,
    decode: DecodeFn,
    params: Params,
    prompts: Int[Array, "N P"],
    prompt_mask: Bool[Array, "N P"],
    key: PRNGKeyArray | Key[Array, "B"],
    *,
    max_new_tokens: int,
    eos_id: int,
    pad_id: int,
    sampling: Sampling = Sampling(),
    group_size: int = 1,
    early_end: bool = True,
    tool_fn: ToolFn | None = None,
    images: Images | None = None,
) -> Rollout:
    """Samples completions of each prompt.

    The loop runs until every row has ended or has `max_new_tokens` tokens. Rows that have ended get
    `pad_id`, out of the mask.

    Args:
      prefill: `prefill(params, tokens, positions, segment_ids, length) -> (logits, cache)`.
      decode: `decode(params, cache, token, position) -> (logits, cache)`.
      prompts: left-padded, so that every completion begins in column P.
      prompt_mask: True where `prompts` holds a token; at least the last column of each row.
      key: of all rows, which draw independently of each other; or one key for each row.
      group_size: completions of each prompt, which is read once; they stand together.
      early_end: stop when all rows have ended. False runs all `max_new_tokens` steps, to the same rollout:
        faster under `vmap`, where a loop that may end in one run copies its cache in all of them.
      tool_fn: a tool, asked before the first token and behind every token of the policy's. What it writes is
        read like any other token and counts as new, but has log-prob 0 and is out of the mask: nothing is
        learned from it.
      images: of each prompt, where its tokens hold places for them.

    Returns:
      A `Rollout` of N x group_size rows and T = P + max_new_tokens columns.
    """
    keys = row_keys(key, prompts.shape[0] * group_size) if key.ndim == 0 else key
    begun = start(
        prefill,
        params,
        prompts,
        prompt_mask,
        keys,
        sampling,
        max_new_tokens=max_new_tokens,
        pad_id=pad_id,
        group_size=group_size,
        tool_fn=tool_fn,
        images=images,
    )

    def step(rows: Generation) -> Generation:
        def decode_row(cache: Any, token: Array, position: Array, _: Array):
            return decode(params, cache, token, position)

        return sample_step(decode_row, rows, sampling, eos_id=eos_id, pad_id=pad_id, tool_fn=tool_fn)

    if early_end:
        end = run_loop(step, Generation.running, begun)
    else:
        end, _ = jax.lax.scan(lambda rows, _: (step(rows), None), begun, None, length=max_new_tokens)
    experts = experts_of(end.cache)
    rollout = assemble(end.context, end.logp, end.filtered_logp, end.finished, end.tool, experts)
    seen = jax.tree.map(lambda x: jnp.repeat(x, group_size, axis=0), images)
    return dataclasses.replace(rollout, sequences=dataclasses.replace(rollout.sequences, images=seen))


def make_stream(
    prefill: PrefillFn, decode: DecodeFn, *, max_new_tokens: int, eos_id: int, pad_id: int
) -> Callable[..., Iterator[Rollout]]:
    """`stream(params, prompts, prompt_mask, key, sampling, images)`: what `generate` samples, after every
    token. The steps are the same, each a call from the host; they are compiled once for each shape.
    """
    begin = jax.jit(functools.partial(start, prefill, max_new_tokens=max_new_tokens, pad_id=pad_id))

    @jax.jit
    def step(params: Params, rows: Generation, sampling: Sampling) -> tuple[Generation, Rollout]:
        def decode_row(cache: Any, token: Array, position: Array, _: Array):
            return decode(params, cache, token, position)

        rows = sample_step(decode_row, rows, sampling, eos_id=eos_id, pad_id=pad_id)
        return rows, assemble(rows.context, rows.logp, rows.filtered_logp, rows.finished)

    def stream(
        params: Params,
        prompts: Int[Array, "B P"],
        prompt_mask: Bool[Array, "B P"],
        key: PRNGKeyArray | Key[Array, "B"],
        sampling: Sampling = Sampling(),
        images: Images | None = None,
    ) -> Iterator[Rollout]:
        keys = row_keys(key, prompts.shape[0]) if key.ndim == 0 else key
        rows = begin(params, prompts, prompt_mask, keys, sampling, images=images)
        while np.any(rows.running()):
            rows, rollout = step(params, rows, sampling)
            yield rollout

    return stream


def assemble(
    context: Context,
    logp: Float[Array, "B T"],
    filtered_logp: Float[Array, "B T"] | None,
    finished: Bool[Array, "B"],
    tool: ToolTurn | None = None,
    experts: Int[Array, "B S R k"] | None = None,
) -> Rollout:
    """A rollout of what the rows hold."""
    pad = ((0, 0), (context.prompt.shape[1], 0))
    generated = context.generated()
    prompt = jnp.pad(context.prompt, ((0, 0), (0, logp.shape[1])))
    valid = prompt | generated
    sequences = Sequences(
        tokens=context.tokens,
        positions=jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0),
        segment_ids=valid.astype(jnp.int32),
        mask=generated if tool is None else generated & ~jnp.pad(tool.written, pad),
        experts=experts,
    )
    padded = None if filtered_logp is None else jnp.pad(filtered_logp, pad)
    return Rollout(sequences, jnp.pad(logp, pad), finished, padded)
