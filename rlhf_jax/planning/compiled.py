"""Memory and compute planner: update and generation of a run, compiled ahead of time from shapes.

The programs are those of the scripts (`make_update`, `training.learning`, `make_completion_fn`), their
arrays live where `distributed.tree_shardings` puts them, and no array is ever made: neither the devices nor
the weights need be there.
"""

import dataclasses
import functools
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from rlhf_jax import distributed, models
from rlhf_jax.algorithms import grpo, ppo, preference, sft
from rlhf_jax.core import files
from rlhf_jax.core.protocols import LogprobFn
from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer
from rlhf_jax.core.types import Params, Rollout, Sequences
from rlhf_jax.data.tokenizers import byte_tokenizer
from rlhf_jax.distributed.placement import batch_sharding
from rlhf_jax.planning import hlo_analysis, hlo_collectives
from rlhf_jax.rollout.sampler import make_completion_fn, read_at_once
from rlhf_jax.rollout.step import make_grpo_train_step, make_ppo_train_step

Algorithm = Literal["sft", "dpo", "grpo", "ppo"]


@dataclasses.dataclass(frozen=True)
class Workload:
    """Workload of one step.

    Attributes:
      batch: rows a step: conversations of SFT, pairs of DPO, answers of GRPO and PPO.
      length: tokens a row; of GRPO and PPO, prompt and answer together.
      new_tokens: of an answer.
      group_size: answers to each prompt of GRPO.
      micro_batches: parts in which a mini-batch is computed.
      num_minibatches: optimizer steps of GRPO and PPO in each pass over a batch.
      num_ppo_epochs: passes over each batch.
    """

    algorithm: Algorithm
    config: models.ModelConfig
    batch: int
    length: int
    new_tokens: int = 512
    group_size: int = 8
    micro_batches: int = 1
    num_minibatches: int = 1
    num_ppo_epochs: int = 1

    @property
    def generates(self) -> bool:
        """True where a step samples answers."""
        return self.algorithm in ("grpo", "ppo")


@dataclasses.dataclass(frozen=True)
class Program:
    """A function of the run and what it is called with.

    Attributes:
      function: not jitted.
      arguments: shapes, with where they live.
      out_shardings: as of `jax.jit`; None for the compiler's choice.
      donated: positions of arguments whose memory the results take over.
      trips: rounds of loops that end when the data say so.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    out_shardings: Any = None
    donated: tuple[int, ...] = ()
    trips: int = 1


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Predicted cost of a compiled program, on each device and in one call.

    Attributes:
      argument_bytes: what it is called with.
      output_bytes: results beyond those that take over an argument's memory.
      temporary_bytes: activations, gradients, buffers.
      flops: of matrix products, what is computed again included, if all devices share evenly.
      traffic_bytes: read from and written to the device's memory.
      collectives: kind -> (how often, bytes that a device receives).
      compile_seconds: spent here.
      complaints: what the partitioner warned of.
      too_big: what the compiler said, where it found no room; what it would have found out is 0 then.
    """

    argument_bytes: float
    output_bytes: float
    temporary_bytes: float
    flops: float
    traffic_bytes: float
    collectives: dict[str, tuple[int, float]]
    compile_seconds: float
    complaints: tuple[str, ...] = ()
    too_big: str = ""

    @property
    def sent_bytes(self) -> float:
        """By all kinds of collectives together."""
        return sum(sent for _, sent in self.collectives.values())


@dataclasses.dataclass(frozen=True)
class Plan:
    """A step of a run on one device of a mesh.

    Attributes:
      resident: part -> bytes that are there all the time.
      programs: name -> prediction.
      kv_cache_bytes: of all answers' keys and values; part of generation's temporary memory.
    """

    resident: dict[str, float]
    programs: dict[str, Prediction]
    kv_cache_bytes: float

    @property
    def peak_bytes(self) -> float:
        """The most that is held at a time: what is resident, and the largest program beside it."""
        held = sum(self.resident.values())
        return held + max(p.temporary_bytes + p.output_bytes for p in self.programs.values())

    @property
    def too_big(self) -> str:
        """Out-of-memory message of the compiler; empty where there was room."""
        return next((p.too_big for p in self.programs.values() if p.too_big), "")


# What is there -------------------------------------------------------------------------------------


def on_mesh(mesh: Mesh | AbstractMesh, shapes: Any) -> Any:
    """Shapes of parameters or of a state, each with where it lives."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        distributed.tree_shardings(mesh, shapes),
    )


def device_bytes(tree: Any) -> float:
    """Bytes of `on_mesh` shapes that one device holds."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _rows(mesh: Mesh | AbstractMesh, rows: int, *columns: int, dtype: Any) -> Any:
    return jax.ShapeDtypeStruct((rows, *columns), dtype, sharding=batch_sharding(mesh, rows))


