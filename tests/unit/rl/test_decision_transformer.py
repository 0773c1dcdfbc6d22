"""Decision transformer: places in a log against a loop, causality, acting step by step, what is asked for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import make_optimizer
from rlhf_jax.distributed.runtime import compiler_options
from rlhf_jax.rl.algorithms import decision_transformer as dt
from rlhf_jax.rl.envs import environments, transitions
from rlhf_jax.rl.envs.environments import Transition
from rlhf_jax.rl.envs.evaluation import evaluate
from rlhf_jax.rl.loops import offline
from rlhf_jax.rl.loops.runs import make_train_fn
from rlhf_jax.rl.networks.networks import MLP
from rlhf_jax.rl.networks.q_networks import applied
from rlhf_jax.stages import rl_offline

CARTPOLE = environments.make("CartPole-v1")
TINY = dt.Config(
    offline.RunConfig(updates=4, batch_size=4, num_logs=2),
    encoder=MLP((6,)),
    context=4,
    width=8,
    num_layers=1,
)


def log_of():
    """Three episodes of 4, 1 and 3 steps, the second cut."""
    rng = np.random.default_rng(0)
    return Transition(
        obs=rng.normal(size=(8, 4)).astype(np.float32),
        action=rng.integers(0, 2, 8).astype(np.int32),
        reward=np.array([1, 2, -1, 0.5, 3, 1, 1, 1], np.float32),
        terminated=np.isin(np.arange(8), (3, 7)),
        truncated=np.arange(8) == 4,
        next_obs=rng.normal(size=(8, 4)).astype(np.float32),
    )


def test_steps_know_what_is_to_come_and_where_they_stand():
    log, data = dt.prepare(log_of()), log_of()
    returns = np.array([2.5, 1.5, -0.5, 0.5, 3, 3, 2, 1])
    np.testing.assert_allclose(log.steps.returns[:, 0], returns / 3)
    assert (log.scale, log.best) == (3, 3)
    np.testing.assert_array_equal(log.steps.step[:, 0], [0, 1, 2, 3, 0, 0, 1, 2])
    found = dt.sequences(log, jnp.array([2, 3, 4, 6]), length=3)
    expected = [[0, 1, 2], [1, 2, 3], [None, None, 4], [None, 5, 6]]
    for row, steps in enumerate(expected):
        for place, step in enumerate(steps):
            assert bool(found.mask[row, place]) == (step is not None)
            if step is not None:
                np.testing.assert_array_equal(found.obs[row, place], data.obs[step])
                assert found.action[row, place] == data.action[step]


@pytest.fixture(scope="module")
def policy():
    network = dt.make_network(TINY, CARTPOLE[0])
    seen = dt.sequences(dt.prepare(log_of()), jnp.array([3, 6]), length=4)
    inputs = (seen.returns, seen.obs, seen.action, seen.step, seen.mask)
    shapes = jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)
    policy_fn = applied(network)
    return jax.jit(lambda seen: dt.apply_policy(policy_fn, params, seen).logits), policy_fn, params, seen


def test_an_action_is_told_from_what_was_before_it(policy):
    logits, _, _, seen = policy
    first = logits(seen)
    for changed, since in (("action", 2), ("obs", 1), ("returns", 1)):
        old = getattr(seen, changed)
        other = old.at[0, 1].set(1 - old[0, 1] if changed == "action" else old[0, 1] + 2)
        found = logits(dataclasses.replace(seen, **{changed: other}))
        np.testing.assert_array_equal(found[0, :since], first[0, :since])
        assert np.all(np.any(found[0, since:] != first[0, since:], axis=-1)), changed
    hidden = seen.obs.at[1, :2].set(99.0)  # of another episode: not there
    assert not seen.mask[1, :2].any()
    np.testing.assert_array_equal(logits(dataclasses.replace(seen, obs=hidden))[1, 2:], first[1, 2:])


def test_acting_step_by_step_is_the_whole_sequence(policy):
    """With the return of the log's first episode asked for and its rewards paid, contexts are the log's."""
    logits, _, _, _ = policy
    data, log = log_of(), dt.prepare(log_of())
    context = dt.blank_context(CARTPOLE[0], 2, length=4)
    for t in range(4):
        first = jnp.array([t == 0, t == 1])  # the second environment begins again
        obs = jnp.stack([data.obs[t], data.obs[t]])
        context = dt.push(context, obs, first, target=2.5, scale=log.scale)
        actions = context.seen.action.at[:, -1].set(data.action[t])
        context = dataclasses.replace(context, seen=dataclasses.replace(context.seen, action=actions))
        context = dt.observe_reward(context, jnp.full(2, data.reward[t]))
    whole = dt.sequences(log, jnp.array([3, 3]), length=4)
    np.testing.assert_allclose(context.seen.returns[0], whole.returns[0], atol=1e-6)
    np.testing.assert_allclose(logits(context.seen)[0], logits(whole)[0], atol=1e-5)
    np.testing.assert_array_equal(context.seen.mask[1], [False, True, True, True])
    np.testing.assert_array_equal(context.seen.step[1, 1:], [0, 1, 2])
    np.testing.assert_allclose(context.left, [0, 2.5 - 1.5], atol=1e-6)


def test_the_loss_is_that_of_the_actions_that_are_there(policy):
    logits, policy_fn, params, seen = policy
    tx = make_optimizer(TINY.optimizer)
    update = jax.jit(dt.make_update(policy_fn, tx, best=3.0))
    state, metrics = update(dt.init(params, tx, 0.0), dt.Hyper(target_share=0.5), seen)
    logp = np.asarray(jax.nn.log_softmax(logits(seen)))
    there = [(row, t) for row in range(2) for t in range(4) if seen.mask[row, t]]
    assert len(there) == 6
    mean = np.mean([logp[row, t, seen.action[row, t]] for row, t in there])
    np.testing.assert_allclose(metrics["loss"], -mean, rtol=1e-5)
    assert float(state.target) == 1.5


def test_a_run_by_command_and_mistakes():
    options = rl_offline.Options(algo="decision_transformer", set=("context=3", "width=8", "num_layers=1"))
    run, hyper = rl_offline.make_course(options, *CARTPOLE, log_of())
    state = jax.eval_shape(run.init, jax.random.key(0), hyper)
    state, metrics = jax.eval_shape(run.step, state, hyper)
    assert "loss" in metrics
    action, carry = jax.eval_shape(
        lambda s, c: run.act(
            s, jnp.zeros((5, 4)), jnp.zeros(5, bool), c, jax.random.key(0), deterministic=True
        ),
        state,
        run.initial_carry(5),
    )
    assert action.shape == carry.left.shape == (5,)
    with pytest.raises(UserError, match="heads that divide the width"):
        dt.make_network(dataclasses.replace(TINY, num_heads=3), CARTPOLE[0])
    with pytest.raises(UserError, match="no transitions"):
        dt.prepare(jax.tree.map(lambda x: x[:0], log_of()))


@pytest.mark.slow
def test_it_does_as_it_is_asked():
    """A log of which a third is an expert's at 500 and the rest chance at 22: 500 asked for, or 25."""

    def act(state, obs, is_first, carry, key, *, deterministic):
        return (obs @ jnp.array([0.1, 0.5, 1.0, 1.0]) > 0).astype(jnp.int32), carry

    key = jax.random.key(0)
    chance = transitions.random_act_fn(CARTPOLE[0])
    sources = ((act, 4), (chance, 180))
    log = transitions.concatenate(
        [transitions.collect(f, None, *CARTPOLE, key, episodes=n) for f, n in sources]
    )
    course = offline.RunConfig(updates=600, batch_size=32)
    run = dt.make_run(dt.Config(course, context=8, width=32, num_layers=1), CARTPOLE[0], log)
    options = compiler_options()
    state, _ = jax.jit(make_train_fn(run), compiler_options=options)(key, dt.Hyper())

    def score(target):
        agent = dataclasses.replace(state.agent, target=target)
        asked = dataclasses.replace(state, agent=agent)
        return evaluate(run, asked, *CARTPOLE, key, episodes=16, deterministic=False)[0].mean()

    much, little = jax.jit(jax.vmap(score), compiler_options=options)(jnp.array([500.0, 25.0]))
    assert much > 300
    assert little < 100
