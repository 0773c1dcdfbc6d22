"""Tasks as arrays, so that a whole run (prompt, answer, score, update) can be traced from end to end.

Text goes through the tokenizer and the chat template once, when the tables of prompts and demonstrations are
made; what is left to trace is to pick rows of them, and to score tokens.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Int, PRNGKeyArray, Sequences, ToolFn
from rlhf_jax.data.examples import PromptExample, prompt_examples, supervised_examples
from rlhf_jax.data.packing import left_pad, pad_rows
from rlhf_jax.data.sources import Row
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.tasks import arithmetic, arithmetic_arrays

GoldRewardFn = Callable[[Int[Array, "B T"], Bool[Array, "B T"], Any], Float[Array, " B"]]


@pytree_dataclass
class Prompts:
    """Prompts, left-padded, and what their answers are judged by.

    Attributes:
      tokens: chat prompts.
      mask: which of the tokens are theirs.
      truth: arrays [N, ...] that the task's score function understands.
    """

    tokens: Int[Array, "N P"]
    mask: Bool[Array, "N P"]
    truth: Any

    def take(self, indices: Int[Array, " B"]) -> "Prompts":
        """Rows by index, which may be traced."""
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[indices], self)


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A task together with a tokenizer. Its arrays are constants of the program that uses them.

    Attributes:
      name: for tables and messages.
      train: prompts to learn from.
      heldout: other prompts, never trained on.
      demonstrations: conversations of training prompts, to start a policy from; rows may err.
      score: (tokens, mask of the completion, truth) -> [B], in [0, `best`]; works on whole sequences too.
      best: the highest score there is.
      completion_length: tokens of the longest answer, the end-of-sequence token included.
      tokenizer: how it is written.
      tool_fn: a tool that writes into answers (`generation.generate`), whose tokens are out of the masks of
        demonstrations and of what `score` gets; None where there is none.
    """

    name: str
    train: Prompts
    heldout: Prompts
    demonstrations: Sequences
    score: GoldRewardFn
    best: float
    completion_length: int
    tokenizer: Tokenizer
    tool_fn: ToolFn | None = None

    def draw(self, key: PRNGKeyArray, count: int) -> Prompts:
        """Training prompts, drawn uniformly with replacement."""
        return self.train.take(jax.random.randint(key, (count,), 0, len(self.train.tokens)))


def tabulate(
    name: str,
    tokenizer: Tokenizer,
    *,
    train_rows: Sequence[dict[str, Any]],
    heldout_rows: Sequence[dict[str, Any]],
    demonstration_rows: Sequence[dict[str, Any]],
    truth_fn: Callable[[dict[str, Any]], Any],
    score: GoldRewardFn,
    best: float,
    completion_length: int,
) -> Task:
    """A task from rows as data files have them (`prompt`; `messages` in demonstrations).

    Args:
      truth_fn: what `score` needs to know of a row, as arrays.
    """
    longest = 10**6  # rows are ours: none is too long

    def examples(rows: Sequence[dict[str, Any]]) -> list[PromptExample]:
        placed = [Row(row, f"{name}:{number}") for number, row in enumerate(rows)]
        return prompt_examples(placed, tokenizer, max_length=longest)

    parts = [examples(train_rows), examples(heldout_rows)]
    width = max(len(example.ids) for part in parts for example in part)

    def table(part: Sequence[PromptExample]) -> Prompts:
        tokens, mask = left_pad([example.ids for example in part], width, pad_id=tokenizer.pad_id)
        truths = [truth_fn(example.fields) for example in part]
        truth = jax.tree.map(lambda *leaves: np.stack(leaves), *truths)
        return Prompts(tokens, mask, truth)  # pyright: ignore[reportArgumentType] (NumPy until used)

    placed = [Row(row, f"{name}:{number}") for number, row in enumerate(demonstration_rows)]
    conversations = supervised_examples(placed, tokenizer, max_length=longest)
    demonstrations = pad_rows(conversations, max(len(example.ids) for example in conversations))
    return Task(
        name=name,
        train=table(parts[0]),
        heldout=table(parts[1]),
        demonstrations=demonstrations,
        score=score,
        best=best,
        completion_length=completion_length,
        tokenizer=tokenizer,
    )


def arithmetic_task(
    level: arithmetic.Level,
    *,
    train: int,
    heldout: int,
    demonstrations: int,
    slip_rate: float,
    seed: int = 0,
    name: str = "arithmetic",
) -> Task:
    """The embedded arithmetic task (`data.arithmetic`); the score is 1 for the right answer, else 0."""
    tokenizer = arithmetic.arithmetic_tokenizer()
    arrays = arithmetic_arrays.make_task(level, tokenizer)
    return tabulate(
        name,
        tokenizer,
        train_rows=arithmetic.prompt_rows(level, "train", train, seed),
        heldout_rows=arithmetic.prompt_rows(level, "heldout", heldout, seed),
        demonstration_rows=arithmetic.demonstration_rows(level, demonstrations, seed, slip_rate=slip_rate),
        truth_fn=lambda row: np.int32(row["answer"]),
        score=arrays.verify,
        best=1.0,
        completion_length=arrays.completion_length,
    )


def first_tokens(
    tokens: Int[Array, "B T"], mask: Bool[Array, "B T"], count: int, *, fill: int
) -> Int[Array, "B N"]:
    """The first `count` tokens under a mask, `fill` beyond its end."""
    order = jnp.argsort(~mask, axis=1, stable=True)[:, :count]
    chosen = jnp.take_along_axis(tokens, order, axis=1)
    return jnp.where(jnp.take_along_axis(mask, order, axis=1), chosen, fill)
