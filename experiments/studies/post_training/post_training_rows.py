"""What the table of post-training algorithms is made of: tasks, algorithms, and every setting of both."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from rlhf_jax import losses
from rlhf_jax.algorithms import distillation, grpo, grpo_variants, nash_md, ppo, preference, sft, unpaired
from rlhf_jax.algorithms.grpo_variants import VariantFn, make_variant, with_correction
from rlhf_jax.core.train_state import OptimizerConfig
from rlhf_jax.distributed.runtime import compiler_options
from rlhf_jax.jitted import algorithms
from rlhf_jax.jitted.train import Algorithm, SeedState, TaskSetup, make_train
from rlhf_jax.models import Policy, init_params
from rlhf_jax.tasks import arithmetic, base, calculator, countdown, style
from rlhf_jax.tasks.base import Task

__all__ = ["ALGORITHMS", "TASKS", "AlgorithmRow", "TaskRow"]


IMITATION, OFFLINE, ONLINE, POLICY_GRADIENT = FAMILIES = (
    "imitation",
    "preferences, offline",
    "preferences, online",
    "policy gradient",
)


@dataclasses.dataclass(frozen=True)
class TaskRow:
    """A task, and the policy that all algorithms start from.

    Attributes:
      make: the task as arrays.
      base_steps: steps of supervised training on its demonstrations, of 64 rows each.
      steps: of an algorithm that samples 64 answers a step; others get as many as sample as much.
    """

    name: str
    make: Callable[[], Task]
    base_steps: int
    steps: int
    width: int = 48
    layers: int = 2
    base_learning_rate: float = 3e-3


@dataclasses.dataclass(frozen=True)
class AlgorithmRow:
    """A row of the table.

    Attributes:
      make: (world, optimizer) -> method.
      hyper: what it is published with, or usual; the learning rate is searched.
      cost: answers it samples a step, as a multiple of 64.
      what: in a few words.
      family: what it learns from.
    """

    name: str
    make: Callable[[TaskSetup, OptimizerConfig], Algorithm]
    hyper: Any
    what: str
    family: str = POLICY_GRADIENT
    cost: float = 1.0


TASKS = (
    TaskRow(
        "arithmetic",
        lambda: base.arithmetic_task(
            arithmetic.Level(3, 1, 9, "+"), train=600, heldout=88, demonstrations=4000, slip_rate=0.5
        ),
        base_steps=800,
        steps=60,
    ),
    TaskRow(
        "style",
        lambda: style.style_task(demonstrations=4000),
        base_steps=400,
        steps=50,
        width=32,
    ),
    TaskRow(
        "countdown",
        lambda: countdown.countdown_task(3, 2, demonstrations=4000, solution_rate=0.7, heldout=128),
        base_steps=1200,
        steps=60,
    ),
    TaskRow(
        "calculator",
        lambda: calculator.calculator_task(
            train=4000,
            heldout=128,
            demonstrations=4000,
            habits={"both": 0.4, "first": 0.3, "none": 0.3},
        ),
        base_steps=1600,
        steps=60,
    ),
)

GROUP = 4
"""Answers to each prompt."""
KL_COEF = 0.02
"""Weight of the KL to the reference, of all variants that are published with more."""


TEACHER_SEED = 2_000
"""Of the policy that distillation learns from, apart from those of the cells and of the search."""

LENGTH = 16
"""Of the longest completion, for Dr. GRPO."""


def _group(make: VariantFn, *, one_step_off_policy: bool = False, **changes: Any) -> Callable[..., Algorithm]:
    def method(task_setup: TaskSetup, optimizer: OptimizerConfig) -> Algorithm:
        static = {"group_size": task_setup.num_samples, **changes}
        variant = make_variant(make, max_completion_length=LENGTH, **static)
        if one_step_off_policy:
            variant = with_correction(variant, "tis")
        if static.get("num_iterations", 1) > 1:
            steps = optimizer.total_steps * static["num_iterations"]
            optimizer = dataclasses.replace(optimizer, total_steps=steps)
        return algorithms.grpo_algorithm(
            task_setup, variant, optimizer, one_step_off_policy=one_step_off_policy
        )

    return method


def _variant(name: str, make: VariantFn, what: str, *, cost: float = 1.0, **changes: Any) -> AlgorithmRow:
    hyper = make_variant(make, max_completion_length=LENGTH, group_size=GROUP).hyper
    # Those that stay close to the reference all do so by one weight.
    weights = {name: KL_COEF for name in ("kl_coef", "reward_kl_coef") if getattr(hyper, name) > KL_COEF}
    hyper = dataclasses.replace(hyper, **weights)
    return AlgorithmRow(name, _group(make, **changes), hyper, what, cost=cost)


# DAPO here is without its penalty on overlong answers, which these short tasks do not need.
_dapo = functools.partial(grpo_variants.dapo, overlong_penalty_coef=0.0)


def _pairs(loss_fn: preference.PairLossFn, source: algorithms.Source) -> Callable[..., Algorithm]:
    config = preference.Config(loss_fn=loss_fn)
    return functools.partial(_preference, config=config, source=source)


def _preference(
    task_setup: TaskSetup, optimizer: OptimizerConfig, *, config: preference.Config, source: algorithms.Source
) -> Algorithm:
    return algorithms.preference_algorithm(task_setup, config, optimizer, source=source)


def _unpaired(task_setup: TaskSetup, optimizer: OptimizerConfig, *, config: unpaired.Config) -> Algorithm:
    return algorithms.unpaired_algorithm(task_setup, config, optimizer, source="reference")


def _imitation(task_setup: TaskSetup, optimizer: OptimizerConfig, **options: Any) -> Algorithm:
    return algorithms.imitation_algorithm(task_setup, sft.Config(), optimizer, **options)


def _ppo(task_setup: TaskSetup, optimizer: OptimizerConfig) -> Algorithm:
    config = ppo.Config(num_ppo_epochs=1, num_minibatches=1)
    return algorithms.ppo_algorithm(task_setup, config, optimizer)


@functools.lru_cache(maxsize=1)
def _teacher(task_setup: TaskSetup, steps: int) -> Policy:
    """A policy of the task's own size that has learned for longer: from its demonstrations for 20 times the
    steps of a row, then by GRPO for four times as many.
    """
    optimizer = OptimizerConfig("linear", total_steps=20 * steps, b2=0.99, epsilon=1e-4)
    imitate = algorithms.supervised_algorithm(task_setup, sft.Config(), optimizer)
    improve = _group(grpo_variants.grpo)(task_setup, dataclasses.replace(optimizer, total_steps=4 * steps))
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


def _distilled(
    task_setup: TaskSetup,
    optimizer: OptimizerConfig,
    *,
    config: distillation.Config,
    generator: Literal["teacher", "student"],
) -> Algorithm:
    teacher = _teacher(task_setup, optimizer.total_steps)
    return algorithms.distillation_algorithm(
        task_setup, config, optimizer, teacher=teacher, generator=generator
    )


ALGORITHMS = (
    AlgorithmRow(
        "sft",
        lambda task_setup, optimizer: algorithms.supervised_algorithm(task_setup, sft.Config(), optimizer),
        sft.Hyper(),
        "more supervised training on the demonstrations",
        IMITATION,
    ),
    AlgorithmRow(
        "best_of_n",
        functools.partial(_imitation, source="reference"),
        sft.Hyper(),
        "imitates the best of the reference's answers to each prompt",
        IMITATION,
    ),
    AlgorithmRow(
        "raft",
        functools.partial(_imitation, source="policy"),
        sft.Hyper(),
        "imitates the best of its own answers to each prompt",
        IMITATION,
    ),
    AlgorithmRow(
        "expert_iteration",
        functools.partial(_imitation, source="policy", every=True),
        sft.Hyper(),
        "imitates all of its own answers that are above the mean",
        IMITATION,
    ),
    AlgorithmRow(
        "distillation",
        functools.partial(_distilled, config=distillation.Config(), generator="teacher"),
        distillation.Hyper(),
        "soft labels on the answers of a teacher that was trained for longer",
        IMITATION,
    ),
    AlgorithmRow(
        "gkd",
        functools.partial(
            _distilled, config=distillation.Config(loss_fn=losses.reverse_kl_loss), generator="student"
        ),
        distillation.Hyper(),
        "the same teacher on the policy's answers, by reverse KL",
        IMITATION,
    ),
    AlgorithmRow(
        "dpo",
        _pairs(losses.dpo_loss, "reference"),
        preference.Hyper(beta=0.5),
        "DPO, reference's answers",
        OFFLINE,
    ),
    AlgorithmRow(
        "ipo",
        _pairs(losses.ipo_loss, "reference"),
        preference.Hyper(beta=0.5),
        "IPO, reference's answers",
        OFFLINE,
    ),
    AlgorithmRow(
        "simpo",
        _pairs(losses.simpo_loss, "reference"),
        preference.Hyper(beta=2.0),
        "SimPO, reference's answers",
        OFFLINE,
    ),
    AlgorithmRow(
        "kto",
        functools.partial(_unpaired, config=unpaired.Config()),
        unpaired.Hyper(beta=0.5),
        "KTO, reference's answers",
        OFFLINE,
    ),
    AlgorithmRow(
        "bco",
        functools.partial(_unpaired, config=unpaired.Config(shift_decay=0.9)),
        unpaired.Hyper(beta=0.5),
        "BCO, reference's answers",
        OFFLINE,
    ),
    AlgorithmRow(
        "online_dpo",
        _pairs(losses.dpo_loss, "policy"),
        preference.Hyper(beta=0.5),
        "DPO, the policy's answers",
        ONLINE,
    ),
    AlgorithmRow(
        "xpo",
        lambda task_setup, optimizer: algorithms.xpo_algorithm(
            task_setup, preference.Config(loss_fn=losses.xpo_loss), optimizer
        ),
        preference.Hyper(beta=0.5),
        "XPO: policy against reference, with optimism",
        ONLINE,
    ),
    AlgorithmRow(
        "nash_md",
        lambda task_setup, optimizer: algorithms.nash_md_algorithm(task_setup, nash_md.Config(), optimizer),
        nash_md.Hyper(beta=0.02),
        "Nash-MD: policy against its mixture with the reference",
        ONLINE,
    ),
    _variant("reinforce", grpo_variants.reinforce, "REINFORCE, batch mean as baseline"),
    _variant("reinforce++", grpo_variants.reinforce_plus_plus, "REINFORCE++"),
    _variant("rloo", grpo_variants.rloo, "RLOO"),
    _variant("remax", grpo_variants.remax, "ReMax", cost=1 + 1 / GROUP),
    _variant("opo", grpo_variants.opo, "OPO"),
    AlgorithmRow("ppo", _ppo, ppo.Hyper(kl_coef=0.02), "PPO with a value model"),
    _variant("grpo", grpo_variants.grpo, "GRPO"),
    _variant("grpo_2_epochs", grpo_variants.grpo, "GRPO, every batch twice", num_iterations=2),
    _variant(
        "grpo_behind",
        grpo_variants.grpo,
        "GRPO, rollouts one step behind, corrected",
        one_step_off_policy=True,
    ),
    _variant("dr_grpo", grpo_variants.dr_grpo, "Dr. GRPO"),
    _variant("dapo", _dapo, "DAPO, with resampling", cost=2.0),
    # What sets these apart is what they make of ratios, which are 1 in the first pass over a batch.
    _variant("gspo", grpo_variants.gspo, "GSPO, every batch twice", num_iterations=2),
    _variant("luspo", grpo_variants.luspo, "LUSPO, every batch twice", num_iterations=2),
    _variant("gmpo", grpo_variants.gmpo, "GMPO, every batch twice", num_iterations=2),
    _variant("cispo", grpo_variants.cispo, "CISPO, every batch twice", num_iterations=2),
    _variant("sapo", grpo_variants.sapo, "SAPO, every batch twice", num_iterations=2),
    _variant("vespo", grpo_variants.vespo, "VESPO, every batch twice", num_iterations=2),
)
assert len({algorithm.name for algorithm in ALGORITHMS}) == len(ALGORITHMS)
