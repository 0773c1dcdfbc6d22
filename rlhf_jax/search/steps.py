"""Written solutions as states of a search: a step is a line, proposals are samples of a policy.

Texts stand left-padded, so that each ends in the last column, as generation wants its prompts; a step moves
them to the left. Models are callables: `generate(tokens, mask, key) -> Rollout` and
`step_logits(sequences) -> [N, W]`.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Int, PRNGKeyArray, Rollout, Sequences
from rlhf_jax.search.choosing import Aggregate, process_scores
from rlhf_jax.search.interface import Candidates, EvaluateFn, ProposeFn, follow

GenerateFn = Callable[[Int[Array, "N W"], Bool[Array, "N W"], PRNGKeyArray], Rollout]
"""Samples the tokens of one step, or a few more, behind texts that are left-padded."""
NextLogitsFn = Callable[[Sequences], Float[Array, "N V"]]
"""Logits of the token that follows texts, which all end in the last column."""
StepLogitsFn = Callable[[Sequences], Float[Array, "N W"]]
"""Log-odds that the step which ends in a token is right."""


@pytree_dataclass
class Solution:
    """A prompt and what has been written behind it.

    Attributes:
      tokens: left-padded.
      length: of prompt and solution together.
      written: tokens of the solution.
      logp: of the solution under the policy, in nats.
      done: the solution has ended, well or not.
      failed: it was given up: a step had no end, or the text no room.
    """

    tokens: Int[Array, "*N W"]
    length: Int[Array, "*N"]
    written: Int[Array, "*N"]
    logp: Float[Array, "*N"]
    done: Bool[Array, "*N"]
    failed: Bool[Array, "*N"]


def init_solution(tokens: Int[Array, "N P"], mask: Bool[Array, "N P"], *, room: int) -> Solution:
    """States at the end of left-padded prompts, with room for so many tokens more."""
    count = tokens.shape[0]
    nothing = jnp.zeros(count, bool)
    return Solution(
        tokens=jnp.pad(tokens, ((0, 0), (room, 0))),
        length=jnp.sum(mask, axis=1),
        written=jnp.zeros(count, int),
        logp=jnp.zeros(count),
        done=nothing,
        failed=nothing,
    )


def is_done(state: Solution) -> Bool[Array, "*N"]:
    """Terminal states: nothing follows."""
    return state.done


def text_mask(state: Solution) -> Bool[Array, "*N W"]:
    """Mask of the text, prompt and solution."""
    width = state.tokens.shape[-1]
    return jnp.arange(width) >= width - state.length[..., None]


def solution_mask(state: Solution) -> Bool[Array, "*N W"]:
    """Mask of the solution."""
    width = state.tokens.shape[-1]
    return jnp.arange(width) >= width - state.written[..., None]


def as_sequences(state: Solution) -> Sequences:
    """Texts for a model to read; `mask` marks the solution."""
    there = text_mask(state)
    positions = jnp.maximum(jnp.cumsum(there, axis=-1) - 1, 0)
    return Sequences(state.tokens, positions, there.astype(jnp.int32), solution_mask(state))


def make_propose_fn(
    generate: GenerateFn, *, branching_factor: int, step_length: int, end_ids: Sequence[int], eos_id: int
) -> ProposeFn:
    """Candidates: `branching_factor` samples of the next step each, equal ones merged.

    Args:
      generate: samples at least `step_length` tokens, or until the end of a step.
      step_length: a step without an end by then ends its solution in failure.
      end_ids: tokens that end a step, `eos_id` beside them.
      eos_id: ends the solution.
    """
    ends = jnp.asarray([*end_ids, eos_id])

    def propose(state: Solution, key: PRNGKeyArray) -> Candidates:
        repeated = jax.tree.map(lambda x: jnp.repeat(x, branching_factor, axis=0), state)
        rollout = generate(repeated.tokens, text_mask(repeated), key)
        width = repeated.tokens.shape[1]
        new, sampled = (
            x[:, width : width + step_length] for x in (rollout.sequences.tokens, rollout.sequences.mask)
        )
        is_end = jnp.any(new[..., None] == ends, axis=-1) & sampled
        ended = jnp.any(is_end, axis=1)
        size = jnp.where(ended, jnp.argmax(is_end, axis=1) + 1, jnp.sum(sampled, axis=1))
        kept = jnp.arange(step_length) < size[:, None]
        logp = jnp.sum(jnp.where(kept, rollout.logp[:, width : width + step_length], 0), axis=1)
        after = _append(repeated, jnp.where(kept, new, 0), size, logp)
        last = jnp.take_along_axis(new, jnp.maximum(size - 1, 0)[:, None], axis=1)[:, 0]
        failed = ~ended | (after.length > width)
        after = Solution(
            after.tokens,
            jnp.minimum(after.length, width),
            jnp.minimum(after.written, width),
            after.logp,
            done=failed | (last == eos_id),
            failed=failed,
        )
        grouped = jax.tree.map(lambda x: x.reshape(-1, branching_factor, *x.shape[1:]), (after, logp, size))
        states, logp, size = grouped
        same = jnp.all(states.tokens[:, :, None] == states.tokens[:, None], axis=-1)
        first = jnp.argmax(same, axis=2) == jnp.arange(branching_factor)
        return Candidates(states, logp, jnp.sum(same, axis=2), first, jnp.sum(size, axis=1).astype(float))

    return propose


def _append(
    state: Solution, step: Int[Array, "N S"], size: Int[Array, "N"], logp: Float[Array, "N"]
) -> Solution:
    width = state.tokens.shape[1]
    columns = jnp.arange(width) + size[:, None]
    both = jnp.concatenate([state.tokens, step], axis=1)
    return Solution(
        jnp.take_along_axis(both, columns, axis=1),
        state.length + size,
        state.written + size,
        state.logp + logp,
        state.done,
        state.failed,
    )


# Values --------------------------------------------------------------------------------------------


def make_process_value_fn(
    step_logits: StepLogitsFn, *, end_ids: Sequence[int], aggregate: Aggregate = "product"
) -> EvaluateFn:
    """Values by a process reward model: that of all steps written so far; 0 for a solution that failed."""

    def evaluate(state: Solution, key: PRNGKeyArray) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
        del key
        values = process_scores(
            step_logits(as_sequences(state)), step_ends(state, end_ids), aggregate=aggregate
        )
        return jnp.where(state.failed, 0, values), jnp.zeros(values.shape)

    return evaluate


def make_outcome_value_fn(step_logits: StepLogitsFn) -> EvaluateFn:
    """Values by an outcome reward model, for solutions that have ended; 0 for one that has not, or failed."""

    def evaluate(state: Solution, key: PRNGKeyArray) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
        del key
        chances = jax.nn.sigmoid(step_logits(as_sequences(state))[:, -1])
        return jnp.where(state.done & ~state.failed, chances, 0), jnp.zeros(chances.shape)

    return evaluate


def make_prompted_value_fn(
    next_logits: NextLogitsFn, question: Sequence[int], *, yes: int, no: int
) -> EvaluateFn:
    """Values by asking the policy itself, ToT's value prompt (Yao et al. 2023): no reward model.

        value = P(yes) / (P(yes) + P(no)) behind the text and the question

    A state that failed is worth 0. Each value costs one token.

    Args:
      next_logits: of the token behind left-padded texts.
      question: tokens of a question about what has been written, up to where the answer stands.
      yes: the token that says that it is good.
      no: the token that says that it is not.
    """
    asked = jnp.asarray(question)

    def evaluate(state: Solution, key: PRNGKeyArray) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
        del key
        rows = jnp.broadcast_to(asked, (*state.tokens.shape[:-1], len(asked)))
        text = dataclasses.replace(
            state,
            tokens=jnp.concatenate([state.tokens, rows], axis=-1),
            length=state.length + len(asked),
            written=state.written + len(asked),
        )
        logits = next_logits(as_sequences(text))
        values = jnp.where(state.failed, 0, jax.nn.sigmoid(logits[..., yes] - logits[..., no]))
        return values, jnp.ones(values.shape)

    return evaluate


def step_ends(state: Solution, end_ids: Sequence[int]) -> Bool[Array, "*N W"]:
    """Mask of step ends; the line that ends with the solution is no step."""
    is_end = jnp.any(state.tokens[..., None] == jnp.asarray(end_ids), axis=-1)
    return is_end & solution_mask(state)


# Thoughts of a graph -------------------------------------------------------------------------------


def trusted_prefix(
    state: Solution, step_logits: StepLogitsFn, end_ids: Sequence[int], *, threshold: float = 0.5
) -> Solution:
    """The solution up to its first step of a probability below `threshold`; whole where there is none.

    Its `logp` is no longer known and set to 0.
    """
    ends = step_ends(state, end_ids)
    doubted = ends & (jax.nn.sigmoid(step_logits(as_sequences(state))) < threshold)
    any_doubt = jnp.any(doubted, axis=1)
    width = state.tokens.shape[1]
    columns = jnp.arange(width)
    first = jnp.argmax(doubted, axis=1)
    # The text is kept up to the end of the step before, or of the prompt.
    before = jnp.where(ends & (columns < first[:, None]), columns, -1)
    keep = jnp.maximum(jnp.max(before, axis=1), width - state.written - 1) + 1
    drop = jnp.where(any_doubt, width - keep, 0)
    source = jnp.maximum(columns - drop[:, None], 0)
    tokens = jnp.take_along_axis(state.tokens, source, axis=1)
    return Solution(
        jnp.where(columns >= drop[:, None], tokens, 0),
        state.length - drop,
        state.written - drop,
        jnp.zeros_like(state.logp),
        done=state.done & ~any_doubt,
        failed=state.failed & ~any_doubt,
    )


def make_rewrite_fn(
    propose: ProposeFn, step_logits: StepLogitsFn, end_ids: Sequence[int], *, depth: int
) -> Callable[[Solution, PRNGKeyArray], tuple[Solution, Float[Array, "N"]]]:
    """For `graph.refine`: a solution is written anew from its first doubtful step on."""

    def rewrite(state: Solution, key: PRNGKeyArray) -> tuple[Solution, Float[Array, "N"]]:
        return follow(propose, is_done, trusted_prefix(state, step_logits, end_ids), key, steps=depth)

    return rewrite


def make_join_fn(
    propose: ProposeFn, step_logits: StepLogitsFn, end_ids: Sequence[int], *, depth: int
) -> Callable[[Solution, PRNGKeyArray], tuple[Solution, Float[Array, "G"]]]:
    """For `graph.merge`: of several solutions, the longest part that is trusted, written on to the end."""

    def join(groups: Solution, key: PRNGKeyArray) -> tuple[Solution, Float[Array, "G"]]:
        members = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), groups)
        prefixes = trusted_prefix(members, step_logits, end_ids)
        # One that is whole wins against one that only is as long.
        rank = (2 * prefixes.written + prefixes.done).reshape(groups.length.shape)
        place = jnp.argmax(jnp.where(prefixes.failed.reshape(rank.shape), -1, rank), axis=1)
        rows = jnp.arange(len(place))
        longest = jax.tree.map(lambda x: x.reshape(*rank.shape, *x.shape[1:])[rows, place], prefixes)
        return follow(propose, is_done, longest, key, steps=depth)

    return join
