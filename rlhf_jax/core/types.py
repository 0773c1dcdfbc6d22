"""Array types and the few batch structures that every floor shares.

One alignment holds everywhere: an entry at [b, t] of `logp`, `mask`, `advantages`, `rewards` or
`values` belongs to the token at [b, t]. `logp[b, t]` is the log-probability of `tokens[b, t]` given
the tokens before it, `values[b, t]` the value of the state in which that token was chosen, and
`mask[b, t]` says whether that token counts. The shift by one happens in one place only, where a model
is scored.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, Key, PRNGKeyArray, Shaped, UInt, UInt8, UInt32

from rlhf_jax.core.trees import pytree_dataclass

# NumPy's arrays serve wherever JAX's do: batches still on the host, what was fetched, a user's own. Static
# checkers see JAX's alone, which have more (`.at`), so that host code says where it hands NumPy's on.
if TYPE_CHECKING:
    from jaxtyping import Array
else:
    Array = jax.Array | np.ndarray

Scalar: TypeAlias = float | int | Float[Array, ""] | Int[Array, ""]
Metrics: TypeAlias = dict[str, Array]
Params: TypeAlias = Any

__all__ = [
    "Array",
    "Bool",
    "Float",
    "Images",
    "Int",
    "Key",
    "Metrics",
    "PRNGKeyArray",
    "Params",
    "Rollout",
    "Routing",
    "Scalar",
    "Sequences",
    "Shaped",
    "StepRewards",
    "TokenLogprobs",
    "ToolFn",
    "UInt",
    "UInt8",
    "UInt32",
]


@pytree_dataclass
class Images:
    """Images of rows of tokens, in the order of their places among these.

    Attributes:
      pixels: 8-bit RGB, of one size; rows have as many as the one with most.
      present: which of them are there, the first of each row; the others are padding.
    """

    pixels: UInt8[Array, "B N H W 3"]
    present: Bool[Array, "B N"]


@pytree_dataclass
class Sequences:
    """Rows of tokens, padded on either side or packed, and which of them count.

    Attributes:
      tokens: ids; anything valid where `segment_ids` is 0.
      positions: 0, 1, ... within each segment.
      segment_ids: 0 for padding, 1, 2, ... for the samples packed in a row; attention stays within one.
      mask: tokens that count (responses, actions); False for prompts, padding and tool outputs.
      experts: those that each token goes through at each of R routers, -1 for the router's own choice; None
        where all choose for themselves.
      candidates: K tokens at each place whose log-probs are asked for, too; None for none.
      images: what the image tokens stand for; None where there are none.
    """

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    experts: Int[Array, "B T R k"] | None = None
    candidates: Int[Array, "B T K"] | None = None
    images: Images | None = None

    @property
    def image_inputs(self) -> dict[str, Images]:
        """Keyword arguments of a model's callables: `images`, where there are any."""
        return {} if self.images is None else {"images": self.images}


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
class StepRewards:
    """Process rewards: what each step of an answer is worth, where it ends.

    Attributes:
      rewards: of the step that ends in a token; anything elsewhere.
      ends: the last token of each step.
    """

    rewards: Float[Array, "B T"]
    ends: Bool[Array, "B T"]


@pytree_dataclass
class Routing:
    """Routing statistics, summed over tokens that are not padding; where layers are scanned, R of them each.

    Every field is a sum, so those of parts of a batch add up to those of the batch.

    Attributes:
      assignments: how often each expert was chosen; no gradient.
      probabilities: of each expert, before any choice; they sum to the number of tokens.
      squared_normaliser: log-sum-exp of the router's logits, squared.
      tokens: how many there were.
    """

    assignments: Float[Array, "*R E"]
    probabilities: Float[Array, "*R E"]
    squared_normaliser: Float[Array, "*R"]
    tokens: Float[Array, ""]


@pytree_dataclass
class TokenLogprobs:
    """Log-probability, entropy and value of given actions, [B, T] each; 0 where there is nothing to say.

    Attributes:
      logp: log-probability of the action taken, in nats.
      entropy: entropy of the distribution it was taken from, in nats.
      value: value of the state it was taken in (zeros where the model has no value head).
      mtp_logp: log-probability of the action as the module of each depth k = 1 ... D foresaw it k steps
        before; None where the model is not asked for it.
      routing: what the routers of each mixture did, by the path of their parameters; None likewise.
      collision: sum of the squared probabilities of all actions, without gradient; None likewise.
      candidate_logp: of `Sequences.candidates`, where there are any.
    """

    logp: Float[Array, "B T"]
    entropy: Float[Array, "B T"]
    value: Float[Array, "B T"]
    mtp_logp: Float[Array, "D B T"] | None = None
    routing: dict[str, "Routing"] | None = None
    collision: Float[Array, "B T"] | None = None
    candidate_logp: Float[Array, "B T K"] | None = None


ToolFn: TypeAlias = Callable[[Int[Array, "B T"], Int[Array, " B"]], Int[Array, "B R"]]
"""(completions, their lengths) -> what a tool writes behind them, -1 beyond its end; pure and traceable."""
