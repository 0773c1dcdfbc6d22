"""What each layout sends in one step of SFT: the compiled program against the formula on paper.

    python tools/tables/comm_table.py

A step is compiled, not run, for 8 CPU devices; every collective of the program is counted, loops included
(`rlhf_jax.planning.hlo_collectives`). Bytes are what one device receives by the ring algorithms' count:
(n-1)/n of a gathered array, twice that of a reduced one. The formulas leave out scalars and [tokens]-sized
sums. P: bytes of the parameters, E: of the experts, H: of the residual stream of the whole batch, L: layers,
n: devices, s: (n-1)/n.
"""

import dataclasses
import os
import sys

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

import jax
import tyro

from rlhf_jax import distributed, models
from rlhf_jax.models.config import GatedFeedForward, MixtureOfExperts
from rlhf_jax.planning import compiled, steps

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the table.

    Attributes:
      meshes: layouts, as after `--mesh`, of one axis each.
      width: of the residual stream.
      layers: number of blocks.
      vocab: tokens.
      rows: of a batch.
      length: tokens a row.
    """

    meshes: tuple[str, ...] = ("data=8", "fsdp=8", "tensor=4", "sequence=4", "expert=4")
    width: int = 64
    layers: int = 4
    vocab: int = 512
    rows: int = 16
    length: int = 128


def model_config(options: Options, *, experts: bool) -> models.ModelConfig:
    """A dense decoder, or one whose feed-forwards are four experts of which two are chosen."""
    config = models.dense_config(
        vocab_size=options.vocab,
        width=options.width,
        num_layers=options.layers,
        num_heads=4,
        intermediate_size=4 * options.width,
        scan_layers=True,
    )
    if not experts:
        return config
    [block] = config.pattern
    mixture = MixtureOfExperts(4, 2, GatedFeedForward(2 * options.width))
    return dataclasses.replace(config, pattern=(dataclasses.replace(block, feed_forward=mixture),))


def sent(options: Options, mesh: str, config: models.ModelConfig) -> dict[str, float]:
    """Bytes that a device receives in one compiled step, by kind."""
    step = steps.Workload("sft", config, options.rows, options.length)
    entered = distributed.make_mesh(mesh)
    found = compiled.predict(steps.build(steps.workload_step(step), entered)[1]["update"], entered)
    for line in found.complaints:
        print(f"warning, {mesh}: {line}", file=sys.stderr)
    return {kind: found.collectives.get(kind, (0, 0.0))[1] for kind in KINDS}


def formula(options: Options, mesh: str, config: models.ModelConfig) -> tuple[str, float]:
    """Bytes a device receives, on paper, for a mesh of one axis."""
    axis, _, size = mesh.partition("=")
    count = int(size)
    share = (count - 1) / count
    shapes = jax.eval_shape(lambda key: models.init_params(config, key), jax.random.key(0))
    params = sum(leaf.size for leaf in jax.tree.leaves(shapes)) * 4
    hidden = options.rows * options.length * options.width * 4
    match axis:
        case "data":
            return "2 s P", 2 * share * params
        case "fsdp":  # gathered forward and backward; on CPU a gradient is reduced whole, then cut
            return "2 s P + 2 s P", 4 * share * params
        case "tensor":  # two sums a layer forward; backward one behind each of q, k, v, gate and up, which
            # this compiler does not add first; into the embedding and out of the logits
            return "2 s H (7 L + 2)", 2 * share * hidden * (7 * options.layers + 2)
        case "sequence":  # keys and values: n-1 passes forward; those and their gradients: n passes back
            passes = 2 * (count - 1) + 4 * count
            return (
                "2 s P + L H (2 (n-1) + 4 n) / n",
                2 * share * params + options.layers * passes * hidden / count,
            )
        case _:  # tokens to their experts and sums back, each way; experts' own gradients stay
            experts = sum(x.size for x in jax.tree.leaves(shapes["layers"]["feed_forward"])) * 4
            each_way = 2 * share * hidden
            return "2 s (P - E) + 4 s H L", 2 * share * (params - experts) + 2 * options.layers * each_way


def main(options: Options) -> None:
    """Prints the table."""
    print("| mesh | " + " | ".join(KINDS) + " | in all, KiB | on paper, KiB | ratio | formula |")
    print("|---|" + "---|" * (len(KINDS) + 4))
    for mesh in options.meshes:
        config = model_config(options, experts=mesh.startswith("expert"))
        found = sent(options, mesh, config)
        words, expected = formula(options, mesh, config)
        total = sum(found.values())
        cells = [f"{number / 1024:,.0f}" for number in (*found.values(), total, expected)]
        print(f"| {mesh} | {' | '.join(cells)} | {total / expected:.2f} | {words} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=(__doc__ or "").split("\n\n")[0]))
