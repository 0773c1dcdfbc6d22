"""Parameters, shapes, and the memory that training takes, without loading a single weight.

    rlhf inspect --model ~/Llama-3.1-8B                      # Hugging Face or run folder
    rlhf inspect --model runs/sft --batch 4 --length 4096 --devices 8 --rank 32
    rlhf inspect --model runs/sft --parameters --attention plain

Parameters, gradients and optimizer state are exact, for full training and for LoRA on every linear layer.
Activations are what the backward pass keeps of a forward pass for each choice of `remat`, as JAX traces them
(of attention: what flash kernels keep, unless `--attention plain`); what compilers save by fusing, or need
beside that, is not counted.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

from rlhf_jax import models
from rlhf_jax.core import files
from rlhf_jax.core.optimizers import OPTIMIZERS
from rlhf_jax.core.ranges import Length, PositiveInt, Width
from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer
from rlhf_jax.core.trees import named_leaves
from rlhf_jax.models import hf
from rlhf_jax.training.run_folder import read_architecture


@dataclasses.dataclass(frozen=True)
class Options:
    """Inspection options.

    Attributes:
      model: a Hugging Face folder (only config.json is read) or a run folder (only model.json).
      batch: rows in a micro-batch.
      length: tokens a row.
      devices: devices that share parameters and optimizer state evenly; rows are not shared.
      dtype: of parameters and computation.
      rank: of the LoRA that is compared with full training.
      attention: how attention is computed: in blocks, which keeps what flash kernels keep, or plain.
      parameters: show every parameter and its shape.
    """

    model: Path
    batch: PositiveInt = 1
    length: Length = 2048
    devices: PositiveInt = 1
    dtype: str = "bfloat16"
    rank: Width = 16
    attention: Literal["blocked", "plain"] = "blocked"
    parameters: bool = True


def read_config(options: Options) -> models.ModelConfig:
    """The architecture in the folder, its layers stacked: a deep model is traced as fast as a shallow one."""
    if files.is_file(options.model / "model.json"):
        config = read_architecture(options.model)
    else:
        config = hf.load_config(options.model)
    return dataclasses.replace(
        config,
        param_dtype=options.dtype,
        compute_dtype=options.dtype,
        scan_layers=True,
        attention_backend=options.attention,
    )


def size(leaves: Iterable[Any]) -> int:
    """Bytes in all."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def activation_bytes(config: models.ModelConfig, params: Any, batch: int, length: int) -> int:
    """Activation memory of the backward pass: what it keeps of twice the rows, less of once."""

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


def lora_params(params: Any, rank: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The two factors of every linear layer (Hu et al. 2021, eq. 3); experts and routers have none."""
    factors = {}
    for name, leaf in named_leaves(params).items():
        if name.endswith("/kernel") and "/router/" not in name:
            *stack, inputs, outputs = leaf.shape
            for factor, shape in (("a", (*stack, inputs, rank)), ("b", (*stack, rank, outputs))):
                factors[f"{name}/{factor}"] = jax.ShapeDtypeStruct(shape, leaf.dtype)
    return factors


def fixed_bytes(params: Any, trained: Any, tx: optax.GradientTransformation) -> tuple[int, int, int]:
    """Bytes of parameters, gradients and optimizer state; what is trained may be the parameters or beside."""
    extra = 0 if trained is params else size(jax.tree.leaves(trained))
    state = jax.eval_shape(tx.init, trained)
    gradients = size(jax.tree.leaves(trained))
    return size(jax.tree.leaves(params)) + extra, gradients, size(jax.tree.leaves(state))


def memory_table(options: Options, config: models.ModelConfig, params: Any) -> Table:
    """GiB on one device: a row for each adapter and optimizer, a total for each choice of `remat`."""
    remats = get_args(models.Remat)
    kept = [
        activation_bytes(dataclasses.replace(config, remat=remat), params, options.batch, options.length)
        for remat in remats
    ]
    title = (
        f"Training: {options.batch} x {options.length} tokens, {options.devices} device(s), GiB on each\n"
        "(the last columns: all together, for each choice of remat)"
    )
    parts = ("trained", "params", "grads", "state")
    table = Table("", "", *parts, *remats, title=title)
    row = ["activations", "", "", "", "", "", *(f"{count / 2**30:.2f}" for count in kept)]
    table.add_row(*row, end_section=True)
    adapters = {"full": params, f"LoRA {options.rank}": lora_params(params, options.rank)}
    for adapter, trained in adapters.items():
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trained))
        *_, last = OPTIMIZERS
        for name in OPTIMIZERS:
            tx = make_optimizer(OptimizerConfig(optimizer=name))
            fixed = [part / options.devices for part in fixed_bytes(params, trained, tx)]
            totals = [sum(fixed) + activations for activations in kept]
            cells = [f"{number / 2**30:.2f}" for number in (*fixed, *totals)]
            table.add_row(adapter, name, f"{count / 1e6:,.1f}M", *cells, end_section=name == last)
    return table


def run(options: Options) -> None:
    """Prints the tables."""
    config = read_config(options)
    params = models.param_shapes(config)
    console = Console()
    if options.parameters:
        console.print(shape_table(params))
    console.print(memory_table(options, config, params))
