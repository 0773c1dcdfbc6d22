"""Ranked answers, and pairs as rankings of two, as the stage of reward models takes them."""

from collections.abc import Sequence

import jax
import numpy as np

from rlhf_jax import distributed
from rlhf_jax.algorithms import reward
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import Sequences
from rlhf_jax.data import packing
from rlhf_jax.data.pipeline import fingerprint
from rlhf_jax.data.rankings import RankingExample, ranking_examples
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.stages import inputs, option_groups
from rlhf_jax.stages.entry import NOTHING, Given


class Rankings:
    """K samples to each number, best first, as padded rows.

    Attributes:
      ranks: of the answers [N, K]; 0 is the best.
      mask: answers there are; in the place of others stands the worst one again.
      margins: of the rows [N]; None where no row has one.
      labels: how probably a pair's first answer is the better one [N]; None for 1.
    """

    def __init__(
        self, examples: Sequence[RankingExample], length: int, labels: np.ndarray | None = None
    ) -> None:
        self.width = max((len(example.ranks) for example in examples), default=2)
        self.labels = labels
        shape = len(examples), self.width
        self.ranks, self.mask = np.zeros(shape, np.int32), np.zeros(shape, np.bool_)
        for row, example in enumerate(examples):
            self.ranks[row, : len(example.ranks)] = example.ranks
            self.mask[row, : len(example.ranks)] = True
        found = any(example.margin is not None for example in examples)
        self.margins = np.array([x.margin or 0.0 for x in examples], np.float32) if found else None
        if examples:
            columns = [[x.answers[min(k, len(x.ranks) - 1)] for x in examples] for k in range(self.width)]
            self._answers = tuple(packing.pad_rows(column, length) for column in columns)

    def __len__(self) -> int:
        return len(self.ranks)

    @property
    def length(self) -> int:
        """Tokens a row."""
        return self._answers[0].tokens.shape[1]

    def fingerprint(self) -> str:
        """Changes with any token, rank, margin or label; of plain pairs it is that of `inputs.Pairs`."""
        order = None if self.width == 2 else (self.ranks, self.mask)
        return fingerprint(jax.tree.leaves((self._answers, self.labels, self.margins, order)))

    def rows(self, indices: np.ndarray) -> tuple[Sequences, ...]:
        """The answers to some of the prompts, K times a sample each."""
        return tuple(jax.tree.map(lambda x: x[indices], side) for side in self._answers)

    def batch(self, indices: np.ndarray, *, on_pairs: bool) -> reward.Pairs | reward.Rankings:
        """Batch of some of the prompts, on the mesh."""
        arrays = self.ranks, self.mask, self.margins, self.labels
        some = [None if array is None else array[indices] for array in arrays]
        answers, (ranks, mask, margins, labels) = distributed.shard_batch((self.rows(indices), some))
        if on_pairs:
            return reward.Pairs(*answers, preference=labels, margin=margins)
        return reward.Rankings(answers, ranks, mask, margins)


def load_rankings(
    options: option_groups.PairOptions,
    tokenizer: Tokenizer,
    seed: int,
    given: Given = NOTHING,
    *,
    on_pairs: bool,
) -> tuple[Rankings, Rankings]:
    """Training rankings and held-out ones, in rows of one length.

    Args:
      on_pairs: the loss takes two answers to each prompt, no more.

    Raises:
      UserError: a row to train on has more answers than the loss takes; as `inputs.soft_labels`.
    """
    train, held_out = inputs.pair_examples(options, tokenizer, seed, ranking_examples, given)
    for example in train if on_pairs else ():
        if len(example.ranks) > 2:
            raise UserError(
                f"{example.where}: the row ranks {len(example.ranks)} answers, and the loss is on pairs: "
                "take --loss all_pairs or plackett_luce"
            )
    labels = inputs.soft_labels(options, [example.preference for example in train])
    sizes = [len(answer.ids) for example in train + held_out for answer in example.answers]
    length = options.max_length or max(sizes)
    return Rankings(train, length, labels), Rankings(held_out, length)
