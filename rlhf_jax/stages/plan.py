"""Will it fit, and how fast can it be at best? The real update and generation, compiled ahead of time.

    rlhf plan --model llama-8b --algo grpo --mesh fsdp=64 --topology v5e:8x8 --batch 64
    rlhf plan --model ~/Llama-3.1-8B --algo sft --mesh fsdp=8 --batch 16    # for the devices here
    rlhf plan --model llama-8b --algo grpo --mesh fsdp=8 --topology h100:8 --batch 64
    rlhf plan --model llama-8b --algo dpo --mesh fsdp=8 --chip h100 --batch 64    # on paper

With --topology the compiler of TPUs or of NVIDIA GPUs (pip install 'rlhf_jax[tpu-plan]' or
'rlhf_jax[gpu-plan]', Linux) compiles for devices that are not there; without it the program is compiled for
the devices at hand; with --chip nothing is compiled, and memory and traffic are counted on paper
(`planning.analytic`). No weight is read or made. cuDNN's attention needs a GPU at hand: plans for GPUs have
attention in blocks, which takes more memory and time.

The step is that of full training with default settings; the training commands plan their own by `--plan`.

Everything printed is predicted, not measured. A plan that does not fit is an answer and no error: the status
is 0, and scripts read "fits" in the JSON.
"""

import dataclasses
import json
from pathlib import Path
from typing import Literal, get_args

import jax

from rlhf_jax import distributed, models
from rlhf_jax.core import files
from rlhf_jax.core.axes import GATHERED_SAMPLING, axis_rules
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.ranges import Length, PositiveInt
from rlhf_jax.distributed.accelerator_specs import CHIPS, Chip, chip_of
from rlhf_jax.models.loading import kind_of_checkpoint, load_architecture, local_checkpoint
from rlhf_jax.planning import compiled, steps
from rlhf_jax.planning.analytic import analytic_plan
from rlhf_jax.planning.topologies import topology_devices
from rlhf_jax.stages import option_checks
from rlhf_jax.stages.plan_tables import Mesh, show, to_json
from rlhf_jax.training.run_folder import read_architecture

DType = Literal["float32", "bfloat16"]
ChipName = Literal["v4", "v5e", "v5p", "v6e", "tpu7x", "a100", "h100", "h200", "b200", "gb200"]


@dataclasses.dataclass(frozen=True)
class Options:
    """Planning options.

    Attributes:
      model: llama-1b, llama-8b, llama-70b (shapes of Llama 3), or a run folder, a Hugging Face folder, a GGUF
        file or a name in the hub cache, of which only the description is read.
      algo: whose step.
      mesh: as in the scripts: fsdp=64, or data=2,fsdp=8,tensor=4.
      topology: the slice of TPUs, its shape in chips: v5e:8x8, v5p:4x4x4; or NVIDIA GPUs and how many:
        h100:8, h200:64, b200:8; empty for the devices here.
      chip: make the plan by formula, for this kind of chip, and compile nothing: what memory is needed at
        least, and about what work; None compiles.
      batch: rows a step: conversations of SFT, pairs of DPO, answers of GRPO and PPO.
      length: tokens a row; of GRPO and PPO, prompt and answer together.
      new_tokens: of an answer, where answers are sampled.
      group_size: answers to each prompt of GRPO.
      micro_batches: parts in which a mini-batch is computed.
      num_minibatches: optimizer steps of GRPO and PPO in each pass over a batch.
      num_ppo_epochs: passes of GRPO and PPO over each batch.
      all_gather_params: sample with parameters made whole along fsdp once a batch of answers, as the scripts
        do with --all-gather-params.
      remat: what the backward pass computes again.
      param_dtype: of parameters and of the optimizer's moments.
      compute_dtype: of matrix products and activations.
      json: write the plan as JSON to this file; - for standard output, and nothing else.
      hlo: write the compiled programs' texts into this folder.
    """

    model: str = "llama-1b"
    algo: steps.Algorithm = "sft"
    mesh: str = "auto"
    topology: str = ""
    chip: ChipName | None = None
    batch: PositiveInt = 64
    length: Length = 2048
    new_tokens: Length = 512
    group_size: PositiveInt = 8
    micro_batches: PositiveInt = 1
    num_minibatches: PositiveInt = 1
    num_ppo_epochs: PositiveInt = 1
    all_gather_params: bool = False
    remat: models.Remat = "full"
    param_dtype: DType = "float32"
    compute_dtype: DType = "bfloat16"
    json: str = ""
    hlo: str = ""


