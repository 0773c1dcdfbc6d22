"""What an accelerator does with this library, in one page and under nine minutes.

    bash tools/device_day.sh runs/device_day.md      # this, and whole runs side by side
    python tools/bench/device_day.py --sizes tiny    # the same on any machine, in a minute

`attention`  every way that applies here against the plain one, forward and backward: time, and the error of
             outputs and gradients beside that of the plain way in float32
`updates`    SFT and GRPO of full training: tokens a second, the share of the peak, and the most memory that
             was held beside what `rlhf plan` says of the same program
`decoding`   tokens a second, and the share of the memory's bandwidth that parameters and cache take

The page is written after every part, so that a run that is cut short leaves what it has measured.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro

from rlhf_jax import distributed, models
from rlhf_jax.cli.command_line import use_compile_cache
from rlhf_jax.distributed.accelerator_specs import Chip, chip_of
from rlhf_jax.models.attention.backends import AttentionContext, attend
from rlhf_jax.planning import compiled, steps

Row = list[str]
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 272, "width": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2},
    "135M": {"vocab_size": 49_152, "width": 576, "num_layers": 30, "num_heads": 9, "num_kv_heads": 3},
    "1B": {"vocab_size": 128_256, "width": 2048, "num_layers": 16, "num_heads": 32, "num_kv_heads": 8},
}
INTERMEDIATE = {"tiny": 64, "135M": 1536, "1B": 8192}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
      out: the page; empty for standard output alone.
      sizes: models, shapes of SmolLM2-135M and of Llama 3.2 1B among them.
      batch: rows of an update.
      length: tokens of a row.
      new_tokens: of an answer.
      repeats: times that each is measured after the first; the least counts.
      seconds: after which no other part begins.
    """

    out: str = ""
    sizes: tuple[Literal["tiny", "135M", "1B"], ...] = ("135M", "1B")
    batch: int = 8
    length: int = 1024
    new_tokens: int = 256
    repeats: int = 3
    seconds: float = 420.0


def least_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Of several calls, after one that compiles."""
    jax.block_until_ready(call())
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        found.append(time.perf_counter() - start)
    return min(found)


# Attention -------------------------------------------------------------------------------------------


def attention_rows(options: Options) -> Iterator[Row]:
    """Each way on rows without padding, in bfloat16."""
    batch, length, heads, width = options.batch, options.length, 8, 64
    keys = jax.random.split(jax.random.key(0), 4)
    exact = [jax.random.normal(key, (batch, length, heads, width)) for key in keys]
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    mask = positions[:, :, None] >= positions[:, None, :]
    ones = jnp.ones_like(positions)
    context = AttentionContext(positions, positions, mask, jnp.int32(0), ones, ones > 0)

    def make(backend: Any) -> Callable[..., Any]:
        def way(query: Any, key: Any, value: Any) -> Any:
            return attend(query, key, value, context, backend=backend, scale=width**-0.5)

        def value_and_pull(query: Any, key: Any, value: Any, gradient: Any) -> Any:
            outputs, pull = jax.vjp(way, query, key, value)
            return outputs, pull(gradient.astype(outputs.dtype))

        return jax.jit(value_and_pull)

    true = jax.tree.leaves(make("plain")(*exact))
    low = [x.astype(jnp.bfloat16) for x in exact]
    ways = {"gpu": ["plain", "blocked", "cudnn"], "tpu": ["plain", "blocked", "splash"]}
    plain = None
    for backend in ways.get(jax.default_backend(), ["plain", "blocked"]):
        function = make(backend)
        found = jax.tree.leaves(function(*low))
        apart = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a.astype(jnp.float32) - b))), found, true)
        seconds = least_seconds(lambda function=function: function(*low), options.repeats)
        plain = plain or seconds
        yield [
            backend,
            f"{1e3 * seconds:.2f}",
            f"{plain / seconds:.2f}",
            f"{apart[0]:.1e}",
            f"{max(apart[1:]):.1e}",
        ]


# Updates and decoding --------------------------------------------------------------------------------


def model_config(size: str) -> models.ModelConfig:
    """Float32 parameters, bfloat16 products, stacked layers."""
    shape = {**MODELS[size], "intermediate_size": INTERMEDIATE[size]}
    return models.dense_config(
        **shape, tie_word_embeddings=True, scan_layers=True, remat="full", compute_dtype="bfloat16"
    )


def filled(tree: Any) -> Any:
    """Arrays of these shapes: rows without padding, parameters of small random numbers."""

    def fill(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path)
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        if name.endswith("positions"):
            return jnp.broadcast_to(jnp.arange(leaf.shape[-1], dtype=leaf.dtype), leaf.shape)
        if jnp.issubdtype(leaf.dtype, jnp.floating) and ".params" in name:
            return 0.02 * jax.random.normal(jax.random.key(len(name)), leaf.shape, leaf.dtype)
        is_count = leaf.dtype == jnp.bool_ or leaf.ndim == 2
        return (jnp.ones if is_count else jnp.zeros)(leaf.shape, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, tree)


def workload(options: Options, algorithm: steps.Algorithm, size: str) -> steps.Workload:
    """One step of full training."""
    sizes = options.batch, options.length, options.new_tokens
    return steps.Workload(algorithm, model_config(size), *sizes, group_size=min(8, options.batch))


def most_held() -> float:
    """The most bytes that the first device has held; NaN where it does not say."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return float(stats.get("peak_bytes_in_use", "nan"))


