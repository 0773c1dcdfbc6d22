"""Model configuration: frozen dataclasses, one for each kind of part of a decoder.

A new kind of attention, position or norm is a new dataclass here and one more case where parts are built
(`models/parts.py`); nothing else branches on the architecture. A decoder is `prefix`, then `pattern`
repeated until `num_layers`, so that alternating layers (local and global attention, dense and sparse
feed-forward) are patterns of more than one block.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from rlhf_jax.core.errors import UserError
from rlhf_jax.models.positions import Alibi, Rope, YarnScaling
from rlhf_jax.models.vision.config import VisionConfig

Remat = Literal["none", "dots", "attention", "full"]
AttentionBackend = Literal["auto", "plain", "blocked", "cudnn", "splash", "ring", "ulysses"]
"""How attention is computed; `models.attention.backends.choose_backend` says when which applies."""
Activation = Literal["silu", "gelu", "gelu_tanh"]
"""`gelu` is exact; `gelu_tanh` its approximation (Hendrycks & Gimpel 2016, section 2)."""


# Norms ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RMSNorm:
    """Root-mean-square norm with a learned scale (Zhang & Sennrich 2019, eq. 4).

    Attributes:
      offset: the parameter is the scale minus 1 (Gemma).
    """

    epsilon: float = 1e-6
    offset: bool = False


@dataclasses.dataclass(frozen=True)
class LayerNorm:
    """Mean and variance norm with learned scale and bias (Ba et al. 2016, eq. 4)."""

    epsilon: float = 1e-5


Norm: TypeAlias = RMSNorm | LayerNorm


# Attention -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Attention:
    """Causal attention with grouped key-value heads (Ainslie et al. 2023); MHA and MQA are its two ends.

    Attributes:
      num_heads: query heads H.
      num_kv_heads: key-value heads K; divides H.
      head_dim: width of one head.
      position: how positions enter; None where they come with the embedding.
      bias: whether the query, key and value projections have biases.
      output_bias: whether the output projection has one.
      qk_norm: norm of queries and keys before they rotate.
      qk_norm_whole: over all heads at once (OLMo 2) rather than in each head.
      window: how many tokens are seen, the current one included; None for all before.
      scale: what logits are multiplied with; None for 1 / sqrt(head_dim).
      softcap: bound c of c tanh(logits / c) (Gemma 2 report, section 2).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    position: Rope | Alibi | None = Rope()
    bias: bool = False
    output_bias: bool = False
    qk_norm: Norm | None = None
    qk_norm_whole: bool = False
    window: int | None = None
    scale: float | None = None
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"Attention: num_heads={self.num_heads} is no multiple of num_kv_heads={self.num_kv_heads}: "
                "choose a number of key-value heads that divides the number of heads."
            )
        if isinstance(self.position, Rope) and self.head_dim % 2:
            raise UserError(
                f"Attention: head_dim={self.head_dim} is odd and rotary positions need pairs: "
                "choose a width and heads that give an even one."
            )


