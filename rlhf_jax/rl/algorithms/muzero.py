"""MuZero (Schrittwieser et al. 2020) on control: search with a learned model, by mctx.

The search is Gumbel MuZero's (Danihelka et al. 2022), which improves the policy with few simulations. Values
and rewards are learned as numbers on the scale of `rescale_values`, not as distributions. The agent remembers
what its last search found, so that the replay holds it beside the step that follows.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.importing import optional
from rlhf_jax.core.train_state import (
    OptimizerConfig,
    TrainState,
    apply_gradients,
    init_train_state,
    make_optimizer,
)
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Int, Metrics, Params, PRNGKeyArray, Scalar
from rlhf_jax.kernels.returns import n_step_returns
from rlhf_jax.losses.value import rescale_values, unrescale_values
from rlhf_jax.rl.algorithms.dqn import discrete_actions
from rlhf_jax.rl.envs.environments import Environment, Transition
from rlhf_jax.rl.loops import off_policy
from rlhf_jax.rl.loops.off_policy import Algorithm, RecurrentObs, RunConfig
from rlhf_jax.rl.loops.replay import Replay, gather_windows
from rlhf_jax.rl.loops.rollout import bootstrapped
from rlhf_jax.rl.loops.runs import Run, Train, make_train_fn
from rlhf_jax.rl.networks.latent_models import LatentModel
from rlhf_jax.rl.networks.q_networks import applied, make_value_encoder


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices.

    Attributes:
      run: its course; `batch_size` counts sequences, `n_step` the rewards before the bootstrap.
      optimizer: Adam behind gradient clipping, with weight decay.
      encoder: of the network; None for the default of the environment.
      width: of latent states.
      unroll: steps of the model that are learned from, K.
      num_simulations: of the search, for each action.
      max_num_considered_actions: actions that the root of the search looks at, at most.
      prioritized: sample sequences by the error of their first value.
    """

    run: RunConfig = RunConfig(
        total_steps=100_000, num_envs=8, train_every=4, updates=2, n_step=10, capacity=50_000
    )
    optimizer: OptimizerConfig = OptimizerConfig(clip_norm=5.0, b2=0.999, weight_decay=1e-4)
    encoder: nn.Module | None = None
    width: int = 64
    unroll: int = 5
    num_simulations: int = 16
    max_num_considered_actions: int = 16
    prioritized: bool = False

    @property
    def window(self) -> int:
        """Steps of a sample: those unrolled, the rewards behind the last, and where searches are found."""
        return self.unroll + self.run.n_step + 2


@pytree_dataclass
class Hyper:
    """Hyperparameters of MuZero that a sweep may vary (array leaves).

    Attributes:
      gamma: discount per step.
      value_coef: weight of the values' loss beside those of policy and rewards.
      priority_alpha: how much errors matter in sampling; 0 is uniform.
      priority_beta: how much of that bias is corrected; 1 is all.
    """

    learning_rate: Scalar = 2e-3
    gamma: Scalar = 0.99
    value_coef: Scalar = 0.25
    priority_alpha: Scalar = 1.0
    priority_beta: Scalar = 1.0


@pytree_dataclass
class State:
    """The agent; the whole run's state is `off_policy.RunState`.

    Attributes:
      gamma: discount that the search counts with.
    """

    learner: TrainState
    gamma: Float[Array, ""]


@pytree_dataclass
class Search:
    """Result of a search at a step.

    Attributes:
      policy: improved policy, sums to 1.
      value: of the root, in units of reward.
    """

    policy: Float[Array, "... A"]
    value: Float[Array, "..."]


@pytree_dataclass
class Batch:
    """Sequences of K + 1 steps and what the model should say of them; step 0 is where it begins.

    Attributes:
      obs: of step 0.
      action: that led on from each step but the last.
      reward: of these, 0 behind the end of an episode.
      policy: of the searches.
      returns: values of n steps, 0 behind the end of an episode.
      is_open: the episode has not ended before.
      known: nor was it cut before; behind a cut nothing is known.
      weight: of each sequence in the loss.
    """

    obs: Array
    action: Int[Array, "N K"]
    reward: Float[Array, "N K"]
    policy: Float[Array, "N K1 A"]
    returns: Float[Array, "N K1"]
    is_open: Bool[Array, "N K1"]
    known: Bool[Array, "N K1"]
    weight: Float[Array, " N"]


