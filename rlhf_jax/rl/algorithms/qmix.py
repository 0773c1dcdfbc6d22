"""QMIX (Rashid et al. 2018): Q-learning of a joint value that is monotone in the value of each agent.

    env = multi_agent.make("mpe_simple_spread")
    train = qmix.make_train(qmix.Config(), env, None)
    state, history = jax.jit(train)(key, qmix.Hyper())

Because it is monotone, the best joint action is each agent's best, and each can act on its own. `vdn` is
the same with a sum for a mixer. Networks have no memory, so single transitions are replayed where the paper
replays episodes. The reward is the mean over agents of what each learns from.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import OptimizerConfig, apply_gradients, make_optimizer
from rlhf_jax.core.trees import pytree_dataclass, tree_where
from rlhf_jax.core.types import Array, Float, Int, Metrics, Params, PRNGKeyArray, Scalar
from rlhf_jax.losses.value import squared_value_loss
from rlhf_jax.rl.algorithms.dqn import State, discrete_actions, init
from rlhf_jax.rl.envs.joint import JointObs
from rlhf_jax.rl.envs.multi_agent import JointEnvironment
from rlhf_jax.rl.loops import off_policy
from rlhf_jax.rl.loops.exploration import linear_decay
from rlhf_jax.rl.loops.off_policy import Algorithm, RunConfig
from rlhf_jax.rl.loops.replay import Batch, weighted_mean
from rlhf_jax.rl.loops.runs import Run, Train, make_train_fn
from rlhf_jax.rl.networks.multi_agent import Headed, JointValues, MonotonicMixer, PerAgent, mask_logits
from rlhf_jax.rl.networks.networks import MLP, linear
from rlhf_jax.rl.networks.q_networks import applied

__all__ = [
    "Config",
    "Hyper",
    "JointValueFns",
    "State",
    "init",
    "make_network",
    "make_run",
    "make_train",
    "make_update",
    "network_fns",
]


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices.

    The defaults are those of the paper where memory does not matter.

    Attributes:
      run: its course: an update for each episode of MPE, of as many transitions as 32 episodes have.
      optimizer: Adam behind gradient clipping, where the paper has RMSprop.
      encoder: of the agents' values.
      mixer: of their values.
      shared: agents share parameters.
      agent_ids: agents that share parameters are told who they are.
      double: the trained network chooses the next actions, the target network values them.
    """

    run: RunConfig = RunConfig(
        total_steps=1_000_000,
        learning_starts=10_000,
        num_envs=8,
        train_every=25,
        updates=8,
        batch_size=800,
        capacity=100_000,
    )
    optimizer: OptimizerConfig = OptimizerConfig(clip_norm=10.0, b2=0.999)
    encoder: nn.Module = MLP((64, 64), nn.relu)
    mixer: nn.Module = MonotonicMixer()
    shared: bool = True
    agent_ids: bool = True
    double: bool = True


@pytree_dataclass
class Hyper:
    """Hyperparameters of QMIX and VDN that a sweep may vary (array leaves).

    Attributes:
      gamma: discount per step.
      epsilon_start: share of random actions at first, of each agent by itself.
      epsilon_end: and at last.
      epsilon_steps: steps over which it falls linearly.
      target_update_interval: updates between moves of the target network.
      tau: how far it moves then; 1 copies.
    """

    learning_rate: Scalar = 5e-4
    gamma: Scalar = 0.99
    epsilon_start: Scalar = 1.0
    epsilon_end: Scalar = 0.05
    epsilon_steps: Scalar = 50_000.0
    target_update_interval: Scalar = 200
    tau: Scalar = 1.0


@dataclasses.dataclass(frozen=True)
class JointValueFns:
    """The network as callables.

    Attributes:
      every_fn: (params, obs) -> values of every action of every agent [R, N, A].
      mix_fn: (params, values [R, N], obs) -> joint value [R].
    """

    every_fn: Callable[[Params, JointObs], Float[Array, "R N A"]]
    mix_fn: Callable[[Params, Float[Array, "R N"], JointObs], Float[Array, " R"]]


def chosen(values: Float[Array, "R N A"], action: Int[Array, "R N"]) -> Float[Array, "R N"]:
    """Values of one action of each agent."""
    # A comparison rather than a gather: its gradient is no scatter, which CPUs and TPUs are slow at.
    taken = jnp.arange(values.shape[-1]) == action[..., None]
    return jnp.sum(jnp.where(taken, values, 0), axis=-1)


