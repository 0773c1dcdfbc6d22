"""Algorithms by name, their settings for each environment, and changes to them from the command line."""

import dataclasses
import difflib
import importlib
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.ranges import Range
from rlhf_jax.rl.envs import environments, goals, multi_agent, processes
from rlhf_jax.rl.envs.environments import Environment
from rlhf_jax.rl.loops.runs import Run
from rlhf_jax.rl.networks.batch_norm import BatchNormMLP
from rlhf_jax.rl.networks.networks import MLP, MinAtarConv
from rlhf_jax.stages import rl_joint_rows, rl_rows

DISCRETE = ("dqn", "c51", "qr_dqn", "iqn", "rainbow", "r2d2", "pqn", "muzero", "feudal_networks")
WITH_GOALS = ("her",)
WITH_STATES = ("maxq",)
CONTINUOUS = ("ddpg", "td3", "sac", "crossq", "mpo", "mpc")
ENCODERS = {
    "mlp": MLP(),
    "relu_mlp": MLP(activation=nn.relu),
    "layer_norm_mlp": MLP(activation=nn.relu, layer_norm=True),
    "minatar_conv": MinAtarConv(),
}
NORMED_ENCODERS = {"batch_norm_mlp": BatchNormMLP()}
EITHER = ("ppo", "ppo_penalty", "a2c", "a3c", "impala", "trpo", "reinforce", "grpo", "option_critic")
SEVERAL_EITHER = ("ippo", "mappo", "maddpg")
SEVERAL_DISCRETE = ("vdn", "qmix")

RENAMED = {
    "target_rate": "tau",
    "target_every": "target_update_interval",
    "value_min": "v_min",
    "value_max": "v_max",
    "atoms": "num_atoms",
    "quantiles": "num_quantiles",
    "critics": "num_critics",
    "members": "ensemble_size",
    "body": "encoder",
    "conservatism": "cql_alpha",
    "policy_every": "policy_delay",
    "smoothing_std": "target_policy_noise",
    "smoothing_clip": "target_noise_clip",
    "exploration_std": "action_noise_std",
    "noise_hold": "noise_repeat",
    "reports": "num_logs",
    "prioritised": "prioritized",
    "shortening": "backtrack_coef",
    "max_kl": "target_kl",
}
"""Settings by the names they had: agents saved with them are read, and `--set` answers with the new name."""
_ZERO_TOO = ("burn_in", "learning_starts", "memory_width", "total_steps", "warmup_steps")
_UNBOUNDED = ("target_kl", "cliprange_value", "clip_norm")


@dataclasses.dataclass(frozen=True)
class Agent:
    """An algorithm with its settings.

    Attributes:
      config: static.
      hyper: numbers, as arrays.
    """

    algo: str
    module: ModuleType
    config: Any
    hyper: Any

    def run(self, env: Environment, env_params: Any) -> Run:
        """A run on an environment."""
        return self.module.make_run(self.config, env, env_params)


def make_agent(algo: str, env: Environment, steps: int, changes: Sequence[str]) -> Agent:
    """The algorithm with its settings for this environment.

    Args:
      steps: environment steps; 0 for those of the table of results, or the algorithm's own.
      changes: `hyper.NAME=VALUE`, or `NAME=VALUE` and `PART.NAME=VALUE` for the config; made after those that
        `rl_rows` has for this environment.

    Raises:
      UserError: there is no such algorithm or setting, or it does not fit the environment's actions.
    """
    known = (*EITHER, *DISCRETE, *WITH_GOALS, *WITH_STATES, *CONTINUOUS, *SEVERAL_EITHER, *SEVERAL_DISCRETE)
    name = algo.replace("-", "_").lower()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise UserError(f"unknown algorithm {algo!r}: the nearest name is {near!r}")
    if name not in _fitting(env):
        raise UserError(f"{name} {_mismatch(name, env)}: choose one of {', '.join(_fitting(env))}")
    module = importlib.import_module(f"rlhf_jax.rl.algorithms.{name}")
    settings, usual_steps = rl_rows.settings_for(name, env.name, (*rl_rows.ROWS, *rl_joint_rows.ROWS))
    config, hyper = configured(module, (*settings, *changes))
    if not steps and not any(
        change.partition("=")[0].endswith(("total_steps", "updates")) for change in changes
    ):
        steps = usual_steps
    if steps:
        config = _with_steps(config, env, steps)
    return Agent(name, module, config, hyper)


def _fitting(env: Environment) -> tuple[str, ...]:
    """Algorithms for the agents and the actions of an environment."""
    if env.num_agents > 1:
        return SEVERAL_EITHER + (SEVERAL_DISCRETE if env.discrete else ())
    if not env.discrete:
        return EITHER + CONTINUOUS
    with_goals = WITH_GOALS if isinstance(env.raw, goals.Goals) else ()
    return EITHER + DISCRETE + with_goals + (WITH_STATES if env.num_states is not None else ())


def _mismatch(name: str, env: Environment) -> str:
    """Reason why an algorithm does not fit an environment."""
    for_several = name in (*SEVERAL_EITHER, *SEVERAL_DISCRETE)
    if for_several != (env.num_agents > 1):
        suited = "several agents" if for_several else "one agent"
        return f"is for {suited} and {env.name} has {env.num_agents}"
    if name in WITH_GOALS:
        return f"is for environments with goals and {env.name} has none"
    if name in WITH_STATES:
        return f"is for environments with numbered states and {env.name} has none"
    kinds = ("continuous", "discrete") if env.discrete else ("discrete", "continuous")
    return f"is for {kinds[0]} actions and {env.name} has {kinds[1]} ones"


