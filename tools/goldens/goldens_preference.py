"""TRL's preference and reward losses: losses_preference_trl.npz."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from goldens_common import Arrays, save, trainer
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_trainer import RewardTrainer

DPO_CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    # case: (our function, TRL's loss_type, our keywords, TRL's settings)
    "dpo": ("dpo_loss", "sigmoid", {}, {}),
    "hinge": ("hinge_loss", "hinge", {}, {}),
    "ipo": ("ipo_loss", "ipo", {}, {}),
    "exo": ("exo_loss", "exo_pair", {"label_smoothing": 0.1}, {"label_smoothing": 0.1}),
    "nca": ("nca_loss", "nca_pair", {}, {}),
    "robust": ("robust_dpo_loss", "robust", {"label_smoothing": 0.2}, {"label_smoothing": 0.2}),
    "bco_pair": ("bco_pair_loss", "bco_pair", {}, {}),
    "sppo": ("sppo_loss", "sppo_hard", {}, {}),
    "aot": ("aot_loss", "aot", {"label_smoothing": 0.1}, {"label_smoothing": 0.1}),
    "aot_unpaired": ("aot_unpaired_loss", "aot_unpaired", {}, {}),
    "apo_zero": ("apo_zero_loss", "apo_zero", {}, {}),
    "apo_down": ("apo_down_loss", "apo_down", {}, {}),
    "discopop": ("discopop_loss", "discopop", {}, {}),
    "length_normalised_dpo": ("length_normalized_dpo_loss", "sigmoid_norm", {}, {}),
    "dpo_forward_kl": ("dpo_loss", "sigmoid", {"score": "forward_kl"}, {"f_divergence_type": "forward_kl"}),
    "dpo_js": ("dpo_loss", "sigmoid", {"score": "js"}, {"f_divergence_type": "js_divergence"}),
    "dpo_alpha": (
        "dpo_loss",
        "sigmoid",
        {"score": "alpha_divergence", "alpha": 0.7},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    ),
    "dpo_weighted": ("dpo_loss", "sigmoid", {"weighted": True}, {"use_weighting": True}),
    "dpo_ld": ("dpo_loss", "sigmoid", {"ld_alpha": 0.3}, {"ld_alpha": 0.3}),
}


def preference_inputs() -> Arrays:
    """Seven pairs, with the log-probabilities of their tokens and what WPO needs."""
    rng = np.random.default_rng(2)
    length = rng.integers(3, 9, (2, 7))
    mask = np.arange(8) < length[..., None]
    token_logp = -rng.gamma(1.0, 1.0, (2, 7, 8)) * mask
    policy = token_logp.sum(-1)
    ref = policy + 3.0 * rng.standard_normal((2, 7))
    kl_ref = policy[0] + rng.standard_normal(7)
    named = {"policy": policy, "ref": ref}
    rows = {f"{who}_{side}_logp": x[i] for who, x in named.items() for i, side in enumerate(SIDES)}
    return rows | {
        "chosen_length": length[0],
        "rejected_length": length[1],
        "token_logp": token_logp,
        "token_mask": mask,
        "log_collision": -rng.gamma(1.0, 0.7, (2, 7, 8)) * mask,
        "margin": rng.uniform(0, 1, 7),
        "label": np.array([1, 0, 0, 1, 1, 0, 1], bool),
        "kl_logp": kl_ref + 0.5 + rng.standard_normal(7),
        "kl_ref_logp": kl_ref,
    }


SIDES = ("chosen", "rejected")


def peer_model(token_logp: torch.Tensor, log_collision: torch.Tensor) -> Any:
    """A model whose fused head says these log-probabilities of the response tokens."""
    zeros = torch.zeros_like(token_logp)
    outputs = SimpleNamespace(
        log_probs=token_logp,
        log_sum_sq_probs=log_collision,
        entropy=zeros,
        mean_logits=zeros,
        is_top1=zeros.bool(),
    )
    return lambda **kwargs: outputs


def run_dpo(inputs: Arrays, loss_type: str, settings: dict[str, Any]) -> Arrays:
    """One loss type of TRL's DPO trainer."""
    # A first column that belongs to the prompt, because the trainer drops it when it shifts.
    mask = torch.tensor(np.pad(inputs["token_mask"].reshape(14, 8), ((0, 0), (1, 0)))).long()
    tokens = torch.tensor(inputs["token_logp"].reshape(14, 8), requires_grad=True)
    defaults = {"beta": 0.1, "label_smoothing": 0.0, "f_divergence_type": "reverse_kl", "ld_alpha": None}
    self = trainer(
        args=SimpleNamespace(discopop_tau=0.05),
        loss_types=[loss_type],
        loss_weights=[1.0],
        precompute_ref_logps=True,
        **defaults | {"use_weighting": False} | settings,
    )
    dtype = torch.float32 if settings.get("f_divergence_type") == "alpha_divergence" else torch.float64
    ref = {f"ref_{side}_logps": torch.tensor(inputs[f"ref_{side}_logp"], dtype=dtype) for side in SIDES}
    batch = {"completion_mask": mask, "input_ids": mask, "attention_mask": mask} | ref
    model = peer_model(tokens.to(dtype), torch.tensor(inputs["log_collision"].reshape(14, 8)))
    loss = DPOTrainer._compute_loss(self, model, batch, False)
    (grad,) = torch.autograd.grad(loss, tokens)
    # The response's log-probability is a sum of its tokens', so each carries the gradient of the sum;
    # only LD-DPO gives them different ones.
    return {"value": loss, "grad": grad.reshape(2, 7, 8)[:, :, 0].reshape(-1), "token_grad": grad}


