"""IMPALA (Espeholt et al. 2018): actors with old parameters, and a learner that corrects for it by V-trace.

The actors' parameters are those of `Hyper.lag` updates ago, kept in the state: how far behind they are is a
number that a sweep varies, and a run repeats to the bit. Without lag and with lambda 1 it is A2C.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.core.train_state import (
    OptimizerConfig,
    TrainState,
    init_train_state,
    make_optimizer,
    with_total_steps,
)
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Int, Metrics, Params, PRNGKeyArray, Scalar
from rlhf_jax.kernels.off_policy import vtrace
from rlhf_jax.rl.algorithms import a2c
from rlhf_jax.rl.algorithms.a2c import Batch
from rlhf_jax.rl.envs.environments import Environment
from rlhf_jax.rl.loops import on_policy
from rlhf_jax.rl.loops.on_policy import NetworkConfig
from rlhf_jax.rl.loops.rollout import (
    Experience,
    RolloutConfig,
    as_rows,
    bootstrapped,
    make_logprob_fn,
    values_of,
)
from rlhf_jax.rl.loops.runs import Run, Train, make_train_fn


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices; the defaults are those of A2C for CartPole.

    Attributes:
      max_lag: how many updates old the actors' parameters may be; so many copies are kept.
      correct: weigh by V-trace; else experience is taken for the policy's own, as A2C would take it.
      total_steps: environment steps of a run, rounded down to whole rollouts.
      rollout: where experience comes from.
      network: the actor-critic.
      optimizer: Adam; a schedule without `total_steps` is stretched over the run.
    """

    max_lag: int = 16
    correct: bool = True
    total_steps: int = 500_000
    rollout: RolloutConfig = RolloutConfig(num_envs=8, num_steps=8)
    network: NetworkConfig = NetworkConfig()
    optimizer: OptimizerConfig = a2c.Config().optimizer


@pytree_dataclass
class Hyper:
    """Hyperparameters of IMPALA that a sweep may vary (array leaves).

    Attributes:
      gamma: discount per step.
      lambda_: of V-trace's targets.
      clip_rho: bound of the ratios in the values' targets; infinite for importance sampling without bound.
      clip_c: bound of the ratios that carry later corrections back.
      clip_pg_rho: bound of the ratios in the policy gradient.
      value_coef: weight of the value loss.
      entropy_coef: weight of the entropy bonus.
      lag: updates by which the actors' parameters are old, up to `Config.max_lag`; a whole number.
    """

    learning_rate: Scalar = 2e-3
    gamma: Scalar = 0.99
    lambda_: Scalar = 1.0
    clip_rho: Scalar = 1.0
    clip_c: Scalar = 1.0
    clip_pg_rho: Scalar = 1.0
    value_coef: Scalar = 0.5
    entropy_coef: Scalar = 0.0
    lag: Scalar = 4.0


@pytree_dataclass
class State:
    """Training state of IMPALA.

    Attributes:
      past: parameters of the last updates, the newest first.
      lag: which of them act.
    """

    learner: TrainState
    past: Params
    lag: Int[Array, ""]


def default_hyper(**changes: Any) -> Hyper:
    """The defaults as float32 scalars, with `changes`."""
    return jax.tree.map(jnp.float32, Hyper(**changes))


def init(params: Params, tx: optax.GradientTransformation, hyper: Hyper, max_lag: int) -> State:
    """The state at step 0, where all past parameters are the first."""
    past = jax.tree.map(lambda x: jnp.repeat(x[None], max_lag + 1, axis=0), params)
    lag = jnp.clip(jnp.asarray(hyper.lag, jnp.int32), 0, max_lag)
    return State(init_train_state(params, tx), past, lag)


def actor_params(state: State) -> Params:
    """Parameters that act."""
    return jax.tree.map(lambda x: x[state.lag], state.past)


def make_run(config: Config, env: Environment, env_params: Any) -> Run:
    """A run as `init` and `step`."""
    network = on_policy.make_network(config.network, env)
    updates = on_policy.count_updates(config.total_steps, config.rollout)
    tx, logprob_fn = make_optimizer(with_total_steps(config.optimizer, updates)), make_logprob_fn(network)
    step = a2c.make_gradient_step(logprob_fn, tx)

    def learn(state: State, hyper: Hyper, experience: Experience) -> tuple[State, Metrics]:
        params = state.learner.params
        values, next_values = values_of(network, params, experience)
        rewards, discounts, last = bootstrapped(
            experience.transition.reward,
            next_values,
            experience.transition,
            gamma=hyper.gamma,
            bootstrap_truncation=config.rollout.bootstrap_truncation,
        )
        mask = jnp.ones(values.shape, bool)
        log_rhos = logprob_fn(params, experience.inputs).logp - experience.logp
        trace = vtrace(
            log_rhos if config.correct else jnp.zeros_like(log_rhos),
            rewards,
            values,
            discounts,
            last,
            mask,
            lambda_=hyper.lambda_,
            clip_rho=hyper.clip_rho,
            clip_c=hyper.clip_c,
            clip_pg_rho=hyper.clip_pg_rho,
        )
        batch = Batch(experience.inputs, mask, experience.logp, values, trace.advantages, trace.targets)
        learner, metrics = step(state.learner, params, hyper, as_rows(network, batch))
        past = jax.tree.map(
            lambda old, new: jnp.roll(old, 1, axis=0).at[0].set(new), state.past, learner.params
        )
        ratio = jnp.mean(jnp.exp(jnp.minimum(log_rhos, 0.0)))
        return State(learner, past, state.lag), {**metrics, "clipped_ratio_mean": ratio}

    def init_agent(params: Params, key: PRNGKeyArray, hyper: Hyper) -> State:
        del key
        return init(params, tx, hyper, config.max_lag)

    learning = on_policy.Learning(init_agent, learn, actor_params_fn=actor_params)
    return on_policy.make_run(
        network, env, env_params, config.rollout, learning, total_steps=config.total_steps
    )


def make_train(config: Config, env: Environment, env_params: Any) -> Train:
    """`train(key, hyper) -> (state, history)`: a whole run, pure; jit it, vmap it over keys and `Hyper`."""
    return make_train_fn(make_run(config, env, env_params))
