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
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import distributed
from rlhf_jax.algorithms import grpo
from rlhf_jax.algorithms.grpo_variants import GRPOVariant
from rlhf_jax.algorithms.replay import init_replay
from rlhf_jax.core import files
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.ranges import Count
from rlhf_jax.core.types import Array, Metrics, Params, PRNGKeyArray, Rollout, Sequences, StepRewards
from rlhf_jax.data.content_parts import refuse_images
from rlhf_jax.data.examples import PromptExample
from rlhf_jax.generation import Sampling
from rlhf_jax.kernels.baselines import optimal_values
from rlhf_jax.metrics import Thresholds
from rlhf_jax.models import Policy
from rlhf_jax.models.routing_replay import recorded_shape
from rlhf_jax.planning.steps import Step, rollout_shapes
from rlhf_jax.rewards.functions import Scored, no_reward
from rlhf_jax.rewards.rules import soft_overlong_reward
from rlhf_jax.rollout.completions import LastCompletions
from rlhf_jax.rollout.dynamic_sampling import Answers, filter_zero_std_groups, term_means
from rlhf_jax.rollout.sampler import answer_all, completion_texts, single_turn
from rlhf_jax.rollout.step import make_grpo_train_step
from rlhf_jax.stages import adapting, defaults, edges, inputs, planned_runs
from rlhf_jax.stages.entry import NOTHING, Given, Trained
from rlhf_jax.stages.grpo_options import GroupOptions, check, check_rewards, rows_of, variant_of
from rlhf_jax.stages.reward_specs import make_process_reward_fn, make_reward_fn, model_folders
from rlhf_jax.stages.session import Session
from rlhf_jax.training import Meter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(GroupOptions):
    """Options of GRPO on single completions.

    Attributes:
      engine: what writes the answers: local (this process), or the server vllm:URL, sglang:URL or openai:URL,
        with #NAME behind it where it does not call the model default. openai servers keep their weights.
      max_num_seqs: answers on their way at a time, each of which makes room for the next; 0 for all at once,
        which reads each prompt once for its whole group.
      routing_replay: of a mixture of experts: updates take each token through the experts that it went
        through when it was sampled (R3).
    """

    engine: str = "local"
    max_num_seqs: Count = 0
    routing_replay: bool = False

    @property
    def sampler(self) -> dict[str, Any]:
        """Sampler settings for `inputs.make_answer_fn`."""
        return {
            "engine": self.engine,
            "max_num_seqs": self.max_num_seqs,
            "routing_replay": self.routing_replay,
        }


def check_routing_replay(options: Options) -> None:
    """Raises: UserError where the sampler cannot record experts."""
    if options.engine != "local":
        raise UserError(
            f"--routing-replay: the server of --engine {options.engine} does not tell which experts a token "
            "went through: leave one of the two out"
        )


def update_flops(options: GroupOptions, model: Policy, length: int) -> float:
    """Operations of scoring with policy and reference, and of all epochs, on rows of so many tokens."""
    variant = variant_of(options)
    learned, _ = rows_of(options, variant)
    scorings = needs_reference(options, variant) + (not variant.config.one_pass)
    scored = scorings * model.forward_flops(rows=options.batch_size * options.group_size, length=length)
    return scored + options.num_iterations * model.training_flops(rows=learned, length=length)


def needs_reference(options: GroupOptions, variant: GRPOVariant) -> bool:
    """True where something weighs the KL to the reference, or takes ratios to it."""
    hyper, exact = variant.hyper, options.kl_estimator == "exact"
    weights = (hyper.kl_coef, hyper.reward_kl_coef, hyper.advantage_kl_coef, hyper.kl_target)
    return exact or variant.config.ratio_to_reference or any(weights)


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
                prompts=prompts.train,
            )
        if coef:
            penalties = penalty_fn(answers.rollout, answers.prompts)
            metrics["overlong"] = float(np.mean(distributed.all_rows(penalties)))
            scored = dataclasses.replace(answers.scored, rewards=answers.rewards + penalties)
            answers = dataclasses.replace(answers, scored=scored)
        metrics |= {name: float(np.mean(values)) for name, values in describe_fn(answers.rollout).items()}
        return answers, {**metrics, **term_means(answers.scored)}

    return draw


def make_greedy_fn(session: Session, prompts: inputs.Prompts) -> Callable[[Params, Answers], Scored]:
    """`greedy(params, answers)`: rewards [N] of the most likely answers to the same prompts, for ReMax."""
    options: GroupOptions = session.options
    fns = prompts.rollout_fns or single_turn(session.policy, max_new_tokens=options.prompts.max_new_tokens)
    generate = fns.make_generate_fn(prompts.length, Sampling(temperature=0.0), prompts.num_images)
    calls = options.prompts.reward_calls
    reward_fn = make_reward_fn(session.rewards, session.policy.tokenizer, fns, calls=calls)

    def greedy(params: Params, answers: Answers) -> Scored:
        chosen = answers.prompts[:: options.group_size]
        return reward_fn.score(generate(params, chosen, jax.random.key(0)), chosen)

    return greedy


