# %% [markdown]
# # A model of your own
#
# Everything above the models takes a few callables. `wrap` makes them of one function that returns logits, here an exponential average of
# embeddings in plain JAX; a module of Flax NNX or Linen does as well.

# %%
import jax
import jax.numpy as jnp

import rlhf_jax as rj
from rlhf_jax.data.tokenizers import byte_tokenizer

tokenizer, width = byte_tokenizer(), 16
keys = jax.random.split(jax.random.key(0))
params = {
    "embed": 0.1 * jax.random.normal(keys[0], (tokenizer.vocab_size, width)),
    "out": 0.1 * jax.random.normal(keys[1], (width, tokenizer.vocab_size)),
}


def apply_fn(params, tokens):
    states = params["embed"][tokens]
    time = jnp.arange(tokens.shape[1])
    past = jnp.tril(0.6 ** jnp.abs(time[:, None] - time))
    return jnp.einsum("ts,bsd->btd", past, states) @ params["out"]


policy = rj.wrap(apply_fn, params, tokenizer)

# %% [markdown]
# It samples, trains and is evaluated like any other.


# %%
def digits(prompts, completions, **fields):
    return [sum(c.isdigit() for c in text) / 4 for text in completions]


rows = [{"prompt": f"{n}?"} for n in range(8)]
shared = {"rewards": [digits], "max_new_tokens": 4}
print(f"before {rj.evaluate(policy, rows, **shared).sampled_score:.3f}")
run = rj.grpo(policy, rows, batch_size=8, group_size=8, steps=40, learning_rate=5e-2, quiet=True, **shared)
print(f"after  {rj.evaluate(run.policy, rows, **shared).sampled_score:.3f}")
