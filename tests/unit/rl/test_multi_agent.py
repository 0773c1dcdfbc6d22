"""Several agents: mixers and matrix games against enumeration, PPO as the case of one agent, time limits."""

import dataclasses
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.special
from tiers import few

from rlhf_jax.algorithms import ppo as shared
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer
from rlhf_jax.kernels.whitening import batch_moments, denormalize, normalize
from rlhf_jax.rl.algorithms import ippo, maddpg, mappo, ppo, qmix, vdn
from rlhf_jax.rl.envs import environments, matrix_games, multi_agent
from rlhf_jax.rl.envs.joint import JointObs, RawStep
from rlhf_jax.rl.loops.off_policy import RunConfig
from rlhf_jax.rl.loops.on_policy import NetworkConfig
from rlhf_jax.rl.loops.replay import Batch, gather, init_replay, insert
from rlhf_jax.rl.loops.rollout import (
    Inputs,
    RolloutConfig,
    collect,
    init_params,
    init_vector_env,
    make_logprob_fn,
)
from rlhf_jax.rl.networks.distributions import gumbel_softmax
from rlhf_jax.rl.networks.multi_agent import MonotonicMixer, PerAgent, SumMixer
from rlhf_jax.rl.networks.networks import MLP, linear
from rlhf_jax.stages import rl_agents

CLIMBING = np.asarray(matrix_games.CLIMBING)
JOINT_ACTIONS = list(itertools.product(range(3), range(3)))
TX = make_optimizer(OptimizerConfig(clip_norm=1e6, b2=0.999))
SMALL = mappo.Config(
    total_steps=32,
    rollout=RolloutConfig(num_envs=4, num_steps=4),
    encoder=MLP((8,)),
    update=shared.Config(num_ppo_epochs=2, num_minibatches=2),
)


class Alone:
    """A gymnax environment as one with a single agent."""

    num_agents, box, cooperative = 1, None, True

    def __init__(self, name):
        self.env, self.params = environments.make(name)
        self.num_actions, self.max_steps = self.env.num_actions, self.env.max_steps

    def _obs(self, obs):
        return JointObs(obs[None], obs, jnp.ones((1, self.num_actions), bool))

    def reset_env(self, key):
        obs, inner = self.env.raw.reset_env(key, self.params)
        return self._obs(obs), inner

    def step_env(self, key, inner, action):
        obs, inner, reward, terminated, _ = self.env.raw.step_env(key, inner, action[0], self.params)
        cut = self.env.raw.is_truncated(inner, self.params)
        return RawStep(self._obs(obs), inner, reward[None], reward, terminated, cut)


def game_batch(payoffs=CLIMBING) -> Batch:
    """Every joint action of a game of one step, once."""
    game = matrix_games.MatrixGame(tuple(map(tuple, payoffs)))
    obs = jax.tree.map(lambda x: jnp.stack([x] * 9), game.reset_env(jax.random.key(0))[0])
    rewards = jnp.asarray([[payoffs[a, b]] * 2 for a, b in JOINT_ACTIONS], jnp.float32)
    action = jnp.asarray(JOINT_ACTIONS)
    return Batch(obs, action, rewards, jnp.zeros(9), obs, jnp.ones(9))


def least_squares_monotone(payoffs):
    """The table nearest to `payoffs` among those that are monotone in some ranking of each agent's actions.

    A monotone table is a constant and a non-negative sum of indicators of upper sets: least squares under
    signs, for each pair of rankings.
    """
    sets = [set(cells) for k in range(1, 10) for cells in itertools.combinations(JOINT_ACTIONS, k)]
    upper = [s for s in sets if all((i, j) in s for a, b in s for i in range(a, 3) for j in range(b, 3))]
    indicators = [np.array([cell in cells for cell in JOINT_ACTIONS], float) for cells in upper]
    columns = np.stack([np.ones(9), -np.ones(9), *indicators], axis=1)
    best = (np.inf, None)
    for rows, cols in itertools.product(itertools.permutations(range(3)), repeat=2):
        table = payoffs[np.ix_(rows, cols)]
        weights, error = scipy.optimize.nnls(columns, table.reshape(-1))
        fitted = np.empty((3, 3))
        fitted[np.ix_(rows, cols)] = (columns @ weights).reshape(3, 3)
        best = min(best, (error, fitted), key=lambda pair: pair[0])
    return best


