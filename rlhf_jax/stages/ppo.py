"""PPO with four models: policy, value, frozen reference and a reward (a trained model, or functions).

With an adapter, all of them stand on one frozen base: policy and value have adapters of their own, the
reference is the base with adapters off, and a reward model that adapts the same base brings no more than its
adapter and head.

    rlhf ppo --out runs/ppo --model runs/sft --reward-model runs/reward_model --data my.jsonl
    rlhf ppo --out runs/mine --model runs/sft --reward-model runs/rm2 --data my.jsonl \\
        --adaptive-kl --kl-target 4
    rlhf ppo --out runs/safer --model runs/sft --reward-model runs/rm1 runs/rm2 runs/rm3 \\
        --data my.jsonl --ensemble worst

Rows hold `prompt`, `question` or `messages`; their other fields go to reward functions by name.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from rlhf_jax import distributed, models
from rlhf_jax.algorithms import ppo
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.ranges import (
    LearningRate,
    Positive,
    PositiveInt,
    PositiveOrInf,
    Share,
    Temperature,
    Weight,
)
from rlhf_jax.core.train_state import OptimizerConfig, TrainState
from rlhf_jax.core.trees import merge, partition
from rlhf_jax.core.types import Params
from rlhf_jax.data.pipeline import BatchSampler
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.generation import Sampling
from rlhf_jax.models import Policy, adapters
from rlhf_jax.rewards import ensembles
from rlhf_jax.rewards.functions import Scored
from rlhf_jax.rollout.dynamic_sampling import term_means, without_failed
from rlhf_jax.rollout.engines import failed_rows
from rlhf_jax.rollout.rewards import RolloutReward
from rlhf_jax.rollout.sampler import Evaluation
from rlhf_jax.rollout.step import make_ppo_train_step
from rlhf_jax.stages import adapting, defaults, edges, inputs, option_checks, option_groups, starting
from rlhf_jax.stages.entry import NOTHING, Given, Trained
from rlhf_jax.stages.reward_specs import make_ensemble_fn, make_reward_fn
from rlhf_jax.stages.session import Session
from rlhf_jax.training.run_folder import load_reward_model, load_unmerged_reward_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of PPO.

    Attributes:
      model: run folder of the policy to start from, which is also the reference.
      reward_model: run folder of a reward model: the reward, and the start of the value model; of several,
        the first is that start. None: the reward is what `rewards` names, and the value model starts from
        the policy.
      ensemble: what several reward models make of an answer: their mean, the worst of their scores, or the
        mean minus `uncertainty_coef` times the variance.
      uncertainty_coef: weight of that variance.
      value: a value model of its own, or a second head that reads the policy's hidden states.
      prompts: which prompts, and what their answers are worth in evaluation.
      batch_size: prompts a step, one answer to each.
      num_ppo_epochs: passes over each batch of answers.
      num_minibatches: optimizer steps in each pass.
      micro_batches: parts in which a mini-batch is computed, to save memory.
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
    adapter: adapting.AdapterOptions = adapting.AdapterOptions()
    optimizer: OptimizerConfig = defaults.LINEAR
    batch_size: PositiveInt = 256
    num_ppo_epochs: PositiveInt = 4
    num_minibatches: PositiveInt = 1
    micro_batches: PositiveInt = 1
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
    kl_coef: Weight = 0.05
    adaptive_kl: bool = False
    kl_target: Positive = 6.0
    kl_horizon: Positive = 10_000.0
    missing_eos_penalty: Weight = 1.0
    target_kl: PositiveOrInf = float("inf")
    whiten_advantages: bool = True
    scale_rewards: bool = False


def reward_on_base(options: Options, policy: Policy, split: adapting.TrainableSplit) -> Params | None:
    """What a reward model has of its own, where it is an adapter beside the same base; else None."""
    if len(options.reward_model) != 1 or split.adaptation is None:
        return None
    (folder,) = options.reward_model
    model, theirs = load_unmerged_reward_model(Path(folder))
    models.check_same_architecture(policy.architecture, model.architecture, folder)
    ours = split.adaptation
    if theirs is None or theirs.base is None or ours.base is None:
        return None
    if theirs.base.digest != ours.base.digest or theirs.quantization != ours.quantization:
        return None
    if isinstance(theirs.adapter, adapters.Partial) or isinstance(ours.adapter, adapters.Partial):
        return None
    own = partition(model.params["decoder"], lambda name, leaf: adapters.is_adapter_leaf(name))[0]
    return {"decoder": own, "head": model.params["head"]}


def initial_params(
    options: Options, policy: Policy, split: adapting.TrainableSplit, reward: Params | None, key: jax.Array
) -> tuple[Params, Params]:
    """(trained, frozen) of policy and value, and of a reward model on the same base.

    The value model starts from the reward model where both are whole or on one base, else from the policy.
    """
    adapter_key, head_key = jax.random.split(key)
    if options.value == "shared":
        value = {"head": policy.init_scalar_head(head_key)}
    elif reward is not None:
        value = starting.copied(reward)
    elif options.reward_model and split.adaptation is None:
        reward_model = load_reward_model(Path(options.reward_model[0]))
        models.check_same_architecture(
            policy.architecture, reward_model.architecture, options.reward_model[0]
        )
        value = starting.copied(reward_model.params)
    else:
        head = policy.init_scalar_head(head_key)
        value = {"decoder": split.fresh_unshared_params(adapter_key), "head": head}
    params = {"policy": split.unshared_params, "value": value}
    if split.adaptation is None:
        return params, None
    rest = {} if reward is None else {"reward": reward}
    trained, held = partition(params, split.trains)
    return trained, merge(held, {"base": split.base, **rest})


def make_rollout_reward(options: Options, tokenizer: Tokenizer, given: Given = NOTHING) -> RolloutReward:
    """What an answer is worth: by reward functions, by a reward model, or by several."""
    if len(options.reward_model) < 2:
        named = options.reward_model and not given.rewards
        rewards = options.reward_model if named else inputs.rewards_of(options.prompts, given)
        return make_reward_fn(rewards, tokenizer)
    combine_fn = {
        "mean": ensembles.ensemble_mean,
        "worst": ensembles.ensemble_worst_case,
        "uncertainty": functools.partial(
            ensembles.ensemble_uncertainty_weighted, coef=options.uncertainty_coef
        ),
    }[options.ensemble]
    return make_ensemble_fn([Path(folder) for folder in options.reward_model], tokenizer, combine_fn)


def make_hyper(options: Options) -> ppo.Hyper:
    """The numbers of `options` that a sweep could vary."""
    return ppo.Hyper(
        learning_rate=jnp.float32(options.learning_rate),
        epsilon_low=options.epsilon,
        epsilon_high=options.epsilon,
        penalty_coef=options.penalty_coef,
        cliprange_value=options.cliprange_value,
        value_coef=options.value_coef,
        entropy_coef=options.entropy_coef,
        gamma=options.gamma,
        gae_lambda=options.gae_lambda,
        kl_coef=options.kl_coef,
        kl_target=options.kl_target,
        kl_horizon=options.kl_horizon,
        missing_eos_penalty=options.missing_eos_penalty,
        target_kl=options.target_kl,
    )


def update_flops(options: Options, model: Policy, prompt_length: int) -> float:
    """Operations of scoring with policy, value and reference, and of all epochs of policy and value."""
    sizes = {"rows": options.batch_size, "length": prompt_length + options.prompts.max_new_tokens}
    trained = 1 if options.value == "shared" else 2
    scored = (trained + 1) * model.forward_flops(**sizes)
    return scored + trained * options.num_ppo_epochs * model.training_flops(**sizes)


def check(options: Options) -> None:
    """Refuses options that exclude or need each other, before anything is read.

    Raises:
      UserError: naming the options.
    """
    option_checks.check(options, options.run, "ppo")
    option_checks.check_divides(
        "--num-minibatches", options.num_minibatches, "--batch-size", options.batch_size
    )
    rows = options.batch_size // options.num_minibatches
    option_checks.check_divides("--micro-batches", options.micro_batches, "the size of a mini-batch,", rows)
    if options.reward_model and options.prompts.rewards:
        raise UserError("--reward-model excludes --rewards: name the reward model in --rewards to mix them")
    if options.ensemble != "mean" and len(options.reward_model) < 2:
        raise UserError(
            f"--ensemble {options.ensemble} needs several reward models: give --reward-model more"
        )


def make_config(options: Options) -> ppo.Config:
    """The static choices of `options`."""
    return ppo.Config(
        num_ppo_epochs=options.num_ppo_epochs,
        num_minibatches=options.num_minibatches,
        micro_batches=options.micro_batches,
        whiten_advantages=options.whiten_advantages,
        adaptive_kl=options.adaptive_kl,
        scale_rewards=options.scale_rewards,
        policy_loss_fn=ppo.penalized if options.policy_loss == "penalty" else ppo.clipped,
    )


def run(options: Options, given: Given = NOTHING) -> Trained:
    """Trains, and leaves a run folder."""
    options = defaults.fill_published(options, "ppo")
    check(options)
    if not options.reward_model:
        option_checks.check_rewards(inputs.rewards_of(options.prompts, given), " or --reward-model")
    seed, config = options.run.seed, make_config(options)
    session = Session(options, given, "ppo")
    model = session.policy
    looked_at = options.prompts.eval_reward or next(iter(options.reward_model), "")
    evaluated = dataclasses.replace(options.prompts, eval_reward=looked_at)
    prompts = inputs.load_prompts(evaluated, model, seed, given)
    sampler = BatchSampler(len(prompts), options.batch_size, seed)
    session.decide_steps(len(prompts))
    session.announce(f"{len(prompts):,} prompts")
    split = session.split_trainable(options.num_ppo_epochs * options.num_minibatches)
    reward = reward_on_base(options, model, split)
    value_key, state_key = jax.random.split(jax.random.key(seed))
    params, frozen = initial_params(options, model, split, reward, value_key)

    generate = inputs.make_sampler(
        options.engine,
        model,
        prompt_length=prompts.length,
        max_new_tokens=options.prompts.max_new_tokens,
        folder=options.run.out,
        sampling=Sampling(temperature=options.temperature),
    )
    make_logprob_fn = (
        model.make_shared_trunk_actor_critic_fn if options.value == "shared" else model.make_actor_critic_fn
    )
    logprob_fn = make_logprob_fn(temperature=options.temperature)
    ref_logprob_fn = model.make_logprob_fn(temperature=options.temperature)
    hyper, evaluate = make_hyper(options), prompts.evaluate

    def reference(learner: TrainState, original: Params) -> Params:
        return models.reference_params(learner.all_params, original)

    train_step = make_ppo_train_step(config, logprob_fn, ref_logprob_fn, split.tx, reference)
    state = session.init_state(lambda *x: ppo.init(x[0], split.tx, x[1], hyper), params, frozen, state_key)
    learn = edges.jit_update(lambda state, *data: train_step(state, hyper, *data), state)
    rollout_key = jax.random.key(seed + 1)
    meter = options.run.meter(update_flops(options, model, prompts.length))

    reward_fn = make_rollout_reward(options, model.tokenizer, given) if reward is None else None
    score_reward = jax.jit(model.make_shared_reward_fn())

    def step(state: ppo.State, number: int):
        chosen = [prompts.train[i] for i in edges.local_indices(sampler, number)]
        whole = state.learner.all_params
        key = jax.random.fold_in(rollout_key, number)
        rollout = meter.timed("rollout", generate, models.merge_with_base(whole, "policy"), chosen, key)
        if reward_fn is None and options.engine == "local":
            rewards = meter.timed("reward", score_reward, whole, rollout.sequences)
            return meter.timed("update", learn, state, split.original, rollout, rewards)
        if reward_fn is None:
            rewards = np.asarray(meter.timed("reward", score_reward, whole, rollout.sequences))
            scored = Scored(rewards, np.zeros(len(rewards), bool))
        else:
            scored = meter.timed("reward", reward_fn.score, rollout, chosen)
        if options.engine != "local":
            scored = without_failed(scored, failed_rows(rollout))
        rewards = distributed.shard_batch((scored.rewards, ~scored.unscorable))
        state, metrics = meter.timed("update", learn, state, split.original, rollout, *rewards)
        return state, {**metrics, **term_means(scored)}

    def measured(state: ppo.State, evaluate: Callable[..., Evaluation]) -> dict[str, float]:
        whole = state.learner.all_params
        return evaluate(
            models.merge_with_base(whole, "policy"), models.reference_params(whole, split.original)
        ).metrics()

    before = prompts.answer(model.params)
    state = session.train(
        state,
        step,
        meter=meter,
        data_fingerprint=prompts.fingerprint(),
        kind="actor_critic",
        adaptation=split.adaptation,
        evaluate=evaluate and (lambda state, _: measured(state, evaluate)),
    )
    policy = models.merge_with_base(state.learner.all_params, "policy")
    samples = inputs.before_and_after("ppo", before, prompts.answer(policy))
    return session.finish(policy, state, samples)
