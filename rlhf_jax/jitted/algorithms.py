"""The methods of whole runs: where each takes its answers from, and what it makes of them."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from rlhf_jax.algorithms import distillation, grpo, nash_md, ppo, preference, selection, sft, unpaired
from rlhf_jax.algorithms.grpo_variants import GRPOVariant
from rlhf_jax.core.masks import masked_sum
from rlhf_jax.core.train_state import OptimizerConfig, make_optimizer
from rlhf_jax.core.types import Array, Float, Metrics, Params, PRNGKeyArray, Rollout
from rlhf_jax.jitted.train import Algorithm, TaskSetup
from rlhf_jax.kernels.baselines import optimal_values
from rlhf_jax.models import Policy
from rlhf_jax.rewards.rules import overlong_penalties
from rlhf_jax.rollout.step import make_grpo_train_step, make_ppo_train_step
from rlhf_jax.tasks.base import Prompts

Source = Literal["reference", "policy"]
"""Who writes the answers that are learned from: offline or online."""


def _described(rollout: Rollout, rewards: Float[Array, " B"]) -> Metrics:
    lengths = jnp.sum(rollout.sequences.mask, axis=1)
    return {"reward": jnp.mean(rewards), "length": jnp.mean(lengths), "tokens": jnp.sum(lengths)}


def _grouped(task_setup: TaskSetup, rewards: Float[Array, " B"]) -> Float[Array, "N G"]:
    return rewards.reshape(-1, task_setup.num_samples)


# Policy gradients ------------------------------------------------------------------------------------


def grpo_algorithm(
    task_setup: TaskSetup,
    variant: GRPOVariant,
    optimizer: OptimizerConfig,
    *,
    one_step_off_policy: bool = False,
) -> Algorithm:
    """GRPO and its variants.

    Args:
      one_step_off_policy: answers come from the policy of one step before, as of asynchronous rollouts; give
        a variant with a correction (`grpo_variants.with_correction`) to make up for it.
    """
    tx, config = make_optimizer(optimizer), variant.config
    logprob_fn = task_setup.policy.make_logprob_fn(
        temperature=task_setup.temperature, collision=variant.needs_collision
    )
    train_step = make_grpo_train_step(config, logprob_fn, tx)

    def step(state: Any, hyper: Any, ref_params: Params, key: PRNGKeyArray) -> tuple[Any, Metrics]:
        draw_key, answer_key = jax.random.split(key)
        params = state.learner.all_params
        prompts = task_setup.draw(draw_key, num_prompts=task_setup.num_prompts * variant.oversampling)
        rollout = task_setup.answer(state.rollout_params, prompts, answer_key)
        rewards = task_setup.rewards(rollout, prompts)
        described = _described(rollout, rewards)
        if variant.oversampling > 1:
            rollout, rewards = _keep_groups_that_differ(task_setup, rollout, rewards)
        if variant.overlong_penalty_coef:
            lengths = jnp.sum(rollout.sequences.mask, axis=1)
            penalties = overlong_penalties(lengths, task_setup.task.completion_length)
            rewards = rewards + variant.overlong_penalty_coef * penalties
        greedy_rewards = None
        if variant.needs_greedy:
            once = jax.tree.map(lambda leaf: leaf[:: task_setup.num_samples], prompts)
            greedy = task_setup.answer(params, once, answer_key, temperature=0.0)
            greedy_rewards = task_setup.rewards(greedy, once)
            described["tokens"] += jnp.sum(greedy.sequences.mask)
        answers = {"greedy_rewards": greedy_rewards}
        if variant.needs_terms:  # a task has one reward
            answers["reward_terms"] = rewards[:, None]
            hyper = dataclasses.replace(hyper, reward_weights=jnp.ones(1))
        if variant.reference_samples:
            values, tokens = _reference_values(task_setup, variant, hyper, ref_params, prompts, answer_key)
            answers["values"], described["tokens"] = values, described["tokens"] + tokens
        state, metrics = train_step(state, hyper, ref_params, rollout, rewards, **answers)
        return state, {**metrics, **described}

    def init(params: Params, key: PRNGKeyArray, hyper: grpo.Hyper) -> grpo.State:
        return grpo.init(params, tx, key, one_step_off_policy=one_step_off_policy, hyper=hyper)

    return Algorithm(init, step)


def _reference_values(
    task_setup: TaskSetup,
    variant: GRPOVariant,
    hyper: Any,
    ref_params: Params,
    prompts: Prompts,
    answer_key: PRNGKeyArray,
) -> tuple[Float[Array, " N"], Array]:
    """(optimal values of the prompts by answers of the reference, tokens of those)."""
    count = variant.reference_samples
    drawn = jax.tree.map(lambda x: jnp.repeat(x[:: task_setup.num_samples], count, axis=0), prompts)
    rollout = task_setup.answer(ref_params, drawn, jax.random.fold_in(answer_key, 1))
    rewards = task_setup.rewards(rollout, drawn).reshape(-1, count)
    return optimal_values(rewards, beta=hyper.value_beta), jnp.sum(rollout.sequences.mask)


def _keep_groups_that_differ(
    task_setup: TaskSetup, rollout: Rollout, rewards: Float[Array, " B"]
) -> tuple[Rollout, Float[Array, " B"]]:
    chosen, _ = selection.groups_that_differ(_grouped(task_setup, rewards), keep=task_setup.num_prompts)
    rows = (chosen[:, None] * task_setup.num_samples + jnp.arange(task_setup.num_samples)).reshape(-1)
    return jax.tree.map(lambda leaf: leaf[rows], rollout), rewards[rows]


def ppo_algorithm(task_setup: TaskSetup, config: ppo.Config, optimizer: OptimizerConfig) -> Algorithm:
    """PPO with a value model of its own, which starts from the policy's body."""
    logprob_fn = task_setup.policy.make_actor_critic_fn(temperature=task_setup.temperature)
    tx = make_optimizer(optimizer)
    train_step = make_ppo_train_step(config, logprob_fn, task_setup.logprob_fn, tx)

    def init(params: Params, key: PRNGKeyArray, hyper: Any) -> ppo.State:
        head_key, key = jax.random.split(key)
        value = task_setup.policy.init_scalar_model(head_key, params)
        return ppo.init({"policy": params, "value": value}, tx, key, hyper)

    def step(state: ppo.State, hyper: Any, ref_params: Params, key: PRNGKeyArray) -> tuple[Any, Metrics]:
        draw_key, answer_key = jax.random.split(key)
        prompts = task_setup.draw(draw_key)
        rollout = task_setup.answer(state.learner.all_params["policy"], prompts, answer_key)
        rewards = task_setup.rewards(rollout, prompts)
        state, metrics = train_step(state, hyper, ref_params, rollout, rewards)
        return state, {**metrics, **_described(rollout, rewards)}

    return Algorithm(init, step, lambda state: state.learner.all_params["policy"])