def random_mixer(agents=3, state=4, width=5):
    mixer = MonotonicMixer(width, scale=1.0)
    params = mixer.init(jax.random.key(1), jnp.zeros((1, agents)), jnp.zeros((1, state)))
    return lambda values, state: mixer.apply(params, values, state)


def test_mixer_is_monotone_in_every_value():
    mix = random_mixer()
    values, state = jax.random.normal(jax.random.key(2), (2, 64, 4))
    slopes = jax.grad(lambda q: mix(q, state).sum())(3 * values[:, :3])
    assert (slopes >= 0).all()
    assert (slopes > 0.01).mean() > 0.5  # and it does listen to them


def test_mixer_of_unit_weights_is_the_sum():
    """elu(x) = x from 0 on, so the sum is met for values that add up to that, and only bounded below it."""
    mixer = MonotonicMixer(width=1)
    params = mixer.init(jax.random.key(0), jnp.zeros((1, 3)), jnp.zeros((1, 2)))
    unit = jax.tree.map(jnp.zeros_like, params)
    for name in ("first_weights", "second_weights"):
        bias = unit["params"][name]["bias"]
        unit["params"][name]["bias"] = -jnp.ones_like(bias)  # the absolute value makes it 1
    values = jnp.asarray(np.random.default_rng(0).normal(size=(32, 3)), jnp.float32)
    state = jnp.ones((32, 2))
    total = SumMixer().apply({}, values, state)
    np.testing.assert_array_equal(total, values.sum(1))
    mixed = mixer.apply(unit, values, state)
    np.testing.assert_allclose(mixed, np.where(total > 0, total, np.expm1(total)), rtol=1e-5, atol=1e-6)


def test_the_best_joint_action_is_each_agents_best():
    """Individual-global-max, by enumeration of all joint actions."""
    mix = random_mixer()
    values = jax.random.normal(jax.random.key(5), (20, 3, 4))
    state = jax.random.normal(jax.random.key(6), (20, 4))
    joint = np.asarray(list(itertools.product(range(4), repeat=3)))
    taken = np.stack([np.asarray(values)[:, i, joint[:, i]] for i in range(3)], -1)  # [20, 64, 3]
    totals = jax.vmap(mix, (1, None), 1)(jnp.asarray(taken), state)
    np.testing.assert_array_equal(joint[np.argmax(totals, 1)], np.argmax(values, -1))


def fitted_table(config, mixer=None, steps=400):
    """(joint values learned from every joint action of the climbing game equally often, greedy actions)."""
    env = multi_agent.make("climbing_game")
    config = dataclasses.replace(config, encoder=MLP((16,)), **({"mixer": mixer} if mixer else {}))
    network = qmix.make_network(config, env)
    values = qmix.network_fns(network)
    update = qmix.make_update(config, values, TX)
    batch, hyper = game_batch(), qmix.Hyper(learning_rate=0.02)
    state = qmix.init(network.init(jax.random.key(3), batch.obs)["params"], TX)
    state = jax.jit(
        lambda state: jax.lax.fori_loop(0, steps, lambda _, s: update(s, hyper, batch)[0], state)
    )(state)
    every = values.every_fn(state.learner.params, batch.obs)
    taken = qmix.chosen(every, batch.action)
    greedy = tuple(np.argmax(every[0], -1).tolist())
    return np.asarray(values.mix_fn(state.learner.params, taken, batch.obs)).reshape(3, 3), greedy


