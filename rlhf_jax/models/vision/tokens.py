"""Images among tokens: what the tokenizer of a model with vision puts in the place of an image."""

from rlhf_jax.core.errors import UserError
from rlhf_jax.data.images import ImageProcessor
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.models.vision.config import VisionConfig

IMAGE_TOKEN = "<image>"
"""The image token of new models."""
AROUND = ("<fake_token_around_image>", "<global-img>"), ("<fake_token_around_image>",)
"""Special tokens that Idefics3 puts before and behind the tokens of an image; where a tokenizer has them."""


def image_processor(vision: VisionConfig, tokenizer: Tokenizer) -> ImageProcessor:
    """Image processor of a model: an image as one square, whatever its shape was.

    Raises:
      UserError: the tokenizer has no such special token.
    """
    if vision.image_token_id not in tokenizer.special_tokens.values():
        raise UserError(
            f"image_token_id={vision.image_token_id} is no special token of the tokenizer, so that text "
            f'could pass for an image: add one (`tokenizer.with_special(["{IMAGE_TOKEN}"])`), or name another'
        )
    known = tokenizer.special_tokens
    before, behind = (
        tuple(known[name] for name in names) if all(name in known for name in names) else ()
        for names in AROUND
    )
    features = (vision.image_token_id,) * vision.tokens_per_image
    return ImageProcessor(vision.image_size, vision.image_token_id, (*before, *features, *behind))