# Preferences -----------------------------------------------------------------------------------------


def preference_algorithm(
    task_setup: TaskSetup, config: preference.Config, optimizer: OptimizerConfig, *, source: Source
) -> Algorithm:
    """The DPO family on the best and the worst of the answers to each prompt, offline or online."""
    logprob_fn, tx = task_setup.logprob_fn, make_optimizer(optimizer)
    update = preference.make_update(config, logprob_fn, tx)

    def step(state: Any, hyper: Any, ref_params: Params, key: PRNGKeyArray) -> tuple[Any, Metrics]:
        behavior_params = ref_params if source == "reference" else state.learner.all_params
        _, rollout, rewards = _answers(task_setup, behavior_params, key)
        pairs = selection.best_and_worst(rollout.sequences, _grouped(task_setup, rewards))
        batch = preference.make_batch(
            logprob_fn, ref_params, pairs.chosen, pairs.rejected, pairs.mask, hyper.ld_alpha
        )
        state, metrics = update(state, hyper, batch)
        return state, {**metrics, **_described(rollout, rewards)}

    return Algorithm(lambda params, key, _: preference.init(params, tx, key), step)


def xpo_algorithm(task_setup: TaskSetup, config: preference.Config, optimizer: OptimizerConfig) -> Algorithm:
    """XPO: one answer of each pair is the policy's, the other the reference's (Xie et al. 2024)."""
    logprob_fn, tx = task_setup.logprob_fn, make_optimizer(optimizer)
    update = preference.make_update(config, logprob_fn, tx)
    half = dataclasses.replace(task_setup, num_samples=task_setup.num_samples // 2)

    def step(state: Any, hyper: Any, ref_params: Params, key: PRNGKeyArray) -> tuple[Any, Metrics]:
        draw_key, own_key, ref_key = jax.random.split(key, 3)
        prompts = half.draw(draw_key)
        own = task_setup.answer(state.learner.all_params, prompts, own_key)
        other = task_setup.answer(ref_params, prompts, ref_key)
        own_rewards, other_rewards = (task_setup.rewards(rollout, prompts) for rollout in (own, other))
        pairs = selection.judged(own.sequences, other.sequences, own_rewards >= other_rewards)
        counts = own_rewards != other_rewards
        batch = preference.make_batch(
            logprob_fn, ref_params, pairs.chosen, pairs.rejected, counts, hyper.ld_alpha
        )
        batch = dataclasses.replace(batch, chosen_from_ref=~pairs.first_is_chosen)
        state, metrics = update(state, hyper, batch)
        described = _described(own, own_rewards)
        described["tokens"] += jnp.sum(other.sequences.mask)
        return state, {**metrics, **described}

    return Algorithm(lambda params, key, _: preference.init(params, tx, key), step)


def nash_md_algorithm(
    task_setup: TaskSetup, config: nash_md.Config, optimizer: OptimizerConfig, *, noise: float = 0.25
) -> Algorithm:
    """Nash-MD against the mixture of the policy and the reference (Munos et al. 2023).

    Args:
      noise: of the judge, who prefers by rewards.
    """
    logprob_fn, tx = task_setup.logprob_fn, make_optimizer(optimizer)
    update = nash_md.make_update(config, logprob_fn, tx)
    half = dataclasses.replace(task_setup, num_samples=task_setup.num_samples // 2)

    def step(state: Any, hyper: Any, ref_params: Params, key: PRNGKeyArray) -> tuple[Any, Metrics]:
        draw_key, own_key, other_key = jax.random.split(key, 3)
        params, prompts = state.learner.all_params, half.draw(draw_key)
        own = task_setup.answer(params, prompts, own_key)
        mixture = nash_md.mixture_fns(
            task_setup.policy.prefill, task_setup.policy.decode, mixture_coef=hyper.mixture_coef
        )
        other = task_setup.answer((params, ref_params), prompts, other_key, decode_fns=mixture)
        rewards, other_rewards = (task_setup.rewards(rollout, prompts) for rollout in (own, other))
        wins = nash_md.win_probability(rewards, other_rewards, noise=noise)
        ref_logp = masked_sum(logprob_fn(ref_params, own.sequences).logp, own.sequences.mask, axis=-1)
        state, metrics = update(state, hyper, nash_md.Batch(own.sequences, ref_logp, wins))
        described = _described(own, rewards)
        described["tokens"] += jnp.sum(other.sequences.mask)
        return state, {**metrics, **described}

    return Algorithm(lambda params, key, _: nash_md.init(params, tx, key), step)


def unpaired_algorithm(
    task_setup: TaskSetup, config: unpaired.Config, optimizer: OptimizerConfig, *, source: Source
) -> Algorithm:
    """KTO and BCO on single answers: desirable are those of more than the batch's mean reward."""
    logprob_fn, tx = task_setup.logprob_fn, make_optimizer(optimizer)
    update = unpaired.make_update(config, logprob_fn, tx)

    def step(state: Any, hyper: Any, ref_params: Params, key: PRNGKeyArray) -> tuple[Any, Metrics]:
        behavior_params = ref_params if source == "reference" else state.learner.all_params
        prompts, rollout, rewards = _answers(task_setup, behavior_params, key)
        mismatched = None
        if config.shift_decay is None:
            # One prompt's answers stand together: a whole group on is another prompt's.
            mismatched = unpaired.mismatch(
                prompts.tokens.shape[1], rollout.sequences, shift=task_setup.num_samples
            )
        desirable = rewards > jnp.mean(rewards)
        batch = unpaired.make_batch(logprob_fn, ref_params, rollout.sequences, desirable, mismatched)
        state, metrics = update(state, hyper, batch)
        return state, {**metrics, **_described(rollout, rewards)}

    return Algorithm(lambda params, key, _: unpaired.init(params, tx, key), step)


def _answers(
    task_setup: TaskSetup, behavior_params: Params, key: PRNGKeyArray
) -> tuple[Prompts, Rollout, Float[Array, " B"]]:
    draw_key, answer_key = jax.random.split(key)
    prompts = task_setup.draw(draw_key)
    rollout = task_setup.answer(behavior_params, prompts, answer_key)
    return prompts, rollout, task_setup.rewards(rollout, prompts)


# Imitation -------------------------------------------------------------------------------------------


def imitation_algorithm(
    task_setup: TaskSetup,
    config: sft.Config,
    optimizer: OptimizerConfig,
    *,
    source: Source,
    every: bool = False,
) -> Algorithm:
    """Filtering: best-of-n distillation (of the reference), RAFT (policy), expert iteration (`every`).

    Good is what is worth more than the mean reward of the batch, so where all are equal nothing is learned.
    """
    tx = make_optimizer(optimizer)
    update = sft.make_update(config, task_setup.logprob_fn, tx)

    def step(state: Any, hyper: Any, ref_params: Params, key: PRNGKeyArray) -> tuple[Any, Metrics]:
        behavior_params = ref_params if source == "reference" else state.learner.all_params
        _, rollout, rewards = _answers(task_setup, behavior_params, key)
        bar = jnp.nextafter(jnp.mean(rewards), jnp.inf)
        grouped, select = (
            _grouped(task_setup, rewards),
            selection.all_above if every else selection.best_of_group,
        )
        chosen, _ = select(rollout.sequences, grouped, reward_threshold=bar)
        state, metrics = update(state, hyper, chosen)
        return state, {**metrics, **_described(rollout, rewards)}

    return Algorithm(lambda params, key, _: sft.init(params, tx, key), step)


def supervised_algorithm(task_setup: TaskSetup, config: sft.Config, optimizer: OptimizerConfig) -> Algorithm:
    """SFT on the demonstrations of the task, as many rows a step as others sample."""
    tx = make_optimizer(optimizer)
    update = sft.make_update(config, task_setup.logprob_fn, tx)
    table = jax.tree.map(jnp.asarray, task_setup.task.demonstrations)

    def step(state: Any, hyper: Any, ref_params: Params, key: PRNGKeyArray) -> tuple[Any, Metrics]:
        del ref_params
        count = task_setup.num_prompts * task_setup.num_samples
        rows = jax.random.randint(key, (count,), 0, table.tokens.shape[0])
        state, metrics = update(state, hyper, selection.take_rows(table, rows))
        return state, {**metrics, "tokens": jnp.int32(0)}

    return Algorithm(lambda params, key, _: sft.init(params, tx, key), step)


def distillation_algorithm(
    task_setup: TaskSetup,
    config: distillation.Config,
    optimizer: OptimizerConfig,
    *,
    teacher: Policy,
    generator: Literal["teacher", "student"],
    on_tokens: bool = False,
) -> Algorithm:
    """Distillation on the teacher's answers (soft labels), or on the student's own (GKD).

    Args:
      teacher: with its parameters; of the same vocabulary.
      on_tokens: the loss is of the tokens that were sampled, not of the vocabulary.
    """
    tx = make_optimizer(optimizer)

    def labels_of(model: Policy) -> distillation.SoftLabelFn:
        if on_tokens:
            return distillation.on_tokens(model.make_logprob_fn())
        return distillation.over_vocabulary(model.make_distribution_fn())

    student_fn, teacher_fn = labels_of(task_setup.policy), labels_of(teacher)
    update = distillation.make_update(config, student_fn, tx)

    def step(state: Any, hyper: Any, ref_params: Params, key: PRNGKeyArray) -> tuple[Any, Metrics]:
        del ref_params
        draw_key, answer_key = jax.random.split(key)
        prompts = task_setup.draw(draw_key)
        if generator == "teacher":
            fns = teacher.prefill, teacher.decode
            rollout = task_setup.answer(teacher.params, prompts, answer_key, decode_fns=fns)
        else:
            rollout = task_setup.answer(state.learner.all_params, prompts, answer_key)
        batch = distillation.make_batch(teacher_fn, teacher.params, rollout.sequences, hyper)
        state, metrics = update(state, hyper, batch)
        return state, {**metrics, **_described(rollout, task_setup.rewards(rollout, prompts))}

    return Algorithm(lambda params, key, _: distillation.init(params, tx, key), step)
