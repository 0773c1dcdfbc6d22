"""verl's rollout corrections and losses of DPPO and GPG: corrections_verl.npz.

Made apart from the others, since verl and TRL do not go together: `pip install verl==0.9.1`, then
`python tools/goldens/goldens_verl.py`. Everything is float64.

corrections_verl.npz
  old_logp, sampler_logp, logp [B, T], advantages [B], mask [B, T] bool
  {preset}/weights [B, T], {preset}/mask [B, T]: of verl's configurations without bypass, by our names
  rule_{name}/mask [B, T]: of each rule alone; thresholds: JSON, {rule: verl's text}
  metrics/{name} (): chi2_token, chi2_seq, log_ppl_diff
  dppo_{tv,kl}/value (), /grad [B, T] by logp: token mean, bounds 0.03 and 0.05 (kl: 0.004 and 0.008), cap 1.4
  gpg/value (), /grad [B, T] by logp: token mean
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from goldens_common import Arrays, save
from verl.trainer.config.algorithm import RolloutCorrectionConfig
from verl.trainer.ppo import core_algos, rollout_corr_helper

PRESETS = {
    "tis": RolloutCorrectionConfig.decoupled_token_is,
    "seq_is": RolloutCorrectionConfig.decoupled_seq_is,
    "icepop": RolloutCorrectionConfig.decoupled_token_icepop,
    "seq_is_rs": RolloutCorrectionConfig.decoupled_seq_is_rs,
    "geo_rs": RolloutCorrectionConfig.decoupled_geo_rs,
    "geo_rs_token_tis": RolloutCorrectionConfig.decoupled_geo_rs_token_tis,
    "geo_rs_seq_tis": RolloutCorrectionConfig.decoupled_geo_rs_seq_tis,
    "k3_rs": RolloutCorrectionConfig.decoupled_k3_rs,
    "k3_rs_token_tis": RolloutCorrectionConfig.decoupled_k3_rs_token_tis,
    "k3_rs_seq_tis": RolloutCorrectionConfig.decoupled_k3_rs_seq_tis,
}
THRESHOLDS = {
    "token_k1": "0.7_1.5",
    "token_k2": "0.02",
    "token_k3": "0.02",
    "seq_sum_k1": "0.6_1.4",
    "seq_sum_k2": "0.1",
    "seq_sum_k3": "0.1",
    "seq_mean_k1": "0.9_1.2",
    "seq_mean_k2": "0.03",
    "seq_mean_k3": "0.03",
    "seq_max_k2": "0.08",
    "seq_max_k3": "0.08",
}
SETTINGS = {"tv": (0.03, 0.05), "kl": (0.004, 0.008)}


def make_inputs() -> Arrays:
    """Half of the answers are near the sampler, so that narrow rules keep some."""
    rng = np.random.default_rng(0)
    mask = np.arange(6) < np.array([6, 3, 1, 5, 4, 6, 2, 6])[:, None]
    old = -rng.gamma(1.0, 1.0, mask.shape) - 0.01
    scale = np.where(np.arange(8) % 2, 0.4, 2e-4)[:, None]
    return {
        "old_logp": old,
        "sampler_logp": old + scale * rng.normal(size=mask.shape),
        "logp": np.minimum(old + 0.3 * rng.normal(size=mask.shape), -0.01),
        "advantages": rng.normal(size=8),
        "mask": mask,
    }


def correct(inputs: Arrays, **settings: Any) -> Arrays:
    """What verl makes of one configuration."""
    weights, mask, metrics = rollout_corr_helper.compute_rollout_correction_and_rejection_mask(
        torch.tensor(inputs["old_logp"]),
        torch.tensor(inputs["sampler_logp"]),
        torch.tensor(inputs["mask"], dtype=torch.float64),
        **settings,
    )
    found = {"mask": mask > 0.5}
    if weights is not None:
        found["weights"] = weights.batch["rollout_is_weights"]
    return {**found, "metrics": metrics}


def policy_loss(inputs: Arrays, name: str, low: float = 0.2, high: float = 0.2) -> Arrays:
    """Value and gradient of a policy loss."""
    config = SimpleNamespace(
        clip_ratio=high,
        clip_ratio_low=low,
        clip_ratio_high=high,
        global_batch_info={},
        get=lambda name, default: 1.4,
    )
    logp = torch.tensor(inputs["logp"], requires_grad=True)
    loss, _ = core_algos.get_policy_loss_fn(name)(
        torch.tensor(inputs["old_logp"]),
        logp,
        torch.tensor(inputs["advantages"])[:, None].expand(*logp.shape),
        torch.tensor(inputs["mask"], dtype=torch.float64),
        config=config,
    )
    loss.backward()
    return {"value": loss, "grad": logp.grad}


def main() -> None:
    """Makes the file."""
    inputs, runs = make_inputs(), {}
    metrics = {}
    for name, make in PRESETS.items():
        config = make()
        runs[name] = correct(
            inputs,
            rollout_is=config.rollout_is,
            rollout_is_threshold=config.rollout_is_threshold,
            rollout_rs=config.rollout_rs,
            rollout_rs_threshold=config.rollout_rs_threshold,
        )
        metrics = runs[name].pop("metrics")
    for name, threshold in THRESHOLDS.items():
        run = correct(inputs, rollout_is=None, rollout_rs=name, rollout_rs_threshold=threshold)
        runs[f"rule_{name}"] = {"mask": run["mask"]}
    names = ("chi2_token", "chi2_seq", "log_ppl_diff")
    runs["metrics"] = {name: metrics[f"rollout_corr/{name}"] for name in names}
    runs |= {f"dppo_{kind}": policy_loss(inputs, f"dppo_{kind}", *SETTINGS[kind]) for kind in SETTINGS}
    runs["gpg"] = policy_loss(inputs, "gpg")
    save("corrections_verl", inputs, runs, thresholds=THRESHOLDS)


if __name__ == "__main__":
    main()
