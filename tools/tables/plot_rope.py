"""Rotary angles by dimension pair and position, plain and stretched, as one figure.

    python tools/tables/plot_rope.py --out rope.png
    python tools/tables/plot_rope.py --out rope.png --theta 500000 --head-dim 128 --factor 8 --original-length
    8192

Top: the cosine of every pair's angle at every position: fast pairs on the left, slow ones on the right.
Bottom: turns of each pair within the original length, and how much each way of stretching slows it.
"""

import dataclasses
import math
from pathlib import Path

import numpy as np
import tyro

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
      shown: positions of the upper pictures.
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
    import matplotlib.pyplot as plt  # slow to import, and needed only here

    frequencies = {name: rotary_frequencies(rope, options.head_dim) for name, rope in ropes(options).items()}
    figure, axes = plt.subplots(2, len(frequencies), figsize=(3 * len(frequencies), 6), layout="constrained")
    for axis, (name, speeds) in zip(axes[0], frequencies.items(), strict=True):
        angles = np.arange(options.shown)[:, None] * speeds
        axis.imshow(np.cos(angles), aspect="auto", cmap="RdBu", vmin=-1, vmax=1, interpolation="nearest")
        axis.set(title=name, xlabel="dimension pair", ylabel="position")
    for axis in axes[1]:
        axis.remove()
    grid = axes[1, 0].get_gridspec()
    left, right = figure.add_subplot(grid[1, :2]), figure.add_subplot(grid[1, 2:])
    plain = frequencies["plain"]
    for name, speeds in frequencies.items():
        left.semilogy(options.original_length * speeds / (2 * math.pi), label=name)
        right.plot(plain / speeds, label=name)
    left.set(xlabel="dimension pair", ylabel=f"turns within {options.original_length} tokens")
    right.set(xlabel="dimension pair", ylabel="times slower than plain")
    left.legend(frameon=False)
    figure.savefig(options.out, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    draw(tyro.cli(Options, description=(__doc__ or "").split("\n\n")[0]))
