"""Memory of attention by the compilers of TPUs and GPUs that are not there, as a Markdown table.

    python tools/tables/attention_table.py                          # v5e and H100, 8,192 tokens
    python tools/tables/attention_table.py --topologies h100:1 --length 16384

Of each kind of layer the gradient is compiled twice: as `auto` computes it, and plainly, which holds the
logits of every pair of tokens. cuDNN's attention needs a GPU at hand, so that `auto` takes blocks for GPUs
here, as it does on a GPU wherever cuDNN cannot serve.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhf_jax.cli import command_line
from rlhf_jax.core.axes import axis_rules
from rlhf_jax.core.ranges import Length
from rlhf_jax.models.attention.backends import attend
from rlhf_jax.models.config import AttentionBackend
from rlhf_jax.models.decoder import whole_context
from rlhf_jax.planning import compiled
from rlhf_jax.planning.steps import Program
from rlhf_jax.planning.topologies import topology_devices


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the table.

    Attributes:
      topologies: one device of each, as `rlhf plan --topology` takes them.
      length: tokens a row.
    """

    topologies: tuple[str, ...] = ("v5e:2x2", "h100:1")
    length: Length = 8192


@dataclasses.dataclass(frozen=True)
class Layer:
    """A kind of attention layer, of eight heads, in one row.

    Attributes:
      kv_heads: heads of keys and values.
      width: of queries and keys.
      value_width: of values.
      prompt: columns of a soft prompt.
    """

    kv_heads: int = 2
    width: int = 128
    value_width: int = 128
    dtype: str = "bfloat16"
    softcap: float | None = None
    window: int | None = None
    prompt: int = 0


HEADS = 8
LAYERS = {
    "grouped queries": Layer(),
    "float32": Layer(dtype="float32"),
    "window of 1,024": Layer(window=1024),
    "soft-cap": Layer(softcap=50.0),
    "latent (MLA)": Layer(kv_heads=HEADS, width=192),
    "soft prompt": Layer(prompt=32),
    "all of it": Layer(HEADS, 192, 128, "float32", 50.0, 1024, 32),
}


def program(layer: Layer, backend: AttentionBackend, length: int, mesh: Mesh) -> Program:
    """The gradient by queries, keys and values, segments being what the data say."""
    columns = length + layer.prompt
    shapes = (
        (length, HEADS, layer.width),
        (columns, layer.kv_heads, layer.width),
        (columns, layer.kv_heads, layer.value_width),
    )
    where = NamedSharding(mesh, PartitionSpec())
    heads = [jax.ShapeDtypeStruct((1, *shape), layer.dtype, sharding=where) for shape in shapes]
    row = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=where)

    def loss(query, key, value, positions, segment_ids):
        context = whole_context(positions, segment_ids)
        attended = attend(
            query,
            key,
            value,
            context.behind_prompt(layer.prompt) if layer.prompt else context,
            backend=backend,
            scale=layer.width**-0.5,
            softcap=layer.softcap,
            window=layer.window,
        )
        return jnp.sum(attended.astype(jnp.float32) ** 2)

    return Program(jax.grad(loss, argnums=(0, 1, 2)), (*heads, row, row))


def memory(layer: Layer, backend: AttentionBackend, length: int, topology: str) -> float:
    """Bytes that the compiled gradient needs beside what goes in and comes out."""
    mesh = Mesh(topology_devices(topology)[:1], ("data",))
    with axis_rules({}):
        return compiled.predict(program(layer, backend, length, mesh), mesh).temporary_bytes


def rows_of(options: Options) -> list[Sequence[str]]:
    """Rows of the table."""
    rows = []
    for topology in options.topologies:
        for name, layer in LAYERS.items():
            auto, plain = (memory(layer, way, options.length, topology) for way in ("auto", "plain"))
            cells = f"{auto / 2**20:,.0f}", f"{plain / 2**20:,.0f}", f"{auto / plain:.2f}"
            rows.append((topology, name, *cells))
    return rows


def run(options: Options) -> None:
    """Compiles, and prints the table."""
    jax.config.update("jax_platforms", "cpu")
    print("| device | layer | auto, MiB | plain, MiB | ratio |\n|---|---|---|---|---|")
    for row in rows_of(options):
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    command_line.run_command(run, Options, __doc__)
