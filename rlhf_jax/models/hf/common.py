"""Parts that most families share: rotary positions, norms, projections, under the names of Llama."""

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from rlhf_jax.models.config import (
    Activation,
    Attention,
    Block,
    GatedFeedForward,
    MixtureOfExperts,
    ModelConfig,
    RMSNorm,
)
from rlhf_jax.models.hf.fields import MOST_POSITIONS, Fields
from rlhf_jax.models.hf.mapping import SAME, InexpressibleError, Tensor, fold, linear, norm, weight
from rlhf_jax.models.positions import LinearScaling, Llama3Scaling, Rope, YarnScaling

T = TypeVar("T")
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def part(value: Any, kind: type[T]) -> T:
    """The part, if it is of this kind."""
    if not isinstance(value, kind):
        raise InexpressibleError
    return value


def same_blocks(config: ModelConfig) -> Block:
    """The block that all layers are."""
    if len(set(config.blocks)) > 1:
        raise InexpressibleError
    return config.blocks[0]


def read_activation(fields: Fields, *names: str, default: str) -> Activation:
    """The non-linearity under one of these names."""
    name = fields.get(*names) or default
    if name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise fields.error(names[0], f"is {name!r}, and only {known} are supported")
    return ACTIVATIONS[name]


# Rotary positions ----------------------------------------------------------------------------------


def read_rope(fields: Fields, *, theta: float = 10_000.0, kind: str | None = None) -> Rope:
    """Rotary positions, as written since transformers 5 (`rope_parameters`) or before (`rope_theta`,
    `rope_scaling`).

    Args:
      theta: where the file names none.
      kind: the kind of layer, where the kinds differ.
    """
    data = fields.get("rope_parameters")
    if kind is not None and isinstance(data, dict) and kind in data:
        data = data[kind]
    # As transformers reads it: where both stand, the older `rope_scaling` wins.
    scaling = fields.get("rope_scaling") if kind is None or not data else None
    if scaling:
        data = {k: v for k, v in (data or {}).items() if k not in ("rope_type", "type")} | scaling
    inner = fields.inner(data or {}, "rope_scaling")
    theta = inner.get("rope_theta") or fields.number("rope_theta", default=theta)
    fraction = inner.get("partial_rotary_factor") or fields.number("partial_rotary_factor", default=1.0)
    return Rope(float(theta), _read_scaling(fields, inner), float(fraction))


def read_window(fields: Fields) -> int | None:
    """Attention window in tokens (`sliding_window`); None for all.

    Raises:
      UserError: none are.
    """
    if fields.get("sliding_window") is None:
        return None
    return fields.integer("sliding_window", most=MOST_POSITIONS)


def _read_scaling(fields: Fields, inner: Fields) -> LinearScaling | Llama3Scaling | YarnScaling | None:
    def length() -> int:
        named = inner.get("original_max_position_embeddings") or fields.get(
            "original_max_position_embeddings"
        )
        if named is not None and not (isinstance(named, int) and named > 0):
            raise fields.error("original_max_position_embeddings", "is no number of tokens")
        return named or fields.integer("max_position_embeddings", most=MOST_POSITIONS)

    match inner.get("rope_type", "type") or "default":
        case "default":
            return None
        case "linear":
            return LinearScaling(inner.number("factor"))
        case "llama3":
            low, high = inner.number("low_freq_factor"), inner.number("high_freq_factor")
            return Llama3Scaling(inner.number("factor"), low, high, length())
        case "yarn":
            return YarnScaling(
                inner.number("factor"),
                length(),
                inner.number("beta_fast", default=32.0),
                inner.number("beta_slow", default=1.0),
                inner.flag("truncate", default=True),
                inner.get("attention_factor"),
                inner.get("mscale"),
                inner.get("mscale_all_dim"),
            )
        case "dynamic":
            raise fields.error(
                "rope_scaling",
                "is dynamic: it changes earlier tokens as a sequence grows, so that no cache can be right; "
                "take it out (up to `max_position_embeddings` tokens nothing changes)",
            )
        case other:
            raise fields.error(
                "rope_scaling", f"is {other!r}, and only linear, llama3 and yarn are supported"
            )


def write_rope(rope: Rope) -> dict[str, Any]:
    """The fields that `read_rope` reads, in the form that every version of transformers and vLLM takes."""
    match rope.scaling:
        case None:
            scaling = None
        case LinearScaling(factor):
            scaling = {"rope_type": "linear", "factor": factor}
        case Llama3Scaling(factor, low, high, length):
            scaling = {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
            }
            scaling["original_max_position_embeddings"] = length
        case YarnScaling() as yarn:
            scaling = {
                "rope_type": "yarn",
                "factor": yarn.factor,
                "original_max_position_embeddings": yarn.original_length,
                "beta_fast": yarn.beta_fast,
                "beta_slow": yarn.beta_slow,
                "truncate": yarn.truncate,
                "attention_factor": yarn.attention_factor,
                "mscale": yarn.mscale,
                "mscale_all_dim": yarn.mscale_all_dim,
            }
            scaling = {name: value for name, value in scaling.items() if value is not None}
    written = {"rope_theta": rope.theta, "rope_scaling": scaling}
    return written if rope.fraction == 1 else {**written, "partial_rotary_factor": rope.fraction}


