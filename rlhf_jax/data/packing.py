"""Samples of different lengths as rectangular rows of tokens (NumPy in, NumPy out)."""

import dataclasses
import logging
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import jax
import numpy as np

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import Bool, Images, Int, Sequences, UInt8

_log = logging.getLogger(__name__)

Overlength: TypeAlias = Literal["error", "drop"]


@runtime_checkable
class Sample(Protocol):
    """Sample to be packed: token ids and a mask of equal length, and where the sample came from. It may have
    `images` [N, S, S, 3], too.
    """

    @property
    def ids(self) -> Sequence[int] | Int[np.ndarray, " T"]: ...  # noqa: D102
    @property
    def mask(self) -> Sequence[bool] | Bool[np.ndarray, " T"]: ...  # noqa: D102
    @property
    def where(self) -> str: ...  # noqa: D102


def pad_rows(samples: Sequence[Sample], length: int, *, overlength: Overlength = "error") -> Sequences:
    """One sample a row, padded on the right with token 0, segment 0.

    Args:
      samples: at least one, each of at most `length` tokens.
      length: tokens a row.
      overlength: "error" refuses a longer sample, "drop" leaves it out and logs how many there were.

    Returns:
      Sequences of NumPy arrays, [samples kept, length].

    Raises:
      UserError: an empty list, or a sample that is too long or empty, by its `where`.
    """
    kept = _fitting(samples, length, overlength)
    return _fill([[sample] for sample in kept], length)


def pack_rows(samples: Sequence[Sample], length: int, *, overlength: Overlength = "error") -> Sequences:
    """Several samples a row, each in its own segment with positions from 0 (first fit, in the order given).

    A sample goes into the first row that has room for it, so the same samples give the same rows. The
    number of rows depends on the lengths; `pad_batch` makes it constant.

    Args: as `pad_rows`.

    Returns:
      Sequences of NumPy arrays, [rows needed, length], with segments 1, 2, ... in each row.

    Raises:
      UserError: as `pad_rows`.
    """
    kept = _fitting(samples, length, overlength)
    return _fill(_first_fit(kept, length), length)


def completion_rows(
    prompts: Sequence[Sequence[int] | Int[np.ndarray, " T"]],
    completions: Sequence[Sequence[int] | Int[np.ndarray, " T"]],
    *,
    prompt_length: int,
    max_new_tokens: int,
    pad_id: int = 0,
) -> Sequences:
    """Rows as a rollout has them: prompts end in column `prompt_length`, completions begin there.

    Args:
      completions: one for each prompt, of at most `max_new_tokens` tokens; an empty one has no token that
        counts.

    Returns:
      Sequences of NumPy arrays, [B, prompt_length + max_new_tokens]; `mask` marks the completions.
    """
    ids, there = left_pad(prompts, prompt_length, pad_id=pad_id)
    tokens = np.pad(ids, [(0, 0), (0, max_new_tokens)], constant_values=pad_id)
    valid = np.pad(there, [(0, 0), (0, max_new_tokens)])
    for row, completion in enumerate(completions):
        own = slice(prompt_length, prompt_length + len(completion))
        tokens[row, own], valid[row, own] = completion, True
    positions = np.maximum(np.cumsum(valid, axis=1) - 1, 0).astype(np.int32)
    mask = valid & (np.arange(valid.shape[1]) >= prompt_length)
    return Sequences(tokens, positions, valid.astype(np.int32), mask)  # pyright: ignore[reportArgumentType]


def pad_batch(sequences: Sequences, rows: int) -> Sequences:
    """Adds empty rows until there are `rows` of them, so that every batch has one shape.

    Raises:
      UserError: there are more than `rows` already.
    """
    missing = rows - sequences.tokens.shape[0]
    if missing < 0:
        raise UserError(
            f"{sequences.tokens.shape[0]} packed rows do not fit a batch of {rows} rows; "
            "raise it or pack fewer samples"
        )
    return jax.tree.map(lambda x: np.pad(x, [(0, missing), *((0, 0),) * (x.ndim - 1)]), sequences)


def stack_images(
    rows: Sequence[Sequence[UInt8[np.ndarray, "N S S 3"] | None]],
    *,
    number: int | None = None,
    size: int | None = None,
) -> Images | None:
    """Images of rows, one after the other; None where a row has room for none.

    Args:
      rows: of each, those of its samples.
      number: of images that a row has room for; that of the row with most by default.
      size: their height and width; that of the first by default.
    """
    joined = [[image for some in row if some is not None for image in some] for row in rows]
    number = max(map(len, joined)) if number is None else number
    if not number:
        return None
    size = size or next(len(image) for row in joined for image in row)
    pixels = np.zeros((len(rows), number, size, size, 3), np.uint8)
    present = np.zeros((len(rows), number), np.bool_)
    for place, images in enumerate(joined):
        if len(images) > number:
            raise UserError(f"a row has {len(images)} images and there is room for {number}: raise it")
        if images:
            pixels[place, : len(images)], present[place, : len(images)] = np.stack(images), True
    return Images(pixels, present)  # pyright: ignore[reportArgumentType] (of NumPy, as the rows)


