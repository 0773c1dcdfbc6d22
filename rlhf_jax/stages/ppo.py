"""PPO with four models: policy, value, frozen reference and a reward (a trained model, or functions).

With an adapter, all of them stand on one frozen base: policy and value have adapters of their own, the
reference is the base with adapters off, and a reward model that adapts the same base brings no more than its
adapter and head.

    rlhf ppo --out runs/ppo --model runs/sft --reward-model runs/reward_model --data my.jsonl
    rlhf ppo --out runs/mine --model runs/sft --reward-model runs/rm2 --data my.jsonl \\
        --adaptive-kl --kl-target 4
    rlhf ppo --out runs/safer --model runs/sft --reward-model runs/rm1 runs/rm2 runs/rm3 \\
        --data my.jsonl --ensemble worst
    rlhf ppo --out runs/ptx --model runs/sft --reward-model runs/rm2 --data my.jsonl --ptx-data books.txt
    rlhf ppo --out runs/steps --model runs/sft --process-reward runs/prm --data my.jsonl \\
        --rewards my_rewards:exact

Rows hold `prompt`, `question` or `messages`; their other fields go to reward functions by name.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import tyro

from rlhf_jax import models
from rlhf_jax.algorithms import ppo
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.ranges import (
    Finite,
    LearningRate,
    Positive,
    PositiveInt,
    PositiveOrInf,
    Share,
    Temperature,
    Weight,
)
from rlhf_jax.core.train_state import OptimizerConfig
from rlhf_jax.core.types import StepRewards
from rlhf_jax.data.content_parts import refuse_images
from rlhf_jax.data.pipeline import BatchSampler, joint_fingerprint
from rlhf_jax.generation import Sampling
from rlhf_jax.models import Policy
from rlhf_jax.planning.steps import Scorer, Step, rollout_shapes, sequence_shapes
from rlhf_jax.rollout.completions import LastCompletions
from rlhf_jax.rollout.dynamic_sampling import term_means
from rlhf_jax.rollout.sampler import Evaluation
from rlhf_jax.stages import (
    adapting,
    defaults,
    edges,
    inputs,
    option_checks,
    option_groups,
    planned_runs,
)
from rlhf_jax.stages.entry import NOTHING, Given, Trained
from rlhf_jax.stages.ppo_rewards import make_score_fn
from rlhf_jax.stages.ppo_start import make_start
from rlhf_jax.stages.ptx import PtxText, load_text
from rlhf_jax.stages.reward_specs import model_folders
from rlhf_jax.stages.session import Session


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of PPO.

    Attributes:
      model: the policy to start from, which is also the reference: a run folder, a Hugging Face folder, a
        GGUF file or a name in the hub cache.
      reward_model: run folder of a reward model: the reward, and the start of the value model; of several,
        the first is that start. None: the reward is what `rewards` names, and the value model starts from
        the policy.
      ensemble: what several reward models make of an answer: their mean, the worst of their scores, or the
        mean minus `uncertainty_coef` times the variance.
      uncertainty_coef: weight of that variance.
      value: a value model of its own, or a second head that reads the policy's hidden states.
      prompts: which prompts, and what their answers are worth in evaluation.
      batch_size: prompts a step.
      group_size: answers to each.
      policy_filter: which of them is learned from (PF-PPO): the best by its reward, or half of the time one
        of the others (best_random) or the worst (best_worst); none for all of them.
      num_ppo_epochs: passes over each batch of answers.
      num_minibatches: optimizer steps in each pass.
      micro_batches: parts in which a mini-batch is computed, to save memory.
      packing: score answers, and learn from them, several in a row of tokens, without their padding; losses
        and gradients are the same. Each new number of rows is compiled once.
      learning_rate: at its peak; None for the published one (3e-6, with an adapter 3e-5).
      temperature: of sampling; the scorer uses the same.
      engine: what writes the answers: local (this process), or the server vllm:URL, sglang:URL or openai:URL,
        with #NAME behind it where it does not call the model default. openai servers keep their weights.
      policy_loss: what keeps the policy near the old one: the clip, or a penalty on the KL (PPO-penalty).
      epsilon: how far a ratio may go from 1.
      penalty_coef: weight of that KL, in nats per token.
      cliprange_value: how far a value may move in one update, in units of reward.
      value_coef: weight of the value loss.
      entropy_coef: weight of the entropy bonus.
      gamma: discount per token.
      gae_lambda: lambda of GAE.
      critic_gae_lambda: lambda of what the values learn (decoupled GAE, VC-PPO: 1); None for the same.
      gae_alpha: alpha of a lambda of the advantages that follows the length, 1 - 1 / (alpha length) (VAPO:
        0.05); None for `gae_lambda`.
      positive_lm_coef: weight of the likelihood of answers whose reward is above `positive_threshold` (VAPO:
        0.1); 0 for none.
      positive_threshold: see `positive_lm_coef`.
      kl_coef: weight of the KL to the reference, taken from the reward at every token.
      adaptive_kl: move that weight so that the KL stays near `kl_target`.
      kl_target: nats per answer.
      kl_horizon: answers over which the weight reacts.
      missing_eos_penalty: taken from the reward of an answer that did not end.
      target_kl: a mini-batch further than this from the old policy (nats per token) ends the update.
      whiten_advantages: bring advantages to mean 0 and variance 1.
      scale_rewards: divide rewards by the standard deviation of all rewards seen.
    """

    run: tyro.conf.OmitArgPrefixes[option_groups.RunOptions] = option_groups.RunOptions(Path("runs/ppo"))
    model: str
    reward_model: tuple[str, ...] = ()
    ensemble: Literal["mean", "worst", "uncertainty"] = "mean"
    uncertainty_coef: Weight = 0.5
    value: Literal["separate", "shared"] = "separate"
    prompts: tyro.conf.OmitArgPrefixes[option_groups.PromptOptions]
    completions: tyro.conf.OmitArgPrefixes[option_groups.CompletionOptions] = (
        option_groups.CompletionOptions()
    )
    adapter: adapting.AdapterOptions = adapting.AdapterOptions()
    optimizer: OptimizerConfig = defaults.LINEAR
    process: tyro.conf.OmitArgPrefixes[option_groups.ProcessOptions] = option_groups.ProcessOptions()
    ptx: tyro.conf.OmitArgPrefixes[option_groups.PtxOptions] = option_groups.PtxOptions()
    sync: tyro.conf.OmitArgPrefixes[option_groups.SyncOptions] = option_groups.SyncOptions()
    batch_size: PositiveInt = 256
    group_size: PositiveInt = 1
    policy_filter: Literal["none", "best", "best_random", "best_worst"] = "none"
    num_ppo_epochs: PositiveInt = 4
    num_minibatches: PositiveInt = 1
    micro_batches: PositiveInt = 1
    packing: bool = False
    learning_rate: LearningRate | None = None
    temperature: Temperature = 1.0
    engine: str = "local"
    policy_loss: Literal["clip", "penalty"] = "clip"
    epsilon: PositiveOrInf = 0.2
    penalty_coef: Weight = 1.0
    cliprange_value: PositiveOrInf = 0.2
    value_coef: Weight = 0.1
    entropy_coef: Weight = 0.0
    gamma: Share = 1.0
    gae_lambda: Share = 0.95
    critic_gae_lambda: Share | None = None
    gae_alpha: Positive | None = None
    positive_lm_coef: Weight = 0.0
    positive_threshold: Finite = 0.0
    kl_coef: Weight = 0.05
    adaptive_kl: bool = False
    kl_target: Positive = 6.0
    kl_horizon: Positive = 10_000.0
    missing_eos_penalty: Weight = 1.0
    target_kl: PositiveOrInf = float("inf")
    whiten_advantages: bool = True
    scale_rewards: bool = False

    @property
    def rows(self) -> int:
        """Answers that a step learns from."""
        return self.batch_size * (self.group_size if self.policy_filter == "none" else 1)

    @property
    def updates(self) -> int:
        """Optimizer steps in a step."""
        return self.num_ppo_epochs * self.num_minibatches


