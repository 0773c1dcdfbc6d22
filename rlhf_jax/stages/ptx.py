"""Text beside reinforcement learning (PPO-ptx): what stays likely while the policy learns something else."""

import dataclasses
from typing import Any

import jax

from rlhf_jax import distributed
from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import Sequences
from rlhf_jax.data import documents, packing
from rlhf_jax.data.examples import supervised_examples
from rlhf_jax.data.pipeline import BatchSampler, fingerprint
from rlhf_jax.data.sources import Row
from rlhf_jax.models import Policy
from rlhf_jax.stages import edges, embedded, inputs
from rlhf_jax.stages.option_groups import PtxOptions


@dataclasses.dataclass(frozen=True)
class PtxText:
    """Rows of text, and which of them make up each step's batch: a function of its number alone.

    Attributes:
      rows: all of them, of NumPy; `mask` marks what is predicted.
      sampler: of the batches.
    """

    rows: Sequences
    sampler: BatchSampler

    @property
    def length(self) -> int:
        """Tokens a row."""
        return self.rows.tokens.shape[1]

    def batch(self, number: int) -> Sequences:
        """Text of a step, on the mesh."""
        indices = edges.local_indices(self.sampler, number)
        return distributed.shard_batch(jax.tree.map(lambda x: x[indices], self.rows))

    def fingerprint(self) -> str:
        """Changes with any token of the text, and with what counts of it."""
        return fingerprint(jax.tree.leaves(self.rows))


def load_text(
    options: PtxOptions, model: Policy, *, answers: int, mini_batches: int, seed: int, given: Any = None
) -> PtxText | None:
    """Plain text in full rows, or conversations, several of them in a row where the model takes that; None
    where there is none.

    Args:
      answers: in a mini-batch, beside which there are as many rows where the options do not say more.
      mini_batches: optimizer steps in a step of the run.
      given: rows that were given as an object, and take the place of `ptx_data`.

    Raises:
      UserError: there is nothing to read, a row is neither, or there are too few rows for a step.
    """
    if given is None and not options.ptx_data:
        return None
    rows = _lay_out(options.ptx_data, model, options.ptx_max_length, seed, given)
    size = mini_batches * (options.ptx_batch_size or answers)
    if size > len(rows.tokens):
        raise UserError(
            f"a step takes {size} rows of --ptx-data, which has {len(rows.tokens)} of --ptx-max-length "
            f"{options.ptx_max_length}: lower --ptx-batch-size or --ptx-max-length, or give more text"
        )
    return PtxText(rows, BatchSampler(len(rows.tokens), size, seed))


def _lay_out(spec: str, model: Policy, length: int, seed: int, given: Any) -> Sequences:
    if given is None and (spec.lower().endswith(".txt") or files.is_folder(spec)):
        return _full_rows(documents.read_documents(spec), model, length)

    def make(level: embedded.Level) -> list[dict[str, Any]]:
        return embedded.demonstration_rows(level, 2_000, seed, split="train", slip_rate=0.0)

    rows: list[Row] = inputs.load_rows(spec, make, given)
    if all("text" in row.fields for row in rows):
        return _full_rows(documents.documents_of(rows), model, length)
    examples = supervised_examples(rows, model.tokenizer, max_length=length, overlength="drop")
    lay_out = packing.pack_rows if model.takes_packed_rows else packing.pad_rows
    return lay_out(examples, length)


def _full_rows(texts: list[documents.Document], model: Policy, length: int) -> Sequences:
    return documents.full_rows(documents.token_runs(texts, model.tokenizer), length)
