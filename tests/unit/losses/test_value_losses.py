import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from rlhf_jax.losses.value import (
    categorical_value_loss,
    clipped_value_loss,
    conservative_penalty,
    expectile_value_loss,
    gaussian_histogram,
    huber_value_loss,
    project_categorical,
    quantile_value_loss,
    squared_value_loss,
)

GOLDEN = dict(np.load(pathlib.Path(__file__).parents[2] / "golden" / "kernels_rlax.npz"))


@pytest.fixture
def example():
    rng = np.random.default_rng(0)
    values, old_values, returns = rng.normal(size=(3, 4, 5))
    return values, old_values, returns, rng.random((4, 5)) > 0.3


def mean_over(mask, per_step):
    """Mean of `per_step(b, t)` over the unmasked steps, by a loop."""
    return np.mean([per_step(b, t) for b, t in np.argwhere(mask)])


def naive_huber(error, delta):
    return 0.5 * error**2 if abs(error) <= delta else delta * (abs(error) - 0.5 * delta)


def test_scalar_losses_match_naive_loops(example):
    values, old, returns, mask = example

    def naive_clipped(b, t):
        moved = old[b, t] + np.clip(values[b, t] - old[b, t], -0.3, 0.3)
        return 0.5 * max((values[b, t] - returns[b, t]) ** 2, (moved - returns[b, t]) ** 2)

    error = values - returns
    expected = {
        "squared": mean_over(mask, lambda b, t: 0.5 * error[b, t] ** 2),
        "clipped": mean_over(mask, naive_clipped),
        "huber": mean_over(mask, lambda b, t: naive_huber(error[b, t], 0.7)),
    }
    with jax.enable_x64(True):
        dirty = [jnp.where(mask, x, jnp.nan) for x in (values, old, returns)]
        found = {
            "squared": squared_value_loss(dirty[0], dirty[2], mask),
            "clipped": clipped_value_loss(*dirty, mask, clip=0.3),
            "huber": huber_value_loss(dirty[0], dirty[2], mask, delta=0.7),
        }
    for name, (loss, metrics) in found.items():
        np.testing.assert_allclose(loss, expected[name], rtol=0, atol=1e-12)
        np.testing.assert_allclose(metrics["value_error"], error[mask].mean(), rtol=0, atol=1e-12)
        np.testing.assert_allclose(metrics["value_mean"], values[mask].mean(), rtol=0, atol=1e-12)


