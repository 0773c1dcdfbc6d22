"""Rollouts of several turns: the model calls tools, reads what they say, and goes on.

A row is a list of ids that only grows: the prompt, what was sampled, what a tool said, what was sampled
next. Nothing is ever decoded and encoded again, so what is trained on is what the sampler saw. Tokens of
tools are out of the mask and have log-prob 0, and every update of the package trains through such a
`Rollout` as through any other.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import distributed
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import Array, Bool, Int, Key, Params, PRNGKeyArray, Rollout, Sequences
from rlhf_jax.data.chat import encode_conversation, encode_prompt
from rlhf_jax.data.examples import PromptExample
from rlhf_jax.data.packing import left_pad
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.generation import Sampling, regex_automaton, row_keys
from rlhf_jax.models import Policy
from rlhf_jax.rollout.sampler import GenerateFn, RolloutFns, check_full_support, make_completion_fn
from rlhf_jax.tool_use import Tool, answer_calls, call_pattern

SampleFn = Callable[
    [Params, Int[np.ndarray, "B P"], Bool[np.ndarray, "B P"], Key[Array, "B"], Sampling], Rollout
]

_BUCKET = 32


@dataclasses.dataclass
class _Row:
    """One conversation on its way; `mask` and `logp` are of what follows the prompt."""

    ids: list[int]
    prompt_length: int
    mask: list[bool] = dataclasses.field(default_factory=list)
    logp: list[float] = dataclasses.field(default_factory=list)
    done: bool = False
    finished: bool = False

    def append(self, ids: Sequence[int], logp: Sequence[float] | None = None) -> None:
        """Adds sampled tokens with their log-probs, or tokens of others without."""
        self.ids += ids
        self.mask += [logp is not None] * len(ids)
        self.logp += [0.0] * len(ids) if logp is None else logp


def make_sample_fn(policy: Policy, *, max_new_tokens: int) -> SampleFn:
    """`sample(params, tokens, mask, key, sampling) -> Rollout`: a turn, compiled once for each shape."""
    compiled = jax.jit(make_completion_fn(policy, max_new_tokens=max_new_tokens))

    def sample(
        params: Params,
        tokens: Int[np.ndarray, "B P"],
        mask: Bool[np.ndarray, "B P"],
        key: Key[Array, "B"],
        sampling: Sampling,
    ) -> Rollout:
        return compiled(params, *distributed.shard_batch((tokens, mask)), key, sampling=sampling)

    return sample


def make_multi_turn_fn(
    sample_fn: SampleFn,
    tokenizer: Tokenizer,
    tools: Sequence[Tool],
    *,
    prompt_length: int,
    max_new_tokens: int,
    max_turns: int,
    response_length: int,
    sampling: Sampling = Sampling(),
) -> GenerateFn:
    """`generate(params, prompts, key) -> Rollout`, where a turn that calls tools is followed by another.

    A turn ends with the end-of-sequence token, or with a stop string, behind which that token is put out of
    the mask. A conversation ends with a turn that calls nothing
    (`finished`), or unfinished: with a turn that is cut at its limit, with a call in the last turn, or where
    the tools' answers leave no room for another turn. Calls that cannot be run are answered with an error.

    Turns of all rows are sampled together. Contexts are padded to multiples of 32 tokens, so that few
    shapes reach the sampler; rows that have ended are replaced by copies of one that has not.

    Args:
      sample_fn: samples a turn from left-padded contexts (`make_sample_fn`).
      prompt_length: P; longer prompts are refused.
      max_new_tokens: of a turn, as `sample_fn` has it.
      max_turns: the model's turns in a conversation.
      response_length: columns for all that follows a prompt, tool output included.

    Raises:
      UserError: there is no room for a turn, or the chat template has no place for tools.
    """
    if max_new_tokens > response_length or max_turns < 1:
        raise UserError(
            f"a response of {response_length} tokens and {max_turns} turns has no room for a turn of "
            f"{max_new_tokens}: raise the response length"
        )
    between_turns = make_tool_turn_fn(tokenizer)

    def take_turn(params: Params, rows: list[_Row], keys: Key[Array, "B"], sampling: Sampling) -> None:
        """One turn more of the rows that go on; the last of them fills the batch up to its size."""
        numbers = [number for number, row in enumerate(rows) if not row.done]
        filled = numbers + numbers[-1:] * (len(rows) - len(numbers))
        longest = max(len(rows[number].ids) for number in numbers)
        width = -(-longest // _BUCKET) * _BUCKET
        tokens, mask = left_pad([rows[number].ids for number in filled], width, pad_id=tokenizer.pad_id)
        rollout = jax.device_get(sample_fn(params, tokens, mask, keys[np.array(filled)], sampling))
        for place, number in enumerate(numbers):
            row = rows[number]
            kept = rollout.sequences.mask[place]
            row.append(rollout.sequences.tokens[place][kept].tolist(), rollout.logp[place][kept].tolist())
            row.finished = bool(rollout.finished[place])
            row.done = not row.finished

    def answer(row: _Row, turn_ids: list[int], *, is_last_turn: bool) -> None:
        """Runs the calls of a whole turn, or ends the conversation."""
        is_closed = turn_ids[-1] == tokenizer.eos_id  # and not ended by a stop string
        text = tokenizer.decode(turn_ids[:-1] if is_closed else turn_ids, skip_special=False)
        said = answer_calls(tools, text)
        if not said:
            row.done = True
            return
        ids = between_turns(said) if is_closed else [tokenizer.eos_id, *between_turns(said)]
        room = response_length - len(row.mask) - len(ids)
        row.done = is_last_turn or room < max_new_tokens
        row.finished = False
        if not row.done:
            row.append(ids)

    def run(
        params: Params,
        prompts: Sequence[PromptExample],
        key: PRNGKeyArray | Key[Array, "B"],
        sampling: Sampling = sampling,
        /,
    ) -> Rollout:
        check_full_support(sampling)
        rows = [_Row(np.asarray(prompt.ids).tolist(), len(prompt.ids)) for prompt in prompts]
        keys = row_keys(key, len(rows)) if key.ndim == 0 else key
        for turn in range(max_turns):
            going = [(row, len(row.ids)) for row in rows if not row.done]
            if not going:
                break
            turn_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, turn)
            take_turn(params, rows, turn_keys, sampling)
            for row, length in going:
                if not row.done:
                    answer(row, row.ids[length:], is_last_turn=turn == max_turns - 1)
        return distributed.shard_batch(_assemble(rows, prompt_length, response_length, tokenizer.pad_id))

    return run


def multi_turn(
    policy: Policy,
    tools: Sequence[Tool],
    *,
    max_new_tokens: int,
    max_turns: int,
    response_length: int,
    constrained: bool = False,
) -> RolloutFns:
    """Conversations with tools, as a stage samples and reads them.

    Prompts offer the tools' schemas. Rewards get the last turn as the completion, and the field
    `conversation`, all that follows the prompt. Logged are the share of conversations in which a tool
    answered (`tool_use`), and `turns`, how many of the policy's there are in each.

    Args:
      max_new_tokens: of a turn.
      max_turns: the policy's turns in a conversation.
      response_length: tokens of all turns, what tools say included.
      constrained: let the policy write no call that cannot be run.
    """
    constraint = regex_automaton(policy.tokenizer, call_pattern(tools)) if constrained else None
    sample_fn = make_sample_fn(policy, max_new_tokens=max_new_tokens)

    def make(prompt_length: int, sampling: Sampling, num_images: int = 0) -> GenerateFn:
        if num_images:
            raise UserError("tools: conversations of several turns read no images yet: leave either out")
        converse = make_multi_turn_fn(
            sample_fn,
            policy.tokenizer,
            tools,
            prompt_length=prompt_length,
            max_new_tokens=max_new_tokens,
            max_turns=max_turns,
            response_length=response_length,
        )

        def run(
            params: Params,
            prompts: Sequence[PromptExample],
            key: PRNGKeyArray | Key[Array, "B"],
            sampling: Sampling = sampling,
            /,
        ) -> Rollout:
            return converse(params, prompts, key, dataclasses.replace(sampling, constraint=constraint))

        return run

    return RolloutFns(
        make,
        [tool.schema() for tool in tools],
        answer_texts_fn=last_turn_texts,
        shown_texts_fn=conversation_texts,
        fields_fn=lambda *read: {"conversation": conversation_texts(*read)},
        describe_fn=_describe,
    )


def make_tool_turn_fn(tokenizer: Tokenizer) -> Callable[[Sequence[str]], list[int]]:
    """`ids(outputs)`: what stands between a turn that called tools and the next turn, as the template has it.

    Text of tools is text: special tokens in it do not end a turn. Text that the tokenizer has no tokens for
    becomes an error for the model.

    Raises:
      UserError: the template does not lay a conversation out alike with and without what follows it.
    """
    # What the assistant said does not matter: its turn was sampled.
    opening = [{"role": "user", "content": "0"}, {"role": "assistant", "content": "0"}]
    begun = encode_conversation(tokenizer, opening)
    end = int(np.flatnonzero(begun.mask)[-1]) + 1

    def ids(outputs: Sequence[str]) -> list[int]:
        turns = [{"role": "tool", "content": output} for output in outputs]
        whole = encode_prompt(tokenizer, [*opening, *turns])
        if whole[:end] != begun.ids[:end]:
            raise UserError("the chat template changes a turn when a tool answers it; use another template")
        return whole[end:]

    def ids_or_error(outputs: Sequence[str]) -> list[int]:
        try:
            return ids(outputs)
        except UserError:
            return ids(["error: the output holds characters that cannot be shown"] * len(outputs))

    ids(["0"])  # a template without tools is refused before anything is sampled
    return ids_or_error


def _assemble(rows: Sequence[_Row], prompt_length: int, response_length: int, pad_id: int) -> Rollout:
    prompts = [row.ids[: row.prompt_length] for row in rows]
    prompt_tokens, prompt_mask = left_pad(prompts, prompt_length, pad_id=pad_id)
    shape = len(rows), response_length
    tokens, valid = np.full(shape, pad_id, np.int32), np.zeros(shape, bool)
    mask, logp = np.zeros(shape, bool), np.zeros(shape, np.float32)
    for place, row in enumerate(rows):
        length = len(row.mask)
        tokens[place, :length], valid[place, :length] = row.ids[row.prompt_length :], True
        mask[place, :length], logp[place, :length] = row.mask, row.logp
    valid = np.concatenate([prompt_mask, valid], axis=1)
    sequences = Sequences(
        tokens=jnp.asarray(np.concatenate([prompt_tokens, tokens], axis=1)),
        positions=jnp.asarray(np.maximum(np.cumsum(valid, axis=1) - 1, 0).astype(np.int32)),
        segment_ids=jnp.asarray(valid.astype(np.int32)),
        mask=jnp.asarray(np.concatenate([np.zeros_like(prompt_mask), mask], axis=1)),
    )
    padded = np.pad(logp, ((0, 0), (prompt_length, 0)))
    return Rollout(sequences, jnp.asarray(padded), jnp.asarray([row.finished for row in rows]))


# Looking at them -----------------------------------------------------------------------------------


def tool_tokens(rollout: Rollout) -> Bool[Array, "B T"]:
    """Tokens that tools wrote: behind the first sampled token, and not sampled."""
    mask = rollout.sequences.mask
    begun = jnp.cumsum(mask, axis=1) > 0
    return begun & ~mask & (rollout.sequences.segment_ids > 0)


def _describe(rollout: Rollout) -> dict[str, np.ndarray]:
    mask = np.asarray(rollout.sequences.mask)
    return {
        "tool_use": np.asarray(jnp.any(tool_tokens(rollout), axis=1)),
        "turns": np.asarray(np.sum(mask[:, 1:] & ~mask[:, :-1], axis=1)),
    }


def last_turn_texts(tokenizer: Tokenizer, rollout: Rollout) -> list[str]:
    """Texts sampled in the last turn of each row, without the end-of-sequence token."""
    tokens, mask, tools = jax.device_get(
        (rollout.sequences.tokens, rollout.sequences.mask, tool_tokens(rollout))
    )
    texts = []
    for row, kept, others in zip(tokens, mask, tools, strict=True):
        start = int(np.flatnonzero(others)[-1]) + 1 if others.any() else 0
        texts.append(tokenizer.decode(row[start:][kept[start:]].tolist()))
    return texts


def conversation_texts(tokenizer: Tokenizer, rollout: Rollout) -> list[str]:
    """All that follows the prompt in each row, tools and the marks of turns included, for people to read."""
    tokens, shown = jax.device_get((rollout.sequences.tokens, tool_tokens(rollout) | rollout.sequences.mask))
    pairs = zip(tokens, shown, strict=True)
    return [tokenizer.decode(row[kept].tolist(), skip_special=False) for row, kept in pairs]