def make_batch(data: Transition, *, gamma: Scalar, unroll: int, n_step: int) -> Batch:
    """Targets of replayed steps [N, unroll + n_step + 2].

        z_t = sum_{k<n} gamma^k u_{t+k} + gamma^n nu_{t+n}

    with nu the value that the search found. What follows a cut step is taken to be worth what it was.

    Args:
      data: whose obs are `RecurrentObs` that carry the search of the step before.
    """
    values = data.obs.carry.value[:, 1:]
    data = jax.tree.map(lambda x: x[:, : unroll + n_step], data)
    next_values = jnp.where(data.truncated, values[:, :-1], values[:, 1:])
    rewards, discounts, last = bootstrapped(data.reward, next_values, data, gamma=gamma)
    everything = jnp.ones(rewards.shape, bool)
    returns = n_step_returns(rewards, values[:, :-1], discounts, last, everything, n=n_step)
    steps = slice(0, unroll + 1)
    ends = jnp.cumsum(data.done, axis=1) - data.done  # before each step
    first_end = jnp.argmax(data.done, axis=1)
    was_cut = jnp.take_along_axis(data.truncated, first_end[:, None], axis=1)
    is_open = (ends == 0)[:, steps]
    return Batch(
        obs=data.obs.obs[:, 0],
        action=data.action[:, :unroll],
        reward=jnp.where(is_open[:, :-1], data.reward[:, :unroll], 0),
        policy=data.obs.carry.policy[:, 1 : unroll + 2],
        returns=jnp.where(is_open, returns[:, steps], 0),
        is_open=is_open,
        known=is_open | ~was_cut,
        weight=jnp.ones(len(returns)),
    )


def scale_gradient(x: Array, scale: float) -> Array:
    """`x`, whose gradient is `scale` times itself."""
    return scale * x + jax.lax.stop_gradient((1 - scale) * x)


def muzero_loss(
    rewards: Float[Array, "N K"],
    logits: Float[Array, "N K1 A"],
    values: Float[Array, "N K1"],
    batch: Batch,
    *,
    value_coef: Scalar,
) -> tuple[Float[Array, ""], tuple[Metrics, Float[Array, " N"]]]:
    """MuZero's loss (Schrittwieser et al. 2020, eq. 1); its regularization is the optimizer's weight decay.

        sum_k [l_r(u_k, r_k) + value_coef l_v(z_k, v_k) + l_p(pi_k, p_k)]

    with squared errors / 2 on the scale of `rescale_values` and the cross-entropy. Steps behind the first
    weigh 1 / K, as their gradients do in the paper.

    Args:
      rewards: rescaled, of the model.
      logits: of the policy, at each step.
      values: rescaled, at each step.

    Returns:
      (loss, (metrics, errors)): errors of the first values, rescaled.
    """
    value_errors = values - rescale_values(batch.returns)
    value_losses = jnp.where(batch.known, jnp.square(value_errors) / 2, 0)
    reward_losses = jnp.square(rewards - rescale_values(batch.reward)) / 2
    reward_losses = jnp.where(batch.known[:, :-1], reward_losses, 0)
    cross_entropy = -jnp.sum(batch.policy * jax.nn.log_softmax(logits), axis=-1)
    policy_losses = jnp.where(batch.is_open, cross_entropy, 0)
    unroll = rewards.shape[1]

    def total(losses: Float[Array, "N K1"]) -> Float[Array, ""]:
        return jnp.mean(batch.weight * (losses[:, 0] + jnp.sum(losses[:, 1:], axis=1) / unroll))

    parts = {
        "policy_loss": total(policy_losses),
        "value_loss": total(value_losses),
        "reward_loss": jnp.mean(batch.weight * jnp.mean(reward_losses, axis=1)),
    }
    loss = parts["policy_loss"] + value_coef * parts["value_loss"] + parts["reward_loss"]
    return loss, (parts, jax.lax.stop_gradient(value_errors[:, 0]))


def unrolled(network: LatentModel, params: Params, batch: Batch) -> tuple[Array, Array, Array]:
    """(rewards [N, K], logits [N, K + 1, A], values [N, K + 1]) of the model along the actions taken.

    Gradients are halved at each of its steps, as in the paper.
    """
    represent, step, predict = (applied(network, name) for name in ("represent", "step", "predict"))
    latent = represent(params, batch.obs)
    rewards, told = [], [predict(params, latent)]
    for k in range(batch.action.shape[1]):
        latent, reward = step(params, scale_gradient(latent, 0.5), batch.action[:, k])
        rewards.append(reward)
        told.append(predict(params, latent))
    logits, values = (jnp.stack(parts, axis=1) for parts in zip(*told, strict=True))
    return jnp.stack(rewards, axis=1), logits, values


def make_update(
    network: LatentModel, tx: optax.GradientTransformation
) -> Callable[[State, Hyper, Batch], tuple[State, Metrics, Float[Array, " N"]]]:
    """`update(state, hyper, batch) -> (state, metrics, errors)`: one optimizer step."""

    def update(state: State, hyper: Hyper, batch: Batch) -> tuple[State, Metrics, Float[Array, " N"]]:
        def loss_fn(params: Params) -> tuple[Array, tuple[Metrics, Array]]:
            return muzero_loss(*unrolled(network, params, batch), batch, value_coef=hyper.value_coef)

        gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (metrics, errors)), gradients = gradient_fn(state.learner.params)
        learner, guard = apply_gradients(
            state.learner, gradients, tx, learning_rate=hyper.learning_rate, loss=loss
        )
        return dataclasses.replace(state, learner=learner), {**metrics, **guard}, errors

    return update


