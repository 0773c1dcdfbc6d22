"""Log-probs of the tokens that count, in chunks on meshes, against all logits at once: prints errors."""

import functools
import sys

import jax
import jax.numpy as jnp

from rlhf_jax import distributed
from rlhf_jax.kernels.logprobs import LARGE_VOCABULARY, dense_token_logprobs, token_logprobs

VOCABULARY = LARGE_VOCABULARY + 64
keys = jax.random.split(jax.random.key(0), 4)


def main(mesh):
    hidden = jax.random.normal(keys[0], (8, 32, 16), jnp.float64)
    unembedding = jax.random.normal(keys[1], (VOCABULARY, 16), jnp.float64)
    targets = jax.random.randint(keys[2], (8, 32), 0, VOCABULARY)
    # Devices have none of them, some and many.
    counted = jax.random.uniform(keys[3], (8, 32)) < jnp.linspace(0, 0.6, 8)[:, None]

    def dense(*inputs):
        return tuple(jnp.where(counted, found, 0) for found in dense_token_logprobs(*inputs))

    def total(function, hidden, unembedding):
        logp, entropy = function(hidden, unembedding, targets)
        return jnp.sum(jnp.sin(jnp.arange(logp.size).reshape(logp.shape)) * logp + entropy)

    def both(function):
        return jax.jit(jax.value_and_grad(functools.partial(total, function), argnums=(0, 1)))

    expected = both(dense)(hidden, unembedding)
    with jax.set_mesh(distributed.make_mesh(mesh)):
        found = both(functools.partial(token_logprobs, counted=counted, chunk_size=8))(hidden, unembedding)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        print(float(jnp.max(jnp.abs(one - other))))


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main(sys.argv[1])
