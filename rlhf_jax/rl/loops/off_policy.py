"""The run that every replay-based algorithm shares: explore, then collect, store, learn, again and again.

When to collect and when to learn is fixed in advance, so there is no branch on traced values: under
`vmap` a branch would become a choice between two whole states, replay included.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Int, Metrics, PRNGKeyArray
from rlhf_jax.rl.envs.environments import Environment, EnvState, Transition, episode_metrics, take_statistics
from rlhf_jax.rl.loops.replay import (
    Priorities,
    Replay,
    admit,
    gather,
    init_priorities,
    init_replay,
    insert,
    sample_prioritized,
    sample_uniform,
    update_priorities,
)
from rlhf_jax.rl.loops.runs import Run, no_carry

Agent: TypeAlias = Any
Noise: TypeAlias = Any
Hyper: TypeAlias = Any


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The course of a config. Steps are those of all environments together.

    Attributes:
      total_steps: in the whole run, rounded down to whole reports.
      learning_starts: of these, before the first update.
      num_envs: environments side by side.
      train_every: steps of each environment between trainings.
      updates: optimizer steps a training.
      batch_size: transitions an update.
      capacity: transitions on record, rounded up to whole trainings.
      n_step: rewards before the bootstrap.
      noise_repeat: steps for which an environment keeps a draw of what chance its actions need, at most until
        the next training. Noise that is held pushes further, which rewards far away may need (as in Raffin et
        al. 2021).
      num_logs: entries of the history.
    """

    total_steps: int = 500_000
    learning_starts: int = 1_000
    num_envs: int = 1
    train_every: int = 10
    updates: int = 1
    batch_size: int = 128
    capacity: int = 10_000
    n_step: int = 1
    noise_repeat: int = 1
    num_logs: int = 20

    @property
    def steps_per_training(self) -> int:
        """Steps between two trainings."""
        return self.num_envs * self.train_every

    @property
    def rows(self) -> int:
        """Rows of the replay."""
        trainings = max(-(-self.capacity // self.steps_per_training), -(-self.n_step // self.train_every))
        return trainings * self.train_every

    @property
    def warm_ups(self) -> int:
        """Collections before the first training: at least one sample must be complete."""
        return max(-(-self.learning_starts // self.steps_per_training), -(-self.n_step // self.train_every))

    @property
    def trainings_per_log(self) -> int:
        """Trainings in each report.

        Raises:
          UserError: there is none.
        """
        trainings = self.total_steps // self.steps_per_training - self.warm_ups
        if trainings < self.num_logs:
            raise UserError(
                f"Run: total_steps={self.total_steps} leaves {max(trainings, 0)} trainings for "
                f"num_logs={self.num_logs}: raise total_steps or lower learning_starts or num_logs."
            )
        return trainings // self.num_logs


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """Callables of an off-policy algorithm, from which a run is made.

    Attributes:
      init_fn: (key, hyper) -> agent, the algorithm's state.
      noise_fn: (key, shape) -> what actions need of chance, leaves [*shape, ...], many steps at once.
      explore_fn: (agent, hyper, obs, noise, steps) -> action [B], before learning starts.
      act_fn: the same, from then on.
      update_fn: (agent, hyper, batch) -> (agent, metrics, error of each transition).
      policy_fn: (agent, obs, key, deterministic) -> action [B], of the agent once trained.
      gather_fn: (replay, numbers of transitions, key, hyper) -> batch; None for transitions of n steps.
      initial_carry: what an agent with a memory remembers at the start of so many episodes. It is given
        `RecurrentObs` as obs, and returns (action, carry) where others return an action. None for no memory.
    """

    init_fn: Callable[[PRNGKeyArray, Hyper], Agent]
    noise_fn: Callable[[PRNGKeyArray, tuple[int, int]], Noise]
    explore_fn: Callable[[Agent, Hyper, Any, Noise, Array], Any]
    act_fn: Callable[[Agent, Hyper, Any, Noise, Array], Any]
    update_fn: Callable[[Agent, Hyper, Any], tuple[Agent, Metrics, Float[Array, " N"]]]
    policy_fn: Callable[[Agent, Any, PRNGKeyArray, bool], Any]
    gather_fn: Callable[[Replay, Int[Array, " N"], PRNGKeyArray, Hyper], Any] | None = None
    initial_carry: Callable[[int], Any] | None = None


@pytree_dataclass
class RecurrentObs:
    """An observation of an agent with a memory.

    Attributes:
      is_first: the first of an episode: what was remembered before is to be forgotten.
      carry: what the agent remembers.
    """

    obs: Array
    is_first: Bool[Array, "..."]
    carry: Any


@pytree_dataclass
class RunState:
    """All that a resume needs.

    Attributes:
      agent: the algorithm's state.
      envs: [B] environments.
      replay: what happened.
      priorities: of what happened; None where sampling is uniform.
      steps: of all environments together.
      carry: what the agent remembers in each environment; None where it has no memory.
    """

    agent: Agent
    envs: EnvState
    replay: Replay
    priorities: Priorities | None
    steps: Int[Array, ""]
    key: PRNGKeyArray
    carry: Any = None


def make_run(
    config: RunConfig, env: Environment, env_params: Any, algorithm: Algorithm, *, prioritized: bool = False
) -> Run:
    """A run whose steps are the reports of its history.

    In a report, counts and sums are over its steps, other numbers means over its updates. `hyper` must have
    `gamma`, and `priority_alpha` and `priority_beta` where sampling is prioritised.
    """
    trainings = config.trainings_per_log

    def init(key: PRNGKeyArray, hyper: Hyper) -> RunState:
        key, agent_key, env_key = jax.random.split(key, 3)
        envs = jax.vmap(env.reset, (0, None))(jax.random.split(env_key, config.num_envs), env_params)
        example = _example(env, env_params, algorithm)
        state = RunState(
            agent=algorithm.init_fn(agent_key, hyper),
            envs=envs,
            replay=init_replay(example, rows=config.rows, num_envs=config.num_envs),
            priorities=init_priorities(config.rows * config.num_envs) if prioritized else None,
            steps=jnp.int32(0),
            key=key,
            carry=algorithm.initial_carry(config.num_envs) if algorithm.initial_carry else None,
        )

        def warm_up(_: Int[Array, ""], state: RunState) -> RunState:
            return _collect(config, env, env_params, algorithm.noise_fn, algorithm.explore_fn, state, hyper)

        return jax.lax.fori_loop(0, config.warm_ups, warm_up, state)

    def train(state: RunState, hyper: Hyper) -> tuple[RunState, Metrics]:
        state = _collect(config, env, env_params, algorithm.noise_fn, algorithm.act_fn, state, hyper)
        return _learn(config, algorithm, state, hyper)

    def step(state: RunState, hyper: Hyper) -> tuple[RunState, Metrics]:
        shapes = jax.eval_shape(train, state, hyper)[1]
        blank = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        def one(_: Int[Array, ""], carry: tuple[RunState, Metrics]) -> tuple[RunState, Metrics]:
            state, metrics = train(carry[0], hyper)
            return state, jax.tree.map(_sum_or_last, carry[1], metrics)

        state, sums = jax.lax.fori_loop(0, trainings, one, (state, blank))
        means = {
            name: x if jnp.issubdtype(x.dtype, jnp.integer) else x / trainings for name, x in sums.items()
        }
        envs, statistics = take_statistics(state.envs)
        report = {"steps": state.steps, **episode_metrics(statistics), **means}
        return dataclasses.replace(state, envs=envs), report

    def act(
        state: RunState, obs: Array, is_first: Array, carry: Any, key: PRNGKeyArray, *, deterministic: bool
    ) -> tuple[Array, Any]:
        if algorithm.initial_carry is None:
            return algorithm.policy_fn(state.agent, obs, key, deterministic), carry
        return algorithm.policy_fn(state.agent, RecurrentObs(obs, is_first, carry), key, deterministic)

    return Run(
        init=init,
        step=step,
        act=act,
        updates=config.num_logs,
        steps_per_update=trainings * config.steps_per_training,
        initial_carry=algorithm.initial_carry or no_carry,
    )


def _sum_or_last(total: Array, new: Array) -> Array:
    return new if jnp.issubdtype(new.dtype, jnp.integer) else total + new


def _example(env: Environment, env_params: Any, algorithm: Algorithm) -> Transition:
    def first(key: PRNGKeyArray) -> Transition:
        action = jnp.zeros(env.action_shape, jnp.int32 if env.discrete else jnp.float32)
        transition = env.step(key, env.reset(key, env_params), action, env_params)[1]
        if algorithm.initial_carry is None:
            return transition
        carry = jax.tree.map(lambda x: x[0], algorithm.initial_carry(1))
        return dataclasses.replace(transition, obs=RecurrentObs(transition.obs, jnp.bool_(True), carry))

    return jax.eval_shape(first, jax.random.key(0))


def _collect(
    config: RunConfig,
    env: Environment,
    env_params: Any,
    noise_fn: Callable[[PRNGKeyArray, tuple[int, int]], Noise],
    act_fn: Callable[[Agent, Hyper, Any, Noise, Array], Any],
    state: RunState,
    hyper: Hyper,
) -> RunState:
    """`train_every` steps of every environment, into the replay."""
    key, noise_key, env_key, reset_key = jax.random.split(state.key, 4)
    shape = (config.train_every, config.num_envs)
    # All chance is drawn before the loop over time: one large draw costs much less than many small ones.
    reset = jax.vmap(jax.vmap(env.reset, (0, None)), (0, None))
    fresh = reset(jax.random.split(reset_key, shape), env_params)
    draws = -(-config.train_every // config.noise_repeat)
    noise = jax.tree.map(
        lambda x: jnp.repeat(x, config.noise_repeat, axis=0)[: config.train_every],
        noise_fn(noise_key, (draws, config.num_envs)),
    )
    chance = (noise, jax.random.split(env_key, shape), fresh)
    step_envs = jax.vmap(env.auto_reset_step, (0, 0, 0, None, 0))

    def step(scan_state: tuple[EnvState, Array, Any], now: tuple[Noise, PRNGKeyArray, EnvState]):
        envs, steps, carry = scan_state
        noise, keys, fresh = now
        if carry is None:
            action = act_fn(state.agent, hyper, envs.obs, noise, steps)
            envs, transition = step_envs(keys, envs, action, env_params, fresh)
        else:
            seen = RecurrentObs(envs.obs, envs.episode_length == 0, carry)
            action, carry = act_fn(state.agent, hyper, seen, noise, steps)
            envs, transition = step_envs(keys, envs, action, env_params, fresh)
            transition = dataclasses.replace(transition, obs=seen)
        return (envs, steps + config.num_envs, carry), transition

    scan_state = (state.envs, state.steps, state.carry)
    (envs, steps, carry), transitions = jax.lax.scan(step, scan_state, chance)
    replay = insert(state.replay, transitions)
    priorities = state.priorities
    if priorities is not None:
        priorities = admit(priorities, replay, count=config.train_every, n_step=config.n_step)
    return RunState(state.agent, envs, replay, priorities, steps, key, carry)


def _learn(
    config: RunConfig, algorithm: Algorithm, state: RunState, hyper: Hyper
) -> tuple[RunState, Metrics]:
    """`updates` updates from samples of the replay."""
    key, sample_key = jax.random.split(state.key)
    replay = state.replay

    def gathered(indices: Int[Array, " N"], key: PRNGKeyArray) -> Any:
        if algorithm.gather_fn is None:
            return gather(replay, indices, gamma=hyper.gamma, n_step=config.n_step)
        return algorithm.gather_fn(replay, indices, jax.random.fold_in(key, 1), hyper)

    def update(carry: tuple[Agent, Priorities | None], key: PRNGKeyArray):
        agent, priorities = carry
        if priorities is None:
            indices = sample_uniform(replay, key, batch_size=config.batch_size, n_step=config.n_step)
            agent, metrics, _ = algorithm.update_fn(agent, hyper, gathered(indices, key))
            return (agent, None), metrics
        indices, weight = sample_prioritized(
            priorities, key, batch_size=config.batch_size, beta=hyper.priority_beta
        )
        batch = dataclasses.replace(gathered(indices, key), weight=weight)
        agent, metrics, errors = algorithm.update_fn(agent, hyper, batch)
        return (agent, update_priorities(priorities, indices, errors, alpha=hyper.priority_alpha)), metrics

    carry = (state.agent, state.priorities)
    (agent, priorities), metrics = jax.lax.scan(update, carry, jax.random.split(sample_key, config.updates))
    state = dataclasses.replace(state, agent=agent, priorities=priorities, key=key)
    return state, over_steps(metrics)


def over_steps(metrics: Metrics) -> Metrics:
    """Metrics along a scan, reduced: counters at the last step, means of the rest."""
    return {
        name: x[-1] if jnp.issubdtype(x.dtype, jnp.integer) else jnp.mean(x) for name, x in metrics.items()
    }
