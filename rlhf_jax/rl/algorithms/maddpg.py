"""MADDPG (Lowe et al. 2017): deterministic policies, each with a critic that sees what all agents see and do.

    env = multi_agent.make("mpe_simple_tag")
    train = maddpg.make_train(maddpg.Config(), env, None)
    state, history = jax.jit(train)(key, maddpg.Hyper())

Continuous actions are explored by Gaussian noise. Discrete ones are samples, whose gradient is that of the
straight-through Gumbel-softmax: critics only ever see actions that can be taken.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from rlhf_jax.core.train_state import OptimizerConfig, TrainState, init_train_state, make_optimizer
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Float, Metrics, Params, PRNGKeyArray, Scalar
from rlhf_jax.rl.envs.joint import JointObs
from rlhf_jax.rl.envs.multi_agent import JointEnvironment
from rlhf_jax.rl.loops import off_policy
from rlhf_jax.rl.loops.continuous import Box, critic_step, policy_step, towards
from rlhf_jax.rl.loops.off_policy import Algorithm, RunConfig
from rlhf_jax.rl.loops.replay import Batch
from rlhf_jax.rl.loops.runs import Run, Train, make_train_fn
from rlhf_jax.rl.networks.distributions import gumbel_softmax
from rlhf_jax.rl.networks.multi_agent import Headed, PerAgent, mask_logits, to_each_agent
from rlhf_jax.rl.networks.networks import MLP, linear
from rlhf_jax.rl.networks.q_networks import applied

RawActorFn = Callable[[Params, Float[Array, "R N D"]], Float[Array, "R N A"]]
"""(params, what each agent sees) -> logits, or the inverse of tanh of actions in [-1, 1]."""

JointCriticFn = Callable[[Params, Float[Array, "R N K"]], Float[Array, "R N"]]
"""(params, state and actions of all, the same for each agent) -> value for each agent."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices.

    The defaults are those of the paper, but for a smaller replay than its 1e6.

    Attributes:
      run: its course.
      optimizer: of actors and of critics, all agents' together: Adam behind gradient clipping.
      encoder: of actors and critics.
      shared: agents share parameters; in the paper none do.
      agent_ids: agents that share parameters are told who they are.
    """

    run: RunConfig = RunConfig(
        total_steps=1_000_000,
        learning_starts=25_600,
        num_envs=4,
        train_every=25,
        batch_size=1024,
        capacity=100_000,
    )
    optimizer: OptimizerConfig = OptimizerConfig(clip_norm=0.5, b2=0.999)
    encoder: nn.Module = MLP((64, 64), nn.relu)
    shared: bool = False
    agent_ids: bool = True


@pytree_dataclass
class Hyper:
    """Hyperparameters of MADDPG that a sweep may vary (array leaves).

    Attributes:
      learning_rate: of the critics.
      actor_learning_rate: of the actors.
      gamma: discount per step.
      tau: how far target networks move at a time.
      action_noise_std: of the noise on continuous actions, in half ranges of their box.
      gumbel_temperature: of discrete actions' gradients.
      logit_coef: weight of the mean square of the actors' raw outputs, as in the authors' code.
    """

    learning_rate: Scalar = 1e-2
    actor_learning_rate: Scalar = 1e-2
    gamma: Scalar = 0.95
    tau: Scalar = 0.01
    action_noise_std: Scalar = 0.1
    gumbel_temperature: Scalar = 1.0
    logit_coef: Scalar = 1e-3


@pytree_dataclass
class State:
    """The agents; the whole run's state is `off_policy.RunState`."""

    actor: TrainState
    critic: TrainState
    target_actor: Params
    target_critic: Params
    key: PRNGKeyArray


@dataclasses.dataclass(frozen=True)
class ActionFns:
    """The kind of actions, as callables.

    Attributes:
      code_fn: actions as the environment takes them -> as critics see them [R, N, A].
      sample_fn: (raw outputs of actors, obs, key, hyper) -> the same, with gradient.
      decode_fn: actions as critics see them -> as the environment takes them.
    """

    code_fn: Callable[[Array], Float[Array, "R N A"]]
    sample_fn: Callable[[Array, JointObs, PRNGKeyArray, Hyper], Float[Array, "R N A"]]
    decode_fn: Callable[[Float[Array, "R N A"]], Array]


