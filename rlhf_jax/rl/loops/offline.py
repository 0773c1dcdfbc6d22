"""The run that every algorithm on a log shares: sample, learn, again and again; no environment is stepped.

    data, _ = transitions.load("runs/log.npz", env)
    train = iql.make_train(iql.Config(), env, data)
    states, history = jax.jit(jax.vmap(train, (0, None)))(jax.random.split(key, 8), iql.Hyper())

The log is a replay that is full from the start and never written to, so sampling is the replay's.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Int, Metrics, Params, PRNGKeyArray, Scalar
from rlhf_jax.rl.envs.environments import Environment, Transition
from rlhf_jax.rl.loops.continuous import CriticFn, box_of, critic_fns
from rlhf_jax.rl.loops.off_policy import over_steps
from rlhf_jax.rl.loops.replay import Batch, Replay, gather, sample_uniform
from rlhf_jax.rl.loops.runs import ActFn, Run
from rlhf_jax.rl.networks.networks import default_encoder, make_encoder, make_head
from rlhf_jax.rl.networks.q_networks import ActionValues, applied


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The course of a run.

    Attributes:
      updates: optimizer steps in the whole run, rounded down to whole reports.
      batch_size: transitions an update, drawn uniformly with replacement.
      num_logs: entries of the history.
    """

    updates: int = 5_000
    batch_size: int = 128
    num_logs: int = 20

    @property
    def updates_per_log(self) -> int:
        """Updates in each report.

        Raises:
          UserError: there is none.
        """
        if self.updates < self.num_logs:
            raise UserError(
                f"Run: updates={self.updates} is less than num_logs={self.num_logs}: raise the first, or "
                "lower the second."
            )
        return self.updates // self.num_logs


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """Callables of an offline algorithm, from which a run is made.

    Attributes:
      init_fn: key -> agent, the algorithm's state.
      update_fn: (agent, hyper, batch) -> (agent, metrics).
      policy_fn: (agent, obs, key, deterministic) -> action [B]; None where there is an `act_fn`.
      gamma_fn: hyper -> discount per step.
      sample_fn: (key, hyper) -> batch; None for `batch_size` transitions.
      act_fn: how an agent with a memory acts, from the run's state.
    """

    init_fn: Callable[[PRNGKeyArray], Any]
    update_fn: Callable[[Any, Any, Any], tuple[Any, Metrics]]
    policy_fn: Callable[[Any, Array, PRNGKeyArray, bool], Array] | None
    gamma_fn: Callable[[Any], Scalar] = lambda hyper: hyper.gamma
    sample_fn: Callable[[PRNGKeyArray, Any], Any] | None = None
    act_fn: ActFn | None = None


@pytree_dataclass
class State:
    """All that a resume needs beside the log.

    Attributes:
      agent: the algorithm's state.
      steps: optimizer steps asked for so far.
    """

    agent: Any
    key: PRNGKeyArray
    steps: Int[Array, ""]


def as_replay(data: Transition) -> Replay:
    """Transitions [N] as a full replay of N rows.

    Raises:
      UserError: there is none.
    """
    count = data.reward.shape[0]
    if not count:
        raise UserError("the log has no transitions: collect some")
    rows = jax.tree.map(lambda x: jnp.asarray(x)[:, None], data)
    return Replay(rows, jnp.int32(0), jnp.int32(count))


def sample(replay: Replay, key: PRNGKeyArray, *, batch_size: int, gamma: Scalar) -> Batch:
    """`batch_size` transitions of the log."""
    return gather(replay, sample_uniform(replay, key, batch_size=batch_size), gamma=gamma)


def make_run(config: RunConfig, data: Transition, algorithm: Algorithm) -> Run:
    """A run whose steps are the reports of its history; `steps` counts optimizer steps."""
    per_report = config.updates_per_log
    replay = as_replay(data)

    def init(key: PRNGKeyArray, hyper: Any) -> State:
        del hyper
        key, agent_key = jax.random.split(key)
        return State(algorithm.init_fn(agent_key), key, jnp.int32(0))

    def step(state: State, hyper: Any) -> tuple[State, Metrics]:
        key, sample_key = jax.random.split(state.key)

        def update(agent: Any, key: PRNGKeyArray) -> tuple[Any, Metrics]:
            if algorithm.sample_fn is None:
                batch = sample(replay, key, batch_size=config.batch_size, gamma=algorithm.gamma_fn(hyper))
            else:
                batch = algorithm.sample_fn(key, hyper)
            return algorithm.update_fn(agent, hyper, batch)

        agent, metrics = jax.lax.scan(update, state.agent, jax.random.split(sample_key, per_report))
        steps = state.steps + per_report
        return State(agent, key, steps), {"steps": steps, **over_steps(metrics)}

    return Run(
        init=init, step=step, act=acting(algorithm), updates=config.num_logs, steps_per_update=per_report
    )


def acting(algorithm: Algorithm) -> ActFn:
    """Acting function of an agent, from the run's state.

    Raises:
      UserError: the algorithm does not say.
    """
    policy_fn = algorithm.policy_fn
    if algorithm.act_fn is not None:
        return algorithm.act_fn
    if policy_fn is None:
        raise UserError("Algorithm: give policy_fn, or act_fn for an agent with a memory.")

    def act(
        state: State, obs: Array, is_first: Array, carry: Any, key: PRNGKeyArray, *, deterministic: bool
    ) -> tuple[Array, Any]:
        del is_first
        return policy_fn(state.agent, obs, key, deterministic), carry

    return act


def make_policy(env: Environment, encoder: nn.Module | None) -> nn.Module:
    """obs -> distribution of actions, with the body and the head of the actor-critics; no memory."""
    return nn.Sequential([make_encoder(env, encoder or default_encoder(env)), make_head(env)])


def make_critics(
    env: Environment, encoder: nn.Module, *, count: int
) -> tuple[Callable[[PRNGKeyArray], Params], CriticFn]:
    """(init(key) -> params, apply) of `count` independent Q(s, a), for either kind of action."""
    if env.num_actions is None:
        return critic_fns(env, encoder, box_of(env, "Learning from a log"), count=count)
    network = ActionValues(make_encoder(env, encoder), env.num_actions)

    def init_one(key: PRNGKeyArray) -> Params:
        return network.init(key, no_observation(env))["params"]

    def init(key: PRNGKeyArray) -> Params:
        return jax.vmap(init_one)(jax.random.split(key, count))

    return init, jax.vmap(applied(network, "chosen"), (0, None, None))


def no_observation(env: Environment) -> Array:
    """A batch of one, to initialise networks with."""
    return jnp.zeros((1, *env.obs_shape), env.obs_dtype)
