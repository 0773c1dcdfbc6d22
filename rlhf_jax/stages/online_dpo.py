"""Online preferences: two answers to each prompt, one of them preferred, and a policy that learns from that.

    rlhf online-dpo --out runs/online_dpo --model runs/sft --data my.jsonl --rewards my_rewards:exact
    rlhf online-dpo --out runs/xpo --model runs/sft --data my.jsonl --method xpo --rewards runs/reward_model
    rlhf online-dpo --out runs/nash --model runs/sft --data my.jsonl --method nash_md --judge judges:short

Which answer is preferred is what the rewards say, or a judge who sees both. Rows hold `prompt`, `question` or
`messages`; their other fields go to the reward functions or the judge by name.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import tyro

from rlhf_jax import distributed, losses
from rlhf_jax.algorithms import nash_md, preference, selection
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.importing import is_import_path
from rlhf_jax.core.masks import masked_sum
from rlhf_jax.core.protocols import LogprobFn
from rlhf_jax.core.ranges import LearningRate, Positive, PositiveInt, Share, Temperature
from rlhf_jax.core.train_state import OptimizerConfig
from rlhf_jax.core.types import Array, Bool, Float, Metrics, Params, Rollout
from rlhf_jax.data.pipeline import BatchSampler
from rlhf_jax.feedback.pairwise import CompareFn, compare_by_judge, compare_by_rewards
from rlhf_jax.generation import Sampling
from rlhf_jax.losses.pair_logps import PairLossFn, traits_of
from rlhf_jax.models import Policy
from rlhf_jax.rollout.completions import PER_ROW, LastCompletions, describe_rows
from rlhf_jax.rollout.engines import failed_rows
from rlhf_jax.rollout.sampler import make_generate_fn
from rlhf_jax.stages import (
    adapting,
    defaults,
    edges,
    inputs,
    loss_options,
    option_checks,
    option_groups,
)
from rlhf_jax.stages.entry import NOTHING, Given, Trained
from rlhf_jax.stages.reward_specs import make_reward_fn
from rlhf_jax.stages.session import Session

LossName = Annotated[
    str,
    tyro.conf.arg(
        metavar="NAME",
        help=f"what dpo makes of the pairs: {', '.join(preference.pair_losses())}, or a loss of your own by "
        "its path module:function.",
    ),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of online preference optimisation.

    Attributes:
      model: the policy to start from, which is also the reference: a run folder, a Hugging Face folder, a
        GGUF file or a name in the hub cache.
      prompts: which prompts, and what their answers are worth.
      method: who writes the other answer: dpo the policy again, xpo the reference (with optimism), nash_md
        the mixture of the two.
      loss: what dpo makes of the pairs.
      judge: a function by path that says how probably a completion is preferred to its opponent; empty for
        the rewards.
      batch_size: prompts a step, two answers to each.
      micro_batches: parts in which a batch is computed, to save memory.
      learning_rate: at its peak; None for the published one of the method or of --loss (5e-7, with an adapter
        5e-6).
      temperature: of sampling; the scorer uses the same.
      engine: what writes the answers: local (this process), or the server vllm:URL, sglang:URL or openai:URL,
        with #NAME behind it where it does not call the model default. openai servers keep their weights.
      beta: strength of the KL constraint, per nat; None for the published one of the method or of --loss
        (0.1).
      loss_params: the numbers of the loss; alpha is xpo's weight of the optimism.
      mixture_coef: share of the reference in the opponent of nash_md.
      noise: difference of rewards at which one answer is preferred with probability 73 %; only nash_md minds
        by how much.
    """

    run: tyro.conf.OmitArgPrefixes[option_groups.RunOptions] = option_groups.RunOptions(
        Path("runs/online_dpo")
    )
    model: str
    prompts: tyro.conf.OmitArgPrefixes[option_groups.PromptOptions]
    completions: tyro.conf.OmitArgPrefixes[option_groups.CompletionOptions] = (
        option_groups.CompletionOptions()
    )
    adapter: adapting.AdapterOptions = adapting.AdapterOptions()
    optimizer: OptimizerConfig = defaults.LINEAR
    method: Literal["dpo", "xpo", "nash_md"] = "dpo"
    loss: LossName = "dpo"
    judge: str = ""
    batch_size: PositiveInt = 128
    micro_batches: PositiveInt = 1
    learning_rate: LearningRate | None = None
    temperature: Temperature = 1.0
    engine: str = "local"
    beta: Positive | None = None
    loss_params: tyro.conf.OmitArgPrefixes[
        loss_options.LossParams  # pyright: ignore[reportInvalidTypeForm] (made from signatures)
    ] = loss_options.LossParams()
    mixture_coef: Share = 0.125
    noise: Positive = 0.25


METHOD_OF = {"loss": "dpo", "mixture_coef": "nash_md", "noise": "nash_md"}