def _blank_sequences(rows: int, length: int) -> Sequences:
    ints = jnp.zeros((rows, length), jnp.int32)
    return Sequences(ints, ints, ints, jnp.zeros((rows, length), jnp.bool_))


def _blank_rollout(rows: int, length: int) -> Rollout:
    logp = jnp.zeros((rows, length), jnp.float32)
    return Rollout(_blank_sequences(rows, length), logp, jnp.zeros(rows, jnp.bool_), logp)


def _shapes_of_rows(mesh: Mesh | AbstractMesh, make: Callable[[], Any]) -> Any:
    """Shapes of what `make` makes, which has one entry a row, and where they live."""
    return jax.tree.map(lambda x: _rows(mesh, *x.shape, dtype=x.dtype), jax.eval_shape(make))


def _sequences(mesh: Mesh | AbstractMesh, rows: int, length: int) -> Any:
    return _shapes_of_rows(mesh, functools.partial(_blank_sequences, rows, length))


def _rollout(mesh: Mesh | AbstractMesh, rows: int, length: int) -> Any:
    return _shapes_of_rows(mesh, functools.partial(_blank_rollout, rows, length))


def build(workload: Workload, mesh: Mesh | AbstractMesh) -> tuple[dict[str, float], dict[str, Program]]:
    """(what is resident, the programs of one step), from shapes alone.

    The models are those of full training: DPO's reference scores every batch, PPO's value model is a whole
    model, and a reward model stands beside them.

    Raises:
      UserError: the mesh does not divide the batch.
    """
    config, rows, length = workload.config, workload.batch, workload.length
    tx = make_optimizer(OptimizerConfig())
    key = jax.eval_shape(lambda: jax.random.key(0))
    policy = jax.eval_shape(functools.partial(models.init_params, config), key)
    scalar = jax.eval_shape(functools.partial(models.init_scalar_model, config), key)
    logprob_fn = models.make_logprob_fn(config)
    rewards = _rows(mesh, rows, dtype=jnp.float32)
    split = workload.num_minibatches, workload.micro_batches
    reference, frozen = on_mesh(mesh, policy), {}
    learn: Callable[..., Any]
    match workload.algorithm:
        case "sft":
            params, init = policy, sft.init
            update = sft.make_update(sft.Config(workload.micro_batches), logprob_fn, tx)
            learn = lambda state, rows: update(state, sft.Hyper(), rows)  # noqa: E731
            data: tuple[Any, ...] = (_sequences(mesh, rows, length),)
        case "dpo":
            params, init = policy, preference.init
            update = preference.make_update(preference.Config(workload.micro_batches), logprob_fn, tx)
            learn = _preference_learn(logprob_fn, update)
            data = (reference, _sequences(mesh, rows, length), _sequences(mesh, rows, length))
            frozen = {"reference": reference}
        case "grpo":
            params, init = policy, grpo.init
            settings = grpo.Config(workload.group_size, workload.num_ppo_epochs, *split)
            train_step = make_grpo_train_step(settings, logprob_fn, tx)
            learn = lambda state, *data: train_step(state, grpo.Hyper(), *data)  # noqa: E731
            data = (reference, _rollout(mesh, rows, length), rewards)
            frozen = {"reference": reference}
        case "ppo":
            params = {"policy": policy, "value": scalar}
            init = functools.partial(ppo.init, hyper=ppo.Hyper())
            of_ppo = ppo.Config(workload.num_ppo_epochs, *split)
            both_fn = models.make_actor_critic_fn(config)
            train_step = make_ppo_train_step(of_ppo, both_fn, logprob_fn, tx)
            learn = lambda state, *data: train_step(state, ppo.Hyper(), *data)  # noqa: E731
            data = (reference, _rollout(mesh, rows, length), rewards)
            frozen = {"reference": reference, "reward model": on_mesh(mesh, scalar)}
    state = on_mesh(mesh, jax.eval_shape(lambda params, key: init(params, tx, key), params, key))
    out_shardings = (jax.tree.map(lambda x: x.sharding, state), None)
    found = {"update": Program(learn, (state, *data), out_shardings, (0,))}
    if workload.generates:
        policy_here = state.learner.params["policy"] if workload.algorithm == "ppo" else state.learner.params
        found["generation"] = _generation(workload, mesh, policy_here, key)
    if "reward model" in frozen:
        reward_fn = models.make_reward_fn(config)
        found["reward"] = Program(reward_fn, (frozen["reward model"], _sequences(mesh, rows, length)))
    resident = {
        "parameters": device_bytes(state.learner.params),
        "optimizer": device_bytes(state.learner.opt_state),
        **{name: device_bytes(tree) for name, tree in frozen.items()},
        "batch": device_bytes([leaf for leaf in data if leaf is not reference]),
    }
    return resident, found


