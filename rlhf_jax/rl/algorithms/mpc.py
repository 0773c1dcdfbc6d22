"""Learning a model of the world and planning with it: no policy, no value function.

After PETS (Chua et al. 2018): an ensemble of networks learns from all real transitions what follows an action
and what it pays; at every step the best sequence of actions is looked for by the cross-entropy method, each
candidate under every member of the ensemble, which each goes on from its own predictions (their TS-infinity);
the first action is taken, and the rest forgotten. Members differ by their initial weights and batches. They
predict means (Chua et al.'s "DE"; their own choice has a variance as well): enough where the world has
little chance of its own, and a quarter of the arithmetic.

An end of the episode is not predicted: for tasks that only time ends, such as Pendulum.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import (
    OptimizerConfig,
    TrainState,
    apply_gradients,
    init_train_state,
    make_optimizer,
)
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Float, Metrics, Params, PRNGKeyArray, Scalar
from rlhf_jax.kernels.whitening import Moments, moments_variance
from rlhf_jax.rl.envs.environments import Environment
from rlhf_jax.rl.envs.normalization import add_observations, init_observation_moments, normalize_observations
from rlhf_jax.rl.loops import off_policy
from rlhf_jax.rl.loops.continuous import Box, box_of
from rlhf_jax.rl.loops.off_policy import Algorithm, RunConfig
from rlhf_jax.rl.loops.planning import cross_entropy_method
from rlhf_jax.rl.loops.replay import Batch
from rlhf_jax.rl.loops.runs import Run, Train, make_train_fn
from rlhf_jax.rl.networks.networks import MLP
from rlhf_jax.rl.networks.q_networks import applied


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices.

    Attributes:
      run: its course; `updates` steps of the model after every `train_every` real steps. Each member has its
        own part of the batch.
      optimizer: of the ensemble: Adam behind gradient clipping.
      widths: of the hidden layers of each member.
      ensemble_size: of the ensemble.
      horizon: actions of a plan.
      population: plans tried in each iteration.
      elites: of these, kept for the next.
      iterations: of the search, at every real step.
    """

    run: RunConfig = RunConfig(
        total_steps=2_000,
        learning_starts=200,
        train_every=50,
        updates=200,
        batch_size=320,
        capacity=20_000,
        num_logs=9,
    )
    optimizer: OptimizerConfig = OptimizerConfig(clip_norm=1e6, b2=0.999)
    widths: tuple[int, ...] = (64, 64)
    ensemble_size: int = 5
    horizon: int = 20
    population: int = 40
    elites: int = 5
    iterations: int = 3


@pytree_dataclass
class Hyper:
    """Hyperparameters of PETS that a sweep may vary (array leaves).

    Attributes:
      learning_rate: of the ensemble.
      gamma: discount per step of a plan.
    """

    learning_rate: Scalar = 1e-3
    gamma: Scalar = 0.99


@pytree_dataclass
class State:
    """The agent; the whole run's state is `off_policy.RunState`.

    Attributes:
      ensemble: its params are those of all members, [M, ...] each.
      inputs: moments of observations and actions.
      outputs: moments of changes of observations, and of rewards.
      gamma: of plans; here because a trained agent plans without `Hyper`.
    """

    ensemble: TrainState
    inputs: Moments
    outputs: Moments
    gamma: Float[Array, ""]
    key: PRNGKeyArray


DynamicsFn = Callable[[Params, Float[Array, "N I"]], Float[Array, "N O"]]
"""(params of one member, scaled inputs) -> scaled outputs."""


def joined_inputs(obs: Float[Array, "... D"], action: Float[Array, "... A"]) -> Float[Array, "... I"]:
    """Inputs of the dynamics model: observation and action side by side."""
    return jnp.concatenate([obs, action], axis=-1)


def predict(
    dynamics_fn: DynamicsFn,
    params: Params,
    state: State,
    obs: Float[Array, "N D"],
    action: Float[Array, "N A"],
) -> tuple[Float[Array, "N D"], Float[Array, " N"]]:
    """(next observation, reward) in the environment's units, by one member."""
    scaled = dynamics_fn(params, normalize_observations(joined_inputs(obs, action), state.inputs))
    outputs = state.outputs.mean + jnp.sqrt(moments_variance(state.outputs)) * scaled
    return obs + outputs[:, :-1], outputs[:, -1]


def make_plan(config: Config, dynamics_fn: DynamicsFn, box: Box) -> Callable[..., Float[Array, " A"]]:
    """`plan(state, obs, key) -> action`: the first action of the best plan found from `obs` [D]."""
    low, high = jnp.asarray(box.low), jnp.asarray(box.high)

    def returns(state: State, params: Params, obs: Array, plans: Float[Array, "N H A"]) -> Float[Array, " N"]:
        def step(carry: tuple[Array, Array, Array], action: Array) -> tuple[tuple[Array, Array, Array], None]:
            obs, total, weight = carry
            obs, reward = predict(dynamics_fn, params, state, obs, action)
            return (obs, total + weight * reward, weight * state.gamma), None

        first = jnp.broadcast_to(obs, (plans.shape[0], *obs.shape))
        carry = (first, jnp.zeros(plans.shape[0]), jnp.float32(1))
        return jax.lax.scan(step, carry, jnp.swapaxes(plans, 0, 1))[0][1]

    def plan(state: State, obs: Float[Array, " D"], key: PRNGKeyArray) -> Float[Array, " A"]:
        def score(plans: Float[Array, "N H A"]) -> Float[Array, " N"]:
            each = jax.vmap(lambda params: returns(state, params, obs, plans))
            return jnp.mean(each(state.ensemble.params), axis=0)

        best = cross_entropy_method(
            score,
            key,
            jnp.broadcast_to((low + high) / 2, (config.horizon, len(low))),
            jnp.broadcast_to(box.half_range, (config.horizon, len(low))),
            low=low,
            high=high,
            population=config.population,
            elites=config.elites,
            iterations=config.iterations,
        )
        return best[0]

    return plan


