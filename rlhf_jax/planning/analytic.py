"""Plans without a compiler, for devices whose compiler is not here: everything counted on paper."""

import jax.numpy as jnp
from jax.sharding import AbstractMesh

from rlhf_jax import distributed, models
from rlhf_jax.algorithms import grpo
from rlhf_jax.core.axes import partition_spec
from rlhf_jax.core.errors import UserError
from rlhf_jax.planning.compiled import Plan, Prediction
from rlhf_jax.planning.steps import Workload, build, cache_bytes, device_bytes, workload_step


def analytic_plan(workload: Workload, mesh: AbstractMesh) -> Plan:
    """A plan in which state and cache are exact (from shapes) and the rest is counted, for `remat="full"`:

        temporary     = gradients + 3 V D 4 (embeddings and output matrix gathered, its gradient)
                      + 3 * 512 V 4 (logits of a chunk)
                      + T (L D + 4 D + 3 hidden) of the compute dtype (inputs of layers, insides of one)
        operations    = 4 forward passes a gradient (one of them again), 1 a scoring
        memory        = state and temporary, read and written once each
        communication = parameters gathered forward and backward, gradients scattered: 3 s P;  s = 1 - 1/fsdp

    Generation reads parameters and half of the cache for every token, and gathers the parameters for it; or
    once, in the compute dtype, where the rules say so (`core.axes.GATHERED_SAMPLING`).

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
    hidden = max(getattr(block.feed_forward, "intermediate_size", 0) for block in config.blocks)
    item = jnp.dtype(config.compute_dtype).itemsize
    matrix = config.vocab_size * config.width * 4 / tensor
    layer = item * rows * workload.length * (4 * config.width + 3 * hidden / tensor)
    kept = item * rows * workload.length * config.width * config.num_layers
    whole = resident["parameters"] * mesh.shape["fsdp"]  # what a device holds of it after a gather
    cache = cache_bytes(step.generation, mesh)
    forward = models.forward_flops(config, rows=workload.batch, length=workload.length) / mesh.size
    temporary = resident["parameters"] + matrix * (3 + 3 * 512 / config.width) + trained * (kept + layer)
    passes = (
        3 * workload.micro_batches * workload.num_minibatches * workload.num_ppo_epochs + scored / trained
    )
    arguments = {name: device_bytes(program.arguments) for name, program in found.items()}

    def prediction(name: str, held: float, flops: float, moved: float, sent: float) -> Prediction:
        return Prediction(arguments[name], 0, held, flops, moved, {"on paper": (0, sent)}, 0.0)

    flops = forward * (4 * sides * trained * workload.num_ppo_epochs + scored)
    moved = 2 * (arguments["update"] + temporary)
    plans = {"update": prediction("update", temporary, flops, moved, passes * share * whole)}
    if "generation" in found:
        one, layers, gathers = whole / trained, config.num_layers, workload.new_tokens
        if not any(partition_spec(("embed_sampling",), (config.width,), mesh)[0]):
            one, layers, gathers = one * item / jnp.dtype(config.param_dtype).itemsize, 1, 1
        moved = workload.new_tokens * (one + cache / 2)
        plans["generation"] = prediction(
            "generation", cache + one / layers + matrix, forward, moved, gathers * share * one
        )
    if "reward" in found:
        moved = 2 * (arguments["reward"] + layer)
        plans["reward"] = prediction("reward", layer + matrix, forward, moved, share * whole / trained)
    return Plan(resident, plans, cache)