# Parts ---------------------------------------------------------------------------------------------


def read_norm(fields: Fields, *, offset: bool = False, default: float = 1e-6) -> RMSNorm:
    """The norm of every layer."""
    return RMSNorm(fields.number("rms_norm_eps", default=default), offset)


def read_attention(fields: Fields, *, position: Rope | None = None, **options: Any) -> Attention:
    """Grouped-query attention with rotary positions."""
    heads = fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", default=heads)
    head_dim = fields.integer("head_dim", default=fields.integer("hidden_size") // heads)
    return Attention(heads, kv_heads, head_dim, position or read_rope(fields), **options)


def write_attention(attention: Attention) -> dict[str, Any]:
    """The fields that `read_attention` reads."""
    return {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        **write_rope(part(attention.position, Rope)),
    }


def read_gated(fields: Fields, *, bias: bool = False) -> GatedFeedForward:
    """Gated feed-forward of the fields of config.json."""
    activation = read_activation(fields, "hidden_act", default="silu")
    return GatedFeedForward(fields.integer("intermediate_size"), activation, bias)


def read_model(
    fields: Fields, blocks: Block | Sequence[Block], *, tie_word_embeddings: bool, **options: Any
) -> ModelConfig:
    """A decoder of these blocks, one a layer.

    Args:
      tie_word_embeddings: whether the output matrix is the embedding where the file does not say.
    """
    count = fields.integer("num_hidden_layers")
    prefix, pattern = fold([blocks] * count if isinstance(blocks, Block) else blocks)
    norm_like = pattern[-1].norm
    return ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        width=fields.integer("hidden_size"),
        num_layers=count,
        pattern=pattern,
        prefix=prefix,
        tie_word_embeddings=fields.flag("tie_word_embeddings", default=tie_word_embeddings),
        final_norm=norm_like,
        context_length=fields.get("max_position_embeddings"),
        **options,
    )


def write_model(config: ModelConfig) -> dict[str, Any]:
    """The fields that `read_model` reads."""
    length = config.context_length
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rms_norm_eps": part(config.final_norm, RMSNorm).epsilon,
        **({} if length is None else {"max_position_embeddings": length}),
    }


# Tensors -------------------------------------------------------------------------------------------


def outer_tensors(config: ModelConfig) -> Iterator[Tensor]:
    """Embeddings and final norm."""
    yield Tensor("model.embed_tokens.weight", ("embedding",), SAME)
    if not config.tie_word_embeddings:
        yield Tensor("lm_head.weight", ("unembedding",), SAME)
    yield from norm("model.norm", "final_norm")


def attention_tensors(theirs: str, ours: str, spec: Attention) -> Iterator[Tensor]:
    """Rules of separate query, key and value projections."""
    for name in ("query", "key", "value"):
        yield from linear(f"{theirs}.{name[0]}_proj", f"{ours}/{name}", bias=spec.bias)
    yield from linear(f"{theirs}.o_proj", f"{ours}/output", bias=spec.output_bias)
    if spec.qk_norm is not None:
        yield from norm(f"{theirs}.q_norm", f"{ours}/query_norm")
        yield from norm(f"{theirs}.k_norm", f"{ours}/key_norm")


def gated_tensors(theirs: str, ours: str, spec: GatedFeedForward) -> Iterator[Tensor]:
    """Separate gate and up projections."""
    for name in ("gate", "up", "down"):
        yield from linear(f"{theirs}.{name}_proj", f"{ours}/{name}", bias=spec.bias)


def expert_tensors(
    theirs: str,
    ours: str,
    spec: MixtureOfExperts,
    *,
    gate: str = "gate_proj",
    up: str = "up_proj",
    down: str = "down_proj",
) -> Iterator[Tensor]:
    """The router, and every expert in its slot."""
    yield weight(f"{theirs}.gate", f"{ours}/router/kernel")
    for expert in range(spec.num_experts):
        for name, their_name in (("gate", gate), ("up", up), ("down", down)):
            yield weight(f"{theirs}.experts.{expert}.{their_name}", f"{ours}/{name}", slot=expert)


def gated_or_expert_tensors(theirs: str, ours: str, spec: Any) -> Iterator[Tensor]:
    """Tensors of a dense layer or of one with experts, under the same name."""
    if isinstance(spec, MixtureOfExperts):
        yield from expert_tensors(theirs, ours, spec)
    else:
        yield from gated_tensors(theirs, ours, part(spec, GatedFeedForward))


def pre_norms(theirs: str, ours: str) -> Iterator[Tensor]:
    """The two norms of a pre-norm block."""
    yield from norm(f"{theirs}.input_layernorm", f"{ours}attention_norm")
    yield from norm(f"{theirs}.post_attention_layernorm", f"{ours}feed_forward_norm")
