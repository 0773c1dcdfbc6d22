"""Option-critic (Bacon, Harb & Precup 2017), synchronous and batched as A2OC (Harb et al. 2018).

Policies and ends of the options are learned along with their values, from reward alone. Each step teaches
the option that took it:

    intra-option policy gradient (Theorem 1)   grad log pi_o(a | s) (G - Q(s, o))
    termination gradient (Theorem 2)           -grad beta_o(s') (Q(s', o) - V(s') + eta)
    critic                                     Q(s, o) -> G

G being lambda-returns, and V the mean of Q under the epsilon-greedy policy over options. Every choice of
an option costs eta, the deliberation cost; episodes begin with one for nothing. With one option it is A2C.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from rlhf_jax.core.train_state import (
    OptimizerConfig,
    TrainState,
    apply_gradients,
    init_train_state,
    make_optimizer,
    with_total_steps,
)
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Float, Metrics, Params, PRNGKeyArray, Scalar
from rlhf_jax.kernels.returns import lambda_returns
from rlhf_jax.losses.hierarchies import termination_loss
from rlhf_jax.losses.policy import reinforce_loss
from rlhf_jax.losses.value import squared_value_loss
from rlhf_jax.rl.algorithms import a2c
from rlhf_jax.rl.envs.environments import Environment
from rlhf_jax.rl.loops import on_policy
from rlhf_jax.rl.loops.rollout import Experience, Network, RolloutConfig, bootstrapped, call
from rlhf_jax.rl.loops.runs import Run, Train, make_train_fn
from rlhf_jax.rl.networks.hierarchies import (
    OptionActorCritic,
    OptionOutputs,
    make_option_actor_critic,
    of_option,
    option_chances,
    policy_of,
)
from rlhf_jax.rl.networks.networks import default_encoder


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices; the defaults are those of A2C for CartPole.

    Attributes:
      num_options: options, all of which may begin anywhere.
      total_steps: environment steps of a run, rounded down to whole rollouts.
      rollout: where experience comes from.
      encoder: of the network; None for the environment's usual one.
      shared: values share the body of policies and ends.
      optimizer: Adam; a schedule without `total_steps` is stretched over the run.
    """

    num_options: int = 4
    total_steps: int = 500_000
    rollout: RolloutConfig = RolloutConfig(num_envs=8, num_steps=8)
    encoder: nn.Module | None = None
    shared: bool = False
    optimizer: OptimizerConfig = a2c.Config().optimizer


@pytree_dataclass
class Hyper:
    """Hyperparameters of option-critic that a sweep may vary (array leaves).

    Attributes:
      gamma: discount per step.
      lambda_: of the returns; 1 bootstraps only at the rollout's end and at truncations.
      value_coef: weight of the value loss.
      entropy_coef: weight of the entropy bonus of the options' policies.
      epsilon: share of random options, where one is chosen.
      deliberation_cost: of each choice of an option, in units of reward.
    """

    learning_rate: Scalar = 2e-3
    gamma: Scalar = 0.99
    lambda_: Scalar = 1.0
    value_coef: Scalar = 0.5
    entropy_coef: Scalar = 0.0
    epsilon: Scalar = 0.1
    deliberation_cost: Scalar = 0.01


@pytree_dataclass
class State:
    """Training state of option-critic.

    Attributes:
      epsilon: share of random options.
    """

    learner: TrainState
    epsilon: Float[Array, ""]


@pytree_dataclass
class Batch:
    """A rollout, [B, T], with what was made of it.

    Attributes:
      experience: what happened.
      advantages: of the actions, G - Q(s, o).
      returns: G.
      option_advantages: of the options on arrival, Q(s', o) - V(s').
    """

    experience: Experience
    advantages: Float[Array, "B T"]
    returns: Float[Array, "B T"]
    option_advantages: Float[Array, "B T"]


def default_hyper(**changes: Any) -> Hyper:
    """The defaults as float32 scalars, with `changes`."""
    return jax.tree.map(jnp.float32, Hyper(**changes))


def init(params: Params, tx: optax.GradientTransformation, *, epsilon: Scalar) -> State:
    """The state at step 0."""
    return State(init_train_state(params, tx), jnp.asarray(epsilon, jnp.float32))


def acting_params(state: State) -> Params:
    """Parameters with the epsilon of the upper level."""
    return {**state.learner.params, "epsilon": state.epsilon}


def outputs_of(
    network: OptionActorCritic, params: Params, experience: Experience
) -> tuple[OptionOutputs, OptionOutputs]:
    """Outputs of the network for what was seen, and for what followed."""
    seen, is_first, carry = experience.transition, experience.is_first, experience.carry
    here, after = (call(network, params, obs, is_first, carry) for obs in (seen.obs, seen.next_obs))
    return here, after


def option_returns(
    experience: Experience, upon_arrival: Float[Array, "B T"], hyper: Hyper, *, bootstrap_truncation: bool
) -> Float[Array, "B T"]:
    """Lambda-returns along trajectories of states and options (Bacon et al. 2017, eq. 2 and 3).

        G_t     = r_t + gamma [lambda (G_{t+1} - eta b_{t+1}) + (1 - lambda) U(o_t, s_{t+1})]
        U(o, s) = Q(s, o) - beta_o(s) (A(s, o) + eta),  A(s, o) = Q(s, o) - V(s)

    b is 1 where an option begins; U is what follows on average over the end of o and the next choice.

    Args:
      upon_arrival: U of each step's option in what followed.
    """
    seen, begun = experience.transition, experience.drawn.begun
    # The choice that begins the next rollout is in the bootstrap value; that of a new episode is nobody's.
    began = jnp.concatenate([begun[:, 1:], jnp.zeros_like(begun[:, :1])], axis=1) & ~seen.done
    paid = seen.reward - began * hyper.gamma * hyper.lambda_ * hyper.deliberation_cost
    rewards, discounts, last = bootstrapped(
        paid, upon_arrival, seen, gamma=hyper.gamma, bootstrap_truncation=bootstrap_truncation
    )
    before = jnp.concatenate([upon_arrival[:, :1], upon_arrival[:, :-1]], axis=1)  # of s_t, at place t
    return lambda_returns(
        rewards, before, discounts, last, jnp.ones(rewards.shape, bool), lambda_=hyper.lambda_
    )