@pytest.mark.slow
def test_vdn_fits_the_climbing_game_by_rows_and_columns_and_misses_the_optimum():
    table, greedy = fitted_table(vdn.Config(), SumMixer())
    rows, columns = CLIMBING.mean(1, keepdims=True), CLIMBING.mean(0, keepdims=True)
    np.testing.assert_allclose(table, rows + columns - CLIMBING.mean(), atol=0.3)
    assert greedy == (2, 2)  # by the exact fit, too
    assert matrix_games.MatrixGame(matrix_games.CLIMBING).optimum() == ((0, 0), 11.0)


@pytest.mark.slow
def test_qmix_fits_no_better_than_the_best_monotone_table_and_misses_the_optimum():
    error, best = least_squares_monotone(CLIMBING)
    assert np.unravel_index(np.argmax(best), (3, 3)) != (0, 0)  # no monotone fit finds it
    table, greedy = fitted_table(qmix.Config())
    assert greedy != (0, 0)
    additive = CLIMBING.mean(1, keepdims=True) + CLIMBING.mean(0, keepdims=True) - CLIMBING.mean()
    found = np.linalg.norm(table - CLIMBING)
    assert error - 1e-3 <= found < np.linalg.norm(additive - CLIMBING)


def test_the_coordination_game_has_its_optimum_first():
    game = multi_agent.make("coordination_game").raw
    assert game.optimum() == ((0, 0), 10.0)
    payoffs = [
        float(game.step_env(jax.random.key(0), jnp.int32(0), jnp.asarray(pair)).score)
        for pair in JOINT_ACTIONS
    ]
    np.testing.assert_array_equal(payoffs, np.asarray(matrix_games.COORDINATION).reshape(-1))


def quadrature_gradient(logits, gains, temperature):
    """d/dlogits E[gains . softmax((logits + g) / temperature)] for two actions: one logistic variable."""
    difference = logits[0] - logits[1]

    def slope(noise):
        share = scipy.special.expit((difference + noise) / temperature)
        density = scipy.special.expit(noise) * scipy.special.expit(-noise)
        return share * (1 - share) / temperature * density

    first = (gains[0] - gains[1]) * scipy.integrate.quad(slope, -40, 40, limit=400)[0]
    return np.array([first, -first])


def test_gumbel_gradient_has_the_bias_that_quadrature_says_and_less_at_low_temperature():
    logits, gains = jnp.array([0.7, -0.4]), np.array([2.0, -1.0])
    probs = np.asarray(jax.nn.softmax(logits))
    exact = probs * (gains - probs @ gains)  # of the expected payoff, by enumeration
    bias = {}
    for temperature in (1.0, 0.3):
        expected = quadrature_gradient(np.asarray(logits), gains, temperature)

        def payoff(logits, key, temperature=temperature):
            return gumbel_softmax(logits, key, temperature=temperature) @ jnp.asarray(gains)

        keys = jax.random.split(jax.random.key(0), 40_000)
        each = np.asarray(jax.vmap(jax.grad(payoff), (None, 0))(logits, keys))
        error = each.std(0) / 200
        assert np.all(np.abs(each.mean(0) - expected) < 5 * error + 1e-6)
        bias[temperature] = np.abs(expected - exact).max() / np.abs(exact).max()
    assert bias[0.3] < 0.05 < bias[1.0]