def discrete_fns(num_actions: int) -> ActionFns:
    """One-hot codes, and samples by the straight-through Gumbel-softmax."""

    def sample(raw: Array, obs: JointObs, key: PRNGKeyArray, hyper: Hyper) -> Array:
        return gumbel_softmax(mask_logits(raw, obs.available), key, temperature=hyper.gumbel_temperature)

    return ActionFns(
        lambda action: jax.nn.one_hot(action, num_actions),
        sample,
        lambda code: jnp.argmax(code, axis=-1).astype(jnp.int32),
    )


def continuous_fns(box: Box) -> ActionFns:
    """Actions in [-1, 1]; the policy has no chance of its own."""
    low, high = jnp.asarray(box.low), jnp.asarray(box.high)
    return ActionFns(
        lambda action: (2 * action - (high + low)) / (high - low),
        lambda raw, obs, key, hyper: jnp.tanh(raw),
        lambda code: (high + low) / 2 + box.half_range * code,
    )


def init(actor: Params, critic: Params, tx: optax.GradientTransformation, key: PRNGKeyArray) -> State:
    """The state at step 0; target networks are copies."""
    return State(init_train_state(actor, tx), init_train_state(critic, tx), actor, critic, key)


def critic_inputs(obs: JointObs, codes: Float[Array, "R N A"]) -> Float[Array, "R N K"]:
    """State of the world and actions of all agents, the same for the critic of each."""
    joint = jnp.concatenate([obs.state, codes.reshape(codes.shape[0], -1)], axis=-1)
    return to_each_agent(joint, codes.shape[1])


def own_action_inputs(
    obs: JointObs, taken: Float[Array, "R N A"], own: Float[Array, "R N A"]
) -> Float[Array, "R N K"]:
    """`critic_inputs` in which each agent's critic sees `own` of that agent and `taken` of the others."""
    rows, agents = taken.shape[:2]
    is_own = jnp.eye(agents, dtype=bool)[None, :, :, None]
    joint = jnp.where(is_own, own[:, None], taken[:, None]).reshape(rows, agents, -1)
    return jnp.concatenate([to_each_agent(obs.state, agents), joint], axis=-1)


def make_update(
    config: Config,
    actor_fn: RawActorFn,
    critic_fn: JointCriticFn,
    actions: ActionFns,
    tx: optax.GradientTransformation,
) -> Callable[[State, Hyper, Batch], tuple[State, Metrics, Float[Array, " R"]]]:
    """`update(state, hyper, batch) -> (state, metrics, errors)` (Lowe et al. 2017, eq. 5 and 6, Algorithm 1).

    target_i = r_i + discount Q_i'(x', mu_1'(o_1'), ..., mu_N'(o_N')),  actor i: -Q_i(x, ..., mu_i(o_i), ...)

    The other agents' actions in the second are those that were taken.
    """
    del config

    def of_actions_taken(params: Params, obs: Any, action: Array) -> Float[Array, "N R"]:
        return critic_fn(params, critic_inputs(obs, actions.code_fn(action))).T

    def update(state: State, hyper: Hyper, batch: Batch) -> tuple[State, Metrics, Float[Array, " R"]]:
        key, next_key, actor_key = jax.random.split(state.key, 3)
        next_raw = actor_fn(state.target_actor, batch.next_obs.own)
        next_codes = actions.sample_fn(next_raw, batch.next_obs, next_key, hyper)
        next_values = critic_fn(state.target_critic, critic_inputs(batch.next_obs, next_codes))
        targets = batch.reward + batch.discount[:, None] * next_values
        critic, metrics, errors, _ = critic_step(
            state.critic,
            towards(of_actions_taken, batch, targets.T),
            batch.weight,
            tx,
            learning_rate=hyper.learning_rate,
        )

        def actor_loss(params: Params) -> tuple[Array, None]:
            raw = actor_fn(params, batch.obs.own)
            own = actions.sample_fn(raw, batch.obs, actor_key, hyper)
            inputs = own_action_inputs(batch.obs, actions.code_fn(batch.action), own)
            values = critic_fn(critic.params, inputs)
            return -jnp.mean(values) + hyper.logit_coef * jnp.mean(jnp.square(raw)), None

        actor, loss, _ = policy_step(state.actor, actor_loss, tx, learning_rate=hyper.actor_learning_rate)
        state = State(
            actor=actor,
            critic=critic,
            target_actor=optax.incremental_update(actor.params, state.target_actor, hyper.tau),
            target_critic=optax.incremental_update(critic.params, state.target_critic, hyper.tau),
            key=key,
        )
        return state, {**metrics, "actor_loss": loss}, errors

    return update


