"""Log-probs behind a soft prompt on a mesh that splits columns, against one device: prints errors."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import distributed, models
from rlhf_jax.core.types import Sequences
from rlhf_jax.models import adapters

ROWS, COLUMNS, VOCAB = 2, 256, 32
CONFIG = models.dense_config(vocab_size=VOCAB, width=32, num_layers=2, num_heads=4, num_kv_heads=2)
CONFIG = dataclasses.replace(CONFIG, param_dtype="float64", compute_dtype="float64")


def main(mesh):
    score = models.make_logprob_fn(CONFIG)
    params = models.init_params(CONFIG, jax.random.key(0))
    params = adapters.init_adapter(adapters.PromptTuning(3), params, jax.random.key(1))
    tokens = jax.random.randint(jax.random.key(2), (ROWS, COLUMNS), 1, VOCAB)
    positions = jnp.broadcast_to(jnp.arange(COLUMNS), tokens.shape)
    rows = Sequences(tokens, positions, jnp.ones_like(tokens), positions > 0)
    gradient = jax.jit(jax.value_and_grad(lambda params, rows: jnp.sum(score(params, rows).logp)))
    expected = gradient(params, rows)
    with jax.set_mesh(distributed.make_mesh(mesh)):
        found = jax.device_get(gradient(distributed.shard_params(params), distributed.shard_batch(rows)))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        print(float(np.max(np.abs(one - other)) / np.max(np.abs(other))))


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main(sys.argv[1])
