"""GRPO and its family: several answers to each prompt, scored by a verifier and compared with each other.

    rlhf grpo --out runs/grpo --model runs/sft --data gsm8k.jsonl --max-new-tokens 256 \\
        --rewards rlhf_jax.rewards.verifiers:gsm8k_reward my_rewards:short=0.1
    rlhf grpo --out runs/dapo --model runs/sft --data gsm8k.jsonl --rewards my_rewards:exact \\
        --algorithm dapo --num-minibatches 4
    rlhf grpo --out runs/stale --model runs/sft --data gsm8k.jsonl --rewards my_rewards:exact \\
        --algorithm rloo --one-step-off-policy
    rlhf grpo --out runs/steps --model runs/sft --data gsm8k.jsonl --process-reward runs/prm

Rows hold `prompt`, `question` or `messages`; their other fields go to the reward functions by name.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from rlhf_jax import distributed
from rlhf_jax.algorithms import grpo
from rlhf_jax.algorithms.group_advantages import SCALES, most_efficient, shortest
from rlhf_jax.algorithms.grpo_variants import GRPOVariant, find_variant, grpo_variants, make_variant
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.train_state import OptimizerConfig
from rlhf_jax.core.types import Params
from rlhf_jax.generation import Sampling
from rlhf_jax.kernels import kl
from rlhf_jax.losses import policy_ratios, reductions
from rlhf_jax.metrics import Thresholds
from rlhf_jax.models import Policy
from rlhf_jax.rewards.functions import Scored, no_reward
from rlhf_jax.rewards.rules import soft_overlong_reward
from rlhf_jax.rollout.completions import LastCompletions
from rlhf_jax.rollout.dynamic_sampling import Answers, filter_zero_std_groups, term_means
from rlhf_jax.rollout.sampler import completion_texts, single_turn
from rlhf_jax.rollout.step import make_grpo_train_step
from rlhf_jax.stages import adapting, defaults, edges, inputs, option_checks, option_groups
from rlhf_jax.stages.entry import NOTHING, Given, Trained
from rlhf_jax.stages.off_policy_options import OffPolicyOptions, corrected
from rlhf_jax.stages.reward_specs import make_process_reward_fn, make_reward_fn
from rlhf_jax.stages.session import Session
from rlhf_jax.training import Meter

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
      model: run folder of the policy to start from, which is also the reference.
      prompts: which prompts, and what their answers are worth.
      off_policy: corrections for answers that are not the policy's, and masks.
      algorithm: the variant of GRPO.
      batch_size: prompts a step.
      group_size: answers to each.
      num_iterations: passes over each batch of answers.
      num_minibatches: optimizer steps in each pass.
      micro_batches: parts in which a mini-batch is computed, to save memory.
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
        REINFORCE++, RLOO, ReMax, OPO) or in the loss; None for the algorithm's own.
      reward_kl_coef: weight of the KL to the reference in the reward, in any algorithm; None for its own.
      kl_estimator: of the KL in the loss; None for the algorithm's own, k3.
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
    algorithm: AlgorithmName = "grpo"
    batch_size: int = 32
    group_size: int = 8
    num_iterations: int = 1
    num_minibatches: int = 1
    micro_batches: int = 1
    learning_rate: float | None = None
    temperature: float = 1.0
    one_step_off_policy: bool = False
    dynamic_sampling_max_rounds: int | None = None
    overlong_penalty_coef: float | None = None
    epsilon_low: float | None = None
    epsilon_high: float | None = None
    kl_coef: float | None = None
    reward_kl_coef: float | None = None
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    kl_ratio_correction: bool = False
    scale_rewards: Literal["group", "batch", "none", "mean"] | None = None
    importance_sampling_level: Literal["token", "sequence", "sequence_token"] | None = None
    reduction: Literal["token_mean", "sequence_mean", "sequence_sum"] | None = None
    entropy_coef: float = 0.0
    num_kept: int | None = None
    gfpo_metric: Literal["shortest", "most_efficient"] | None = None
    dro_tau: float | None = None
    pass_at: int | None = None

    @property
    def max_completion_length(self) -> int:
        """Tokens of the longest answer."""
        return self.prompts.max_new_tokens

    @property
    def sampler(self) -> dict[str, Any]:
        """What `inputs.make_answer_fn` is told about who writes the answers."""
        return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(GroupOptions):
    """Options of GRPO on single completions.

    Attributes:
      engine: what writes the answers: local (this process), or the server vllm:URL, sglang:URL or openai:URL,
        with #NAME behind it where it does not call the model default. openai servers keep their weights.
      max_num_seqs: answers on their way at a time, each of which makes room for the next; 0 for all at once,
        which reads each prompt once for its whole group.
    """

    engine: str = "local"
    max_num_seqs: int = 0

    @property
    def sampler(self) -> dict[str, Any]:
        """What `inputs.make_answer_fn` is told about who writes the answers."""
        return {"engine": self.engine, "max_num_seqs": self.max_num_seqs}


def rows_of(options: GroupOptions, variant: GRPOVariant) -> tuple[int, str]:
    """Answers of a step that are learned from, and the options that say so."""
    if kept := variant.config.num_kept:
        return options.batch_size * kept, "--batch-size x --num-kept"
    return options.batch_size * options.group_size, "--batch-size x --group-size"


def check(options: GroupOptions, stage: str) -> None:
    """Raises: UserError where the options do not fit each other."""
    option_checks.check(options, options.run, stage)
    variant = variant_of(options)
    rows, of_what = rows_of(options, variant)
    option_checks.check_divides("--num-minibatches", options.num_minibatches, of_what, rows)
    option_checks.check_divides(
        "--micro-batches", options.micro_batches, "the size of a mini-batch,", rows // options.num_minibatches
    )
    rounds = options.dynamic_sampling_max_rounds
    if rounds is not None and rounds < 1:
        raise UserError(f"--dynamic-sampling-max-rounds {rounds} is not positive: give a number above 0")
    options.sync.check((variant.hyper.kl_coef, variant.hyper.reward_kl_coef))
    if variant.needs_terms and variant.overlong_penalty_coef:
        raise UserError(
            f"--overlong-penalty-coef: --algorithm {options.algorithm} takes each reward apart: give "
            "rlhf_jax.rewards.rules:soft_overlong_reward as one of --rewards"
        )
    if variant.dynamic_sampling_max_rounds > 1 and jax.process_count() > 1:
        raise UserError(
            "answers are sampled again in one process only: give --dynamic-sampling-max-rounds 1, or run "
            "without --coordinator"
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
    return {
        "kl_fn": KL_ESTIMATORS.get(options.kl_estimator or ""),
        "advantage_fn": SCALES.get(options.scale_rewards or ""),
        "ratio_fn": RATIOS.get(options.importance_sampling_level or ""),
        "reduce": REDUCTIONS.get(options.reduction or ""),
        "kl_ratio_correction": options.kl_ratio_correction or None,
    }


def own_of(options: GroupOptions) -> dict[str, Any]:
    """What the options give to a variant that is a parameter of its own."""
    metrics = {"shortest": shortest, "most_efficient": most_efficient, None: None}
    given = {
        "--gfpo-metric": ("metric_fn", metrics[options.gfpo_metric]),
        "--dro-tau": ("tau", options.dro_tau),
        "--pass-at": ("k", options.pass_at),
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
    )
    if options.scale_rewards and make().config.advantage_fn not in SCALES.values():
        raise UserError(
            f"--scale-rewards is for algorithms whose baseline is the group's mean, which that of "
            f"--algorithm {options.algorithm} is not: leave it out"
        )
    published = {name: getattr(options, name) for name in PUBLISHED} | options.off_policy.masks
    variant = make(changes=published | parts_of(options) | own_of(options))
    variant = corrected(variant, options.off_policy, one_step_off_policy=options.one_step_off_policy)
    rate = jnp.float32(options.learning_rate)
    hyper = dataclasses.replace(variant.hyper, learning_rate=rate, sync=options.sync.hyper())
    return dataclasses.replace(variant, hyper=hyper)


def update_flops(options: GroupOptions, model: Policy, length: int) -> float:
    """Operations of scoring with policy and reference, and of all epochs, on rows of so many tokens."""
    learned, _ = rows_of(options, variant_of(options))
    scored = 2 * model.forward_flops(rows=options.batch_size * options.group_size, length=length)
    return scored + options.num_iterations * model.training_flops(rows=learned, length=length)


def make_draw_fn(
    session: Session, variant: GRPOVariant, prompts: inputs.Prompts, meter: Meter
) -> Callable[[Params, int], tuple[Answers, dict[str, float]]]:
    """`draw(params, number) -> (answers, metrics)` of a step, a function of its number and of the sampler."""
    options: GroupOptions = session.options
    answer = session.make_answer_fn(
        prompts,
        batch_size=options.batch_size,
        group_size=options.group_size,
        temperature=options.temperature,
        meter=meter,
        **options.sampler,
    )
    describe_fn = prompts.rollout_fns.describe_fn if prompts.rollout_fns else lambda _: {}
    rounds, coef = variant.dynamic_sampling_max_rounds, variant.overlong_penalty_coef
    penalty_fn = make_reward_fn([(soft_overlong_reward, coef)], session.policy.tokenizer)

    def draw(params: Params, number: int) -> tuple[Answers, dict[str, float]]:
        metrics: dict[str, float] = {}
        if rounds == 1:
            answers = answer(params, number)
        else:
            answers, metrics = filter_zero_std_groups(
                lambda again: answer(params, number * rounds + again),
                groups=options.batch_size,
                group_size=options.group_size,
                most=rounds,
            )
        if coef:
            penalties = penalty_fn(answers.rollout, answers.prompts)
            metrics["overlong"] = float(np.mean(penalties))
            scored = dataclasses.replace(answers.scored, rewards=answers.rewards + penalties)
            answers = dataclasses.replace(answers, scored=scored)
        metrics |= {name: float(np.mean(values)) for name, values in describe_fn(answers.rollout).items()}
        return answers, {**metrics, **term_means(answers.scored)}

    return draw


def make_greedy_fn(session: Session, prompts: inputs.Prompts) -> Callable[[Params, Answers], Scored]:
    """`greedy(params, answers)`: rewards [N] of the most likely answers to the same prompts, for ReMax."""
    options: GroupOptions = session.options
    fns = prompts.rollout_fns or single_turn(session.policy, max_new_tokens=options.prompts.max_new_tokens)
    generate = fns.make_generate_fn(prompts.length, Sampling(temperature=0.0))
    reward_fn = make_reward_fn(session.rewards, session.policy.tokenizer, fns)

    def greedy(params: Params, answers: Answers) -> Scored:
        chosen = answers.prompts[:: options.group_size]
        return reward_fn.score(generate(params, chosen, jax.random.key(0)), chosen)

    return greedy


def run(options: Options, given: Given = NOTHING) -> Trained:
    """Trains, and leaves a run folder."""
    options = defaults.fill_published(options, "grpo")
    check(options, "grpo")
    if options.max_num_seqs < 0:
        raise UserError(f"--max-num-seqs {options.max_num_seqs} is below 0: give 0 for all at once")
    check_rewards(options, given)
    session = Session(options, given, "grpo")
    prompts = session.load_prompts()
    session.decide_steps(len(prompts))
    session.announce(f"{len(prompts):,} prompts")
    return train(session, prompts)


def train(session: Session, prompts: inputs.Prompts) -> Trained:
    """Training on groups of answers, from prompts to the finished run folder.

    Args:
      session: whose options are `GroupOptions`.
    """
    options, model, given = session.options, session.policy, session.given
    if not session.rewards:  # of whole answers; those of steps come beside them
        session.given = dataclasses.replace(given, rewards=(no_reward,))
    variant = variant_of(options)
    steps_fn = make_process_reward_fn(options.process, model.tokenizer, given.process_reward)
    if variant.needs_terms:
        weights = [term.weight for term in make_reward_fn(session.rewards, model.tokenizer).terms]
        hyper = dataclasses.replace(variant.hyper, reward_weights=jnp.asarray(weights, jnp.float32))
        variant = dataclasses.replace(variant, hyper=hyper)
    meter = options.run.meter(update_flops(options, model, prompts.length + options.max_completion_length))
    draw = make_draw_fn(session, variant, prompts, meter)
    greedy = make_greedy_fn(session, prompts)
    logprob_fn = model.make_logprob_fn(temperature=options.temperature)
    split = session.split_trainable(options.num_iterations * options.num_minibatches)
    evaluate = prompts.evaluate
    train_step = make_grpo_train_step(
        variant.config, logprob_fn, split.tx, split.reference, describes_rows=True
    )
    texts_fn = prompts.rollout_fns.answer_texts_fn if prompts.rollout_fns else completion_texts
    completions = LastCompletions(model.tokenizer, texts_fn)
    state = session.init_state(
        lambda *x: grpo.init(
            x[0],
            split.tx,
            x[1],
            one_step_off_policy=options.one_step_off_policy,
            moving_reference=options.sync.ref_model_sync_steps > 0,
        ),
        split.trained,
        split.frozen,
    )
    learn = edges.jit_update(lambda state, *data: train_step(state, variant.hyper, *data), state)

    def step(state: grpo.State, number: int):
        answers, drawn = draw(state.rollout_params, number)
        scored, greedy_rewards = ~answers.scored.unscorable, None
        if variant.needs_greedy:
            compared = greedy(state.rollout_params, answers)
            greedy_rewards = compared.rewards
            scored &= np.repeat(~compared.unscorable, options.group_size)  # no baseline, nothing to learn
        terms = np.stack([*answers.scored.terms.values()], axis=1) if variant.needs_terms else None
        rewards = distributed.shard_batch([answers.rewards, scored, greedy_rewards])
        steps = steps_fn and meter.timed("reward", steps_fn, answers.rollout)
        data = (split.original, answers.rollout, *rewards, steps, distributed.shard_batch(terms))
        state, metrics = meter.timed("update", learn, state, *data)
        metrics = completions.keep(answers.prompts, answers.rollout, answers.scored, metrics)
        return state, {**metrics, **drawn}

    # One step off policy, sampler and trainer differ by design.
    thresholds = Thresholds(sampling_logp_diff=math.inf) if options.one_step_off_policy else Thresholds()
    before = prompts.answer(model.params)
    state = session.train(
        state,
        step,
        meter=meter,
        data_fingerprint=prompts.fingerprint(),
        adaptation=split.adaptation,
        evaluate=evaluate
        and (lambda state, _: evaluate(state.learner.all_params, split.reference(state.learner)).metrics()),
        thresholds=thresholds,
        completions=completions,
    )
    after = prompts.answer(state.learner.all_params)
    samples = inputs.before_and_after(str(options.algorithm), before, after)
    return session.finish(state.learner.all_params, state, samples)
