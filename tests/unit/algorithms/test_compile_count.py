"""Updates are compiled once: new batches, the state they return, and a sweep's scalars trace nothing anew."""

import chex
import jax
import jax.numpy as jnp
import optax
import tabular

from rlhf_jax.algorithms import grpo

LENGTHS = (1, 5, 2, 4, 3, 3)


def _batch(config, seed):
    params, sequences = tabular.init(seed), tabular.rows(seed, LENGTHS)
    rollout = tabular.rollout(params, sequences, jnp.ones(len(LENGTHS), bool))
    logp = tabular.score(params, sequences).logp
    rewards = jax.random.uniform(jax.random.key(seed), (len(LENGTHS),))
    ref_logp = tabular.score(tabular.init(9), sequences).logp
    batch, _ = grpo.make_batch(config, grpo.Hyper(), rollout, rewards, logp, ref_logp)
    return batch


def test_grpo_over_several_steps():
    config = grpo.Config(group_size=3, num_iterations=2, num_minibatches=2)
    tx = optax.scale_by_adam()
    update = jax.jit(chex.assert_max_traces(grpo.make_update(config, tabular.score, tx), n=1))
    state = grpo.init(tabular.init(), tx, jax.random.key(0))
    for step in range(4):
        hyper = grpo.Hyper(learning_rate=1e-2 / (step + 1), epsilon_high=0.2 + 0.1 * step, kl_coef=0.1 * step)
        state, metrics = update(state, hyper, _batch(config, step))
        assert jnp.isfinite(metrics["loss"])
    assert int(state.learner.steps) == 4 * 2 * 2  # so it did train, in the one program
