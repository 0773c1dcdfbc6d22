"""Answers to a few prompts, kept for people to read."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rlhf_jax import distributed
from rlhf_jax.core.types import Params, Rollout
from rlhf_jax.data.examples import PromptExample
from rlhf_jax.generation import Sampling
from rlhf_jax.models import Policy
from rlhf_jax.rollout.sampler import RolloutFns, answer_all, most_images, single_turn
from rlhf_jax.rollout.token_rows import describe_completions


@dataclasses.dataclass(frozen=True)
class Sample:
    """A prompt and the most likely answer to it.

    Attributes:
      prompt: the user's last message.
      answer: the field `answer` of its row; None where there is none.
      text: what the policy says.
      reward: what that is worth; NaN where nothing says so.
      numbers: `logp` and `kl`, its log-probability and its log-ratio to the reference, and those of each
        token, as of `describe_completions`.
    """

    prompt: str
    answer: Any
    text: str
    reward: float
    numbers: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def completion(self) -> dict[str, Any]:
        """As `samples.json` has it; right or wrong only where the reward is a verdict, 1 or 0."""
        if math.isnan(self.reward):
            return {"text": self.text, **self.numbers}
        verdict = {"correct": self.reward == 1} if self.reward in (0, 1) else {}
        return {"text": self.text, "reward": self.reward, **verdict, **self.numbers}


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
      policy: whose parameters are the reference.
      rollout_fns: how they are answered; None for by one completion each.
    """
    if not prompts:
        return lambda _: []
    fns = rollout_fns or single_turn(policy, max_new_tokens=max_new_tokens)
    logprob_fn = policy.make_logprob_fn()
    ref_logp_fn = jax.jit(lambda params, sequences: logprob_fn(params, sequences).logp)
    longest = max(len(prompt.ids) for prompt in prompts)
    decode = fns.make_generate_fn(longest, Sampling(), most_images(prompts))

    def answer(params: Params) -> list[Sample]:
        rollout, rewards = answer_all(decode, reward_fn, params, prompts, Sampling(temperature=0.0))
        texts = fns.shown_texts_fn(policy.tokenizer, rollout)[: len(prompts)]
        log_ratio = None
        if params is not policy.params:  # the reference itself has none
            log_ratio = distributed.all_values(rollout.logp - ref_logp_fn(policy.params, rollout.sequences))
        numbers = describe_completions(policy.tokenizer, rollout, log_ratio, len(prompts))
        found = zip(prompts, texts, rewards, numbers, strict=True)
        return [Sample(p.text, p.fields.get("answer"), text, float(r), x) for p, text, r, x in found]

    return answer
