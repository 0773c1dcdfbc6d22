"""Every optimizer by name against optax called directly, and on a quadratic."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib
from tiers import few

from rlhf_jax.core.optimizers import OPTIMIZERS, Optimizer
from rlhf_jax.core.train_state import OptimizerConfig, apply_gradients, init_train_state, make_optimizer

RATE, STEPS = 0.03, 5
ADAM = {"b1": 0.8, "b2": 0.97, "eps": 1e-6}
SHAPES = {
    "embedding": (150, 140),
    "norm": {"scale": (140,)},
    "layer_0": {"kernel": (140, 130), "bias": (130,)},
}


def draw(seed, scale=1.0):
    leaves, structure = jax.tree.flatten(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    rng = np.random.default_rng(seed)
    return structure.unflatten([jnp.asarray(scale * rng.normal(size=s), jnp.float32) for s in leaves])


def train(name, params, gradients, **options):
    tx = make_optimizer(OptimizerConfig(optimizer=name, clip_norm=np.inf, **options))
    state = jax.jit(lambda params: init_train_state(params, tx))(params)
    step = jax.jit(lambda *given: apply_gradients(*given, tx, learning_rate=RATE, loss=jnp.zeros(()))[0])
    for gradient in gradients:
        state = step(state, gradient)
    return state


def reference(name):
    """The same optimizer with its own learning rate, by optax's own entry."""
    return {
        "adamw": lambda: optax.adamw(RATE, **ADAM, weight_decay=0.0),
        "lion": lambda: optax.lion(RATE, ADAM["b1"], ADAM["b2"], weight_decay=0.0),
        "adafactor": lambda: optax.adafactor(RATE),
        "sgd": lambda: optax.sgd(RATE, momentum=ADAM["b1"]),
    }[name]()


def run_reference(tx, params, gradients):
    state, update = tx.init(params), jax.jit(tx.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


OPTIONS = {"b1": ADAM["b1"], "b2": ADAM["b2"], "epsilon": ADAM["eps"]}


@pytest.mark.parametrize("name", few(["adamw", "lion", "adafactor", "sgd"], "adamw", "adafactor"))
def test_steps_are_those_of_optax(name):
    params, gradients = draw(0), [draw(step + 1, 0.1) for step in range(STEPS)]
    ours = train(name, params, gradients, **OPTIONS).params
    theirs = run_reference(reference(name), params, gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)
    assert not np.allclose(ours["layer_0"]["kernel"], params["layer_0"]["kernel"], atol=1e-4)


def test_muon_is_that_of_optax_on_matrices_inside_layers_and_adam_elsewhere():
    params, gradients = draw(0), [draw(step + 1, 0.1) for step in range(STEPS)]
    ours = train("muon", params, gradients, **OPTIONS).params
    kernels = run_reference(
        contrib.muon(RATE, beta=0.95, eps=ADAM["eps"], consistent_rms=0.2),
        params["layer_0"]["kernel"],
        [gradient["layer_0"]["kernel"] for gradient in gradients],
    )
    np.testing.assert_allclose(ours["layer_0"]["kernel"], kernels, rtol=1e-5, atol=1e-6)
    adam = run_reference(reference("adamw"), params, gradients)
    for name in ("embedding", "norm"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours[name], adam[name]
        )
    np.testing.assert_allclose(ours["layer_0"]["bias"], adam["layer_0"]["bias"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", few(["adamw", "lion", "sgd", "muon"], "muon"))
def test_layers_in_a_stack_move_as_they_do_alone(name):
    rng = np.random.default_rng(0)
    stack = {"kernel": jnp.asarray(rng.normal(size=(3, 16, 8)), jnp.float32), "scale": jnp.ones((3, 8))}
    gradients = [jax.tree.map(lambda x, s=s: jnp.cos(x * (s + 2)), stack) for s in range(3)]
    together = train(name, stack, gradients).params
    for layer in range(3):
        alone = train(
            name, *jax.tree.map(lambda x, i=layer: x[i], (stack, gradients), is_leaf=lambda x: False)
        ).params
        jax.tree.map(
            lambda a, b, i=layer: np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-6), together, alone
        )


@pytest.mark.parametrize("name", few(OPTIMIZERS, "adamw", "muon"))
def test_each_learns_a_quadratic_and_decays_what_has_no_gradient(name):
    rng = np.random.default_rng(0)
    target = {"kernel": jnp.asarray(rng.normal(size=(8, 4)), jnp.float32), "bias": jnp.ones(4)}
    params = jax.tree.map(lambda x: x + 0.5, target)
    rate = {"adamw": 0.03, "lion": 0.02, "adafactor": 0.05, "sgd": 0.05, "muon": 0.2}[name]
    tx = make_optimizer(OptimizerConfig("linear", name, total_steps=150, clip_norm=100.0))

    def loss_fn(params):
        return sum(
            jnp.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (params, target)), strict=True)
        )

    def step(state, _):
        loss, gradients = jax.value_and_grad(loss_fn)(state.params)
        return apply_gradients(state, gradients, tx, learning_rate=rate, loss=loss)[0], loss

    state, losses = jax.jit(lambda s: jax.lax.scan(step, s, length=150))(init_train_state(params, tx))
    assert loss_fn(state.params) < 0.01 * losses[0]

    decaying = make_optimizer(OptimizerConfig(optimizer=name, weight_decay=0.5))
    zeros = jax.tree.map(jnp.zeros_like, params)
    state, _ = apply_gradients(
        init_train_state(params, decaying), zeros, decaying, learning_rate=0.1, loss=jnp.zeros(())
    )
    np.testing.assert_allclose(state.params["kernel"], 0.95 * params["kernel"], rtol=1e-6)
    np.testing.assert_allclose(state.params["bias"], params["bias"], rtol=1e-6)


@pytest.mark.parametrize("name", few(OPTIMIZERS, "adamw", "muon"))
def test_moments_are_float32_whatever_the_parameters_are(name):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), draw(0))
    state = train(name, params, [params], rounding="stochastic").opt_state
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert floats
    assert {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}


def test_the_table_and_the_type_list_the_same_names():
    assert get_args(Optimizer) == tuple(OPTIMIZERS)
