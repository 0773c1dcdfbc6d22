"""Independent PPO (de Witt et al. 2020): each agent's critic sees what the agent sees, others are world.

All else is `mappo`, sharing of parameters and normalisation of values included: the critic's input is what
differs.
"""

from typing import Any

from rlhf_jax.rl.algorithms import mappo
from rlhf_jax.rl.algorithms.mappo import Batch, Config, Hyper, State, default_hyper, init, make_update
from rlhf_jax.rl.envs.multi_agent import JointEnvironment
from rlhf_jax.rl.loops.runs import Run, Train, make_train_fn

__all__ = [
    "Batch",
    "Config",
    "Hyper",
    "State",
    "default_hyper",
    "init",
    "make_run",
    "make_train",
    "make_update",
]


def make_run(config: Config, env: JointEnvironment, env_params: Any) -> Run:
    """A run as `init` and `step`."""
    return mappo.make_run(config, env, env_params, central=False)


def make_train(config: Config, env: JointEnvironment, env_params: Any) -> Train:
    """`train(key, hyper) -> (state, history)`: a whole run, pure; jit it, vmap it over keys and `Hyper`."""
    return make_train_fn(make_run(config, env, env_params))
