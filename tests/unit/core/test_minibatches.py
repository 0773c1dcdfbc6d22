"""Epochs of shuffled mini-batches: every row once, early stop, what becomes of metrics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.minibatches import scan_minibatches

ROWS = 12
BATCH = {"row": jnp.arange(ROWS), "twice": 2 * jnp.arange(ROWS)[:, None]}


def run(key, *, epochs, minibatches, stop_at=10**6):
    """Counts how often each row was used; step number `stop_at` (from 0) asks to stop."""

    def step(carry, part):
        count, seen, order = carry
        stop = count == stop_at
        seen = seen.at[part["row"]].add(1)
        order = jax.lax.dynamic_update_slice(order, part["row"], (count * part["row"].size,))
        metrics = {
            "mean": count.astype(jnp.float32),
            "counter": count,
            "aligned": jnp.all(part["twice"][:, 0] == 2 * part["row"]).astype(jnp.float32),
        }
        return (count + 1, seen, order), metrics, stop

    carry = (jnp.int32(0), jnp.zeros(ROWS, jnp.int32), jnp.full(epochs * ROWS, -1))
    return scan_minibatches(step, carry, BATCH, key, epochs=epochs, minibatches=minibatches)


def test_every_row_is_used_once_in_each_epoch_in_an_order_of_its_own():
    (count, seen, order), metrics = run(jax.random.key(0), epochs=3, minibatches=4)
    assert int(count) == 12
    np.testing.assert_array_equal(seen, 3)
    epochs = np.asarray(order).reshape(3, ROWS)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(ROWS), (3, 1)))
    assert len(np.unique(epochs, axis=0)) == 3
    other = run(jax.random.key(1), epochs=3, minibatches=4)[0][2]
    assert not np.array_equal(order, other)
    np.testing.assert_array_equal(order, run(jax.random.key(0), epochs=3, minibatches=4)[0][2])
    assert float(metrics["aligned"]) == 1.0


def test_one_full_batch_keeps_its_order():
    (_, _, order), metrics = run(jax.random.key(0), epochs=1, minibatches=1)
    np.testing.assert_array_equal(order, np.arange(ROWS))
    assert float(metrics["epochs_done"]) == 1.0


@pytest.mark.parametrize("stop_at", [0, 1, 5, 7])
def test_a_step_that_asks_to_stop_is_undone_and_ends_the_update(stop_at):
    (count, seen, _), metrics = run(jax.random.key(0), epochs=2, minibatches=4, stop_at=stop_at)
    assert int(count) == stop_at
    assert int(seen.sum()) == 3 * stop_at
    # Its metrics count: steps 0 ... stop_at ran.
    np.testing.assert_allclose(metrics["mean"], stop_at / 2)
    assert int(metrics["counter"]) == stop_at
    np.testing.assert_allclose(metrics["epochs_done"], 2 * stop_at / 8)


def test_metrics_are_means_and_counters_the_last():
    _, metrics = run(jax.random.key(0), epochs=2, minibatches=4)
    assert float(metrics["mean"]) == 3.5
    assert int(metrics["counter"]) == 7
    assert float(metrics["epochs_done"]) == 2.0


def test_what_follows_a_stop_may_be_nan():
    def step(carry, part):
        del part
        return carry * jnp.nan, {"loss": carry * jnp.nan}, carry > 0

    carry, _ = scan_minibatches(step, jnp.ones(()), BATCH, jax.random.key(0), epochs=1, minibatches=2)
    assert float(carry) == 1.0


def test_stops_are_each_lane_s_own_under_vmap():
    def of(stop_at):
        (count, _, _), metrics = run(jax.random.key(0), epochs=2, minibatches=4, stop_at=stop_at)
        return count, metrics["mean"]

    count, mean = jax.vmap(of)(jnp.array([3, 100]))
    assert count.tolist() == [3, 8]
    np.testing.assert_allclose(mean, [1.5, 3.5])


def test_rows_that_do_not_split_are_refused():
    with pytest.raises(UserError, match="minibatches=5 does not divide the 12 rows"):
        run(jax.random.key(0), epochs=1, minibatches=5)
