"""Direct preference optimisation and its family: a policy from pairs, against a frozen reference.

    rlhf dpo --out runs/dpo --model runs/sft --data pairs.jsonl
    rlhf dpo --out runs/mine --model runs/sft --data pairs.jsonl --beta 0.3
    rlhf dpo --out runs/simpo --model runs/sft --data pairs.jsonl --loss simpo --gamma 1.6
    rlhf dpo --out runs/mpo --model runs/sft --data pairs.jsonl --loss dpo,bco_pair --loss-weights 0.8 0.2
    rlhf dpo --out runs/kto --model runs/sft --loss kto --data labelled.jsonl

Rows hold `prompt`, `chosen` and `rejected`: plain strings, or lists of messages. KTO and BCO, which learn
from single responses, take both sides of such rows, or rows of `prompt`, `completion` and a boolean `label`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from rlhf_jax import distributed, losses
from rlhf_jax.algorithms import preference, unpaired
from rlhf_jax.algorithms.unpaired import UNPAIRED_LOSSES
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.importing import is_import_path
from rlhf_jax.core.protocols import LogprobFn
from rlhf_jax.core.ranges import Finite, LearningRate, Positive, PositiveInt, Share, Weight
from rlhf_jax.core.train_state import OptimizerConfig
from rlhf_jax.core.types import Metrics, Params, Sequences
from rlhf_jax.data.pipeline import BatchSampler
from rlhf_jax.evaluation.classification import roc_auc
from rlhf_jax.losses.pair_logps import PairLossFn, PairLossTraits, takes_weights, traits_of
from rlhf_jax.models import Policy
from rlhf_jax.planning.steps import Step, shapes_of
from rlhf_jax.rollout.packed_rows import Layout, packed
from rlhf_jax.stages import (
    adapting,
    defaults,
    edges,
    inputs,
    loss_options,
    option_checks,
    option_groups,
    planned_runs,
)
from rlhf_jax.stages.entry import NOTHING, Given, Trained
from rlhf_jax.stages.session import Session
from rlhf_jax.training import Meter

Sides = tuple[Sequences, Sequences]
LossName = Annotated[
    str,
    tyro.conf.arg(
        metavar="NAME",
        help=f"what is made of the pairs: {', '.join(preference.pair_losses())}; of single responses: "
        f"{', '.join(UNPAIRED_LOSSES)}; or a loss of your own on pairs, by its path module:function. Several "
        "on pairs, with commas between them, are added with --loss-weights.",
    ),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of direct preference optimisation.

    Attributes:
      model: the policy to start from, which is also the reference: a run folder, a Hugging Face folder, a
        GGUF file or a name in the hub cache.
      pairs: which preference pairs, or labelled completions.
      batch_size: pairs a step; for KTO and BCO, responses.
      micro_batches: parts in which a batch is computed, to save memory.
      packing: score responses, and learn from them, several in a row of tokens, without their padding; losses
        and gradients are the same. Each new number of rows is compiled once.
      learning_rate: at its peak; None for the published one of the loss (DPO: 1e-6, with an adapter 1e-5).
      loss: DPO, or another of its family; kto and bco for single responses.
      beta: strength of the KL constraint, per nat; for losses without a reference, the scale of log-probs;
        None for the published one (DPO: 0.1).
      loss_params: the numbers of the loss.
      loss_weights: of the losses that are mixed, in the order of --loss (MPO).
      f_divergence_type: of the constraint: the reverse KL, or another f-divergence (f-DPO).
      rpo_alpha: weight of the likelihood of the chosen response per token, beside the loss (RPO); None for no
        likelihood.
      ld_alpha: weight of the tokens beyond the shorter response of a pair (LD-DPO); None for the plain sum.
      use_weighting: weigh each pair by how on-policy it is (WPO).
      desirable_weight: of the desirable responses in KTO and BCO.
      undesirable_weight: of the others.
      bco_shift: what BCO's shift is the running mean of: the mean rewards of both classes as in the paper, or
        the reward of all rows as in TRL.
      reference: score pairs with the reference once and keep the numbers, or at every step with a second
        model in memory (with an adapter: the same one, adapter off). Both give the same training.
    """

    run: tyro.conf.OmitArgPrefixes[option_groups.RunOptions] = option_groups.RunOptions(Path("runs/dpo"))
    model: str
    pairs: tyro.conf.OmitArgPrefixes[option_groups.PairOptions]
    adapter: adapting.AdapterOptions = adapting.AdapterOptions()
    optimizer: OptimizerConfig = defaults.LINEAR
    batch_size: PositiveInt = 64
    micro_batches: PositiveInt = 1
    packing: bool = False
    learning_rate: LearningRate | None = None
    loss: LossName = "dpo"
    beta: Positive | None = None
    loss_params: tyro.conf.OmitArgPrefixes[
        loss_options.LossParams  # pyright: ignore[reportInvalidTypeForm] (made from signatures)
    ] = loss_options.LossParams()
    loss_weights: tuple[Finite, ...] = ()
    f_divergence_type: loss_options.Divergence = "reverse_kl"
    rpo_alpha: Weight | None = None
    ld_alpha: Share | None = None
    use_weighting: bool = False
    desirable_weight: Weight = 1.0
    undesirable_weight: Weight = 1.0
    bco_shift: Literal["classes", "rows"] = "classes"
    reference: Literal["stored", "each_step"] = "stored"


