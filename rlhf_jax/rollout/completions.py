"""The completions of the last step, as rows for people: what was asked, written, and what it was worth."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rlhf_jax import distributed
from rlhf_jax.core.masks import masked_mean, masked_sum
from rlhf_jax.core.types import Array, Bool, Float, Rollout
from rlhf_jax.data.examples import PromptExample
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.rewards.functions import Scored
from rlhf_jax.rollout.sampler import completion_texts

PER_ROW = "completions/"
"""Before the names of those metrics of a training step that hold a number for each completion."""
_OF_PROMPTS = ("prompt", "messages", "question")
"""Fields that are the prompt itself."""


def describe_rows(
    advantages: Float[Array, "B *T"],
    old_logp: Float[Array, "B T"],
    ref_logp: Float[Array, "B T"] | None,
    mask: Bool[Array, "B T"],
) -> dict[str, Float[Array, " B"]]:
    """Metrics of each completion: its advantage (the mean over its tokens), its log-probability under the
    policy that is updated, and its log-ratio to the reference, k1, whose mean is the KL divergence; in nats.
    """
    if advantages.ndim == 2:
        advantages = masked_mean(advantages, mask, axis=1)
    found = {"advantage": advantages, "logp": masked_sum(old_logp, mask, axis=1)}
    if ref_logp is not None:
        found["kl"] = masked_sum(old_logp - ref_logp, mask, axis=1)
    return {f"{PER_ROW}{name}": values for name, values in found.items()}


class LastCompletions:
    """Keeps what the policy wrote in the last step, and describes it where that is asked for.

    Args:
      tokenizer: reads completions.
      texts_fn: (tokenizer, rollout) -> the completions of this process.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        texts_fn: Callable[[Tokenizer, Rollout], Sequence[str]] = completion_texts,
    ) -> None:
        self._tokenizer, self._texts_fn = tokenizer, texts_fn
        self._kept: tuple[Any, ...] | None = None

    def keep(
        self,
        prompts: Sequence[PromptExample],
        rollout: Rollout,
        scored: Scored,
        metrics: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Keeps a step, and returns its metrics without the numbers of rows; nothing leaves the device."""
        per_row = {name: values for name, values in metrics.items() if name.startswith(PER_ROW)}
        self._kept = prompts, rollout, scored, per_row
        return {name: value for name, value in metrics.items() if name not in per_row}

    def __call__(self) -> list[dict[str, Any]]:
        """The rows of the step that was kept last, those of this process."""
        if self._kept is None:
            return []
        prompts, rollout, scored, per_row = self._kept
        lengths = np.sum(distributed.local_values(rollout.sequences.mask), axis=1)
        local = {name: distributed.local_values(values) for name, values in per_row.items()}
        # Where they are whole in every process, nothing says which rows are this one's.
        numbers = {name.removeprefix(PER_ROW): x for name, x in local.items() if len(x) == len(prompts)}
        rewards = scored.rewards
        if isinstance(rewards, jax.Array):  # of a reward model that runs beside the policy
            rewards = distributed.local_values(rewards)
        terms = scored.terms if len(scored.terms) > 1 else {}
        found = []
        for row, completion in enumerate(self._texts_fn(self._tokenizer, rollout)):
            failed = bool(scored.unscorable[row])
            found.append(
                {
                    "prompt": prompts[row].text,
                    "completion": completion,
                    "reward": None if failed else float(rewards[row]),
                    **{f"reward/{name}": _number(values[row]) for name, values in terms.items()},
                    "length": int(lengths[row]),
                    **{name: _number(values[row]) for name, values in numbers.items()},
                    **{k: v for k, v in prompts[row].fields.items() if k not in _OF_PROMPTS},
                }
            )
        return found


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
