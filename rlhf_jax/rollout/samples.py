"""Answers to a few prompts, kept for people to read."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rlhf_jax.core.types import Params, Rollout
from rlhf_jax.data.examples import PromptExample
from rlhf_jax.generation import Sampling
from rlhf_jax.models import Policy
from rlhf_jax.rollout.sampler import RolloutFns, answer_all, single_turn


@dataclasses.dataclass(frozen=True)
class Sample:
    """A prompt and the most likely answer to it.

    Attributes:
      prompt: the user's last message.
      answer: the field `answer` of its row; None where there is none.
      text: what the policy says.
      reward: what that is worth; NaN where nothing says so.
    """

    prompt: str
    answer: Any
    text: str
    reward: float

    def completion(self) -> dict[str, Any]:
        """As `samples.json` has it; right or wrong only where the reward is a verdict, 1 or 0."""
        if math.isnan(self.reward):
            return {"text": self.text}
        verdict = {"correct": self.reward == 1} if self.reward in (0, 1) else {}
        return {"text": self.text, "reward": self.reward, **verdict}


def make_samples_fn(
    policy: Policy,
    prompts: Sequence[PromptExample],
    reward_fn: Callable[[Rollout, Sequence[PromptExample]], np.ndarray],
    *,
    max_new_tokens: int,
    rollout_fns: RolloutFns | None = None,
) -> Callable[[Params], list[Sample]]:
    """`answer(params) -> [Sample]`, one for each of a few prompts, without randomness.

    Args:
      rollout_fns: how they are answered; None for by one completion each.
    """
    if not prompts:
        return lambda _: []
    fns = rollout_fns or single_turn(policy, max_new_tokens=max_new_tokens)
    decode = fns.make_generate_fn(max(len(prompt.ids) for prompt in prompts), Sampling())

    def answer(params: Params) -> list[Sample]:
        rollout, rewards = answer_all(decode, reward_fn, params, prompts, Sampling(temperature=0.0))
        texts = fns.shown_texts_fn(policy.tokenizer, rollout)[: len(prompts)]
        found = zip(prompts, texts, rewards, strict=True)
        return [Sample(p.text, p.fields.get("answer"), text, float(reward)) for p, text, reward in found]

    return answer
