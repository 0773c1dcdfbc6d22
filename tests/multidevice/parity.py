"""Updates and generation on meshes of 8 CPU devices against one device; one JSON line a case.

JAX_NUM_CPU_DEVICES=8 python tests/multidevice/parity.py float64 sft:data=8 ppo:fsdp=4,tensor=2
"""

import dataclasses
import functools
import json
import math
import sys
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from rlhf_jax import distributed, models
from rlhf_jax.algorithms import grpo, ppo, preference, sft
from rlhf_jax.core.axes import GATHERED_SAMPLING, RULES, axis_rules
from rlhf_jax.core.train_state import OptimizerConfig, apply_gradients, make_optimizer
from rlhf_jax.core.types import Sequences
from rlhf_jax.generation import Sampling
from rlhf_jax.models import config as parts
from rlhf_jax.planning.hlo_collectives import by_kind, collectives
from rlhf_jax.rollout.sampler import make_completion_fn

# Programs that run a few times are compiled quickly rather than well.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

STEPS, ROWS, POOL, TIME, VOCAB, WIDTH = 20, 16, 48, 16, 40, 16
# A larger epsilon than in training: Adam's division by the root of a vanishing moment turns the last bits
# of a gradient into steps of full size, on one device as on many.
TX = make_optimizer(OptimizerConfig("cosine", warmup_steps=0, total_steps=40, weight_decay=0.1, epsilon=1e-3))


def decoder_config(dtype, *, experts=False, **options):
    config = models.dense_config(
        vocab_size=VOCAB,
        width=WIDTH,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        intermediate_size=32,
        scan_layers=True,
        param_dtype=dtype,
        compute_dtype=dtype,
        **options,
    )
    if experts:
        [block] = config.pattern
        mixture = parts.MixtureOfExperts(4, 2, parts.GatedFeedForward(16))
        config = dataclasses.replace(config, pattern=(dataclasses.replace(block, feed_forward=mixture),))
    return config


