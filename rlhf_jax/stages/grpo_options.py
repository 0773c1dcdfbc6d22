"""Options of the GRPO family: which variant they name, what they change in it, and whether they fit."""

import dataclasses
import functools
import inspect
from pathlib import Path
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import tyro

from rlhf_jax.algorithms.group_advantages import SCALES, check_rows, most_efficient, shortest
from rlhf_jax.algorithms.grpo_variants import GRPOVariant, find_variant, grpo_variants, make_variant
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.ranges import (
    LearningRate,
    Positive,
    PositiveInt,
    PositiveOrInf,
    Temperature,
    Weight,
)
from rlhf_jax.core.train_state import OptimizerConfig
from rlhf_jax.kernels import kl
from rlhf_jax.losses import policy_ratios, reductions
from rlhf_jax.stages import adapting, defaults, inputs, option_checks, option_groups
from rlhf_jax.stages.entry import Given
from rlhf_jax.stages.off_policy_options import OffPolicyOptions, corrected
from rlhf_jax.stages.variant_options import ReplayOptions, VariantOptions

RATIOS = {
    "token": policy_ratios.token_log_ratio,
    "sequence": policy_ratios.sequence_log_ratio,
    "sequence_token": policy_ratios.sequence_token_log_ratio,
}
KL_ESTIMATORS = {"k1": kl.k1, "k2": kl.k2, "k3": kl.k3}
REDUCTIONS = {
    "token_mean": reductions.token_mean,
    "sequence_mean": reductions.sequence_mean,
    "sequence_sum": reductions.sequence_sum,
}
AlgorithmName = Annotated[
    str,
    tyro.conf.arg(
        metavar="NAME",
        help=f"sets advantage, surrogate and bounds: {', '.join(grpo_variants())}; or a variant of your "
        "own by its path module:function.",
    ),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupOptions:
    """Options of the GRPO family, wherever answers come from; None is what the algorithm is published with.

    Attributes:
      model: the policy to start from, which is also the reference: a run folder, a Hugging Face folder, a
        GGUF file or a name in the hub cache.
      prompts: which prompts, and what their answers are worth.
      off_policy: corrections for answers that are not the policy's, and masks.
      variant: parts that single variants have.
      replay: groups that are learned from again.
      algorithm: the variant of GRPO.
      batch_size: prompts a step.
      group_size: answers to each.
      num_iterations: passes over each batch of answers.
      num_minibatches: optimizer steps in each pass.
      micro_batches: parts in which a mini-batch is computed, to save memory.
      packing: score answers, and learn from them, several in a row of tokens, without their padding; losses
        and gradients are the same. Each new number of rows is compiled once.
      learning_rate: at its peak; None for the published one (1e-6, with an adapter 1e-5).
      temperature: of sampling; the scorer uses the same.
      one_step_off_policy: answers are sampled from the policy of one step before, as by a sampler beside the
        trainer (asynchronous rollouts).
      dynamic_sampling_max_rounds: rounds of sampling in a step at most, until the batch is full of prompts
        whose answers differ in reward; None for 8 with DAPO, and one round with the others.
      overlong_penalty_coef: weight of the penalty on answers in the last fifth of the length, which does not
        count where answers are asked to differ; None for 1 with DAPO, and 0 with the others.
      epsilon_low: how far below 1 a ratio may go; None for the algorithm's own.
      epsilon_high: how far above 1; None for the algorithm's own.
      kl_coef: weight of the KL to the reference, where the algorithm has it: in the reward (REINFORCE,
        REINFORCE++, RLOO, ReMax, OPO) or in the loss; None for the algorithm's own. Where nothing weighs it,
        the reference is not asked, and `kl` is measured on held-out prompts alone.
      reward_kl_coef: weight of the KL to the reference in the reward, in any algorithm; None for its own.
      advantage_kl_coef: weight of the KL to the reference in each token's advantage, behind baseline and
        scaling; None for none.
      kl_estimator: of the KL in the loss: from the token that was sampled (k1, k2, k3), or exact, of the
        distributions at each place; None for the algorithm's own, k3.
      kl_top_k: tokens that the exact KL tells apart, the reference's likeliest, all others being one more;
        None for the whole vocabulary.
      kl_ratio_correction: multiply the KL in the loss by the ratio, so that its gradient is that of the KL.
      scale_rewards: what rewards less their group's mean are divided by: the deviation of the group or of the
        batch, nothing, or the group's mean (MaxRL); None for the algorithm's own.
      importance_sampling_level: of what the ratio is: a token, an answer (GSPO), or an answer in value and a
        token in gradient; None for the algorithm's own.
      reduction: how tokens become one number: the mean over all tokens, over answers of the mean over their
        tokens, or of the sum; None for the algorithm's own.
      entropy_coef: weight of the entropy bonus.
      num_kept: answers to each prompt that are learned from: those of largest advantage (CPPO), or those that
        gfpo prefers; None for half of them with cppo and gfpo, and all with the others.
      gfpo_metric: what gfpo prefers; None for the shortest.
      dro_tau: how strongly dro holds an answer to where it was; None for 1.
      pass_at: size of the sets of pass_at_k; None for 2.
    """

    run: tyro.conf.OmitArgPrefixes[option_groups.RunOptions] = option_groups.RunOptions(Path("runs/grpo"))
    model: str
    prompts: tyro.conf.OmitArgPrefixes[option_groups.PromptOptions]
    completions: tyro.conf.OmitArgPrefixes[option_groups.CompletionOptions] = (
        option_groups.CompletionOptions()
    )
    adapter: adapting.AdapterOptions = adapting.AdapterOptions()
    optimizer: OptimizerConfig = defaults.LINEAR
    process: tyro.conf.OmitArgPrefixes[option_groups.ProcessOptions] = option_groups.ProcessOptions()
    sync: tyro.conf.OmitArgPrefixes[option_groups.SyncOptions] = option_groups.SyncOptions()
    off_policy: tyro.conf.OmitArgPrefixes[OffPolicyOptions] = OffPolicyOptions()
    variant: tyro.conf.OmitArgPrefixes[VariantOptions] = VariantOptions()
    replay: tyro.conf.OmitArgPrefixes[ReplayOptions] = ReplayOptions()
    algorithm: AlgorithmName = "grpo"
    batch_size: PositiveInt = 32
    group_size: PositiveInt = 8
    num_iterations: PositiveInt = 1
    num_minibatches: PositiveInt = 1
    micro_batches: PositiveInt = 1
    packing: bool = False
    learning_rate: LearningRate | None = None
    temperature: Temperature = 1.0
    one_step_off_policy: bool = False
    dynamic_sampling_max_rounds: PositiveInt | None = None
    overlong_penalty_coef: Weight | None = None
    epsilon_low: PositiveOrInf | None = None
    epsilon_high: PositiveOrInf | None = None
    kl_coef: Weight | None = None
    reward_kl_coef: Weight | None = None
    advantage_kl_coef: Weight | None = None
    kl_estimator: Literal["k1", "k2", "k3", "exact"] | None = None
    kl_top_k: PositiveInt | None = None
    kl_ratio_correction: bool = False
    scale_rewards: Literal["group", "batch", "none", "mean"] | None = None
    importance_sampling_level: Literal["token", "sequence", "sequence_token"] | None = None
    reduction: Literal["token_mean", "sequence_mean", "sequence_sum"] | None = None
    entropy_coef: Weight = 0.0
    num_kept: PositiveInt | None = None
    gfpo_metric: Literal["shortest", "most_efficient"] | None = None
    dro_tau: Positive | None = None
    pass_at: PositiveInt | None = None

    @property
    def max_completion_length(self) -> int:
        """Tokens of the longest answer."""
        return self.prompts.max_new_tokens

    @property
    def sampler(self) -> dict[str, Any]:
        """Sampler settings for `inputs.make_answer_fn`."""
        return {}


def rows_of(options: GroupOptions, variant: GRPOVariant) -> tuple[int, str]:
    """Answers of a step that are learned from, and the options that say so."""
    kept, replayed = variant.config.num_kept, variant.config.num_replayed
    groups = "(1 + --replay-share) x --batch-size" if replayed else "--batch-size"
    rows, of_group = (kept, "--num-kept") if kept else (options.group_size, "--group-size")
    return (options.batch_size + replayed) * rows, f"{groups} x {of_group}"


def check(options: GroupOptions, stage: str) -> None:
    """Raises: UserError where the options do not fit each other."""
    option_checks.check(options, options.run, stage)
    variant = variant_of(options)
    check_rows(variant.config.advantage_fn, options.batch_size * options.group_size)
    rows, of_what = rows_of(options, variant)
    option_checks.check_divides("--num-minibatches", options.num_minibatches, of_what, rows)
    option_checks.check_divides(
        "--micro-batches", options.micro_batches, "the size of a mini-batch,", rows // options.num_minibatches
    )
    options.replay.check(options.batch_size)
    if options.packing and variant.config.num_replayed:
        raise UserError("--packing: answers of --replay-share have lengths of other steps: leave one out")
    hyper = variant.hyper
    options.sync.check((hyper.kl_coef, hyper.reward_kl_coef, hyper.advantage_kl_coef or 0.0))
    if variant.needs_terms and variant.overlong_penalty_coef:
        raise UserError(
            f"--overlong-penalty-coef: --algorithm {options.algorithm} takes each reward apart: give "
            "rlhf_jax.rewards.rules:soft_overlong_reward as one of --rewards"
        )


def check_rewards(options: GroupOptions, given: Given) -> None:
    """Raises: UserError where nothing says what an answer is worth, or only its steps have a worth, by which
    groups cannot be told apart.
    """
    rewards = inputs.rewards_of(options.prompts, given)
    if not (options.process.process_reward or given.process_reward):
        option_checks.check_rewards(rewards, " or --process-reward")
    if not rewards and variant_of(options).dynamic_sampling_max_rounds > 1:
        raise UserError(
            "answers are sampled again where --rewards does not tell them apart: give --rewards, or "
            "--dynamic-sampling-max-rounds 1"
        )


PUBLISHED = (
    "epsilon_low",
    "epsilon_high",
    "kl_coef",
    "reward_kl_coef",
    "advantage_kl_coef",
    "entropy_coef",
    "dynamic_sampling_max_rounds",
    "overlong_penalty_coef",
    "num_kept",
)
"""Options that are the variant's own where they are None."""


def parts_of(options: GroupOptions) -> dict[str, Any]:
    """Functions that the options put in the place of the variant's own."""
    if options.kl_estimator == "k1" and not options.kl_ratio_correction:
        raise UserError("--kl-estimator k1 has no gradient on average: add --kl-ratio-correction, or take k3")
    if options.kl_estimator == "exact" and options.kl_ratio_correction:
        raise UserError(
            "--kl-ratio-correction is of what one token estimates: leave it out of --kl-estimator exact"
        )
    if options.kl_estimator == "exact" and options.replay.replay_share:
        raise UserError("--kl-estimator exact: groups of --replay-share keep no distributions: leave one out")
    if options.kl_top_k is not None and options.kl_estimator != "exact":
        raise UserError("--kl-top-k is of --kl-estimator exact: give both or none")
    return {
        "kl_fn": KL_ESTIMATORS.get(options.kl_estimator or ""),
        "advantage_fn": SCALES.get(options.scale_rewards or ""),
        "ratio_fn": RATIOS.get(options.importance_sampling_level or ""),
        "reduce": REDUCTIONS.get(options.reduction or ""),
        "kl_ratio_correction": options.kl_ratio_correction or None,
    }


def own_of(options: GroupOptions) -> dict[str, Any]:
    """Parameters of a variant's own that the options give."""
    metrics = {"shortest": shortest, "most_efficient": most_efficient, None: None}
    given = {
        "--gfpo-metric": ("metric_fn", metrics[options.gfpo_metric]),
        "--dro-tau": ("tau", options.dro_tau),
        "--pass-at": ("k", options.pass_at),
        **options.variant.parameters,
    }
    known = inspect.signature(find_variant(options.algorithm)).parameters
    for flag, (name, value) in given.items():
        if value is not None and name not in known:
            raise UserError(f"{flag} is no parameter of --algorithm {options.algorithm}: leave it out")
    return dict(given.values())


def variant_of(options: GroupOptions) -> GRPOVariant:
    """The variant with what the options change in it."""
    make = functools.partial(
        make_variant,
        options.algorithm,
        max_completion_length=options.max_completion_length,
        group_size=options.group_size,
        num_iterations=options.num_iterations,
        num_minibatches=options.num_minibatches,
        micro_batches=options.micro_batches,
        num_replayed=options.replay.count(options.batch_size),
    )
    if options.scale_rewards and make().config.advantage_fn not in SCALES.values():
        raise UserError(
            f"--scale-rewards is for algorithms whose baseline is the group's mean, which that of "
            f"--algorithm {options.algorithm} is not: leave it out"
        )
    published = {name: getattr(options, name) for name in PUBLISHED}
    published |= options.off_policy.masks | options.variant.leaves
    variant = make(changes=published | parts_of(options) | own_of(options))
    variant = corrected(variant, options.off_policy, one_step_off_policy=options.one_step_off_policy)
    options.variant.check(variant)
    rate = jnp.float32(options.learning_rate)
    hyper = dataclasses.replace(variant.hyper, learning_rate=rate, sync=options.sync.hyper())
    return dataclasses.replace(variant, hyper=hyper)
