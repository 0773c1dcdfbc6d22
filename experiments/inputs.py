"""Preference pairs and prompts, from the embedded task or by path, as the scripts take them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import common
import jax
import numpy as np

from rlhf_jax.core.types import Params, Sequences
from rlhf_jax.data import arithmetic, packing
from rlhf_jax.data.examples import PreferenceExample, PromptExample, preference_examples, prompt_examples
from rlhf_jax.data.pipeline import fingerprint
from rlhf_jax.data.sources import Row, read_rows
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.training.rollouts import Evaluation, make_evaluate_fn, make_reward_fn
from rlhf_jax.training.runs import Model
from rlhf_jax.training.samples import Sample, make_samples_fn

UNBOUNDED = 1 << 30


def load_rows(spec: str, make_rows: Callable[[arithmetic.Level], list[dict[str, Any]]]) -> list[Row]:
    """Rows of a file, of a tfds data set, or of the embedded task.

    Args:
      spec: a path, `tfds:NAME[:SPLIT]` or `arithmetic:LEVEL`.
      make_rows: makes the rows of a level of the embedded task.
    """
    level = common.embedded_level(spec)
    if level is None:
        return read_rows(spec)
    return [Row(row, f"{spec}:{number}") for number, row in enumerate(make_rows(level), start=1)]


def texts(rows: Sequence[Row]) -> list[str]:
    """Every text in the rows, messages included, for a tokenizer to learn from."""

    def find(value: Any) -> list[str]:
        if isinstance(value, list | dict):
            inner = value.values() if isinstance(value, dict) else value
            return [text for item in inner for text in find(item)]
        return [value] if isinstance(value, str) else []

    return [text for row in rows for text in find(row.fields)]


# Preference pairs ----------------------------------------------------------------------------------


class Pairs:
    """Preference pairs as padded rows; `rows(indices)` gives (chosen, rejected)."""

    def __init__(self, examples: Sequence[PreferenceExample], length: int) -> None:
        self._count = len(examples)
        if examples:
            self._chosen = packing.pad_rows([example.chosen for example in examples], length)
            self._rejected = packing.pad_rows([example.rejected for example in examples], length)

    def __len__(self) -> int:
        return self._count

    def fingerprint(self) -> str:
        """Changes with any token of any pair."""
        return fingerprint(jax.tree.leaves((self._chosen, self._rejected)))

    def rows(self, indices: np.ndarray) -> tuple[Sequences, Sequences]:
        """Some of the pairs."""
        chosen, rejected = (
            jax.tree.map(lambda x: x[indices], side) for side in (self._chosen, self._rejected)
        )
        return chosen, rejected


def load_pairs(options: common.PairOptions, tokenizer: Tokenizer, seed: int) -> tuple[Pairs, Pairs]:
    """Training pairs and held-out pairs, in rows of one length."""

    def examples(spec: str, split: arithmetic.Split, count: int) -> list[PreferenceExample]:
        rows = load_rows(spec, lambda level: arithmetic.preference_rows(level, split, count, seed))
        longest = options.max_length or UNBOUNDED
        return preference_examples(rows, tokenizer, max_length=longest, too_long=options.too_long)

    train, held_out = examples(options.data, "train", options.pair_count), []
    if options.eval_data or common.embedded_level(options.data):
        held_out = examples(options.eval_data or options.data, "heldout", options.eval_count)
        held_out = held_out[: options.eval_count]
    sizes = [len(side.ids) for pair in train + held_out for side in (pair.chosen, pair.rejected)]
    length = options.max_length or max(sizes)
    return Pairs(train, length), Pairs(held_out, length)


def parts(count: int, size: int) -> list[np.ndarray]:
    """Indices 0 ... count - 1 in parts of one size; the last repeats the last index to fill up."""
    starts = range(0, count, size)
    return [np.minimum(np.arange(start, start + size), count - 1) for start in starts]


# Prompts -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts to train on, and how to look at what comes of it.

    Attributes:
      train: the prompts.
      evaluate: (params, reference) -> Evaluation on held-out prompts; None where there are none.
      answer: params -> most likely answers to a few prompts, held-out ones where there are any.
    """

    train: list[PromptExample]
    evaluate: Callable[[Params, Params | None], Evaluation] | None
    answer: Callable[[Params], list[Sample]]

    def __len__(self) -> int:
        return len(self.train)

    def fingerprint(self) -> str:
        """Changes with any token of any prompt to train on."""
        return fingerprint(np.asarray(prompt.ids) for prompt in self.train)

    @property
    def length(self) -> int:
        """Tokens of the longest prompt to train on."""
        return max(len(prompt.ids) for prompt in self.train)


def load_prompts(options: common.PromptOptions, model: Model, rewards: Sequence[str], seed: int) -> Prompts:
    """The prompts that the options name.

    Args:
      rewards: what the answers are worth where `options.eval_reward` says nothing else.
    """

    def examples(spec: str, split: arithmetic.Split, count: int) -> list[PromptExample]:
        rows = load_rows(spec, lambda level: arithmetic.prompt_rows(level, split, count, seed))
        longest = options.max_prompt_length or UNBOUNDED
        return prompt_examples(rows, model.tokenizer, max_length=longest, too_long=options.too_long)

    train, held_out = examples(options.data, "train", options.prompt_count), []
    if options.eval_data or common.embedded_level(options.data):
        held_out = examples(options.eval_data or options.data, "heldout", options.eval_count)
        held_out = held_out[: options.eval_count]
    reward_fn = make_reward_fn([options.eval_reward] if options.eval_reward else rewards, model.tokenizer)
    look = {"reward_fn": reward_fn, "max_new_tokens": options.max_new_tokens}
    shown = (held_out or train)[: options.samples]
    return Prompts(
        train,
        make_evaluate_fn(model.config, model.tokenizer, held_out, **look) if held_out else None,
        make_samples_fn(model.config, model.tokenizer, shown, **look),
    )


def before_and_after(stage: str, before: Sequence[Sample], after: Sequence[Sample]) -> list[dict[str, Any]]:
    """Entries of samples.json."""
    return [
        {
            "prompt": first.prompt,
            "answer": first.answer,
            "completions": {"before": first.completion(), stage: second.completion()},
        }
        for first, second in zip(before, after, strict=True)
    ]
