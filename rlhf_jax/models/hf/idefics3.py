"""Idefics3 and SmolVLM: SigLIP's encoder, a pixel shuffle and a Llama.

An image goes in as one square of the encoder's size; the tiles into which the published processors may cut a
large image beside it (`do_image_splitting`) are images like any other, if one wants them.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.hf import common, llama
from rlhf_jax.models.hf.fields import Fields
from rlhf_jax.models.hf.mapping import SAME, Family, InexpressibleError, Layout, Tensor, linear, norm
from rlhf_jax.models.vision.config import PixelShuffle, VisionConfig

_TEXT, _VISION = "model.text_model", "model.vision_model"


def read(fields: Fields) -> ModelConfig:
    """config.json of both."""
    text = fields.inner(fields.get("text_config"), "text_config")
    text.expect("model_type", "llama")
    text.expect("qk_layer_norms", False)
    vision = fields.inner(fields.get("vision_config") or {}, "vision_config")
    vision.expect("num_channels", 3)
    tied = fields.flag("tie_word_embeddings", default=text.flag("tie_word_embeddings", default=False))
    return dataclasses.replace(
        llama.read_llama(text),
        tie_word_embeddings=tied,
        vision=VisionConfig(
            image_token_id=fields.integer("image_token_id"),
            image_size=vision.integer("image_size", default=224),
            patch_size=vision.integer("patch_size", default=32),
            width=vision.integer("hidden_size", default=1152),
            num_layers=vision.integer("num_hidden_layers", default=12),
            num_heads=vision.integer("num_attention_heads", default=16),
            intermediate_size=vision.integer("intermediate_size", default=3072),
            projector=PixelShuffle(fields.integer("scale_factor", default=2)),
            activation=common.read_activation(vision, "hidden_act", default="gelu_pytorch_tanh"),
            norm_epsilon=vision.number("layer_norm_eps", default=1e-6),
        ),
    )


def write(config: ModelConfig, *, model_type: str) -> dict[str, Any]:
    """The fields that `read` reads."""
    vision = common.part(config.vision, VisionConfig)
    projector = common.part(vision.projector, PixelShuffle)
    text = llama.write_llama(config)
    return {
        "image_token_id": vision.image_token_id,
        "scale_factor": projector.factor,
        "tie_word_embeddings": config.tie_word_embeddings,
        "text_config": {"model_type": "llama", **text},
        "vision_config": {
            "model_type": f"{model_type}_vision",
            "hidden_size": vision.width,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "intermediate_size": vision.intermediate_size,
            "hidden_act": common.ACTIVATION_NAMES[vision.activation],
            "layer_norm_eps": vision.norm_epsilon,
            "num_channels": 3,
        },
    }


def tensors(config: ModelConfig) -> Iterator[Tensor]:
    """Every tensor of the checkpoint."""
    vision = config.vision
    if vision is None:
        raise InexpressibleError
    for rule in llama.tensors(config):
        inner = rule.name.removeprefix("model")
        yield rule if inner == rule.name else dataclasses.replace(rule, name=f"{_TEXT}{inner}")
    yield from linear("model.connector.modality_projection.proj", "vision/projector")
    embeddings = f"{_VISION}.embeddings"
    yield from linear(f"{embeddings}.patch_embedding", "vision/patches", bias=True, layout=_squares(vision))
    yield Tensor(f"{embeddings}.position_embedding.weight", ("vision/position_embedding",), SAME)
    for index in range(vision.num_layers):
        theirs, ours = f"{_VISION}.encoder.layers.{index}", f"vision/layer_{index}"
        yield from norm(f"{theirs}.layer_norm1", f"{ours}/attention_norm", bias=True)
        for name in ("query", "key", "value"):
            yield from linear(f"{theirs}.self_attn.{name[0]}_proj", f"{ours}/attention/{name}", bias=True)
        yield from linear(f"{theirs}.self_attn.out_proj", f"{ours}/attention/output", bias=True)
        yield from norm(f"{theirs}.layer_norm2", f"{ours}/feed_forward_norm", bias=True)
        yield from linear(f"{theirs}.mlp.fc1", f"{ours}/feed_forward/up", bias=True)
        yield from linear(f"{theirs}.mlp.fc2", f"{ours}/feed_forward/down", bias=True)
    yield from norm(f"{_VISION}.post_layernorm", "vision/final_norm", bias=True)


def _squares(vision: VisionConfig) -> Layout:
    """A convolution [out, 3, P, P] against a matrix [P P 3, out] of flattened patches."""
    size = vision.patch_size

    def unpack(tensor: np.ndarray) -> list[np.ndarray]:
        return [tensor.transpose(2, 3, 1, 0).reshape(-1, tensor.shape[0])]

    return Layout(unpack, lambda params: params[0].reshape(size, size, 3, -1).transpose(3, 2, 0, 1))


IDEFICS3 = Family(
    "Idefics3ForConditionalGeneration",
    "idefics3",
    read,
    functools.partial(write, model_type="idefics3"),
    tensors,
)
SMOLVLM = Family(
    "SmolVLMForConditionalGeneration",
    "smolvlm",
    read,
    functools.partial(write, model_type="smolvlm"),
    tensors,
)
