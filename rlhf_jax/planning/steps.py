"""One step of a run as programs over shapes: what is resident, what is called with what, and where it lives.

A run's own step comes from its stage (`stages.planned_runs`), that of a `Workload` is full training with
default settings. Both are the functions of the scripts (`make_update`, the steps of
`rollout.step`, `make_completion_fn`), and their arrays live where `distributed.tree_shardings` puts them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from rlhf_jax import distributed, models
from rlhf_jax.algorithms import grpo, ppo, preference, sft
from rlhf_jax.core.protocols import LogprobFn
from rlhf_jax.core.train_state import (
    OptimizerConfig,
    frozen_parts,
    make_optimizer,
    returning_trained,
    without_frozen,
)
from rlhf_jax.core.types import Params, Rollout, Sequences
from rlhf_jax.data.tokenizers import byte_tokenizer
from rlhf_jax.distributed.placement import batch_sharding
from rlhf_jax.models import Policy
from rlhf_jax.rollout.sampler import make_completion_fn, read_at_once
from rlhf_jax.rollout.step import make_grpo_train_step, make_ppo_train_step

Algorithm = Literal["sft", "dpo", "grpo", "ppo"]
AnyMesh = Mesh | AbstractMesh


@dataclasses.dataclass(frozen=True)
class Workload:
    """Workload of one step of full training.

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
class Generation:
    """Sampling of the answers of one step.

    Attributes:
      policy: who answers; its own parameters are not looked at.
      params: of the policy, in shapes.
      rows: answers.
      prompt_length: tokens of the longest prompt.
      new_tokens: tokens of the longest answer.
      group_size: answers to each prompt, which is read once.
      max_num_seqs: answers on their way at a time; None for all.
    """

    policy: Policy
    params: Params
    rows: int
    prompt_length: int
    new_tokens: int
    group_size: int = 1
    max_num_seqs: int | None = None


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A reward model of the run.

    Attributes:
      function: (params, sequences) -> rewards.
      params: in shapes.
      held: whether they are parameters of its own, beside those of the train state.
    """

    function: Callable[..., Any]
    params: Params
    held: bool = True


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a run, in shapes that live nowhere yet.

    Attributes:
      learn: (state, *params, *rows) -> (state, metrics).
      state: at step 0, with its frozen parts.
      params: what `learn` takes beside the state that is split like parameters.
      rows: what it takes that has one entry for each row.
      reference: parameters that are kept to compare with; None where the state holds them.
      generation: None where nothing is sampled.
      scorers: reward models by name.
      sequences: what they score.
    """

    learn: Callable[..., Any]
    state: Any
    params: tuple[Params, ...]
    rows: tuple[Any, ...]
    reference: Params = None
    generation: Generation | None = None
    scorers: Mapping[str, Scorer] = dataclasses.field(default_factory=dict)
    sequences: Sequences | None = None


# Where it lives ------------------------------------------------------------------------------------


def on_mesh(mesh: AnyMesh, shapes: Any) -> Any:
    """Shapes of parameters or of a state, each with where it lives."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        distributed.tree_shardings(mesh, shapes),
    )


def rows_on_mesh(mesh: AnyMesh, shapes: Any) -> Any:
    """Shapes that have one entry for each row, each with where it lives.

    Raises:
      UserError: the mesh does not divide the rows.
    """
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh, x.shape[0])), shapes
    )


def device_bytes(tree: Any) -> float:
    """Bytes of `on_mesh` shapes that one device holds."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * _bits(leaf.dtype) / 8
        for leaf in jax.tree.leaves(tree)
    )


def _bits(dtype: Any) -> int:
    """Of one number on a device, where those of 4 bits are packed."""
    return jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else 8 * dtype.itemsize


def build(step: Step, mesh: AnyMesh) -> tuple[dict[str, float], dict[str, Program]]:
    """(what is resident on each device, the programs of one step), from shapes alone.

    Raises:
      UserError: the mesh does not divide the batch.
    """
    state, params = on_mesh(mesh, step.state), on_mesh(mesh, step.params)
    rows, scored = rows_on_mesh(mesh, step.rows), rows_on_mesh(mesh, step.sequences)
    trained = without_frozen(state)
    found = {
        "update": Program(
            returning_trained(step.learn),
            (trained, frozen_parts(state), *params, *rows),
            (distributed.shardings_of(trained), None),
            (0,),
        )
    }
    if step.generation is not None:
        found["generation"] = _sampling(step.generation, mesh)
    scorers = {name: on_mesh(mesh, scorer.params) for name, scorer in step.scorers.items()}
    for name, scorer in step.scorers.items():
        found[name.removesuffix(" model")] = Program(scorer.function, (scorers[name], scored))
    held = {name: tree for name, tree in scorers.items() if step.scorers[name].held}
    resident = {
        **_parts_of_state(state),
        **_bytes_of_some({"reference": on_mesh(mesh, step.reference), **held}),
        "batch": device_bytes(rows),
    }
    return resident, found


def _parts_of_state(state: Any) -> dict[str, float]:
    """Parameters, optimizer, and whatever else is larger than a counter."""
    others = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    learner = others.pop("learner")
    large = {
        name.replace("_", " "): tree
        for name, tree in others.items()
        if any(leaf.ndim for leaf in jax.tree.leaves(tree))
    }
    return {
        "parameters": device_bytes(learner.params),
        **_bytes_of_some({"frozen base": learner.frozen}),
        "optimizer": device_bytes(learner.opt_state),
        **_bytes_of_some(large),
    }


def _bytes_of_some(trees: Mapping[str, Any]) -> dict[str, float]:
    return {name: device_bytes(tree) for name, tree in trees.items() if jax.tree.leaves(tree)}