def run_kto(inputs: Arrays, sign: float) -> Arrays:
    """TRL's KTO trainer; `sign` flips the KL estimate, which is cut off at 0."""
    logp = torch.tensor(inputs["policy_chosen_logp"], requires_grad=True)
    mask = torch.ones(7, 2, dtype=torch.long)
    self = trainer(
        beta=0.1,
        loss_type="kto",
        desirable_weight=1.3,
        undesirable_weight=0.8,
        calculate_KL=True,
        precompute_ref_logps=True,
        _compute_kl_logps=lambda model, batch: sign * torch.tensor(inputs["kl_logp"] - inputs["kl_ref_logp"]),
    )
    batch = {"label": torch.tensor(inputs["label"]), "completion_mask": mask, "input_ids": mask}
    batch |= {"attention_mask": mask, "ref_logps": torch.tensor(inputs["ref_chosen_logp"])}
    batch |= {"ref_KL_logps": torch.zeros(7)}
    loss = KTOTrainer._compute_loss(self, peer_model(logp[:, None], logp[:, None]), batch, False)
    return {"value": loss, "grad": torch.autograd.grad(loss, logp)[0]}


def run_reference_free(inputs: Arrays, case: str, settings: dict[str, Any]) -> Arrays:
    """TRL's CPO and ORPO trainers (their preference term), and its reward trainer."""
    names = [f"policy_{side}_logp" for side in SIDES]
    logp = torch.tensor(np.concatenate([inputs[name] for name in names]), requires_grad=True)
    chosen, rejected = logp.chunk(2)
    lengths = [torch.tensor(inputs[f"{side}_length"]) for side in SIDES]
    self = trainer(**settings)
    if case.startswith("reward"):
        self.args = SimpleNamespace(center_rewards_coefficient=settings.get("centring"))
        model = lambda **kwargs: SimpleNamespace(logits=logp[:, None])  # noqa: E731
        batch = {"margin": torch.tensor(inputs["margin"])} if settings.get("margin") else {}
        loss = RewardTrainer.compute_loss(self, model, batch)
    elif case == "orpo":
        loss = -ORPOTrainer.odds_ratio_loss(self, chosen / lengths[0], rejected / lengths[1])[0].mean()
    elif case == "cpo":
        loss = CPOTrainer.cpo_loss(self, chosen, rejected)[0].mean()
    else:
        loss = CPOTrainer.cpo_loss(self, chosen / lengths[0], rejected / lengths[1])[0].mean()
    return {"value": loss, "grad": torch.autograd.grad(loss, logp)[0]}


def make_preference() -> None:
    """losses_preference_trl.npz."""
    inputs, runs, cases = preference_inputs(), {}, {}
    for case, (function, loss_type, kwargs, settings) in DPO_CASES.items():
        runs[case] = run_dpo(inputs, loss_type, settings)
        cases[case] = {"function": function, "kwargs": {"beta": 0.1} | kwargs}
    weights = {"beta": 0.1, "desirable_weight": 1.3, "undesirable_weight": 0.8}
    for case, sign in {"kto": 1.0, "kto_kl_at_0": -1.0}.items():
        runs[case] = run_kto(inputs, sign)
        cases[case] = {"function": "kto_loss", "kwargs": weights | {"kl_sign": sign}}
    smoothing = {"beta": 0.1, "label_smoothing": 0.1}
    simpo = {"beta": 2.0, "gamma": 0.7}
    free = {
        "cpo": (
            "cpo_loss",
            smoothing | {"nll_weight": 0.0},
            smoothing | {"loss_type": "sigmoid", "alpha": 0.0},
        ),
        "simpo": ("simpo_loss", simpo, {"alpha": 0.0}),
        "alpha_po": ("alpha_po_loss", simpo | {"alpha": 0.25}, {"alpha": 0.25}),
        "orpo": ("orpo_loss", {"beta": 0.2, "nll_weight": 0.0}, {"beta": 0.2}),
        "reward": ("bradley_terry_loss", {}, {}),
        "reward_margin": ("bradley_terry_loss", {"margin": True, "centring": 0.01}, {}),
    }
    simpo_settings = {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.7, "label_smoothing": 0.0}
    for case, (function, kwargs, settings) in free.items():
        shared = simpo_settings if case in ("simpo", "alpha_po") else {}
        runs[case] = run_reference_free(
            inputs, case, shared | settings | (kwargs if "reward" in case else {})
        )
        cases[case] = {"function": function, "kwargs": kwargs}
    save("losses_preference_trl", inputs, runs, cases=cases)
