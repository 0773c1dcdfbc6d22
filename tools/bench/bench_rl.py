"""Environment steps per second of whole training runs, compile time apart, with ratios from one run.

    python tools/bench/bench_rl.py                          # about five minutes on two cores
    python tools/bench/bench_rl.py --rows ppo --seeds 1 16
    python tools/bench/bench_rl.py --seeds 2048 --steps 500000      # on an accelerator

`ppo`   PPO on CartPole-v1 (4 environments x 128 steps, 4 epochs, 4 mini-batches, tanh 64 x 2); several seeds
        side by side, to show how cost grows with their number.
`dqn`   DQN on CartPole-v1 (batches of 128, a training every 10 steps, ReLU 120 x 84): one agent and many,
        with the arithmetic of the trainings as a share of what one large matrix product reaches here; and
        a small one (batches of 16, ReLU 16), whose arithmetic is next to nothing.
`peer`  the same PPO by Stable-Baselines3 on the CPU, by an interpreter that has it:
        --peer-python ENVIRONMENT/bin/python
"""

import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro
from flax import linen as nn

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import make_optimizer
from rlhf_jax.distributed.runtime import choose_threads, compiler_options
from rlhf_jax.rl.algorithms import dqn, ppo
from rlhf_jax.rl.envs import environments
from rlhf_jax.rl.loops.replay import Batch
from rlhf_jax.rl.loops.runs import Run, run_updates
from rlhf_jax.rl.networks.networks import MLP

Row = Literal["ppo", "dqn", "peer"]


@dataclasses.dataclass(frozen=True)
class Bench:
    """What to run.

    Attributes:
      rows: which measurements.
      seeds: numbers of PPO runs side by side.
      agents: numbers of DQN agents side by side.
      steps: environment steps of each PPO run.
      dqn_steps: of each DQN agent.
      peer_steps: of the peer.
      peer_python: an interpreter with stable-baselines3, gymnasium and torch; None leaves the peer out.
      repeats: the least time counts.
    """

    rows: tuple[Row, ...] = ("ppo", "dqn", "peer")
    seeds: tuple[int, ...] = (1, 16, 256)
    agents: tuple[int, ...] = (1, 50)
    steps: int = 50_000
    dqn_steps: int = 20_000
    peer_steps: int = 20_000
    peer_python: str | None = None
    repeats: int = 2


def measure(run: Run, hyper: Any, count: int, repeats: int) -> tuple[float, float]:
    """(seconds to compile, environment steps per second) of `count` whole runs side by side."""

    def whole(key: jax.Array) -> Any:
        return run_updates(run, run.init(key, hyper), hyper, updates=run.updates)

    keys = jax.random.split(jax.random.key(0), count)
    began = time.perf_counter()
    program: Callable[[jax.Array], Any] = jax.jit(jax.vmap(whole)).lower(keys).compile(compiler_options())
    compile_seconds, least = time.perf_counter() - began, float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(program(keys))
        least = min(least, time.perf_counter() - began)
    return compile_seconds, count * run.updates * run.steps_per_update / least


PEER = """
import sys, time
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
model = PPO("MlpPolicy", make_vec_env("CartPole-v1", n_envs=4), learning_rate=2.5e-4, n_steps=128,
            batch_size=128, n_epochs=4, ent_coef=0.01, device="cpu")
model.learn(2048)  # warm
steps, least = int(sys.argv[1]), float("inf")
for _ in range(int(sys.argv[2])):
    began = time.perf_counter()
    model.learn(steps)
    least = min(least, time.perf_counter() - began)
print(steps / least)
"""