def make_networks(config: Config, env: JointEnvironment) -> tuple[PerAgent, PerAgent]:
    """Actors and critics for this environment."""

    def each(outputs: int, scale: float) -> PerAgent:
        network = Headed(config.encoder.clone(), linear(outputs, scale))
        return PerAgent(network, config.shared, config.agent_ids)

    return each(env.num_actions or env.action_shape[-1], 0.01), each(1, 1.0)


def make_algorithm(config: Config, env: JointEnvironment, tx: optax.GradientTransformation) -> Algorithm:
    """Exploration by samples or by noise, around the update."""
    actor, critic = make_networks(config, env)
    actor_fn = applied(actor)
    box = Box(env.action_low[: env.action_shape[-1]], env.action_high[: env.action_shape[-1]])
    actions = discrete_fns(env.num_actions) if env.num_actions else continuous_fns(box)
    width = env.num_actions or env.action_shape[-1]

    def critic_fn(params: Params, inputs: Float[Array, "R N K"]) -> Float[Array, "R N"]:
        return applied(critic)(params, inputs)[..., 0]

    def init_fn(key: PRNGKeyArray, hyper: Hyper) -> State:
        del hyper
        actor_key, critic_key, key = jax.random.split(key, 3)
        obs = env.blank_obs(1)
        inputs = critic_inputs(obs, jnp.zeros((1, env.num_agents, width)))
        return init(
            actor.init(actor_key, obs.own)["params"], critic.init(critic_key, inputs)["params"], tx, key
        )

    def noise_fn(key: PRNGKeyArray, shape: tuple[int, int]) -> tuple[PRNGKeyArray, Array]:
        policy_key, noise_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, (*shape, env.num_agents, width))
        return jax.random.split(policy_key, shape[0]), noise

    def explore_fn(state: State, hyper: Hyper, obs: Any, noise: tuple[Any, Array], steps: Array) -> Array:
        del state, hyper, steps
        if env.discrete:
            return jnp.argmax(mask_logits(noise[1], obs.available), axis=-1)
        return actions.decode_fn(2 * jax.scipy.stats.norm.cdf(noise[1]) - 1)

    def act_fn(state: State, hyper: Hyper, obs: Any, noise: tuple[Any, Array], steps: Array) -> Array:
        del steps
        code = actions.sample_fn(actor_fn(state.actor.params, obs.own), obs, noise[0], hyper)
        if env.discrete:
            return actions.decode_fn(code)
        return box.clip(actions.decode_fn(code + hyper.action_noise_std * noise[1]))

    def policy_fn(state: State, obs: Any, key: PRNGKeyArray, deterministic: bool) -> Array:
        raw = actor_fn(state.actor.params, obs.own)
        if env.discrete and deterministic:
            return jnp.argmax(mask_logits(raw, obs.available), axis=-1)
        return actions.decode_fn(actions.sample_fn(raw, obs, key, Hyper()))

    update = make_update(config, actor_fn, critic_fn, actions, tx)
    return Algorithm(init_fn, noise_fn, explore_fn, act_fn, update, policy_fn)


def make_run(config: Config, env: JointEnvironment, env_params: Any) -> Run:
    """A run as `init` and `step`."""
    algorithm = make_algorithm(config, env, make_optimizer(config.optimizer))
    return off_policy.make_run(config.run, env, env_params, algorithm)


def make_train(config: Config, env: JointEnvironment, env_params: Any) -> Train:
    """`train(key, hyper) -> (state, history)`: a whole run, pure; jit it, vmap it over keys and `Hyper`."""
    return make_train_fn(make_run(config, env, env_params))
