"""Option-critic: both gradients and the returns against enumeration and loops, one option as A2C, runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.core.train_state import OptimizerConfig
from rlhf_jax.distributed.runtime import compiler_options
from rlhf_jax.losses.hierarchies import termination_loss
from rlhf_jax.rl.algorithms import a2c, option_critic
from rlhf_jax.rl.envs import environments
from rlhf_jax.rl.envs.environments import Transition
from rlhf_jax.rl.envs.evaluation import evaluate
from rlhf_jax.rl.loops.on_policy import NetworkConfig
from rlhf_jax.rl.loops.rollout import Experience, RolloutConfig
from rlhf_jax.rl.loops.runs import make_train_fn
from rlhf_jax.rl.networks.hierarchies import OptionCarry, policy_of
from rlhf_jax.rl.networks.networks import MLP

CARTPOLE = environments.make("CartPole-v1")
LINEAR = option_critic.make_network(option_critic.Config(num_options=3, encoder=MLP(())), CARTPOLE[0])
HYPER = option_critic.default_hyper(
    gamma=0.9, lambda_=0.6, epsilon=0.3, deliberation_cost=0.2, entropy_coef=0.1
)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# The termination gradient, by enumeration ------------------------------------------------------------


class Enumerated:
    """Three states, two options: chance of each move and reward under each option, choice of options."""

    gamma, cost = 0.9, 0.3

    def __init__(self):
        rng = np.random.default_rng(0)
        self.moves = rng.dirichlet(np.ones(3), size=(2, 3))
        self.rewards = rng.normal(size=(2, 3))
        self.choice = rng.dirichlet(np.ones(2), size=3)

    def step(self, ends):
        """P((s, o) -> (s', o')) of what arrives in s with o, may end there, and moves on."""
        stay = np.einsum("so,op->sop", 1 - ends, np.eye(2)) + np.einsum("so,sp->sop", ends, self.choice)
        return np.einsum("sop,pst->sotp", stay, self.moves)

    def values(self, ends):
        """Q(s, o) and A(s, o), by solving their equations."""
        size = 6
        keep = np.einsum("ost,to,op->sotp", self.moves, 1 - ends, np.eye(2))
        again = np.einsum("ost,to,tp->sotp", self.moves, ends, self.choice)
        paid = self.rewards.T - self.gamma * self.cost * np.einsum("ost,to->so", self.moves, ends)
        system = np.eye(size) - self.gamma * (keep + again).reshape(size, size)
        q = np.linalg.solve(system, paid.reshape(size)).reshape(3, 2)
        return q, q - np.sum(self.choice * q, axis=1, keepdims=True)

    def upon_arrival(self, logits):
        """U of option 1 in state 0."""
        ends = sigmoid(logits)
        q, advantages = self.values(ends)
        return (q - ends * (advantages + self.cost))[0, 1]


def test_the_termination_gradient_is_that_of_the_value_upon_arrival():
    process, logits = Enumerated(), np.random.default_rng(1).normal(size=(3, 2))
    numeric = np.zeros((3, 2))
    for place in np.ndindex(3, 2):
        shift = np.zeros((3, 2))
        shift[place] = 1e-5
        change = process.upon_arrival(logits + shift) - process.upon_arrival(logits - shift)
        numeric[place] = change / 2e-5
    at, occupancy = np.zeros((3, 2)), np.zeros((3, 2))
    at[0, 1] = 1
    for k in range(400):  # how often an option arrives in a state, discounted
        occupancy += process.gamma**k * at
        at = np.einsum("so,sotp->tp", at, process.step(sigmoid(logits)))
    advantages = jnp.asarray(process.values(sigmoid(logits))[1], jnp.float32)

    def loss(logits, mask):
        ends, cost = jax.nn.sigmoid(logits), process.cost
        return termination_loss(ends, advantages, mask, deliberation_cost=cost, denominator=1.0)[0]

    alone = jnp.eye(6, dtype=bool).reshape(6, 3, 2)  # an arrival at a time, then as often as it happens
    slopes = jax.vmap(jax.grad(loss), (None, 0))(jnp.asarray(logits, jnp.float32), alone)
    found = np.einsum("n,nso->so", occupancy.reshape(6), slopes)
    np.testing.assert_allclose(-found, numeric, rtol=1e-4, atol=1e-5)


# A rollout, by loops ---------------------------------------------------------------------------------


def params_of():
    rng = np.random.default_rng(3)

    def layer(width):
        return {
            "kernel": jnp.asarray(rng.normal(size=(4, width)), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=width), jnp.float32),
        }

    heads = {"actor_head": {"Dense_0": layer(6)}, "critic_head": layer(3), "termination_head": layer(3)}
    return {**heads, "epsilon": jnp.zeros(())}


def applied(layer, obs):
    return np.asarray(obs, np.float64) @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])


def experience_of(batch=2, steps=6):
    rng = np.random.default_rng(0)
    terminated, truncated = np.zeros((batch, steps), bool), np.zeros((batch, steps), bool)
    terminated[0, 2] = truncated[1, 3] = True
    done = terminated | truncated
    first = np.concatenate([np.ones((batch, 1), bool), done[:, :-1]], axis=1)
    begun = first | (rng.random((batch, steps)) < 0.5)
    option = np.zeros((batch, steps), int)
    for row, t in np.ndindex(batch, steps):
        option[row, t] = rng.integers(3) if begun[row, t] else option[row, t - 1]
    obs, next_obs = (jnp.asarray(rng.normal(size=(batch, steps, 4)), jnp.float32) for _ in range(2))
    next_obs = next_obs.at[:, :-1].set(jnp.where(done[:, :-1, None], next_obs[:, :-1], obs[:, 1:]))
    seen = Transition(
        obs=obs,
        action=jnp.asarray(rng.integers(0, 2, (batch, steps)), jnp.int32),
        reward=jnp.asarray(rng.normal(size=(batch, steps)), jnp.float32),
        terminated=jnp.asarray(terminated),
        truncated=jnp.asarray(truncated),
        next_obs=next_obs,
    )
    drawn = OptionCarry(jnp.asarray(option, jnp.int32), jnp.asarray(begun))
    carry = OptionCarry(jnp.zeros(batch, jnp.int32), jnp.zeros(batch, bool))
    return Experience(seen, jnp.asarray(first), carry, jnp.zeros((batch, steps)), drawn)


def test_returns_against_a_loop_over_ends_cuts_and_choices():
    experience, params = experience_of(), params_of()
    found = option_critic.make_batch(LINEAR, params, HYPER, experience)
    seen, drawn = jax.tree.map(np.asarray, (experience.transition, experience.drawn))
    expected, advantages, on_arrival = np.zeros((2, 6)), np.zeros((2, 6)), np.zeros((2, 6))
    for row in range(2):
        for t in reversed(range(6)):
            option = drawn.option[row, t]
            q = applied(params["critic_head"], seen.next_obs[row, t])
            ends = sigmoid(applied(params["termination_head"], seen.next_obs[row, t]))[option]
            mean = 0.7 * q.max() + 0.3 * q.mean()
            upon_arrival = (1 - ends) * q[option] + ends * (mean - 0.2)
            if seen.terminated[row, t]:
                future = 0.0
            elif seen.truncated[row, t] or t == 5:
                future = upon_arrival
            else:
                paid = 0.2 * drawn.begun[row, t + 1]
                future = 0.4 * upon_arrival + 0.6 * (expected[row, t + 1] - paid)
            expected[row, t] = seen.reward[row, t] + 0.9 * future
            here = applied(params["critic_head"], seen.obs[row, t])[option]
            advantages[row, t], on_arrival[row, t] = expected[row, t] - here, q[option] - mean
    np.testing.assert_allclose(found.returns, expected, atol=1e-5)
    np.testing.assert_allclose(found.advantages, advantages, atol=1e-5)
    np.testing.assert_allclose(found.option_advantages, on_arrival, atol=1e-5)


def test_loss_and_gradients_against_a_loop():
    experience, params = experience_of(), params_of()
    batch = option_critic.make_batch(LINEAR, params, HYPER, experience)
    loss_fn = jax.value_and_grad(option_critic.make_option_critic_loss(LINEAR), has_aux=True)
    (loss, _), slopes = loss_fn(params, HYPER, batch)
    seen, drawn = jax.tree.map(np.asarray, (experience.transition, experience.drawn))
    total, values, ends = 0.0, np.zeros(3), np.zeros(3)
    for row, t in np.ndindex(2, 6):
        option = drawn.option[row, t]
        logits = applied(params["actor_head"]["Dense_0"], seen.obs[row, t]).reshape(3, 2)[option]
        logp = logits - np.log(np.sum(np.exp(logits)))
        error = applied(params["critic_head"], seen.obs[row, t])[option] - batch.returns[row, t]
        beta = sigmoid(applied(params["termination_head"], seen.next_obs[row, t]))[option]
        worth = (batch.option_advantages[row, t] + 0.2) * ~seen.terminated[row, t]
        total += -batch.advantages[row, t] * logp[seen.action[row, t]] + 0.5 * error**2 / 2
        total += beta * worth + 0.1 * np.sum(np.exp(logp) * logp)
        values[option] += 0.5 * error / 12
        ends[option] += beta * (1 - beta) * worth / 12
    np.testing.assert_allclose(loss, total / 12, rtol=1e-5)
    np.testing.assert_allclose(slopes["critic_head"]["bias"], values, atol=1e-5)
    np.testing.assert_allclose(slopes["termination_head"]["bias"], ends, atol=1e-5)


# Options as they are followed ------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [-50.0, 50.0])
def test_an_option_is_kept_until_it_ends(bias):
    params = params_of()
    params["termination_head"] = jax.tree.map(jnp.zeros_like, params["termination_head"])
    params["termination_head"]["bias"] += bias
    params["epsilon"] = jnp.float32(0.3)
    obs = jnp.ones((4000, 4))
    best = applied(params["critic_head"], obs[0]).argmax()
    other = (best + 1) % 3
    carry = OptionCarry(jnp.full(4000, other), jnp.zeros(4000, bool))

    def drawn(is_first, key):
        first = jnp.full(4000, is_first)
        return LINEAR.apply({"params": params}, obs, first, carry, key, method="draw")

    kept, first, likeliest = (
        drawn(False, jax.random.key(0)),
        drawn(True, jax.random.key(0)),
        drawn(False, None),
    )
    chosen = np.full(3, 0.1)
    chosen[best] += 0.7
    for found, ends in ((kept, bias > 0), (first, True)):
        shares = np.bincount(found.option, minlength=3) / 4000
        np.testing.assert_allclose(shares, chosen if ends else np.eye(3)[other], atol=0.03)
        assert jnp.all(found.begun == ends)
    assert jnp.all(likeliest.option == (best if bias > 0 else other))


def test_continuous_actions_have_a_gaussian_of_each_option():
    env, _ = environments.make("Pendulum-v1")
    network = option_critic.make_network(option_critic.Config(num_options=2, encoder=MLP(())), env)
    obs = jnp.ones((1, 2, 3))
    variables = network.init(jax.random.key(0), obs, jnp.zeros((1, 2), bool), network.initial_carry(1))
    layer = variables["params"]["actor_head"]["Dense_0"]
    layer["bias"] += jnp.array([1.0, 2.0])
    outputs = network.apply(variables, obs, None, None)
    means = applied(layer, obs)[0]
    policy = policy_of(outputs.policies, jnp.array([[0, 1]]))
    np.testing.assert_allclose(policy.mean[0, :, 0], [means[0, 0], means[1, 1]], rtol=1e-5)


@pytest.mark.slow
def test_one_option_is_a2c():
    rollout, optimizer = (
        RolloutConfig(num_envs=2, num_steps=8),
        OptimizerConfig(warmup_steps=0, schedule="constant"),
    )
    one = option_critic.Config(1, 48, rollout, MLP((4,)), optimizer=optimizer)
    other = a2c.Config(48, rollout, NetworkConfig(MLP((4,))), optimizer)
    shared = {"learning_rate": 1e-2, "entropy_coef": 0.01}
    hyper = option_critic.default_hyper(lambda_=0.9, deliberation_cost=0.0, **shared)
    state, history = jax.jit(option_critic.make_train(one, *CARTPOLE))(jax.random.key(0), hyper)
    expected, known = jax.jit(a2c.make_train(other, *CARTPOLE))(
        jax.random.key(0), a2c.default_hyper(gae_lambda=0.9, **shared)
    )
    assert history["steps"].tolist() == [16, 32, 48]
    assert jnp.all(history["termination"] > 0)  # ends that lead to the same option again change nothing
    found = state.agent.learner.params
    for name, part in expected.agent.learner.params.items():
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found[name], part)
    np.testing.assert_allclose(history["policy_loss"], known["policy_loss"], atol=1e-5)


@pytest.mark.slow
def test_cartpole():
    """200,000 steps, two seeds: at least 195, where CartPole-v0 counts as solved (chance gets 22)."""
    run = option_critic.make_run(option_critic.Config(total_steps=200_000), *CARTPOLE)
    keys, options = jax.random.split(jax.random.key(0), 2), compiler_options()
    train = jax.jit(jax.vmap(make_train_fn(run), (0, None)), compiler_options=options)
    states, history = train(keys, option_critic.default_hyper())

    def score(state, key):
        return evaluate(run, state, *CARTPOLE, key, episodes=16, deterministic=False)[0]

    assert jnp.mean(jax.jit(jax.vmap(score), compiler_options=options)(states, keys)) > 195
    assert jnp.all(jnp.isfinite(history["loss"]))