@pytest.mark.slow
def test_maddpg_follows_the_gradient_of_the_payoff_against_the_others_mixed_policy():
    """With a critic that is the payoff, and the other agent's actions as they were taken."""
    payoffs = np.array([[3.0, -1.0], [0.5, 2.0]])
    game = matrix_games.MatrixGame(tuple(map(tuple, payoffs)))
    obs = jax.tree.map(lambda x: jnp.stack([x] * 2), game.reset_env(jax.random.key(0))[0])
    table = jnp.asarray(payoffs, jnp.float32)

    def critic_fn(params, inputs):
        first, second = inputs[..., 1:3], inputs[..., 3:5]
        return jnp.einsum("rna,ab,rnb->rn", first, table, second) + 0 * params

    logits = jnp.array([[0.3, -0.2], [-0.5, 0.1]])
    actions = maddpg.discrete_fns(2)
    taken = jnp.array([[1, 0], [1, 1]])  # the second agent's actions: both, equally often

    def value(logits, key):
        raw = jnp.broadcast_to(logits, (2, 2, 2))
        own = actions.sample_fn(raw, obs, key, maddpg.Hyper(gumbel_temperature=0.5))
        inputs = maddpg.own_action_inputs(obs, actions.code_fn(taken), own)
        return critic_fn(jnp.float32(0), inputs).mean(0)  # [agents]

    keys = jax.random.split(jax.random.key(1), 20_000)
    each = np.asarray(jax.vmap(jax.jacrev(value), (None, 0))(logits, keys))
    np.testing.assert_array_equal(each[:, 0, 1], 0)  # one agent's value moves no other agent
    np.testing.assert_array_equal(each[:, 1, 0], 0)
    gains = payoffs.mean(1), payoffs[1]  # against a uniform second agent; against the first one's action 1
    for agent in range(2):
        expected = quadrature_gradient(np.asarray(logits[agent]), gains[agent], 0.5)
        own = each[:, agent, agent]
        assert np.all(np.abs(own.mean(0) - expected) < 5 * own.std(0) / np.sqrt(len(own)) + 1e-6)


def transplanted(params):
    """PPO's parameters as those of several agents that share them."""
    inner = {"encoder": params["actor_torso"]["body"], "head": params["actor_head"]}
    critic = {"encoder": params["critic_torso"]["body"], "head": params["critic_head"]}
    return {"actor": {"network": inner}, "critic": {"network": critic}}