def update_flops(options: Options, model: Policy, prompt_length: int, text: PtxText | None) -> float:
    """Operations of scoring with policy, value and reference, and of all epochs of policy, value and text."""
    sizes = {"rows": options.rows, "length": prompt_length + options.prompts.max_new_tokens}
    trained = 1 if options.value == "shared" else 2
    scored = (trained + 1) * model.forward_flops(**sizes)
    answers = trained * options.num_ppo_epochs * model.training_flops(**sizes)
    if text is None:
        return scored + answers
    return scored + answers + model.training_flops(rows=text.sampler.batch_size, length=text.length)


def check(options: Options) -> None:
    """Refuses options that exclude or need each other, before anything is read.

    Raises:
      UserError: naming the options.
    """
    option_checks.check(options, options.run, "ppo")
    option_checks.check_divides(
        "--num-minibatches", options.num_minibatches, "the answers that a step learns from,", options.rows
    )
    rows = options.rows // options.num_minibatches
    option_checks.check_divides("--micro-batches", options.micro_batches, "the size of a mini-batch,", rows)
    if options.ptx.ptx_batch_size:
        option_checks.check_divides(
            "--micro-batches", options.micro_batches, "--ptx-batch-size", options.ptx.ptx_batch_size
        )
    if options.policy_filter != "none" and options.group_size < 2:
        raise UserError(
            f"--policy-filter {options.policy_filter} chooses among answers to a prompt, and there is one: "
            "raise --group-size"
        )
    options.sync.check((options.kl_coef,))
    if options.reward_model and options.prompts.rewards:
        raise UserError("--reward-model excludes --rewards: name the reward model in --rewards to mix them")
    if options.ensemble != "mean" and len(options.reward_model) < 2:
        raise UserError(
            f"--ensemble {options.ensemble} needs several reward models: give --reward-model more"
        )


