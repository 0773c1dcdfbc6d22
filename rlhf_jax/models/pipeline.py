"""Pipeline parallelism: devices hold different layers, and micro-batches pass from one to the next."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.core.axes import constrain, shards
from rlhf_jax.core.types import Array, Float, Params

MICRO_BATCHES_PER_STAGE = 4
"""More would idle less, but each is the smaller."""


def pipelined(
    stage_fn: Callable[..., Float[Array, "b T D"]],
    params: Params,
    hidden: Float[Array, "B T D"],
    *rows: Array,
    stages: int,
) -> Float[Array, "B T D"]:
    """GPipe (Huang et al. 2019, section 2): every stage works on another micro-batch at the same time.

    With P stages and M micro-batches there are M + P - 1 ticks. At tick t, stage p computes micro-batch
    t - p and hands it on; before the first and behind the last it computes what nobody reads, a share
    (P - 1) / (M + P - 1) of the time (section 2.3). The numbers are those of one layer after the other, and
    the backward pass is the transposed program. M is at most `MICRO_BATCHES_PER_STAGE` P and divides the
    rows that a device holds.

    Args:
      stage_fn: (parameters of some layers [L / P, ...], hidden states, rows) -> hidden states.
      params: of all layers, stacked [L, ...], and split along `layers`.
      rows: further arrays [B, ...] that `stage_fn` gets the micro-batch of.
      stages: P; divides L.
    """
    count = num_micro_batches(hidden.shape[0], stages)
    params = jax.tree.map(lambda x: x.reshape(stages, x.shape[0] // stages, *x.shape[1:]), params)
    inputs = constrain(_split(hidden, count), None, "batch", "time", None)
    parts = [_split(row, count) for row in rows]
    # Constraints within a stage are of one stage, whose number is split over the mesh axis.
    every_stage = jax.vmap(stage_fn, spmd_axis_name="pipeline")

    def tick(passing: Array, time: Array) -> tuple[Array, Array]:
        entering = jnp.roll(passing, 1, axis=0).at[0].set(inputs[jnp.minimum(time, count - 1)])
        which = jnp.clip(time - jnp.arange(stages), 0, count - 1)
        made = every_stage(params, entering, *(part[which] for part in parts))
        made = constrain(made, "layers", "batch", "time", None)
        return made, made[-1]

    empty = constrain(jnp.zeros((stages, *inputs.shape[1:]), inputs.dtype), "layers", "batch", "time", None)
    _, outputs = jax.lax.scan(tick, empty, jnp.arange(count + stages - 1))
    outputs = outputs[stages - 1 :]
    return constrain(outputs.swapaxes(0, 1).reshape(hidden.shape), "batch", "time", None)


def num_micro_batches(rows: int, stages: int) -> int:
    """Number of micro-batches that `rows` are cut into: each is spread over all devices that share rows."""
    local = rows // shards("batch", rows)
    return max(n for n in range(1, MICRO_BATCHES_PER_STAGE * stages + 1) if local % n == 0)


def _split(array: Array, count: int) -> Any:
    """[B, ...] -> [M, B / M, ...]: row i goes to micro-batch i mod M, so that no row changes its device."""
    return array.reshape(array.shape[0] // count, count, *array.shape[1:]).swapaxes(0, 1)
