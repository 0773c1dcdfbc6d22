"""Parameters of 16 bits move as those of 32 do, or are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import few

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.rounding import KahanState, spacing, stochastically_rounded
from rlhf_jax.core.train_state import (
    OptimizerConfig,
    apply_gradients,
    check_parameters_can_move,
    init_train_state,
    make_optimizer,
)

RATE, STEPS = 1e-6, 100


def checkpoint(dtype):
    """Weights as in a checkpoint of 16 bits, each away from 0."""
    rng = np.random.default_rng(0)
    weights = np.sign(rng.normal(size=(64, 32))) * rng.uniform(0.02, 2.0, size=(64, 32))
    return {"kernel": jnp.asarray(weights, jnp.bfloat16).astype(dtype), "scale": jnp.ones(32, dtype)}


def train(params, rounding="nearest", steps=STEPS, state=None):
    """Adam under gradients that keep their sign, so that each weight moves by about steps x 1e-6."""
    tx = make_optimizer(OptimizerConfig(rounding=rounding))
    state = init_train_state(params, tx) if state is None else state
    signs = jax.tree.map(lambda x: jnp.where(jnp.arange(x.size).reshape(x.shape) % 3 > 0, 1.0, -1.0), params)

    @jax.jit
    def step(state):
        share = 1 + 0.3 * jnp.sin(state.steps.astype(jnp.float32))
        gradients = jax.tree.map(lambda s, p: (0.001 * share * s).astype(p.dtype), signs, state.params)
        return apply_gradients(state, gradients, tx, learning_rate=RATE, loss=jnp.zeros(()))[0]

    for _ in range(steps):
        state = step(state)
    return state


def moved(state, params):
    """How far each weight is from where it began, with what compensated sums keep beside it."""
    now = jax.tree.map(lambda x: x.astype(jnp.float32), state.params)
    if isinstance(state.opt_state, KahanState):
        held = state.opt_state.compensation
        now = jax.tree.map(lambda x, p, c: x + c * spacing(p, c) / 2**16, now, state.params, held)
    return jax.tree.map(lambda a, b: np.asarray(a - b.astype(jnp.float32)), now, params)


def assert_same_movement(ours, theirs):
    for name, expected in theirs.items():
        error = np.abs(ours[name] - expected).mean() / np.abs(expected).mean()
        assert error < 0.01, (name, error)


def test_plain_bfloat16_does_not_move_at_all_which_is_refused():
    params = checkpoint(jnp.bfloat16)
    state = train(params)
    np.testing.assert_array_equal(state.params["scale"], params["scale"])
    with pytest.raises(
        UserError, match=r"2 of 2 trained parameters \(kernel, .*bfloat16.*param_dtype='float32'"
    ):
        check_parameters_can_move(params, OptimizerConfig())
    with pytest.raises(UserError, match=r"1 of 2 .*float16"):
        check_parameters_can_move({"a": jnp.ones(2), "b": jnp.ones(2, jnp.float16)}, OptimizerConfig())
    for fine in ("kahan", "stochastic"):
        check_parameters_can_move(params, OptimizerConfig(rounding=fine))
    check_parameters_can_move(checkpoint(jnp.float32), OptimizerConfig())


@pytest.mark.parametrize("dtype", few([jnp.bfloat16, jnp.float16], jnp.bfloat16))
def test_compensated_sums_move_a_checkpoint_as_float32_does(dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), checkpoint(jnp.bfloat16))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    expected = moved(train(wide), wide)
    assert 0.5e-4 < np.abs(expected["kernel"]).mean() < 1.5e-4
    state = train(params, "kahan")
    assert state.params["kernel"].dtype == dtype
    assert_same_movement(moved(state, params), expected)


def test_stochastic_rounding_moves_a_checkpoint_in_expectation():
    """The mean over 2^15 copies of each weight, whose standard error is a third of the percent at most."""
    weights = jnp.asarray([0.001, -0.0015, 0.002, 0.004], jnp.bfloat16)
    params = {"kernel": jnp.broadcast_to(weights, (2**15, 4))}
    tx = make_optimizer(OptimizerConfig(rounding="stochastic"))

    def step(state, _):
        gradients = {"kernel": jnp.full_like(state.params["kernel"], -0.001)}
        return apply_gradients(state, gradients, tx, learning_rate=RATE, loss=jnp.zeros(()))[0], None

    state = jax.jit(lambda s: jax.lax.scan(step, s, length=STEPS)[0])(init_train_state(params, tx))
    change = np.asarray(state.params["kernel"], np.float64) - np.asarray(weights, np.float64)
    mean, error = change.mean(axis=0), change.std(axis=0) / 2**7.5
    assert np.all(error < 0.0034 * STEPS * RATE), error
    np.testing.assert_allclose(mean, STEPS * RATE, rtol=0.01)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_rounding_goes_to_a_neighbour_with_the_stated_probability(dtype):
    lower = np.asarray([1.0, -2.0, 0.125, -0.3], dtype)
    upper = np.nextafter(lower, np.asarray(np.inf, dtype)).astype(np.float32)
    lower = lower.astype(np.float32)
    for share in (0.0, 0.1, 0.5, 0.9):
        values = jnp.broadcast_to(jnp.asarray(lower + share * (upper - lower)), (20_000, 4))
        rounded = np.asarray(stochastically_rounded(values, dtype, jax.random.key(1)), np.float32)
        assert np.all((rounded == lower) | (rounded == upper))
        np.testing.assert_allclose((rounded == upper).mean(axis=0), share, atol=0.015)


@pytest.mark.parametrize("rounding", few(["stochastic", "kahan"], "stochastic"))
def test_a_run_in_two_parts_ends_where_one_in_one_part_does(rounding):
    params = checkpoint(jnp.bfloat16)
    whole = train(params, rounding, steps=12)
    half = jax.device_get(train(params, rounding, steps=5))
    parts = train(params, rounding, steps=7, state=jax.tree.map(jnp.asarray, half))
    jax.tree.map(np.testing.assert_array_equal, parts, whole)


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_float32_parameters_are_moved_as_ever(rounding):
    params = checkpoint(jnp.float32)
    plain, other = train(params, steps=5).params, train(params, rounding, steps=5).params
    jax.tree.map(np.testing.assert_array_equal, other, plain)


@pytest.mark.parametrize("rounding", few(["stochastic", "kahan"], "stochastic"))
@pytest.mark.slow
def test_a_learning_rate_of_0_moves_nothing(rounding):
    params = checkpoint(jnp.bfloat16)
    tx = make_optimizer(OptimizerConfig(rounding=rounding))
    state, _ = apply_gradients(
        init_train_state(params, tx), params, tx, learning_rate=jnp.float32(0), loss=jnp.zeros(())
    )
    jax.tree.map(np.testing.assert_array_equal, state.params, params)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_spacings_are_those_of_numpy(dtype):
    rng = np.random.default_rng(0)
    powers = [1.0, -1.0, 0.5, -4.0, 2.0**-14]
    values = np.asarray([*powers, *rng.normal(size=200), *rng.normal(size=200) * 100], dtype)
    for direction in (-1, 1):
        other = np.nextafter(values, np.asarray(direction * np.inf, dtype))
        expected = np.abs(other.astype(np.float32) - values.astype(np.float32))
        np.testing.assert_array_equal(spacing(jnp.asarray(values), jnp.float32(direction)), expected)
