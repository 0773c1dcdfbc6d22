"""Runs the peer libraries on fixed inputs and freezes what they say: tests/golden/*.npz.

The tests compare our losses and kernels with these files, so that nobody needs PyTorch to run them. To
make them again (the `oracles` extra, in an environment of its own):

    pip install torch==2.13.0 trl transformers rlax
    python tools/make_goldens.py

TRL's losses live inside its trainers. Their unbound methods are called here with a small stand-in for
`self` and for the model, whose log-probabilities are the leaf that gradients are taken of. Everything is
float64 unless the peer itself computes in float32 (said per file below). Every file holds its inputs
beside the outputs.

losses_preference_trl.npz   (TRL: DPO, KTO, CPO, ORPO and reward trainers)
  policy_chosen_logp, policy_rejected_logp, ref_chosen_logp, ref_rejected_logp [B]: inputs, in nats
  chosen_length, rejected_length [B]: tokens
  margin [B]: of the reward trainer, whose rewards are policy_chosen_logp and policy_rejected_logp
  label [B] bool, kl_logp, kl_ref_logp [B]: of KTO on (policy_chosen_logp, ref_chosen_logp)
  cases: JSON, {case: {"function": our name, "kwargs": {...}}}
  {case}/value (), {case}/grad [n]: mean loss, gradient by the concatenated policy log-probs
  ORPO's odds ratio is float32 in TRL, and so is its alpha divergence.
losses_distillation_trl.npz   (TRL: GKD and self-distillation)
  student_logits, teacher_logits [B, T, V], mask [B, T] bool, tokens [B, T] int; cases, value, grad
  ([B, T, V], by student_logits) as above. Sums over unmasked tokens / their number.
losses_policy_trl.npz   (TRL: GRPO and GMPO trainers)
  logp, old_logp, ref_logp, entropy [B, T], advantages [B], mask [B, T] bool
  variants: JSON, {variant: the trainer's settings that differ from DEFAULTS below}
  {variant}/value (), {variant}/grad [B, T] by logp, {variant}/grad_entropy [B, T] by entropy
  DAPO, CISPO and VESPO divide by the number of unmasked tokens; Dr. GRPO by B * max_completion_length.
kernels_rlax.npz   (rlax; time runs along the last axis, [B, T] by vmap)
  {function}/{argument}: the inputs by rlax's own argument names, {function}/output (or output_errors,
  output_pg_advantage, output_q_estimate of vtrace_td_error_and_advantage), and {function}/grad by the
  logits or the quantiles for the losses.
"""

import functools
import json
import pathlib
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rlax
import torch
from trl.experimental.gmpo.gmpo_trainer import GMPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "tests" / "golden"
Arrays = dict[str, Any]


def accelerator() -> SimpleNamespace:
    """One process: gathering and reducing do nothing."""
    return SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=1,
        sync_gradients=True,
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
        pad_across_processes=lambda x, dim, pad_index: x,
    )


def trainer(**settings: Any) -> SimpleNamespace:
    """What the loss methods read of `self`, in evaluation mode (no scaling for accumulation)."""
    return SimpleNamespace(
        accelerator=accelerator(),
        aux_loss_enabled=False,
        model=SimpleNamespace(training=False),
        _metrics=defaultdict(lambda: defaultdict(list)),
        **settings,
    )


# Policy-gradient losses -------------------------------------------------------------------------------

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


# rlax -------------------------------------------------------------------------------------------------


def returns_calls(rng: np.random.Generator) -> dict[str, tuple[Any, Arrays, Arrays]]:
    """{function: (callable, arrays to vmap over, constants)} for returns and advantages."""
    shape = (3, 9)
    rewards, values = rng.standard_normal(shape), rng.standard_normal((3, 10))
    discounts = np.where(rng.random(shape) < 0.2, 0.0, 0.97)
    rho = np.exp(0.5 * rng.standard_normal(shape))
    q_t, pi_t = rng.standard_normal((3, 9, 4)), rng.dirichlet(np.ones(4), (3, 9))
    base = {"r_t": rewards, "discount_t": discounts}
    off_policy = base | {"v_tm1": values[:, :-1], "v_t": values[:, 1:], "rho_tm1": rho}
    actions = {"a_tm1": rng.integers(4, size=shape), "a_t": rng.integers(4, size=shape)}
    retrace = base | actions | {"q_tm1": rng.standard_normal((3, 9, 4)), "q_t": q_t, "pi_t": pi_t}
    retrace["mu_t"] = rng.uniform(0.1, 1.0, shape)
    q_and_v = {"q_t": q_t[:, :-1, 0], "v_t": values[:, 1:], "c_t": np.minimum(1, rho[:, 1:])}
    return {
        "truncated_generalized_advantage_estimation": (
            rlax.truncated_generalized_advantage_estimation,
            base | {"values": values},
            {"lambda_": 0.9},
        ),
        "lambda_returns": (rlax.lambda_returns, base | {"v_t": values[:, 1:]}, {"lambda_": 0.8}),
        "n_step_bootstrapped_returns": (
            rlax.n_step_bootstrapped_returns,
            base | {"v_t": values[:, 1:]},
            {"n": 3},
        ),
        "discounted_returns": (rlax.discounted_returns, base | {"v_t": values[:, 1:]}, {}),
        "vtrace": (rlax.vtrace, off_policy, {"lambda_": 0.9, "clip_rho_threshold": 1.0}),
        "vtrace_td_error_and_advantage": (
            rlax.vtrace_td_error_and_advantage,
            off_policy,
            {"lambda_": 0.9, "clip_rho_threshold": 1.2, "clip_pg_rho_threshold": 1.1},
        ),
        "retrace": (rlax.retrace, retrace, {"lambda_": 0.9, "eps": 0.0}),
        "general_off_policy_returns_from_q_and_v": (
            rlax.general_off_policy_returns_from_q_and_v,
            base | q_and_v,
            {},
        ),
    }