def measure_peer(python: str, steps: int, repeats: int) -> float:
    """Environment steps per second of Stable-Baselines3's PPO with the same settings.

    Raises:
      UserError: that interpreter cannot run it.
    """
    command = [python, "-W", "ignore", "-c", PEER, str(steps), str(repeats)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        last = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        raise UserError(
            f"{python} cannot run Stable-Baselines3 ({last}): give --peer-python one that has it"
        ) from error
    return float(done.stdout.split()[-1])


def training_flops(config: dqn.Config, env: environments.Environment) -> float:
    """Floating-point operations of one DQN training, by the compiler's count."""
    network, tx = dqn.make_network(config, env), make_optimizer(config.optimizer)
    update = dqn.make_update(config, dqn.network_fns(network), tx)
    rows = config.run.batch_size
    obs = jnp.zeros((rows, *env.obs_shape))
    ones = jnp.ones(rows)
    batch = Batch(obs, jnp.zeros(rows, jnp.int32), ones, ones, obs, ones)
    state = dqn.init(network.init(jax.random.key(0), obs)["params"], tx)
    cost: Any = jax.jit(update).lower(state, dqn.Hyper(), batch).compile().cost_analysis()
    return cost["flops"] * config.run.updates


def matmul_flops_per_second(size: int = 1024, repeats: int = 20) -> float:
    """What one large matrix product reaches."""
    square, product = jnp.ones((size, size)), jax.jit(jnp.matmul)
    least = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(product(square, square))
        least = min(least, time.perf_counter() - began)
    return 2 * size**3 / least


def show(name: str, count: int, compile_seconds: float | None, rate: float, first: float) -> None:
    """One row of the table."""
    compiled = "-" if compile_seconds is None else f"{compile_seconds:.1f}"
    print(f"| {name} | {count} | {compiled} | {rate:,.0f} | {rate / first:.1f}x |", flush=True)


def main(bench: Bench) -> None:
    """Prints one table; the last column compares with the first row of PPO, or of DQN."""
    choose_threads(side_by_side=True)
    env, env_params = environments.make("CartPole-v1")
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}\n")
    print("| run | side by side | compile (s) | env steps / s | against the first |\n|---|---|---|---|---|")
    first = None
    if "peer" in bench.rows and bench.peer_python:
        first = measure_peer(bench.peer_python, bench.peer_steps, bench.repeats)
        show("PPO, Stable-Baselines3", 1, None, first, first)
    if "ppo" in bench.rows:
        run = ppo.make_run(ppo.Config(total_steps=bench.steps), env, env_params)
        for count in bench.seeds:
            compile_seconds, rate = measure(run, ppo.default_hyper(), count, bench.repeats)
            first = first or rate
            show("PPO", count, compile_seconds, rate, first)
    if "dqn" in bench.rows:
        run_config = dqn.RunConfig(total_steps=bench.dqn_steps)
        config = dqn.Config(run=run_config)
        rates = compare_agents("DQN", config, bench, env, env_params)
        small = dataclasses.replace(run_config, batch_size=16)
        compare_agents(
            "small DQN", dqn.Config(run=small, encoder=MLP((16,), nn.relu)), bench, env, env_params
        )
        flops, peak = training_flops(config, env), matmul_flops_per_second()
        shares = (rate / run_config.steps_per_training * flops / peak for rate in rates)
        print(
            f"\nDQN: {flops / 1e6:.1f} MFLOP a training; a 1024 x 1024 product reaches {peak / 1e9:.0f} "
            f"GFLOP/s, of which the trainings of {bench.agents} agents take "
            f"{', '.join(f'{share:.0%}' for share in shares)}"
        )


def compare_agents(
    name: str, config: dqn.Config, bench: Bench, env: environments.Environment, env_params: Any
) -> list[float]:
    """A row for each number of agents, and their rates."""
    run = dqn.make_run(config, env, env_params)
    rates = []
    for count in bench.agents:
        compile_seconds, rate = measure(run, dqn.Hyper(), count, bench.repeats)
        rates.append(rate)
        show(name, count, compile_seconds, rate, rates[0])
    return rates


if __name__ == "__main__":
    try:
        main(tyro.cli(Bench, description=(__doc__ or "").split("\n\n")[0]))
    except UserError as error:
        sys.exit(f"error: {error}")
