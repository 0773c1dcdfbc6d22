"""Kernels in the blocks in which a GGUF file has them, for adapters on a base that is never rounded again.

A block is 32 values (16 in `Q6_K`) of a row of a matrix [out, in], that is of a column of ours, [in, out].
With its scale d, its least value m and integers q, its values are d q or d q + m (the formats of llama.cpp;
in those of K, d and m are products of a number of 6 or 8 bits and one that eight or sixteen blocks share).
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import Array, Params
from rlhf_jax.models.adapters.trees import map_linears
from rlhf_jax.models.gguf import GgufFile, stored_transposed, whole_gguf

Numbers = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]]
"""[n, bytes] -> ([n, blocks] scales, least values or None)."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A matrix [out, in] in blocks along its rows.

    Attributes:
      values: [out, in] integers, of 8 bits or of 4 with a sign.
      scale: [out, blocks of a row], float32.
      offset: [out, blocks of a row] what is added to a block; None for nothing.
    """

    values: np.ndarray
    scale: np.ndarray
    offset: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Format:
    """Layout of the numbers in a kind of blocks.

    Attributes:
      place: of the first byte of its scales.
      ones: bytes there that make every scale 1 and every least value 0: what is left are the integers.
      numbers: reads scales and least values.
      bits: of an integer as it is kept here.
    """

    place: int
    ones: bytes
    numbers: Numbers
    bits: int


def _half(blocks: np.ndarray, place: int) -> np.ndarray:
    return blocks[:, place : place + 2].copy().view("<f2").astype(np.float32)


def _scale_alone(blocks: np.ndarray) -> tuple[np.ndarray, None]:
    return _half(blocks, 0), None


def _scale_and_least(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return _half(blocks, 0), _half(blocks, 2)


def _eight_of_six_bits(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from gguf import quants

    scales, least = quants.Q4_K.get_scale_min(blocks[:, 4:16])
    return _half(blocks, 0) * scales, -_half(blocks, 2) * least


def _sixteen_of_eight_bits(blocks: np.ndarray) -> tuple[np.ndarray, None]:
    return _half(blocks, 208) * blocks[:, 192:208].view(np.int8), None


_ONE, _NONE = np.float16(1).tobytes(), bytes(2)
_ONES_OF_K = _ONE + _NONE + bytes([1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1])
FORMATS = {
    "Q8_0": Format(0, _ONE, _scale_alone, 8),
    "Q4_0": Format(0, _ONE, _scale_alone, 4),
    "Q4_1": Format(0, _ONE + _NONE, _scale_and_least, 4),
    "Q5_0": Format(0, _ONE, _scale_alone, 8),
    "Q5_1": Format(0, _ONE + _NONE, _scale_and_least, 8),
    "Q4_K": Format(0, _ONES_OF_K, _eight_of_six_bits, 4),
    "Q5_K": Format(0, _ONES_OF_K, _eight_of_six_bits, 8),
    "Q6_K": Format(192, bytes(16 * [1]) + _ONE, _sixteen_of_eight_bits, 8),
}


def blocks_of(kind: str, stored: np.ndarray) -> Blocks | None:
    """A tensor of a GGUF file, [out, bytes of a row]; None where it is of a kind that `FORMATS` lacks."""
    form = FORMATS.get(kind)
    if form is None:
        return None
    import gguf

    of_kind = gguf.GGMLQuantizationType[kind]
    _, size = gguf.GGML_QUANT_SIZES[of_kind]
    rows = len(stored)
    parts = np.array(stored).reshape(-1, size)
    scale, least = form.numbers(parts)
    scale, offset = scale.reshape(rows, -1), None if least is None else least.reshape(rows, -1)
    parts[:, form.place : form.place + len(form.ones)] = np.frombuffer(form.ones, np.uint8)
    values = gguf.dequantize(parts, of_kind).reshape(rows, -1).astype(np.int8)
    if form.bits == 8:
        return Blocks(values, scale, offset)
    if offset is None:
        return Blocks(values.astype(jnp.int4), scale, None)
    return Blocks((values - 8).astype(jnp.int4), scale, offset + 8 * scale)


def keep_blocks(params: Params, path: Path) -> Params:
    """The parameters of a decoder that was read from a GGUF file, with its kernels in the blocks of the file.

    Kernels of other kinds stay as they are, and so do stacked ones whose layers are of several kinds.

    Args:
      params: plain, layers stacked or not.
      path: of the file.

    Raises:
      UserError: it is no GGUF file, or none of its kernels is in such blocks.
    """
    if not path.is_file():
        raise UserError(f"{path}: no GGUF file, whose blocks could be kept: give one as the model, or nf4")
    with whole_gguf(path):
        held = _held(GgufFile(path))
    if not held:
        raise UserError(
            f"{path}: no kernel is in {', '.join(FORMATS)}: give a file in one of these, or quantize nf4"
        )

    def change(name: str, leaves: Params) -> Params:
        group, _, rest = name.partition("/")
        if group != "layers":
            found = held.get(name)
        else:
            layers = [held.get(f"layer_{index}/{rest}") for index in range(len(leaves["kernel"]))]
            found = _stacked(layers)
        if found is None:
            return leaves
        return {**{key: leaf for key, leaf in leaves.items() if key != "kernel"}, **found}

    return map_linears(change, params)


def _held(file: GgufFile) -> dict[str, dict[str, Array]]:
    """Leaves in the place of a kernel, by the path of its layer in an unrolled decoder."""
    found: dict[str, dict[str, Array]] = {}
    for rule in file.family.tensors(file.config()):
        if rule.slot is not None or not all(param.endswith("/kernel") for param in rule.params):
            continue
        blocks = blocks_of(*file.stored(rule.name))
        if blocks is None:
            continue
        # Layouts move whole rows and transpose, so that they do the same to values and to scales.
        transposed = stored_transposed(file.architecture, rule.name)
        unpacked = {
            f"kernel_{name}": rule.layout.unpack(array.T if transposed else array)
            for name, array in dataclasses.asdict(blocks).items()
            if array is not None
        }
        for index, param in enumerate(rule.params):
            found[param.removesuffix("/kernel")] = {k: jnp.asarray(v[index]) for k, v in unpacked.items()}
    return found


def _stacked(layers: list[dict[str, Array] | None]) -> dict[str, Array] | None:
    whole = [layer for layer in layers if layer is not None]
    kinds = {tuple((name, leaf.dtype) for name, leaf in layer.items()) for layer in whole}
    if len(whole) < len(layers) or len(kinds) > 1:
        return None
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *whole)
