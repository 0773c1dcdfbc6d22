"""Multi-agent PPO (Yu et al. 2022): PPO of several agents whose critics see the whole, while they train.

    env = multi_agent.make("mpe_simple_spread")
    train = mappo.make_train(mappo.Config(), env, None)
    state, history = jax.jit(jax.vmap(train, (0, None)))(jax.random.split(key, 16), mappo.default_hyper())

Rollouts and update are those of PPO with one agent; a row of an update is one step of all agents. `ippo` is
the same with critics that see what their agent sees. Values are learned at mean 0 and variance 1, by all
targets so far (section 3 of the paper); with squared errors, which at that scale hardly differ from Huber's
of width 10, which the paper takes. One optimizer trains actors and critics, with one bound for gradients.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from rlhf_jax.algorithms import ppo
from rlhf_jax.algorithms.ppo import Batch, Hyper, make_update
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer, with_total_steps
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Float, Metrics, Params, PRNGKeyArray
from rlhf_jax.kernels.whitening import Moments, denormalize, normalize, whiten
from rlhf_jax.rl.envs.multi_agent import JointEnvironment
from rlhf_jax.rl.envs.normalization import add_observations, init_observation_moments
from rlhf_jax.rl.loops import on_policy
from rlhf_jax.rl.loops.on_policy import Learning
from rlhf_jax.rl.loops.rollout import Experience, RolloutConfig, call, gae_of, make_logprob_fn
from rlhf_jax.rl.loops.runs import Run, Train, make_train_fn
from rlhf_jax.rl.networks.multi_agent import Headed, JointActorCritic, PerAgent
from rlhf_jax.rl.networks.networks import MLP, linear, make_head

__all__ = [
    "Batch",
    "Config",
    "Hyper",
    "State",
    "default_hyper",
    "init",
    "make_batch",
    "make_learning",
    "make_network",
    "make_run",
    "make_train",
    "make_update",
]


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices.

    The defaults are those of the paper for MPE (appendix C), without its GRU.

    Attributes:
      total_steps: environment steps of a run, rounded down to whole rollouts; all agents act in each.
      rollout: where experience comes from; observations and rewards are not normalised here.
      encoder: of actor and critic.
      shared: agents share parameters; False where they have different parts.
      agent_ids: agents that share parameters are told who they are.
      normalize_values: values are learned at unit scale.
      update: epochs, mini-batches and the like.
      optimizer: Adam; a schedule without `total_steps` is stretched over the run.
    """

    total_steps: int = 1_000_000
    rollout: RolloutConfig = RolloutConfig(num_envs=128, num_steps=25)
    encoder: nn.Module = MLP((64, 64))
    shared: bool = True
    agent_ids: bool = True
    normalize_values: bool = True
    update: ppo.Config = ppo.Config(num_ppo_epochs=10, num_minibatches=1)
    optimizer: OptimizerConfig = OptimizerConfig(warmup_steps=0, clip_norm=10.0, b2=0.999, epsilon=1e-5)


def default_hyper(**changes: Any) -> Hyper:
    """The numbers of the paper for MPE, as float32 scalars, with `changes`."""
    values = {"learning_rate": 7e-4, "gamma": 0.99, "entropy_coef": 0.01, "value_coef": 1.0, **changes}
    return jax.tree.map(jnp.float32, Hyper(**values))


@pytree_dataclass
class State:
    """The agents; the whole run's state is `on_policy.State`.

    Attributes:
      policy: PPO's own state, for all agents.
      value_moments: of the targets of values so far, for each agent that has its own parameters, or for all;
        None where values are learned as they are.
    """

    policy: ppo.State
    value_moments: Moments | None


def make_network(config: Config, env: JointEnvironment, *, central: bool) -> JointActorCritic:
    """Actors and critics for this environment."""

    def each(head: nn.Module) -> PerAgent:
        return PerAgent(Headed(config.encoder.clone(), head), config.shared, config.agent_ids)

    head = make_head(env)
    return JointActorCritic(each(head), each(linear(1, 1.0)), central)


