"""Plans of runs (`--plan`): the step of a stage by its very options, compiled instead of run.

A stage's `plan` prepares the run with a policy of shapes, and hands over a `planning.steps.Step` that is made
of what its `run` compiles. The devices need not be there.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from rlhf_jax.core import files
from rlhf_jax.core.types import Params
from rlhf_jax.distributed.accelerator_specs import chip_of
from rlhf_jax.models import Policy
from rlhf_jax.planning import compiled
from rlhf_jax.planning.steps import Generation, Scorer, Step
from rlhf_jax.stages.edges import PLAN
from rlhf_jax.stages.option_groups import ProcessOptions
from rlhf_jax.stages.plan import mesh_of
from rlhf_jax.stages.plan_tables import show, to_json
from rlhf_jax.stages.session import Session
from rlhf_jax.training.run_folder import load_reward_model


def show_plan(options: Any, planned_step: Callable[[Any], tuple[Session, Step]]) -> None:
    """Compiles the step for the devices of `--plan`, prints what it needs, and keeps it in the run folder.

    Args:
      options: of the stage; their devices are looked at before anything is read.
      planned_step: makes the run and its step in shapes of them.
    """
    mesh = mesh_of(options.run.mesh, options.run.planned_topology, "--plan")
    session, step = planned_step(options)
    run = session.run
    plan, chip = compiled.make_plan(step, mesh), chip_of(mesh.devices.flat[0].device_kind)
    files.write_json(run.out / PLAN, to_json(session.options, plan, mesh, chip))
    rows, length = next(leaf.shape for leaf in jax.tree.leaves(step.rows) if leaf.ndim == 2)
    name = session.options.model or "a new model"
    show(f"{name}, {session.stage}: {rows:,} rows x {length:,} tokens a step", plan, mesh, chip)


def reward_scorers(folders: Sequence[Path]) -> dict[str, Scorer]:
    """Reward models of these run folders."""
    models = [load_reward_model(folder, shapes_only=True) for folder in folders]
    names = [f"reward model {number}" for number in range(1, len(models) + 1)]
    names = names if len(models) > 1 else ["reward model"]
    return {
        name: Scorer(model.body.make_reward_fn(), model.params)
        for name, model in zip(names, models, strict=False)
    }


def process_scorers(options: ProcessOptions) -> dict[str, Scorer]:
    """The process reward model, where there is one."""
    if not options.process_reward:
        return {}
    model = load_reward_model(Path(options.process_reward), shapes_only=True)
    return {"process reward model": Scorer(model.body.make_process_reward_fn(), model.params)}


def local_generation(
    engine: str,
    policy: Policy,
    params: Params,
    *,
    rows: int,
    prompt_length: int,
    new_tokens: int,
    group_size: int = 1,
    max_num_seqs: int = 0,
) -> Generation | None:
    """Sampling in this process; None where a server samples."""
    if engine != "local":
        return None
    return Generation(policy, params, rows, prompt_length, new_tokens, group_size, max_num_seqs or None)
