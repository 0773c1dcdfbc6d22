"""PPO on control (Schulman et al. 2017): the update of `algorithms.ppo`, fed by environments.

    train = ppo.make_train(ppo.Config(), *environments.make("CartPole-v1"))
    state, history = jax.jit(jax.vmap(train, (0, None)))(jax.random.split(key, 16), ppo.default_hyper())

`ppo_penalty` is the same with a KL penalty instead of the clip.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.algorithms import ppo
from rlhf_jax.algorithms.ppo import Batch, Hyper, State, init
from rlhf_jax.core.protocols import LogprobFn
from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer, with_total_steps
from rlhf_jax.core.types import Metrics, Params, PRNGKeyArray
from rlhf_jax.kernels.whitening import whiten
from rlhf_jax.rl.envs.environments import Environment
from rlhf_jax.rl.loops import on_policy
from rlhf_jax.rl.loops.on_policy import Learning, NetworkConfig
from rlhf_jax.rl.loops.rollout import (
    Experience,
    Network,
    RolloutConfig,
    as_rows,
    compute_gae,
    make_logprob_fn,
)
from rlhf_jax.rl.loops.runs import Run, Train, make_train_fn

make_update = ppo.make_update
UpdateFn = Callable[[State, Hyper, Batch], tuple[State, Metrics]]
MakeUpdate = Callable[[ppo.Config, LogprobFn, optax.GradientTransformation], UpdateFn]

__all__ = [
    "Batch",
    "Config",
    "Hyper",
    "State",
    "default_hyper",
    "init",
    "make_batch",
    "make_learning",
    "make_run",
    "make_train",
    "make_update",
]


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices; the defaults are those for CartPole.

    Attributes:
      total_steps: environment steps of a run, rounded down to whole rollouts.
      rollout: where experience comes from.
      network: the actor-critic.
      update: epochs, mini-batches and the like; rows are single steps, or whole trajectories where the
        network has a memory.
      optimizer: Adam; a schedule without `total_steps` is stretched over the run.
    """

    total_steps: int = 500_000
    rollout: RolloutConfig = RolloutConfig()
    network: NetworkConfig = NetworkConfig()
    update: ppo.Config = ppo.Config(num_ppo_epochs=4, num_minibatches=4)
    optimizer: OptimizerConfig = OptimizerConfig(
        schedule="linear", warmup_steps=0, clip_norm=0.5, b2=0.999, epsilon=1e-5
    )


def default_hyper(**changes: Any) -> Hyper:
    """The numbers usual on CartPole, as float32 scalars, with `changes`."""
    values = {"learning_rate": 2.5e-4, "gamma": 0.99, "entropy_coef": 0.01, **changes}
    return jax.tree.map(jnp.float32, Hyper(**values))


def make_batch(
    config: Config, network: Network, params: Params, hyper: Hyper, experience: Experience
) -> Batch:
    """Advantages by GAE with the bootstrap at truncations, whitened where the update says so."""
    values, advantages, returns = compute_gae(
        network,
        params,
        experience,
        gamma=hyper.gamma,
        gae_lambda=hyper.gae_lambda,
        bootstrap_truncation=config.rollout.bootstrap_truncation,
    )
    mask = jnp.ones(values.shape, bool)
    if config.update.whiten_advantages:
        advantages = whiten(advantages, mask)
    batch = Batch(experience.inputs, mask, experience.logp, values, advantages, returns)
    return as_rows(network, batch)


def make_learning(
    config: Config, env: Environment, *, make_update: MakeUpdate = ppo.make_update
) -> tuple[Network, Learning]:
    """(network, what a run needs to know), for a run of `config.total_steps`."""
    network = on_policy.make_network(config.network, env)
    updates = on_policy.count_updates(config.total_steps, config.rollout)
    optimizer_steps = updates * config.update.num_ppo_epochs * config.update.num_minibatches
    tx = make_optimizer(with_total_steps(config.optimizer, optimizer_steps))
    update = make_update(config.update, make_logprob_fn(network), tx)

    def init_agent(params: Params, key: PRNGKeyArray, hyper: Hyper) -> State:
        return init(params, tx, key, hyper)

    def learn(state: State, hyper: Hyper, experience: Experience) -> tuple[State, Metrics]:
        return update(state, hyper, make_batch(config, network, state.learner.params, hyper, experience))

    return network, Learning(init_agent, learn)


def make_run(
    config: Config, env: Environment, env_params: Any, *, make_update: MakeUpdate = ppo.make_update
) -> Run:
    """A run as `init` and `step`."""
    network, learning = make_learning(config, env, make_update=make_update)
    return on_policy.make_run(
        network, env, env_params, config.rollout, learning, total_steps=config.total_steps
    )


def make_train(config: Config, env: Environment, env_params: Any) -> Train:
    """`train(key, hyper) -> (state, history)`: a whole run, pure; jit it, vmap it over keys and `Hyper`."""
    return make_train_fn(make_run(config, env, env_params))
