"""Answers that their own writer criticises and revises by principles (constitutional AI, Bai et al. 2022)."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from rlhf_jax.core.types import Array, Key
from rlhf_jax.data.chat import encode_prompt
from rlhf_jax.data.examples import PromptExample
from rlhf_jax.data.row_messages import Messages, prompt_messages
from rlhf_jax.data.sources import Row
from rlhf_jax.feedback.constitution import Principle
from rlhf_jax.generation import Sampling, row_keys
from rlhf_jax.models import Policy
from rlhf_jax.rollout.sampler import completion_texts, make_generate_fn

_COLUMNS = 32
"""Widths of prompts are multiples of this, so that few are compiled."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """One round of criticism.

    Attributes:
      principle: its name.
      critique: what the model says against the answer before.
      revision: the answer that it writes instead.
    """

    principle: str
    critique: str
    revision: str


@dataclasses.dataclass(frozen=True)
class Review:
    """An answer with all its rounds.

    Attributes:
      prompt: messages that were answered.
      answer: the first answer.
      turns: critiques and revisions, one a round.
      finished: whether the last revision ended by itself.
    """

    prompt: Messages
    answer: str
    turns: tuple[Turn, ...]
    finished: bool

    @property
    def revision(self) -> str:
        """Final revision: the last one."""
        return self.turns[-1].revision

    def row(self) -> dict[str, Any]:
        """As a row of a file for people to read."""
        return {**dataclasses.asdict(self), "revision": self.revision}


ReviewFn = Callable[[Sequence[PromptExample], int], list[Review]]


def make_review_fn(
    model: Policy,
    principles: Sequence[Principle],
    *,
    rounds: int,
    max_new_tokens: int,
    seed: int,
    sampling: Sampling = Sampling(),
    review_sampling: Sampling = Sampling(temperature=0.0),
) -> ReviewFn:
    """`review(prompts, number) -> [Review]`: answers, and in each round a critique and a revision.

    The whole conversation stays in view: critiques and revisions are turns of it, and in the next round the
    conversation is the prompt with the revision as its answer. What is drawn is a function of `seed` and of
    `number`, that of the first prompt, so that a batch is the same whenever it is asked for.

    Args:
      principles: one is drawn for each prompt and round.
      max_new_tokens: of an answer, a critique, or a revision.
      sampling: of answers.
      review_sampling: of critiques and revisions.
    """
    key = jax.random.key(seed)

    @functools.cache
    def generate_fn(width: int):
        return make_generate_fn(model, prompt_length=width, max_new_tokens=max_new_tokens)

    def say(
        conversations: Sequence[Messages], keys: Key[Array, "B"], sampling: Sampling
    ) -> tuple[list[str], np.ndarray]:
        ids = [np.array(encode_prompt(model.tokenizer, messages), np.int32) for messages in conversations]
        examples = [PromptExample(row, "", {}, "") for row in ids]
        width = -(-max(map(len, ids)) // _COLUMNS) * _COLUMNS
        rollout = generate_fn(width)(model.params, examples, keys, sampling)
        return completion_texts(model.tokenizer, rollout), np.asarray(rollout.finished)

    def review(prompts: Sequence[PromptExample], number: int) -> list[Review]:
        rng = np.random.default_rng([seed, number])
        asked = [prompt_messages(Row(prompt.fields, prompt.where)) for prompt in prompts]
        keys = row_keys(key, len(prompts), first=number)

        def turn_keys(turn: int) -> Key[Array, "B"]:
            return jax.vmap(lambda one: jax.random.fold_in(one, turn))(keys)

        answers, finished = say(asked, turn_keys(0), sampling)
        latest, turns = answers, [() for _ in prompts]
        for place in range(rounds):
            drawn = [principles[index] for index in rng.integers(len(principles), size=len(prompts))]
            talks = [_then(*talk) for talk in zip(asked, latest, [p.critique for p in drawn], strict=True)]
            critiques, _ = say(talks, turn_keys(2 * place + 1), review_sampling)
            talks = [_then(*talk) for talk in zip(talks, critiques, [p.revision for p in drawn], strict=True)]
            latest, finished = say(talks, turn_keys(2 * place + 2), review_sampling)
            rows = zip(turns, drawn, critiques, latest, strict=True)
            turns = [(*before, Turn(p.name, critique, text)) for before, p, critique, text in rows]
        sides = zip(asked, answers, turns, finished.tolist(), strict=True)
        return [Review(*side) for side in sides]

    return review


def _then(messages: Messages, said: str, request: str) -> Messages:
    """The conversation with what the model said, and what it is asked next."""
    # An empty message is none to a chat template; a model that says nothing is shown to have said so.
    said = said if said.strip() else "..."
    return [*messages, {"role": "assistant", "content": said}, {"role": "user", "content": request}]
