"""Memory against time of a gradient for every choice of `remat`, as a Markdown table.

    python tools/tables/remat_table.py                  # a small decoder that a CPU runs in seconds
    python tools/tables/remat_table.py --width 2048 --layers 16 --heads 32 --kv-heads 8 --vocab 128256 \\
        --length 4096 --dtype bfloat16

Memory is what the compiled program needs beside its inputs and outputs (JAX's memory analysis), that is,
activations and whatever else the compiler keeps; time is the median of runs in which the choices take turns.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import tyro
from rich.progress import track

from rlhf_jax import models
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import Sequences


@dataclasses.dataclass(frozen=True)
class Options:
    """The model, its batch, and how often to run.

    Attributes:
      width: of the residual stream.
      layers: blocks.
      heads: query heads.
      kv_heads: key-value heads.
      vocab: tokens of the vocabulary.
      batch: rows.
      length: tokens a row.
      dtype: of parameters and computation.
      attention: how attention is computed.
      scan: run the layers as a scan (unrolled, XLA's CPU compiler computes again too early to save memory).
      rounds: runs that count; 0 compiles only.
    """

    width: int = 256
    layers: int = 8
    heads: int = 8
    kv_heads: int = 8
    vocab: int = 1024
    batch: int = 8
    length: int = 512
    dtype: str = "float32"
    attention: models.AttentionBackend = "auto"
    scan: bool = True
    rounds: int = 3


def gradient_of(options: Options, remat: models.Remat) -> tuple[Callable[..., Any], tuple[Any, Any]]:
    """The gradient of a mean log-prob, and the shapes of its arguments."""
    config = models.dense_config(
        vocab_size=options.vocab,
        width=options.width,
        num_layers=options.layers,
        num_heads=options.heads,
        num_kv_heads=options.kv_heads,
        param_dtype=options.dtype,
        compute_dtype=options.dtype,
        attention_backend=options.attention,
        scan_layers=options.scan,
        remat=remat,
    )
    score = models.make_logprob_fn(config)

    def gradient(params: Any, tokens: jax.Array) -> Any:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        rows = Sequences(tokens, positions, jnp.ones_like(tokens), positions > 0)
        return jax.grad(lambda params: -jnp.mean(score(params, rows).logp))(params)

    params = jax.eval_shape(lambda: models.init_params(config, jax.random.key(0)))
    return gradient, (params, jax.ShapeDtypeStruct((options.batch, options.length), jnp.int32))


def filled(shapes: Any) -> Any:
    """Arrays of these shapes: small random parameters, token 1 everywhere."""
    params, tokens = shapes
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(params))))
    arrays = jax.tree.map(lambda leaf: 0.02 * jax.random.normal(next(keys), leaf.shape, leaf.dtype), params)
    return arrays, jnp.ones(tokens.shape, tokens.dtype)


def measure(options: Options) -> list[tuple[str, float, float]]:
    """(remat, MiB, seconds) of each choice."""
    remats = get_args(models.Remat)
    programs, memory = {}, {}
    for remat in track(remats, description="compiling", transient=True):
        gradient, shapes = gradient_of(options, remat)
        programs[remat] = jax.jit(gradient).lower(*shapes).compile()
        analysis = programs[remat].memory_analysis()
        memory[remat] = analysis.temp_size_in_bytes / 2**20 if analysis else float("nan")
    times: dict[str, list[float]] = {remat: [] for remat in remats}
    arguments = filled(gradient_of(options, "none")[1]) if options.rounds else ()
    for round_ in track(range(options.rounds + 1 if arguments else 0), description="running", transient=True):
        for remat, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            if round_ > 0:
                times[remat].append(time.perf_counter() - start)
    return [
        (remat, memory[remat], statistics.median(times[remat]) if times[remat] else float("nan"))
        for remat in remats
    ]


def main() -> None:
    """Parses the command line and prints the table."""
    options = tyro.cli(Options, description=(__doc__ or "").split("\n\n")[0])
    try:
        rows = measure(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    _, most, least = rows[0]
    print("| remat | memory, MiB | of none | time, ms | of none |\n|---|---|---|---|---|")
    for remat, memory, seconds in rows:
        print(
            f"| {remat} | {memory:.0f} | {memory / most:.2f} | {1e3 * seconds:.0f} | {seconds / least:.2f} |"
        )


if __name__ == "__main__":
    main()
