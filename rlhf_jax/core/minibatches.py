"""Several epochs of shuffled mini-batches over one batch, under jit."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from rlhf_jax.core.axes import constrain
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.trees import tree_where
from rlhf_jax.core.types import Array, Bool, Metrics, PRNGKeyArray

Carry = TypeVar("Carry")
StepFn = Callable[[Carry, Any], tuple[Carry, Metrics, Bool[Array, ""]]]


def scan_minibatches(
    step: StepFn[Carry], carry: Carry, batch: Any, key: PRNGKeyArray, *, epochs: int, minibatches: int
) -> tuple[Carry, Metrics]:
    """Runs `step` on every mini-batch of every epoch, until one asks to stop.

    Args:
      step: (carry, mini-batch) -> (carry, metrics, stop). A step that asks to stop is undone, and no later
        one runs: its carry is dropped, its metrics count.
      batch: a pytree whose leaves share a first axis that `minibatches` divides; shuffled in each epoch.

    Returns:
      (carry, metrics): float metrics are means over the steps that ran, integer metrics (counters) the
      last, and `epochs_done` the share of steps applied times `epochs`.

    Raises:
      UserError: `minibatches` does not divide the rows.
    """
    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows % minibatches:
        raise UserError(f"minibatches={minibatches} does not divide the {rows} rows of a batch: change one")
    size = rows // minibatches

    def order(epoch_key: PRNGKeyArray) -> Array:
        return jax.random.permutation(epoch_key, rows).reshape(minibatches, size)

    if epochs == minibatches == 1:
        indices = jnp.arange(rows)[None]  # a single full-batch step has no order
    else:
        indices = jax.vmap(order)(jax.random.split(key, epochs)).reshape(-1, size)

    def run(carry: Carry, index: Array) -> tuple[Carry, Metrics, Bool[Array, ""]]:
        part = jax.tree.map(lambda x: constrain(x[index], "batch", *(None,) * (x.ndim - 1)), batch)
        new, metrics, stop = step(carry, part)
        return tree_where(stop, carry, new), metrics, stop

    shapes = jax.eval_shape(run, carry, indices[0])[1]
    blank = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def scan_step(state: tuple[Carry, Bool[Array, ""]], index: Array):
        carry, stopped = state
        new, metrics, stop = jax.lax.cond(
            stopped, lambda c, _: (c, blank, jnp.bool_(True)), run, carry, index
        )
        return (new, stopped | stop), (metrics, ~stopped, ~(stopped | stop))

    (carry, _), (history, ran, applied) = jax.lax.scan(scan_step, (carry, jnp.bool_(False)), indices)
    last = jnp.sum(ran) - 1

    def summary(values: Array) -> Array:
        if jnp.issubdtype(values.dtype, jnp.integer):
            return values[last]
        return jnp.sum(jnp.where(ran, values, 0)) / jnp.sum(ran)

    metrics = jax.tree.map(summary, history)
    return carry, {**metrics, "epochs_done": epochs * jnp.mean(applied.astype(jnp.float32))}


def share_of_rows(batch: Any, number: Array, parts: int) -> Any:
    """Share `number` of `parts` of the rows, for what goes along with mini-batches without being shuffled.

    Every `parts`-th row: a share then has some of the rows of every device.

    Raises:
      UserError: `parts` does not divide the rows.
    """

    def share(x: Array) -> Array:
        if x.shape[0] % parts:
            raise UserError(f"{x.shape[0]} rows cannot be shared out: give a multiple of {parts}")
        rows = x.reshape(-1, parts, *x.shape[1:])[:, number]
        return constrain(rows, "batch", *(None,) * (rows.ndim - 1))

    return jax.tree.map(share, batch)
