"""Runs the peer libraries on fixed inputs and freezes what they say: tests/golden/*.npz.

The tests compare our losses and kernels with these files, so that nobody needs PyTorch to run them. To
make them again (the `oracles` extra, in an environment of its own):

    pip install torch==2.13.0 trl transformers rlax
    python tools/goldens/make_goldens.py

TRL's losses live inside its trainers. Their unbound methods are called here with a small stand-in for
`self` and for the model, whose log-probabilities are the leaf that gradients are taken of. Everything is
float64 unless the peer itself computes in float32 (said per file below). Every file holds its inputs
beside the outputs. Made with TRL 1.16.0, rlax 0.1.9 and PyTorch 2.13.0; that TRL has no unpaired BCO, XPO or
Nash-MD any more, so those losses are held by their oracles alone.

losses_preference_trl.npz   (TRL: DPO, KTO, CPO, ORPO and reward trainers)
  {policy,ref}_{chosen,rejected}_logp [B]: inputs, in nats; {chosen,rejected}_length [B]: tokens
  token_logp, token_mask, log_collision [2, B, T]: tokens of the policy's chosen and rejected responses
  margin [B]: of the reward trainer, whose rewards are policy_chosen_logp and policy_rejected_logp
  label [B] bool, kl_logp, kl_ref_logp [B]: of KTO on (policy_chosen_logp, ref_chosen_logp)
  cases: JSON, {case: {"function": our name, "kwargs": {...}}}
  {case}/value (), {case}/grad [n]: mean loss, gradient by the concatenated policy log-probs;
  {case}/token_grad [2B, T]: gradient by token_logp. Preference terms only, no likelihood terms.
  ORPO's odds ratio and the alpha divergence are float32 in TRL.
losses_distillation_trl.npz   (TRL: GKD and self-distillation)
  student_logits, teacher_logits [B, T, V], mask [B, T] bool, tokens [B, T] int
  {our function}/value (), {our function}/grad [B, T, V] by student_logits, as means over unmasked tokens;
  top_k_...: on the student's top 3 and the rest; the value of sampled_reverse_kl_loss is a surrogate's.
losses_policy_trl.npz   (TRL: GRPO and GMPO trainers)
  logp, old_logp, ref_logp, entropy [B, T], advantages [B], mask [B, T] bool
  variants: JSON, {variant: the trainer's settings used, in full}
  {variant}/value (), {variant}/grad [B, T] by logp, {variant}/grad_entropy [B, T] by entropy
  DAPO, CISPO and VESPO divide by the number of unmasked tokens; Dr. GRPO by B * max_completion_length.
corrections_verl.npz has a maker of its own, `goldens_verl.py`, since verl and TRL do not go together.
kernels_rlax.npz   (rlax; time runs along the last axis, [B, T] by vmap)
  {function}/{argument}: the inputs by rlax's own argument names, {function}/output (or output_errors,
  output_pg_advantage, output_q_estimate of vtrace_td_error_and_advantage), and {function}/grad by the
  logits or the quantiles for the losses.
"""

import jax
import torch
from goldens_policy import make_distillation, make_policy
from goldens_preference import make_preference
from goldens_rlax import make_kernels


def main() -> None:
    """Makes every file."""
    torch.set_default_dtype(torch.float64)
    jax.config.update("jax_enable_x64", True)
    make_preference()
    make_distillation()
    make_policy()
    make_kernels()


if __name__ == "__main__":
    main()