def share(part: float, whole: float | None) -> str:
    """A share of what the device is sold for; empty where that is not known."""
    return f"{part / whole:.1%}" if whole else ""


def update_rows(options: Options, chip: Chip | None) -> Iterator[Row]:
    """From the smallest model to the largest, so that the most memory is that of the row."""
    mesh = distributed.make_mesh("")
    for size in options.sizes:
        for algorithm in ("sft", "grpo"):
            step = steps.workload_step(workload(options, algorithm, size))
            resident, programs = steps.build(step, mesh)
            program = programs["update"]
            said = compiled.predict(program, mesh)
            with jax.set_mesh(mesh):
                arguments = [filled(tree) for tree in program.arguments]
                function = jax.jit(program.function, donate_argnums=program.donated)
                held = [arguments[0]]

                def call(function: Any = function, held: Any = held, rest: Any = arguments[1:]) -> Any:
                    held[0], metrics = function(held[0], *rest)
                    return metrics

                del arguments
                seconds = least_seconds(call, options.repeats)
            planned = sum(resident.values()) + said.temporary_bytes + said.output_bytes
            yield [
                size,
                algorithm,
                f"{1e3 * seconds:.0f}",
                f"{options.batch * options.length / seconds:,.0f}",
                share(said.flops / seconds, chip and chip.peak_flops),
                f"{planned / 2**30:.2f}",
                f"{most_held() / 2**30:.2f}",
                f"{said.compile_seconds:.0f}",
            ]
            held.clear()


def decoding_rows(options: Options, chip: Chip | None) -> Iterator[Row]:
    """Sampling of a step of GRPO: groups share their prompts."""
    mesh = distributed.make_mesh("")
    for size in options.sizes:
        step = steps.workload_step(workload(options, "grpo", size))
        program = steps.build(step, mesh)[1]["generation"]
        with jax.set_mesh(mesh):
            arguments = [filled(tree) for tree in program.arguments]
            seconds = least_seconds(lambda f=jax.jit(program.function), a=arguments: f(*a), options.repeats)
        cache = steps.cache_bytes(step.generation, mesh)
        parameters = steps.device_bytes(program.arguments[0]) / 2  # held in float32, read in bfloat16
        least = options.new_tokens * (parameters + cache * (1 - options.new_tokens / options.length / 2))
        yield [
            size,
            f"{options.batch * options.new_tokens / seconds:,.0f}",
            share(least / seconds, chip and chip.memory_bandwidth),
        ]


# The page --------------------------------------------------------------------------------------------


def main() -> None:
    """Measures part after part, and writes the page."""
    options = tyro.cli(Options, description=(__doc__ or "").split("\n\n")[0])
    use_compile_cache()
    began, device = time.perf_counter(), jax.local_devices()[0]
    chip = chip_of(device.device_kind)
    rows = f"{options.batch} x {options.length:,}"
    lines = [
        "# Measured on a device",
        "",
        f"{time.strftime('%Y-%m-%d')}, {device.device_kind}, jax {jax.__version__}: rows of {rows} tokens, "
        f"{options.new_tokens} of them sampled. Least of {options.repeats}.",
    ]
    parts = {
        "Attention": (
            ["way", "ms", "plain / it", "error", "error of gradients"],
            attention_rows(options),
        ),
        "Updates": (
            ["model", "step", "ms", "tokens / s", "of peak", "GiB planned", "GiB held", "s to compile"],
            update_rows(options, chip),
        ),
        "Decoding": (["model", "tokens / s", "of bandwidth"], decoding_rows(options, chip)),
    }
    for title, (columns, measured) in parts.items():
        lines += ["", f"## {title}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        while time.perf_counter() - began < options.seconds and (row := next(measured, None)) is not None:
            lines.append(f"| {' | '.join(row)} |")
            if options.out:
                Path(options.out).write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