def pool_of_rows(seed):
    """Rows of uneven lengths, so that devices hold uneven numbers of tokens."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, TIME + 1, POOL)[:, None]
    time = np.arange(TIME)
    valid = time < lengths
    return Sequences(
        rng.integers(0, VOCAB, (POOL, TIME)).astype(np.int32),
        np.where(valid, time, 0).astype(np.int32),
        valid.astype(np.int32),
        valid & (time >= 2),
    )


def pool_of_numbers(seed, dtype, shape=(POOL, TIME)):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def case_sft(config, dtype):
    update = sft.make_update(sft.Config(micro_batches=2), models.make_logprob_fn(config, chunk_size=24), TX)
    return functools.partial(models.init_params, config), sft.init, update, sft.Hyper(1e-2), pool_of_rows(0)


def case_dpo(config, dtype):
    score = models.make_logprob_fn(config)
    update = preference.make_update(preference.Config(), score, TX)
    numbers = (-20 + pool_of_numbers(seed, dtype, (POOL,)) for seed in (1, 2))
    pool = preference.Batch(pool_of_rows(0), pool_of_rows(1), *numbers)
    init = functools.partial(models.init_params, config)
    return init, preference.init, update, preference.Hyper(1e-2, 0.1), pool


def case_grpo(config, dtype):
    settings = grpo.Config(group_size=4, num_minibatches=2)
    update = grpo.make_update(settings, models.make_logprob_fn(config), TX)
    logps = (-3.7 + 0.3 * pool_of_numbers(seed, dtype) for seed in (1, 2))
    pool = grpo.Batch(pool_of_rows(0), *logps, pool_of_numbers(3, dtype, (POOL,)))
    hyper = grpo.Hyper(1e-2, entropy_coef=0.01, kl_coef=0.1)
    return functools.partial(models.init_params, config), grpo.init, update, hyper, pool


def case_ppo(config, dtype):
    """With text in each mini-batch, as in PPO-ptx."""
    score = models.make_logprob_fn(config)
    of_text = lambda params, text: score(params["policy"], text)  # noqa: E731
    settings = ppo.Config(num_ppo_epochs=1, num_minibatches=2)
    update = ppo.make_update(settings, models.make_actor_critic_fn(config), TX, of_text)
    rows, hyper = pool_of_rows(0), ppo.Hyper(1e-2, entropy_coef=0.01, ptx_coef=0.5)
    old_logp = -3.7 + 0.3 * pool_of_numbers(1, dtype)
    pool = ppo.Batch(rows, rows.mask, old_logp, *(pool_of_numbers(seed, dtype) for seed in (2, 3, 4)))

    def init(key):
        return {"policy": models.init_params(config, key), "value": models.init_scalar_model(config, key)}

    def both(state, hyper, batch_and_text):
        return update(state, hyper, *batch_and_text)

    return init, functools.partial(ppo.init, hyper=hyper), both, hyper, (pool, pool_of_rows(7))


CASES = {"sft": case_sft, "dpo": case_dpo, "grpo": case_grpo, "ppo": case_ppo}


def train(spec, case, config, dtype, *, breakage=None, repeats=1):
    """(losses, parameters) of 20 steps on the mesh `spec`, as often as asked, and the program."""
    init_params, init, update, hyper, pool = case(config, dtype)
    update = breakage(config) if breakage else update
    with jax.set_mesh(distributed.make_mesh(spec)):
        first = distributed.init_sharded(lambda key: init(init_params(key), TX, key), jax.random.key(0))
        jitted = jit(update, out_shardings=(distributed.shardings_of(first), None))
        batches = [
            distributed.shard_batch(
                jax.tree.map(lambda x, i=step: x[(np.arange(ROWS) + i * ROWS) % POOL], pool)
            )
            for step in range(STEPS)
        ]
        compiled = jitted.lower(first, hyper, batches[0]).compile()
        outcomes = []
        for _ in range(repeats):
            state, losses = first, []
            for batch in batches:
                state, metrics = compiled(state, hyper, batch)
                losses.append(metrics["loss"])
            assert int(state.learner.skipped) == 0
            outcomes.append((np.array(jax.device_get(losses)), jax.device_get(state.learner.params)))
    return outcomes, compiled


def distance(a, b):
    return max(
        float(np.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# What must fail ------------------------------------------------------------------------------------


def broken_update(gradient_of_rows):
    """SFT whose gradient is taken by `gradient_of_rows(loss_of, params, rows)` on each device of `data`."""

    def make(config):
        score = models.make_logprob_fn(config)

        def sums(params, rows):
            logp = jnp.where(rows.mask, score(params, rows).logp, 0)
            return -jnp.sum(logp), jnp.sum(rows.mask)

        def update(state, hyper, rows):
            split, whole = jax.tree.map(lambda _: P("data"), rows), P()
            gradients, loss = jax.shard_map(
                functools.partial(gradient_of_rows, sums),
                in_specs=(whole, split),
                out_specs=(whole, whole),
                check_vma=False,
            )(state.learner.params, rows)
            learner, guard = apply_gradients(
                state.learner, gradients, TX, learning_rate=hyper.learning_rate, loss=loss
            )
            return dataclasses.replace(state, learner=learner), {"loss": loss, **guard}

        return update

    return make


def by_hand(sums, params, rows):
    """As it should be: sums over all devices, divided once."""
    (total, count), gradients = jax.value_and_grad(sums, has_aux=True)(params, rows)
    total, count, gradients = jax.lax.psum((total, count, gradients), "data")
    return jax.tree.map(lambda g: g / count, gradients), total / count


def mean_of_means(sums, params, rows):
    (total, count), gradients = jax.value_and_grad(sums, has_aux=True)(params, rows)
    return jax.lax.pmean((jax.tree.map(lambda g: g / count, gradients), total / count), "data")


def missing_psum(sums, params, rows):
    (total, count), gradients = jax.value_and_grad(sums, has_aux=True)(params, rows)
    total, count = jax.lax.psum((total, count), "data")
    return jax.tree.map(lambda g: g * jax.lax.axis_size("data") / count, gradients), total / count


def dropped_micro_batch(sums, params, rows):
    kept = jax.tree.map(lambda x: x[: len(x) // 2], rows)
    (total, _), gradients = jax.value_and_grad(sums, has_aux=True)(params, kept)
    count = jnp.sum(rows.mask)
    total, count, gradients = jax.lax.psum((total, count, gradients), "data")
    return jax.tree.map(lambda g: g / count, gradients), total / count


CONTROLS = {f.__name__: broken_update(f) for f in (by_hand, mean_of_means, missing_psum, dropped_micro_batch)}


# Generation ----------------------------------------------------------------------------------------


NEW_TOKENS = 12


def sample(spec, config, temperature, rules=RULES):
    """(rollout, bytes that a device receives in gathers)."""
    rows = pool_of_rows(5)
    mask = np.flip(rows.segment_ids[:8, :6] > 0, axis=1)
    ids: Any = SimpleNamespace(eos_id=1, pad_id=0, vocab_size=VOCAB)  # all that sampling asks of a tokenizer
    run = make_completion_fn(models.make_policy(config, None, ids), max_new_tokens=NEW_TOKENS)
    with jax.set_mesh(distributed.make_mesh(spec)), axis_rules(rules):
        params = distributed.init_sharded(functools.partial(models.init_params, config), jax.random.key(0))
        prompts, mask = distributed.shard_batch((rows.tokens[:8, :6], mask))
        arguments = params, prompts, mask, jax.random.key(7)
        compiled = jit(run).lower(*arguments, sampling=Sampling(temperature)).compile()
        rollout = compiled(*arguments, sampling=Sampling(temperature))
        _, gathers = by_kind(collectives(compiled.as_text(), NEW_TOKENS)).get("all-gather", (0, 0.0))
        return jax.device_get(rollout), gathers


def same_rollouts(pairs):
    same = all(np.array_equal(a.sequences.tokens, b.sequences.tokens) for a, b in pairs)
    return {"same_tokens": same, "logp_error": max(distance(a.logp, b.logp) for a, b in pairs)}


# ---------------------------------------------------------------------------------------------------


@functools.cache
def reference(name, dtype, experts):
    return train("", CASES[name], decoder_config(dtype, experts=experts), dtype)[0][0]


def compare(name, spec, dtype):
    spec, _, backend = spec.partition("/")
    experts = "expert" in spec
    config = decoder_config(dtype, experts=experts, attention_backend=backend or "auto")
    if name == "generate":
        pairs = [[sample(s, config, t)[0] for s in ("", spec)] for t in (0.0, 1.0)]
        return same_rollouts(pairs)
    if name == "generate_gathered":
        (one, _), (split, often), (gathered, once) = (
            sample(*where, config, 1.0, rules)
            for *where, rules in (("", RULES), (spec, RULES), (spec, GATHERED_SAMPLING))
        )
        parameters = jax.eval_shape(functools.partial(models.init_params, config), jax.random.key(0))
        size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(parameters))
        return {**same_rollouts([(one, split), (one, gathered)]), "gathers": [often / size, once / size]}
    if name in CONTROLS:
        [(losses, params)], _ = train(spec, case_sft, config, dtype, breakage=CONTROLS[name])
        expected = reference("sft", dtype, experts)
        return {"loss_error": distance(losses, expected[0]), "params_error": distance(params, expected[1])}
    [(losses, params), again], compiled = train(spec, CASES[name], config, dtype, repeats=2)
    expected = reference(name, dtype, experts)
    found = [dataclasses.asdict(c) for c in collectives(compiled.as_text())]
    return {
        "loss_error": distance(losses, expected[0]),
        "params_error": distance(params, expected[1]),
        "repeats": distance(losses, again[0]) == 0 == distance(params, again[1]),
        "collectives": found,
    }


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", sys.argv[1] == "float64")
    for argument in sys.argv[2:]:
        name, _, spec = argument.partition(":")
        print(json.dumps({"name": name, "mesh": spec, **compare(name, spec, sys.argv[1])}), flush=True)
