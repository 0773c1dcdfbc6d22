"""Rotary angles by dimension pair and position, plain and stretched, as one figure.

    python tools/tables/plot_rope.py --out rope.png
    python tools/tables/plot_rope.py --out rope.png --theta 500000 --head-dim 128 --factor 8 --original-length
    8192

First the cosine of every pair's angle at every position: fast pairs on the left, slow ones on the right.
Then turns of each pair within the original length, and how much each way of stretching slows it.
"""

import dataclasses
import math
from pathlib import Path

import numpy as np
import tyro

from rlhf_jax.metrics.pictures import picture
from rlhf_jax.models.positions import (
    LinearScaling,
    Llama3Scaling,
    Rope,
    YarnScaling,
    ntk_theta,
    rotary_frequencies,
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What to draw.

    Attributes:
      out: the figure; the suffix is the format.
      theta: base of the wavelengths.
      head_dim: width of a head.
      factor: how many times longer sequences become.
      original_length: tokens of pretraining.
      shown: positions of the first pictures.
    """

    out: Path
    theta: float = 10_000.0
    head_dim: int = 64
    factor: float = 8.0
    original_length: int = 2048
    shown: int = 512


def ropes(options: Options) -> dict[str, Rope]:
    """The plain rotation and every way of stretching it."""
    theta, factor, length = options.theta, options.factor, options.original_length
    return {
        "plain": Rope(theta),
        "linear": Rope(theta, LinearScaling(factor)),
        "NTK": Rope(ntk_theta(theta, factor=factor, head_dim=options.head_dim)),
        "Llama 3": Rope(theta, Llama3Scaling(factor, 1.0, 4.0, length)),
        "YaRN": Rope(theta, YarnScaling(factor, length)),
    }


def draw(options: Options) -> None:
    """Writes the figure."""
    frequencies = {name: rotary_frequencies(rope, options.head_dim) for name, rope in ropes(options).items()}
    with picture(options.out, 4, 2, height=2.4) as (*images, turns, slower, _):
        for axes, (name, speeds) in zip(images, frequencies.items(), strict=True):
            angles = np.arange(options.shown)[:, None] * speeds
            axes.imshow(np.cos(angles), aspect="auto", cmap="RdBu", vmin=-1, vmax=1, interpolation="nearest")
            axes.set(title=name, xlabel="dimension pair", ylabel="position")
            axes.grid(visible=False)
        for name, speeds in frequencies.items():
            turns.semilogy(options.original_length * speeds / (2 * math.pi), label=name)
            slower.plot(frequencies["plain"] / speeds, label=name)
        turns.set(xlabel="dimension pair", ylabel=f"turns within {options.original_length} tokens")
        slower.set(xlabel="dimension pair", ylabel="times slower than plain")
        turns.legend(frameon=False)


if __name__ == "__main__":
    draw(tyro.cli(Options, description=(__doc__ or "").split("\n\n")[0]))