@pytest.mark.slow
def test_one_agent_is_ppo():
    """Same keys, same parameters: rollout, targets, loss and metrics of the update are PPO's."""
    raw = Alone("CartPole-v1")
    joint = multi_agent.adapt("alone", raw)
    config = dataclasses.replace(SMALL, agent_ids=False, normalize_values=False)
    plain = ppo.Config(32, config.rollout, NetworkConfig(encoder=config.encoder), config.update)
    hyper, key = ppo.default_hyper(), jax.random.key(4)

    def batch_and_metrics(network, env, env_params, params, make_batch):
        envs = init_vector_env(network, env, env_params, config.rollout, jax.random.key(5))
        args = (network, env, env_params, config.rollout, params, envs, key)
        batch = make_batch(network, params, collect(*args, gamma=0.99)[1])
        update = shared.make_update(config.update, make_logprob_fn(network), TX)
        return batch, update(shared.init(params, TX, key, hyper), hyper, batch)[1]

    def of_one(network, params, experience):
        return ppo.make_batch(plain, network, params, hyper, experience)

    def of_several(network, params, experience):
        state = mappo.init(shared.init(params, TX, key, hyper), None)
        return mappo.make_batch(config, network, state, hyper, experience)[0]

    one, _ = ppo.make_learning(plain, raw.env)
    params = init_params(one, raw.env, jax.random.key(2))
    batch, metrics = jax.jit(lambda: batch_and_metrics(one, raw.env, raw.params, params, of_one))()
    network, _ = mappo.make_learning(config, joint, central=True)
    same = transplanted(params)
    other, found = jax.jit(lambda: batch_and_metrics(network, joint, None, same, of_several))()
    for name in ("old_logp", "old_values", "advantages", "returns"):
        np.testing.assert_allclose(getattr(batch, name), getattr(other, name), rtol=1e-5, atol=1e-6)
    for name, value in metrics.items():
        np.testing.assert_allclose(value, found[name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_shared_parameters_do_not_mind_the_order_of_agents():
    config = dataclasses.replace(SMALL, agent_ids=False)
    env = multi_agent.make("coordination_game")
    network, _ = mappo.make_learning(config, env, central=False)
    rng = np.random.default_rng(0)
    own = jnp.asarray(rng.normal(size=(6, 2, 1)), jnp.float32)
    obs = JointObs(own, jnp.ones((6, 1)), jnp.ones((6, 2, 3), bool))
    params = network.init(jax.random.key(0), obs, jnp.zeros(6, bool), ())["params"]
    action = jnp.asarray(rng.integers(0, 3, (6, 2)))
    arrays = [jnp.asarray(rng.normal(size=(6, 2)), jnp.float32) for _ in range(4)]
    batch = shared.Batch(Inputs(obs, action, jnp.zeros(6, bool), ()), jnp.ones((6, 2), bool), *arrays)
    swapped = jax.tree.map(lambda x: x[:, ::-1] if x.shape[1:2] == (2,) else x, batch)
    tx = make_optimizer(OptimizerConfig(optimizer="sgd"))
    once = shared.Config(num_ppo_epochs=1, num_minibatches=1)
    update = jax.jit(shared.make_update(once, make_logprob_fn(network), tx))
    hyper = mappo.default_hyper(learning_rate=1.0)
    state = shared.init(params, tx, jax.random.key(1), hyper)
    one, other = (update(state, hyper, rows)[0].learner.params for rows in (batch, swapped))
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), one, params)
    assert max(jax.tree.leaves(moved)) > 0.01
    for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_agents_with_their_own_parameters_are_separate_networks():
    network = PerAgent(linear(3, 1.0), shared=False)
    inputs = jax.random.normal(jax.random.key(0), (5, 2, 4))
    params = network.init(jax.random.key(1), inputs)
    outputs = network.apply(params, inputs)
    for agent in range(2):
        kernel = params["params"]["network"]["kernel"][agent]
        np.testing.assert_allclose(outputs[:, agent], inputs[:, agent] @ kernel, rtol=1e-5, atol=1e-6)
    shared_outputs = PerAgent(linear(3, 1.0)).init_with_output(jax.random.key(1), inputs)[0]
    assert shared_outputs.shape == (5, 2, 3)


@pytest.mark.parametrize("ends", few([False, True], False))
def test_time_limits_are_no_ends(ends):
    """Both agents always get 1 and the critic says 50: that is left behind a limit, and 0 behind an end."""
    game = matrix_games.MatrixGame(((1.0, 1.0), (1.0, 1.0)), length=3, ends=ends)
    env = multi_agent.adapt("constant", game)
    config = dataclasses.replace(SMALL, normalize_values=False)
    config = dataclasses.replace(config, update=dataclasses.replace(config.update, whiten_advantages=False))
    network, learning = mappo.make_learning(config, env, central=True)
    params = init_params(network, env, jax.random.key(0))
    params = {**params, "critic": jax.tree.map(jnp.zeros_like, params["critic"])}
    params["critic"]["network"]["head"]["bias"] = jnp.full(1, 50.0)
    hyper = mappo.default_hyper(gae_lambda=0.0)

    @jax.jit
    def batch_of_a_rollout():
        agent = learning.init_fn(params, jax.random.key(1), hyper)
        envs = init_vector_env(network, env, None, config.rollout, jax.random.key(2))
        args = (network, env, None, config.rollout, params, envs, jax.random.key(3))
        return mappo.make_batch(config, network, agent, hyper, collect(*args, gamma=0.99)[1])[0]

    batch = batch_of_a_rollout()
    returns = np.asarray(batch.returns).reshape(4, 4, 2)
    np.testing.assert_allclose(returns[:, [0, 1, 3]], 1 + 0.99 * 50, rtol=1e-6)
    np.testing.assert_allclose(returns[:, 2], 1.0 if ends else 1 + 0.99 * 50, rtol=1e-6)

    _, seen = env.step(jax.random.key(0), env.reset(jax.random.key(0), None), jnp.zeros(2, jnp.int32), None)
    replay = init_replay(seen, rows=3, num_envs=1)
    state, rows = env.reset(jax.random.key(0), None), []
    for _ in range(3):
        state, seen = env.step(jax.random.key(0), state, jnp.zeros(2, jnp.int32), None)
        rows.append(jax.tree.map(lambda x: x[None], seen))
    replay = insert(replay, jax.tree.map(lambda *x: jnp.stack(x), *rows))
    sampled = gather(replay, jnp.arange(3), gamma=0.9)
    np.testing.assert_allclose(sampled.discount, [0.9, 0.9, 0.0 if ends else 0.9])
    assert sampled.reward.shape == (3, 2)