def read_config(options: Options) -> models.ModelConfig:
    """The architecture, its layers stacked: a deep model compiles as fast as a shallow one.

    Raises:
      UserError: there is no such preset, folder, file or name.
    """
    chosen = {
        "param_dtype": options.param_dtype,
        "compute_dtype": options.compute_dtype,
        "remat": options.remat,
        "scan_layers": True,
    }
    if options.model in get_args(models.Preset):
        return models.preset_config(options.model, **chosen)  # pyright: ignore[reportArgumentType]
    if files.is_remote(options.model):  # a run folder, which alone may be in an object store
        return dataclasses.replace(read_architecture(files.as_path(options.model)), **chosen)
    try:
        place = local_checkpoint(options.model)
    except UserError as error:
        presets = ", ".join(get_args(models.Preset))
        raise UserError(f"--model {str(error).rstrip('.')}, or one of {presets}") from error
    read = read_architecture if kind_of_checkpoint(place) == "run" else load_architecture
    return dataclasses.replace(read(place), **chosen)


def workload(options: Options) -> steps.Workload:
    """Workload of one step.

    Raises:
      UserError: numbers that do not fit each other.
    """
    option_checks.check_numbers(options)
    parts = options.micro_batches * (options.num_minibatches if options.algo in ("grpo", "ppo") else 1)
    if options.batch % parts:
        raise UserError(
            f"--batch {options.batch} cannot be computed in {parts} equal parts: change one of them"
        )
    if options.algo in ("grpo", "ppo") and options.new_tokens >= options.length:
        raise UserError(
            f"--new-tokens {options.new_tokens} leaves nothing of --length {options.length} for the prompt: "
            "lower it, or raise the length"
        )
    if options.algo == "grpo" and options.batch % options.group_size:
        raise UserError(
            f"--batch {options.batch} is no multiple of --group-size {options.group_size}: change one of them"
        )
    return steps.Workload(
        options.algo,
        read_config(options),
        options.batch,
        options.length,
        options.new_tokens,
        options.group_size,
        options.micro_batches,
        options.num_minibatches,
        options.num_ppo_epochs,
    )


def chosen_chip(options: Options) -> Chip | None:
    """The chip that is named; None where none is."""
    return next((chip for chip in CHIPS if options.chip in chip.name.lower().split()), None)


def mesh_of(mesh: str, topology: str, flag: str = "--topology") -> jax.sharding.Mesh:
    """The mesh, of devices that are here or of a slice that is not.

    Args:
      topology: of the slice; empty for the devices here.
      flag: what `topology` was named by.

    Raises:
      UserError: there is no such slice, or the mesh does not use the whole of it.
    """
    if not topology:
        return distributed.make_mesh(mesh)
    try:
        devices = topology_devices(topology)
    except UserError as error:
        raise UserError(str(error).replace("--topology", flag)) from error
    made = distributed.make_mesh(mesh, devices=devices)
    if made.size != len(devices):
        raise UserError(
            f"--mesh {mesh or '(none)'} uses {made.size} of the {len(devices)} devices of {flag} {topology}: "
            f"give sizes whose product is {len(devices)}, auto, or a smaller slice"
        )
    return made


def make_plan(options: Options) -> tuple[compiled.Plan, Mesh, Chip | None]:
    """By formula or by the compiler; also where, and for which chip.

    Raises:
      UserError: what was asked for does not go together.
    """
    planned, chip = workload(options), chosen_chip(options)
    if chip is None:
        devices, step = mesh_of(options.mesh, options.topology), steps.workload_step(planned)
        plan = compiled.make_plan(step, devices, Path(options.hlo) if options.hlo else None)
        return plan, devices, chip_of(devices.devices.flat[0].device_kind)
    if options.topology or options.hlo:
        other = "--topology" if options.topology else "--hlo"
        raise UserError(f"--chip goes by formula and excludes {other}: give one of them")
    mesh = distributed.abstract_mesh(options.mesh)
    return analytic_plan(planned, mesh), mesh, chip


def run(options: Options) -> None:
    """Compiles, and prints the plan."""
    if options.topology:  # whatever is here is not asked for
        jax.config.update("jax_platforms", "cpu")
    with axis_rules(GATHERED_SAMPLING if options.all_gather_params else {}):
        plan, mesh, chip = make_plan(options)
    if options.json:
        text = json.dumps(to_json(options, plan, mesh, chip), indent=2)
        if options.json == "-":
            print(text)
            return
        files.write_text(options.json, text + "\n")
    title = f"{options.model}, {options.algo}: {options.batch:,} rows x {options.length:,} tokens a step"
    show(title, plan, mesh, chip)
