"""A reward model from preference pairs, starting from the body of a policy.

    rlhf reward-model --out runs/reward_model --model runs/sft --data pairs.jsonl
    rlhf reward-model --out runs/rm2 --model runs/sft \\
        --data pairs.jsonl --eval-data held_out.jsonl
    rlhf reward-model --out runs/rm_lora --model runs/sft --data pairs.jsonl --adapter.kind lora

Rows hold `prompt`, `chosen` and `rejected`: plain strings, or lists of messages.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from rlhf_jax import distributed
from rlhf_jax.algorithms import reward
from rlhf_jax.core.train_state import OptimizerConfig, with_total_steps
from rlhf_jax.data.pipeline import BatchSampler
from rlhf_jax.evaluation.classification import reliability
from rlhf_jax.stages import adapting, defaults, edges, entry, inputs, option_checks, option_groups, starting
from rlhf_jax.stages.entry import NOTHING, Given, Trained, trained_reward_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of reward modelling.

    Attributes:
      pairs: which preference pairs.
      tokenizer: folder or tokenizer.json; empty for that of `model`.
      model: run folder of the policy whose body is taken; empty for a new model.
      batch_size: pairs a step.
      micro_batches: parts in which a batch is computed, to save memory.
      learning_rate: at its peak; None for the published one (1e-5, with an adapter 1e-4).
      margin: by how much the chosen score must lead, in units of reward.
      center_rewards_coefficient: weight of (chosen + rejected)^2, which keeps scores near 0.
    """

    run: tyro.conf.OmitArgPrefixes[option_groups.RunOptions] = option_groups.RunOptions(
        Path("runs/reward_model")
    )
    pairs: tyro.conf.OmitArgPrefixes[option_groups.PairOptions]
    arch: option_groups.ArchOptions = option_groups.ArchOptions()
    adapter: adapting.AdapterOptions = adapting.AdapterOptions()
    optimizer: OptimizerConfig = defaults.LINEAR
    tokenizer: str = ""
    model: str = ""
    batch_size: int = 64
    micro_batches: int = 1
    learning_rate: float | None = None
    margin: float = 0.0
    center_rewards_coefficient: float = 0.01


def run(options: Options, given: Given = NOTHING) -> Trained:
    """Trains, and leaves a run folder."""
    options = defaults.fill_published(options, "reward_model")
    seed = options.run.seed
    option_checks.check(options, options.run, "reward_model")
    option_checks.check_divides("--micro-batches", options.micro_batches, "--batch-size", options.batch_size)
    model = starting.starting_model(
        options.model, options.tokenizer, options.pairs.data, options.arch, options.run, given.policy
    )
    train, held_out = inputs.load_pairs(options.pairs, model.tokenizer, seed, given)
    sampler = BatchSampler(len(train), options.batch_size, seed)
    options = option_checks.with_steps(options, len(train), options.batch_size)
    edges.announce(options.run, model, f"{len(train):,} pairs, {len(held_out):,} held out")

    steps, brought = options.run.num_steps, given.policy is not None
    split = adapting.split_trainable(options.adapter, model, seed=seed, steps=steps, brought=brought)
    reward_fn = model.make_reward_fn()
    tx = split.optimizer(with_total_steps(options.optimizer, options.run.num_steps))
    state = adapting.init_sharded_state(
        lambda params, *keys: reward.init(model.init_scalar_model(keys[0], params), tx, keys[1]),
        split.trained,
        None if split.frozen is None else {"decoder": split.frozen},
        *jax.random.split(jax.random.key(seed)),
    )
    adapting.print_trainable_parameters(options.run, state.learner)
    update = edges.jit_update(reward.make_update(reward.Config(options.micro_batches), reward_fn, tx), state)
    hyper = reward.Hyper(
        *(jnp.float32(x) for x in (options.learning_rate, options.margin, options.center_rewards_coefficient))
    )
    score = jax.jit(lambda params, pairs: reward.score_pairs(reward_fn, params, pairs))

    meter = options.run.meter(model.training_flops(rows=2 * options.batch_size, length=train.length))

    def batch(number: int) -> reward.Pairs:
        indices = edges.local_indices(sampler, number)
        labels = None if train.labels is None else train.labels[indices]
        rows, labels = distributed.shard_batch((train.rows(indices), labels))
        return reward.Pairs(*rows, preference=labels)

    def step(state: reward.State, number: int):
        return meter.timed("update", update, state, hyper, meter.timed("data", batch, number))

    def accuracy(state: reward.State, _: int) -> dict[str, float]:
        leads = []
        for indices in inputs.parts(len(held_out), options.batch_size):
            chosen, rejected = score(state.learner.all_params, reward.Pairs(*held_out.rows(indices)))
            leads.append(distributed.all_values(chosen - rejected))
        margins = np.concatenate(leads)[: len(held_out)]
        # Either answer may come first: what counts is how sure the model is, and how often that is right.
        sure = 1 / (1 + np.exp(-np.abs(margins.astype(np.float64))))
        return {
            "pair_accuracy": float(np.mean(margins > 0)),
            "margin": float(np.mean(margins)),
            "calibration_error": reliability(sure, margins > 0).error,
        }

    state = entry.train(
        options,
        given,
        state,
        step,
        stage="reward_model",
        policy=model,
        meter=meter,
        data_fingerprint=train.fingerprint(),
        kind="reward_model",
        adaptation=split.adaptation,
        evaluate=accuracy if len(held_out) else None,
    )
    edges.finish(options.run)
    return trained_reward_model(options.run, model, state.learner.all_params, state)