def test_values_come_back_from_their_scale():
    values = jnp.asarray([3.0, -1.0, 8.0, 2.0])
    moments = batch_moments(values, jnp.ones(4, bool))
    np.testing.assert_allclose(denormalize(normalize(values, moments), moments), values, rtol=1e-5)
    np.testing.assert_allclose(denormalize(jnp.float32(1), moments), values.mean() + values.std(), rtol=1e-6)


def test_unavailable_actions_are_never_taken():
    class Half(matrix_games.MatrixGame):
        """The first agent has action 2 alone."""

        def _observe(self):
            available = jnp.asarray([[False, False, True], [True, True, True]])
            return JointObs(jnp.ones((2, 1)), jnp.ones(1), available)

    env = multi_agent.adapt("half", Half(matrix_games.CLIMBING))
    network, _ = mappo.make_learning(SMALL, env, central=True)
    params = init_params(network, env, jax.random.key(0))
    obs = jax.vmap(env.reset, (0, None))(jax.random.split(jax.random.key(0), 200), None).obs
    distribution, _ = network.apply({"params": params}, obs, jnp.zeros(200, bool), (), method="act")
    action = distribution.sample(jax.random.key(1))
    assert (action[:, 0] == 2).all()
    assert set(np.unique(action[:, 1])) == {0, 1, 2}
    assert jnp.isfinite(distribution.entropy()).all()
    np.testing.assert_array_equal(distribution.entropy()[:, 0], 0)


def test_mistakes_are_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "jaxmarl", None)  # as if it were not installed
    multi_agent.make.cache_clear()
    with pytest.raises(UserError, match=r"jaxmarl is not installed: pip install 'rlhf_jax\[marl\]'"):
        rl_agents.make_environment("mpe_simple_spread")
    with pytest.raises(UserError, match="nearest name is 'climbing_game'"):
        rl_agents.make_environment("climbing_gam")
    game = multi_agent.make("climbing_game")
    with pytest.raises(UserError, match="ppo is for one agent and climbing_game has 2: choose one of ippo"):
        rl_agents.make_agent("ppo", game, 0, ())
    cartpole = rl_agents.make_environment("CartPole-v1")[0]
    with pytest.raises(UserError, match="qmix is for several agents and CartPole-v1 has 1"):
        rl_agents.make_agent("qmix", cartpole, 0, ())
    competitive = dataclasses.replace(game, cooperative=False)
    with pytest.raises(UserError, match="agents compete: use ippo or maddpg"):
        qmix.make_network(qmix.Config(), competitive)
    normalizing = dataclasses.replace(SMALL, rollout=RolloutConfig(normalize_obs=True))
    with pytest.raises(UserError, match="normalize_obs and normalize_rewards are for one agent"):
        ippo.make_run(normalizing, game, None)


LITTLE = RunConfig(
    total_steps=4_000,
    learning_starts=200,
    num_envs=4,
    train_every=5,
    updates=2,
    batch_size=64,
    capacity=2_000,
    num_logs=5,
)


