"""A decoder with a scalar head and how to use it: reward models, process reward models, critics."""

import dataclasses
from typing import ClassVar

from rlhf_jax.core.types import Params
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.policy import Policy, Source


@dataclasses.dataclass(frozen=True, eq=False)
class ScalarModel:
    """A decoder with a scalar head: a reward model, or a model of process rewards.

    Attributes:
      body: the decoder.
      head: of `Policy.init_scalar_head`.
    """

    MADE_BY: ClassVar[str] = "the reward_model of what rlhf_jax.reward_model() returns"

    body: Policy
    head: Params

    @property
    def params(self) -> Params:
        """Parameters as the functions of `body.make_reward_fn()` and the like take them."""
        return {"decoder": self.body.params, "head": self.head}

    @property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of the decoder."""
        return self.body.tokenizer

    @property
    def source(self) -> Source | None:
        """Source of the decoder."""
        return self.body.source

    @property
    def config(self) -> ModelConfig | None:
        """Configuration of the decoder."""
        return self.body.config

    @property
    def architecture(self) -> ModelConfig:
        """Architecture of the decoder, where it is one of ours: `Policy.architecture`."""
        return self.body.architecture
