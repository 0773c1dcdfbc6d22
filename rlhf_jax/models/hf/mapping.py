"""Weight map between parameters and a checkpoint's tensors: rules that read both ways."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from rlhf_jax.models.config import Block, ModelConfig
from rlhf_jax.models.hf.fields import Fields


@dataclasses.dataclass(frozen=True)
class Layout:
    """A tensor against the parameters in it.

    Attributes:
      unpack: tensor -> parameters; raises ValueError or IndexError where the shape cannot be.
      pack: parameters -> tensor, its inverse.
    """

    unpack: Callable[[np.ndarray], Sequence[np.ndarray]]
    pack: Callable[[Sequence[np.ndarray]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint.

    Attributes:
      name: its name there.
      params: the parameters it holds, by path.
      layout: how it holds them.
      slot: its place in the parameters' first axis, where they stack several tensors (experts).
    """

    name: str
    params: tuple[str, ...]
    layout: Layout
    slot: int | None = None


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of Hugging Face checkpoint.

    Attributes:
      architecture: as in `architectures` of config.json.
      model_type: as in `model_type`.
      read: config.json -> config.
      write: config -> the fields of config.json; `InexpressibleError` where the family has no such part.
      tensors: the checkpoint's tensors.
      optional_prefix: what the names in some checkpoints begin with, and in others not.
      ignores: tensors that are no parameters.
    """

    architecture: str
    model_type: str
    read: Callable[[Fields], ModelConfig]
    write: Callable[[ModelConfig], dict]
    tensors: Callable[[ModelConfig], Iterator[Tensor]]
    optional_prefix: str = "model."
    ignores: Callable[[str, ModelConfig], bool] = lambda name, config: name.endswith("rotary_emb.inv_freq")


def packed_shape(rule: Tensor, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Shape of a tensor that holds parameters of these shapes."""
    # Broadcast zeros cost nothing.
    return rule.layout.pack([np.broadcast_to(np.zeros((), bool), shape) for shape in shapes]).shape


class InexpressibleError(Exception):
    """A family has no such part."""


SAME = Layout(lambda tensor: [tensor], lambda params: params[0])
TRANSPOSED = Layout(lambda tensor: [tensor.T], lambda params: params[0].T)


def rows(*sizes: int) -> Layout:
    """Matrices [out, in] or vectors [out] one below another, of so many rows each."""
    ends = np.cumsum(sizes)

    def unpack(tensor: np.ndarray) -> list[np.ndarray]:
        if tensor.shape[0] != ends[-1]:
            raise ValueError
        return [part.T for part in np.split(tensor, ends[:-1])]

    return Layout(unpack, lambda params: np.concatenate([param.T for param in params]))


def permuted_rows(order: np.ndarray, *sizes: int) -> Layout:
    """`rows` of a tensor whose rows stand in another order: row `order[i]` of it is our row i."""
    inner, back = rows(*sizes), np.argsort(order)

    def unpack(tensor: np.ndarray) -> Sequence[np.ndarray]:
        if len(tensor) != len(order):
            raise ValueError
        return inner.unpack(tensor[order])

    return Layout(unpack, lambda params: inner.pack(params)[back])


def weight(theirs: str, ours: str, *, layout: Layout = TRANSPOSED, slot: int | None = None) -> Tensor:
    """A matrix [out, in] there, [in, out] here."""
    return Tensor(f"{theirs}.weight", (ours,), layout, slot)


def linear(theirs: str, ours: str, *, bias: bool = False, layout: Layout = TRANSPOSED) -> Iterator[Tensor]:
    """Rules of a linear layer: kernel and bias."""
    yield weight(theirs, f"{ours}/kernel", layout=layout)
    if bias:
        yield Tensor(f"{theirs}.bias", (f"{ours}/bias",), SAME)


def norm(theirs: str, ours: str, *, bias: bool = False) -> Iterator[Tensor]:
    """A norm's scale, and bias."""
    yield Tensor(f"{theirs}.weight", (f"{ours}/scale",), SAME)
    if bias:
        yield Tensor(f"{theirs}.bias", (f"{ours}/bias",), SAME)


def named_blocks(config: ModelConfig) -> Iterator[tuple[str, Block]]:
    """Prefix of the parameters of each layer, and its block, in order."""
    groups = [("prefix", config.prefix)] if config.prefix else []
    groups += [(f"layer_{index}", config.pattern) for index in range(config.num_repeats)]
    for name, blocks in groups:
        for index, block in enumerate(blocks):
            yield (f"{name}/block_{index}_" if len(blocks) > 1 else f"{name}/"), block


def fold(blocks: Sequence[Block]) -> tuple[tuple[Block, ...], tuple[Block, ...]]:
    """(prefix, pattern) of the fewest blocks that unroll into `blocks`."""
    count = len(blocks)
    choices = [
        (start, period)
        for start in range(count)
        for period in range(1, count - start + 1)
        if (count - start) % period == 0
        and all(blocks[i] == blocks[i + period] for i in range(start, count - period))
    ]
    start, period = min(choices, key=sum)
    return tuple(blocks[:start]), tuple(blocks[start : start + period])