def game_agent(module):
    """(config, hyper) for a matrix game."""
    if module in (ippo, mappo):
        rollout = RolloutConfig(num_envs=64, num_steps=1)
        return module.Config(total_steps=64 * 60, rollout=rollout), mappo.default_hyper(learning_rate=5e-3)
    config = dataclasses.replace(module.Config(), run=LITTLE)
    if module is maddpg:
        return config, maddpg.Hyper(learning_rate=5e-3, actor_learning_rate=5e-3)
    return config, qmix.Hyper(learning_rate=5e-3, epsilon_steps=2_000.0, target_update_interval=20)


@pytest.mark.parametrize("module", few([mappo, qmix, maddpg], qmix))
@pytest.mark.slow
def test_every_number_can_be_swept(module):
    env = multi_agent.make("coordination_game")
    config, hyper = game_agent(module)
    hypers = jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * 2), hyper)
    train = jax.vmap(module.make_train(config, env, None), (None, 0))
    _, history = jax.eval_shape(train, jax.random.key(0), hypers)
    assert {x.shape[0] for x in history.values()} == {2}


@pytest.mark.slow
@pytest.mark.parametrize("module", [ippo, mappo, vdn, qmix, maddpg])
def test_whole_runs_solve_the_coordination_game_and_sweep(module):
    """Eight seeds; the joint action of the best payoff, known by enumeration, on at least seven."""
    env = multi_agent.make("coordination_game")
    config, hyper = game_agent(module)
    run = module.make_run(config, env, None)
    train = module.make_train(config, env, None)
    states, history = jax.jit(jax.vmap(train, (0, None)))(jax.random.split(jax.random.key(0), 8), hyper)
    obs = jax.vmap(env.reset, (0, None))(jax.random.split(jax.random.key(1), 1), None).obs
    act = jax.vmap(lambda s: run.act(s, obs, jnp.ones(1, bool), (), jax.random.key(2), deterministic=True)[0])
    right = np.all(np.asarray(act(states))[:, 0] == np.asarray(env.raw.optimum()[0]), axis=-1)
    assert right.sum() >= 7
    assert history["steps"].shape[0] == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["mpe_simple_spread", "mpe_simple_tag", "smax_3m", "overcooked_cramped_room"]
)
def test_environments_of_jaxmarl_step_as_it_does(name):
    """Rewards and observations are JaxMARL's own, of the same keys and actions; limits are told from ends."""
    pytest.importorskip("jaxmarl")
    env = multi_agent.make(name)
    raw = env.raw.raw
    key = jax.random.key(0)
    state, (obs, inner) = env.reset(key, None), raw.reset(key)
    step_theirs, step_ours = jax.jit(raw.step_env), jax.jit(env.step)
    done = False
    for number in range(env.max_steps):
        key, act_key, step_key = jax.random.split(key, 3)
        numbers = jax.random.uniform(act_key, state.obs.available.shape)
        action = jnp.argmax(jnp.where(state.obs.available, numbers, -1), -1)
        theirs = dict(zip(raw.agents, action, strict=True))
        obs, inner, rewards, dones, _ = step_theirs(jax.random.split(step_key)[0], inner, theirs)
        state, seen = step_ours(step_key, state, action, None)
        scored = env.raw.scored or raw.agents
        np.testing.assert_allclose(seen.reward, np.mean([rewards[a] for a in scored]), rtol=1e-5, atol=1e-6)
        for agent, own in zip(raw.agents, seen.next_obs.own, strict=True):
            flat = np.asarray(obs[agent]).reshape(-1)
            np.testing.assert_allclose(own[: flat.size], flat, rtol=1e-5, atol=1e-5)
        done = bool(dones["__all__"])
        assert bool(seen.done) == done
        if done:
            assert bool(seen.truncated) == (name != "smax_3m" or number == env.max_steps - 1)
            break
    assert done
