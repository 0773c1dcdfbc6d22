"""A reward model from preference pairs or rankings of K answers, starting from the body of a policy.

    rlhf reward-model --out runs/reward_model --model runs/sft --data pairs.jsonl
    rlhf reward-model --out runs/rm2 --model runs/sft \\
        --data pairs.jsonl --eval-data held_out.jsonl
    rlhf reward-model --out runs/rm_ranked --model runs/sft --data rankings.jsonl --loss all_pairs
    rlhf reward-model --out runs/rm_lora --model runs/sft --data pairs.jsonl --adapter.kind lora

Rows hold `prompt`, `chosen` and `rejected`: plain strings, or lists of messages; or `prompt`, `completions`
(two or more) and `ranks`, a number to each: 0 is the best, and completions of equal rank are not compared.
A number in `margin` is by how much the better answers of that row are to lead (Llama 2).
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from rlhf_jax import distributed
from rlhf_jax.algorithms import reward
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.importing import is_import_path
from rlhf_jax.core.ranges import Finite, LearningRate, PositiveInt, Weight
from rlhf_jax.core.train_state import OptimizerConfig
from rlhf_jax.data.pipeline import BatchSampler
from rlhf_jax.evaluation.classification import reliability
from rlhf_jax.evaluation.rankings import pair_leads, top1_accuracy
from rlhf_jax.stages import (
    adapting,
    defaults,
    edges,
    inputs,
    loss_options,
    option_checks,
    option_groups,
    starting,
)
from rlhf_jax.stages.entry import NOTHING, Given, Trained
from rlhf_jax.stages.rankings import Rankings, load_rankings
from rlhf_jax.stages.session import Session

LossName = Annotated[
    str,
    tyro.conf.arg(
        metavar="NAME",
        help=f"what is made of the scores: {', '.join(reward.reward_losses())}; or a loss of your own on "
        "rankings, by its path module:function. bradley_terry is on pairs alone.",
    ),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of reward modelling.

    Attributes:
      pairs: which preference pairs, or rankings.
      tokenizer: folder or tokenizer.json; empty for that of `model`.
      model: the policy whose body is taken: a run folder, a Hugging Face folder, a GGUF file or a name in the
        hub cache; empty for a new model.
      batch_size: pairs, or rankings, a step; all answers of a ranking are scored in one pass.
      micro_batches: parts in which a batch is computed, to save memory.
      learning_rate: at its peak; None for the published one (1e-5, with an adapter 1e-4).
      loss: Bradley-Terry on pairs; of rankings the mean over all pairs, or Plackett-Luce.
      margin: by how much the chosen score must lead, in units of reward.
      margin_scale: factor of the rows' own `margin`, which adds to that.
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
    batch_size: PositiveInt = 64
    micro_batches: PositiveInt = 1
    learning_rate: LearningRate | None = None
    loss: LossName = "bradley_terry"
    margin: Finite = 0.0
    margin_scale: Finite = 1.0
    center_rewards_coefficient: Weight = 0.01


def check(options: Options, loss_fn: reward.RewardLossFn) -> None:
    """Raises: UserError where the options do not fit each other."""
    option_checks.check(options, options.run, "reward_model")
    option_checks.check_divides("--micro-batches", options.micro_batches, "--batch-size", options.batch_size)
    if options.pairs.soft_labels and not reward.learns_from_pairs(loss_fn):
        raise UserError("--soft-labels are of pairs: leave them out, or take --loss bradley_terry")


def make_evaluate_fn(
    reward_fn: reward.RewardFn, held_out: Rankings, batch_size: int
) -> Callable[[reward.State, int], dict[str, float]]:
    """Evaluation function: how well scores order the held-out answers."""
    score = jax.jit(lambda params, answers: reward.score_answers(reward_fn, params, answers))

    def evaluate(state: reward.State, _: int) -> dict[str, float]:
        parts = []
        for indices in inputs.parts(len(held_out), batch_size):
            columns = score(state.learner.all_params, held_out.rows(indices))
            parts.append(np.stack([distributed.all_values(column) for column in columns], axis=1))
        scores = np.concatenate(parts)[: len(held_out)]
        leads = pair_leads(scores, held_out.ranks, held_out.mask)
        # Either answer may come first: what counts is how sure the model is, and how often that is right.
        sure = 1 / (1 + np.exp(-np.abs(leads.astype(np.float64))))
        found = {
            "pair_accuracy": float(np.mean(leads > 0)),
            "margin": float(np.mean(leads)),
            "calibration_error": reliability(sure, leads > 0).error,
        }
        if held_out.width > 2:
            found["top1_accuracy"] = top1_accuracy(scores, held_out.ranks, held_out.mask)
        return found

    return evaluate


def run(options: Options, given: Given = NOTHING) -> Trained:
    """Trains, and leaves a run folder."""
    options = defaults.fill_published(options, "reward_model")
    seed, loss_fn = options.run.seed, reward.find_reward_loss(given.loss or options.loss)
    check(options, loss_fn)
    adapting.check_base(options.adapter, exists=bool(options.model) or given.policy is not None)
    is_own = given.loss is not None or is_import_path(options.loss)
    if is_own and not reward.learns_from_pairs(loss_fn):
        loss_options.check_ranking_loss(loss_fn)
    model = starting.starting_model(
        options.model, options.tokenizer, options.pairs.data, options.arch, options.run, given.policy
    )
    on_pairs = reward.learns_from_pairs(loss_fn)
    train, held_out = load_rankings(options.pairs, model.tokenizer, seed, given, on_pairs=on_pairs)
    if train.margins is None and options.margin_scale != 1:
        raise UserError("--margin-scale: no row has a `margin` to scale: leave it out")
    sampler = BatchSampler(len(train), options.batch_size, seed)
    session = Session(options, given, "reward_model", model)
    session.decide_steps(len(train))
    what = "pairs" if train.width == 2 else f"rankings of up to {train.width} answers"
    session.announce(f"{len(train):,} {what}, {len(held_out):,} held out")

    split = session.split_trainable()
    reward_fn = model.make_reward_fn()
    state = session.init_state(
        lambda params, *keys: reward.init(model.init_scalar_model(keys[0], params), split.tx, keys[1]),
        split.trained,
        None if split.frozen is None else {"decoder": split.frozen},
        *jax.random.split(jax.random.key(seed)),
    )
    config = reward.Config(options.micro_batches, loss_fn)
    update = edges.jit_update(reward.make_update(config, reward_fn, split.tx), state)
    numbers = (
        options.learning_rate,
        options.margin,
        options.center_rewards_coefficient,
        options.margin_scale,
    )
    hyper = reward.Hyper(*map(jnp.float32, numbers))
    meter = options.run.meter(
        model.training_flops(rows=train.width * options.batch_size, length=train.length)
    )

    def batch(number: int) -> reward.Pairs | reward.Rankings:
        return train.batch(edges.local_indices(sampler, number), on_pairs=on_pairs)

    def step(state: reward.State, number: int):
        return meter.timed("update", update, state, hyper, meter.timed("data", batch, number))

    state = session.train(
        state,
        step,
        meter=meter,
        data_fingerprint=train.fingerprint(),
        kind="reward_model",
        adaptation=split.adaptation,
        evaluate=make_evaluate_fn(reward_fn, held_out, options.batch_size) if len(held_out) else None,
    )
    return session.finish_reward_model(state)
