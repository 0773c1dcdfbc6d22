"""Whole runs: traced from end to end, the same alone and together."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import few

from rlhf_jax import losses, models
from rlhf_jax.algorithms import (
    distillation,
    grpo as group,
    grpo_variants,
    nash_md,
    ppo,
    preference,
    sft,
    unpaired,
)
from rlhf_jax.core.train_state import OptimizerConfig
from rlhf_jax.distributed.runtime import compiler_options
from rlhf_jax.jitted import algorithms
from rlhf_jax.jitted.train import SeedState, TaskSetup, make_train
from rlhf_jax.tasks import style

# An epsilon above the rounding of gradients: without it, noise of 1e-9 would move parameters by whole steps.
OPTIMIZER = OptimizerConfig(epsilon=1e-4)
STEPS = 2


@functools.cache
def task_setup():
    task = style.style_task(demonstrations=64)
    config = models.dense_config(
        vocab_size=task.tokenizer.vocab_size, width=8, num_layers=1, num_heads=2, num_kv_heads=1
    )
    return TaskSetup(
        task, models.make_policy(config, None, task.tokenizer), num_prompts=2, num_samples=2, heldout=8
    )


def start(seed):
    key = jax.random.key(seed)
    return SeedState(key, models.init_params(task_setup().policy.architecture, key))


def grpo(**options):
    return algorithms.grpo_algorithm(task_setup(), grpo_variants.grpo(group_size=2), OPTIMIZER, **options)


METHODS = {
    "group": (grpo, group.Hyper()),
    "behind": (
        lambda: algorithms.grpo_algorithm(
            task_setup(),
            grpo_variants.with_correction(grpo_variants.grpo(group_size=2), "tis"),
            OPTIMIZER,
            one_step_off_policy=True,
        ),
        group.Hyper(),
    ),
    "remax": (
        lambda: algorithms.grpo_algorithm(task_setup(), grpo_variants.remax(group_size=2), OPTIMIZER),
        group.Hyper(),
    ),
    "dapo": (
        lambda: algorithms.grpo_algorithm(task_setup(), grpo_variants.dapo(group_size=2), OPTIMIZER),
        group.Hyper(),
    ),
    "a_star_po": (
        lambda: algorithms.grpo_algorithm(
            task_setup(), grpo_variants.a_star_po(group_size=2, reference_samples=3), OPTIMIZER
        ),
        group.Hyper(target_entropy=0.5, kl_target=1.0),
    ),
    "ppo": (
        lambda: algorithms.ppo_algorithm(task_setup(), ppo.Config(num_minibatches=2), OPTIMIZER),
        ppo.Hyper(),
    ),
    "preference": (
        lambda: algorithms.preference_algorithm(
            task_setup(), preference.Config(), OPTIMIZER, source="reference"
        ),
        preference.Hyper(),
    ),
    "xpo": (
        lambda: algorithms.xpo_algorithm(task_setup(), preference.Config(loss_fn=losses.xpo_loss), OPTIMIZER),
        preference.Hyper(),
    ),
    "nash_md": (
        lambda: algorithms.nash_md_algorithm(task_setup(), nash_md.Config(), OPTIMIZER),
        nash_md.Hyper(),
    ),
    "kto": (
        lambda: algorithms.unpaired_algorithm(task_setup(), unpaired.Config(), OPTIMIZER, source="policy"),
        unpaired.Hyper(),
    ),
    "imitation": (
        lambda: algorithms.imitation_algorithm(
            task_setup(), sft.Config(), OPTIMIZER, source="policy", every=True
        ),
        sft.Hyper(),
    ),
    "sft": (lambda: algorithms.supervised_algorithm(task_setup(), sft.Config(), OPTIMIZER), sft.Hyper()),
    "distillation": (
        lambda: algorithms.distillation_algorithm(
            task_setup(),
            distillation.Config(),
            OPTIMIZER,
            teacher=task_setup().policy.with_params(start(7).params),
            generator="student",
        ),
        distillation.Hyper(),
    ),
}


@pytest.mark.parametrize("name", few(METHODS, "dapo"))
def test_every_method_is_traceable_from_end_to_end(name):
    """What a run needs and returns, by shapes alone."""
    make, hyper = METHODS[name]
    train = make_train(task_setup(), make(), steps=STEPS)
    agent, history = jax.eval_shape(train, start(0), jax.tree.map(jnp.float32, hyper))
    assert {"score", "sampled_score", "kl", "length", "generated"} <= history.keys()
    assert history["train_tokens"].shape == (STEPS,)
    policy = make().policy(agent)
    assert jax.tree.structure(policy) == jax.tree.structure(start(0).params)


@pytest.mark.slow
def test_a_run_among_others_is_the_run_alone():
    train = make_train(task_setup(), grpo(), steps=STEPS)
    hyper = group.Hyper(learning_rate=jnp.float32(3e-3))
    starts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(start(seed) for seed in range(3)))
    options = {"compiler_options": compiler_options()}
    agents, together = jax.jit(jax.vmap(train, (0, None)), **options)(starts, hyper)
    alone = jax.jit(train, **options)
    assert np.all(np.abs(together["kl"]) > 1e-4)  # all have moved
    for seed in range(3):
        agent, history = alone(start(seed), hyper)
        for name, values in history.items():
            np.testing.assert_allclose(together[name][seed], values, rtol=1e-5, atol=1e-5, err_msg=name)
        for a, b in zip(
            jax.tree.leaves(agent.learner.params),
            jax.tree.leaves(agents.learner.params),
            strict=True,
        ):
            np.testing.assert_allclose(b[seed], a, atol=1e-5)
    assert alone._cache_size() == 1
    assert len(np.unique(np.asarray(together["length"]).round(6))) > 1  # seeds are not copies
