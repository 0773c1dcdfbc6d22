"""Kernels in the blocks in which a GGUF file has them, for adapters on a base that is never rounded again.

A block is 32 values of a row of a matrix [out, in], that is of a column of ours, [in, out]. With the scale d
and the least value m of a block, both float16, and integers q its values are d q in `Q8_0`, d (q - 8) in
`Q4_0` and d q + m in `Q4_1`, where q has 4 bits in the latter two (the formats of llama.cpp).
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import Array, Params
from rlhf_jax.models.adapters.trees import map_linears
from rlhf_jax.models.gguf import GgufFile, whole_gguf

BLOCK = 32


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A matrix [out, in] in blocks along its rows.

    Attributes:
      values: [out, in] integers, of 8 bits or of 4 with a sign.
      scale: [out, in / 32], float32.
      offset: [out, in / 32] what is added to a block; None for nothing.
    """

    values: np.ndarray
    scale: np.ndarray
    offset: np.ndarray | None


def blocks_of(kind: str, stored: np.ndarray) -> Blocks | None:
    """A tensor of a GGUF file, [out, bytes of a row]; None where it is of another kind.

    Args:
      kind: `Q8_0`, `Q4_0` or `Q4_1`.
    """
    numbers = {"Q8_0": 1, "Q4_0": 1, "Q4_1": 2}.get(kind)
    if numbers is None:
        return None
    each = 2 * numbers + (BLOCK if kind == "Q8_0" else BLOCK // 2)
    parts = np.ascontiguousarray(stored).reshape(len(stored), -1, each)
    heads = parts[..., : 2 * numbers].copy().view("<f2").astype(np.float32)
    scale, integers = heads[..., 0], parts[..., 2 * numbers :]
    if kind == "Q8_0":
        return Blocks(integers.view(np.int8).reshape(len(stored), -1), scale, None)
    # The first half of a block has the lower four bits of its bytes, the second half the higher.
    nibbles = np.concatenate([integers & 15, integers >> 4], axis=-1).astype(np.int8) - 8
    values = nibbles.astype(jnp.int4).reshape(len(stored), -1)
    return Blocks(values, scale, heads[..., 1] + 8 * scale if kind == "Q4_1" else None)


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
            f"{path}: no kernel is in Q8_0, Q4_0 or Q4_1: give a file in one of these, or quantize nf4"
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
        unpacked = {
            f"kernel_{name}": rule.layout.unpack(array)
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
