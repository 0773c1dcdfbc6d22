"""Texts in, texts out: answers to prompts of any length, in batches of like length."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.core.types import PRNGKeyArray
from rlhf_jax.data.packing import bucket_batches, left_pad
from rlhf_jax.generation import Sampling, cut_at_stop, row_keys, stop_automaton
from rlhf_jax.models import Policy
from rlhf_jax.rollout.sampler import completion_texts, make_completion_fn


@dataclasses.dataclass(frozen=True)
class Answer:
    """Completion of a model as text.

    Attributes:
      text: without the end of the turn, or the stop string that it ended at.
      finished: whether it ended by itself rather than at the length limit.
      tokens: sampled.
    """

    text: str
    finished: bool
    tokens: int


AnswerFn = Callable[..., Iterator[dict[int, Answer]]]


def make_answer_texts_fn(
    policy: Policy,
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    sampling: Sampling = Sampling(temperature=0.0),
    batch_size: int,
) -> AnswerFn:
    """`answer(prompts, key, wanted)`: an answer to each prompt of token ids, batch after batch, by its place.

    What is drawn for a prompt depends on its place and the key, and which prompts share a batch on their
    lengths alone: a run that was stopped, and passes over what is not `wanted` any more, gives what one in a
    piece gives.

    Args:
      stop: texts at which an answer ends.
      sampling: how tokens are drawn; the likeliest by default.
      batch_size: prompts at a time.
    """
    tokenizer = policy.tokenizer
    if stop:
        sampling = dataclasses.replace(sampling, stop=stop_automaton(tokenizer, stop))
    unbound = make_completion_fn(policy, max_new_tokens=max_new_tokens)
    complete = jax.jit(functools.partial(unbound, sampling=sampling))

    def answer(
        prompts: Sequence[Sequence[int]],
        key: PRNGKeyArray,
        wanted: Callable[[int], bool] = lambda place: True,
    ) -> Iterator[dict[int, Answer]]:
        size = min(batch_size, max(len(prompts), 1))
        for columns, places in bucket_batches([len(prompt) for prompt in prompts], size=size):
            if not any(map(wanted, places)):
                continue
            rows = left_pad([prompts[place] for place in places], columns, pad_id=tokenizer.pad_id)
            keys = jnp.concatenate([row_keys(key, 1, first=place) for place in places])
            rollout = complete(policy.params, *rows, keys)
            texts = [cut_at_stop(text, stop) for text in completion_texts(tokenizer, rollout)]
            lengths = np.asarray(rollout.sequences.mask).sum(axis=1)
            yield {
                place: Answer(text, bool(finished), int(length))
                for place, text, finished, length in zip(
                    places, texts, np.asarray(rollout.finished), lengths, strict=True
                )
            }

    return answer
