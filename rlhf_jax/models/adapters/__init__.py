"""Parameter-efficient fine-tuning: adapter leaves inside the parameters of a decoder."""

from rlhf_jax.models.adapters.building import (
    can_merge,
    init_adapter,
    is_adapter_leaf,
    is_trained,
    merge_adapter,
    without_adapter,
)
from rlhf_jax.models.adapters.config import (
    AdaLoRA,
    Adapter,
    Bottleneck,
    DoRA,
    Format,
    LoRA,
    Partial,
    PiSSA,
    PrefixTuning,
    PromptTuning,
    Quantization,
)
from rlhf_jax.models.adapters.describing import trainable_table
from rlhf_jax.models.adapters.importance import BudgetState, budget_at, with_rank_budget
from rlhf_jax.models.adapters.quantization import dequantize, quantize

__all__ = [
    "AdaLoRA",
    "Adapter",
    "Bottleneck",
    "BudgetState",
    "DoRA",
    "Format",
    "LoRA",
    "Partial",
    "PiSSA",
    "PrefixTuning",
    "PromptTuning",
    "Quantization",
    "budget_at",
    "can_merge",
    "dequantize",
    "init_adapter",
    "is_adapter_leaf",
    "is_trained",
    "merge_adapter",
    "quantize",
    "trainable_table",
    "with_rank_budget",
    "without_adapter",
]
