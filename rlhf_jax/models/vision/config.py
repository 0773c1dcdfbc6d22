"""Vision configuration: a patch encoder and the projector behind it."""

import dataclasses
from typing import Literal, TypeAlias

from rlhf_jax.core.errors import UserError

Pooling = Literal["none", "mean", "attention"]
"""What leaves the encoder of an image: every patch, their mean, or what a learned query attends to."""
VisionActivation = Literal["silu", "gelu", "gelu_tanh"]


@dataclasses.dataclass(frozen=True)
class LinearProjector:
    """x W (+ b), from the encoder's width to the decoder's (LLaVA: Liu et al. 2023, eq. 1)."""

    bias: bool = False


@dataclasses.dataclass(frozen=True)
class MLPProjector:
    """activation(x W_up + b) W_down + b (LLaVA-1.5: Liu et al. 2024)."""

    intermediate_size: int
    activation: VisionActivation = "gelu"


@dataclasses.dataclass(frozen=True)
class PixelShuffle:
    """x W of the features of `factor` x `factor` neighbouring patches side by side (Idefics3: Laurencon et
    al. 2024): so many times fewer tokens.
    """

    factor: int = 2


Projector: TypeAlias = LinearProjector | MLPProjector | PixelShuffle


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """A vision transformer (Dosovitskiy et al. 2021), with SigLIP's choices (Zhai et al. 2023): learned
    positions, pre-norm blocks without a mask, a last norm, no class token; and a projector.

    Attributes:
      image_token_id: the token in whose places image features stand, one for each of `tokens_per_image`.
      image_size: height and width of an image in pixels.
      patch_size: those of a patch.
      width: of the encoder.
      num_layers: of its blocks.
      num_heads: of its attention.
      intermediate_size: of its feed-forwards.
      projector: from the encoder's width to the decoder's.
      pooling: of the patches of an image.
      activation: of the feed-forwards.
      norm_epsilon: of the norms.
      mean: of each channel, subtracted from pixels in [0, 1].
      std: of each channel, by which they are divided.
    """

    image_token_id: int
    image_size: int
    patch_size: int
    width: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    projector: Projector = LinearProjector()
    pooling: Pooling = "none"
    activation: VisionActivation = "gelu_tanh"
    norm_epsilon: float = 1e-6
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size or self.width % self.num_heads:
            raise UserError(
                f"VisionConfig: patch_size={self.patch_size} must divide image_size={self.image_size}, and "
                f"num_heads={self.num_heads} width={self.width}: change one of them."
            )
        projector = self.projector
        shuffles = isinstance(projector, PixelShuffle)
        if shuffles and (self.pooling != "none" or self.side % projector.factor):
            raise UserError(
                f"VisionConfig: PixelShuffle(factor={projector.factor}) needs patches whose {self.side} a "
                f"side it divides, and pooling='none' (it is {self.pooling!r}): change one of them."
            )

    @property
    def side(self) -> int:
        """Patches along the side of an image."""
        return self.image_size // self.patch_size

    @property
    def tokens_per_image(self) -> int:
        """Tokens that an image becomes."""
        if self.pooling != "none":
            return 1
        factor = self.projector.factor if isinstance(self.projector, PixelShuffle) else 1
        return (self.side // factor) ** 2