def check(options: Options) -> None:
    """Raises: UserError where the options do not fit each other."""
    option_checks.check(options, options.run, "online_dpo")
    option_checks.check_divides("--micro-batches", options.micro_batches, "--batch-size", options.batch_size)
    if options.method == "nash_md" and loss_options.given(options.loss_params):
        name = next(iter(loss_options.given(options.loss_params)))
        raise UserError(f"--{name.replace('_', '-')} means nothing to --method nash_md: leave it out")
    if options.micro_batches > 1 and traits_of(preference.find_pair_loss(options.loss)).uses_batch_sort:
        raise UserError(f"--loss {options.loss} compares pairs with each other: it needs --micro-batches 1")
    unset = {field.name: field.default for field in dataclasses.fields(options)}
    for name, method in METHOD_OF.items():
        if getattr(options, name) != unset[name] and options.method != method:
            raise UserError(
                f"--{name.replace('_', '-')} means nothing to --method {options.method}: leave it out"
            )
    if options.judge and options.prompts.rewards:
        raise UserError("--judge excludes --rewards: give one; --eval-reward is for evaluation")


# The two answers ------------------------------------------------------------------------------------


def make_sample_completions_fn(
    options: Options, model: Policy, prompts: inputs.Prompts, reference: Callable[[Any], Params]
) -> Callable[..., tuple[Rollout, Rollout]]:
    """`write(state, chosen, key) -> (first, second)`: the policy's answers, and those of its opponent."""

    shared: dict[str, Any] = {
        "prompt_length": prompts.length,
        "num_images": prompts.num_images,
        "max_new_tokens": options.prompts.max_new_tokens,
        "sampling": Sampling(temperature=options.temperature),
    }
    generate = inputs.make_sampler(options.engine, model, folder=options.run.out, **shared)
    generate_other = generate
    if options.method == "nash_md":  # a server knows no mixture of two models
        fns = nash_md.mixture_fns(model.prefill, model.decode, mixture_coef=options.mixture_coef)
        generate_other = make_generate_fn(model, decode_fns=fns, **shared)
    elif options.method == "xpo" and options.engine != "local":  # weights would go to and fro
        generate_other = make_generate_fn(model, **shared)

    def write(state: Any, chosen: list[Any], key: jax.Array) -> tuple[Rollout, Rollout]:
        policy, ref = state.learner.all_params, reference(state)
        opponent = {"dpo": policy, "xpo": ref, "nash_md": (policy, ref)}[options.method]
        keys = jax.random.split(key)
        return generate(policy, chosen, keys[0]), generate_other(opponent, chosen, keys[1])

    return write


# What is made of them -------------------------------------------------------------------------------


def describe(first: Rollout, ref_logp: Float[Array, "N T"]) -> Metrics:
    """The policy's answers, by what the sampler and the reference said of their tokens."""
    mask = first.sequences.mask
    of_rows = describe_rows(None, first.logp, ref_logp, mask)
    return {
        "kl": jnp.mean(of_rows[f"{PER_ROW}kl"]),
        "length": jnp.mean(jnp.sum(mask, axis=1)),
        "finished": jnp.mean(first.finished),
        "tokens": jnp.sum(mask),
        **of_rows,
    }


def loss_fn_of(options: Options) -> PairLossFn:
    """The loss on pairs of online DPO and XPO."""
    return losses.xpo_loss if options.method == "xpo" else preference.find_pair_loss(options.loss)


def pair_update(options: Options, logprob_fn: LogprobFn, tx: Any) -> tuple[Callable[..., Any], Any]:
    """(init, learn) of online DPO and XPO: learn(state, reference, first, second, preference, scored)."""
    is_xpo = options.method == "xpo"
    loss_fn = loss_fn_of(options)
    numbers = {name: jnp.float32(x) for name, x in loss_options.given(options.loss_params).items()}
    hyper = preference.Hyper(jnp.float32(options.learning_rate), jnp.float32(options.beta), numbers)
    update = preference.make_update(preference.Config(options.micro_batches, loss_fn), logprob_fn, tx)

    def learn(
        state: preference.State, reference: Params, first: Rollout, second: Rollout, wins: Any, scored: Any
    ):
        first_wins: Bool[Array, " N"] = wins > 0.5
        pairs = selection.judged(first.sequences, second.sequences, first_wins)
        counts = scored & (wins != 0.5)
        by_token, mask = preference.token_logps(logprob_fn, reference, first.sequences, second.sequences)
        ours, theirs = jnp.split(masked_sum(by_token, mask, axis=1), 2)
        batch = preference.Batch(
            pairs.chosen,
            pairs.rejected,
            jnp.where(first_wins, ours, theirs),
            jnp.where(first_wins, theirs, ours),
            counts,
            chosen_from_ref=~first_wins if is_xpo else None,
        )
        state, metrics = update(state, hyper, batch)
        ref_logp, _ = jnp.split(by_token, 2)
        return state, {**metrics, **describe(first, ref_logp), "ties": jnp.mean(~counts)}

    return lambda params, key: preference.init(params, tx, key), learn


