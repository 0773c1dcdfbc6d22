# %% [markdown]
# # A loss of your own
#
# A loss is a function of arrays: log-probs of policy and reference on pairs go in, `(loss, metrics)` comes out. It never calls a model.

# %%
import jax
import jax.numpy as jnp

from rlhf_jax import losses

pairs = losses.PairLogps(
    jnp.array([-3.0, -9.0]), jnp.array([-5.0, -8.0]), jnp.array([-4.0, -9.0]), jnp.array([-4.0, -9.0])
)
for name in ("dpo", "hinge", "sppo"):
    loss, metrics = getattr(losses, f"{name}_loss")(pairs, beta=0.1)
    print(f"{name:6} {loss:.4f}  accuracy {metrics['accuracy']:.2f}")

# %% [markdown]
# Ours: DPO in which a pair counts as learnt only when it leads by a margin. `mask` are the pairs that count; dividing by `denominator` keeps
# the loss the same however the batch is split.


# %%
def margin_dpo_loss(pairs, *, beta, mask, denominator):
    lead = (pairs.policy_chosen - pairs.ref_chosen) - (pairs.policy_rejected - pairs.ref_rejected)
    logits = beta * lead - 0.5
    loss = -jnp.sum(jnp.where(mask, jax.nn.log_sigmoid(logits), 0)) / denominator
    return loss, {"loss": loss, "accuracy": jnp.sum(mask & (logits > 0)) / denominator}


# %% [markdown]
# Train by it. A decoder of one layer over bytes stands for a model.

# %%
import rlhf_jax as rj
from rlhf_jax import models
from rlhf_jax.data.tokenizers import byte_tokenizer

tokenizer = byte_tokenizer()
config = models.dense_config(vocab_size=tokenizer.vocab_size, width=16, num_layers=1, num_heads=2)
policy = models.make_policy(config, models.init_params(config, jax.random.key(0)), tokenizer)
rows = [{"prompt": f"{n}+1=?", "chosen": str(n + 1), "rejected": "no"} for n in range(8)]
run = rj.dpo(policy, rows, loss=margin_dpo_loss, batch_size=8, steps=20, learning_rate=3e-3, quiet=True)
losses_seen = [line["loss"] for line in run.metrics if "loss" in line]
print(f"loss {losses_seen[0]:.3f} at first, {losses_seen[-1]:.3f} at the end")