def empty_replay(
    options: GroupOptions, variant: GRPOVariant, length: int, experts: tuple[int, ...] | None = None
) -> grpo.Replay | None:
    """The buffer of groups at step 0, of rows of so many tokens; None where none are replayed.

    Args:
      experts: how many are recorded of a token, where they are (`replay.init_replay`).
    """
    if not variant.config.num_replayed:
        return None
    rows = variant.config.num_kept or options.group_size
    capacity = options.replay.capacity(options.batch_size)
    return init_replay(capacity=capacity, rows=rows, length=length, experts=experts)


def reference_values(session: Session, variant: GRPOVariant, prompts: inputs.Prompts) -> dict[int, float]:
    """Optimal values of all prompts by `id`, from answers of the policy to start from (A*-PO's first stage).

    They are a function of the seed, and kept in the run folder, where a resumed run finds them. Of several
    processes each answers its own rows, and all hold all values.
    """
    options: GroupOptions = session.options
    path, size, data = session.run.out / "reference_values.json", variant.reference_samples, prompts.train
    if session.run.resume and path.exists():
        values = files.read_json(path, keys=("values",), remedy=f"remove {path}")["values"]
        return {id(prompt): value for prompt, value in zip(data, values, strict=True)}
    fns = prompts.rollout_fns or single_turn(session.policy, max_new_tokens=options.prompts.max_new_tokens)
    sampling = Sampling(temperature=options.temperature)
    generate = fns.make_generate_fn(prompts.length, sampling, prompts.num_images)
    calls = options.prompts.reward_calls
    reward_fn = make_reward_fn(session.rewards, session.policy.tokenizer, fns, calls=calls)

    def reward_or_nan(rollout: Rollout, asked: Sequence[PromptExample]) -> np.ndarray:
        scored = reward_fn.score(rollout, asked)
        return np.where(scored.unscorable, np.nan, scored.rewards)

    key, values = jax.random.key(session.run.seed + 2), np.zeros(len(data), np.float32)
    for part in inputs.parts(len(data), options.batch_size):
        asked, first = [data[i] for i in np.repeat(part, size)], int(part[0]) * size
        params = session.policy.params
        _, rewards = answer_all(generate, reward_or_nan, params, asked, sampling, first=first, key=key)
        rewards = jnp.asarray(rewards.reshape(-1, size))
        values[part] = optimal_values(rewards, ~jnp.isnan(rewards), beta=variant.hyper.value_beta)
    if distributed.is_main_process():
        files.write_json(path, {"values": values.tolist()})
    return {id(prompt): float(value) for prompt, value in zip(data, values, strict=True)}


def make_top_k_fn(session: Session) -> Callable[[Params, Sequences], tuple[Array, Array]] | None:
    """The reference's distributions for `--kl-estimator exact`; None without."""
    options: GroupOptions = session.options
    if options.kl_estimator != "exact":
        return None
    size = session.policy.vocab_size
    top_k = session.policy.make_top_k_fn(min(options.kl_top_k or size, size))
    return lambda params, sequences: top_k(params, sequences, options.temperature)


def make_learner(
    session: Session, variant: GRPOVariant, split: adapting.TrainableSplit, length: int
) -> tuple[grpo.State, Callable[..., tuple[grpo.State, Metrics]]]:
    """(state at step 0, `learn(state, original, rollout, rewards, ...)`, which is to be compiled).

    Args:
      length: tokens of a prompt with its answer.
    """
    options: GroupOptions = session.options
    logprob_fn = session.policy.make_logprob_fn(
        temperature=options.temperature, collision=variant.needs_collision
    )
    reference_fn = split.reference if needs_reference(options, variant) else None
    train_step = make_grpo_train_step(
        variant.config, logprob_fn, split.tx, reference_fn, make_top_k_fn(session), describes_rows=True
    )
    policy, records = session.policy, options.sampler.get("routing_replay")
    experts = recorded_shape(policy.architecture, policy.params) if records else None

    def init(params: Params, key: PRNGKeyArray) -> grpo.State:
        return grpo.init(
            params,
            split.tx,
            key,
            one_step_off_policy=options.one_step_off_policy,
            moving_reference=options.sync.ref_model_sync_steps > 0,
            hyper=variant.hyper,
            replay=empty_replay(options, variant, length, experts),
        )

    state = session.init_state(init, split.trained, split.frozen)
    return state, lambda state, *data: train_step(state, variant.hyper, *data)


