"""Decision transformer (Chen et al. 2021): actions of a log, told from the return that followed them.

Actions are made likely, as in cloning, given that return and what was before; asked for the log's best, the
policy does as the better episodes did. The paper's loss of continuous actions is the squared
error; here it is the likelihood under a Gaussian.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
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
from rlhf_jax.core.types import Array, Bool, Float, Int, Metrics, Params, PRNGKeyArray, Scalar
from rlhf_jax.losses.supervised import cross_entropy_loss
from rlhf_jax.rl.envs.environments import Environment, Transition
from rlhf_jax.rl.loops import offline
from rlhf_jax.rl.loops.offline import Algorithm, RunConfig
from rlhf_jax.rl.loops.runs import Run, Train, make_train_fn
from rlhf_jax.rl.networks.distributions import Distribution
from rlhf_jax.rl.networks.networks import default_encoder, make_encoder, make_head
from rlhf_jax.rl.networks.q_networks import applied
from rlhf_jax.rl.networks.trajectories import TrajectoryTransformer

PolicyFn = Callable[[Params, Float[Array, "N K"], Array, Array, Int[Array, "N K"], Array], Distribution]
"""(params, returns to go, obs, action, step, mask) -> distributions of the actions."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices.

    Attributes:
      run: its course; `batch_size` counts sequences.
      optimizer: Adam behind gradient clipping.
      encoder: of observations; None for the environment's usual one.
      context: steps that are looked back on, K of the paper.
      width: of the transformer.
      num_layers: of the transformer.
      num_heads: of its attention; they divide the width.
    """

    run: RunConfig = RunConfig(updates=2_000, batch_size=64)
    optimizer: OptimizerConfig = OptimizerConfig(clip_norm=0.25, b2=0.999, weight_decay=1e-4)
    encoder: nn.Module | None = None
    context: int = 20
    width: int = 64
    num_layers: int = 2
    num_heads: int = 2


@pytree_dataclass
class Hyper:
    """Hyperparameters of decision transformers that a sweep may vary (array leaves).

    Attributes:
      target_share: return that is asked for when acting, as a share of the log's best.
    """

    learning_rate: Scalar = 1e-3
    target_share: Scalar = 1.0


@pytree_dataclass
class State:
    """The agent; the whole run's state is `offline.State`.

    Attributes:
      target: return that is asked for.
    """

    learner: TrainState
    target: Float[Array, ""]


@pytree_dataclass
class Sequences:
    """Steps [N, K] in order of time.

    Attributes:
      returns: undiscounted return from each step on, in units of the log's largest.
      step: number of each step in its episode.
      mask: steps that are there.
    """

    returns: Float[Array, "N K"]
    obs: Array
    action: Array
    step: Int[Array, "N K"]
    mask: Bool[Array, "N K"]


@pytree_dataclass
class Context:
    """Memory of the agent in each of B environments.

    Attributes:
      seen: the last steps, the latest last.
      left: return that is still to come, in units of reward.
      count: steps of the episode so far.
    """

    seen: Sequences
    left: Float[Array, " B"]
    count: Int[Array, " B"]


@dataclasses.dataclass(frozen=True)
class Log:
    """A log whose steps know their place.

    Attributes:
      steps: all of it as sequences of one, [N, 1].
      start: of each step's episode, [N].
      scale: largest return to go, by size; 1 where all are 0.
      best: the best return of an episode.
    """

    steps: Sequences
    start: Int[Array, " N"]
    scale: float
    best: float


def prepare(data: Transition) -> Log:
    """Returns to go and numbers of steps of a log of whole episodes.

    Raises:
      UserError: it is empty.
    """
    if not len(data.reward):
        raise UserError("the log has no transitions: collect some")
    done, reward = np.asarray(data.done), np.asarray(data.reward, np.float64)
    start = np.zeros(len(done), np.int64)
    start[1:] = np.maximum.accumulate(np.where(done[:-1], np.arange(1, len(done)), 0))
    returns = np.zeros(len(done))
    for t in reversed(range(len(done))):
        returns[t] = reward[t] + (0 if done[t] or t + 1 == len(done) else returns[t + 1])
    scale = float(np.abs(returns).max()) or 1.0
    steps = Sequences(
        returns=jnp.asarray(returns / scale, jnp.float32)[:, None],
        obs=jnp.asarray(data.obs)[:, None],
        action=jnp.asarray(data.action)[:, None],
        step=jnp.asarray(np.arange(len(done)) - start, jnp.int32)[:, None],
        mask=jnp.ones((len(done), 1), bool),
    )
    return Log(steps, jnp.asarray(start, jnp.int32), scale, float(returns[np.unique(start)].max()))


def sequences(log: Log, ends: Int[Array, " N"], *, length: int) -> Sequences:
    """The `length` steps up to these, masked where they would be of another episode."""
    rows = ends[:, None] - jnp.arange(length)[::-1]
    found = jax.tree.map(lambda x: x[jnp.maximum(rows, 0), 0], log.steps)
    return dataclasses.replace(found, mask=rows >= log.start[ends][:, None])


def init(params: Params, tx: optax.GradientTransformation, target: Scalar) -> State:
    """The state at step 0."""
    return State(init_train_state(params, tx), jnp.asarray(target, jnp.float32))


def apply_policy(policy_fn: PolicyFn, params: Params, seen: Sequences) -> Distribution:
    """Distributions of the actions of sequences."""
    return policy_fn(params, seen.returns, seen.obs, seen.action, seen.step, seen.mask)


def make_update(
    policy_fn: PolicyFn, tx: optax.GradientTransformation, *, best: float
) -> Callable[[State, Hyper, Sequences], tuple[State, Metrics]]:
    """`update(state, hyper, batch) -> (state, metrics)`: mean of -log pi(a_t | R_t, s_t and what was before).

    Args:
      best: return of the log's best episode.
    """

    def update(state: State, hyper: Hyper, batch: Sequences) -> tuple[State, Metrics]:
        def loss_fn(params: Params) -> tuple[Float[Array, ""], Metrics]:
            logp = apply_policy(policy_fn, params, batch).logp(batch.action)
            return cross_entropy_loss(logp, batch.mask)

        (loss, metrics), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.learner.params)
        learner, guard = apply_gradients(
            state.learner, gradients, tx, learning_rate=hyper.learning_rate, loss=loss
        )
        return State(learner, jnp.asarray(hyper.target_share * best, jnp.float32)), {**metrics, **guard}

    return update


def blank_context(env: Environment, count: int, *, length: int) -> Context:
    """Nothing remembered, in so many environments."""
    shape = (count, length)
    action = jnp.zeros((*shape, *env.action_shape), jnp.int32 if env.discrete else jnp.float32)
    nothing = jnp.zeros(shape, jnp.int32)
    seen = Sequences(jnp.zeros(shape), env.blank_obs(*shape), action, nothing, jnp.zeros(shape, bool))
    return Context(seen, jnp.zeros(count), jnp.zeros(count, jnp.int32))


def push(
    context: Context, obs: Array, is_first: Bool[Array, " B"], *, target: Scalar, scale: float
) -> Context:
    """The context with a new observation, whose action is not known yet; an episode begins empty."""
    left = jnp.where(is_first, target, context.left)
    count = jnp.where(is_first, 0, context.count)
    old = context.seen
    old = dataclasses.replace(old, mask=old.mask & ~is_first[:, None])
    action = jnp.zeros_like(old.action[:, 0])
    new = Sequences(left / scale, obs, action, count, jnp.ones(count.shape, bool))
    seen = jax.tree.map(
        lambda a, b: jnp.concatenate([a[:, 1:], b[:, None].astype(a.dtype)], axis=1), old, new
    )
    return Context(seen, left, count + 1)


def observe_reward(context: Context, reward: Float[Array, " B"]) -> Context:
    """The context once a reward has come: less is left."""
    return dataclasses.replace(context, left=context.left - reward)


def make_network(config: Config, env: Environment) -> TrajectoryTransformer:
    """The transformer for this environment.

    Raises:
      UserError: sizes do not fit.
    """
    if config.context < 1 or config.width % config.num_heads:
        raise UserError(
            f"Decision transformer: context={config.context}, width={config.width}, num_heads="
            f"{config.num_heads}: use at least 1 step, and heads that divide the width."
        )
    torso = make_encoder(env, config.encoder or default_encoder(env))
    sizes = (config.width, config.num_layers, config.num_heads)
    return TrajectoryTransformer(torso, make_head(env), env.max_steps, *sizes, env.num_actions)


def make_run(config: Config, env: Environment, data: Transition) -> Run:
    """A run as `init` and `step`.

    Raises:
      UserError: the log is empty, or sizes do not fit.
    """
    tx, network, log = make_optimizer(config.optimizer), make_network(config, env), prepare(data)
    policy_fn: PolicyFn = applied(network)

    def init_fn(key: PRNGKeyArray) -> State:
        seen = sequences(log, jnp.zeros(1, jnp.int32), length=config.context)
        inputs = (seen.returns, seen.obs, seen.action, seen.step, seen.mask)
        return init(network.init(key, *inputs)["params"], tx, log.best)

    def sample_fn(key: PRNGKeyArray, hyper: Hyper) -> Sequences:
        del hyper
        ends = jax.random.randint(key, (config.run.batch_size,), 0, len(log.start))
        return sequences(log, ends, length=config.context)

    def act(
        state: offline.State,
        obs: Array,
        is_first: Bool[Array, " B"],
        carry: Context,
        key: PRNGKeyArray,
        *,
        deterministic: bool,
    ) -> tuple[Array, Context]:
        context = push(carry, obs, is_first, target=state.agent.target, scale=log.scale)
        every = apply_policy(policy_fn, state.agent.learner.params, context.seen)
        latest = jax.tree.map(lambda x: x[:, -1], every)
        action = latest.mode() if deterministic else latest.sample(key)
        actions = context.seen.action.at[:, -1].set(action.astype(context.seen.action.dtype))
        return action, dataclasses.replace(context, seen=dataclasses.replace(context.seen, action=actions))

    update = make_update(policy_fn, tx, best=log.best)
    algorithm = Algorithm(init_fn, update, None, sample_fn=sample_fn, act_fn=act)
    return dataclasses.replace(
        offline.make_run(config.run, data, algorithm),
        initial_carry=lambda count: blank_context(env, count, length=config.context),
        observe_reward=observe_reward,
    )


def make_train(config: Config, env: Environment, data: Transition) -> Train:
    """`train(key, hyper) -> (state, history)`: a whole run, pure; jit it, vmap it over keys and `Hyper`."""
    return make_train_fn(make_run(config, env, data))
