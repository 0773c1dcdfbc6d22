"""DPO with a loss of one's own: python own_loss.py MODEL OUT."""

import sys

import jax
import jax.numpy as jnp

import rlhf_jax as rj


def margin_loss(pairs, *, beta, mask, denominator):
    lead = (pairs.policy_chosen - pairs.ref_chosen) - (pairs.policy_rejected - pairs.ref_rejected)
    loss = -jnp.sum(jnp.where(mask, jax.nn.log_sigmoid(beta * lead - 0.5), 0)) / denominator
    return loss, {"loss": loss, "accuracy": jnp.sum(mask & (lead > 0)) / denominator}


pairs = [{"prompt": f"{n} + 1 = ?", "chosen": str(n + 1), "rejected": "no idea"} for n in range(20)]
run = rj.dpo(rj.load(sys.argv[1]), pairs, loss=margin_loss, steps=3, batch_size=4, out=sys.argv[2])
print(run.metrics[-1]["loss"])