def with_weights(variant: GRPOVariant, weights: Sequence[float]) -> GRPOVariant:
    """The variant with the weight of each reward, where it takes them apart."""
    hyper = dataclasses.replace(variant.hyper, reward_weights=jnp.asarray(weights, jnp.float32))
    return dataclasses.replace(variant, hyper=hyper) if variant.needs_terms else variant


def prepare(options: Options, given: Given = NOTHING) -> tuple[Session, inputs.Prompts]:
    """The run and its prompts, after everything is checked."""
    options = defaults.fill_published(options, "grpo")
    check(options, "grpo")
    check_rewards(options, given)
    if options.routing_replay:
        check_routing_replay(options)
    session = Session(options, given, "grpo")
    prompts = session.load_prompts()
    session.decide_steps(len(prompts))
    session.announce(f"{len(prompts):,} prompts")
    return session, prompts


def run(options: Options, given: Given = NOTHING) -> Trained:
    """Trains, and leaves a run folder."""
    return train(*prepare(options, given))


def plan(options: Options) -> None:
    """Prints what a step needs, and runs none."""
    planned_runs.show_plan(options, planned_step)


def planned_step(options: Options) -> tuple[Session, Step]:
    """The run, and its step in shapes."""
    if options.routing_replay:
        raise UserError("--plan knows no experts of a rollout: leave --routing-replay out of the plan")
    session, prompts = prepare(options)
    refuse_images(prompts.train, "--plan")
    options, new_tokens = session.options, options.max_completion_length
    length, rows = prompts.length + new_tokens, options.batch_size * options.group_size
    variant = with_weights(variant_of(options), [1.0] * len(session.rewards))
    split = session.split_trainable(options.num_iterations * options.num_minibatches)
    state, learn = make_learner(session, variant, split, length)
    rollout, floats = rollout_shapes(rows, length), functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    once = floats((options.batch_size,))
    data = (
        rollout,
        floats((rows,)),
        jax.ShapeDtypeStruct((rows,), jnp.bool_),
        once if variant.needs_greedy else None,
        StepRewards(rollout.logp, rollout.sequences.mask) if options.process.process_reward else None,
        floats((rows, len(session.rewards))) if variant.needs_terms else None,
        once if variant.reference_samples else None,
    )
    sampled = planned_runs.local_generation(
        options.engine,
        session.policy,
        state.rollout_params,
        rows=rows,
        prompt_length=prompts.length,
        new_tokens=new_tokens,
        group_size=options.group_size,
        max_num_seqs=options.max_num_seqs,
    )
    scorers = planned_runs.reward_scorers(model_folders(session.rewards))
    scorers |= planned_runs.process_scorers(options.process)
    original = (split.original,)
    return session, Step(learn, state, original, data, split.original, sampled, scorers, rollout.sequences)


def train(session: Session, prompts: inputs.Prompts) -> Trained:
    """Training on groups of answers, from prompts to the finished run folder.

    Args:
      session: whose options are `GroupOptions`.
    """
    options, model, given = session.options, session.policy, session.given
    if not session.rewards:  # of whole answers; those of steps come beside them
        session.given = dataclasses.replace(given, rewards=(no_reward,))
    variant = variant_of(options)
    if variant.config.num_replayed:
        refuse_images(prompts.train, "the replay of groups")
    steps_fn = make_process_reward_fn(options.process, model.tokenizer, given.process_reward)
    if variant.needs_terms:
        terms = make_reward_fn(session.rewards, model.tokenizer).terms
        variant = with_weights(variant, [term.weight for term in terms])
    length = prompts.length + options.max_completion_length
    meter = options.run.meter(update_flops(options, model, length))
    draw = make_draw_fn(session, variant, prompts, meter)
    greedy = make_greedy_fn(session, prompts)
    optimal = reference_values(session, variant, prompts) if variant.reference_samples else None
    split = session.split_trainable(options.num_iterations * options.num_minibatches)
    evaluate = prompts.evaluate
    texts_fn = prompts.rollout_fns.answer_texts_fn if prompts.rollout_fns else completion_texts
    completions = LastCompletions(model.tokenizer, texts_fn)
    state, learn = make_learner(session, variant, split, length)
    learn = edges.jit_update(learn, state)
    learned = rows_of(options, variant)[0] // options.num_minibatches // options.micro_batches
    lay_out = edges.make_lay_out_fn(options.packing, model, prompts.train, sizes=[learned])

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
        once = answers.prompts[:: options.group_size]
        of_prompts = optimal and np.asarray([optimal[id(prompt)] for prompt in once], np.float32)
        others = distributed.shard_batch([terms, of_prompts])
        data = (split.original, answers.rollout, *rewards, steps, *others, lay_out(answers.rollout.sequences))
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
