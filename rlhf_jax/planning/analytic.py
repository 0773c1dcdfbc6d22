"""Plans without a compiler, for devices whose compiler is not here: what is needed at least, on paper."""

import jax.numpy as jnp
from jax.sharding import AbstractMesh

from rlhf_jax import distributed, models
from rlhf_jax.algorithms import grpo
from rlhf_jax.core.axes import partition_spec
from rlhf_jax.core.errors import UserError
from rlhf_jax.planning.compiled import Plan, Prediction
from rlhf_jax.planning.steps import Workload, build, cache_bytes, device_bytes, workload_step


def analytic_plan(workload: Workload, mesh: AbstractMesh) -> Plan:
    """A lower bound on the memory, and about the work, of a step with `remat="full"`.

    State and cache are exact (from shapes); what no compiler can do without is added. A plan that does not
    fit so does not fit; one that does may still not, since compiled programs need more.

        temporary     = gradients + T L D (inputs of the layers) + V D (output matrix, gathered);
                        the last two in the compute dtype
        operations    = 4 forward passes a gradient (one of them again), 1 a scoring
        memory        = state and temporary, read and written once each
        communication = parameters gathered forward and backward, gradients scattered: 3 s P;  s = 1 - 1/fsdp

    Generation reads parameters and half of the cache for every token, and gathers the parameters, in the
    compute dtype, for it; or once, where the rules say so (`core.axes.GATHERED_SAMPLING`).

    Raises:
      UserError: `remat` is another, or the mesh does not divide the batch.
    """
    config = workload.config
    if config.remat != "full":
        raise UserError(f"a plan by formula is for remat full, and this is {config.remat}: give --remat full")
    step = workload_step(workload)
    resident, found = build(step, mesh)
    share, tensor = 1 - 1 / mesh.shape["fsdp"], mesh.shape["tensor"]
    trained = 2 if workload.algorithm == "ppo" else 1
    sides = 2 if workload.algorithm == "dpo" else 1
    passes_of_grpo = workload.num_ppo_epochs, workload.num_minibatches, workload.micro_batches
    of_grpo = 1 if grpo.Config(workload.group_size, *passes_of_grpo).one_pass else 2
    scored = {"sft": 0, "dpo": sides, "grpo": of_grpo, "ppo": 3}[workload.algorithm]
    rows = workload.batch // workload.micro_batches // workload.num_minibatches
    rows = rows * sides / distributed.shards_of_batch(mesh)
    item = jnp.dtype(config.compute_dtype).itemsize
    matrix = item * config.vocab_size * config.width / tensor
    kept = item * rows * workload.length * config.width * config.num_layers
    whole = resident["parameters"] * mesh.shape["fsdp"]  # what a device holds of it after a gather
    cache = cache_bytes(step.generation, mesh)
    forward = models.forward_flops(config, rows=workload.batch, length=workload.length) / mesh.size
    temporary = resident["parameters"] + matrix + trained * kept
    passes = (
        3 * workload.micro_batches * workload.num_minibatches * workload.num_ppo_epochs + scored / trained
    )
    arguments = {name: device_bytes(program.arguments) for name, program in found.items()}

    def prediction(name: str, held: float, flops: float, moved: float, sent: float) -> Prediction:
        return Prediction(arguments[name], 0, held, flops, moved, {"collectives": (0, sent)}, 0.0)

    flops = forward * (4 * sides * trained * workload.num_ppo_epochs + scored)
    moved = 2 * (arguments["update"] + temporary)
    plans = {"update": prediction("update", temporary, flops, moved, passes * share * whole)}
    if "generation" in found:
        one = whole / trained * item / jnp.dtype(config.param_dtype).itemsize
        once = not any(partition_spec(("embed_sampling",), (config.width,), mesh)[0])
        gathers = 1 if once else workload.new_tokens
        moved = workload.new_tokens * (one + cache / 2)
        plans["generation"] = prediction(
            "generation", cache + one * once, forward, moved, gathers * share * one
        )
    if "reward" in found:
        moved = 2 * arguments["reward"]
        plans["reward"] = prediction("reward", 0.0, forward, moved, share * whole / trained)
    return Plan(resident, plans, cache, by_formula=True)