@dataclasses.dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2 report, section 2.1): keys and values are made from one
    latent vector a token, which is all that the cache holds beside one rotated key.

    Attributes:
      num_heads: H.
      q_lora_rank: width of the queries' latent; None where queries are projected directly.
      kv_lora_rank: width of the latent of keys and values.
      qk_nope_head_dim: width of the part of a query or key that does not rotate.
      qk_rope_head_dim: width of the part that rotates; the key's is shared by all heads.
      v_head_dim: width of a value.
      position: the rotation.
      norm: norm of both latents.
      bias: whether the projections to the latents and to the output have biases.
    """

    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    position: Rope = Rope()
    norm: RMSNorm = RMSNorm()
    bias: bool = False

    @property
    def scale(self) -> float:
        """Attention scale, by which logits are multiplied."""
        scaling = self.position.scaling
        correction = scaling.softmax_magnitude if isinstance(scaling, YarnScaling) else 1.0
        return correction * (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5


# Recurrence ----------------------------------------------------------------------------------------


Cell = Literal["rnn", "gru", "lstm"]


@dataclasses.dataclass(frozen=True)
class Recurrence:
    """A recurrent layer in the place of attention, with one state a row instead of columns.

    Attributes:
      cell: `rnn` (Elman 1990), `gru` (Cho et al. 2014, with the reset gate behind the product, as cuDNN has
        it), or `lstm` (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000).
      hidden_size: width of the state; another than the model's is projected back to it.
    """

    cell: Cell
    hidden_size: int


# Feed-forward --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class GatedFeedForward:
    """SwiGLU and its kin (Shazeer 2020, eq. 6): (activation(x W_gate) * x W_up) W_down."""

    intermediate_size: int
    activation: Activation = "silu"
    bias: bool = False


@dataclasses.dataclass(frozen=True)
class FeedForward:
    """activation(x W_up + b) W_down + b (Vaswani et al. 2017, eq. 2)."""

    intermediate_size: int
    activation: Activation = "gelu"


@dataclasses.dataclass(frozen=True)
class SoftmaxRouter:
    """The experts of highest softmax(x W) (Fedus et al. 2021, eq. 1; Jiang et al. 2024, section 2.1).

    Attributes:
      renormalize: whether the chosen experts' weights are divided by their sum.
      scale: what the weights are multiplied with.
      groups: groups of experts, ranked by their best one.
      kept_groups: how many groups may be chosen from (DeepSeek-V2 report, section 2.2.2).
    """

    renormalize: bool = True
    scale: float = 1.0
    groups: int = 1
    kept_groups: int = 1


@dataclasses.dataclass(frozen=True)
class SigmoidRouter:
    """The experts of highest sigmoid(x W) + bias, weighted without the bias (DeepSeek-V3 report, eq. 12-16).

    The bias balances the load; it gets no gradient. Groups are ranked by the sum of their two best experts.
    """

    renormalize: bool = True
    scale: float = 1.0
    groups: int = 1
    kept_groups: int = 1


@dataclasses.dataclass(frozen=True)
class MixtureOfExperts:
    """Each token goes through `experts_per_token` of `num_experts` gated feed-forwards (Shazeer et al. 2017).

    Attributes:
      expert: one expert.
      shared: a feed-forward that every token goes through as well.
    """

    num_experts: int
    experts_per_token: int
    expert: GatedFeedForward
    router: SoftmaxRouter | SigmoidRouter = SoftmaxRouter()
    shared: GatedFeedForward | None = None

    def __post_init__(self) -> None:
        groups, kept = self.router.groups, self.router.kept_groups
        if self.expert.bias:
            raise UserError("MixtureOfExperts: experts have no biases; leave `bias` of `expert` False.")
        reachable = self.num_experts // groups * kept
        if self.num_experts % groups or kept > groups or self.experts_per_token > reachable:
            raise UserError(
                f"MixtureOfExperts: {self.experts_per_token} of {self.num_experts} experts cannot come from "
                f"{kept} of {groups} groups: let the groups divide the experts and keep enough of them."
            )


# The whole -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Block:
    """A residual block: x + attention(norm(x)), then x + feed_forward(norm(x)).

    Attributes:
      norm: the kind of every norm in the block.
      pre_norm: norm the inputs of attention and feed-forward.
      post_norm: norm their outputs before they are added (OLMo 2; Gemma 2 does both).
      sum_norm: norm what was added up: post-norm in the original sense, norm(x + attention(x)) (Vaswani et
        al. 2017, section 3.1; BERT, GPT-1).
      residual: add them; else they take the place of their inputs (recurrent networks of old).
      residual_from_norm: add them to the normed inputs, norm(x) + attention(norm(x)) (a variant of BLOOM).
    """

    attention: Attention | LatentAttention | Recurrence
    feed_forward: GatedFeedForward | FeedForward | MixtureOfExperts | None
    norm: Norm = RMSNorm()
    pre_norm: bool = True
    post_norm: bool = False
    sum_norm: bool = False
    residual: bool = True
    residual_from_norm: bool = False


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer.

    Attributes:
      vocab_size: V.
      width: D, the residual stream.
      num_layers: blocks in all; those after `prefix` are a multiple of `len(pattern)`.
      pattern: the blocks that repeat.
      prefix: blocks before them.
      tie_word_embeddings: whether the output matrix is the input embedding.
      final_norm: norm before the output matrix; None for none (GPT-1).
      embedding_scale: what embeddings are multiplied with on their way in.
      embedding_norm: norm of the embeddings (BLOOM).
      learned_positions: rows of a learned table of positions that is added to the embeddings (GPT-2).
      logit_softcap: bound c of c tanh(logits / c).
      context_length: tokens the model was made for; told to others on export, bounds nothing here.
      mtp_depth: modules that foresee further tokens in training (`models.further`); generation and
        other objectives leave them alone.
      vision: how images become embeddings; None where the model reads text alone.
      architecture: the Hugging Face name of the family in which `hf.save` writes it; empty for the first
        that can express it.
      param_dtype: dtype in which parameters are kept.
      compute_dtype: dtype of matmuls and activations; logits and norms' statistics are float32.
      scan_layers: stack the repeats' parameters and run them with `lax.scan` (compile time independent
        of depth); otherwise layers are separate and unrolled (faster on CPU).
      remat: what the backward pass computes again: nothing, everything but outputs of matmuls with
        parameters (`dots`), everything but what attention needs (`attention`), everything in a block.
      attention_backend: cuDNN's flash attention on NVIDIA GPUs, splash attention on TPUs, blocks where those
        do not apply (`auto`); or the one that is named. Where columns are split over devices, keys and
        values go around in a ring (`auto`, `ring`), or heads are exchanged for columns (`ulysses`); where
        they are not, these two are `auto`.
    """

    vocab_size: int
    width: int
    num_layers: int
    pattern: tuple[Block, ...]
    prefix: tuple[Block, ...] = ()
    tie_word_embeddings: bool = True
    final_norm: Norm | None = RMSNorm()
    embedding_scale: float = 1.0
    embedding_norm: Norm | None = None
    learned_positions: int | None = None
    logit_softcap: float | None = None
    context_length: int | None = None
    mtp_depth: int = 0
    vision: VisionConfig | None = None
    architecture: str = ""
    param_dtype: str = "float32"
    compute_dtype: str = "float32"
    scan_layers: bool = False
    remat: Remat = "none"
    attention_backend: AttentionBackend = "auto"

    def __post_init__(self) -> None:
        repeated = self.num_layers - len(self.prefix)
        if repeated < 0 or repeated % len(self.pattern):
            raise UserError(
                f"ModelConfig: num_layers={self.num_layers} less {len(self.prefix)} of the prefix is not a "
                f"multiple of the pattern's {len(self.pattern)} blocks; change one of them."
            )
        if self.mtp_depth and self.vision is not None:
            raise UserError(
                "ModelConfig: modules of multi-token prediction foresee no images: give mtp_depth=0, or "
                "vision=None."
            )
        if self.mtp_depth and self.final_norm is None:
            raise UserError(
                "ModelConfig: modules of multi-token prediction (mtp_depth) norm as final_norm does, which "
                "is None; give a norm, or mtp_depth=0."
            )

    @property
    def num_repeats(self) -> int:
        """Repeats of `pattern`."""
        return (self.num_layers - len(self.prefix)) // len(self.pattern)

    @property
    def is_recurrent(self) -> bool:
        """True where a block keeps a state that cannot be taken back to an earlier token."""
        return any(isinstance(block.attention, Recurrence) for block in self.blocks)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Every block, in order."""
        return self.prefix + self.pattern * self.num_repeats


def map_rope(config: ModelConfig, change: Callable[[Rope, int], Rope]) -> ModelConfig:
    """The configuration with other rotations: `change(rope, rotating width)` of every block that has one."""

    def changed(block: Block) -> Block:
        attention = block.attention
        if isinstance(attention, LatentAttention):
            position = change(attention.position, attention.qk_rope_head_dim)
        elif isinstance(attention, Attention) and isinstance(attention.position, Rope):
            position = change(attention.position, int(attention.head_dim * attention.position.fraction))
        else:
            return block
        return dataclasses.replace(block, attention=dataclasses.replace(attention, position=position))

    blocks = {name: tuple(map(changed, getattr(config, name))) for name in ("prefix", "pattern")}
    return dataclasses.replace(config, **blocks)


def dense_config(
    *,
    vocab_size: int,
    width: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    intermediate_size: int | None = None,
    theta: float = 10_000.0,
    **options: Any,
) -> ModelConfig:
    """A Llama-shaped decoder: RMSNorm, RoPE, grouped-query attention, SwiGLU.

    Args:
      intermediate_size: width of the feed-forward; 8/3 of `width` rounded up to a multiple of 16 by default.
      options: further fields of `ModelConfig`.

    Raises:
      UserError: if the heads do not divide the width.
    """
    if width % num_heads:
        raise UserError(
            f"Model: width={width} is not divisible by num_heads={num_heads}: choose heads that divide it."
        )
    attention = Attention(num_heads, num_kv_heads or num_heads, width // num_heads, Rope(theta))
    feed_forward = GatedFeedForward(intermediate_size or -(-width * 8 // 48) * 16)
    return ModelConfig(vocab_size, width, num_layers, (Block(attention, feed_forward),), **options)


def recurrent_config(
    *, vocab_size: int, width: int, num_layers: int, cell: Cell, **options: Any
) -> ModelConfig:
    """A recurrent language model as they were before transformers: layers one on another, without norms
    between them, embeddings of unit variance. As in all models here, a norm stands before the output matrix.

    Args:
      options: further fields of `ModelConfig`.
    """
    block = Block(Recurrence(cell, width), None, pre_norm=False, residual=False)
    return ModelConfig(vocab_size, width, num_layers, (block,), embedding_scale=50.0, **options)