def nash_update(options: Options, logprob_fn: LogprobFn, tx: Any) -> tuple[Callable[..., Any], Any]:
    """(init, learn) of Nash-MD."""
    hyper = nash_md.Hyper(jnp.float32(options.learning_rate), jnp.float32(options.beta), options.mixture_coef)
    update = nash_md.make_update(nash_md.Config(options.micro_batches), logprob_fn, tx)

    def learn(
        state: nash_md.State, reference: Params, first: Rollout, second: Rollout, wins: Any, scored: Any
    ):
        del second
        sequences = first.sequences
        ref_logp = logprob_fn(reference, sequences).logp
        whole = masked_sum(ref_logp, sequences.mask, axis=-1)
        state, metrics = update(state, hyper, nash_md.Batch(sequences, whole, wins, scored))
        return state, {**metrics, **describe(first, ref_logp)}

    return lambda params, key: nash_md.init(params, tx, key), learn


def make_compare_fn(options: Options, model: Policy, given: Given = NOTHING) -> CompareFn:
    """The judge, or the rewards."""
    if options.judge:
        return compare_by_judge(options.judge, model.tokenizer)
    rewards, calls = inputs.rewards_of(options.prompts, given), options.prompts.reward_calls
    return compare_by_rewards(make_reward_fn(rewards, model.tokenizer, calls=calls), noise=options.noise)


def run(options: Options, given: Given = NOTHING) -> Trained:
    """Trains, and leaves a run folder."""
    published = "online_dpo" if options.loss == "dpo" else options.loss
    published = published if options.method == "dpo" else options.method
    options = defaults.fill_published(options, published, otherwise="online_dpo")
    if options.method != "nash_md":
        method = options.loss if options.method == "dpo" else options.method
        params = loss_options.filled(options.loss_params, loss_fn_of(options), method)
        options = dataclasses.replace(options, loss_params=params)
        if is_import_path(options.loss):
            loss_options.check_pair_loss(loss_fn_of(options), loss_options.given(params))
    seed = options.run.seed
    check(options)
    if not options.judge:
        option_checks.check_rewards(inputs.rewards_of(options.prompts, given), " or --judge")
    session = Session(options, given, "online_dpo")
    model, prompts = session.policy, session.load_prompts()
    sampler = BatchSampler(len(prompts), options.batch_size, seed)
    compare = make_compare_fn(options, model, given)
    session.decide_steps(len(prompts))
    session.announce(f"{len(prompts):,} prompts")

    split = session.split_trainable()
    logprob_fn = model.make_logprob_fn(temperature=options.temperature)
    make_update = nash_update if options.method == "nash_md" else pair_update
    init, learn_from = make_update(options, logprob_fn, split.tx)
    state = session.init_state(init, split.trained, split.frozen)
    write = make_sample_completions_fn(options, model, prompts, lambda state: split.reference(state.learner))
    evaluate, rollout_key = prompts.evaluate, jax.random.key(seed + 1)

    def learn(state: Any, original: Params, first: Rollout, second: Rollout, *compared: Array):
        return learn_from(state, split.reference(state.learner, original), first, second, *compared)

    learn = edges.jit_update(learn, state)
    meter, completions = options.run.meter(), LastCompletions(model.tokenizer)

    def step(state: Any, number: int):
        chosen = [prompts.train[i] for i in edges.local_indices(sampler, number)]
        answers = meter.timed("rollout", write, state, chosen, jax.random.fold_in(rollout_key, number))
        with meter.timing("reward"):
            compared = compare(chosen, *answers)
        scored = compared.scored
        if options.engine != "local":
            scored = scored & ~failed_rows(answers[0]) & ~failed_rows(answers[1])
        judged = distributed.shard_batch((compared.preference, scored))
        state, metrics = meter.timed("update", learn, state, split.original, *answers, *judged)
        first, second = answers
        compared_with = {"opponents": second, "fields": {"preference": compared.preference.tolist()}}
        metrics = completions.keep(chosen, first, compared.first, metrics, **compared_with)
        won = compared.preference[scored].mean() if scored.any() else 0.5
        return state, {**metrics, **compared.metrics, "win_rate": won}

    before = prompts.answer(model.params)
    state = session.train(
        state,
        step,
        meter=meter,
        data_fingerprint=prompts.fingerprint(),
        adaptation=split.adaptation,
        evaluate=evaluate
        and (lambda state, _: evaluate(state.learner.all_params, split.reference(state.learner)).metrics()),
        completions=completions,
    )
    after = prompts.answer(state.learner.all_params)
    samples = inputs.before_and_after(options.method, before, after)
    return session.finish(state.learner.all_params, state, samples)