def prepare(options: Options, given: Given = NOTHING) -> tuple[Session, inputs.Prompts, PtxText | None]:
    """The run, its prompts and the text beside them, after everything is checked."""
    options = defaults.fill_published(options, "ppo")
    check(options)
    if given.ptx_rows is None and not options.ptx.ptx_data and options.ptx != option_groups.PtxOptions():
        raise UserError("--ptx-coef and its kin say how text is learned beside PPO: give --ptx-data")
    if not (options.reward_model or options.process.process_reward or given.process_reward):
        option_checks.check_rewards(inputs.rewards_of(options.prompts, given), " or --reward-model")
    session = Session(options, given, "ppo")
    prompts = session.load_prompts(eval_reward=next(iter(options.reward_model), ""))
    session.decide_steps(len(prompts))
    session.announce(f"{len(prompts):,} prompts")
    text = load_text(
        options.ptx,
        session.policy,
        answers=options.rows // options.num_minibatches,
        mini_batches=options.updates,
        seed=options.run.seed,
        given=given.ptx_rows,
    )
    return session, prompts, text


def plan(options: Options) -> None:
    """Prints what a step needs, and runs none."""
    planned_runs.show_plan(options, planned_step)


def planned_step(options: Options) -> tuple[Session, Step]:
    """The run, and its step in shapes."""
    session, prompts, text = prepare(options)
    refuse_images(prompts.train, "--plan")
    options, start = session.options, make_start(session)
    rows, new_tokens = options.batch_size * options.group_size, options.prompts.max_new_tokens
    rollout = rollout_shapes(rows, prompts.length + new_tokens)
    whole = start.state.learner.all_params
    data = (
        rollout,
        jax.ShapeDtypeStruct((rows,), jnp.float32),
        jax.ShapeDtypeStruct((rows,), jnp.bool_),
        StepRewards(rollout.logp, rollout.sequences.mask) if options.process.process_reward else None,
        text and sequence_shapes(text.sampler.batch_size, text.length),
    )
    sampled = planned_runs.local_generation(
        options.engine,
        session.policy,
        models.merge_with_base(whole, "policy"),
        rows=rows,
        prompt_length=prompts.length,
        new_tokens=new_tokens,
        group_size=options.group_size,
    )
    scorers = planned_runs.process_scorers(options.process)
    if start.reward is not None:
        scorers["reward model"] = Scorer(session.policy.make_shared_reward_fn(), whole, held=False)
    else:
        folders = [Path(folder) for folder in options.reward_model] or model_folders(session.rewards)
        scorers |= planned_runs.reward_scorers(folders)
    original = start.split.original
    return session, Step(
        start.learn, start.state, (original,), data, original, sampled, scorers, rollout.sequences
    )


def run(options: Options, given: Given = NOTHING) -> Trained:
    """Trains, and leaves a run folder."""
    session, prompts, text = prepare(options, given)
    options, model = session.options, session.policy
    start = make_start(session)
    split, learn = start.split, edges.jit_update(start.learn, start.state)
    sampler = BatchSampler(len(prompts), options.batch_size, options.run.seed)
    generate = inputs.make_sampler(
        options.engine,
        model,
        prompt_length=prompts.length,
        num_images=prompts.num_images,
        max_new_tokens=options.prompts.max_new_tokens,
        folder=options.run.out,
        group_size=options.group_size,
        sampling=Sampling(temperature=options.temperature),
    )
    rollout_key, evaluate = jax.random.key(options.run.seed + 1), prompts.evaluate
    completions = LastCompletions(model.tokenizer)
    meter = options.run.meter(update_flops(options, model, prompts.length, text))
    score = make_score_fn(options, model, start.reward, given)
    learned = options.rows // options.num_minibatches // options.micro_batches
    lay_out = edges.make_lay_out_fn(options.packing, model, prompts.train, sizes=[learned])

    def step(state: ppo.State, number: int):
        chosen = [prompts.train[i] for i in edges.local_indices(sampler, number, options.group_size)]
        whole = state.learner.all_params
        key = jax.random.fold_in(rollout_key, number)
        rollout = meter.timed("rollout", generate, models.merge_with_base(whole, "policy"), chosen, key)
        scored, rewards, steps = meter.timed("reward", score, whole, rollout, chosen)
        rows = text and meter.timed("data", text.batch, number)
        data = (split.original, rollout, *rewards, steps, rows, lay_out(rollout.sequences))
        state, metrics = meter.timed("update", learn, state, *data)
        metrics = completions.keep(chosen, rollout, scored, metrics)
        return state, {**metrics, **term_means(scored)}

    def measured(state: ppo.State, evaluate: Callable[..., Evaluation]) -> dict[str, float]:
        whole = state.learner.all_params
        return evaluate(
            models.merge_with_base(whole, "policy"), models.reference_params(whole, split.original)
        ).metrics()

    before = prompts.answer(model.params)
    state = session.train(
        start.state,
        step,
        meter=meter,
        data_fingerprint=joint_fingerprint(prompts.fingerprint(), text.fingerprint())
        if text
        else prompts.fingerprint(),
        kind="actor_critic",
        adaptation=split.adaptation,
        evaluate=evaluate and (lambda state, _: measured(state, evaluate)),
        completions=completions,
    )
    policy = models.merge_with_base(state.learner.all_params, "policy")
    samples = inputs.before_and_after("ppo", before, prompts.answer(policy))
    return session.finish(policy, state, samples)
