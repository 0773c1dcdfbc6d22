"""Value-decomposition networks (Sunehag et al. 2018): the joint value is the sum of the agents' values.

All else is `qmix`: the mixer is what differs.
"""

import dataclasses
from typing import Any

from rlhf_jax.rl.algorithms import qmix
from rlhf_jax.rl.algorithms.qmix import Config, Hyper, State, init, make_update
from rlhf_jax.rl.envs.multi_agent import JointEnvironment
from rlhf_jax.rl.loops.runs import Run, Train, make_train_fn
from rlhf_jax.rl.networks.multi_agent import SumMixer

__all__ = ["Config", "Hyper", "State", "init", "make_run", "make_train", "make_update"]


def make_run(config: Config, env: JointEnvironment, env_params: Any) -> Run:
    """A run as `init` and `step`, whatever mixer `config` has."""
    return qmix.make_run(dataclasses.replace(config, mixer=SumMixer()), env, env_params)


def make_train(config: Config, env: JointEnvironment, env_params: Any) -> Train:
    """`train(key, hyper) -> (state, history)`: a whole run, pure; jit it, vmap it over keys and `Hyper`."""
    return make_train_fn(make_run(config, env, env_params))
