"""Replay of groups: recent ones whose rewards differ are learned from again.

Experience replay (Lin 1992) for the GRPO family. A group keeps its advantages, which compare its own answers,
and the log-probs under the policy that wrote it, so that ratio and clip of the surrogate are those of answers
that are so old. RLEP (Zhang et al. 2025, arXiv 2507.07451) replays right answers of an earlier run; here
whole groups of this run are.
"""

import dataclasses

import jax
import jax.numpy as jnp

from rlhf_jax.algorithms.grpo_config import Batch, Replay
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import Array, Bool, Int, Metrics, PRNGKeyArray, Sequences
from rlhf_jax.kernels.prepare import cleaned_constant


def init_replay(*, capacity: int, rows: int, length: int, experts: tuple[int, ...] | None = None) -> Replay:
    """An empty buffer.

    Args:
      capacity: groups that are kept, the latest.
      rows: answers of a group that are learned from.
      length: tokens of a row, the prompt's included.
      experts: (R, k) of `Sequences.experts`, where the rollouts record them; they are replayed as well.
    """
    shape = (capacity * rows, length)
    nothing, none = jnp.zeros(shape, jnp.float32), jnp.zeros(shape, bool)
    ids = jnp.zeros(shape, jnp.int32)
    chosen = None if experts is None else jnp.full((*shape, *experts), -1, jnp.int32)
    batch = Batch(Sequences(ids, ids, ids, none, chosen), nothing, nothing, nothing, nothing, nothing, none)
    # Each leaf an array of its own: a donated state must not name one twice.
    return Replay(jax.tree.map(jnp.copy, batch), jnp.zeros(capacity, bool), jnp.int32(0))


def replay_groups(
    replay: Replay, batch: Batch, differs: Bool[Array, " N"], key: PRNGKeyArray, *, num_groups: int
) -> tuple[Replay, Batch, Metrics]:
    """The batch with `num_groups` groups of the buffer behind it, and the buffer with groups of the batch.

    Groups are drawn without replacement, before those of the batch come in. While the buffer has fewer, rows
    that do not count stand in their place.

    Args:
      batch: N groups; rows of one stand together.
      differs: groups to keep, which take the place of the oldest.
      key: decides the draw.
      num_groups: static.

    Returns:
      (buffer, batch, metrics); `replayed` is how many groups were.

    Raises:
      UserError: the buffer is smaller than a batch, or than what is drawn from it.
    """
    capacity, count = replay.filled.shape[0], differs.shape[0]
    if capacity < max(count, num_groups):
        raise UserError(
            f"replay: a buffer of {capacity} groups is smaller than the {max(count, num_groups)} of a batch: "
            "give it more"
        )
    rows = batch.old_logp.shape[0] // count
    fresh = _whole(batch)
    noise = jnp.where(replay.filled, jax.random.uniform(key, (capacity,)), jnp.inf)
    chosen = jnp.argsort(noise)[:num_groups]
    there = replay.filled[chosen]
    drawn = jax.tree.map(lambda leaf: leaf[_rows_of(chosen, rows)], replay.batch)
    counted = drawn.sequences.mask & jnp.repeat(there, rows)[:, None]
    drawn = dataclasses.replace(drawn, sequences=dataclasses.replace(drawn.sequences, mask=counted))
    merged = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), fresh, drawn)
    # What the batch has none of has nothing to say in the loss.
    absent = {f.name: None for f in dataclasses.fields(batch) if getattr(batch, f.name) is None}
    merged = dataclasses.replace(merged, **absent)
    return _keep(replay, fresh, differs, rows), merged, {"replayed": jnp.sum(there)}


def _rows_of(groups: Int[Array, " K"], rows: int) -> Int[Array, " R"]:
    return (groups[:, None] * rows + jnp.arange(rows)).reshape(-1)


def _whole(batch: Batch) -> Batch:
    """A batch that has all of its parts, one advantage for each token, and 0 where nothing counts."""
    mask = batch.sequences.mask
    parts = {
        "old_logp": batch.old_logp,
        "ref_logp": mask * 0.0 if batch.ref_logp is None else batch.ref_logp,
        "advantages": batch.advantages,
        "weights": mask * 1.0 if batch.weights is None else batch.weights,
        "sampler_logp": mask * 0.0 if batch.sampler_logp is None else batch.sampler_logp,
    }
    parts = {name: cleaned_constant(values, mask) for name, values in parts.items()}
    return Batch(
        batch.sequences, **parts, old_kl_mask=mask if batch.old_kl_mask is None else batch.old_kl_mask
    )


def _keep(replay: Replay, fresh: Batch, differs: Bool[Array, " N"], rows: int) -> Replay:
    """The buffer with those groups in the place of its oldest."""
    capacity = replay.filled.shape[0]
    slots = (replay.cursor + jnp.cumsum(differs) - 1) % capacity
    slots = jnp.where(differs, slots, capacity)  # past the end: dropped
    places = _rows_of(slots, rows)
    batch = jax.tree.map(
        lambda kept, new: kept.at[places].set(new.astype(kept.dtype), mode="drop"), replay.batch, fresh
    )
    filled = replay.filled.at[slots].set(True, mode="drop")
    return Replay(batch, filled, ((replay.cursor + jnp.sum(differs)) % capacity).astype(jnp.int32))