ON_SINGLE_RESPONSES = {
    "desirable_weight": tuple(UNPAIRED_LOSSES),
    "undesirable_weight": tuple(UNPAIRED_LOSSES),
    "bco_shift": ("bco",),
}
"""Options by the losses that they mean something to."""
ON_PAIRS = "loss_params", "loss_weights", "f_divergence_type", "rpo_alpha", "ld_alpha", "use_weighting"
SHIFTS = {"classes": losses.class_mean_shift, "rows": losses.row_mean_shift}


def check(options: Options, loss_fn: PairLossFn | None) -> None:
    """Raises: UserError where the options do not fit each other.

    Args:
      loss_fn: on pairs, with all that the options make of it; None for KTO and BCO.
    """
    option_checks.check(options, options.run, "dpo")
    option_checks.check_divides("--micro-batches", options.micro_batches, "--batch-size", options.batch_size)
    traits = PairLossTraits() if loss_fn is None else traits_of(loss_fn)
    if options.micro_batches > 1 and traits.uses_batch_sort:
        raise UserError(f"--loss {options.loss} compares pairs with each other: it needs --micro-batches 1")
    if options.pairs.soft_labels and not traits.uses_soft_labels:
        raise UserError(
            f"--loss {options.loss} has no soft labels: leave --soft-labels out, or take --loss dpo"
        )
    if options.use_weighting and loss_fn is not None and not takes_weights(loss_fn):
        raise UserError(f"--loss {options.loss} has no weights of pairs: leave --use-weighting out")
    unset = {field.name: field.default for field in dataclasses.fields(options)}
    for name, owners in ON_SINGLE_RESPONSES.items():
        if getattr(options, name) != unset[name] and (loss_fn is not None or options.loss not in owners):
            raise UserError(
                f"--{name.replace('_', '-')} means nothing to --loss {options.loss}: it goes with "
                f"{' and '.join(owners)}"
            )
    for name in ON_PAIRS if loss_fn is None else ():
        if getattr(options, name) != unset[name]:
            named = next(iter(loss_options.given(options.loss_params))) if name == "loss_params" else name
            raise UserError(
                f"--{named.replace('_', '-')} goes with losses on pairs: --loss {options.loss} learns from "
                "single responses"
            )


