"""Pruning: a policy whose linear layers have lost the weights that matter least, as a run to start from.

    rlhf prune --out runs/pruned --model runs/sft --data my.jsonl --method wanda --sparsity 0.5
    rlhf prune --out runs/halved --model runs/sft --data my.jsonl --pattern 2:4
    rlhf sft --out runs/tuned --model runs/pruned --data my.jsonl --adapter.preserve-sparsity --steps 100

Takes seconds. Wanda weighs each weight by what goes into it, which is measured on a few rows of `--data`.
Every stage with `--adapter.preserve-sparsity` trains the weights that are left alone;
`experiments/studies/pruning/pruning.py` draws score against sparsity.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import tyro

from rlhf_jax.checkpoint import CheckpointManager
from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.ranges import PositiveInt, Seed, ShareBelow1
from rlhf_jax.core.trees import tree_add
from rlhf_jax.core.types import Params, Sequences
from rlhf_jax.data import packing
from rlhf_jax.metrics import final_table
from rlhf_jax.models import Policy, pruning
from rlhf_jax.stages import option_checks, option_groups, sft
from rlhf_jax.training.loading import load
from rlhf_jax.training.run_folder import describe_run, write_model_files

ZEROS = "zeros.json"
"""Written last: what is pruned without it was stopped on the way."""
Method = Literal["wanda", "magnitude"]
_BATCH = 32  # rows measured at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneOptions:
    """Pruning criterion and amount.

    Attributes:
      method: wanda (weight times the norm of its input) or magnitude (weight alone).
      sparsity: share of the weights of linear layers that go.
      pattern: N:M to keep N of every M consecutive inputs of an output instead, such as 2:4.
      granularity: which weights compete: those of an output, of a layer, or all.
    """

    method: Method = "wanda"
    sparsity: ShareBelow1 = 0.5
    pattern: str = ""
    granularity: pruning.Granularity = "output"

    def masks(self, params: Params, square_sums: Params | None) -> Params:
        """True for the weights that stay.

        Args:
          square_sums: what `measure` found; None where the method asks for none.

        Raises:
          UserError: the numbers make no sense, or not for this model.
        """
        scores = (
            pruning.magnitude_scores(params)
            if square_sums is None
            else pruning.wanda_scores(params, square_sums)
        )
        if not self.pattern:
            return pruning.keep_masks(scores, sparsity=self.sparsity, granularity=self.granularity)
        numbers = self.pattern.split(":")
        if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
            raise UserError(f"--pattern {self.pattern!r} is not N:M: write it as 2:4")
        return pruning.keep_n_of_m(scores, n=int(numbers[0]), m=int(numbers[1]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Pruning options.

    Attributes:
      out: folder of the pruned policy.
      model: the policy: a run folder, a Hugging Face folder, a GGUF file or a name in the hub cache.
      data: rows to measure inputs on, as for SFT.
      rows: how many of them.
      seed: of the rows of the embedded task.
      quiet: print nothing.
    """

    out: Path
    model: str
    prune: tyro.conf.OmitArgPrefixes[PruneOptions] = PruneOptions()
    data: str = ""
    rows: PositiveInt = 128
    seed: Seed = 0
    quiet: bool = False


def measure(model: Policy, rows: Sequences) -> Params:
    """Sums of squared inputs over all rows, a batch at a time."""
    add = jax.jit(lambda params, part: pruning.input_square_sums(model.architecture, params, part))
    total = None
    for first in range(0, len(rows.tokens), _BATCH):
        part = packing.pad_batch(jax.tree.map(lambda x, i=first: x[i : i + _BATCH], rows), _BATCH)
        found = add(model.params, part)
        total = found if total is None else tree_add(total, found)
    return total


def calibration_rows(data: str, count: int, seed: int, model: Policy) -> Sequences:
    """Conversations to measure on."""
    run = option_groups.RunOptions(Path(), seed=seed)
    options = sft.Options(run=run, data=data, demonstrations=count, slip_rate=0, late_slip_rate=0)
    rows = sft.load_rows(options, held_out=False)[:count]
    return sft.lay_out(options, sft.make_examples(options, rows, model.tokenizer))


def check_out(out: files.Path) -> None:
    """Makes room for what a pruning that was stopped has left.

    Raises:
      UserError: the folder holds a finished pruning, or another run.
    """
    if CheckpointManager(out / "checkpoints").latest_step() is None:
        return
    held = files.read_json(out / "config.json", otherwise={})
    if held.get("stage") != "prune" or files.exists(out / ZEROS):
        raise UserError(f"{out} already holds a run: choose another --out")
    files.remove_tree(out / "checkpoints")


def run(options: Options) -> None:
    """Measures, prunes and writes a run folder."""
    option_checks.check_numbers(options)
    check_out(options.out)
    if options.prune.method == "wanda" and not options.data:
        raise UserError("--method wanda measures on conversations: give them with --data")
    model = load(options.model)
    sums = None
    if options.prune.method == "wanda":
        sums = measure(model, calibration_rows(options.data, options.rows, options.seed, model))
    params = pruning.apply_masks(model.params, options.prune.masks(model.params, sums))
    write_model_files(options.out, model, "policy")
    describe_run(options.out, option_checks.to_json(options), stage="prune")
    with CheckpointManager(options.out / "checkpoints") as manager:
        manager.save(0, {"learner": {"params": params}}, wait=True)
    shares = pruning.kernel_sparsity(params)
    files.write_json(options.out / ZEROS, shares)
    if not options.quiet:
        rows = [(name or "all linear layers", f"{share:.1%}") for name, share in shares.items()]
        final_table("pruned", ["kernel", "zeros"], rows)
        print(f"{options.out}: a run, for --model; train what is left with --adapter.preserve-sparsity")
