"""Vision of new models, from their options."""

import dataclasses
from typing import Literal

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.ranges import Width, WidthOrZero
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.models.vision.config import (
    LinearProjector,
    MLPProjector,
    PixelShuffle,
    Pooling,
    Projector,
    VisionConfig,
)
from rlhf_jax.models.vision.tokens import IMAGE_TOKEN

ProjectorName = Literal["linear", "mlp", "pixel_shuffle"]


@dataclasses.dataclass(frozen=True)
class VisionOptions:
    """The patch encoder of a new model.

    Attributes:
      image_size: above 0, the model reads images, as squares of so many pixels a side.
      patch_size: pixels along the side of a patch.
      width: of the encoder; 0 for that of the residual stream. Its feed-forwards are 4 times as wide.
      layers: blocks of the encoder.
      pooling: what the decoder sees of an image: every patch, their mean, or what a learned query attends to.
      projector: from the encoder to the decoder: a linear layer, a feed-forward, or a linear layer over
        squares of four patches.
    """

    image_size: WidthOrZero = 0
    patch_size: Width = 8
    width: WidthOrZero = 0
    layers: Width = 2
    pooling: Pooling = "none"
    projector: ProjectorName = "linear"

    def config(self, tokenizer: Tokenizer, features: int, heads: int) -> VisionConfig | None:
        """The encoder for this tokenizer, which has the image token; None without images.

        Args:
          features: the decoder's width.
          heads: of the attention, in encoder and decoder.

        Raises:
          UserError: the numbers do not fit each other.
        """
        width = self.width or features
        if not self.image_size:
            return None
        if self.image_size % self.patch_size or width % heads:
            raise UserError(
                f"--arch.vision.patch-size {self.patch_size} must divide --arch.vision.image-size "
                f"{self.image_size}, and --arch.heads {heads} the encoder's width {width}: change one of them"
            )
        projectors: dict[ProjectorName, Projector] = {
            "linear": LinearProjector(bias=True),
            "mlp": MLPProjector(4 * width),
            "pixel_shuffle": PixelShuffle(2),
        }
        return VisionConfig(
            tokenizer.special_tokens[IMAGE_TOKEN],
            self.image_size,
            self.patch_size,
            width,
            self.layers,
            heads,
            4 * width,
            projector=projectors[self.projector],
            pooling=self.pooling,
        )


def with_image_token(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with the image token of new models among its special tokens."""
    return tokenizer.with_special([IMAGE_TOKEN])
