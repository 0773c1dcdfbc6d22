"""Answers scored several a row, without their padding: the same log-probs, and the same gradient, from fewer
columns.

A step lays out its batch on the host, where lengths are known (`lay_out`), and takes `packed(logprob_fn,
layouts)` in the place of `logprob_fn`: losses and advantages see rows as they were sampled.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import distributed
from rlhf_jax.core.axes import constrain
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.protocols import LogprobFn
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Int, Params, Sequences, TokenLogprobs

_COLUMNS = 16
_SHARE = 8  # lengths and numbers of packed rows are multiples of an eighth: few shapes, few programs
_MOST_TIMES = 4  # as long as the longest sample: attention grows with the length of rows


@pytree_dataclass
class Layout:
    """Places in R packed rows of the B samples of a batch, which are counted from the longest on.

    It serves every batch of B samples of which the longest is no longer than the longest here, the second no
    longer than the second, and so on.

    Attributes:
      sample: the one that a place belongs to; -1 for none.
      token: which of its tokens has the place.
      segment: 1, 2, ... within a row; 0 for none.
      row: of each sample.
      start: the column of its first token.
      room: how many tokens it may have.
    """

    sample: Int[Array, "R L"]
    token: Int[Array, "R L"]
    segment: Int[Array, "R L"]
    row: Int[Array, " B"]
    start: Int[Array, " B"]
    room: Int[Array, " B"]


def lay_out(lengths: Int[np.ndarray, " B"], *, most: int, multiple_of: int = 1) -> Layout:
    """The longest first, each into the first row that has room (first fit decreasing), in rows that are up to
    four times as long as the longest sample, whichever make the fewest columns.

    Args:
      lengths: tokens of each sample, at least one of them; NumPy.
      most: columns of the rows as they are.
      multiple_of: the number of rows is one, so that a mesh can split them.
    """
    room = np.sort(np.maximum(np.asarray(lengths), 1))[::-1].astype(np.int32)
    longest = min(_round_up(int(room[0]), _COLUMNS * max(1, most // (_SHARE * _COLUMNS))), most)
    found = []
    for times in range(1, _MOST_TIMES + 1):
        row, start = _first_fit_decreasing(room, times * longest)
        share = multiple_of * max(1, len(room) // (_SHARE * multiple_of * times))
        shape = _round_up(int(row.max()) + 1, share), times * longest
        found.append((shape[0] * shape[1], shape, row, start))
    _, shape, row, start = min(found, key=lambda one: one[0])  # of equals the one of shorter rows
    sample, token, segment = (
        np.full(shape, -1, np.int32),
        np.zeros(shape, np.int32),
        np.zeros(shape, np.int32),
    )
    held = np.zeros(shape[0], np.int32)
    for number, length in enumerate(room):
        place = row[number], slice(start[number], start[number] + length)
        held[row[number]] += 1
        sample[place], token[place], segment[place] = number, np.arange(length), held[row[number]]
    arrays: Any = sample, token, segment, row, start, room
    return Layout(*arrays)


def _first_fit_decreasing(room: Int[np.ndarray, " B"], columns: int) -> tuple[np.ndarray, np.ndarray]:
    """(row, first column) of each sample, each in the first row that has room."""
    row, start = np.zeros_like(room), np.zeros_like(room)
    used: list[int] = []
    for number, length in enumerate(room):
        chosen = next((place for place, taken in enumerate(used) if taken + length <= columns), len(used))
        if chosen == len(used):
            used.append(0)
        row[number], start[number] = chosen, used[chosen]
        used[chosen] += int(length)
    return row, start


def layouts_of(
    lengths: Int[np.ndarray, " B"], sizes: Sequence[int], *, most: int, multiple_of: int = 1
) -> tuple[Layout, ...]:
    """A layout for all samples, and one for any so many of them, in each of the sizes.

    Args: as `lay_out`; `sizes` of parts of the batch, such as mini-batches.
    """
    longest = np.sort(np.asarray(lengths))[::-1]
    wanted = dict.fromkeys([len(lengths), *sizes])
    return tuple(lay_out(longest[:size], most=most, multiple_of=multiple_of) for size in wanted)


def layouts_of_batch(rows: Sequence[Sequences], sizes: Sequence[int]) -> tuple[Layout, ...]:
    """`layouts_of` the rows of all processes, for the mesh that is entered; all processes ask together.

    Args:
      rows: on the mesh; several, of as many columns, are one batch.
    """
    lengths = [distributed.all_values(jnp.sum(part.segment_ids > 0, axis=1)) for part in rows]
    parts = distributed.shards_of_batch(distributed.current_mesh())
    most = rows[0].tokens.shape[1]
    return layouts_of(np.concatenate(lengths), sizes, most=most, multiple_of=parts)


def columns_of(sequences: Sequences, layouts: Sequence[Layout]) -> int:
    """Columns that are computed to score these rows once."""
    packed_sizes = [layout.sample.size for layout in layouts if len(layout.row) == len(sequences.tokens)]
    return next(iter(packed_sizes), sequences.tokens.size)


def packed(logprob_fn: LogprobFn, layouts: Sequence[Layout]) -> LogprobFn:
    """`logprob_fn` that reads batches of these sizes packed; batches of other sizes as they are.

    Log-probs of the first token of a row, which nothing comes before, are 0; those of samples that have more
    tokens than the layout has room for are NaN.
    """
    of_size = {layout.row.shape[0]: layout for layout in layouts}

    def score(params: Params, sequences: Sequences) -> TokenLogprobs:
        layout = of_size.get(sequences.tokens.shape[0])
        if layout is None:
            return logprob_fn(params, sequences)
        places = _Places.of(layout, sequences)
        return places.unpack(logprob_fn(params, places.pack(sequences)))

    return score


@dataclasses.dataclass(frozen=True)
class _Places:
    """Where the tokens of a batch go, and where they came from."""

    layout: Layout
    source: tuple[Array, Array]  # row and column in the batch, [R, L] each
    taken: Array  # whether a token goes there, [R, L]
    target: tuple[Array, Array]  # row and column in the packed rows, [B, T] each
    fits: Array  # [B]
    follows: Array  # whether a token stands there that another comes before, [B, T]

    @classmethod
    def of(cls, layout: Layout, sequences: Sequences) -> "_Places":
        layout = jax.tree.map(jnp.asarray, layout)  # of NumPy where nothing is compiled
        there = sequences.segment_ids > 0
        lengths = jnp.sum(there, axis=1, dtype=jnp.int32)
        order = jnp.argsort(-lengths, stable=True)  # samples from the longest on
        number = jnp.argsort(order, stable=True)  # and which of these each row is
        columns = jnp.argsort(~there, axis=1, stable=True)  # of the tokens of a row, in their order
        rows = order[layout.sample]
        source = rows, columns[rows, layout.token]
        taken = (layout.sample >= 0) & (layout.token < lengths[rows])
        place = jnp.cumsum(there, axis=1) - 1
        column = jnp.clip(layout.start[number][:, None] + place, 0, layout.sample.shape[1] - 1)
        target = jnp.broadcast_to(layout.row[number][:, None], column.shape), column
        return cls(layout, source, taken, target, lengths <= layout.room[number], there & (place > 0))

    def pack(self, sequences: Sequences) -> Sequences:
        if sequences.images is not None:
            raise UserError("rows with images are not packed: leave packing out")

        moved = jax.tree.map(lambda x: constrain(x[self.source], "batch", *(None,) * (x.ndim - 1)), sequences)
        return dataclasses.replace(
            moved,
            positions=jnp.where(self.taken, moved.positions, 0),
            segment_ids=jnp.where(self.taken, self.layout.segment, 0),
            mask=moved.mask & self.taken,
        )

    def unpack(self, scored: TokenLogprobs) -> TokenLogprobs:
        def moved(x: Array) -> Array:
            if x.ndim < 2:
                raise UserError("this model's scores are not of tokens alone: leave packing out")
            there = self.follows.reshape(*self.follows.shape, *(1,) * (x.ndim - 2))
            fits = self.fits.reshape(-1, *(1,) * (x.ndim - 1))
            values = jnp.where(there, jnp.where(fits, x[self.target], jnp.nan), 0)
            return constrain(values.astype(x.dtype), "batch", *(None,) * (x.ndim - 1))

        if scored.mtp_logp is not None or scored.routing is not None:
            raise UserError("scores of whole batches are not of tokens: leave packing out")
        return jax.tree.map(moved, scored)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