def _sampling(generation: Generation, mesh: AnyMesh) -> Program:
    rows, seqs = generation.rows, generation.max_num_seqs
    size = 1 if seqs else generation.group_size
    size = read_at_once(rows, size, distributed.shards_of_batch(mesh))
    sample = make_completion_fn(
        generation.policy, max_new_tokens=generation.new_tokens, group_size=size, max_num_seqs=seqs
    )
    shape = rows // size, generation.prompt_length
    prompts = [jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.bool_)]
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=NamedSharding(mesh, PartitionSpec()))  # pyright: ignore[reportArgumentType]
    # Where the next prompt takes the place of an answer that ended, the longest way is that of full answers.
    trips = generation.new_tokens * math.ceil(rows / (seqs or rows))
    return Program(sample, (on_mesh(mesh, generation.params), *rows_on_mesh(mesh, prompts), key), trips=trips)


def cache_bytes(generation: Generation | None, mesh: AnyMesh) -> float:
    """Keys and values of all answers that one device holds: rows and heads split as the mesh splits them."""
    if generation is None:
        return 0.0
    config, rows = generation.policy.architecture, generation.max_num_seqs or generation.rows
    length = generation.prompt_length + generation.new_tokens
    cache = jax.eval_shape(lambda: models.init_cache(config, rows, length))
    parts = distributed.shards_of_batch(mesh)
    heads = min(getattr(block.attention, "num_kv_heads", 1) for block in config.blocks)
    tensor = mesh.shape["tensor"]
    parts *= tensor if heads % tensor == 0 else 1
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)) / parts


# Rows ----------------------------------------------------------------------------------------------


def shapes_of(tree: Any) -> Any:
    """Shapes in the place of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def sequence_shapes(rows: int, length: int) -> Any:
    """`Sequences` of so many rows of so many tokens, in shapes."""
    ints, bools = (jax.ShapeDtypeStruct((rows, length), dtype) for dtype in (jnp.int32, jnp.bool_))
    return jax.eval_shape(Sequences, ints, ints, ints, bools)


def rollout_shapes(rows: int, length: int) -> Any:
    """`Rollout` of so many answers with their prompts, of so many tokens together, in shapes."""
    logp, finished = jax.ShapeDtypeStruct((rows, length), jnp.float32), jax.ShapeDtypeStruct((rows,), bool)
    return jax.eval_shape(Rollout, sequence_shapes(rows, length), logp, finished, logp)


# Full training with default settings ---------------------------------------------------------------


def workload_step(workload: Workload) -> Step:
    """The step of a workload.

    The models are those of full training: DPO's reference scores every batch, PPO's value model is a whole
    model, and a reward model stands beside them.
    """
    config, tx, passes = workload.config, make_optimizer(OptimizerConfig()), workload.num_ppo_epochs
    key = jax.eval_shape(lambda: jax.random.key(0))
    policy = models.param_shapes(config)
    scalar = jax.eval_shape(functools.partial(models.init_scalar_model, config), key)
    logprob_fn = models.make_logprob_fn(config)
    sequences = sequence_shapes(workload.batch, workload.length)
    rollout = rollout_shapes(workload.batch, workload.length)
    rewards = jax.ShapeDtypeStruct((workload.batch,), jnp.float32)
    split = workload.num_minibatches, workload.micro_batches

    def state(init: Callable[..., Any], params: Params = policy) -> Any:
        return jax.eval_shape(lambda params, key: init(params, tx, key), params, key)

    match workload.algorithm:
        case "sft":
            update = sft.make_update(sft.Config(workload.micro_batches), logprob_fn, tx)
            learn = lambda state, rows: update(state, sft.Hyper(), rows)  # noqa: E731
            return Step(learn, state(sft.init), (), (sequences,))
        case "dpo":
            update = preference.make_update(preference.Config(workload.micro_batches), logprob_fn, tx)
            pairs = sequences, sequences
            return Step(
                _preference_learn(logprob_fn, update), state(preference.init), (policy,), pairs, policy
            )
        case "grpo":
            settings = grpo.Config(workload.group_size, passes, *split)
            of_grpo = make_grpo_train_step(settings, logprob_fn, tx)
            learn = lambda state, *data: of_grpo(state, grpo.Hyper(), *data)  # noqa: E731
            sampled = _default_generation(workload, policy, workload.group_size)
            return Step(learn, state(grpo.init), (policy,), (rollout, rewards), policy, sampled)
        case "ppo":
            both_fn = models.make_actor_critic_fn(config)
            of_ppo = make_ppo_train_step(ppo.Config(passes, *split), both_fn, logprob_fn, tx)
            learn = lambda state, *data: of_ppo(state, ppo.Hyper(), *data)  # noqa: E731
            at_start = state(
                functools.partial(ppo.init, hyper=ppo.Hyper()), {"policy": policy, "value": scalar}
            )
            return Step(
                learn,
                at_start,
                (policy,),
                (rollout, rewards),
                policy,
                _default_generation(workload, policy, 1),
                {"reward model": Scorer(models.make_reward_fn(config), scalar)},
                sequences,
            )


def _preference_learn(logprob_fn: LogprobFn, update: Callable[..., Any]) -> Callable[..., Any]:
    """DPO whose reference scores every batch."""

    def learn(state: Any, original: Params, chosen: Sequences, rejected: Sequences) -> Any:
        batch = preference.make_batch(logprob_fn, original, chosen, rejected)
        return update(state, preference.Hyper(), batch)

    return learn


def _default_generation(workload: Workload, params: Params, group_size: int) -> Generation:
    # Which tokens end an answer changes no program: any tokenizer serves.
    policy = models.make_policy(workload.config, None, byte_tokenizer())
    prompt_length = workload.length - workload.new_tokens
    return Generation(policy, params, workload.batch, prompt_length, workload.new_tokens, group_size)
