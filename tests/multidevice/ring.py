"""Attention on meshes against attention written out, values and gradients: prints their errors."""

import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import distributed
from rlhf_jax.models.attention.backends import context_parallel_attention
from rlhf_jax.models.attention.splash import splash_attention

ROWS, TIME, HEADS, KV_HEADS, WIDTH, VALUE = 2, 16, 4, 2, 6, 4


def plain(query, key, value, positions, segments, *, scale, softcap=None, window=None, time=TIME):
    key, value = (jnp.repeat(x, HEADS // KV_HEADS, axis=2) for x in (key, value))
    logits = scale * jnp.einsum("bthd,bshd->bhts", query, key)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    time = jnp.arange(time)
    seen = (segments[:, :, None] == segments[:, None]) & (time[:, None] >= time)
    if window is not None:
        seen &= positions[:, :, None] - positions[:, None] < window
    weights = jax.nn.softmax(jnp.where(seen[:, None], logits, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshv->bthv", weights, value)


def on_tpus(time=256):
    """Splash attention, run by its interpreter, where rows and heads are split over 4 devices."""
    rng = np.random.default_rng(1)
    shapes = ((ROWS, time, heads, 128) for heads in (HEADS, KV_HEADS, KV_HEADS))
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    segments = jnp.asarray([[1] * 100 + [2] * (time - 100), [0] * 30 + [1] * (time - 30)], jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(time), segments.shape)

    def both(attention):
        def loss(*inputs):
            output = jnp.where(segments[..., None, None] > 0, attention(*inputs), 0)
            return jnp.sum(jnp.sin(output)), output

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)

    (_, expected), expected_gradients = both(lambda *x: plain(*x, positions, segments, scale=0.1, time=time))
    with jax.set_mesh(distributed.make_mesh("fsdp=2,tensor=2")):
        call = functools.partial(splash_attention, segment_ids=segments, scale=0.1, interpret=True)
        (_, found), found_gradients = both(call)
    pairs = zip((found, *found_gradients), (expected, *expected_gradients), strict=True)
    print("splash", *(float(np.max(np.abs(np.asarray(a) - np.asarray(b)))) for a, b in pairs))


def over_columns(mesh):
    jax.config.update("jax_enable_x64", True)
    rng = np.random.default_rng(0)
    arrays = [
        jnp.asarray(rng.normal(size=(ROWS, TIME, heads, width)))
        for heads, width in ((HEADS, WIDTH), (KV_HEADS, WIDTH), (KV_HEADS, VALUE))
    ]
    weight = jnp.asarray(rng.normal(size=(ROWS, TIME, HEADS, VALUE)))
    # packed; left-padded
    segments = jnp.asarray([[1] * 5 + [2] * 6 + [3] * 5, [0] * 3 + [1] * 13], jnp.int32)
    first = jnp.asarray([[0] * 5 + [5] * 6 + [11] * 5, [0] * 3 + [3] * 13])
    positions = (jnp.arange(TIME) - first).astype(jnp.int32)
    for way, (softcap, window) in itertools.product(("ring", "ulysses"), ((None, None), (2.0, 3))):
        options = {"scale": 0.4, "softcap": softcap, "window": window}

        def both(attention, options=options):
            def loss(*inputs):
                output = attention(*inputs, positions, segments, **options)
                return jnp.sum(output * weight), output

            return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)

        with jax.set_mesh(distributed.make_mesh(mesh)):
            (_, found), found_gradients = both(functools.partial(context_parallel_attention, way))
        (_, expected), expected_gradients = both(plain)
        errors = [
            float(np.max(np.abs(np.asarray(a) - np.asarray(b))))
            for a, b in zip((found, *found_gradients), (expected, *expected_gradients), strict=True)
        ]
        print(way, *errors)


if __name__ == "__main__":
    on_tpus() if sys.argv[1] == "splash" else over_columns(sys.argv[1])
