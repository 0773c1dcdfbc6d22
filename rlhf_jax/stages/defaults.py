"""Published settings of each method: what its options are where they are None.

`docs/guide/defaults.md` prints the table. Learning rates are those of full fine-tuning, and of an adapter
(LoRA and its relatives), which needs about ten times as much (Schulman et al. 2025, "LoRA without regret").
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from rlhf_jax.core.train_state import OptimizerConfig

Options = TypeVar("Options")

LINEAR = OptimizerConfig(schedule="linear", b2=0.999)
"""AdamW as in Hugging Face's `TrainingArguments`: linear decay to 0, here after 3 % of warm-up."""
COSINE = OptimizerConfig(schedule="cosine", b2=0.999)
"""The same with cosine decay, as in the alignment handbook."""


@dataclasses.dataclass(frozen=True)
class Published:
    """Settings of a method as published.

    Attributes:
      learning_rate: of full fine-tuning, at its peak.
      adapter_learning_rate: of an adapter; None for stages that train none.
      source: where the numbers are from.
      beta: strength of the constraint, or scale of the log-probabilities; None for methods without one.
      loss_params: further numbers of the loss, by its own keywords; those that are not here are the defaults
        of the loss.
    """

    learning_rate: float
    adapter_learning_rate: float | None
    source: str
    beta: float | None = None
    loss_params: Mapping[str, float] = dataclasses.field(default_factory=dict)


PUBLISHED = {
    "pretrain": Published(3e-4, None, "Llama 7B (Touvron et al. 2023, table 2)"),
    "sft": Published(2e-5, 2e-4, "TRL `SFTConfig`, `examples/scripts/sft.py`"),
    "reward_model": Published(1e-5, 1e-4, "TRL `RewardConfig`, `examples/scripts/reward_modeling.py`"),
    "process_reward": Published(1e-5, None, "TRL `PRMConfig`"),
    "distill": Published(2e-5, 2e-4, "TRL `GKDConfig`"),
    "dpo": Published(1e-6, 1e-5, "Rafailov et al. 2023, appendix B; TRL `DPOConfig`", beta=0.1),
    "ipo": Published(1e-6, 1e-5, "TRL `DPOConfig(loss_type='ipo')`; tau in Azar et al. 2024", beta=0.1),
    "robust": Published(
        1e-6,
        1e-5,
        "Chowdhury et al. 2024, section 6 and appendix B; learning rates as DPO",
        beta=0.01,
        loss_params={"label_smoothing": 0.1},
    ),
    "hinge": Published(1e-6, 1e-5, "TRL `DPOConfig(loss_type='hinge')`", beta=0.1),
    "exo": Published(
        1e-6,
        1e-5,
        "Ji et al. 2024, appendix B; label smoothing of TRL `DPOConfig(loss_type='exo_pair')`",
        beta=0.1,
        loss_params={"label_smoothing": 1e-3},
    ),
    "nca": Published(5e-6, 5e-5, "Chen et al. 2024, appendix C", beta=0.01),
    "bco_pair": Published(5e-7, 5e-6, "Jung et al. 2024, appendix C", beta=0.01),
    "aot": Published(1e-6, 1e-5, "TRL `DPOConfig(loss_type='aot')`", beta=0.1),
    "aot_unpaired": Published(1e-6, 1e-5, "TRL `DPOConfig(loss_type='aot_unpaired')`", beta=0.1),
    "apo_zero": Published(2e-7, 2e-6, "D'Oosterlinck et al. 2024, section 5.2 and appendix B.1", beta=0.1),
    "apo_down": Published(2e-7, 2e-6, "D'Oosterlinck et al. 2024, section 5.2 and appendix B.1", beta=0.1),
    "discopop": Published(
        5e-7,
        5e-6,
        "Lu et al. 2024, appendices B.1 and E",
        beta=0.05,
        loss_params={"tau": 0.05},
    ),
    "kto": Published(1e-6, 1e-5, "Ethayarajh et al. 2024; TRL `KTOConfig`", beta=0.1),
    "bco": Published(5e-7, 5e-6, "TRL `BCOConfig`", beta=0.1),
    "orpo": Published(8e-6, 8e-5, "Hong et al. 2024; TRL `ORPOConfig`, `examples/scripts/orpo.py`", beta=0.1),
    "cpo": Published(8e-6, 8e-5, "Xu et al. 2024; TRL `CPOConfig`, `examples/scripts/cpo.py`", beta=0.1),
    "simpo": Published(6e-7, 6e-6, "Meng et al. 2024, Llama-3-Base 8B", beta=2.0, loss_params={"gamma": 1.0}),
    "alpha_po": Published(
        7e-7,
        7e-6,
        "Gupta et al. 2025, table 3, Mistral-Instruct",
        beta=2.5,
        loss_params={"gamma": 0.1, "alpha": 0.25},
    ),
    "sppo": Published(5e-7, 5e-6, "Wu et al. 2024: eta = 1 / beta = 1000", beta=1e-3),
    "length_normalized": Published(5e-7, 5e-6, "Tülu 3 8B (Lambert et al. 2024)", beta=5.0),
    "online_dpo": Published(5e-7, 5e-6, "Guo et al. 2024; TRL `OnlineDPOConfig`", beta=0.1),
    "xpo": Published(5e-7, 5e-6, "Xie et al. 2024; TRL `XPOConfig`", beta=0.1, loss_params={"alpha": 1e-5}),
    "nash_md": Published(5e-7, 5e-6, "Munos et al. 2024; TRL `NashMDConfig`", beta=0.1),
    "ppo": Published(3e-6, 3e-5, "TRL `PPOConfig`, `examples/scripts/ppo/ppo.py`"),
    "grpo": Published(1e-6, 1e-5, "Shao et al. 2024, section 4.2; TRL `GRPOConfig`"),
}
"""By the name of the stage, of the loss, or of the method."""


def fill_published(options: Options, method: str, otherwise: str = "") -> Options:
    """The options with what is published of the method in the place of None.

    Args:
      method: a key of `PUBLISHED`.
      otherwise: the key for a method that is not in the table, such as a loss of the user's own.
    """
    found = PUBLISHED.get(method) or PUBLISHED[otherwise]
    adapter: Any = getattr(options, "adapter", None)
    is_adapter = adapter is not None and adapter.is_adapter
    rate = found.adapter_learning_rate if is_adapter else found.learning_rate
    values = {"learning_rate": rate, "beta": found.beta}
    missing = {name: x for name, x in values.items() if getattr(options, name, 0) is None and x is not None}
    return dataclasses.replace(options, **missing)  # pyright: ignore[reportArgumentType]