def _preference_learn(logprob_fn: LogprobFn, update: Callable[..., Any]) -> Callable[..., Any]:
    """DPO whose reference scores every batch."""

    def learn(state: Any, original: Params, chosen: Sequences, rejected: Sequences) -> Any:
        batch = preference.make_batch(logprob_fn, original, chosen, rejected)
        return update(state, preference.Hyper(), batch)

    return learn


def _generation(workload: Workload, mesh: Mesh | AbstractMesh, params: Params, key: Any) -> Program:
    size = workload.group_size if workload.algorithm == "grpo" else 1
    size = read_at_once(workload.batch, size, distributed.shards_of_batch(mesh))
    # Which tokens end an answer changes no program: any tokenizer serves.
    policy = models.make_policy(workload.config, None, byte_tokenizer())
    sample = make_completion_fn(policy, max_new_tokens=workload.new_tokens, group_size=size)
    prompts = workload.batch // size
    columns = workload.length - workload.new_tokens
    whole = NamedSharding(mesh, PartitionSpec())
    arguments = (
        params,
        _rows(mesh, prompts, columns, dtype=jnp.int32),
        _rows(mesh, prompts, columns, dtype=jnp.bool_),
        jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole),
    )
    return Program(sample, arguments, trips=workload.new_tokens)


def cache_bytes(workload: Workload, mesh: Mesh | AbstractMesh) -> float:
    """Keys and values of all answers that one device holds: rows and heads split as the mesh splits them."""
    if not workload.generates:
        return 0.0
    cache = jax.eval_shape(lambda: models.init_cache(workload.config, workload.batch, workload.length))
    parts = distributed.shards_of_batch(mesh)
    heads = min(getattr(block.attention, "num_kv_heads", 1) for block in workload.config.blocks)
    tensor = mesh.shape["tensor"]
    parts *= tensor if heads % tensor == 0 else 1
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)) / parts


# What the compiler says ----------------------------------------------------------------------------


def predict(program: Program, mesh: Mesh, keep: Path | None = None) -> Prediction:
    """Compiles a program for the devices of the mesh and reads what came of it.

    Args:
      keep: where the compiled program's text is written.
    """
    with jax.set_mesh(mesh):
        jitted = jax.jit(
            program.function, donate_argnums=program.donated, out_shardings=program.out_shardings
        )
        traced = jitted.trace(*program.arguments)
        flops = hlo_analysis.matmul_flops(traced.jaxpr, while_trips=program.trips) / mesh.size
        began = time.perf_counter()
        with _captured_errors() as said:
            try:
                compiled = traced.lower().compile()
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                compiled, refusal = None, str(error)
            else:
                refusal = ""
        seconds = time.perf_counter() - began
    complaints = tuple(line for line in said if "rematerialization" in line.lower())
    arguments = device_bytes(program.arguments)
    if compiled is None:
        extra = _wanted_bytes(refusal, arguments)
        return Prediction(arguments, 0, extra, flops, 0, {}, seconds, complaints, _shorten(refusal))
    memory: Any = compiled.memory_analysis()
    text = compiled.as_text() or ""
    if keep is not None:
        files.write_text(keep, text)
    return Prediction(
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        flops=flops,
        traffic_bytes=hlo_analysis.memory_traffic(hlo_analysis.HloModule(text), program.trips),
        collectives=hlo_collectives.by_kind(hlo_collectives.collectives(text, program.trips)),
        compile_seconds=seconds,
        complaints=complaints,
    )


def make_plan(workload: Workload, mesh: Mesh, keep: Path | None = None) -> Plan:
    """Compiles all programs of a step; their texts go to the folder `keep`."""
    resident, found = build(workload, mesh)
    predictions = {
        name: predict(program, mesh, keep and keep / f"{name}.hlo.txt") for name, program in found.items()
    }
    return Plan(resident, predictions, cache_bytes(workload, mesh))


_WANTED = re.compile(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT]")
_TEMPORARY = re.compile(r"HLO temporaries \(([\d.]+)([KMGT])\)")
_UNITS = {"K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}


def _wanted_bytes(refusal: str, arguments: float) -> float:
    """Temporary bytes that a program would have used, by what the compiler said when it refused."""
    if found := _TEMPORARY.search(refusal):
        return float(found[1]) * _UNITS[found[2]]
    found = _WANTED.search(refusal)
    return float(found[1]) * _UNITS[found[2]] - arguments if found else math.nan


def _shorten(refusal: str) -> str:
    found = _TEMPORARY.search(refusal) or _WANTED.search(refusal)
    return f"the compiler found no room: {found[0]}" if found else refusal.splitlines()[0]


@contextmanager
def _captured_errors() -> Iterator[list[str]]:
    """Lines that the compiler, which is no Python, writes to standard error."""
    lines: list[str] = []
    kept = os.dup(2)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            caught.seek(0)
            lines += caught.read().splitlines()
