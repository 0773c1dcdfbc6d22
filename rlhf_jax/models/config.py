"""What a decoder is made of: frozen dataclasses, one for each kind of part.

A new kind of attention, position or norm is a new dataclass here and one more case where parts are built
(`models/parts.py`); nothing else branches on the architecture. A decoder is `pattern` repeated until
`num_layers`, so that alternating layers (local and global attention, dense and sparse feed-forward) are
patterns of more than one block.
"""

import dataclasses
from typing import Any, Literal

from rlhf_jax.core.errors import UserError

Remat = Literal["none", "dots", "full"]


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions (Su et al. 2021, section 3.2.2), in the half-split layout of Llama.

    Attributes:
      theta: base of the wavelengths.
    """

    theta: float = 10_000.0


@dataclasses.dataclass(frozen=True)
class RMSNorm:
    """Root-mean-square norm with a learned scale (Zhang & Sennrich 2019, eq. 4)."""

    epsilon: float = 1e-6


@dataclasses.dataclass(frozen=True)
class Attention:
    """Causal attention with grouped key-value heads (Ainslie et al. 2023); MHA and MQA are its two ends.

    Attributes:
      num_heads: query heads H.
      num_kv_heads: key-value heads K; divides H.
      head_dim: width of one head.
      position: how positions enter.
      bias: whether the query, key and value projections have biases.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    position: Rope = Rope()
    bias: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"Attention: num_heads={self.num_heads} is no multiple of num_kv_heads={self.num_kv_heads}: "
                "choose a number of key-value heads that divides the number of heads."
            )
        if self.head_dim % 2:
            raise UserError(
                f"Attention: head_dim={self.head_dim} is odd and rotary positions need pairs: "
                "choose a width and heads that give an even one."
            )


@dataclasses.dataclass(frozen=True)
class GatedFeedForward:
    """SwiGLU (Shazeer 2020, eq. 6): (silu(x W_gate) * x W_up) W_down, no biases."""

    hidden_dim: int


@dataclasses.dataclass(frozen=True)
class Block:
    """One pre-norm residual block: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    attention: Attention
    feed_forward: GatedFeedForward
    norm: RMSNorm = RMSNorm()


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer.

    Attributes:
      vocab_size: V.
      width: D, the residual stream.
      num_layers: blocks in all; a multiple of `len(pattern)`.
      pattern: the blocks that repeat.
      tied_embeddings: whether the output matrix is the input embedding.
      final_norm: norm before the output matrix.
      param_dtype: dtype in which parameters are kept.
      compute_dtype: dtype of matmuls and activations; logits and norms' statistics are float32.
      scan_layers: stack the repeats' parameters and run them with `lax.scan` (compile time independent
        of depth); otherwise layers are separate and unrolled (faster on CPU).
      remat: what the backward pass computes again: nothing, everything but matmul outputs, everything.
    """

    vocab_size: int
    width: int
    num_layers: int
    pattern: tuple[Block, ...]
    tied_embeddings: bool = True
    final_norm: RMSNorm = RMSNorm()
    param_dtype: str = "float32"
    compute_dtype: str = "float32"
    scan_layers: bool = False
    remat: Remat = "none"

    def __post_init__(self) -> None:
        if self.num_layers % len(self.pattern):
            raise UserError(
                f"ModelConfig: num_layers={self.num_layers} is not a multiple of the pattern's "
                f"{len(self.pattern)} blocks; change one of them."
            )

    @property
    def num_repeats(self) -> int:
        """How often `pattern` is repeated."""
        return self.num_layers // len(self.pattern)


def dense_config(
    *,
    vocab_size: int,
    width: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    hidden_dim: int | None = None,
    theta: float = 10_000.0,
    **options: Any,
) -> ModelConfig:
    """A Llama-shaped decoder: RMSNorm, RoPE, grouped-query attention, SwiGLU.

    Args:
      hidden_dim: width of the feed-forward; 8/3 of `width` rounded up to a multiple of 16 by default.
      options: further fields of `ModelConfig`.

    Raises:
      UserError: if the heads do not divide the width.
    """
    if width % num_heads:
        raise UserError(
            f"Model: width={width} is not divisible by num_heads={num_heads}: choose heads that divide it."
        )
    attention = Attention(num_heads, num_kv_heads or num_heads, width // num_heads, Rope(theta))
    feed_forward = GatedFeedForward(hidden_dim or -(-width * 8 // 48) * 16)
    return ModelConfig(vocab_size, width, num_layers, (Block(attention, feed_forward),), **options)


def config_to_dict(config: ModelConfig) -> dict[str, Any]:
    """A JSON-ready dictionary; `config_from_dict` is its inverse."""
    return dataclasses.asdict(config)


def config_from_dict(data: dict[str, Any]) -> ModelConfig:
    """The config that `config_to_dict` wrote.

    Raises:
      UserError: if fields are missing or unknown.
    """
    try:
        blocks = tuple(
            Block(
                Attention(**{**block["attention"], "position": Rope(**block["attention"]["position"])}),
                GatedFeedForward(**block["feed_forward"]),
                RMSNorm(**block["norm"]),
            )
            for block in data["pattern"]
        )
        return ModelConfig(**{**data, "pattern": blocks, "final_norm": RMSNorm(**data["final_norm"])})
    except (KeyError, TypeError) as error:
        raise UserError(
            f"The model configuration cannot be read ({error}): "
            "it was written by another version or edited by hand."
        ) from error
