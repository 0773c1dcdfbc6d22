"""Built-in arithmetic task as a data source of the stages: `arithmetic:LEVEL` where others name a file.

The task is an example that needs no download. No stage has it as a default, and this module is where the
stages for data of any kind get it from.
"""

from typing import Any

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import OptimizerConfig
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.tasks import arithmetic
from rlhf_jax.tasks.arithmetic import (
    Level,
    Split,
    choice_rows,
    demonstration_rows,
    judged_rows,
    preference_rows,
    prompt_rows,
)

__all__ = [
    "FROM_SCRATCH",
    "PREFIX",
    "Level",
    "Split",
    "choice_rows",
    "demonstration_rows",
    "document_texts",
    "find_level",
    "judged_rows",
    "preference_rows",
    "prompt_rows",
    "task_tokenizer",
    "worked_rows",
]

PREFIX = "arithmetic:"
FROM_SCRATCH: dict[str, Any] = {
    "optimizer": OptimizerConfig(schedule="cosine", warmup_steps=20, end_lr_ratio=0.02),
    "learning_rate": 3e-3,
}
"""Options of `sft` for a new model of some hundred thousand parameters on a built-in task."""


def find_level(spec: str) -> Level | None:
    """The level that `arithmetic:LEVEL` names; None for the data of others.

    Raises:
      UserError: there is no such level.
    """
    if not spec.startswith(PREFIX):
        return None
    number = spec.removeprefix(PREFIX)
    if not number.isdecimal() or int(number) not in arithmetic.LEVELS:
        known = ", ".join(f"{PREFIX}{level}" for level in arithmetic.LEVELS)
        raise UserError(f"data {spec!r}: there is no such level: choose one of {known}")
    return arithmetic.LEVELS[int(number)]


def task_tokenizer(spec: str) -> Tokenizer | None:
    """The tokenizer of the task where `spec` names it, else None."""
    return arithmetic.arithmetic_tokenizer() if find_level(spec) else None


def document_texts(level: Level, count: int, seed: int) -> list[str]:
    """Faultless solutions with their problems, as plain text for pre-training."""
    rows: list[dict[str, Any]] = demonstration_rows(level, count, seed, slip_rate=0.0)
    return ["\n".join(message["content"] for message in row["messages"]) for row in rows]


def worked_rows(level: Level, count: int, seed: int) -> list[dict[str, Any]]:
    """Problems with faultless solutions, as `prompt` and `answer`, for few-shot prompts."""
    rows = demonstration_rows(level, count, seed, slip_rate=0)
    texts = [[message["content"] for message in row["messages"]] for row in rows]
    return [{"prompt": asked, "answer": said} for asked, said in texts]
