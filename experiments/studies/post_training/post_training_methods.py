"""How the rows of the table of post-training algorithms are made: a method from a task and an optimizer."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from rlhf_jax.algorithms import distillation, grpo, grpo_variants, ppo, preference, sft, unpaired
from rlhf_jax.algorithms.grpo_variants import VariantFn, make_variant, with_correction
from rlhf_jax.core.masks import masked_mean
from rlhf_jax.core.train_state import OptimizerConfig
from rlhf_jax.core.types import Array, Float, Rollout
from rlhf_jax.distributed.runtime import compiler_options
from rlhf_jax.jitted import algorithms
from rlhf_jax.jitted.train import Algorithm, SeedState, TaskSetup, make_train
from rlhf_jax.losses.distillation import Divergence
from rlhf_jax.models import Policy, init_params

MakeFn = Callable[[TaskSetup, OptimizerConfig], Algorithm]
"""(task with its model, optimizer) -> algorithm."""

GROUP = 4
"""Answers to each prompt."""
KL_COEF = 0.02
"""Weight of the KL to the reference, of all variants that are published with more."""
TEACHER_SEED = 2_000
"""Of the policy that distillation learns from, apart from those of the cells and of the search."""
LENGTH = 16
"""Of the longest completion, for Dr. GRPO."""


# Policy gradients ------------------------------------------------------------------------------------


def group_method(make: VariantFn, *, one_step_off_policy: bool = False, **changes: Any) -> MakeFn:
    """A variant of GRPO; `changes` are fields of its `Config`, or parameters of its own."""

    def method(task_setup: TaskSetup, optimizer: OptimizerConfig) -> Algorithm:
        variant = group_variant(make, **changes)
        if one_step_off_policy:
            variant = with_correction(variant, "tis")
        if variant.config.num_iterations > 1:
            steps = optimizer.total_steps * variant.config.num_iterations
            optimizer = dataclasses.replace(optimizer, total_steps=steps)
        return algorithms.grpo_algorithm(
            task_setup, variant, optimizer, one_step_off_policy=one_step_off_policy
        )

    return method


def group_variant(make: VariantFn, **changes: Any) -> grpo_variants.GRPOVariant:
    """The variant with the table's group size; those that stay close to the reference do so by one weight."""
    variant = make_variant(make, max_completion_length=LENGTH, group_size=GROUP, changes=changes)
    hyper = variant.hyper
    weights = {name: KL_COEF for name in ("kl_coef", "reward_kl_coef") if getattr(hyper, name) > KL_COEF}
    return dataclasses.replace(variant, hyper=dataclasses.replace(hyper, **weights))


def ppo_method(task_setup: TaskSetup, optimizer: OptimizerConfig) -> Algorithm:
    """PPO in one pass over each batch."""
    config = ppo.Config(num_ppo_epochs=1, num_minibatches=1)
    return algorithms.ppo_algorithm(task_setup, config, optimizer)


# Preferences, and imitation --------------------------------------------------------------------------


def pair_method(loss_fn: preference.PairLossFn, source: algorithms.Source, *, wpo: bool = False) -> MakeFn:
    """A loss on pairs of the reference's answers, or of the policy's; with WPO's weights where asked for."""

    def method(task_setup: TaskSetup, optimizer: OptimizerConfig) -> Algorithm:
        half = task_setup.policy.make_logprob_fn(temperature=0.5) if wpo else None
        config = preference.Config(loss_fn=loss_fn, half_temperature_logprob_fn=half)
        return algorithms.preference_algorithm(task_setup, config, optimizer, source=source)

    return method


def unpaired_method(config: unpaired.Config) -> MakeFn:
    """A loss on single answers of the reference."""
    return lambda task_setup, optimizer: algorithms.unpaired_algorithm(
        task_setup, config, optimizer, source="reference"
    )


def imitation_method(source: algorithms.Source, *, every: bool = False) -> MakeFn:
    """Imitation of good answers."""
    return lambda task_setup, optimizer: algorithms.imitation_algorithm(
        task_setup, sft.Config(), optimizer, source=source, every=every
    )


# What learns from another model -----------------------------------------------------------------------


@functools.cache
def teacher_of(task_setup: TaskSetup, steps: int) -> Policy:
    """A policy of the task's own size that has learned for longer: from its demonstrations for 20 times the
    steps of a row, then by GRPO for four times as many.
    """
    optimizer = OptimizerConfig("linear", total_steps=20 * steps, b2=0.99, epsilon=1e-4)
    imitate = algorithms.supervised_algorithm(task_setup, sft.Config(), optimizer)
    further = dataclasses.replace(optimizer, total_steps=4 * steps)
    improve = group_method(grpo_variants.grpo)(task_setup, further)
    first, second = jax.random.split(jax.random.key(TEACHER_SEED))

    def train() -> Any:
        params = init_params(task_setup.policy.architecture, first)
        begin = make_train(task_setup, imitate, steps=20 * steps)
        agent, _ = begin(SeedState(first, params), sft.Hyper(learning_rate=jnp.float32(3e-3)))
        go_on = make_train(task_setup, improve, steps=4 * steps)
        hyper = dataclasses.replace(grpo.Hyper(), learning_rate=jnp.float32(1e-3))
        return go_on(SeedState(second, agent.learner.params), hyper)[0].learner.params

    params = jax.jit(train, compiler_options=compiler_options())()
    return task_setup.policy.with_params(params)


def distilled(
    loss_fn: Divergence,
    generator: Literal["teacher", "student"],
    *,
    on_tokens: bool = False,
) -> MakeFn:
    """Distillation from the teacher; `on_tokens` for losses on the tokens that were sampled."""

    def method(task_setup: TaskSetup, optimizer: OptimizerConfig) -> Algorithm:
        return algorithms.distillation_algorithm(
            task_setup,
            distillation.Config(loss_fn=loss_fn),
            optimizer,
            teacher=teacher_of(task_setup, optimizer.total_steps),
            generator=generator,
            on_tokens=on_tokens,
        )

    return method


def judged(make: MakeFn) -> MakeFn:
    """The method with the teacher for a judge: an answer is worth its mean log-prob there (RLAIF)."""

    def method(task_setup: TaskSetup, optimizer: OptimizerConfig) -> Algorithm:
        teacher = teacher_of(task_setup, optimizer.total_steps)
        logprob_fn = teacher.make_logprob_fn()

        def judge(rollout: Rollout, _: Any) -> Float[Array, " B"]:
            return masked_mean(
                logprob_fn(teacher.params, rollout.sequences).logp, rollout.sequences.mask, axis=1
            )

        return make(dataclasses.replace(task_setup, reward_fn=judge), optimizer)

    return method
