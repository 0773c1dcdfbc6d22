import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import few

from rlhf_jax.kernels.logprobs import (
    candidate_logprobs,
    dense_token_logprobs,
    token_logprobs,
    top_k_logprobs,
)


def _inputs(dtype=jnp.float32, scale=1.0):
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (3, 7, 8), dtype) * scale
    unembedding = jax.random.normal(keys[1], (11, 8), dtype)
    targets = jax.random.randint(keys[2], (3, 7), 0, 11)
    return hidden, unembedding, targets


def _scalar(function, targets, hidden, unembedding):
    logp, entropy = function(hidden, unembedding, targets)
    weights = jnp.arange(targets.size, dtype=logp.dtype).reshape(targets.shape)
    return jnp.sum(jnp.sin(weights) * logp + jnp.cos(weights) * entropy)


@pytest.mark.parametrize("chunk_size", few([1, 4, 21, 64], 4, 64))
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.7, 5.0)])
def test_chunked_equals_dense_in_value_and_gradient(chunk_size, temperature, softcap):
    with jax.enable_x64(True):
        hidden, unembedding, targets = _inputs(jnp.float64)
        chunked = functools.partial(
            token_logprobs, temperature=temperature, softcap=softcap, chunk_size=chunk_size
        )
        dense = functools.partial(dense_token_logprobs, temperature=temperature, softcap=softcap)
        values = (jax.jit(f)(hidden, unembedding, targets) for f in (chunked, dense))
        for a, b in zip(*values, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
        gradients = [
            jax.jit(jax.grad(functools.partial(_scalar, f, targets), argnums=(0, 1)))(hidden, unembedding)
            for f in (chunked, dense)
        ]
        for a, b in zip(*gradients, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


def test_numpy_oracle():
    hidden, unembedding, targets = _inputs()
    logp, entropy = token_logprobs(hidden, unembedding, targets, temperature=1.3, chunk_size=5)
    logits = np.asarray(hidden, np.float64) @ np.asarray(unembedding, np.float64).T / 1.3
    for b in range(3):
        for t in range(7):
            probs = np.exp(logits[b, t]) / np.exp(logits[b, t]).sum()
            np.testing.assert_allclose(logp[b, t], np.log(probs[targets[b, t]]), rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(entropy[b, t], -(probs * np.log(probs)).sum(), rtol=1e-5, atol=1e-6)


def test_bfloat16_and_extreme_logits_stay_finite():
    hidden, unembedding, targets = _inputs(jnp.bfloat16, scale=1e3)
    value, gradients = jax.value_and_grad(
        lambda h, u: _scalar(functools.partial(token_logprobs, chunk_size=4), targets, h, u), argnums=(0, 1)
    )(hidden, unembedding)
    assert np.isfinite(value)
    assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in gradients)
    assert token_logprobs(hidden, unembedding, targets)[0].dtype == jnp.float32


def test_memory_of_logits_is_bounded_by_the_chunk():
    hidden = jax.ShapeDtypeStruct((4, 512, 16), jnp.float32)
    unembedding = jax.ShapeDtypeStruct((4096, 16), jnp.float32)
    targets = jax.ShapeDtypeStruct((4, 512), jnp.int32)

    def temporary_bytes(function):
        step = jax.grad(functools.partial(_scalar, function), argnums=(1, 2))
        compiled = jax.jit(step).lower(targets, hidden, unembedding).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    chunked = temporary_bytes(functools.partial(token_logprobs, chunk_size=64))
    assert chunked < temporary_bytes(dense_token_logprobs) / 8


def test_temperature_is_traced_without_recompiling():
    hidden, unembedding, targets = _inputs()
    traces = []

    @jax.jit
    def score(temperature):
        traces.append(1)
        return token_logprobs(hidden, unembedding, targets, temperature=temperature)[0]

    assert not np.allclose(score(0.5), score(2.0))
    assert len(traces) == 1


# The top k and candidates ------------------------------------------------------------------------------


def _dense(hidden, unembedding, temperature, softcap):
    logits = hidden @ unembedding.T
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    return jax.nn.log_softmax(logits / temperature)


@pytest.mark.parametrize(("chunk_size", "temperature", "softcap"), [(64, 1.0, None), (4, 0.7, 5.0)])
def test_top_k_and_candidates_equal_dense_in_value_and_gradient(chunk_size, temperature, softcap):
    with jax.enable_x64(True):
        hidden, unembedding, targets = _inputs(jnp.float64)
        shared = {"temperature": temperature, "softcap": softcap, "chunk_size": chunk_size}
        logp, ids = top_k_logprobs(hidden, unembedding, 3, **shared)
        everything = np.asarray(_dense(hidden, unembedding, temperature, softcap))
        np.testing.assert_array_equal(ids, np.argsort(-everything, axis=-1)[..., :3])
        np.testing.assert_allclose(logp, -np.sort(-everything, axis=-1)[..., :3], rtol=1e-12)

        def chunked(hidden, unembedding):
            return candidate_logprobs(hidden, unembedding, targets, ids, **shared)

        def dense(hidden, unembedding):
            tempered, plain = (_dense(hidden, unembedding, t, softcap) for t in (temperature, 1.0))
            taken = jnp.take_along_axis(plain, targets[..., None], axis=-1)[..., 0]
            return jnp.take_along_axis(tempered, ids, axis=-1), taken

        weights = jnp.sin(jnp.arange(63.0)).reshape(3, 7, 3)

        def total(function, *inputs):
            taken, target = function(*inputs)
            return jnp.sum(weights * taken) + jnp.sum(jnp.cos(weights[..., 0]) * target)

        for a, b in zip(chunked(hidden, unembedding), dense(hidden, unembedding), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12)
        gradients = [
            jax.grad(functools.partial(total, f), argnums=(0, 1))(hidden, unembedding)
            for f in (chunked, dense)
        ]
        for a, b in zip(*gradients, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


def largest_array(function, *arguments):
    """Numbers in the largest array of a program, and of the programs in it."""
    largest, waiting = 0, [jax.make_jaxpr(function)(*arguments).jaxpr]
    while waiting:
        program = waiting.pop()
        for equation in program.eqns:
            largest = max([largest, *(variable.aval.size for variable in equation.outvars)])
            for inner in jax.tree.leaves(
                tuple(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
            ):
                waiting += (
                    [inner] if hasattr(inner, "eqns") else [inner.jaxpr] if hasattr(inner, "jaxpr") else []
                )
    return largest


def test_neither_side_of_a_top_k_holds_all_logits():
    """[B, T, V] has 4 x 512 x 4096 numbers; a chunk of 64 tokens, the largest array, one 32nd of it."""
    hidden, unembedding = jnp.zeros((4, 512, 16)), jnp.zeros((4096, 16))
    targets, ids = jnp.zeros((4, 512), int), jnp.zeros((4, 512, 8), int)

    def student(hidden, unembedding):
        found = candidate_logprobs(hidden, unembedding, targets, ids, temperature=2.0, chunk_size=64)
        return sum(map(jnp.sum, found))

    assert largest_array(jax.grad(student, argnums=(0, 1)), hidden, unembedding) == 64 * 4096
    teacher = functools.partial(top_k_logprobs, k=8, chunk_size=64)
    assert largest_array(teacher, hidden, unembedding) == 64 * 4096
    assert largest_array(dense_token_logprobs, hidden, unembedding, targets) == 4 * 512 * 4096


COUNTED = {
    "few": np.arange(60) % 7 == 3,
    "none": np.zeros(60, bool),
    "all": np.ones(60, bool),
    "at the end": np.arange(60) >= 57,
}


@pytest.mark.parametrize("counted", COUNTED)
@pytest.mark.parametrize("vocabulary", [11, 2100])
def test_what_is_not_counted_is_nothing_and_has_no_gradient(counted, vocabulary):
    """Of a large vocabulary and a small one: only for the former are chunks left out."""
    with jax.enable_x64(True):
        counted = jnp.asarray(COUNTED[counted]).reshape(4, 15)
        keys = jax.random.split(jax.random.key(0), 3)
        hidden = jax.random.normal(keys[0], (4, 15, 8), jnp.float64)
        unembedding = jax.random.normal(keys[1], (vocabulary, 8), jnp.float64)
        targets = jax.random.randint(keys[2], (4, 15), 0, vocabulary)
        some = functools.partial(token_logprobs, counted=counted, chunk_size=8)

        def where_counted(*args):
            return tuple(jnp.where(counted, found, 0) for found in dense_token_logprobs(*args))

        values = (jax.jit(function)(hidden, unembedding, targets) for function in (some, where_counted))
        for found, expected in zip(*values, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
            assert not found[~counted].any()
        gradients = [
            jax.jit(jax.grad(functools.partial(_scalar, function, targets), argnums=(0, 1)))(
                hidden, unembedding
            )
            for function in (some, where_counted)
        ]
        for found, expected in zip(*gradients, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-11)


def test_logits_of_chunks_that_nobody_asks_for_are_not_computed():
    """A state of NaN would show: it stands in a chunk of its own."""
    counted = jnp.arange(64) < 5
    hidden = jnp.where(jnp.arange(64)[:, None] < 8, 1.0, jnp.nan) * jnp.ones((64, 4))
    targets, unembedding = jnp.zeros(64, jnp.int32), jnp.ones((2100, 4))

    def total(unembedding):
        return sum(map(jnp.sum, token_logprobs(hidden, unembedding, targets, counted=counted, chunk_size=8)))

    value, gradient = jax.value_and_grad(total)(unembedding)
    assert jnp.isfinite(value)
    assert jnp.isfinite(gradient).all()
