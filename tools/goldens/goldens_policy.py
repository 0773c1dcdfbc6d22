"""TRL's policy-gradient and distillation losses: losses_policy_trl.npz, losses_distillation_trl.npz."""

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from goldens_common import Arrays, save, trainer
from trl.experimental.gkd.gkd_trainer import GKDTrainer
from trl.experimental.gmpo.gmpo_trainer import GMPOTrainer
from trl.experimental.sdft import loss_utils as self_distillation
from trl.trainer.grpo_trainer import GRPOTrainer

DEFAULTS = {
    "loss_type": "grpo",
    "importance_sampling_level": "token",
    "epsilon_low": 0.2,
    "epsilon_high": 0.28,
    "delta": None,
    "beta": 0.0,
    "use_bias_correction_kl": False,
    "top_entropy_quantile": 1.0,
    "off_policy_mask_threshold": None,
    "entropy_coef": 0.0,
    "max_completion_length": 16,
    "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.05,
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "grpo_delta": {"delta": 1.4},
    "grpo_kl": {"beta": 0.04},
    "grpo_kl_corrected": {"beta": 0.04, "use_bias_correction_kl": True},
    "grpo_top_entropy": {"top_entropy_quantile": 0.4},
    "grpo_off_policy_mask": {"off_policy_mask_threshold": -0.05},
    "grpo_entropy_bonus": {"entropy_coef": 0.01},
    "gspo": {"importance_sampling_level": "sequence", "epsilon_low": 0.03, "epsilon_high": 0.04},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo"},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "luspo_token": {"loss_type": "luspo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.2},
    "sapo": {"loss_type": "sapo"},
    "vespo": {"loss_type": "vespo"},
    "gmpo": {"trainer": "gmpo", "epsilon_low": 0.4, "epsilon_high": 0.4},
    "gmpo_kl": {"trainer": "gmpo", "epsilon_low": 0.1, "epsilon_high": 0.1, "beta": 0.04},
}


def policy_inputs() -> Arrays:
    """Six rows of up to seven tokens, some of them masked inside, ratios on both sides of every clip."""
    rng = np.random.default_rng(0)
    shape = (6, 7)
    mask = np.arange(7) < np.array([7, 5, 1, 6, 3, 7])[:, None]
    mask[0, 2] = mask[3, 1] = False
    logp = -rng.gamma(1.0, 1.0, shape)
    return {
        "logp": logp * mask,
        "old_logp": (logp + 0.25 * rng.standard_normal(shape)) * mask,
        "ref_logp": (logp + 0.5 * rng.standard_normal(shape)) * mask,
        "entropy": rng.gamma(2.0, 0.5, shape) * mask,
        "advantages": np.array([1.3, -0.7, 0.4, -1.1, 0.9, 0.0]),
        "mask": mask,
    }


def run_policy(inputs: Arrays, variant: dict[str, Any]) -> Arrays:
    """Value and gradients of one configuration of TRL's GRPO or GMPO loss."""
    settings = DEFAULTS | variant
    logp = torch.tensor(inputs["logp"], requires_grad=True)
    entropy = torch.tensor(inputs["entropy"], requires_grad=True)
    mask = torch.tensor(inputs["mask"]).to(torch.float64)
    self = trainer(
        args=SimpleNamespace(steps_per_generation=1, **settings),
        current_gradient_accumulation_steps=1,
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        use_vllm=False,
        use_adaptive_entropy=False,
        _entropy_bonus_enabled=settings["entropy_coef"] > 0,
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logp, entropy, None),
        **{name: value for name, value in settings.items() if name not in ("delta", "trainer")},
    )
    self.get_high_entropy_mask = functools.partial(GRPOTrainer.get_high_entropy_mask, self)
    ids = torch.zeros(inputs["mask"].shape, dtype=torch.long)
    batch = {"prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids}
    batch |= {"completion_mask": mask, "num_items_in_batch": mask.sum()}
    batch |= {"advantages": torch.tensor(inputs["advantages"])}
    batch |= {"old_per_token_logps": torch.tensor(inputs["old_logp"])}
    batch |= {"ref_per_token_logps": torch.tensor(inputs["ref_logp"])}
    owner = GMPOTrainer if settings.get("trainer") == "gmpo" else GRPOTrainer
    loss = owner._compute_loss(self, None, batch)
    grad, grad_entropy = torch.autograd.grad(loss, [logp, entropy], allow_unused=True)
    zeros = torch.zeros_like(entropy)
    return {"value": loss, "grad": grad, "grad_entropy": zeros if grad_entropy is None else grad_entropy}


def make_policy() -> None:
    """losses_policy_trl.npz."""
    inputs = policy_inputs()
    runs = {name: run_policy(inputs, variant) for name, variant in VARIANTS.items()}
    save("losses_policy_trl", inputs, runs, variants={name: DEFAULTS | v for name, v in VARIANTS.items()})


def make_distillation() -> None:
    """losses_distillation_trl.npz."""
    rng = np.random.default_rng(3)
    shape = (2, 4, 6)
    mask = np.array([[1, 1, 1, 0], [0, 1, 1, 1]], bool)
    inputs = {f"{who}_logits": 1.5 * rng.standard_normal(shape) for who in ("student", "teacher")}
    inputs |= {"mask": mask, "tokens": rng.integers(6, size=shape[:2])}
    teacher, tokens = torch.tensor(inputs["teacher_logits"]), torch.tensor(inputs["tokens"])
    labels = torch.where(torch.tensor(mask), 0, -100)
    divergence = functools.partial(GKDTrainer.generalized_jsd_loss, labels=labels)
    top_k = functools.partial(
        self_distillation.compute_topk_self_distillation_loss, distillation_topk=3, distillation_add_tail=True
    )
    sampled = self_distillation.compute_sampled_token_self_distillation_loss
    mean = lambda values: values[torch.tensor(mask)].mean()  # noqa: E731
    calls = {
        "forward_kl_loss": lambda x: divergence(x, teacher, beta=0),
        "reverse_kl_loss": lambda x: divergence(x, teacher, beta=1),
        "generalised_js_loss": lambda x: divergence(x, teacher, beta=0.3),
        "top_k_forward_kl_loss": lambda x: mean(top_k(x, teacher, distillation_alpha=0.0)),
        "top_k_reverse_kl_loss": lambda x: mean(top_k(x, teacher, distillation_alpha=1.0)),
        "sampled_reverse_kl_loss": lambda x: mean(sampled(x, teacher, tokens, distillation_alpha=1.0)),
    }
    runs = {}
    for name, call in calls.items():
        student = torch.tensor(inputs["student_logits"], requires_grad=True)
        loss = call(student)
        runs[name] = {"value": loss, "grad": torch.autograd.grad(loss, student)[0]}
    save("losses_distillation_trl", inputs, runs)
