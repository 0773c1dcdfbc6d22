"""A pipeline computes what its layers compute one after the other; on meshes: tests/multidevice."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import models
from rlhf_jax.core.errors import UserError
from rlhf_jax.models import decoder
from rlhf_jax.models.pipeline import num_micro_batches, pipelined

STAGES, LAYERS, ROWS, TIME, WIDTH = 3, 6, 10, 4, 5
CONFIG = models.dense_config(
    vocab_size=7, width=4, num_layers=4, num_heads=2, num_kv_heads=1, scan_layers=True, remat="full"
)


def on_mesh(axis, size):
    return jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh((size,), (axis,), axis_types=(jax.sharding.AxisType.Auto,))
    )


def test_values_and_gradients_are_those_of_a_loop_over_layers():
    """Ten rows make ten micro-batches, so that the first stage begins while the last has nothing yet."""
    rng = np.random.default_rng(0)
    hidden, scales = rng.normal(size=(ROWS, TIME, WIDTH)), rng.normal(size=(ROWS, TIME))
    params = {"kernel": rng.normal(size=(LAYERS, WIDTH, WIDTH)) / 2, "bias": rng.normal(size=(LAYERS, WIDTH))}
    weight = rng.normal(size=hidden.shape)

    def layer(hidden, kernel, bias, scales):
        return jnp.tanh(hidden @ kernel + bias) * scales[..., None]

    def stage(params, hidden, scales):
        for kernel, bias in zip(params["kernel"], params["bias"], strict=True):
            hidden = layer(hidden, kernel, bias, scales)
        return hidden

    def loss(run, params, hidden):
        return jnp.sum(run(params, hidden, scales) * weight)

    with jax.enable_x64(True):
        params, hidden, scales = jax.tree.map(jnp.asarray, (params, hidden, scales))
        pipeline = functools.partial(pipelined, stage, stages=STAGES)
        found = jax.jit(jax.value_and_grad(functools.partial(loss, pipeline), (0, 1)))(params, hidden)
        expected = jax.value_and_grad(functools.partial(loss, stage), (0, 1))(params, hidden)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-12), found, expected)


@pytest.mark.parametrize(("rows", "shares", "expected"), [(24, 1, 12), (10, 1, 10), (7, 1, 7), (26, 2, 1)])
def test_micro_batches_divide_the_rows_of_a_device(rows, shares, expected):
    with on_mesh("data", shares):
        assert num_micro_batches(rows, STAGES) == expected


@pytest.mark.parametrize(
    ("stages", "scanned", "expected"),
    [(3, True, "3 divides, and this model has 4 scanned"), (2, False, "layers that are not scanned")],
)
def test_layers_that_cannot_be_dealt_out_are_refused(stages, scanned, expected):
    config = dataclasses.replace(CONFIG, scan_layers=scanned)
    ids = jax.ShapeDtypeStruct((4, 3), jnp.int32)
    params = models.param_shapes(config)
    with on_mesh("pipeline", stages), pytest.raises(UserError, match=expected):
        jax.eval_shape(functools.partial(decoder.hidden_states, config), params, ids, ids, ids)


def test_without_a_pipeline_layers_are_scanned_and_with_one_in_a_loop_of_stages():
    ids = jax.ShapeDtypeStruct((8, 3), jnp.int32)
    program = functools.partial(decoder.hidden_states, CONFIG)
    lengths = {}
    for name, size in (("data", 2), ("pipeline", 2)):
        with on_mesh(name, size):
            jaxpr = jax.make_jaxpr(program)(models.param_shapes(CONFIG), ids, ids, ids).jaxpr
        lengths[name] = [eqn.params["length"] for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    # Four layers; eight micro-batches and one tick more, until the second stage has the last of them.
    assert lengths == {"data": [4], "pipeline": [8 + 1]}