def distribution_calls(rng: np.random.Generator) -> dict[str, tuple[Any, Arrays, Arrays, str]]:
    """The same for losses on value distributions, with the name of the argument to differentiate."""
    atoms = np.linspace(-2, 2, 11)
    td = {"v_logits_tm1": rng.standard_normal((5, 11)), "v_logits_t": rng.standard_normal((5, 11))}
    td |= {"r_t": rng.standard_normal(5), "discount_t": np.array([0.9, 0.0, 0.99, 0.9, 0.5])}
    quantiles = {"dist_src": rng.standard_normal((5, 8)), "dist_target": rng.standard_normal((5, 6))}
    quantile_constants = {"tau_src": (np.arange(8) + 0.5) / 8}
    project = {"z_p": 2 * rng.standard_normal((5, 11)), "probs": rng.dirichlet(np.ones(11), 5)}
    loss = rlax.quantile_regression_loss
    return {
        "categorical_td_learning": (
            rlax.categorical_td_learning,
            td,
            {"v_atoms_tm1": atoms, "v_atoms_t": atoms},
            "v_logits_tm1",
        ),
        "categorical_l2_project": (rlax.categorical_l2_project, project, {"z_q": atoms}, "probs"),
        "quantile_regression_loss": (loss, quantiles, quantile_constants | {"huber_param": 0.0}, "dist_src"),
        "quantile_huber_loss": (loss, quantiles, quantile_constants | {"huber_param": 1.0}, "dist_src"),
    }


def make_kernels() -> None:
    """kernels_rlax.npz."""
    rng = np.random.default_rng(1)
    saved: Arrays = {}

    def call(name: str, function: Any, arrays: Arrays, constants: Arrays) -> Any:
        saved.update({f"{name}/{key}": value for key, value in (arrays | constants).items()})
        return jax.vmap(lambda rows: function(**rows, **constants))(jax.tree.map(jnp.asarray, arrays))

    for name, (function, arrays, constants) in returns_calls(rng).items():
        output = call(name, function, arrays, constants)
        named = output._asdict() if hasattr(output, "_asdict") else {"": output}
        saved |= {f"{name}/output{'_' * bool(key)}{key}": value for key, value in named.items()}
    for name, (function, arrays, constants, leaf) in distribution_calls(rng).items():
        saved[f"{name}/output"] = call(name, function, arrays, constants)

        def total(value: Any, function=function, arrays=arrays, constants=constants, leaf=leaf) -> Any:
            return jnp.sum(jax.vmap(lambda rows: function(**rows, **constants))(arrays | {leaf: value}))

        saved[f"{name}/grad"] = jax.grad(total)(jnp.asarray(arrays[leaf]))
    save("kernels_rlax", saved, {})


# ------------------------------------------------------------------------------------------------------


def save(name: str, inputs: Arrays, runs: dict[str, Arrays], **described: Any) -> None:
    """Writes one file; `described` becomes JSON."""
    arrays = dict(inputs)
    for case, outputs in runs.items():
        for key, value in outputs.items():
            arrays[f"{case}/{key}"] = value.detach() if isinstance(value, torch.Tensor) else value
    arrays |= {key: json.dumps(value) for key, value in described.items()}
    GOLDEN.mkdir(exist_ok=True)
    np.savez_compressed(
        GOLDEN / f"{name}.npz",
        allow_pickle=False,
        **{key: np.asarray(value) for key, value in arrays.items()},
    )
    print(f"{name}: {len(arrays)} arrays")


def main() -> None:
    """Makes every file."""
    torch.set_default_dtype(torch.float64)
    jax.config.update("jax_enable_x64", True)
    make_policy()
    make_kernels()


if __name__ == "__main__":
    main()
