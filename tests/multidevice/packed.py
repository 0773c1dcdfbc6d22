"""A step of GRPO on packed answers on a mesh, against the same step on rows as they are: prints errors."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax import distributed, models
from rlhf_jax.algorithms import grpo
from rlhf_jax.core.types import Rollout
from rlhf_jax.data.packing import completion_rows
from rlhf_jax.models.logprob_fns import make_logprob_fn
from rlhf_jax.rollout.packed_rows import layouts_of_batch
from rlhf_jax.rollout.step import make_grpo_train_step

ROWS, PROMPT, NEW, VOCAB = 32, 12, 12, 64
CONFIG = models.dense_config(vocab_size=VOCAB, width=32, num_layers=2, num_heads=4, num_kv_heads=4)
CONFIG = dataclasses.replace(CONFIG, param_dtype="float64", compute_dtype="float64")
TX = optax.sgd(1.0)


def rollout_of():
    rng = np.random.default_rng(0)
    prompts, answers = ([rng.integers(0, VOCAB, n) for n in rng.integers(1, 12, ROWS)] for _ in range(2))
    sequences = completion_rows(prompts, answers, prompt_length=PROMPT, max_new_tokens=NEW)
    return Rollout(sequences, np.where(sequences.mask, -4.0, 0.0), np.ones(ROWS, bool))


def main(mesh):
    config, hyper = grpo.Config(group_size=4, micro_batches=2), grpo.Hyper(learning_rate=0.05, kl_coef=0.1)
    params = models.init_params(CONFIG, jax.random.key(0))
    params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
    reference = jax.tree.map(lambda x: x + 0.01, params)
    rewards = np.sin(np.arange(ROWS, dtype=np.float64))
    step = jax.jit(make_grpo_train_step(config, make_logprob_fn(CONFIG), TX))

    def moved(params, reference, data, layouts):
        state, metrics = step(
            grpo.init(params, TX, jax.random.key(0)), hyper, reference, *data, layouts=layouts
        )
        return jax.device_get(state.learner.params), float(metrics["columns_per_token"])

    expected, of_rows = moved(params, reference, (rollout_of(), rewards), ())
    with jax.set_mesh(distributed.make_mesh(mesh)):
        data = distributed.shard_batch((rollout_of(), rewards))
        layouts = layouts_of_batch([data[0].sequences], [ROWS // 2])
        found, of_packed = moved(*map(distributed.shard_params, (params, reference)), data, layouts)
    print(of_packed / of_rows)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        print(float(np.max(np.abs(one - other))))


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main(sys.argv[1])
