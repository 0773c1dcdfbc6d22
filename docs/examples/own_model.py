"""A plain-JAX language model of one's own in GRPO and PPO, with evaluation: python own_model.py OUT."""

import sys

import jax
import jax.numpy as jnp

import rlhf_jax as rj
from rlhf_jax.data.tokenizers import byte_tokenizer

tokenizer, width = byte_tokenizer(), 16


def hidden(params, tokens, positions, segment_ids):
    """An exponential average of the embeddings so far."""
    seen = jnp.where(segment_ids[..., None] > 0, params["embedding"][tokens], 0)
    _, states = jax.lax.scan(lambda h, x: (0.5 * h + x,) * 2, seen[:, 0] * 0, seen.swapaxes(0, 1))
    return states.swapaxes(0, 1)


def apply(params, *inputs):
    return hidden(params, *inputs) @ params["head"]


def digits(prompts, completions, **_):
    return [sum(c.isdigit() for c in text) / 4 for text in completions]


shapes = {"embedding": (tokenizer.vocab_size, width), "head": (width, tokenizer.vocab_size)}
params = {name: 0.1 * jax.random.normal(jax.random.key(0), shape) for name, shape in shapes.items()}
policy = rj.wrap(apply, params, tokenizer, hidden_fn=hidden)
rows = [{"prompt": f"{n}?"} for n in range(8)]
sizes = {"steps": 3, "max_new_tokens": 4, "batch_size": 4}
run = rj.grpo(policy, rows, rewards=[digits], group_size=4, out=sys.argv[1] + "/grpo", **sizes)
run = rj.ppo(run.policy, rows, rewards=[digits], num_minibatches=1, out=sys.argv[1] + "/ppo", **sizes)
print(rj.evaluate(run.policy, rows, rewards=[digits], max_new_tokens=4).score)