def search(
    network: LatentModel,
    params: Params,
    obs: Array,
    key: PRNGKeyArray,
    *,
    gamma: Scalar,
    num_simulations: int,
    max_num_considered_actions: int = 16,
    gumbel_scale: Scalar = 1.0,
) -> tuple[Int[Array, " B"], Search]:
    """Gumbel search from observations [B] with the learned model: (actions, what was found).

    Args:
      network: with `represent`, `step` and `predict`, whose values and rewards are rescaled.
      gumbel_scale: 0 plays without randomness.
    """
    mctx: Any = optional("mctx", extra="search")
    represent, step, predict = (applied(network, name) for name in ("represent", "step", "predict"))

    def expand(
        params: Params, key: PRNGKeyArray, action: Int[Array, " B"], latent: Array
    ) -> tuple[Any, Array]:
        del key
        latent, reward = step(params, latent, action)
        logits, value = predict(params, latent)
        told = mctx.RecurrentFnOutput(
            reward=unrescale_values(reward),
            discount=jnp.full(value.shape, gamma, value.dtype),
            prior_logits=logits,
            value=unrescale_values(value),
        )
        return told, latent

    latent = represent(params, obs)
    logits, value = predict(params, latent)
    root = mctx.RootFnOutput(prior_logits=logits, value=unrescale_values(value), embedding=latent)
    found = mctx.gumbel_muzero_policy(
        params,
        key,
        root,
        expand,
        num_simulations=num_simulations,
        max_num_considered_actions=max_num_considered_actions,
        gumbel_scale=gumbel_scale,
    )
    return found.action, Search(found.action_weights, found.search_tree.node_values[:, 0])


def make_network(config: Config, env: Environment) -> LatentModel:
    """The model for this environment.

    Raises:
      UserError: actions are continuous, or nothing is unrolled or simulated.
    """
    for name in ("unroll", "num_simulations"):
        if getattr(config, name) < 1:
            raise UserError(f"MuZero: {name}={getattr(config, name)}: use at least 1.")
    num_actions = discrete_actions(env, "MuZero")
    return LatentModel(make_value_encoder(env, config.encoder), num_actions, config.width)


def make_run(config: Config, env: Environment, env_params: Any) -> Run:
    """A run as `init` and `step`."""
    tx, network = make_optimizer(config.optimizer), make_network(config, env)
    num_actions = network.num_actions

    def init_fn(key: PRNGKeyArray, hyper: Hyper) -> State:
        params = network.init(key, env.blank_obs(1), jnp.zeros(1, jnp.int32))["params"]
        return State(init_train_state(params, tx), jnp.asarray(hyper.gamma, jnp.float32))

    def searched(state: State, seen: RecurrentObs, key: PRNGKeyArray, gumbel_scale: float) -> Any:
        return search(
            network,
            state.learner.params,
            seen.obs,
            key,
            gamma=state.gamma,
            num_simulations=config.num_simulations,
            max_num_considered_actions=min(config.max_num_considered_actions, num_actions),
            gumbel_scale=gumbel_scale,
        )

    def act_fn(
        state: State, hyper: Hyper, seen: RecurrentObs, noise: PRNGKeyArray, steps: Array
    ) -> tuple[Array, Search]:
        del hyper, steps
        return searched(state, seen, noise[0], 1.0)

    def policy_fn(
        state: State, seen: RecurrentObs, key: PRNGKeyArray, deterministic: bool
    ) -> tuple[Array, Search]:
        return searched(state, seen, key, 0.0 if deterministic else 1.0)

    def gather_fn(replay: Replay, indices: Int[Array, " N"], key: PRNGKeyArray, hyper: Hyper) -> Batch:
        del key
        data = gather_windows(replay, indices, length=config.window)
        return make_batch(data, gamma=hyper.gamma, unroll=config.unroll, n_step=config.run.n_step)

    algorithm = Algorithm(
        init_fn,
        jax.random.split,
        act_fn,
        act_fn,
        make_update(network, tx),
        policy_fn,
        gather_fn,
        lambda count: Search(jnp.zeros((count, num_actions)), jnp.zeros(count)),
    )
    # To the loop a sample is so many steps long.
    course = dataclasses.replace(config.run, n_step=config.window)
    return off_policy.make_run(course, env, env_params, algorithm, prioritized=config.prioritized)


def make_train(config: Config, env: Environment, env_params: Any) -> Train:
    """`train(key, hyper) -> (state, history)`: a whole run, pure; jit it, vmap it over keys and `Hyper`."""
    return make_train_fn(make_run(config, env, env_params))
