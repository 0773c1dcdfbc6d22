"""Trust region policy optimisation (Schulman et al. 2015), with GAE advantages.

Each update maximises the surrogate E[ratio A] within KL(pi_old || pi) <= target_kl: conjugate gradients on
Fisher-vector products give the direction, the quadratic model its length, and a backtracking line search
makes sure of both. The value function is fitted apart, with Adam.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from rlhf_jax.algorithms.ppo import Batch
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.minibatches import scan_minibatches
from rlhf_jax.core.train_state import (
    OptimizerConfig,
    TrainState,
    apply_gradients,
    init_train_state,
    make_optimizer,
)
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Float, Int, Metrics, Params, PRNGKeyArray, Scalar
from rlhf_jax.kernels.whitening import whiten
from rlhf_jax.losses.value import squared_value_loss
from rlhf_jax.rl.envs.environments import Environment
from rlhf_jax.rl.loops import on_policy
from rlhf_jax.rl.loops.on_policy import NetworkConfig
from rlhf_jax.rl.loops.rollout import Experience, Inputs, RolloutConfig, as_rows, call, compute_gae
from rlhf_jax.rl.loops.runs import Run, Train, make_train_fn
from rlhf_jax.rl.networks.distributions import Distribution

Vector: TypeAlias = Float[Array, " N"]
PolicyFn: TypeAlias = Callable[[Params, Inputs], Distribution]
ValueFn: TypeAlias = Callable[[Params, Inputs], Float[Array, "B T"]]


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices; the defaults are those for CartPole.

    Attributes:
      total_steps: environment steps of a run, rounded down to whole rollouts.
      rollout: where experience comes from.
      network: the actor-critic; actor and critic share nothing.
      optimizer: of the critic.
      critic_epochs: passes over each rollout.
      critic_minibatches: optimizer steps in each pass.
      cg_iterations: of the conjugate gradients.
      line_search_steps: how often the step is shortened before it is given up.
      backtrack_coef: by which factor.
    """

    total_steps: int = 500_000
    rollout: RolloutConfig = RolloutConfig(num_envs=8, num_steps=256)
    network: NetworkConfig = NetworkConfig()
    optimizer: OptimizerConfig = OptimizerConfig(clip_norm=0.5, b2=0.999, epsilon=1e-5)
    critic_epochs: int = 10
    critic_minibatches: int = 8
    cg_iterations: int = 10
    line_search_steps: int = 10
    backtrack_coef: float = 0.8


@pytree_dataclass
class Hyper:
    """Hyperparameters of TRPO that a sweep may vary (array leaves).

    Attributes:
      learning_rate: of the critic.
      gamma: discount per step.
      gae_lambda: lambda of GAE.
      target_kl: radius of the trust region, in nats per action.
      damping: added to the Fisher matrix's diagonal.
    """

    learning_rate: Scalar = 1e-3
    gamma: Scalar = 0.99
    gae_lambda: Scalar = 0.95
    target_kl: Scalar = 0.01
    damping: Scalar = 0.1


@pytree_dataclass
class State:
    """The agent.

    Attributes:
      actor: parameters of the policy.
      critic: parameters of the value function, and their optimizer.
    """

    actor: Params
    critic: TrainState
    key: PRNGKeyArray

    @property
    def params(self) -> Params:
        """Parameters of actor and critic, as the network takes them."""
        return {**self.actor, **self.critic.params}


def default_hyper(**changes: Any) -> Hyper:
    """The defaults as float32 scalars, with `changes`."""
    return jax.tree.map(jnp.float32, Hyper(**changes))


def init(params: Params, tx: optax.GradientTransformation, key: PRNGKeyArray) -> State:
    """The state at step 0; parameters called `critic...` are the value function's."""
    critic = {name: value for name, value in params.items() if name.startswith("critic")}
    actor = {name: value for name, value in params.items() if name not in critic}
    return State(actor, init_train_state(critic, tx), key)


def conjugate_gradients(product_fn: Callable[[Vector], Vector], target: Vector, *, iterations: int) -> Vector:
    """x with A x = target for a symmetric positive definite A (Hestenes & Stiefel 1952), from x = 0.

    Args:
      product_fn: v -> A v.
      iterations: at most; once the residual has vanished, the rest change nothing.
    """

    def step(_: Int[Array, ""], carry: tuple[Vector, Vector, Vector]) -> tuple[Vector, Vector, Vector]:
        solution, residual, direction = carry
        product, size = product_fn(direction), residual @ residual
        # Relative to the target: below this the quotients are rounding errors of one another.
        going_on = size > 1e-10 * (target @ target)
        length = jnp.where(going_on, size / jnp.where(going_on, direction @ product, 1.0), 0.0)
        next_residual = residual - length * product
        turn = jnp.where(going_on, next_residual @ next_residual / jnp.where(going_on, size, 1.0), 0.0)
        return solution + length * direction, next_residual, next_residual + turn * direction

    return jax.lax.fori_loop(0, iterations, step, (jnp.zeros_like(target), target, target))[0]


