"""Seconds until an update with LoRA, and sampling, are compiled: deep against shallow, scanned and unrolled.

    python tools/bench/bench_compile.py
    python tools/bench/bench_compile.py --layers 6 30 80 --width 256

What is timed is tracing, lowering and XLA together, without the compilation cache, after one compilation that
does not count. The last column is a whole command from its start to its end: `rlhf grpo` with LoRA for one
step, on a published checkpoint of that depth, with the layout that it is loaded with by default.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.table import Table

from rlhf_jax import models
from rlhf_jax.core.train_state import (
    OptimizerConfig,
    accumulate_gradients,
    apply_gradients,
    init_train_state,
    make_optimizer,
)
from rlhf_jax.core.trees import partition
from rlhf_jax.core.types import Sequences
from rlhf_jax.data.tokenizers import byte_tokenizer
from rlhf_jax.generation import generate
from rlhf_jax.models import adapters
from rlhf_jax.models.reconfiguring import UNROLLED


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compile.

    Attributes:
      layers: depths that are compared.
      width: of the decoder; it hardly matters.
      rank: of the LoRA on every linear layer.
      batch: rows.
      length: tokens of a row, half of them a prompt where answers are sampled.
      unrolled: compile unrolled layers as well.
    """

    layers: tuple[int, ...] = (6, 30)
    width: int = 64
    rank: int = 8
    batch: int = 4
    length: int = 32
    unrolled: bool = True


def model_config(options: Options, layers: int, scan: bool) -> models.ModelConfig:
    """A Llama of so many layers."""
    return models.dense_config(
        vocab_size=byte_tokenizer().vocab_size,
        width=options.width,
        num_layers=layers,
        num_heads=4,
        scan_layers=scan,
    )


def update_program(options: Options, config: models.ModelConfig) -> tuple[Callable, tuple[Any, ...]]:
    """An update of a policy gradient's cost: log-probs, their gradient by LoRA's leaves, clipping, AdamW."""
    tx, logprob_fn = make_optimizer(OptimizerConfig()), models.make_logprob_fn(config)

    def start() -> Any:
        params = models.init_params(config, jax.random.key(0))
        adapter = adapters.LoRA(options.rank, 16.0)
        tree = adapters.init_adapter(adapter, params, jax.random.key(1))
        trained, frozen = partition(tree, adapters.is_trained(adapter))
        return init_train_state(trained, tx, frozen)

    def update(state: Any, batch: Sequences) -> Any:
        def loss_fn(params: Any, part: Sequences) -> Any:
            return -jnp.mean(logprob_fn(params, part).logp), {}

        gradients, loss, _ = accumulate_gradients(loss_fn, state, batch)
        return apply_gradients(state, gradients, tx, learning_rate=1e-5, loss=loss)

    tokens: Any = jax.ShapeDtypeStruct((options.batch, options.length), jnp.int32)
    mask: Any = jax.ShapeDtypeStruct(tokens.shape, bool)
    return update, (jax.eval_shape(start), Sequences(tokens, tokens, tokens, mask))


def sampling_program(options: Options, config: models.ModelConfig) -> tuple[Callable, tuple[Any, ...]]:
    """Answers at temperature 1."""
    prefill, decode = models.make_decode_fns(config)
    half = options.length // 2

    def sample(params: Any, prompts: Any, mask: Any, key: Any) -> Any:
        return generate(prefill, decode, params, prompts, mask, key, max_new_tokens=half, eos_id=-1, pad_id=0)

    prompts = jax.ShapeDtypeStruct((options.batch, half), jnp.int32)
    params = jax.eval_shape(lambda: models.init_params(config, jax.random.key(0)))
    mask = jax.ShapeDtypeStruct(prompts.shape, bool)
    return sample, (params, prompts, mask, jax.eval_shape(lambda: jax.random.key(0)))


def seconds_to_compile(program: Callable, arguments: tuple[Any, ...]) -> float:
    """Of tracing, lowering and compiling."""
    start = time.perf_counter()
    jax.jit(program).lower(*arguments).compile()
    return time.perf_counter() - start


def seconds_of_command(options: Options, layers: int) -> float:
    """A whole `rlhf grpo` of one step, in a process of its own that compiles everything."""
    with tempfile.TemporaryDirectory() as folder:
        config = model_config(options, layers, False)
        params = models.init_params(config, jax.random.key(0))
        models.make_policy(config, params, byte_tokenizer()).save(f"{folder}/model")
        rows = [json.dumps({"prompt": f"{i} and"}) for i in range(options.batch)]
        Path(f"{folder}/rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
        numbers = {
            "--steps": 1,
            "--batch-size": 2,
            "--group-size": 2,
            "--max-new-tokens": options.length // 2,
        }
        flags = {"--model": f"{folder}/model", "--data": f"{folder}/rows.jsonl", "--out": f"{folder}/run"}
        flags |= {
            "--rewards": "rlhf_jax.rewards.rules:think_answer_reward",
            "--adapter.kind": "lora",
        } | numbers
        words = [str(word) for flag in flags.items() for word in flag]
        command = [sys.executable, "-m", "rlhf_jax", "grpo", *words, "--quiet", "--no-report"]
        cache = {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
        start = time.perf_counter()
        subprocess.run(command, check=True, env={**os.environ, **cache}, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start


def main() -> None:
    """Parses the command line and prints the table."""
    options = tyro.cli(Options, description=(__doc__ or "").split("\n\n")[0])
    jax.config.update("jax_enable_compilation_cache", False)
    table = Table("layers", "update + LoRA, s", "sampling, s", "rlhf grpo, 1 step, s")
    programs = (update_program, sampling_program)
    seconds_to_compile(*update_program(options, model_config(options, 1, True)))
    for scan in (True, False) if options.unrolled else (True,):
        for layers in options.layers:
            config = model_config(options, layers, scan)
            cells = [f"{seconds_to_compile(*program(options, config)):.1f}" for program in programs]
            by_default = scan == (layers > UNROLLED)
            cells.append(f"{seconds_of_command(options, layers):.1f}" if by_default else "")
            table.add_row(f"{layers} {'scanned' if scan else 'unrolled'}", *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
