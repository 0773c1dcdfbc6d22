"""Edges of a stage: compiled updates, the run folder's files, reports, and what is printed."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from rlhf_jax import distributed
from rlhf_jax.core import files
from rlhf_jax.core.axes import mesh_size
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.files import write_json
from rlhf_jax.core.train_state import frozen_parts, returning_trained, with_frozen_parts, without_frozen
from rlhf_jax.data.content_parts import refuse_images
from rlhf_jax.data.examples import PromptExample, SupervisedExample
from rlhf_jax.data.mixing import MixtureSampler
from rlhf_jax.data.pipeline import BatchSampler
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.metrics import Logger, make_loggers, write_report
from rlhf_jax.models import Policy
from rlhf_jax.rollout.packed_rows import Layout, layouts_of_batch
from rlhf_jax.stages.option_checks import differing_options, to_json
from rlhf_jax.stages.option_groups import RunOptions
from rlhf_jax.training.run_folder import Adaptation, Kind, describe_run, write_model_files

Batches = BatchSampler | MixtureSampler


def jit_update(update: Callable[..., Any], state: Any) -> Callable[..., Any]:
    """`update(state, ...) -> (state, metrics)`, compiled; the state is donated, and stays where it lives.

    What is frozen is neither donated nor returned: a policy that was given stays as it is.
    """
    shardings = distributed.shardings_of(without_frozen(state))
    compiled = jax.jit(returning_trained(update), donate_argnums=0, out_shardings=(shardings, None))

    def run(state: Any, *rest: Any) -> tuple[Any, Any]:
        frozen = frozen_parts(state)
        new, metrics = compiled(without_frozen(state), frozen, *rest)
        return with_frozen_parts(new, frozen), metrics

    return run


def make_lay_out_fn(
    packing: bool, model: Policy, prompts: Sequence[PromptExample] = (), *, sizes: Sequence[int]
) -> Callable[..., tuple[Layout, ...]]:
    """`lay_out(*rows)`: how the rows of a batch are packed to be scored; they are not without `--packing`.

    Args:
      prompts: that are answered in them.
      sizes: of the parts of a batch that are scored at once.

    Raises:
      UserError: rows of this model, of these prompts or on this mesh hold one sample each.
    """
    if not packing:
        return lambda *rows: ()
    if not model.takes_packed_rows:
        raise UserError(
            "--packing puts several samples in a row, and this model takes one alone: leave it out"
        )
    refuse_images(prompts, "--packing")
    if mesh_size("time") > 1:
        raise UserError("--packing: rows that --mesh sequence=N splits are not packed: leave one out")
    return lambda *rows: layouts_of_batch(rows, sizes)


def local_indices(sampler: Batches, step: int, repeat: int = 1) -> np.ndarray:
    """Indices of examples that this process brings to the batch of `step`, each of them `repeat` times."""
    indices = np.repeat(sampler.indices(step), repeat)
    return indices[distributed.local_rows(len(indices))]


def start(
    options: Any, run: RunOptions, stage: str, model: Policy, kind: Kind, adaptation: Adaptation | None = None
) -> None:
    """Writes what describes the run into its folder."""
    if not distributed.is_main_process():
        return
    write_model_files(run.out, model, kind, adaptation)
    drop_plan_of_another(options, run.out / PLAN)
    describe_run(run.out, to_json(options), stage=stage, parameters=_size(model))


def drop_plan_of_another(options: Any, path: Path) -> None:
    """Removes the plan that was made in this folder, where it is that of another computation."""
    if not files.is_file(path):
        return
    planned = files.read_json(path, keys=("options",), remedy="remove it")["options"]
    if differing_options(options, planned):
        files.remove_file(path)
        files.forget_digests(path.parent, path.name)


def loggers(options: Any, stage: str) -> list[Logger]:
    """Loggers that --log names, for the stage of a script whose options hold `run`."""
    run: RunOptions = options.run
    return make_loggers(run.log, run.out, stage=stage, config=to_json(options), resume=run.resume)


PLAN = "plan.json"
"""The plan of a run, in its folder."""
Left = Literal["policy", "reward_model", "process_reward", "other"]
"""What a stage leaves, and so what can be done with it."""
_NEXT: dict[Left, tuple[tuple[str, str], ...]] = {
    "policy": (
        ("Talk to it", 'rlhf generate --model {out} --prompt "..."'),
        ("Evaluate it", "rlhf benchmark --model {out} --out {out}/benchmark generate --data HELD_OUT"),
        ("Take it away", "rlhf convert --source {out} --out FOLDER"),
    ),
    "reward_model": (("Train against it", "rlhf ppo --model POLICY --data PROMPTS --reward-model {out}"),),
    "process_reward": (
        ("Train against it", "rlhf grpo --model POLICY --data PROMPTS --process-reward {out}"),
        ("Search with it", "rlhf search --model POLICY --data PROBLEMS --process-reward {out}"),
    ),
    "other": (),
}


def finish(run: RunOptions, samples: Sequence[Mapping[str, Any]] = (), kind: Left = "policy") -> None:
    """Writes the samples, where there are any, and the report, and says what can be done next."""
    if not distributed.is_main_process():
        return
    if samples:
        write_json(run.out / "samples.json", samples)
    lines = [(title, command.format(out=run.out)) for title, command in _NEXT[kind]]
    if run.report:
        lines.insert(0, ("Report", f"{write_report(run.out)} (open it in a browser)"))
    if not run.quiet:
        for title, words in lines:
            print(f"{title + ':':<18}{words}")


def _size(model: Policy) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(model.params))


def announce(options: RunOptions, model: Policy, data: str) -> None:
    """Says what is about to run."""
    if options.quiet or not distributed.is_main_process():
        return
    steps = "" if options.steps is None else f"; {options.steps:,} steps"  # rounds may know none
    print(f"{options.out}: {data}; a model of {_size(model):,} parameters{steps}")
    mesh = distributed.current_mesh()
    if mesh.size > 1:
        summary, whole = distributed.describe_shardings(mesh, model.params)
        print(f"Mesh: {distributed.describe_mesh(mesh)}; parameters of {summary}")
        for line in whole:
            print(f"  {line}: its size does not divide")


def show_sample(options: RunOptions, tokenizer: Tokenizer, example: SupervisedExample) -> None:
    """The first sample as the model sees it: ids beside tokens, those that count marked."""
    if not options.quiet and distributed.is_main_process():
        print(f"First sample ({example.where}); * marks the tokens that count:")
        print(tokenizer.table(example.ids[:40].tolist(), example.mask[:40].tolist()))
        if len(example.ids) > 40:
            print(f"    ... and {len(example.ids) - 40} more")
