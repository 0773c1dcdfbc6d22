"""Array types and the few batch structures that every floor shares.

One alignment holds everywhere: an entry at [b, t] of `logp`, `mask`, `advantages`, `rewards` or
`values` belongs to the token at [b, t]. `logp[b, t]` is the log-probability of `tokens[b, t]` given
the tokens before it, `values[b, t]` the value of the state in which that token was chosen, and
`mask[b, t]` says whether that token counts. The shift by one happens in one place only, where a model
is scored.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from rlhf_jax.core.trees import pytree_dataclass

Scalar: TypeAlias = float | int | Float[Array, ""]
Metrics: TypeAlias = dict[str, jax.Array]
Params: TypeAlias = Any

__all__ = [
    "Array",
    "Bool",
    "Float",
    "Int",
    "Metrics",
    "PRNGKeyArray",
    "Params",
    "Rollout",
    "Scalar",
    "Score",
    "ScoreFn",
    "Sequences",
    "ToolFn",
]


@pytree_dataclass
class Sequences:
    """Rows of tokens, padded on either side or packed, and which of them count.

    Attributes:
      tokens: ids; anything valid where `segment_ids` is 0.
      positions: 0, 1, ... within each segment.
      segment_ids: 0 for padding, 1, 2, ... for the samples packed in a row; attention stays within one.
      mask: tokens that count (responses, actions); False for prompts, padding and tool outputs.
    """

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    mask: Bool[Array, "B T"]


@pytree_dataclass
class Rollout:
    """Sampled completions. Prompts stand left-padded in the first P columns.

    Attributes:
      sequences: prompts and completions; `mask` marks sampled tokens, the end-of-sequence token included.
      logp: log-probability in nats of each sampled token at the sampling temperature, full support.
      finished: whether the row ended by itself, with an end-of-sequence token or a stop string (False: cut at
        the length limit).
      filtered_logp: log-probability of each sampled token in the distribution that it was drawn from, after
        penalties, filters and constraints; None where the sampler does not say.
    """

    sequences: Sequences
    logp: Float[Array, "B T"]
    finished: Bool[Array, "B"]
    filtered_logp: Float[Array, "B T"] | None = None


@pytree_dataclass
class Score:
    """What a model says of given actions, [B, T] each; 0 where there is nothing to say.

    Attributes:
      logp: log-probability of the action taken, in nats.
      entropy: entropy of the distribution it was taken from, in nats.
      value: value of the state it was taken in (zeros where the model has no value head).
    """

    logp: Float[Array, "B T"]
    entropy: Float[Array, "B T"]
    value: Float[Array, "B T"]


ScoreFn: TypeAlias = Callable[[Params, Any], Score]
ToolFn: TypeAlias = Callable[[Int[Array, "B T"], Int[Array, " B"]], Int[Array, "B R"]]
"""(completions, their lengths) -> what a tool writes behind them, -1 beyond its end; pure and traceable."""
