"""A reference that follows the policy: its course against a loop, and the KL that is taken to it."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tabular
from tiers import few

from rlhf_jax.algorithms import grpo, ppo
from rlhf_jax.algorithms.moving_reference import SyncHyper, sync_reference
from rlhf_jax.rollout.step import make_grpo_train_step, make_ppo_train_step

PLAIN = optax.identity()
LENGTHS = (5, 2, 3, 1)
REWARDS = jnp.array([1.0, -2.0, 0.5, 3.0])


def two_headed_score(params, sequences):
    """Policy and value apart, as `policy` and `value`."""
    return tabular.score({"logits": params["policy"]["logits"], "value": params["value"]}, sequences)


def start(algorithm):
    """(training step of two optimizer steps, state, hyperparameters, trained policy of a state)."""
    params = tabular.init()
    if algorithm == "grpo":
        config = grpo.Config(group_size=4, num_minibatches=2)
        step, hyper = make_grpo_train_step(config, tabular.score, PLAIN), grpo.Hyper(learning_rate=0.1)
        state = grpo.init(params, PLAIN, jax.random.key(0), moving_reference=True)
        return step, state, hyper, lambda state: state.learner.params
    config, hyper = ppo.Config(num_ppo_epochs=1, num_minibatches=2), ppo.Hyper(learning_rate=0.1)
    step = make_ppo_train_step(config, two_headed_score, tabular.score, PLAIN)
    both = {"policy": {"logits": params["logits"], "value": params["value"]}, "value": params["value"]}
    state = ppo.init(both, PLAIN, jax.random.key(0), hyper, moving_reference=True)
    return step, state, hyper, lambda state: state.learner.params["policy"]


def rollout(params, seed):
    return tabular.rollout(params, tabular.rows(seed, LENGTHS), jnp.ones(4, bool))


@pytest.mark.parametrize("algorithm", few(["grpo", "ppo"], "grpo"))
def test_the_reference_follows_as_in_a_loop_and_is_what_the_kl_is_taken_to(algorithm):
    step, state, hyper, policy_of = start(algorithm)
    step = jax.jit(chex.assert_max_traces(step, n=1))
    reference = np.asarray(policy_of(state)["logits"], np.float64)
    # Two optimizer steps in each: the third, sixth and ninth fall into the second, third and fifth update.
    for number, due in enumerate([False, True, True, False, True]):
        alpha = 0.25 * (number + 1) / 2
        sync = SyncHyper(jnp.float32(alpha), jnp.float32(3))
        given = rollout(policy_of(state), number)
        before = policy_of(state)["logits"]
        log_policy, log_reference = (np.asarray(jax.nn.log_softmax(x)) for x in (before, reference))
        state, metrics = step(state, dataclasses.replace(hyper, sync=sync), tabular.init(9), given, REWARDS)
        tokens, mask = (np.asarray(x) for x in (given.sequences.tokens, given.sequences.mask))
        kl = sum(
            log_policy[tokens[b, t - 1], tokens[b, t]] - log_reference[tokens[b, t - 1], tokens[b, t]]
            for b, t in zip(*np.nonzero(mask), strict=True)
        )
        np.testing.assert_allclose(metrics["kl"], kl / len(LENGTHS), rtol=1e-3, atol=1e-5)
        if due:
            reference = alpha * np.asarray(policy_of(state)["logits"], np.float64) + (1 - alpha) * reference
        np.testing.assert_allclose(state.ref_params["logits"], reference, rtol=1e-5, atol=1e-6)
    assert np.abs(reference - tabular.init()["logits"]).max() > 1e-3
    assert int(state.learner.steps) == 10


def test_a_share_of_one_copies_and_steps_that_were_skipped_do_not_count():
    old, new = {"a": jnp.zeros(3)}, {"a": jnp.arange(3.0)}
    sync = functools.partial(sync_reference, old, new, SyncHyper(1.0, 4))
    np.testing.assert_array_equal(sync(before=jnp.int32(3), after=jnp.int32(4))["a"], new["a"])
    for before, after in [(4, 4), (3, 3), (4, 7)]:
        np.testing.assert_array_equal(sync(before=jnp.int32(before), after=jnp.int32(after))["a"], old["a"])


def test_a_moving_average_lags_behind_a_policy_that_moves_steadily():
    sync = SyncHyper(mixup_alpha=0.1, sync_steps=1)

    def step(reference, number):
        policy = number.astype(jnp.float32)
        return sync_reference(reference, policy, sync, before=number - 1, after=number), policy - reference

    _, lag = jax.lax.scan(step, jnp.float32(0.0), jnp.arange(1, 201))
    np.testing.assert_allclose(lag[-1], 1 / 0.1, rtol=1e-3)  # one over the share, in steps
