"""Positional encodings: rotary positions and their scalings, linear biases."""

import dataclasses
import math
from typing import TypeAlias

import jax.numpy as jnp
import numpy as np

from rlhf_jax.core.types import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Position interpolation (Chen et al. 2023, eq. 4): angles divided by `factor`."""

    factor: float


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Wavelengths above original_length / low are stretched by `factor`, those below original_length / high
    are kept, those between are blended (Llama 3.1's released code).
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_length: int


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al. 2023, section 3.2): interpolates the slow rotations, keeps the fast ones.

    Attributes:
      factor: how much longer than `original_length` sequences may be.
      beta_fast: rotations within `original_length` above which a dimension is kept as it is.
      beta_slow: rotations below which it is interpolated wholly.
      truncate: whether the two bounds are rounded outwards to whole dimensions.
      attention_factor: what cosines and sines are multiplied with; None for the value of `magnitude`.
      mscale, mscale_all_dim: DeepSeek's weights of the logarithmic correction.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None

    @property
    def magnitude(self) -> float:
        """Attention factor on cosines and sines: 0.1 ln(factor) + 1, or DeepSeek's ratio."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._correction(self.mscale) / self._correction(self.mscale_all_dim)
        return self._correction(1.0)

    @property
    def softmax_magnitude(self) -> float:
        """Attention factor on the logits of DeepSeek's attention."""
        return self._correction(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def _correction(self, weight: float) -> float:
        return 0.1 * weight * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


RopeScaling: TypeAlias = LinearScaling | Llama3Scaling | YarnScaling


def ntk_theta(theta: float, *, factor: float, head_dim: int) -> float:
    """The base with which the slowest of the rotations is `factor` times slower: "NTK-aware" scaling
    (Peng et al. 2023, section 3.1, definition 1).
    """
    return theta * factor ** (head_dim / (head_dim - 2))


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions (Su et al. 2021, section 3.2.2), in the half-split layout of Llama.

    Attributes:
      theta: base of the wavelengths.
      scaling: how they are stretched for sequences longer than those of pretraining.
      fraction: share of a head's dimensions that rotate, the first ones.
    """

    theta: float = 10_000.0
    scaling: RopeScaling | None = None
    fraction: float = 1.0


@dataclasses.dataclass(frozen=True)
class Alibi:
    """Logits fall linearly with distance, with a fixed slope for each head (Press et al. 2022, section 3)."""


def rotary_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """[half] radians a token of each rotating pair: theta^(-2 i / d) (Su et al. 2021, eq. 15), stretched.

    Host arithmetic in float64, rounded once.
    """
    rotating = int(head_dim * rope.fraction)
    frequencies = rope.theta ** (-np.arange(0, rotating, 2) / rotating)
    match rope.scaling:
        case LinearScaling(factor):
            frequencies = frequencies / factor
        case Llama3Scaling(factor, low, high, original_length):
            turns = original_length * frequencies / (2 * math.pi)
            kept = np.clip((turns - low) / (high - low), 0, 1)
            frequencies = frequencies * (kept + (1 - kept) / factor)
        case YarnScaling() as yarn:
            kept = _yarn_kept(yarn, rope.theta, rotating)
            frequencies = frequencies * (kept + (1 - kept) / yarn.factor)
        case None:
            pass
    return frequencies.astype(np.float32)


def _yarn_kept(yarn: YarnScaling, theta: float, rotating: int) -> np.ndarray:
    """Share of each pair's frequency that is not interpolated: a ramp over pairs, not over frequencies."""

    def pair_with(turns: float) -> float:
        """The (fractional) pair that turns so often within the original length."""
        return rotating * math.log(yarn.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_with(yarn.beta_fast), pair_with(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotating - 1)
    width = high - low if high != low else 0.001
    return 1 - np.clip((np.arange(rotating // 2) - low) / width, 0, 1)


def rotate(
    heads: Float[Array, "B T H d"], positions: Int[Array, "B T"], rope: Rope
) -> Float[Array, "B T H d"]:
    """Rotates the pairs (x_i, x_{i + r/2}) of every head's first r dimensions (Su et al. 2021, eq. 34)."""
    wide = jnp.promote_types(heads.dtype, jnp.float32)
    angles = positions[..., None].astype(wide) * rotary_frequencies(rope, heads.shape[-1])
    magnitude = rope.scaling.magnitude if isinstance(rope.scaling, YarnScaling) else 1.0
    cos = (jnp.cos(angles) * magnitude)[:, :, None].astype(heads.dtype)
    sin = (jnp.sin(angles) * magnitude)[:, :, None].astype(heads.dtype)
    half = angles.shape[-1]
    first, second, rest = jnp.split(heads, (half, 2 * half), axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """[H] slopes 2^(-8 h / H), h = 1...H (Press et al. 2022, section 3); where H is no power of two, those of
    the power below it and every other one of the power above.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = 2.0 ** (-8 * np.arange(1, power + 1) / power)
    between = 2.0 ** (-8 * np.arange(1, 2 * power + 1, 2) / (2 * power))
    return np.concatenate([slopes, between[: num_heads - power]]).astype(np.float32)