def resolve_loss(options: Options, given: Given) -> tuple[Options, PairLossFn | None, dict[str, float]]:
    """(options with the numbers of the loss filled in, the loss on pairs or None, its numbers).

    Raises:
      UserError: a number that the loss does not have, or other options that do not fit it.
    """
    if given.loss is None and options.loss in UNPAIRED_LOSSES:
        return options, None, {}
    named, weights = loss_options.mixed(given.loss or options.loss, options.loss_weights)
    loss_fn, added = loss_options.with_modifiers(
        named, divergence=options.f_divergence_type, rpo_alpha=options.rpo_alpha
    )
    method = options.loss if given.loss is None else ""
    params = loss_options.filled(options.loss_params, loss_fn, method)
    numbers = {**loss_options.given(params), **weights, **added}
    if given.loss is not None or is_import_path(options.loss):
        loss_options.check_pair_loss(loss_fn, numbers)
    return dataclasses.replace(options, loss_params=params), loss_fn, numbers


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss with its update, its state at step 0, and the batch that it takes.

    Attributes:
      init: (params, key) -> state.
      make_update: (log-prob function) -> `update(state, hyper, batch) -> (state, metrics)`.
      make_batch: (both sides, the reference's log-probs of both, labels) -> batch.
    """

    init: Callable[..., Any]
    make_update: Callable[[LogprobFn], Callable[..., Any]]
    hyper: Any
    make_batch: Callable[..., Any]


def pair_objective(
    options: Options, loss_fn: PairLossFn, numbers: dict[str, float], model: Policy, tx: Any
) -> Objective:
    """DPO and its family, on pairs.

    Args:
      numbers: of the loss, beside beta.
    """
    half = model.make_logprob_fn(temperature=0.5) if options.use_weighting else None
    config = preference.Config(options.micro_batches, loss_fn, half)
    hyper = preference.Hyper(
        jnp.float32(options.learning_rate),
        jnp.float32(options.beta),
        {name: jnp.float32(number) for name, number in numbers.items()},
        None if options.ld_alpha is None else jnp.float32(options.ld_alpha),
    )
    return Objective(
        lambda params, key: preference.init(params, tx, key),
        lambda logprob_fn: preference.make_update(config, logprob_fn, tx),
        hyper,
        lambda rows, ref, labels: preference.Batch(*rows, *ref, preference=labels),
    )


def unpaired_objective(options: Options, loss: str, tx: Any) -> Objective:
    """KTO and BCO, on single responses; KTO's reference point comes from the mismatched ones beside them."""
    config = dataclasses.replace(
        UNPAIRED_LOSSES[loss], micro_batches=options.micro_batches, shift_fn=SHIFTS[options.bco_shift]
    )
    numbers = options.learning_rate, options.beta, options.desirable_weight, options.undesirable_weight

    def make_batch(rows: Sides, ref: tuple[Any, Any], labels: Any) -> unpaired.Batch:
        mismatched = (rows[1], ref[1]) if config.shift_decay is None else (None, None)
        return unpaired.Batch(rows[0], labels, ref[0], *mismatched)

    return Objective(
        lambda params, key: unpaired.init(params, tx, key),
        lambda logprob_fn: unpaired.make_update(config, logprob_fn, tx),
        unpaired.Hyper(*map(jnp.float32, numbers)),
        make_batch,
    )


def reference_logp(
    logprob_fn: LogprobFn,
    params: Params,
    pairs: inputs.Pairs,
    batch_size: int,
    ld_alpha: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The reference's log-probs of the responses on both sides, in nats."""
    score = jax.jit(functools.partial(preference.response_logp, logprob_fn, ld_alpha=ld_alpha))
    parts = [score(params, *pairs.rows(indices)) for indices in inputs.parts(len(pairs), batch_size)]
    first, second = (
        np.concatenate([distributed.all_values(x) for x in side]) for side in zip(*parts, strict=True)
    )
    return first[: len(pairs)], second[: len(pairs)]


def make_learn_fn(
    session: Session, objective: Objective, split: adapting.TrainableSplit
) -> Callable[..., tuple[Any, Metrics]]:
    """`learn(state, original, rows, ref, labels, layouts=()) -> (state, metrics)`, which is to be compiled.

    The reference's log-probs are `ref`, or computed where that is None; `layouts` as in `packed_rows.packed`.
    """
    options, logprob_fn = session.options, session.policy.make_logprob_fn()

    def learn(
        state: Any, original: Params, rows: Sides, ref: Any, labels: Any, layouts: Sequence[Layout] = ()
    ) -> tuple[Any, Metrics]:
        score_fn = packed(logprob_fn, layouts)
        if ref is None:
            reference = split.reference(state.learner, original)
            ref = preference.response_logp(score_fn, reference, *rows, options.ld_alpha)
        update = objective.make_update(score_fn)
        return update(state, objective.hyper, objective.make_batch(rows, ref, labels))

    return learn


def make_step_fn(
    session: Session,
    objective: Objective,
    split: adapting.TrainableSplit,
    state: Any,
    train: inputs.Pairs,
    meter: Meter,
) -> Callable[[Any, int], tuple[Any, Metrics]]:
    """`step(state, number)`, with the reference's log-probs stored, or computed at every step."""
    options, logprob_fn = session.options, session.policy.make_logprob_fn()
    sampler = BatchSampler(len(train), options.batch_size, options.run.seed)
    stored = None
    if options.reference == "stored":
        reference = split.reference(state.learner)
        stored = reference_logp(logprob_fn, reference, train, options.batch_size, options.ld_alpha)
    update = edges.jit_update(make_learn_fn(session, objective, split), state)
    size, parts = options.batch_size, options.micro_batches
    sizes = [2 * size // parts, size, size // parts]  # of both sides together, and of one
    lay_out = edges.make_lay_out_fn(options.packing, session.policy, sizes=sizes)

    def batch(number: int) -> tuple[Any, ...]:
        indices = edges.local_indices(sampler, number)
        ref = None if stored is None else tuple(side[indices] for side in stored)
        labels = None if train.labels is None else train.labels[indices]
        rows, *others = distributed.shard_batch((train.rows(indices), ref, labels))
        return rows, *others, lay_out(*rows)

    def step(state: Any, number: int) -> tuple[Any, Metrics]:
        # With stored log-probs nothing of the reference goes in.
        original = split.original if stored is None else None
        return meter.timed("update", update, state, original, *meter.timed("data", batch, number))

    return step


def make_evaluate_fn(
    options: Options, logprob_fn: LogprobFn, reference: Params, held_out: inputs.Pairs
) -> Callable[[Any, int], dict[str, float]] | None:
    """Evaluation function: accuracy and margin of implicit rewards on held-out pairs."""
    if not len(held_out):
        return None
    ref = reference_logp(logprob_fn, reference, held_out, options.batch_size)

    def evaluate(state: Any, _: int) -> dict[str, float]:
        logp = reference_logp(logprob_fn, state.learner.all_params, held_out, options.batch_size)
        first, second = (options.beta * (ours - theirs) for ours, theirs in zip(logp, ref, strict=True))
        labels = held_out.labels
        if labels is None:
            return {"accuracy": float(np.mean(first > second)), "margin": float(np.mean(first - second))}
        means = [float(np.mean(first[side])) if side.any() else np.nan for side in (labels, ~labels)]
        return {"auc": roc_auc(first, labels), "margin": means[0] - means[1]}

    return evaluate


def prepare(
    options: Options, given: Given = NOTHING
) -> tuple[Session, tuple[inputs.Pairs, inputs.Pairs], Callable[[Any], Objective]]:
    """The run, its pairs (for training, held out), and the objective of an optimizer.

    Everything is checked before anything is read.
    """
    options = defaults.fill_published(options, options.loss, otherwise="dpo")
    options, loss_fn, numbers = resolve_loss(options, given)
    check(options, loss_fn)
    session = Session(options, given, "dpo")
    model = session.policy
    load = inputs.load_labeled if loss_fn is None else inputs.load_pairs
    train, held_out = load(options.pairs, model.tokenizer, options.run.seed, given)
    what = "responses" if loss_fn is None else "pairs"
    session.decide_steps(len(train))
    session.announce(f"{len(train):,} {what}, {len(held_out):,} held out")

    def objective(tx: Any) -> Objective:
        if loss_fn is None:
            return unpaired_objective(options, options.loss, tx)
        return pair_objective(options, loss_fn, numbers, model, tx)

    return session, (train, held_out), objective


def plan(options: Options) -> None:
    """Prints what a step needs, and runs none."""
    planned_runs.show_plan(options, planned_step)


def planned_step(options: Options) -> tuple[Session, Step]:
    """The run, and its step in shapes."""
    session, (train, _), make_objective = prepare(options)
    options, split = session.options, session.split_trainable()
    objective = make_objective(split.tx)
    state = session.init_state(objective.init, split.trained, split.frozen)
    size = options.batch_size
    rows = shapes_of(train.rows(np.zeros(size, np.int32))[0])
    floats = jax.ShapeDtypeStruct((size,), jnp.float32)
    is_stored = options.reference == "stored"
    labels = None if train.labels is None else jax.ShapeDtypeStruct((size,), train.labels.dtype)
    data = (rows, rows), (floats, floats) if is_stored else None, labels
    original = (None if is_stored else split.original,)
    return session, Step(
        make_learn_fn(session, objective, split), state, original, data, reference=split.original
    )


def run(options: Options, given: Given = NOTHING) -> Trained:
    """Trains, and leaves a run folder."""
    session, (train, held_out), make_objective = prepare(options, given)
    options, model = session.options, session.policy
    split = session.split_trainable()
    objective = make_objective(split.tx)
    state = session.init_state(objective.init, split.trained, split.frozen)
    # Both sides, and the reference's pass over them where it is made at every step.
    sizes = {"rows": 2 * options.batch_size, "length": train.length}
    passes = model.forward_flops(**sizes) if options.reference == "each_step" else 0.0
    meter = options.run.meter(model.training_flops(**sizes) + passes)
    step = make_step_fn(session, objective, split, state, train, meter)
    reference = split.reference(state.learner)
    evaluate = make_evaluate_fn(options, model.make_logprob_fn(), reference, held_out)

    state = session.train(
        state,
        step,
        meter=meter,
        data_fingerprint=train.fingerprint(),
        adaptation=split.adaptation,
        evaluate=evaluate,
    )
    return session.finish(state.learner.all_params, state)