def test_scalar_losses_have_the_right_gradients(example):
    values, old, returns, mask = example
    with jax.enable_x64(True):
        for loss in (
            lambda v: squared_value_loss(v, returns, mask)[0],
            lambda v: clipped_value_loss(v, old, returns, mask)[0],
            lambda v: huber_value_loss(v, returns, mask, delta=0.7)[0],
        ):
            check_grads(loss, (jnp.asarray(values),), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


def test_without_clip_the_clipped_loss_is_the_squared_one(example):
    values, old, returns, mask = example
    clipped, metrics = clipped_value_loss(
        *map(jnp.asarray, (values, old, returns)), jnp.asarray(mask), clip=jnp.inf
    )
    squared, _ = squared_value_loss(jnp.asarray(values), jnp.asarray(returns), jnp.asarray(mask))
    np.testing.assert_allclose(clipped, squared, rtol=1e-6)
    assert metrics["value_clip_fraction"] == 0


def test_huber_turns_linear_at_delta():
    grad = jax.grad(lambda v: huber_value_loss(v, jnp.zeros((1, 4)), jnp.ones((1, 4), bool), delta=0.5)[0])
    np.testing.assert_allclose(
        grad(jnp.array([[-2.0, -0.2, 0.2, 2.0]])) * 4, [[-0.5, -0.2, 0.2, 0.5]], rtol=1e-6
    )


def test_expectile_loss_matches_a_loop_and_is_squared_at_one_half(example):
    values, _, returns, mask = example

    def naive(b, t):
        error = returns[b, t] - values[b, t]
        return (0.9 if error > 0 else 1 - 0.9) * error**2

    with jax.enable_x64(True):
        dirty = [jnp.where(mask, x, jnp.nan) for x in (values, returns)]
        loss, metrics = expectile_value_loss(*dirty, mask, expectile=0.9)
        half, squared = expectile_value_loss(*dirty, mask, expectile=0.5), squared_value_loss(*dirty, mask)
    np.testing.assert_allclose(loss, mean_over(mask, naive), rtol=0, atol=1e-12)
    np.testing.assert_allclose(metrics["value_error"], (values - returns)[mask].mean(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(half[0], squared[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("expectile", "where"), [(0.5, 5.5), (0.9, 8.0)])
def test_expectile_loss_is_least_at_the_expectile(expectile, where):
    """For 1 ... 10, V = 8 has 0.9 (1 + 2) = 0.1 (1 + 2 + ... + 7) - 0.1, so the expectile lies close by."""
    samples = jnp.arange(1.0, 11.0)[None]
    places = jnp.linspace(1, 10, 1801)
    losses = jax.vmap(
        lambda v: expectile_value_loss(
            jnp.full_like(samples, v), samples, jnp.ones((1, 10), bool), expectile=expectile
        )[0]
    )(places)
    best = float(places[jnp.argmin(losses)])
    pulls = np.where(np.arange(1, 11) > best, expectile, 1 - expectile) * (np.arange(1, 11) - best)
    np.testing.assert_allclose(pulls.sum(), 0, atol=0.02)
    assert abs(best - where) < 0.2


def test_conservative_penalty_matches_a_loop(example):
    mask = example[3]
    rng = np.random.default_rng(1)
    q, actions = 5 * rng.normal(size=(4, 5, 3)), rng.integers(0, 3, (4, 5))
    expected = mean_over(mask, lambda b, t: np.log(np.exp(q[b, t]).sum()) - q[b, t, actions[b, t]])
    with jax.enable_x64(True):
        dirty = jnp.where(mask[..., None], q, jnp.nan)
        penalty, grad = jax.value_and_grad(lambda x: conservative_penalty(x, actions, mask)[0])(dirty)
    np.testing.assert_allclose(penalty, expected, rtol=0, atol=1e-12)
    # It pushes down what softmax(Q) would take, and up what was taken, by as much.
    grad = np.asarray(grad)
    np.testing.assert_allclose(grad.sum(-1), 0, atol=1e-12)
    assert np.all(np.take_along_axis(grad, actions[..., None], -1)[mask] < 0)
    np.testing.assert_array_equal(grad[~mask], 0)


def test_quantile_loss_matches_rlax():
    name = "quantile_huber_loss"
    with jax.enable_x64(True):
        quantiles, targets = (
            jnp.asarray(GOLDEN[f"{name}/{x}"])[:, None] for x in ("dist_src", "dist_target")
        )
        mask = jnp.ones(quantiles.shape[:2], bool)
        total, grad = jax.value_and_grad(
            lambda q: quantile_value_loss(q, targets, mask, delta=1.0, denominator=1.0)[0]
        )(quantiles)
    np.testing.assert_allclose(total, GOLDEN[f"{name}/output"].sum(), rtol=1e-12)
    np.testing.assert_allclose(grad[:, 0], GOLDEN[f"{name}/grad"], rtol=0, atol=1e-12)


def test_quantile_loss_is_least_at_the_quantiles():
    """Gradient descent on samples finds their quantiles (delta near 0: the plain quantile loss)."""
    samples = jnp.arange(1.0, 101.0)[None, None]
    mask = jnp.ones((1, 1), bool)
    grad = jax.jit(jax.grad(lambda q: quantile_value_loss(q, samples, mask, delta=1e-3)[0]))
    quantiles = jnp.full((1, 1, 4), 50.0)
    for _ in range(60):
        quantiles = quantiles - 2e4 * grad(quantiles)
    np.testing.assert_allclose(quantiles[0, 0], [12.5, 37.5, 62.5, 87.5], atol=1.5)


def test_categorical_projection_matches_rlax():
    name = "categorical_l2_project"
    with jax.enable_x64(True):
        projected = project_categorical(
            *(jnp.asarray(GOLDEN[f"{name}/{x}"]) for x in ("z_p", "probs", "z_q"))
        )
    np.testing.assert_allclose(projected, GOLDEN[f"{name}/output"], rtol=0, atol=1e-12)


def test_c51_matches_rlax():
    name = "categorical_td_learning"
    with jax.enable_x64(True):
        a = {
            x: jnp.asarray(GOLDEN[f"{name}/{x}"]) for x in ("v_logits_tm1", "v_logits_t", "r_t", "discount_t")
        }
        atoms = jnp.asarray(GOLDEN[f"{name}/v_atoms_t"])
        positions = a["r_t"][:, None] + a["discount_t"][:, None] * atoms
        target = project_categorical(positions, jax.nn.softmax(a["v_logits_t"]), atoms)[:, None]
        mask = jnp.ones((5, 1), bool)
        total, grad = jax.value_and_grad(
            lambda x: categorical_value_loss(x[:, None], target, atoms, mask, denominator=1.0)[0]
        )(a["v_logits_tm1"])
    np.testing.assert_allclose(total, GOLDEN[f"{name}/output"].sum(), rtol=1e-12)
    np.testing.assert_allclose(grad, GOLDEN[f"{name}/grad"], rtol=0, atol=1e-12)


def test_two_hot_keeps_the_mean_and_clamps_beyond_the_ends():
    atoms = jnp.linspace(-1, 1, 5)
    returns = jnp.array([-0.8, 0.0, 0.3, 1.0, 7.0, -1e4])
    probs = project_categorical(returns[:, None], jnp.ones((6, 1)), atoms)
    np.testing.assert_allclose(probs.sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(probs @ atoms, jnp.clip(returns, -1, 1), atol=1e-6)
    assert (jnp.sum(probs > 0, axis=-1) <= 2).all()


def test_gaussian_histogram_against_numerical_integration():
    edges = np.linspace(-1, 1, 9)
    sigma, returns = 0.75 * 0.25, np.array([-0.9, 0.05, 0.8])
    fine = np.linspace(-1, 1, 8 * 2000 + 1)
    middle = (fine[1:] + fine[:-1]) / 2
    density = np.exp(-0.5 * ((middle - returns[:, None]) / sigma) ** 2).reshape(3, 8, 2000).sum(-1)
    with jax.enable_x64(True):
        probs = gaussian_histogram(jnp.asarray(returns), jnp.asarray(edges), sigma=sigma)
    np.testing.assert_allclose(probs, density / density.sum(-1, keepdims=True), atol=1e-7)


def test_gaussian_histogram_far_outside_is_finite_and_at_the_end():
    edges = jnp.linspace(-1, 1, 9)
    probs = gaussian_histogram(jnp.array([1e4, -1e4, jnp.inf]), edges, sigma=0.1)
    np.testing.assert_allclose(probs.sum(-1), 1, rtol=1e-6)
    np.testing.assert_array_equal(probs.argmax(-1), [7, 0, 7])


def test_categorical_loss_at_the_target_is_its_entropy_with_no_gradient():
    atoms = jnp.linspace(-1, 1, 5)
    target = jnp.array([[[0.1, 0.2, 0.4, 0.2, 0.1]]])
    mask = jnp.ones((1, 1), bool)
    (loss, metrics), grad = jax.value_and_grad(
        lambda x: categorical_value_loss(x, target, atoms, mask), has_aux=True
    )(jnp.log(target))
    np.testing.assert_allclose(loss, -jnp.sum(target * jnp.log(target)), rtol=1e-6)
    np.testing.assert_allclose(grad, 0, atol=1e-7)
    np.testing.assert_allclose(metrics["value_error"], 0, atol=1e-7)
