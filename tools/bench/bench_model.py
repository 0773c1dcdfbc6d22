"""A training step and generation, against transformers on PyTorch and against Tunix, in turns in one run.

    python tools/bench/bench_model.py --transformers ~/torch/bin/python --tunix ~/tunix/bin/python
    python tools/bench/bench_model.py --preset 1b --dtype bfloat16 --batch 8 --length 2048 --prompts 1 16 64

A peer is named by the interpreter of its environment (see tools/bench/bench_peers.py); without one,
only our own times are printed. Every contestant does a step in turn, round after round; the median counts.
On a device whose peaks are known, or given, the share of them is printed: model FLOP/s while training (what
the matmuls need; nothing computed twice is counted), and memory traffic while decoding (parameters and cache
are read once for each new token).
"""

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro
from rich.progress import track

from rlhf_jax import models
from rlhf_jax.algorithms import sft
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer
from rlhf_jax.core.types import Sequences
from rlhf_jax.distributed.accelerator_specs import chip_of
from rlhf_jax.generation import generate

Task = Callable[[], float]

TINY = {"vocab_size": 1024, "width": 256, "num_layers": 4, "num_heads": 8, "intermediate_size": 688}
"""A Llama of 3.4M parameters."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
      tasks: what is timed.
      preset: the model: a Llama of 3.4M parameters, or one shaped like Llama 3.2 1B.
      dtype: of parameters and computation.
      batch: rows of a training step.
      length: tokens of each row.
      prompts: how many prompts are answered at once, one table row for each number.
      prompt_length: tokens of a prompt.
      new_tokens: tokens of an answer.
      remat: what our backward pass computes again.
      attention: how our attention is computed.
      scan: run the layers as a scan (compiles faster; slower on CPU).
      rounds: rounds, after one that does not count.
      transformers: interpreter of an environment with torch and transformers.
      tunix: interpreter of an environment with google-tunix.
      peak_tflops: of the device in `dtype`, where the table does not know it.
      bandwidth: of the device's memory in GB/s, where the table does not know it.
    """

    tasks: tuple[Literal["train", "generate"], ...] = ("train", "generate")
    preset: Literal["tiny", "1b"] = "tiny"
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch: int = 16
    length: int = 256
    prompts: tuple[int, ...] = (32,)
    prompt_length: int = 32
    new_tokens: int = 128
    remat: models.Remat = "none"
    attention: models.AttentionBackend = "auto"
    scan: bool = False
    rounds: int = 5
    transformers: Path | None = None
    tunix: Path | None = None
    peak_tflops: float | None = None
    bandwidth: float | None = None


def model_config(options: Options) -> models.ModelConfig:
    """The preset in our words."""
    chosen: dict[str, Any] = {
        "param_dtype": options.dtype,
        "compute_dtype": options.dtype,
        "remat": options.remat,
        "scan_layers": options.scan,
        "attention_backend": options.attention,
    }
    if options.preset == "1b":
        return models.preset_config("llama-1b", **chosen)
    return models.dense_config(**TINY, **chosen)


def sizes_of(config: models.ModelConfig) -> dict[str, Any]:
    """The architecture, as peers are told of it."""
    attention, feed_forward = config.pattern[0].attention, config.pattern[0].feed_forward
    assert isinstance(attention, models.Attention)
    assert isinstance(feed_forward, models.GatedFeedForward)
    return {
        "vocab_size": config.vocab_size,
        "width": config.width,
        "intermediate_size": feed_forward.intermediate_size,
        "num_layers": config.num_layers,
        "num_heads": attention.num_heads,
        "num_kv_heads": attention.num_kv_heads,
    }


# Ours ----------------------------------------------------------------------------------------------