def natural_step(
    policy_fn: PolicyFn, config: Config, hyper: Hyper, actor: Params, batch: Batch
) -> tuple[Params, Metrics]:
    """The actor after one trust-region step (Schulman et al. 2015, appendix C).

        x = F^-1 g,  step = sqrt(2 target_kl / x^T F x) x

    shortened until KL <= target_kl and the surrogate rises.

    Where no shortening will do, the actor stays as it was.
    """
    flat, unravel = ravel_pytree(actor)
    old: Any = jax.lax.stop_gradient(policy_fn(actor, batch.inputs))

    def surrogate(point: Vector) -> Float[Array, ""]:
        logp = policy_fn(unravel(point), batch.inputs).logp(batch.inputs.action)
        return jnp.mean(jnp.exp(logp - batch.old_logp) * batch.advantages)

    def divergence(point: Vector) -> Float[Array, ""]:
        return jnp.mean(old.kl(policy_fn(unravel(point), batch.inputs)))

    def fisher_product(vector: Vector) -> Vector:
        product = jax.jvp(jax.grad(divergence), (flat,), (vector,))[1]
        return product + hyper.damping * vector

    before, gradient = jax.value_and_grad(surrogate)(flat)
    direction = conjugate_gradients(fisher_product, gradient, iterations=config.cg_iterations)
    curvature = direction @ fisher_product(direction)
    full = direction * jnp.sqrt(2 * hyper.target_kl / jnp.maximum(curvature, 1e-12))

    def measure(share: Array) -> tuple[Array, Array, Array]:
        point = flat + share * full
        kl, gain = divergence(point), surrogate(point) - before
        return kl, gain, (kl <= hyper.target_kl) & (gain > 0)

    def shorten(carry: tuple[Array, Array, Any]) -> tuple[Array, Array, Any]:
        tried, share, _ = carry
        share = share * config.backtrack_coef
        return tried + 1, share, measure(share)

    def unacceptable(carry: tuple[Array, Array, Any]) -> Array:
        return ~carry[2][2] & (carry[0] < config.line_search_steps)

    start = (jnp.int32(0), jnp.float32(1), measure(jnp.float32(1)))
    tried, share, (kl, gain, accepted) = jax.lax.while_loop(unacceptable, shorten, start)
    point = jnp.where(accepted, flat + share * full, flat)
    metrics = {
        "surrogate_gain": jnp.where(accepted, gain, 0.0),
        "kl": jnp.where(accepted, kl, 0.0),
        "step_taken": accepted.astype(jnp.float32),
        "shortenings": tried.astype(jnp.float32),
        "gradient_norm": jnp.linalg.norm(gradient),
        "entropy": jnp.mean(old.entropy()),
    }
    return unravel(point), metrics


def make_update(
    config: Config, policy_fn: PolicyFn, value_fn: ValueFn, tx: optax.GradientTransformation
) -> Callable[[State, Hyper, Batch], tuple[State, Metrics]]:
    """`update(state, hyper, batch) -> (state, metrics)`: a step of the actor, and a fit of the critic.

    Args:
      policy_fn: (actor, inputs) -> distributions.
      value_fn: (critic, inputs) -> values.
      tx: of the critic.
    """

    def fit(learner: TrainState, hyper: Hyper, part: Batch):
        def loss_fn(critic: Params):
            return squared_value_loss(value_fn(critic, part.inputs), part.returns, part.mask)

        (loss, metrics), gradients = jax.value_and_grad(loss_fn, has_aux=True)(learner.params)
        learner, guard = apply_gradients(learner, gradients, tx, learning_rate=hyper.learning_rate, loss=loss)
        guard["critic_gradient_norm"] = guard.pop("gradient_norm")
        return learner, {**metrics, **guard}, jnp.bool_(False)

    def update(state: State, hyper: Hyper, batch: Batch) -> tuple[State, Metrics]:
        key, shuffle_key = jax.random.split(state.key)
        actor, metrics = natural_step(policy_fn, config, hyper, state.actor, batch)
        critic, fitted = scan_minibatches(
            lambda learner, part: fit(learner, hyper, part),
            state.critic,
            batch,
            shuffle_key,
            epochs=config.critic_epochs,
            minibatches=config.critic_minibatches,
        )
        return State(actor, critic, key), {**metrics, **fitted}

    return update


def make_run(config: Config, env: Environment, env_params: Any) -> Run:
    """A run as `init` and `step`.

    Raises:
      UserError: actor and critic were asked to share.
    """
    if config.network.shared or config.network.memory_width:
        raise UserError("TRPO: actor and critic share nothing: set shared=False and memory_width=0")
    network = on_policy.make_network(config.network, env)
    tx = make_optimizer(config.optimizer)

    def policy_fn(actor: Params, inputs: Inputs) -> Distribution:
        return call(network, actor, inputs.obs, inputs.is_first, inputs.carry, method="act")[0]

    def value_fn(critic: Params, inputs: Inputs) -> Float[Array, "B T"]:
        return call(network, critic, inputs.obs, inputs.obs, inputs.is_first, (), method="next_value")

    update = make_update(config, policy_fn, value_fn, tx)

    def learn(state: State, hyper: Hyper, experience: Experience) -> tuple[State, Metrics]:
        values, advantages, returns = compute_gae(
            network,
            state.params,
            experience,
            gamma=hyper.gamma,
            gae_lambda=hyper.gae_lambda,
            bootstrap_truncation=config.rollout.bootstrap_truncation,
        )
        mask = jnp.ones(values.shape, bool)
        advantages = whiten(advantages, mask)
        batch = Batch(experience.inputs, mask, experience.logp, values, advantages, returns)
        return update(state, hyper, as_rows(network, batch))

    def init_agent(params: Params, key: PRNGKeyArray, hyper: Hyper) -> State:
        del hyper
        return init(params, tx, key)

    learning = on_policy.Learning(init_agent, learn, lambda agent: agent.params)
    return on_policy.make_run(
        network, env, env_params, config.rollout, learning, total_steps=config.total_steps
    )


def make_train(config: Config, env: Environment, env_params: Any) -> Train:
    """`train(key, hyper) -> (state, history)`: a whole run, pure; jit it, vmap it over keys and `Hyper`."""
    return make_train_fn(make_run(config, env, env_params))
