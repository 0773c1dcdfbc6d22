"""Protocols of a model, as everything above `models/` sees it: a few typed callables.

All of them take parameters first, so that one program serves any number of them. None holds a mesh, a key or
a description of the architecture. `models.Policy` keeps them together; `models.wrap` makes them from any
decoder.

**Rows.** `positions` count 0, 1, ... within a sample. `segment_ids` are 0 for padding and 1, 2, ... for the
samples of a row; a token sees the tokens of its own segment that are not behind it.

**Columns and the cache.** A cache is any pytree whose leaves have one axis of rows (or none): samplers find
that axis by comparing shapes, and take, repeat and replace rows along it. It has room for a number of columns
that `PrefillFn` is told as `length`, those of the prompt included. Column c of the cache holds the token of
column c of the row, so in a left-padded prompt of P columns the first new token stands in column P of every
row, whatever its position. `DecodeFn` writes the next column, the same in all rows; `ExtendFn` is told a
column for each row and may write over what stands there.

**Images.** `HiddenFn`, `LogitsFn` and `PrefillFn` of a model that reads images take them as the keyword
`images` (`core.types.Images`), which nobody gives where rows have none: a model of text alone need not know
it.
"""

from typing import Any, Protocol, runtime_checkable

from rlhf_jax.core.types import Array, Float, Int, Params, Scalar, Sequences, TokenLogprobs

Cache = Any
"""Whatever a model remembers of the columns it has read."""


@runtime_checkable
class LogprobFn(Protocol):
    """Log-probs, entropies and values of the actions of a batch."""

    def __call__(self, params: Params, sequences: Any, /) -> TokenLogprobs:
        """Entry [b, t] belongs to the token at [b, t]; `sequences` is what the update's batches are made of:
        `Sequences` for language, observations and actions for other environments.
        """
        ...


@runtime_checkable
class LogitsFn(Protocol):
    """Logits after every token of whole rows."""

    def __call__(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        /,
    ) -> Float[Array, "B T V"]:
        """Entry [b, t] predicts the token at [b, t + 1]; meaningless at padding."""
        ...


@runtime_checkable
class HiddenFn(Protocol):
    """Final hidden states of whole rows, on which scalar heads stand."""

    def __call__(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        /,
    ) -> Float[Array, "B T D"]:
        """Entry [b, t] is the state after the token at [b, t] was read."""
        ...


@runtime_checkable
class RewardFn(Protocol):
    """A learned reward of whole rows."""

    def __call__(self, params: Params, sequences: Sequences, /) -> Float[Array, "B"]:
        """One number a row."""
        ...


@runtime_checkable
class ValueFn(Protocol):
    """A number for every token of whole rows: values, or rewards of a process."""

    def __call__(self, params: Params, sequences: Sequences, /) -> Float[Array, "B T"]:
        """Entry [b, t] belongs to the token at [b, t]."""
        ...


@runtime_checkable
class DistributionFn(Protocol):
    """Log-probs of all tokens at each place."""

    def __call__(self, params: Params, sequences: Sequences, /) -> Float[Array, "B T V"]:
        """Entry [b, t] is the distribution that the token at [b, t] is from; column 0 is uniform."""
        ...


@runtime_checkable
class TopKFn(Protocol):
    """The K likeliest tokens at each place."""

    def __call__(
        self, params: Params, sequences: Sequences, temperature: Scalar = ..., /
    ) -> tuple[Float[Array, "B T K"], Int[Array, "B T K"]]:
        """(log-probs over the whole softmax in nats, ids), the likeliest first."""
        ...


@runtime_checkable
class CandidateFn(Protocol):
    """Log-probs of given tokens at each place."""

    def __call__(
        self,
        params: Params,
        sequences: Sequences,
        token_ids: Int[Array, "B T K"],
        temperature: Scalar = ...,
        /,
    ) -> tuple[Float[Array, "B T K"], Float[Array, "B T"]]:
        """(log-probs of `token_ids` at the temperature, of the tokens that stand there at 1), in nats."""
        ...


@runtime_checkable
class GreedyMatchFn(Protocol):
    """Log-probs of the tokens of a batch, and whether greedy decoding would have said each of them."""

    def __call__(self, params: Params, sequences: Sequences, /) -> tuple[Float[Array, "B T"], Any]:
        """(logp in nats, bool), [B, T] each."""
        ...


@runtime_checkable
class PrefillFn(Protocol):
    """Reads whole prompts."""

    def __call__(
        self,
        params: Params,
        tokens: Int[Array, "B P"],
        positions: Int[Array, "B P"],
        segment_ids: Int[Array, "B P"],
        length: int,
        /,
    ) -> tuple[Float[Array, "B V"], Cache]:
        """(logits after the last column, cache with the P columns in it).

        Args:
          tokens: left-padded, so that the last column of every row is a token.
          length: columns that the cache must have room for, P included; static.
        """
        ...


@runtime_checkable
class DecodeFn(Protocol):
    """Reads one token a row, in the column behind those read before."""

    def __call__(
        self, params: Params, cache: Cache, token: Int[Array, "B"], position: Int[Array, "B"], /
    ) -> tuple[Float[Array, "B V"], Cache]:
        """(logits after it, cache with it)."""
        ...


@runtime_checkable
class ExtendFn(Protocol):
    """Reads several tokens a row behind the first `columns` columns of the cache, which differ by row.

    Whatever stands behind those columns is not seen, and is written over. So nothing need be undone when
    tokens turn out wrong, as in speculative decoding, or when a row is given to another prompt, as in
    continuous batching.
    """

    def __call__(
        self,
        params: Params,
        cache: Cache,
        tokens: Int[Array, "B n"],
        positions: Int[Array, "B n"],
        columns: Int[Array, "B"],
        /,
    ) -> tuple[Float[Array, "B n V"], Cache]:
        """(logits after each of them, cache with them)."""
        ...


@runtime_checkable
class HiddenPrefillFn(Protocol):
    """`PrefillFn` that also gives the final hidden states."""

    def __call__(
        self,
        params: Params,
        tokens: Int[Array, "B P"],
        positions: Int[Array, "B P"],
        segment_ids: Int[Array, "B P"],
        length: int,
        /,
    ) -> tuple[Float[Array, "B V"], Float[Array, "B P D"], Cache]:
        """(logits after the last column, hidden states of all, cache)."""
        ...


@runtime_checkable
class HiddenExtendFn(Protocol):
    """`ExtendFn` that also gives the final hidden states."""

    def __call__(
        self,
        params: Params,
        cache: Cache,
        tokens: Int[Array, "B n"],
        positions: Int[Array, "B n"],
        columns: Int[Array, "B"],
        /,
    ) -> tuple[Float[Array, "B n V"], Float[Array, "B n D"], Cache]:
        """(logits, hidden states, cache)."""
        ...