def timed(function: Callable[[], object]) -> float:
    """Seconds until the result is there."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def our_training(options: Options) -> Task:
    """An update of `algorithms.sft`: loss, gradients, clipping, AdamW, the guard against NaN."""
    config = model_config(options)
    tx = make_optimizer(OptimizerConfig())
    params = jax.jit(models.init_params, static_argnums=0)(config, jax.random.key(0))
    state = sft.init(params, tx, jax.random.key(0))
    del params
    shape = (options.batch, options.length)
    tokens = jax.random.randint(jax.random.key(1), shape, 1, config.vocab_size)
    positions = jnp.broadcast_to(jnp.arange(shape[1]), shape)
    batch = Sequences(tokens, positions, jnp.ones(shape, jnp.int32), positions > 0)
    update = jax.jit(sft.make_update(sft.Config(), models.make_logprob_fn(config), tx), donate_argnums=0)

    def step() -> float:
        nonlocal state
        start = time.perf_counter()
        state, metrics = update(state, sft.Hyper(1e-4), batch)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - start

    return step


def our_generation(options: Options, prompts: int) -> Task:
    """Sampling at temperature 1 with the log-prob of each token."""
    config = model_config(options)
    params = jax.jit(models.init_params, static_argnums=0)(config, jax.random.key(0))
    shape = (prompts, options.prompt_length)
    questions = jax.random.randint(jax.random.key(1), shape, 1, config.vocab_size)
    prefill, decode = models.make_decode_fns(config)

    @jax.jit
    def answer(params, questions):
        return generate(
            prefill,
            decode,
            params,
            questions,
            jnp.ones(shape, bool),
            jax.random.key(2),
            max_new_tokens=options.new_tokens,
            eos_id=-1,
            pad_id=0,
        )

    return lambda: timed(lambda: answer(params, questions))


# Peers ---------------------------------------------------------------------------------------------


class Peer:
    """A process that runs a peer's tasks on demand."""

    def __init__(self, name: str, interpreter: Path, options: Options, prompts: int) -> None:
        """Starts it and waits until its model is made.

        Raises:
          UserError: it does not start.
        """
        sizes = {**sizes_of(model_config(options)), "prompts": prompts}
        for field in ("dtype", "batch", "length", "prompt_length", "new_tokens"):
            sizes[field] = getattr(options, field)
        script = Path(__file__).with_name("bench_peers.py")
        command = [str(interpreter), str(script), name, json.dumps(sizes)]
        self.complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process)
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.complaints, text=True
            )
        except OSError as error:
            raise UserError(f"--{name} {interpreter}: cannot be run ({error.strerror})") from error
        self.name = name
        self.tasks = self._answer().split()[1:]

    def run(self, task: str) -> float:
        """Seconds of one run."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{task}\n")
        self.process.stdin.flush()
        return float(self._answer())

    def stop(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()
        self.complaints.close()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.complaints.seek(0)
            last = " ".join(self.complaints.read().strip().splitlines()[-1:])
            raise UserError(f"--{self.name}: the peer broke off ({last}); mend its environment")
        return line


def take_turns(tasks: dict[str, Task], rounds: int) -> dict[str, float]:
    """Median seconds of each task."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for round_ in track(range(rounds + 1), description=" / ".join(tasks), transient=True):
        for name, task in tasks.items():
            seconds = task()
            if round_ > 0:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def compare(task: str, ours: Task, options: Options, prompts: int) -> dict[str, float]:
    """Median seconds of ours and of every peer that can do the task."""
    interpreters = {"transformers": options.transformers, "tunix": options.tunix}
    peers = [Peer(name, path, options, prompts) for name, path in interpreters.items() if path is not None]
    try:
        able = {peer.name: lambda peer=peer: peer.run(task) for peer in peers if task in peer.tasks}
        return take_turns({"ours": ours, **able}, options.rounds)
    finally:
        for peer in peers:
            peer.stop()


# Tables --------------------------------------------------------------------------------------------


def peaks(options: Options) -> tuple[float | None, float | None]:
    """FLOP/s and bytes/s of the device."""
    kind = jax.devices()[0].device_kind
    chip = chip_of(kind)
    flops = 1e12 * options.peak_tflops if options.peak_tflops else chip and chip.peak_flops
    bandwidth = 1e9 * options.bandwidth if options.bandwidth else chip and chip.memory_bandwidth
    return flops, bandwidth


def decoding_bytes(config: models.ModelConfig, parameters: int, options: Options, prompts: int) -> float:
    """Read for one new token of every row: the parameters, and the cache as it is half-way."""
    attention = config.pattern[0].attention
    assert isinstance(attention, models.Attention)
    columns = prompts * (options.prompt_length + options.new_tokens / 2)
    cache = 2 * config.num_layers * attention.num_kv_heads * attention.head_dim * columns
    return (parameters + cache) * jnp.dtype(options.dtype).itemsize


def print_rows(what: str, tokens: int, times: dict[str, float], share: float | None) -> None:
    """One row a contestant; `share` of the device's peak is that of ours."""
    for name, seconds in times.items():
        ratio = seconds / times["ours"]
        shown = "-" if share is None else f"{share / ratio:.1%}"
        row = f"| {what} | {name} | {1e3 * seconds:.0f} | {tokens / seconds:,.0f} | {ratio:.2f} | {shown} |"
        print(row, flush=True)


def measure(options: Options) -> None:
    """Runs everything and prints a Markdown table, row by row."""
    config = model_config(options)
    shapes = jax.eval_shape(lambda: models.init_params(config, jax.random.key(0)))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    flops, bandwidth = peaks(options)
    print(f"{parameters / 1e6:.2f}M parameters, {options.dtype}, {jax.devices()[0].device_kind}\n")
    print("| | | ms | tokens/s | ours is faster by | share of peak |\n|---|---|---|---|---|---|", flush=True)
    if "train" in options.tasks:
        times = compare("train", our_training(options), options, options.prompts[0])
        needed = models.training_flops(config, rows=options.batch, length=options.length)
        share = needed / times["ours"] / flops if flops else None
        what = f"train {options.batch} x {options.length}"
        print_rows(what, options.batch * options.length, times, share)
    for prompts in options.prompts if "generate" in options.tasks else ():
        times = compare("generate", our_generation(options, prompts), options, prompts)
        needed = decoding_bytes(config, parameters, options, prompts) * options.new_tokens
        share = needed / times["ours"] / bandwidth if bandwidth else None
        what = f"generate {prompts} x {options.prompt_length} + {options.new_tokens}"
        print_rows(what, prompts * options.new_tokens, times, share)


def main() -> None:
    """Parses the command line, measures and prints the table."""
    options = tyro.cli(Options, description=(__doc__ or "").split("\n\n")[0])
    try:
        measure(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