def make_batch(
    network: OptionActorCritic,
    params: Params,
    hyper: Hyper,
    experience: Experience,
    *,
    bootstrap_truncation: bool = True,
) -> Batch:
    """Returns, and advantages of actions and of options; no gradient."""
    option = experience.drawn.option
    here, after = outputs_of(network, params, experience)
    kept = of_option(after.values, option)
    chances = option_chances(after.values, epsilon=hyper.epsilon)
    option_advantages = kept - jnp.sum(chances * after.values, axis=-1)
    ending = of_option(after.terminations, option)
    upon_arrival = kept - ending * (option_advantages + hyper.deliberation_cost)
    returns = option_returns(experience, upon_arrival, hyper, bootstrap_truncation=bootstrap_truncation)
    advantages = returns - of_option(here.values, option)
    return jax.lax.stop_gradient(Batch(experience, advantages, returns, option_advantages))


def make_option_critic_loss(
    network: OptionActorCritic,
) -> Callable[[Params, Hyper, Batch], tuple[Float[Array, ""], Metrics]]:
    """Loss of option-critic: `loss_fn(params, hyper, batch) -> (loss, metrics)`.

    loss = policy loss + termination loss + value_coef value loss - entropy_coef entropy, means over steps.
    """

    def loss_fn(params: Params, hyper: Hyper, batch: Batch) -> tuple[Float[Array, ""], Metrics]:
        experience, option = batch.experience, batch.experience.drawn.option
        here, after = outputs_of(network, params, experience)
        policy = policy_of(here.policies, option)
        mask = jnp.ones(option.shape, bool)
        policy_loss, policy_metrics = reinforce_loss(
            policy.logp(experience.transition.action), experience.logp, batch.advantages, mask
        )
        value_loss, value_metrics = squared_value_loss(of_option(here.values, option), batch.returns, mask)
        end_loss, end_metrics = termination_loss(
            of_option(after.terminations, option),
            batch.option_advantages,
            ~experience.transition.terminated,
            deliberation_cost=hyper.deliberation_cost,
            denominator=mask.size,
        )
        entropy = jnp.mean(policy.entropy())
        loss = policy_loss + end_loss + hyper.value_coef * value_loss - hyper.entropy_coef * entropy
        metrics = {"loss": loss, "entropy": entropy, **policy_metrics, **value_metrics, **end_metrics}
        return loss, {**metrics, "option_changes": jnp.mean(experience.drawn.begun)}

    return loss_fn


def make_network(config: Config, env: Environment) -> OptionActorCritic:
    """The options of `config` for this environment."""
    encoder = config.encoder or default_encoder(env)
    return make_option_actor_critic(env, encoder, num_options=config.num_options, shared=config.shared)


def make_two_level_run(
    config: Any,
    network: Network,
    batch_fn: Callable[..., Any],
    loss_fn: Callable[[Params, Any, Any], tuple[Float[Array, ""], Metrics]],
    env: Environment,
    env_params: Any,
) -> Run:
    """A run of a network whose upper level draws with `hyper.epsilon`: one optimizer step a rollout.

    Args:
      config: with `total_steps`, `rollout` and `optimizer`.
      batch_fn: (network, params, hyper, experience, bootstrap_truncation=) -> batch.
      loss_fn: (params, hyper, batch) -> (loss, metrics).
    """
    updates = on_policy.count_updates(config.total_steps, config.rollout)
    tx = make_optimizer(with_total_steps(config.optimizer, updates))
    cut = config.rollout.bootstrap_truncation

    def learn(state: State, hyper: Any, experience: Experience) -> tuple[State, Metrics]:
        params = state.learner.params
        batch = batch_fn(network, params, hyper, experience, bootstrap_truncation=cut)
        (loss, metrics), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params, hyper, batch)
        learner, guard = apply_gradients(
            state.learner, gradients, tx, learning_rate=hyper.learning_rate, loss=loss
        )
        return State(learner, state.epsilon), {**metrics, **guard}

    def init_agent(params: Params, key: PRNGKeyArray, hyper: Any) -> State:
        del key
        return init(params, tx, epsilon=hyper.epsilon)

    learning = on_policy.Learning(init_agent, learn, actor_params_fn=acting_params)
    return on_policy.make_run(
        network, env, env_params, config.rollout, learning, total_steps=config.total_steps
    )


def make_run(config: Config, env: Environment, env_params: Any) -> Run:
    """A run as `init` and `step`."""
    network = make_network(config, env)
    return make_two_level_run(config, network, make_batch, make_option_critic_loss(network), env, env_params)


def make_train(config: Config, env: Environment, env_params: Any) -> Train:
    """`train(key, hyper) -> (state, history)`: a whole run, pure; jit it, vmap it over keys and `Hyper`."""
    return make_train_fn(make_run(config, env, env_params))