def init(
    params: Params,
    tx: optax.GradientTransformation,
    key: PRNGKeyArray,
    hyper: Hyper,
    *,
    obs_size: int,
    action_size: int,
) -> State:
    """The state at step 0; `params` are those of all members, [M, ...] each."""
    return State(
        ensemble=init_train_state(params, tx),
        inputs=init_observation_moments((obs_size + action_size,)),
        outputs=init_observation_moments((obs_size + 1,)),
        gamma=jnp.asarray(hyper.gamma, jnp.float32),
        key=key,
    )


def make_ensemble(config: Config, env: Environment) -> tuple[Callable[[PRNGKeyArray], Params], DynamicsFn]:
    """(init(key) -> params of all members, apply of one).

    Raises:
      UserError: observations are images or numbers, or the batch cannot be parted.
    """
    if env.num_states is not None or len(env.obs_shape) != 1:
        raise UserError(f"{env.name}: a model of the world needs vectors as observations: use PPO or DQN.")
    if config.run.batch_size % config.ensemble_size:
        raise UserError(
            f"MPC: ensemble_size={config.ensemble_size} does not divide run.batch_size="
            f"{config.run.batch_size}: choose a multiple."
        )
    size = env.obs_shape[0]
    member = MLP(config.widths, nn.silu, output=size + 1)

    def init_ensemble(key: PRNGKeyArray) -> Params:
        example = jnp.zeros((1, size + env.action_shape[0]))
        return jax.vmap(lambda key: member.init(key, example)["params"])(
            jax.random.split(key, config.ensemble_size)
        )

    return init_ensemble, applied(member)


def make_update(
    config: Config, dynamics_fn: DynamicsFn, tx: optax.GradientTransformation
) -> Callable[[State, Hyper, Batch], tuple[State, Metrics, Float[Array, " N"]]]:
    """`update(state, hyper, batch) -> (state, metrics, errors)`: a step of every member on its own part.

    The loss is half the squared error of changes and rewards, scaled to variance 1 by the moments of all
    batches so far, in the mean over a part and summed over members, who share nothing.
    """

    def update(state: State, hyper: Hyper, batch: Batch) -> tuple[State, Metrics, Float[Array, " N"]]:
        seen = joined_inputs(batch.obs, batch.action)
        followed = jnp.concatenate([batch.next_obs - batch.obs, batch.reward[:, None]], axis=-1)
        inputs, outputs = add_observations(state.inputs, seen), add_observations(state.outputs, followed)
        parts, targets = (
            normalize_observations(x, moments).reshape(config.ensemble_size, -1, x.shape[-1])
            for x, moments in ((seen, inputs), (followed, outputs))
        )

        def loss_fn(params: Params) -> tuple[Array, Array]:
            squares = jnp.mean(jnp.square(jax.vmap(dynamics_fn)(params, parts) - targets), axis=-1)
            return 0.5 * jnp.sum(jnp.mean(squares, axis=-1)), squares

        (loss, squares), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.ensemble.params)
        ensemble, guard = apply_gradients(
            state.ensemble, gradients, tx, learning_rate=hyper.learning_rate, loss=loss
        )
        state = dataclasses.replace(state, ensemble=ensemble, inputs=inputs, outputs=outputs)
        return state, {"model_loss": loss / config.ensemble_size, **guard}, jnp.sqrt(squares).reshape(-1)

    return update


def make_run(config: Config, env: Environment, env_params: Any) -> Run:
    """A run as `init` and `step`.

    Raises:
      UserError: actions or observations are no vectors, or the batch cannot be parted.
    """
    box, tx = box_of(env, "MPC"), make_optimizer(config.optimizer)
    init_ensemble, dynamics_fn = make_ensemble(config, env)
    plan = make_plan(config, dynamics_fn, box)

    def init_fn(key: PRNGKeyArray, hyper: Hyper) -> State:
        member_key, key = jax.random.split(key)
        sizes = {"obs_size": env.obs_shape[0], "action_size": env.action_shape[0]}
        return init(init_ensemble(member_key), tx, key, hyper, **sizes)

    def noise_fn(key: PRNGKeyArray, shape: tuple[int, int]) -> tuple[PRNGKeyArray, Array]:
        plan_key, uniform_key = jax.random.split(key)
        return jax.random.split(plan_key, shape), box.uniform(uniform_key, shape)

    def explore_fn(state: State, hyper: Hyper, obs: Array, noise: tuple[Any, Array], steps: Array) -> Array:
        del state, hyper, obs, steps
        return noise[1]

    def act_fn(state: State, hyper: Hyper, obs: Array, noise: tuple[Any, Array], steps: Array) -> Array:
        del hyper, steps
        return jax.vmap(plan, (None, 0, 0))(state, obs, noise[0])

    def policy_fn(state: State, obs: Array, key: PRNGKeyArray, deterministic: bool) -> Array:
        del deterministic  # what chance there is, is that of the search
        return jax.vmap(plan, (None, 0, 0))(state, obs, jax.random.split(key, obs.shape[0]))

    update = make_update(config, dynamics_fn, tx)
    algorithm = Algorithm(init_fn, noise_fn, explore_fn, act_fn, update, policy_fn)
    return off_policy.make_run(config.run, env, env_params, algorithm)


def make_train(config: Config, env: Environment, env_params: Any) -> Train:
    """`train(key, hyper) -> (state, history)`: a whole run, pure; jit it, vmap it over keys and `Hyper`."""
    return make_train_fn(make_run(config, env, env_params))