def make_environment(name: str) -> tuple[Environment, Any]:
    """(environment, its parameters): of one agent, of gymnax, `goals` or `processes`, or of several.

    Raises:
      UserError: there is none of this name, or the extra that it needs is not installed.
    """
    if goals.is_known(name):
        return goals.make(name)
    if name in processes.NAMES:
        return processes.make(name)
    if name in multi_agent.NAMES:
        return multi_agent.make(name), None
    ours = (*processes.NAMES, *multi_agent.NAMES)
    if near := difflib.get_close_matches(name.lower(), ours, n=1, cutoff=0.8):
        raise UserError(f"unknown environment {name!r}: the nearest name is {near[0]!r}")
    return environments.make(name)


def configured(module: ModuleType, changes: Sequence[str]) -> tuple[Any, Any]:
    """(config, hyper) of an algorithm, `changes` made one after the other; numbers of `hyper` as arrays.

    Raises:
      UserError: there is no such setting.
    """
    config = module.Config()
    hyper = module.default_hyper() if hasattr(module, "default_hyper") else module.Hyper()
    for change in changes:
        path, sign, text = change.partition("=")
        if not sign:
            raise UserError(f"--set {change!r}: write it as NAME=VALUE")
        if path.startswith("hyper."):
            hyper = _changed(hyper, path.removeprefix("hyper.").split("."), text, change)
        else:
            config = _changed(config, path.split("."), text, change)
    return config, jax.tree.map(jnp.asarray, hyper)


def current_name(change: str) -> str:
    """`PATH=VALUE` with each part of the path by its name of today."""
    path, sign, text = change.partition("=")
    return ".".join(RENAMED.get(part, part) for part in path.split(".")) + sign + text


def _with_steps(config: Any, env: Environment, steps: int) -> Any:
    if hasattr(config, "run"):
        return dataclasses.replace(config, run=dataclasses.replace(config.run, total_steps=steps))
    if hasattr(config, "total_steps"):
        return dataclasses.replace(config, total_steps=steps)
    episodes = config.episodes if hasattr(config, "episodes") else config.groups * config.update.group_size
    updates = steps // (episodes * (config.max_steps or env.max_steps))
    if updates < 1:
        raise UserError(f"--steps {steps} is less than one update of {episodes} whole episodes: raise it")
    return dataclasses.replace(config, updates=updates)


def _changed(settings: Any, path: Sequence[str], text: str, change: str) -> Any:
    """`settings` with the field at `path` set to what `text` says, in the type it had."""
    names = [field.name for field in dataclasses.fields(settings)]
    if path[0] not in names:
        if RENAMED.get(path[0]) in names:
            raise UserError(f"--set {change!r}: {path[0]!r} has another name: write {current_name(change)}")
        raise UserError(f"--set {change!r}: no setting {path[0]!r}: choose among {', '.join(names)}")
    value = getattr(settings, path[0])
    if path in (["encoder"], ["critic_encoder"]):
        known = NORMED_ENCODERS if isinstance(value, BatchNormMLP) else ENCODERS
        return dataclasses.replace(settings, **{path[0]: _encoder(text, change, known)})
    if len(path) > 1:
        if not dataclasses.is_dataclass(value):
            raise UserError(f"--set {change!r}: {path[0]!r} has no parts: leave out what follows it")
        return dataclasses.replace(settings, **{path[0]: _changed(value, path[1:], text, change)})
    return dataclasses.replace(settings, **{path[0]: _parsed(value, text, change)})


def _encoder(text: str, change: str, known: Mapping[str, nn.Module]) -> nn.Module:
    """`relu_mlp`, or with the widths of its layers `relu_mlp:256,256`."""
    name, _, widths = text.partition(":")
    if name not in known:
        raise UserError(f"--set {change!r}: no encoder {name!r}: choose among {', '.join(known)}")
    encoder = known[name]
    if not widths:
        return encoder
    numbers = widths.split(",")
    if not isinstance(encoder, MLP | BatchNormMLP) or not all(
        number.isdecimal() and int(number) for number in numbers
    ):
        raise UserError(f"--set {change!r}: give the widths of an MLP's layers, such as relu_mlp:256,256")
    return encoder.clone(widths=tuple(map(int, numbers)))


def _range_of(name: str, kind: type) -> Range:
    """The numbers that a setting may have; algorithms look at what else they need."""
    if kind is int:
        return Range(0 if name in _ZERO_TOO else 1)
    if name == "learning_rate" or name.endswith("_learning_rate"):
        return Range(0, 1000)
    return Range(infinite=name in _UNBOUNDED)


def _parsed(value: Any, text: str, change: str) -> Any:
    if isinstance(value, bool):
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise UserError(f"--set {change!r}: give true or false")
    if isinstance(value, str):
        return text
    dtype = getattr(value, "dtype", None)
    kind = int if value is None or isinstance(value, int) else float  # such as max_steps
    try:
        number = kind(text)
    except ValueError as error:
        raise UserError(f"--set {change!r}: {text!r} is no {kind.__name__}") from error
    name = change.partition("=")[0].rpartition(".")[2]
    if number not in _range_of(name, kind):
        raise UserError(f"--set {change!r}: {text} is out of range: give {_range_of(name, kind)}")
    return number if dtype is None else jnp.asarray(number, dtype)