def make_update(
    config: Config, values: JointValueFns, tx: optax.GradientTransformation
) -> Callable[[State, Hyper, Batch], tuple[State, Metrics, Float[Array, " R"]]]:
    """`update(state, hyper, batch) -> (state, metrics, errors)` (Rashid et al. 2018, eq. 6).

    target = r + discount Q_tot'(s', argmax of each agent),  loss: (Q_tot(s, u) - target)^2 / 2
    """

    def update(state: State, hyper: Hyper, batch: Batch) -> tuple[State, Metrics, Float[Array, " R"]]:
        params = state.learner.params
        after = values.every_fn(state.target_params, batch.next_obs)
        choosing = values.every_fn(params, batch.next_obs) if config.double else after
        best = jnp.argmax(choosing, axis=-1)
        next_values = values.mix_fn(state.target_params, chosen(after, best), batch.next_obs)
        targets = jnp.mean(batch.reward, axis=-1) + batch.discount * next_values

        def loss_fn(params: Params) -> tuple[Array, tuple[Metrics, Array]]:
            taken = chosen(values.every_fn(params, batch.obs), batch.action)
            joint = values.mix_fn(params, taken, batch.obs)
            mask = jnp.ones_like(targets, bool)[None]
            reduce = weighted_mean(batch.weight)
            loss, metrics = squared_value_loss(joint[None], targets[None], mask, reduce=reduce)
            return loss, (metrics, joint - targets)

        (loss, (metrics, errors)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params)
        learner, guard = apply_gradients(
            state.learner, gradients, tx, learning_rate=hyper.learning_rate, loss=loss
        )
        target = optax.incremental_update(learner.params, state.target_params, hyper.tau)
        due = learner.steps % jnp.asarray(hyper.target_update_interval, jnp.int32) == 0
        target = tree_where(due, target, state.target_params)
        return State(learner, target), {**metrics, **guard}, jax.lax.stop_gradient(errors)

    return update


def make_network(config: Config, env: JointEnvironment) -> JointValues:
    """Values of agents and their mixer for this environment.

    Raises:
      UserError: actions are continuous, or agents have different interests.
    """
    actions = discrete_actions(env, "QMIX")
    if not env.cooperative:
        raise UserError(
            f"VDN and QMIX learn one common value; in {env.name} agents compete: use ippo or maddpg"
        )
    agents = PerAgent(Headed(config.encoder, linear(actions, 1.0)), config.shared, config.agent_ids)
    return JointValues(agents, config.mixer)


def network_fns(network: JointValues) -> JointValueFns:
    """The callables of a network."""
    return JointValueFns(applied(network, "every"), applied(network, "mix"))


def make_algorithm(
    env: JointEnvironment, network: JointValues, values: JointValueFns, tx: Any, update_fn: Callable[..., Any]
) -> Algorithm:
    """Epsilon-greedy exploration of each agent by itself, around `update_fn`."""
    agents, actions = env.num_agents, discrete_actions(env, "QMIX")

    def init_fn(key: PRNGKeyArray, hyper: Hyper) -> State:
        del hyper
        return init(network.init(key, env.blank_obs(1))["params"], tx)

    def noise_fn(key: PRNGKeyArray, shape: tuple[int, int]) -> tuple[Array, Array]:
        share_key, action_key = jax.random.split(key)
        # The available action of the highest number is any of them, each as likely.
        numbers = jax.random.uniform(action_key, (*shape, agents, actions))
        return jax.random.uniform(share_key, (*shape, agents)), numbers

    def greedy(state: State, obs: JointObs) -> Int[Array, "B N"]:
        return jnp.argmax(values.every_fn(state.learner.params, obs), axis=-1)

    def act_fn(state: State, hyper: Hyper, obs: Any, noise: tuple[Array, Array], steps: Array) -> Array:
        shares, numbers = noise
        epsilon = linear_decay(
            steps, start=hyper.epsilon_start, end=hyper.epsilon_end, steps=hyper.epsilon_steps
        )
        anything = jnp.argmax(mask_logits(numbers, obs.available), axis=-1)
        return jnp.where(shares < epsilon, anything, greedy(state, obs))

    def policy_fn(state: State, obs: Any, key: PRNGKeyArray, deterministic: bool) -> Array:
        del key, deterministic  # the policy learnt is the greedy one
        return greedy(state, obs)

    return Algorithm(init_fn, noise_fn, act_fn, act_fn, update_fn, policy_fn)


def make_run(config: Config, env: JointEnvironment, env_params: Any) -> Run:
    """A run as `init` and `step`."""
    tx, network = make_optimizer(config.optimizer), make_network(config, env)
    values = network_fns(network)
    algorithm = make_algorithm(env, network, values, tx, make_update(config, values, tx))
    return off_policy.make_run(config.run, env, env_params, algorithm)


def make_train(config: Config, env: JointEnvironment, env_params: Any) -> Train:
    """`train(key, hyper) -> (state, history)`: a whole run, pure; jit it, vmap it over keys and `Hyper`."""
    return make_train_fn(make_run(config, env, env_params))
