"""Whole runs of a language model side by side in one program, against one after the other.

    python tools/bench/bench_whole_runs.py                           # some three minutes on one core
    python tools/bench/bench_whole_runs.py --counts 1 2 4 8 16 32 64     # on an accelerator

A run is GRPO on the style task: sampling, rewards, advantages, update and evaluation. The last column says
how many times as many tokens a second are sampled as by the first count, compile time apart.
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from rlhf_jax import models
from rlhf_jax.algorithms import grpo_variants
from rlhf_jax.core.train_state import OptimizerConfig
from rlhf_jax.distributed.runtime import choose_threads, compiler_options
from rlhf_jax.jitted.algorithms import grpo_algorithm
from rlhf_jax.jitted.train import SeedState, TaskSetup, make_train
from rlhf_jax.tasks.style import style_task


@dataclasses.dataclass(frozen=True)
class Bench:
    """What to run.

    Attributes:
      counts: numbers of runs side by side.
      steps: of each run, 64 answers a step.
      width: of the model, two layers.
      repeats: the least time counts.
    """

    counts: tuple[int, ...] = (1, 2, 4, 8, 16)
    steps: int = 20
    width: int = 32
    repeats: int = 2


def make_task_setup(width: int) -> TaskSetup:
    """The style task with its model."""
    task = style_task(demonstrations=64)
    config = models.dense_config(
        vocab_size=task.tokenizer.vocab_size,
        width=width,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        tie_word_embeddings=True,
    )
    policy = models.make_policy(config, None, task.tokenizer)
    return TaskSetup(task, policy, num_prompts=16, num_samples=4)


def measure(task_setup: TaskSetup, count: int, bench: Bench) -> tuple[float, float, float]:
    """(seconds to compile, seconds of all runs together, tokens they sampled)."""
    member = grpo_variants.grpo(group_size=task_setup.num_samples)
    train = make_train(task_setup, grpo_algorithm(task_setup, member, OptimizerConfig()), steps=bench.steps)
    hyper = jax.tree.map(jnp.float32, member.hyper)

    def start(key: jax.Array) -> SeedState:
        return SeedState(key, models.init_params(task_setup.policy.architecture, key))

    starts = jax.vmap(start)(jax.random.split(jax.random.key(0), count))
    runs: Any = jax.jit(jax.vmap(train, (0, None)))
    began = time.perf_counter()
    program = runs.lower(starts, hyper).compile(compiler_options())
    compile_seconds, least, tokens = time.perf_counter() - began, float("inf"), 0.0
    for _ in range(bench.repeats):
        began = time.perf_counter()
        _, history = jax.block_until_ready(program(starts, hyper))
        least = min(least, time.perf_counter() - began)
        tokens = float(jnp.sum(history["generated"]))
    return compile_seconds, least, tokens


def main(bench: Bench) -> None:
    """Prints one table."""
    choose_threads(side_by_side=True)
    task_setup, first = make_task_setup(bench.width), None
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}\n")
    print("| runs | compile (s) | all runs (s) | sampled tokens / s | against the first |")
    print("|---|---|---|---|---|")
    for count in bench.counts:
        compile_seconds, seconds, tokens = measure(task_setup, count, bench)
        rate = tokens / seconds
        first = first or rate
        print(
            f"| {count} | {compile_seconds:.1f} | {seconds:.1f} | {rate:,.0f} | {rate / first:.1f}x |",
            flush=True,
        )


if __name__ == "__main__":
    main(tyro.cli(Bench, description=(__doc__ or "").split("\n\n")[0]))
