"""Beam search and diverse beam search: the likeliest answers rather than drawn ones."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from rlhf_jax.core.protocols import DecodeFn, PrefillFn
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Images, Int, Params, Rollout, Scalar
from rlhf_jax.generation.caches import row_axes, take_rows
from rlhf_jax.generation.loop import Generation, append_token, assemble, run_loop, start
from rlhf_jax.generation.processors import Context
from rlhf_jax.generation.sampling import Sampling, full_logp, process_logits, row_keys

EarlyStopping = bool | Literal["never"]


@pytree_dataclass
class _Answers:
    """Answers with their scores: K open beams, or the K best complete ones, of each group of each prompt."""

    context: Context
    logp: Float[Array, "R T"]
    finished: Bool[Array, "R"]
    scores: Float[Array, "N K"]


@pytree_dataclass
class _Beams:
    step: Int[Array, ""]
    open: _Answers
    complete: _Answers
    closed: Bool[Array, "N"]
    logits: Float[Array, "R V"]
    cache: Any


@dataclasses.dataclass(frozen=True)
class _Shape:
    """N groups of K beams; `groups` neighbouring ones search for one prompt."""

    beams: int
    groups: int


def _take(answers: _Answers, choice: Int[Array, "N C"], scores: Float[Array, "N C"]) -> _Answers:
    """The answers of each group that `choice` names, with new scores."""
    first = answers.scores.shape[1] * jnp.arange(choice.shape[0])[:, None]
    rows = (first + choice).reshape(-1)
    context, logp, finished = jax.tree.map(
        lambda x: x[rows], (answers.context, answers.logp, answers.finished)
    )
    return _Answers(context, logp, finished, scores)


def _join(first: _Answers, second: _Answers) -> _Answers:
    """The answers of both, side by side in each group."""

    def join(a: Array, b: Array) -> Array:
        groups = first.scores.shape[0]
        parts = [x.reshape(groups, -1, *x.shape[1:]) for x in (a, b)]
        joined = jnp.concatenate(parts, axis=1)
        return joined.reshape(-1, *joined.shape[2:])

    context, logp, finished = jax.tree.map(
        join,
        (first.context, first.logp, first.finished),
        (second.context, second.logp, second.finished),
    )
    return _Answers(context, logp, finished, jnp.concatenate([first.scores, second.scores], axis=1))


def _candidates(
    scores: Float[Array, "N K"],
    logp: Float[Array, "N K V"],
    closed: Bool[Array, "N"],
    shape: _Shape,
    diversity_penalty: Scalar,
    *,
    eos_id: int,
) -> tuple[Float[Array, "N C"], Int[Array, "N C"], Int[Array, "N C"]]:
    """(score, beam, token) of the C = 2 K best continuations of each group. With several groups a prompt,
    each group avoids the tokens with which the groups before it go on.
    """
    vocab_size = logp.shape[-1]
    count = min(2, vocab_size) * shape.beams
    taken = jnp.zeros((logp.shape[0] // shape.groups, vocab_size))
    found = []
    for group in range(shape.groups):
        total = scores[group :: shape.groups, :, None] + logp[group :: shape.groups]
        total = (total - diversity_penalty * taken[:, None]).reshape(taken.shape[0], -1)
        top, index = jax.lax.top_k(total, count)
        found.append((top, index // vocab_size, index % vocab_size))
        going_on = jnp.where(found[-1][2] == eos_id, -jnp.inf, top)
        best = jnp.take_along_axis(found[-1][2], jax.lax.top_k(going_on, shape.beams)[1], axis=1)
        rows = jnp.arange(len(best))[:, None]
        taken = taken.at[rows, best].add(~closed[group :: shape.groups, None])
    top, beam, token = (jnp.stack(parts, axis=1).reshape(-1, count) for parts in zip(*found, strict=True))
    return top, beam, token


def beam_search(
    prefill: PrefillFn,
    decode: DecodeFn,
    params: Params,
    prompts: Int[Array, "B P"],
    prompt_mask: Bool[Array, "B P"],
    *,
    max_new_tokens: int,
    eos_id: int,
    pad_id: int,
    beams: int = 4,
    groups: int = 1,
    diversity_penalty: Scalar = 0.0,
    length_penalty: Scalar = 1.0,
    early_stopping: EarlyStopping = False,
    best: int = 1,
    sampling: Sampling = Sampling(),
    images: Images | None = None,
) -> tuple[Rollout, Float[Array, "B n"]]:
    """The answers of the highest score that a search of limited width finds.

        score = sum_t log p(y_t) / |y| ** length_penalty

    At each step the 2 K best continuations of K open beams are looked at. Those of the first K that end join
    the K best complete answers; the best K of the others stay open. At the length limit all of them end.

    Args:
      beams: K of each group.
      groups: groups of beams a prompt, which take turns at each step (Vijayakumar et al. 2018).
      diversity_penalty: nats for each open beam of earlier groups that goes on with the token.
      length_penalty: above 0 it favours long answers.
      early_stopping: True: stop a prompt once K answers are complete. False: once the best open beam, were it
        to end now, is below the worst of them. "never": once it is below even at its greatest length.
      best: answers returned of each prompt, at most beams x groups.
      sampling: the rules; their temperature scales log-probs and nothing is drawn.
      images: of each prompt, where its tokens hold places for them.

    Returns:
      (rollout of B x best rows, best first, those of a prompt together; scores). A score is -inf where the
      search found fewer answers.
    """
    shape = _Shape(beams, groups)
    begun = start(
        prefill,
        params,
        prompts,
        prompt_mask,
        row_keys(jax.random.key(0), prompts.shape[0] * beams * groups),  # nothing is drawn
        sampling,
        max_new_tokens=max_new_tokens,
        pad_id=pad_id,
        group_size=beams * groups,
        images=images,
    )

    def empty_cache(rows: int) -> Any:
        zeros = jnp.zeros((rows, 1), jnp.int32)
        return prefill(params, zeros, zeros, zeros, 2)[1]

    axes = row_axes(empty_cache)
    carry = _first(begun, shape)

    def step(carry: _Beams) -> _Beams:
        considered, parents = _continuations(carry, shape, sampling, diversity_penalty, eos_id=eos_id)
        length = carry.step + 1
        ends = considered.finished.reshape(considered.scores.shape) | (length == max_new_tokens)
        complete = _complete(carry, considered, ends, shape, length, length_penalty, early_stopping)
        scores, choice = jax.lax.top_k(jnp.where(ends, -jnp.inf, considered.scores), beams)
        opened = _take(considered, choice, scores)
        rows = jnp.take_along_axis(parents, choice, axis=1) + beams * jnp.arange(len(choice))[:, None]
        cache = take_rows(carry.cache, axes, rows.reshape(-1))
        column = prompts.shape[1] + carry.step
        position = jnp.sum(opened.context.prompt, axis=1) + carry.step
        logits, cache = decode(params, cache, opened.context.tokens[:, column], position)
        horizon = max_new_tokens if early_stopping == "never" else length
        hope = scores[:, 0] / jnp.maximum(horizon, 1) ** length_penalty
        closed = carry.closed | (hope <= complete.scores[:, -1]) | (hope == -jnp.inf)
        if early_stopping is True:
            closed |= complete.scores[:, -1] > -jnp.inf
        return _Beams(length, opened, complete, closed, logits, cache)

    end = run_loop(step, lambda carry: ~carry.closed & (carry.step < max_new_tokens), carry)
    found = dataclasses.replace(end.complete, scores=end.complete.scores.reshape(len(prompts), -1))
    scores, choice = jax.lax.top_k(found.scores, best)
    found = _take(found, choice, scores)
    return assemble(found.context, found.logp, None, found.finished), scores


def _first(begun: Generation, shape: _Shape) -> _Beams:
    """One open beam a group, whose others are not there yet; no complete answers."""
    rows = begun.logits.shape[0]
    alone = jnp.where(jnp.arange(shape.beams) == 0, 0.0, -jnp.inf)
    scores = jnp.broadcast_to(alone, (rows // shape.beams, shape.beams))
    opened = _Answers(begun.context, begun.logp, begun.finished, scores)
    complete = dataclasses.replace(opened, scores=jnp.full_like(scores, -jnp.inf))
    closed = jnp.zeros(len(scores), bool)
    return _Beams(jnp.int32(0), opened, complete, closed, begun.logits, begun.cache)


def _continuations(
    carry: _Beams, shape: _Shape, sampling: Sampling, diversity_penalty: Scalar, *, eos_id: int
) -> tuple[_Answers, Int[Array, "N C"]]:
    """The best continuations of the open beams, best first, and the beams that they continue."""
    processed = process_logits(carry.logits, sampling, carry.open.context, eos_id=eos_id)
    logp = jax.nn.log_softmax(processed, axis=-1).reshape(*carry.open.scores.shape, -1)
    scores, parents, token = _candidates(
        carry.open.scores, logp, carry.closed, shape, diversity_penalty, eos_id=eos_id
    )
    held = _take(carry.open, parents, scores)
    full = full_logp(carry.logits, sampling).reshape(*carry.open.scores.shape, -1)
    token_logp = full[jnp.arange(len(parents))[:, None], parents, token].reshape(-1)
    active = jnp.ones(token.size, bool)
    context, ended = append_token(held.context, token.reshape(-1), active, sampling, eos_id=eos_id)
    held_logp = held.logp.at[:, carry.step].set(token_logp)
    return _Answers(context, held_logp, ended, scores), parents


def _complete(
    carry: _Beams,
    considered: _Answers,
    ends: Bool[Array, "N C"],
    shape: _Shape,
    length: Int[Array, ""],
    length_penalty: Scalar,
    early_stopping: EarlyStopping,
) -> _Answers:
    """The K best complete answers of each group, after this step."""
    joins = ends & (jnp.arange(ends.shape[1]) < shape.beams) & ~carry.closed[:, None]
    scores = considered.scores / length.astype(considered.scores.dtype) ** length_penalty
    new = dataclasses.replace(considered, scores=jnp.where(joins, scores, -jnp.inf))
    both = _join(carry.complete, new)
    scores, choice = jax.lax.top_k(both.scores, shape.beams)
    return _take(both, choice, scores)
