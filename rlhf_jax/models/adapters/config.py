"""Kinds of parameter-efficient fine-tuning, as frozen dataclasses.

All but `Partial` add leaves of their own to the parameters, beside those they adapt; what a layer does with
such leaves is in `adapters.linear`, `models.attention` and `models.decoder`, and depends on which leaves are
there alone. A tree without them is the base.
"""

import dataclasses
import re
from typing import Literal, TypeAlias

from rlhf_jax.core.errors import UserError

Format = Literal["int8", "int4", "nf4", "fp8", "gguf"]


@dataclasses.dataclass(frozen=True)
class LoRA:
    """W + (alpha / r) A B with A random and B zero (Hu et al. 2022, section 4.1).

    Attributes:
      rank: r.
      alpha: numerator of the scale.
      targets: which linear layers, as a regular expression that their whole path must match.
      rank_stabilized: alpha / sqrt(r) instead, so that large ranks learn as fast (Kalajdzievski 2023).
    """

    rank: int = 8
    alpha: float = 16.0
    targets: str = ".*"
    rank_stabilized: bool = False

    def __post_init__(self) -> None:
        check_rank(self.rank, "rank")
        check_pattern(self.targets, "targets")

    @property
    def scale(self) -> float:
        """Scaling of the product of the two factors."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)


@dataclasses.dataclass(frozen=True)
class DoRA(LoRA):
    """The columns of W + (alpha / r) A B, each brought to a length of its own that is trained
    (Liu et al. 2024, eq. 5); no gradient flows through the lengths before (section 4.3).
    """


@dataclasses.dataclass(frozen=True)
class PiSSA(LoRA):
    """LoRA that starts from the r largest singular values of each matrix, while the base keeps the rest
    (Meng et al. 2024, section 3).

    The rest is not stored in the place of W: the first factors are kept, frozen, and their product is taken
    away, W + s (A B - A_0 B_0). That is the same function, leaves the base to others who share it, and
    changes no logit at the start.
    """


@dataclasses.dataclass(frozen=True)
class AdaLoRA:
    """W + s A diag(l) B whose ranks are spent where they matter (Zhang et al. 2023).

    Attributes:
      rank: of every matrix at the start.
      target_rank: average rank at the end.
      alpha: numerator of the scale alpha / rank.
      targets: which linear layers, as a regular expression that their whole path must match.
      total_steps: optimizer steps of the run.
      warmup_steps: steps before the budget begins to fall.
      final_steps: steps at the end in which it stays at its lowest.
      orthogonality: weight of |A' A - 1|^2 + |B B' - 1|^2 in the loss.
      smoothing: decay of the averages of importance and of its uncertainty.
    """

    rank: int = 12
    target_rank: int = 8
    alpha: float = 16.0
    targets: str = ".*"
    total_steps: int = 1000
    warmup_steps: int = 100
    final_steps: int = 300
    orthogonality: float = 0.1
    smoothing: float = 0.85

    def __post_init__(self) -> None:
        check_rank(self.target_rank, "target_rank")
        check_pattern(self.targets, "targets")
        if self.target_rank > self.rank:
            raise UserError(
                f"adapter: target_rank {self.target_rank} is above rank {self.rank}, from which it falls: "
                "raise rank or lower target_rank"
            )
        if self.warmup_steps + self.final_steps >= self.total_steps:
            raise UserError(
                f"adapter: warmup_steps {self.warmup_steps} and final_steps {self.final_steps} leave none of "
                f"{self.total_steps} optimizer steps for the ranks to fall: lower them"
            )

    @property
    def scale(self) -> float:
        """Scaling of the product of the factors."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class PrefixTuning:
    """Trained keys and values that every query of every attention layer sees (Li & Liang 2021), in a softmax
    of their own and behind a gate that starts closed (LLaMA-Adapter, Zhang et al. 2023, eq. 6 to 8), so that
    the untrained prefix changes nothing.

    Attributes:
      length: how many.
    """

    length: int = 16

    def __post_init__(self) -> None:
        check_rank(self.length, "length")


@dataclasses.dataclass(frozen=True)
class PromptTuning:
    """Trained embeddings that stand before every sample (Lester et al. 2021); they start as those of random
    tokens, so this is the one kind that changes the logits at once.

    Attributes:
      length: how many.
    """

    length: int = 16

    def __post_init__(self) -> None:
        check_rank(self.length, "length")


@dataclasses.dataclass(frozen=True)
class Bottleneck:
    """y + W_up gelu(W_down y) behind the layers that write to the residual stream (Houlsby et al. 2019,
    section 2.1); W_up starts at zero.

    Attributes:
      width: of the bottleneck.
      targets: behind which linear layers, as a regular expression that their whole path must match.
    """

    width: int = 16
    targets: str = ".*(attention/output|feed_forward/down)"

    def __post_init__(self) -> None:
        check_rank(self.width, "width")
        check_pattern(self.targets, "targets")


@dataclasses.dataclass(frozen=True)
class Partial:
    """Some of the model's own parameters are trained, the others not.

    Attributes:
      train: which, as a regular expression that their whole name must match: `layer_1/.*|final_norm.*`.
    """

    train: str

    def __post_init__(self) -> None:
        check_pattern(self.train, "train")


Adapter: TypeAlias = LoRA | DoRA | PiSSA | AdaLoRA | PrefixTuning | PromptTuning | Bottleneck | Partial


@dataclasses.dataclass(frozen=True)
class Quantization:
    """Kernels of linear layers in few bits, the parts of a column with scales of their own.

    Attributes:
      format: `int8` and `fp8` (e4m3) have one scale a column; `int4` and `nf4` (quantiles of a normal
        distribution, Dettmers et al. 2023, section 3) one a block; `gguf` are the blocks of the file that the
        base was read from (`models.gguf_blocks`).
      block: values of a column that share a scale, where they do.
    """

    format: Format
    block: int = 64

    def __post_init__(self) -> None:
        check_rank(self.block, "block")


def check_rank(value: int, name: str) -> None:
    """Raises: UserError where a number is below 1."""
    if value < 1:
        raise UserError(f"adapter: {name} {value} is not positive: give at least 1")


def check_pattern(pattern: str, name: str) -> None:
    """Raises: UserError where a pattern is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"adapter: {name} {pattern!r} is no regular expression ({error}): mend it") from error
