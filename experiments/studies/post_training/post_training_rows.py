"""What the table of post-training algorithms is made of: tasks, algorithms, and every setting of both."""

import dataclasses
from collections.abc import Callable
from typing import Any

import post_training_methods as methods

from rlhf_jax import losses
from rlhf_jax.algorithms import distillation, grpo_variants, nash_md, ppo, preference, sft, unpaired
from rlhf_jax.jitted import algorithms
from rlhf_jax.tasks import arithmetic, base, calculator, countdown, style
from rlhf_jax.tasks.base import Task

__all__ = ["ALGORITHMS", "TASKS", "AlgorithmRow", "TaskRow"]


IMITATION, OFFLINE, ONLINE, POLICY_GRADIENT, OTHER_MODEL = FAMILIES = (
    "imitation",
    "preferences, offline",
    "preferences, online",
    "policy gradient",
    "another model's labels",
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
      make: (task with its model, optimizer) -> algorithm.
      hyper: what it is published with, or usual; the learning rate is searched.
      cost: answers it samples a step, as a multiple of 64.
      what: in a few words.
      family: what it learns from.
    """

    name: str
    make: methods.MakeFn
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


def _variant(
    name: str, what: str, *, variant: str = "", cost: float = 1.0, behind: bool = False, **changes: Any
) -> AlgorithmRow:
    """A variant of GRPO by its name, which is the row's where none is given."""
    make = grpo_variants.find_variant(variant or name)
    hyper = methods.group_variant(make, **changes).hyper
    method = methods.group_method(make, one_step_off_policy=behind, **changes)
    return AlgorithmRow(name, method, hyper, what, cost=cost)


def _pairs(
    name: str, what: str, loss_fn: preference.PairLossFn | None = None, *, wpo: bool = False, **hyper: Any
) -> AlgorithmRow:
    """A loss on pairs of the reference's answers, by the row's name where none is given."""
    loss_fn = loss_fn or preference.find_pair_loss(name)
    numbers = preference.Hyper(**{"beta": 0.5, **hyper})
    method = methods.pair_method(loss_fn, "reference", wpo=wpo)
    return AlgorithmRow(name, method, numbers, f"{what}, reference's answers", OFFLINE)


def _distilled(name: str, what: str, *args: Any, **options: Any) -> AlgorithmRow:
    return AlgorithmRow(name, methods.distilled(*args, **options), distillation.Hyper(), what, OTHER_MODEL)


TWICE: dict[str, Any] = {"num_iterations": 2}
"""Every batch twice: what sets these variants apart is what they make of ratios, 1 in the first pass."""

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
        methods.imitation_method("reference"),
        sft.Hyper(),
        "imitates the best of the reference's answers to each prompt",
        IMITATION,
    ),
    AlgorithmRow(
        "raft",
        methods.imitation_method("policy"),
        sft.Hyper(),
        "imitates the best of its own answers to each prompt",
        IMITATION,
    ),
    AlgorithmRow(
        "expert_iteration",
        methods.imitation_method("policy", every=True),
        sft.Hyper(),
        "imitates all of its own answers that are above the mean",
        IMITATION,
    ),
    _distilled(
        "distillation",
        "soft labels on the answers of a teacher that was trained for longer",
        losses.forward_kl_loss,
        "teacher",
    ),
    _distilled(
        "sequence_distillation",
        "imitates the answers of that teacher",
        losses.sampled_forward_kl_loss,
        "teacher",
        on_tokens=True,
    ),
    _distilled(
        "gkd", "GKD: the teacher on the policy's answers, by reverse KL", losses.reverse_kl_loss, "student"
    ),
    _distilled("gkd_js", "GKD by the Jensen-Shannon divergence", losses.generalized_js_loss, "student"),
    _distilled(
        "on_policy_distillation",
        "reverse KL of the tokens that the policy sampled",
        losses.sampled_reverse_kl_loss,
        "student",
        on_tokens=True,
    ),
    _distilled(
        "minillm",
        "MiniLLM: reverse KL of whole answers",
        losses.sequence_reverse_kl_loss,
        "student",
        on_tokens=True,
    ),
    AlgorithmRow(
        "rlaif_dpo",
        methods.judged(methods.pair_method(losses.dpo_loss, "reference")),
        preference.Hyper(beta=0.5),
        "DPO on pairs that the teacher judges by its log-probs",
        OTHER_MODEL,
    ),
    AlgorithmRow(
        "rlaif_grpo",
        methods.judged(methods.group_method(grpo_variants.grpo)),
        methods.group_variant(grpo_variants.grpo).hyper,
        "GRPO on the teacher's log-probs as rewards (direct RLAIF)",
        OTHER_MODEL,
    ),
    _pairs("dpo", "DPO"),
    _pairs("cdpo", "cDPO: DPO with smooth labels", losses.dpo_loss, loss_params={"label_smoothing": 0.1}),
    _pairs("robust", "robust DPO", loss_params={"label_smoothing": 0.1}),
    _pairs("hinge", "SLiC's hinge"),
    _pairs("ipo", "IPO"),
    _pairs("exo", "EXO", loss_params={"label_smoothing": 1e-3}),
    _pairs("nca", "NCA"),
    _pairs("bco_pair", "BCO on pairs"),
    _pairs("sppo", "SPPO with hard labels"),
    _pairs("aot", "AOT"),
    _pairs("aot_unpaired", "AOT, unpaired"),
    _pairs("apo_zero", "APO-zero"),
    _pairs("apo_down", "APO-down"),
    _pairs("discopop", "DiscoPOP", loss_params={"tau": 0.05}),
    _pairs("length_normalized", "DPO on log-ratios per token", beta=2.0),
    _pairs("orpo", "ORPO", beta=0.1),
    _pairs("cpo", "CPO", beta=0.1),
    _pairs("simpo", "SimPO", beta=2.0),
    _pairs("alpha_po", "AlphaPO", beta=2.5, loss_params={"gamma": 0.1, "alpha": 0.25}),
    _pairs("f_dpo_js", "f-DPO, Jensen-Shannon", losses.with_divergence(losses.dpo_loss, losses.js_score)),
    _pairs(
        "f_dpo_forward_kl",
        "f-DPO, forward KL",
        losses.with_divergence(losses.dpo_loss, losses.forward_kl_score),
    ),
    _pairs(
        "f_dpo_alpha",
        "f-DPO, alpha 1/2",
        losses.with_divergence(losses.dpo_loss, losses.alpha_divergence_score),
        loss_params={"alpha": 0.5},
    ),
    _pairs(
        "rpo", "RPO: DPO and likelihood", losses.with_nll(losses.dpo_loss), loss_params={"rpo_alpha": 1.0}
    ),
    _pairs(
        "mpo",
        "MPO: DPO, BCO and likelihood",
        losses.with_nll(losses.mixed_loss({"dpo": losses.dpo_loss, "bco_pair": losses.bco_pair_loss})),
        loss_params={"dpo_weight": 0.8, "bco_pair_weight": 0.2, "rpo_alpha": 1.0},
    ),
    _pairs("wpo", "WPO: DPO with weights", losses.dpo_loss, wpo=True),
    _pairs("ld_dpo", "LD-DPO", losses.dpo_loss, ld_alpha=0.5),
    AlgorithmRow(
        "kto",
        methods.unpaired_method(unpaired.Config()),
        unpaired.Hyper(beta=0.5),
        "KTO, reference's answers",
        OFFLINE,
    ),
    AlgorithmRow(
        "bco",
        methods.unpaired_method(unpaired.Config(shift_decay=0.9)),
        unpaired.Hyper(beta=0.5),
        "BCO, reference's answers",
        OFFLINE,
    ),
    AlgorithmRow(
        "online_dpo",
        methods.pair_method(losses.dpo_loss, "policy"),
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
    _variant("reinforce", "REINFORCE, batch mean as baseline"),
    _variant("reinforce_without_baseline", "REINFORCE on bare rewards"),
    _variant("reinforce++", "REINFORCE++"),
    _variant("reinforce++-baseline", "REINFORCE++, group mean as baseline"),
    _variant("rloo", "RLOO"),
    _variant("remax", "ReMax", cost=1 + 1 / methods.GROUP),
    _variant("opo", "OPO"),
    _variant("otb", "OTB"),
    _variant("gpg", "GPG"),
    _variant("dro", "DRO, every batch twice", **TWICE),
    _variant(
        "a_star_po",
        "A*-PO, values by four answers of the reference",
        cost=2.0,
        reference_samples=4,
        beta=methods.KL_COEF,
    ),
    AlgorithmRow("ppo", methods.ppo_method, ppo.Hyper(kl_coef=0.02), "PPO with a value model"),
    _variant("grpo", "GRPO"),
    _variant("grpo_2_epochs", "GRPO, every batch twice", variant="grpo", **TWICE),
    _variant("grpo_behind", "GRPO, rollouts one step behind, corrected", variant="grpo", behind=True),
    _variant("bnpo", "BNPO"),
    _variant("dr_grpo", "Dr. GRPO"),
    # Without its penalty on overlong answers, which these short tasks do not need.
    _variant("dapo", "DAPO, with resampling", cost=2.0, overlong_penalty_coef=0.0),
    _variant("lite_ppo", "Lite PPO"),
    _variant("gdpo", "GDPO of one reward"),
    _variant("max_rl", "MaxRL"),
    _variant("pass_at_k", "for pass@2"),
    _variant("gfpo", "GFPO, the two shortest of four"),
    _variant("cppo", "CPPO, two of four"),
    _variant("clip_cov", "Clip-Cov"),
    _variant("kl_cov", "KL-Cov, every batch twice", **TWICE),
    _variant("gspo", "GSPO, every batch twice", **TWICE),
    _variant("gspo_token", "GSPO-token, every batch twice", **TWICE),
    _variant("luspo", "LUSPO, every batch twice", **TWICE),
    _variant("gmpo", "GMPO, every batch twice", **TWICE),
    _variant("cispo", "CISPO, every batch twice", **TWICE),
    _variant("sapo", "SAPO, every batch twice", **TWICE),
    _variant("vespo", "VESPO, every batch twice", **TWICE),
    _variant("dppo_tv", "DPPO by total variation, every batch twice", **TWICE),
    _variant("dppo_kl", "DPPO by KL, every batch twice", **TWICE),
    _variant("m2po", "M2PO, every batch twice", **TWICE),
)
assert len({algorithm.name for algorithm in ALGORITHMS}) == len(ALGORITHMS)