def make_batch(
    config: Config, network: JointActorCritic, state: State, hyper: Hyper, experience: Experience
) -> tuple[Batch, Moments | None]:
    """(one row for each step [B T, N], moments of targets): GAE with the bootstrap at truncations.

    Values and returns of the batch are at the scale that the critic learns; advantages are whitened over all
    agents where these share parameters, else for each on its own.
    """
    seen, is_first = experience.transition, experience.is_first
    params, moments = state.policy.learner.params, state.value_moments
    values = call(network, params, seen.obs, is_first, ())[1]
    next_values = call(network, params, seen.obs, seen.next_obs, is_first, (), method="next_value")

    def estimate(rewards: Array, values: Array, next_values: Array) -> tuple[Array, Array]:
        return gae_of(
            rewards,
            values,
            next_values,
            seen,
            gamma=hyper.gamma,
            gae_lambda=hyper.gae_lambda,
            bootstrap_truncation=config.rollout.bootstrap_truncation,
        )

    real = (values, next_values)
    if moments is not None:
        real = tuple(denormalize(x, moments) for x in real)
    of_agents = jax.vmap(estimate, in_axes=2, out_axes=2)
    advantages, returns = of_agents(seen.learning_reward, *real)
    if moments is not None:
        moments = add_observations(moments, returns)
        returns = normalize(returns, moments)
    if config.update.whiten_advantages:
        advantages = _whitened(advantages, shared=config.shared)
    mask = jnp.ones(values.shape, bool)
    batch = Batch(experience.inputs, mask, experience.logp, values, advantages, returns)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch), moments


def _whitened(advantages: Float[Array, "B T N"], *, shared: bool) -> Float[Array, "B T N"]:
    mask = jnp.ones(advantages.shape, bool)
    return whiten(advantages, mask) if shared else jax.vmap(whiten, in_axes=2, out_axes=2)(advantages, mask)


def make_learning(
    config: Config, env: JointEnvironment, *, central: bool
) -> tuple[JointActorCritic, Learning]:
    """(network, what a run needs to know), for a run of `config.total_steps`."""
    network = make_network(config, env, central=central)
    updates = on_policy.count_updates(config.total_steps, config.rollout)
    optimizer_steps = updates * config.update.num_ppo_epochs * config.update.num_minibatches
    tx = make_optimizer(with_total_steps(config.optimizer, optimizer_steps))
    update = make_update(config.update, make_logprob_fn(network), tx)
    moments = init_observation_moments(() if config.shared else (env.num_agents,))

    def init_agent(params: Params, key: PRNGKeyArray, hyper: Hyper) -> State:
        return init(ppo.init(params, tx, key, hyper), moments if config.normalize_values else None)

    def learn(state: State, hyper: Hyper, experience: Experience) -> tuple[State, Metrics]:
        batch, moments = make_batch(config, network, state, hyper, experience)
        policy, metrics = update(state.policy, hyper, batch)
        return State(policy, moments), metrics

    return network, Learning(init_agent, learn, lambda state: state.policy.learner.params)


def init(policy: ppo.State, value_moments: Moments | None) -> State:
    """The state at step 0."""
    return State(policy, value_moments)


def make_run(config: Config, env: JointEnvironment, env_params: Any, *, central: bool = True) -> Run:
    """A run as `init` and `step`.

    Args:
      central: critics see the state of the world; False: what their agent sees.

    Raises:
      UserError: normalised observations or rewards were asked for.
    """
    if config.rollout.normalize_obs or config.rollout.normalize_rewards:
        raise UserError("several agents: rollout.normalize_obs and normalize_rewards are for one agent alone")
    network, learning = make_learning(config, env, central=central)
    return on_policy.make_run(
        network, env, env_params, config.rollout, learning, total_steps=config.total_steps
    )


def make_train(config: Config, env: JointEnvironment, env_params: Any) -> Train:
    """`train(key, hyper) -> (state, history)`: a whole run, pure; jit it, vmap it over keys and `Hyper`."""
    return make_train_fn(make_run(config, env, env_params))
