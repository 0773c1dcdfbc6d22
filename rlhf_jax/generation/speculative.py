"""Speculative decoding: several tokens guessed cheaply, then checked by the model in one pass.

What comes out has exactly the model's own distribution, whatever the guesses (Leviathan et al. 2023; Chen et
al. 2023); good guesses only make it faster. Where guesses come from is a `Proposer`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.core.protocols import ExtendFn, PrefillFn
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Int, Key, Params, PRNGKeyArray, Rollout
from rlhf_jax.generation.loop import Generation, append_token, assemble, run_loop, start
from rlhf_jax.generation.processors import Context
from rlhf_jax.generation.sampling import (
    Sampling,
    full_logp,
    process_logits,
    row_keys,
    sample_token,
    step_keys,
    target_logp,
)


@dataclasses.dataclass(frozen=True)
class Proposer:
    """Guesses the next `num_speculative_tokens` tokens of each row.

    Attributes:
      num_speculative_tokens: tokens guessed at a time.
      start: `start(prompts, prompt_mask, room) -> state`, with room for `room` tokens after the prompts.
      propose: `propose(state, context, keys, sampling) -> (tokens [B, n], logp [B, n, V] or None, state)`:
        guesses, and the log-probs of the distributions they were drawn from; None if they are certain.
      observe: `observe(state, context, read [B, n + 1], best [B, n + 1]) -> state` after a check: the tokens
        that the model has read, and its likeliest next token after each of them.
    """

    num_speculative_tokens: int
    start: Callable[..., Any]
    propose: Callable[..., tuple[Array, Array | None, Any]]
    observe: Callable[..., Any] = lambda state, context, read, best: state


@pytree_dataclass
class Acceptance:
    """Acceptance statistics of speculative decoding, [B] each.

    Attributes:
      num_drafts: passes of the model.
      num_draft_tokens: tokens guessed.
      num_accepted_tokens: guesses that were kept.
    """

    num_drafts: Int[Array, "B"]
    num_draft_tokens: Int[Array, "B"]
    num_accepted_tokens: Int[Array, "B"]


@pytree_dataclass
class _Carry:
    rows: Generation
    state: Any
    acceptance: Acceptance

    def running(self) -> Bool[Array, "B"]:
        return self.rows.running()


def speculative_decode(
    prefill: PrefillFn,
    extend: ExtendFn,
    params: Params,
    prompts: Int[Array, "B P"],
    prompt_mask: Bool[Array, "B P"],
    key: PRNGKeyArray | Key[Array, "B"],
    *,
    proposer: Proposer,
    max_new_tokens: int,
    eos_id: int,
    pad_id: int,
    sampling: Sampling = Sampling(),
) -> tuple[Rollout, Acceptance]:
    """Samples completions like `generate`, several tokens a pass where the proposer guesses well.

    Args:
      prefill: as for `generate`.
      extend: `extend(params, cache, tokens [B, n], positions, columns [B]) -> (logits [B, n, V], cache)`.
      key: of all rows, or one for each.

    Returns:
      (rollout, acceptance).
    """
    keys = row_keys(key, prompts.shape[0]) if key.ndim == 0 else key
    room = max_new_tokens + proposer.num_speculative_tokens
    begun = start(
        prefill,
        params,
        prompts,
        prompt_mask,
        keys,
        sampling,
        max_new_tokens=room,
        pad_id=pad_id,
    )
    # The cache has room for guesses beyond the last token; the answer has not.
    context = dataclasses.replace(
        begun.context, tokens=begun.context.tokens[:, : prompts.shape[1] + max_new_tokens]
    )
    short = begun.logp[:, :max_new_tokens]
    rows = dataclasses.replace(begun, context=context, logp=short, filtered_logp=short)
    processed = process_logits(rows.logits, sampling, context, eos_id=eos_id)
    first = sample_token(step_keys(keys, context.length), rows.logits, processed, sampling)
    rows = _emit(rows, *first, rows.running(), sampling, eos_id=eos_id)
    zeros = jnp.zeros(prompts.shape[0], jnp.int32)
    state = proposer.start(prompts, prompt_mask, room)
    carry = _Carry(rows, state, Acceptance(zeros, zeros, zeros))

    def step(carry: _Carry) -> _Carry:
        rows = carry.rows
        active, context = rows.running(), rows.context
        guesses, guess_logp, state = proposer.propose(carry.state, context, keys, sampling)
        read = jnp.concatenate([last_token(context)[:, None], guesses], axis=1)
        column = prompts.shape[1] + context.length - 1
        positions = (rows.position() - 1)[:, None] + jnp.arange(read.shape[1])
        logits, cache = extend(params, rows.cache, read, positions, column)
        state = proposer.observe(state, context, read, jnp.argmax(logits, axis=-1))
        rows = dataclasses.replace(rows, cache=cache)
        rows, accepted = _check(rows, logits, guesses, guess_logp, sampling, eos_id=eos_id)
        seen = carry.acceptance
        acceptance = Acceptance(
            seen.num_drafts + active,
            seen.num_draft_tokens + proposer.num_speculative_tokens * active,
            seen.num_accepted_tokens + accepted,
        )
        return _Carry(rows, state, acceptance)

    end = run_loop(step, _Carry.running, carry)
    rollout = assemble(end.rows.context, end.rows.logp, end.rows.filtered_logp, end.rows.finished)
    return rollout, end.acceptance


def last_token(context: Context, back: int = 0) -> Int[Array, "B"]:
    """The last token that stands in each row, or the one `back` tokens before it."""
    column = context.prompt.shape[1] + context.length - 1 - back
    return jnp.take_along_axis(context.tokens, column[:, None], axis=1)[:, 0]


def _emit(
    rows: Generation,
    token: Int[Array, "B"],
    logp: Float[Array, "B"],
    filtered_logp: Float[Array, "B"],
    active: Bool[Array, "B"],
    sampling: Sampling,
    *,
    eos_id: int,
) -> Generation:
    """The rows with a token more where they are active."""
    length = rows.context.length
    place = jnp.arange(length.shape[0]), jnp.where(active, length, rows.logp.shape[1])
    context, ended = append_token(rows.context, token, active, sampling, eos_id=eos_id)
    return dataclasses.replace(
        rows,
        context=context,
        logp=rows.logp.at[place].set(logp, mode="drop"),
        filtered_logp=rows.filtered_logp.at[place].set(filtered_logp, mode="drop"),
        finished=rows.finished | ended,
    )


def _check(
    rows: Generation,
    logits: Float[Array, "B m V"],
    guesses: Int[Array, "B n"],
    guess_logp: Float[Array, "B n V"] | None,
    sampling: Sampling,
    *,
    eos_id: int,
) -> tuple[Generation, Int[Array, "B"]]:
    """Keeps guesses from left to right, each with probability min(1, p / q); the first that is not kept is
    drawn anew from max(p - q, 0), and after the last comes a token from p.
    """
    count, going = guesses.shape[1], rows.running()
    accepted = jnp.zeros(guesses.shape[0], jnp.int32)
    at = jnp.arange(guesses.shape[0])
    for place in range(count + 1):
        keys = step_keys(rows.keys, rows.context.length)
        processed = process_logits(logits[:, place], sampling, rows.context, eos_id=eos_id)
        target = target_logp(processed, sampling)
        if place < count:
            guess = guesses[:, place]
            if guess_logp is None:
                drawn = jnp.where(jnp.arange(target.shape[-1]) == guess[:, None], 0.0, -jnp.inf)
            else:
                drawn = guess_logp[:, place]
            chance = jnp.exp(target[at, guess] - drawn[at, guess])
            keep = jax.vmap(jax.random.uniform)(_fold(keys, 1)) < chance
            rest = jnp.maximum(jnp.exp(target) - jnp.exp(drawn), 0)
            # All of it may round to 0 where the two distributions are equal.
            rest = jnp.where(jnp.sum(rest, axis=-1, keepdims=True) > 0, rest, jnp.exp(target))
            other = jax.vmap(jax.random.categorical)(keys, jnp.log(rest))
            token = jnp.where(keep, guess, other)
        else:
            keep = jnp.zeros_like(going)
            token = jax.vmap(jax.random.categorical)(keys, target)
        logp = full_logp(logits[:, place], sampling)[at, token]
        rows = _emit(rows, token, logp, target[at, token], going, sampling, eos_id=eos_id)
        accepted += going & keep
        going &= keep & rows.running()
    return rows, accepted


def _fold(keys: Key[Array, "B"], number: int) -> Key[Array, "B"]:
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


# Proposers ------------------------------------------------------------------------------------------


def draft_model_proposer(
    prefill: PrefillFn, extend: ExtendFn, params: Params, *, num_speculative_tokens: int, eos_id: int
) -> Proposer:
    """Guesses of a smaller model with the same tokens, drawn under the same rules.

    Args:
      prefill: the small model's; see `speculative_decode`.
      extend: the same.
    """

    def begin(prompts: Int[Array, "B P"], prompt_mask: Bool[Array, "B P"], room: int):
        keys = row_keys(jax.random.key(0), prompts.shape[0])  # nothing is drawn yet
        rows = start(prefill, params, prompts, prompt_mask, keys, Sampling(), max_new_tokens=room, pad_id=0)
        return rows.cache

    def propose(cache: Any, context: Context, keys: Key[Array, "B"], sampling: Sampling):
        # The token before the last may not have been read: the last check can have kept every guess.
        read = jnp.stack([last_token(context, back=1), last_token(context)], axis=1)
        column = context.prompt.shape[1] + context.length - 2
        position = jnp.sum(context.prompt, axis=1) + context.length - 2
        tokens, logps = [], []
        active = jnp.ones(context.length.shape, bool)
        for _ in range(num_speculative_tokens):
            positions = position[:, None] + jnp.arange(read.shape[1])
            logits, cache = extend(params, cache, read, positions, column)
            processed = process_logits(logits[:, -1], sampling, context, eos_id=eos_id)
            drawn = _fold(step_keys(keys, context.length), 2)
            logp = target_logp(processed, sampling)
            token = jax.vmap(jax.random.categorical)(drawn, logp)
            column, position = column + read.shape[1], position + read.shape[1]
            read = token[:, None].astype(context.tokens.dtype)
            context, _ = append_token(context, token, active, sampling, eos_id=eos_id)
            tokens.append(read[:, 0])
            logps.append(logp)
        return jnp.stack(tokens, axis=1), jnp.stack(logps, axis=1), cache

    return Proposer(num_speculative_tokens, begin, propose)


def prompt_lookup_proposer(*, num_speculative_tokens: int, longest: int = 3) -> Proposer:
    """Guesses what followed the last time that the row held its last few tokens (prompt look-up).

    Args:
      longest: of all places whose last tokens are the row's last tokens, up to this many, the one with most
        of them is taken, and of equals the last.
    """

    def propose(state: None, context: Context, _: Key[Array, "B"], __: Sampling):
        return _followers(context, num_speculative_tokens, longest), None, state

    return Proposer(num_speculative_tokens, lambda *_: None, propose)


def _followers(context: Context, num_speculative_tokens: int, longest: int) -> Int[Array, "B n"]:
    tokens = context.tokens
    batch, width = tokens.shape
    held = jnp.pad(context.prompt, ((0, 0), (0, width - context.prompt.shape[1]))) | context.generated()
    end = (context.prompt.shape[1] + context.length)[:, None]
    column = jnp.arange(width)
    # Column c continues what the row ends with if the tokens before both agree.
    agreeing, length = column < end, jnp.zeros((batch, width), jnp.int32)
    for back in range(1, longest + 1):
        before = jnp.where(column >= back, jnp.roll(tokens, back, axis=1), -1)
        there = jnp.where(column >= back, jnp.roll(held, back, axis=1), False)
        last = jnp.take_along_axis(tokens, jnp.maximum(end - back, 0), axis=1)
        agreeing &= there & (before == last)
        length += agreeing
    best = jnp.argmax(jnp.where(length > 0, length * width + column, -1), axis=1)[:, None]
    following = jnp.minimum(best + jnp.arange(num_speculative_tokens), end - 1)
    return jnp.take_along_axis(tokens, following, axis=1)


@pytree_dataclass
class _Pool:
    """N-gram pool of lookahead decoding: what the model would say next, as far as its checks have shown.

    Attributes:
      guesses: the tokens after the last one that was read, from the end of the last check.
      length: generated tokens when they were made.
      keys: tokens by slot; -1 where the slot is empty.
      followers: what was likely after each of them.
    """

    guesses: Int[Array, "B m"]
    length: Int[Array, "B"]
    keys: Int[Array, "B H"]
    followers: Int[Array, "B H n"]


def lookahead_proposer(*, num_speculative_tokens: int, num_slots: int = 512) -> Proposer:
    """Guesses from the model's own passes, after lookahead decoding (Fu et al. 2024).

    A check computes the likeliest token after every guess, wrong ones included. Those after the kept guesses
    are the next round's guesses (a Jacobi iteration), and every run of them is remembered by the token before
    it, in a pool of `num_slots` a row; what the pool knows of the last token comes first.
    The window of its own that lookahead decoding runs beside each check is left out.
    """

    def begin(prompts: Int[Array, "B P"], *_: Any) -> _Pool:
        batch = prompts.shape[0]
        return _Pool(
            jnp.zeros((batch, num_speculative_tokens + 1), prompts.dtype),
            jnp.zeros(batch, jnp.int32),
            jnp.full((batch, num_slots), -1, prompts.dtype),
            jnp.zeros((batch, num_slots, num_speculative_tokens), prompts.dtype),
        )

    def propose(pool: _Pool, context: Context, _: Key[Array, "B"], __: Sampling):
        token = last_token(context)
        rows = jnp.arange(token.shape[0])
        known = pool.keys[rows, token % num_slots] == token
        # The last token emitted stands at offset `new` of the guesses; those after it go on.
        new = context.length - pool.length
        offset = jnp.minimum(new[:, None] + jnp.arange(num_speculative_tokens), num_speculative_tokens)
        tail = jnp.take_along_axis(pool.guesses, offset, axis=1)
        return jnp.where(known[:, None], pool.followers[rows, token % num_slots], tail), None, pool

    def observe(pool: _Pool, context: Context, read: Int[Array, "B m"], best: Int[Array, "B m"]) -> _Pool:
        rows = jnp.arange(read.shape[0])
        keys, followers = pool.keys, pool.followers
        last = jnp.repeat(best[:, -1:], num_speculative_tokens, axis=1)
        run = jnp.concatenate([best, last], axis=1).astype(read.dtype)
        for place in reversed(range(read.shape[1])):  # the first place has seen most and is written last
            slot = read[:, place] % num_slots
            keys = keys.at[rows, slot].set(read[:, place])
            followers = followers.at[rows, slot].set(run[:, place : place + num_speculative_tokens])
        return _Pool(best.astype(read.dtype), context.length, keys, followers)

    return Proposer(num_speculative_tokens, begin, propose, observe)
