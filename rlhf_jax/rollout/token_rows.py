"""Rows for people of single tokens: what each of them added to a completion, and what is known of it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from rlhf_jax import distributed
from rlhf_jax.core.types import Bool, Float, Int, Rollout
from rlhf_jax.data.token_alignment import token_texts
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.metrics.completions import TOKEN


def token_columns(
    tokenizer: Tokenizer,
    tokens: Int[np.ndarray, " T"],
    mask: Bool[np.ndarray, " T"],
    numbers: Mapping[str, Float[np.ndarray, " T"]],
) -> dict[str, list[Any]]:
    """The columns `token/NAME` of one completion, each with an entry for every token of it.

    Args:
      mask: which tokens are the completion's.
      numbers: of the tokens, by name.

    Returns:
      `token/text`, what each token adds to the text, and the numbers; None for one that is not finite.
    """
    found = {f"{TOKEN}{name}": [number(x) for x in np.asarray(row)[mask]] for name, row in numbers.items()}
    return {f"{TOKEN}text": token_texts(tokenizer, tokens[mask].tolist()), **found}


def describe_completions(
    tokenizer: Tokenizer, rollout: Rollout, log_ratio: Float[np.ndarray, "B T"] | None, count: int
) -> list[dict[str, Any]]:
    """Columns of the first completions of every process: `logp` and `kl`, in nats, and `token/...` of each.

    Args:
      log_ratio: of the tokens to the reference; None where there is none.
    """
    sequences = rollout.sequences
    tokens, mask, logp = map(distributed.all_values, (sequences.tokens, sequences.mask, rollout.logp))
    numbers = {"logp": logp} | ({} if log_ratio is None else {"kl": log_ratio})
    found = []
    for row in range(count):
        of_row = {name: values[row] for name, values in numbers.items()}
        whole = {name: number(values[mask[row]].sum()) for name, values in of_row.items()}
        found.append(whole | token_columns(tokenizer, tokens[row], mask[row], of_row))
    return found


def number(value: Any) -> float | None:
    """A number as a row of a table holds it; None for one that is not finite."""
    return float(value) if np.isfinite(value) else None
