"""Process reward models: the update, its denominators, and what it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.algorithms import process_reward
from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer
from rlhf_jax.core.types import Sequences

TX = make_optimizer(OptimizerConfig(clip_norm=100.0))


def log_odds(params, sequences):
    """A step is as good as its last token."""
    return params["odds"][sequences.tokens]


def make_batch(rows=8, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, size=(rows, 6))
    mask = rng.random((rows, 6)) < np.linspace(0.2, 0.9, rows)[:, None]
    labels = np.where(mask, tokens % 2, np.nan).astype(np.float32)
    positions = np.broadcast_to(np.arange(6), tokens.shape)
    sequences = Sequences(*map(jnp.asarray, (tokens, positions, np.ones_like(tokens), mask)))
    return process_reward.Batch(sequences, jnp.asarray(labels))


@pytest.mark.slow
def test_micro_batches_are_one_batch_and_the_gradient_is_the_derivative():
    batch, params = make_batch(), {"odds": jnp.linspace(-1, 1, 5)}
    hyper = process_reward.Hyper(1.0)
    results = []
    for parts in (1, 4):
        tx = optax.identity()
        update = jax.jit(process_reward.make_update(process_reward.Config(parts), log_odds, tx))
        state, metrics = update(process_reward.init(params, tx, jax.random.key(0)), hyper, batch)
        results.append((state.learner.params["odds"], metrics["loss"], metrics["accuracy"]))
    for one, four in zip(*results, strict=True):
        np.testing.assert_allclose(one, four, rtol=1e-5, atol=1e-7)
    mask = np.asarray(batch.sequences.mask)
    tokens, labels = np.asarray(batch.sequences.tokens)[mask], np.asarray(batch.labels)[mask]
    gradient = np.zeros(5)
    np.add.at(gradient, tokens, 1 / (1 + np.exp(-np.asarray(params["odds"])[tokens])) - labels)
    np.testing.assert_allclose(results[0][0], params["odds"] - gradient / mask.sum(), rtol=1e-5)


def test_it_learns_which_steps_are_right():
    update = jax.jit(process_reward.make_update(process_reward.Config(), log_odds, TX))
    state = process_reward.init({"odds": jnp.zeros(5)}, TX, jax.random.key(0))
    batch, hyper = make_batch(32), process_reward.Hyper(0.1)
    state, metrics = jax.jit(
        lambda state: jax.lax.scan(lambda s, _: update(s, hyper, batch), state, None, length=60)
    )(state)
    assert float(metrics["loss"][0]) > 0.69
    assert float(metrics["accuracy"][-1]) == 1.0
    assert (np.asarray(state.learner.params["odds"]) > 0).tolist() == [False, True, False, True, False]
