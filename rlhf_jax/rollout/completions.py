"""The completions of the last step, as rows for people: what was asked, written, and what it was worth."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import distributed
from rlhf_jax.core.masks import masked_mean, masked_sum
from rlhf_jax.core.types import Array, Bool, Float, Rollout
from rlhf_jax.data.examples import PromptExample
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.metrics.completions import TOKEN
from rlhf_jax.rewards.functions import Scored
from rlhf_jax.rollout.sampler import completion_texts
from rlhf_jax.rollout.token_rows import number, token_columns

PER_ROW = "completions/"
"""Before the names of those metrics of a training step that hold a number for each completion."""
_OF_PROMPTS = ("prompt", "messages", "question")
"""Fields that are the prompt itself."""
_MOST_WITH_TOKENS = 32
"""Rows of a table whose single tokens are described: as many as a report needs, of thousands."""


def describe_rows(
    advantages: Float[Array, "B *T"] | None,
    logp: Float[Array, "B T"],
    ref_logp: Float[Array, "B T"] | None,
    mask: Bool[Array, "B T"],
) -> dict[str, Float[Array, "B *T"]]:
    """Metrics of each completion and of each of its tokens: advantage (of a completion the mean over its
    tokens), log-probability, and log-ratio to the reference, k1, whose mean is the KL divergence; in nats.

    Args:
      advantages: of completions or of tokens; None for a method that has none.
      logp: under the policy that is updated, or that wrote.
      ref_logp: under the reference, or a teacher; None where there is none.
    """
    found = {"logp": masked_sum(logp, mask, axis=1)}
    of_tokens = {"logp": logp}
    if advantages is not None:
        by_token = advantages if advantages.ndim == 2 else jnp.broadcast_to(advantages[:, None], mask.shape)
        found["advantage"], of_tokens["advantage"] = masked_mean(by_token, mask, axis=1), by_token
    if ref_logp is not None:
        of_tokens["kl"] = logp - ref_logp
        found["kl"] = masked_sum(of_tokens["kl"], mask, axis=1)
    found |= {f"{TOKEN}{name}": values for name, values in of_tokens.items()}
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
        scored: Scored | None,
        metrics: Mapping[str, Any],
        *,
        opponents: Rollout | None = None,
        fields: Mapping[str, Sequence[Any]] = {},
        tokenizer: Tokenizer | None = None,
    ) -> dict[str, Any]:
        """Keeps a step, and returns its metrics without the numbers of rows; nothing leaves the device.

        Args:
          scored: what the completions are worth; None where nothing says so.
          opponents: the completions that they were compared with, the column `opponent`.
          fields: further columns.
          tokenizer: of who wrote, where that is not the policy.
        """
        per_row = {name: values for name, values in metrics.items() if name.startswith(PER_ROW)}
        self._kept = prompts, rollout, scored, per_row, opponents, fields, tokenizer or self._tokenizer
        return {name: value for name, value in metrics.items() if name not in per_row}

    def __call__(self) -> list[dict[str, Any]]:
        """The rows of the step that was kept last, those of this process."""
        if self._kept is None:
            return []
        prompts, rollout, scored, per_row, opponents, fields, tokenizer = self._kept
        tokens, mask = map(distributed.local_values, (rollout.sequences.tokens, rollout.sequences.mask))
        numbers, of_tokens = _local_numbers(per_row, len(prompts))
        worth = {} if scored is None else _worth(scored)
        others = {} if opponents is None else {"opponent": self._texts_fn(tokenizer, opponents)}
        shown = _ends(worth.get("reward", np.zeros(len(prompts))), _MOST_WITH_TOKENS) if of_tokens else ()
        found = []
        for row, completion in enumerate(self._texts_fn(tokenizer, rollout)):
            of_row = {name: values[row] for name, values in of_tokens.items()} if row in shown else {}
            found.append(
                {
                    "prompt": prompts[row].text,
                    "completion": completion,
                    **{name: number(values[row]) for name, values in worth.items()},
                    "length": int(mask[row].sum()),
                    **{name: number(values[row]) for name, values in numbers.items()},
                    **{name: values[row] for name, values in {**others, **fields}.items()},
                    **{k: v for k, v in prompts[row].fields.items() if k not in _OF_PROMPTS},
                    **(token_columns(tokenizer, tokens[row], mask[row], of_row) if of_row else {}),
                }
            )
        return found


def _local_numbers(per_row: Mapping[str, Any], count: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(numbers of completions, numbers of tokens) of this process."""
    local = {name.removeprefix(PER_ROW): distributed.local_values(x) for name, x in per_row.items()}
    # Where they are whole in every process, nothing says which rows are this one's.
    own = {name: values for name, values in local.items() if len(values) == count}
    of_tokens = {name.removeprefix(TOKEN): x for name, x in own.items() if name.startswith(TOKEN)}
    return {name: x for name, x in own.items() if not name.startswith(TOKEN)}, of_tokens


def _worth(scored: Scored) -> dict[str, np.ndarray]:
    """Columns of rewards; NaN where one could not be told."""
    rewards = scored.rewards
    if isinstance(rewards, jax.Array):  # of a reward model that runs beside the policy
        rewards = distributed.local_values(rewards)
    terms = scored.terms if len(scored.terms) > 1 else {}
    by_term = {f"reward/{name}": values for name, values in terms.items()}
    return {"reward": np.where(scored.unscorable, np.nan, rewards), **by_term}


def _ends(rewards: np.ndarray, most: int) -> set[int]:
    """Rows of the lowest and of the highest rewards, `most` in all."""
    order = np.argsort(rewards, kind="stable")  # NaN comes last
    order = order[: np.sum(np.isfinite(rewards))]
    return {*order[: most // 2].tolist(), *order[-(most // 2) :].tolist()}
