"""Text beside reinforcement learning (PPO-ptx): what stays likely while the policy learns something else."""

import dataclasses
from typing import Any

import jax

from rlhf_jax import distributed
from rlhf_jax.core import files
from rlhf_jax.core.types import Sequences
from rlhf_jax.data import documents, packing
from rlhf_jax.data.examples import supervised_examples
from rlhf_jax.data.pipeline import BatchSampler, fingerprint
from rlhf_jax.data.sources import Row
from rlhf_jax.models import Policy
from rlhf_jax.stages import edges, embedded, inputs


@dataclasses.dataclass(frozen=True)
class PtxText:
    """Rows of text, and which of them make up each step's batch: a function of its number alone.

    Attributes:
      rows: all of them, of NumPy; `mask` marks what is predicted.
      sampler: of the batches.
    """

    rows: Sequences
    sampler: BatchSampler

    def batch(self, number: int) -> Sequences:
        """Text of a step, on the mesh."""
        indices = edges.local_indices(self.sampler, number)
        return distributed.shard_batch(jax.tree.map(lambda x: x[indices], self.rows))

    def fingerprint(self) -> str:
        """Changes with any token of the text, and with what counts of it."""
        return fingerprint(jax.tree.leaves(self.rows))


def load_text(
    spec: str, model: Policy, *, length: int, batch_size: int, seed: int, given: Any = None
) -> PtxText:
    """Plain text in full rows, or conversations, several of them in a row where the model takes that.

    Args:
      spec: a .txt file, a folder of them, rows with a field `text` or with conversations as `rlhf sft` takes
        them (a path or tfds:NAME[:SPLIT]), or arithmetic:LEVEL.
      length: tokens a row; longer conversations are dropped and counted.
      batch_size: rows a step.
      given: rows that were given as an object, and take the place of `spec`.

    Raises:
      UserError: there is nothing to read, a row is neither, or there are fewer rows than `batch_size`.
    """
    rows = _lay_out(spec, model, length, seed, given)
    return PtxText(rows, BatchSampler(len(rows.tokens), batch_size, seed))


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
