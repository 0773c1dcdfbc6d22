"""Parameters, shapes, and the memory that training takes, without loading a single weight.

    python tools/inspect_model.py --model ~/Llama-3.1-8B                      # Hugging Face or run folder
    python tools/inspect_model.py --model runs/sft --batch 4 --length 4096 --devices 8

Parameters, gradients and optimizer state are exact. Activations are what the backward pass keeps of a
forward pass for each choice of `remat`, as JAX traces them on the plain attention path; what compilers save
by fusing, or need beside that, is not counted.
"""

import dataclasses
import functools
import json
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.table import Table

from rlhf_jax import models
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.optimization import OptimizerConfig, make_optimizer
from rlhf_jax.core.trees import named_leaves
from rlhf_jax.models import hf


@dataclasses.dataclass(frozen=True)
class Options:
    """What to inspect.

    Attributes:
      model: a Hugging Face folder (only config.json is read) or a run folder (only model.json).
      batch: rows in a micro-batch.
      length: tokens a row.
      devices: devices that share parameters and optimizer state evenly; rows are not shared.
      dtype: of parameters and computation.
    """

    model: Path
    batch: int = 1
    length: int = 2048
    devices: int = 1
    dtype: str = "bfloat16"


def read_config(options: Options) -> models.ModelConfig:
    """The architecture in the folder, its layers stacked: a deep model is traced as fast as a shallow one."""
    described = options.model / "model.json"
    if described.is_file():
        config = models.config_from_dict(json.loads(described.read_text(encoding="utf-8"))["config"])
    else:
        config = hf.load_config(options.model)
    return dataclasses.replace(
        config, param_dtype=options.dtype, compute_dtype=options.dtype, scan_layers=True
    )


def size(leaves: Iterable[Any]) -> int:
    """Bytes in all."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def activation_bytes(config: models.ModelConfig, params: Any, batch: int, length: int) -> int:
    """What the backward pass keeps, apart from parameters: what it keeps of twice the rows, less of once."""

    def kept(rows: int) -> int:
        tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)

        def residuals(params: Any, tokens: jax.Array) -> Any:
            positions, segments = jnp.zeros_like(tokens), jnp.ones_like(tokens)
            run = functools.partial(
                models.hidden_states, config, tokens=tokens, positions=positions, segment_ids=segments
            )
            return jax.vjp(run, params)[1]

        return size(jax.tree.leaves(jax.eval_shape(residuals, params, tokens)))

    return kept(2 * batch) - kept(batch)


def shape_table(params: Any) -> Table:
    """Every parameter, those of one block's kind side by side."""
    table = Table("parameter", "shape", "count", title="Parameters (layers stacked)")
    for name, leaf in named_leaves(params).items():
        table.add_row(
            re.sub(r"^layers/", "", name), "x".join(map(str, leaf.shape)), f"{math.prod(leaf.shape):,}"
        )
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    table.add_row("all", "", f"{total:,}", style="bold")
    return table


def memory_table(options: Options, config: models.ModelConfig, params: Any) -> Table:
    """Bytes on one device, a column for each choice of `remat`."""
    remats = get_args(models.Remat)
    state = jax.eval_shape(make_optimizer(OptimizerConfig()).init, params)
    fixed = {
        "parameters": size(jax.tree.leaves(params)) / options.devices,
        "gradients": size(jax.tree.leaves(params)) / options.devices,
        "AdamW's moments": size(jax.tree.leaves(state)) / options.devices,
    }
    kept = [
        activation_bytes(dataclasses.replace(config, remat=remat), params, options.batch, options.length)
        for remat in remats
    ]
    title = f"Training: {options.batch} x {options.length} tokens, {options.devices} device(s), GiB on each"
    table = Table("", *(f"remat={remat}" for remat in remats), title=title)
    for name, count in fixed.items():
        table.add_row(name, *[f"{count / 2**30:.2f}"] * len(remats))
    table.add_row("activations", *(f"{count / 2**30:.2f}" for count in kept))
    table.add_row("all", *(f"{(sum(fixed.values()) + count) / 2**30:.2f}" for count in kept), style="bold")
    return table


def main() -> None:
    """Parses the command line and prints the tables."""
    options = tyro.cli(Options, description=(__doc__ or "").split("\n\n")[0])
    try:
        config = read_config(options)
        params = jax.eval_shape(functools.partial(models.init_params, config), jax.random.key(0))
        console = Console()
        console.print(shape_table(params))
        console.print(memory_table(options, config, params))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
