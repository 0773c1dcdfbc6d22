"""DQN: targets against NumPy, identities, exact values of a lake, whole runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from seeds_side_by_side import evaluation_returns
from tiers import few

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer
from rlhf_jax.evaluation.statistics import interquartile_mean
from rlhf_jax.rl.algorithms import dqn
from rlhf_jax.rl.envs import environments
from rlhf_jax.rl.loops.off_policy import RunConfig
from rlhf_jax.rl.loops.replay import Batch
from rlhf_jax.rl.loops.runs import make_train_fn
from rlhf_jax.rl.networks.networks import MLP, ObsEncoder
from rlhf_jax.rl.networks.q_networks import ActionInputValue, ActionValues
from rlhf_jax.rl.tabular import dynamic_programming

CARTPOLE = environments.make("CartPole-v1")
SMALL = MLP((16,), nn.relu)
SHORT = RunConfig(
    total_steps=400, learning_starts=50, capacity=200, batch_size=16, num_logs=2, num_envs=2, train_every=5
)
TX = make_optimizer(OptimizerConfig(clip_norm=10.0, b2=0.999))


def batch_of(count: int = 12, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    return Batch(
        obs=jnp.asarray(rng.normal(size=(count, 4)), jnp.float32),
        action=jnp.asarray(rng.integers(0, 3, count), jnp.int32),
        reward=jnp.asarray(rng.normal(size=count), jnp.float32),
        discount=jnp.asarray(rng.choice([0.0, 0.9], count), jnp.float32),
        next_obs=jnp.asarray(rng.normal(size=(count, 4)), jnp.float32),
        weight=jnp.asarray(rng.uniform(0.1, 1, count), jnp.float32),
    )


def agent_of(network: nn.Module, seed: int = 0) -> tuple[dqn.State, dqn.ValueFns]:
    params = network.init(jax.random.key(seed), jnp.zeros((1, 4)))["params"]
    return dqn.init(params, TX), dqn.network_fns(network)


NETWORKS = {
    "all": ActionValues(ObsEncoder(SMALL, (4,)), 3),
    "dueling": ActionValues(ObsEncoder(SMALL, (4,)), 3, dueling=True),
    "scalar": ActionInputValue(ObsEncoder(SMALL, (4,)), 3, width=8),
}


def assert_trees_close(a, b, **options):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **options)


@pytest.mark.parametrize("name", few(NETWORKS, list(NETWORKS)[-1]))
def test_both_forms_agree_on_the_action_taken(name):
    state, values = agent_of(NETWORKS[name])
    batch = batch_of()
    every = values.every_fn(state.learner.params, batch.obs)
    chosen = values.chosen_fn(state.learner.params, batch.obs, batch.action)
    assert every.shape == (12, 3)
    np.testing.assert_allclose(chosen, every[jnp.arange(12), batch.action], rtol=1e-5)


def test_dueling_advantages_have_mean_zero():
    network = ActionValues(ObsEncoder(SMALL, (4,)), 3, dueling=True)
    params = network.init(jax.random.key(0), jnp.zeros((1, 4)))["params"]
    shifted = {**params, "actions": {**params["actions"], "bias": params["actions"]["bias"] + 5.0}}
    obs = batch_of().obs
    np.testing.assert_allclose(
        network.apply({"params": params}, obs), network.apply({"params": shifted}, obs), atol=1e-5
    )


@pytest.mark.parametrize("double", few([False, True], True))
@pytest.mark.parametrize("name", NETWORKS)
def test_loss_and_errors_against_a_loop(name, double):
    state, values = agent_of(NETWORKS[name])
    state = dataclasses.replace(state, target_params=agent_of(NETWORKS[name], seed=1)[0].target_params)
    batch, hyper = batch_of(), dqn.Hyper(huber_delta=0.7)
    update = jax.jit(dqn.make_update(dqn.Config(double=double), values, TX))
    _, metrics, errors = update(state, hyper, batch)

    now = np.asarray(values.every_fn(state.learner.params, batch.obs))
    after = np.asarray(values.every_fn(state.target_params, batch.next_obs))
    choosing = np.asarray(values.every_fn(state.learner.params, batch.next_obs)) if double else after
    losses = []
    for i in range(12):
        target = batch.reward[i] + batch.discount[i] * after[i, np.argmax(choosing[i])]
        error = float(now[i, batch.action[i]] - target)
        np.testing.assert_allclose(errors[i], error, atol=1e-5)
        size = abs(error)
        losses.append(batch.weight[i] * (size**2 / 2 if size < 0.7 else 0.7 * (size - 0.35)))
    np.testing.assert_allclose(metrics["value_loss"], np.mean(losses), rtol=1e-5)


def test_double_is_single_while_both_networks_are_one():
    state, values = agent_of(NETWORKS["all"])
    results = [
        jax.jit(dqn.make_update(dqn.Config(double=double), values, TX))(state, dqn.Hyper(), batch_of())
        for double in (False, True)
    ]
    assert_trees_close(results[0], results[1], rtol=1e-6)


def test_the_target_network_moves_when_due_and_by_its_rate():
    state, values = agent_of(NETWORKS["all"])
    update = jax.jit(dqn.make_update(dqn.Config(), values, TX))
    hyper = dqn.Hyper(target_update_interval=2, tau=0.25)
    first = state.target_params
    state, _, _ = update(state, hyper, batch_of())
    assert_trees_close(state.target_params, first, rtol=0)
    state, _, _ = update(state, hyper, batch_of())
    mixed = jax.tree.map(lambda new, old: 0.25 * new + 0.75 * old, state.learner.params, first)
    assert_trees_close(state.target_params, mixed, rtol=1e-5)


def test_a_batch_with_nan_leaves_everything_as_it_was():
    state, values = agent_of(NETWORKS["all"])
    batch = dataclasses.replace(batch_of(), reward=jnp.full(12, jnp.nan))
    after, metrics, _ = jax.jit(dqn.make_update(dqn.Config(), values, TX))(state, dqn.Hyper(), batch)
    assert metrics["skipped"] == 1
    assert_trees_close(after.learner.params, state.learner.params, rtol=0)


def lake_batch(lake: dynamic_programming.DecisionProcess, gamma: float) -> Batch:
    """Every state and action of a lake without slips once; observations are numbers of states."""
    states, actions = np.meshgrid(np.flatnonzero(~np.asarray(lake.terminal)), np.arange(4), indexing="ij")
    states, actions = states.reshape(-1), actions.reshape(-1)
    next_states = np.argmax(np.asarray(lake.transitions)[states, actions], axis=-1)
    return Batch(
        obs=jnp.asarray(states),
        action=jnp.asarray(actions),
        reward=lake.rewards[states, actions, next_states],
        discount=jnp.where(lake.terminal[next_states], 0, gamma),
        next_obs=jnp.asarray(next_states),
        weight=jnp.ones(len(states)),
    )


def learned_lake(values: dqn.ValueFns, network: nn.Module, update, hyper, batch: Batch, updates: int):
    params = network.init(jax.random.key(0), jnp.zeros(1, jnp.int32))["params"]

    def step(state, _):
        return update(state, hyper, batch)[0], None

    state = jax.jit(lambda s: jax.lax.scan(step, s, length=updates)[0])(dqn.init(params, TX))
    return values.every_fn(state.learner.params, batch.obs), batch


@pytest.mark.parametrize("double", [False, True])
def test_it_finds_the_exact_values_of_a_lake(double):
    lake = dynamic_programming.frozen_lake(slippery=False)
    exact, _ = dynamic_programming.value_iteration(lake, gamma=0.8)
    q = dynamic_programming.action_values(lake, exact, gamma=0.8)
    network = ActionValues(ObsEncoder(MLP(()), (), 16), 4)  # linear in one-hot states: a table
    values = dqn.network_fns(network)
    update = dqn.make_update(dqn.Config(double=double), values, TX)
    hyper = dqn.Hyper(learning_rate=0.01, target_update_interval=20)
    learned, batch = learned_lake(values, network, update, hyper, lake_batch(lake, 0.8), 3000)
    np.testing.assert_allclose(learned, q[batch.obs], atol=2e-3)


def test_users_mistakes_are_one_sentence():
    pendulum = environments.make("Pendulum-v1")
    with pytest.raises(UserError, match="discrete actions"):
        dqn.make_run(dqn.Config(), *pendulum)
    with pytest.raises(UserError, match="dueling"):
        dqn.make_run(dqn.Config(dueling=True, action_input=True), *CARTPOLE)
    with pytest.raises(UserError, match="total_steps"):
        dqn.make_run(dqn.Config(run=dataclasses.replace(SHORT, total_steps=60)), *CARTPOLE)


def plain(tree):
    def leaf(x):
        return jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    return jax.tree.map(lambda x: np.asarray(leaf(x)), tree)


@pytest.mark.slow
def test_resume_is_bit_identical_with_everything_on():
    run = dqn.make_run(
        dqn.Config(
            run=dataclasses.replace(SHORT, n_step=3, updates=2), encoder=SMALL, dueling=True, prioritized=True
        ),
        *CARTPOLE,
    )
    hyper = dqn.Hyper(epsilon_steps=200.0)
    step = jax.jit(run.step)
    middle, _ = step(jax.jit(run.init)(jax.random.key(0), hyper), hyper)
    saved = plain(middle)
    loaded = jax.tree.map(
        lambda x, like: (
            jax.random.wrap_key_data(x)
            if jax.dtypes.issubdtype(like.dtype, jax.dtypes.prng_key)
            else jnp.asarray(x)
        ),
        saved,
        middle,
    )
    straight, history = step(middle, hyper)
    resumed, _ = step(loaded, hyper)
    for a, b in zip(jax.tree.leaves(plain(straight)), jax.tree.leaves(plain(resumed)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert straight.steps == 50 + 2 * run.steps_per_update
    assert history["episodes"] > 0
    assert np.isfinite(history["value_loss"])


@pytest.mark.slow
def test_vmap_over_keys_and_every_hyper_equals_single_runs_and_copies_no_replay():
    config = dqn.Config(run=dataclasses.replace(SHORT, capacity=50_000), encoder=SMALL)
    train = make_train_fn(dqn.make_run(config, *CARTPOLE))
    hypers = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32) * jnp.array([1.0, 0.9]), dqn.Hyper(epsilon_steps=200.0)
    )
    keys = jax.random.split(jax.random.key(0), 2)
    compiled = jax.jit(jax.vmap(train)).lower(keys, hypers).compile()
    memory = compiled.memory_analysis()
    replay = 2 * 50_000 * (4 * 4 * 2 + 4 + 4 + 1 + 1)
    assert memory is not None
    assert memory.output_size_in_bytes > replay
    assert memory.temp_size_in_bytes < 0.2 * replay

    together, history = compiled(keys, hypers)
    alone = jax.jit(train)
    for i in range(2):
        state, single = alone(keys[i], jax.tree.map(lambda x, i=i: x[i], hypers))
        np.testing.assert_array_equal(together.replay.data.action[i], state.replay.data.action)
        np.testing.assert_allclose(history["value_loss"][i], single["value_loss"], rtol=1e-4)
        np.testing.assert_array_equal(history["episodes"][i], single["episodes"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"double": False}, {"action_input": True}], ids=["double", "single", "action_input"]
)
def test_cartpole(changes):
    """The table's settings, seeds and statistic: above 475, what gymnasium counts as solved.

    A quarter of the seeds end below it, so that of four often two do, by chance.
    """
    usual = dataclasses.replace(dqn.Config().run, total_steps=500_000)
    run = dqn.make_run(dqn.Config(run=usual, **changes), *CARTPOLE)
    assert interquartile_mean(evaluation_returns(run, CARTPOLE, dqn.Hyper(), seeds=16)) > 475


@pytest.mark.slow
def test_cartpole_with_dueling_networks_priorities_and_three_steps():
    """Three seeds, 60,000 steps each: at least 150 on average (a random policy gets 22)."""
    usual = RunConfig(total_steps=60_000, learning_starts=1000, num_envs=4, train_every=2, n_step=3)
    hyper = dqn.Hyper(learning_rate=1e-3, epsilon_steps=15_000.0, target_update_interval=100)
    run = dqn.make_run(dqn.Config(run=usual, dueling=True, prioritized=True), *CARTPOLE)
    assert np.mean(evaluation_returns(run, CARTPOLE, hyper, seeds=3)) > 150
