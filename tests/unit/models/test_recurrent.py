"""Recurrent layers against loops in NumPy, alone, packed, padded and token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import few

from rlhf_jax import models
from rlhf_jax.core.types import Sequences

CELLS = ("rnn", "gru", "lstm")


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def naive_states(cell, layer, inputs):
    """States of one sample, [T, H], token by token."""
    width = layer["recurrent"].shape[0]
    hidden, memory, found = np.zeros(width), np.zeros(width), []
    for token in inputs:
        of_input = token @ layer["input"]["kernel"] + layer["input"]["bias"]
        of_state = hidden @ layer["recurrent"]
        if cell == "rnn":
            hidden = np.tanh(of_input + of_state)
        elif cell == "gru":
            (r_i, z_i, n_i), (r_s, z_s, n_s) = np.split(of_input, 3), np.split(of_state, 3)
            reset, update = sigmoid(r_i + r_s), sigmoid(z_i + z_s)
            new = np.tanh(n_i + reset * (n_s + layer["new_bias"]))
            hidden = (1 - update) * new + update * hidden
        else:
            enter, forget, new, leave = np.split(of_input + of_state, 4)
            memory = sigmoid(forget + 1) * memory + sigmoid(enter) * np.tanh(new)
            hidden = sigmoid(leave) * np.tanh(memory)
        found.append(hidden)
    return np.array(found)


def naive_logits(config, params, tokens):
    hidden = params["embedding"][tokens] * config.embedding_scale
    for number in range(config.num_layers):
        layer = params[f"layer_{number}"]["recurrence"]
        hidden = naive_states(config.pattern[0].attention.cell, layer, hidden)
    hidden = hidden / np.sqrt(np.mean(hidden**2, axis=-1, keepdims=True) + 1e-6)
    return hidden * params["final_norm"]["scale"] @ params["embedding"].T


@pytest.fixture(scope="module")
def made():
    found = {}
    for number, cell in enumerate(CELLS):
        config = models.recurrent_config(vocab_size=11, width=6, num_layers=2, cell=cell)
        params = models.init_params(config, jax.random.key(number))
        keys = iter(jax.random.split(jax.random.key(9), 50))
        params = jax.tree.map(lambda x, k=keys: x + 0.1 * jax.random.normal(next(k), x.shape), params)
        found[cell] = config, params
    return found


@pytest.mark.parametrize("cell", CELLS)
def test_packed_and_padded_rows_are_the_loops_of_each_sample(made, cell):
    config, params = made[cell]
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 11, 4), rng.integers(0, 11, 3)
    tokens = np.concatenate([[0, 7], first, second, [5]])[None]
    segment_ids = np.array([[0, 0, 1, 1, 1, 1, 2, 2, 2, 0]])
    positions = np.array([[0, 0, 0, 1, 2, 3, 0, 1, 2, 0]])

    @jax.jit
    def logits(params, *inputs):
        return models.logits(config, params, models.hidden_states(config, params, *inputs))

    got = np.asarray(logits(params, tokens, positions, segment_ids))[0]
    plain = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    wanted = [naive_logits(config, plain, sample) for sample in (first, second)]
    np.testing.assert_allclose(got[2:9], np.concatenate(wanted), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("cell", few(["gru", "lstm"], "lstm"))
def test_reading_token_by_token_is_reading_at_once(made, cell):
    config, params = made[cell]
    prefill, decode = models.make_decode_fns(config)
    tokens = np.array([[0, 3, 1, 4, 1, 5], [2, 6, 5, 3, 5, 8]])
    mask = np.array([[False, True, True, True, True, True], [True] * 6])
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    whole = models.forward(config, params, jnp.asarray(tokens), mask=jnp.asarray(mask))
    last, cache = prefill(params, tokens[:, :4], positions[:, :4], mask[:, :4].astype(np.int32), 6)
    np.testing.assert_allclose(last, whole[:, 3], rtol=1e-5, atol=1e-6)
    step = jax.jit(decode)
    for column in (4, 5):
        last, cache = step(params, cache, tokens[:, column], positions[:, column])
        np.testing.assert_allclose(last, whole[:, column], rtol=1e-5, atol=1e-6)


def test_descriptions(made):
    for config, params in made.values():
        assert models.config_from_dict(models.config_to_dict(config)) == config
        assert config.is_recurrent
        counted = sum(
            leaf.size
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)
            if leaf.ndim == 2 and "bias" not in str(path)
        )
        assert models.matmul_params(config) == counted
    assert not models.dense_config(vocab_size=4, width=8, num_layers=1, num_heads=2).is_recurrent


def test_a_first_token_forgets_and_has_a_gradient(made):
    """What stands in another segment of the row has no gradient, what stands before in the same one has."""
    config, params = made["lstm"]
    score = models.make_logprob_fn(config)
    shape = (1, 6)
    segments = jnp.array([[1, 1, 1, 2, 2, 2]])
    positions = jnp.array([[0, 1, 2, 0, 1, 2]])
    sequences = Sequences(jnp.arange(6).reshape(shape), positions, segments, segments > 0)
    gradient = jax.jit(jax.grad(lambda p: score(p, sequences).logp[0, 5]))(params)["layer_0"]["recurrence"]
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(gradient))
    moved = Sequences(sequences.tokens.at[0, :3].set(9), positions, segments, sequences.mask)
    both = jax.jit(lambda p, s: score(p, s).logp)
    np.testing.assert_array_equal(both(params, sequences)[0, 4:], both(params, moved)[0, 4:])