def concatenate_rows(parts: Sequence[Sequences]) -> Sequences:
    """Rows of several sources, which may have different numbers of images, or none."""
    held = [part.images.pixels for part in parts if part.images is not None]
    if held:
        room = {"number": max(pixels.shape[1] for pixels in held), "size": held[0].shape[-2]}
        images = [[_present(part.images, row) for row in range(len(part.tokens))] for part in parts]
        parts = [
            dataclasses.replace(part, images=stack_images([[one] for one in own], **room))
            for part, own in zip(parts, images, strict=True)
        ]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def _present(images: Images | None, row: int) -> Any:
    return None if images is None else images.pixels[row][images.present[row]]


def left_pad(
    prompts: Sequence[Sequence[int] | Int[np.ndarray, " T"]], length: int, *, pad_id: int = 0
) -> tuple[Int[np.ndarray, "B P"], Bool[np.ndarray, "B P"]]:
    """Prompts that all end in the last column, for generation.

    Args:
      prompts: token ids; at least one prompt, none empty.
      length: columns, P.
      pad_id: what stands before a shorter prompt.

    Returns:
      tokens int32, and a mask that is True where a prompt stands.

    Raises:
      UserError: no prompt, an empty one, or one longer than `length`.
    """
    if not len(prompts):
        raise UserError("there are no prompts to pad; give at least one")
    tokens = np.full((len(prompts), length), pad_id, np.int32)
    mask = np.zeros((len(prompts), length), np.bool_)
    for row, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= length:
            raise UserError(
                f"prompt {row} has {len(prompt)} tokens where 1 to {length} fit; "
                "shorten it or raise the prompt length"
            )
        tokens[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = True
    return tokens, mask


def length_bucket(length: int) -> int:
    """Columns for a prompt of `length` tokens: the next power of two from 16 on.

    Prompts of any lengths up to L then have 1 + log2(L / 16) shapes, and as many programs are compiled.
    """
    return max(16, 1 << (length - 1).bit_length())


def bucket_batches(lengths: Sequence[int], *, size: int) -> list[tuple[int, list[int]]]:
    """Prompts of like lengths together: (columns, places) of batches of exactly `size`.

    The last batch of a bucket repeats its last place to fill up.
    """
    order = sorted(range(len(lengths)), key=lambda place: lengths[place])
    found = []
    for columns in sorted(set(map(length_bucket, lengths))):
        places = [place for place in order if length_bucket(lengths[place]) == columns]
        for start in range(0, len(places), size):
            part = places[start : start + size]
            found.append((columns, part + part[-1:] * (size - len(part))))
    return found


def _fitting(samples: Sequence[Sample], length: int, overlength: Overlength) -> list[Sample]:
    if not len(samples):
        raise UserError("there are no samples to put into rows; give at least one")
    kept = []
    for sample in samples:
        if not len(sample.ids):
            raise UserError(f"{sample.where}: the sample has no tokens; remove it")
        if len(sample.ids) <= length:
            kept.append(sample)
        elif overlength == "error":
            raise UserError(
                f"{sample.where}: the sample has {len(sample.ids)} tokens and a row holds {length}; "
                "raise the length, shorten the sample or drop long samples"
            )
    dropped = len(samples) - len(kept)
    if not kept:
        raise UserError(f"all {dropped} samples are longer than {length} tokens; raise the length")
    if dropped:
        _log.warning("dropped %d of %d samples longer than %d tokens", dropped, len(samples), length)
    return kept


def _first_fit(samples: Iterable[Sample], length: int) -> list[list[Sample]]:
    rows: list[list[Sample]] = []
    room = np.zeros(64, np.int64)  # of each row; grows by doubling, so that a scan for room is one NumPy call
    for sample in samples:
        size = len(sample.ids)
        fits = room[: len(rows)] >= size
        row = int(np.argmax(fits)) if fits.any() else len(rows)
        if row == len(rows):
            rows.append([])
            if row == len(room):
                room = np.concatenate([room, np.zeros_like(room)])
            room[row] = length
        rows[row].append(sample)
        room[row] -= size
    return rows


def _fill(rows: Sequence[Sequence[Sample]], length: int) -> Sequences:
    shape = (len(rows), length)
    tokens, positions, segment_ids = (np.zeros(shape, np.int32) for _ in range(3))
    mask = np.zeros(shape, np.bool_)
    for row, samples in enumerate(rows):
        start = 0
        for segment, sample in enumerate(samples, start=1):
            end = start + len(sample.ids)
            tokens[row, start:end] = sample.ids
            mask[row, start:end] = sample.mask
            positions[row, start:end] = np.arange(end - start)
            segment_ids[row, start:end] = segment
            start = end
    arrays: Any = (tokens, positions, segment_ids, mask)  # of NumPy: they go to the devices with their batch
    images = stack_images([[getattr(sample, "images", None) for sample in row] for row in rows])
    return Sequences(*arrays, images=images)
