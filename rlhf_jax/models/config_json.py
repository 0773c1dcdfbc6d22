"""Model configurations as JSON: every part is an object whose `kind` is the name of its dataclass."""

import dataclasses
from typing import Any

from rlhf_jax.core.errors import UserError
from rlhf_jax.models import adapters, config as parts, positions
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.vision import config as vision

KINDS = (
    positions.LinearScaling,
    positions.Llama3Scaling,
    positions.YarnScaling,
    positions.Rope,
    positions.Alibi,
    parts.RMSNorm,
    parts.LayerNorm,
    parts.Attention,
    parts.LatentAttention,
    parts.Recurrence,
    parts.GatedFeedForward,
    parts.FeedForward,
    parts.SoftmaxRouter,
    parts.SigmoidRouter,
    parts.MixtureOfExperts,
    parts.Block,
    vision.LinearProjector,
    vision.MLPProjector,
    vision.PixelShuffle,
    vision.VisionConfig,
    ModelConfig,
    adapters.LoRA,
    adapters.DoRA,
    adapters.PiSSA,
    adapters.AdaLoRA,
    adapters.PrefixTuning,
    adapters.PromptTuning,
    adapters.Bottleneck,
    adapters.Partial,
    adapters.Quantization,
)
_KINDS = {kind.__name__: kind for kind in KINDS}
RENAMED_KINDS = {"Quantisation": "Quantization"}
RENAMED_FIELDS = {
    "ModelConfig": {"tied_embeddings": "tie_word_embeddings", "further_depth": "mtp_depth"},
    "GatedFeedForward": {"hidden_dim": "intermediate_size"},
    "FeedForward": {"hidden_dim": "intermediate_size"},
    "Recurrence": {"hidden_dim": "hidden_size"},
    "LatentAttention": {
        "query_rank": "q_lora_rank",
        "latent_dim": "kv_lora_rank",
        "nope_dim": "qk_nope_head_dim",
        "rope_dim": "qk_rope_head_dim",
        "value_dim": "v_head_dim",
    },
    "SoftmaxRouter": {"renormalise": "renormalize"},
    "SigmoidRouter": {"renormalise": "renormalize"},
    "LoRA": {"rank_stabilised": "rank_stabilized"},
    "DoRA": {"rank_stabilised": "rank_stabilized"},
    "PiSSA": {"rank_stabilised": "rank_stabilized"},
}
"""Names of kinds and fields in files that were written before they had those of today."""


def config_to_dict(config: ModelConfig) -> dict[str, Any]:
    """A JSON-ready dictionary; `config_from_dict` is its inverse."""
    return _to_json(config)


def config_from_dict(data: dict[str, Any]) -> ModelConfig:
    """The config that `config_to_dict` wrote.

    Raises:
      UserError: if fields are missing or unknown.
    """
    try:
        config = _from_json(data)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"The model configuration cannot be read ({error}): "
            "it was written by another version or edited by hand."
        ) from error
    if not isinstance(config, ModelConfig):
        raise UserError("The model configuration cannot be read: its outermost `kind` is not ModelConfig.")
    return config


def adapter_to_dict(adapter: adapters.Adapter | adapters.Quantization | None) -> dict[str, Any] | None:
    """A JSON-ready description; `adapter_from_dict` is its inverse."""
    return _to_json(adapter)


def adapter_from_dict(data: Any) -> Any:
    """The adapter or quantisation that `adapter_to_dict` wrote.

    Raises:
      UserError: if fields are missing or unknown.
    """
    try:
        return _from_json(data)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"The adapter's description cannot be read ({error}): "
            "it was written by another version or edited by hand."
        ) from error


def _to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = {f.name: _to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"kind": type(value).__name__, **fields}
    return [_to_json(item) for item in value] if isinstance(value, tuple) else value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        kind: str = value["kind"]
        kind = RENAMED_KINDS.get(kind, kind)
        names = RENAMED_FIELDS.get(kind, {})
        fields = {names.get(str(k), str(k)): _from_json(x) for k, x in value.items() if k != "kind"}
        return _KINDS[kind](**fields)
    return tuple(map(_from_json, value)) if isinstance(value, list | tuple) else value


def check_same_architecture(config: ModelConfig, other: ModelConfig, where: str) -> None:
    """Compares the architecture `other`, read from `where`, with that of this run.

    Raises:
      UserError: they differ; names the first field that does.
    """
    ours, theirs = config_to_dict(config), config_to_dict(other)
    for name, value in ours.items():
        if value != theirs.get(name) and name != "context_length":  # which bounds nothing
            inner = f" {theirs.get(name)}, not {value}" if isinstance(value, str | int) else ""
            raise UserError(
                f"{where}: its model is of another architecture ({name}{inner}): "
                "give one with the architecture of this run, or this run the options of that"
            )
