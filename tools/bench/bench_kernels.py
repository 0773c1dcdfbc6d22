"""Times the kernels and losses side by side in one run, and prints tables with ratios.

    python tools/bench/bench_kernels.py  # everything; several minutes on two cores
    python tools/bench/bench_kernels.py --sections returns losses        # without the large matrices
    python tools/bench/bench_kernels.py --logprobs.vocab 32768 --logprobs.time 256 --repeats 3
    python tools/bench/bench_kernels.py --bandwidth 3350  # GB/s of the device: adds a share of it

`logprobs`  chunked log-probs and entropy against dense, forward and backward: time, and temporary bytes
            from the compiled program's own memory analysis (also for sizes too large to run).
`returns`   GAE and V-trace against a hand-written scan without masks, the associative scan, and rlax
            where it is installed.
`losses`    value and gradient of each loss as a share of one forward pass of a tiny decoder.

The rows of a table take turns, round by round, and the least time of each is reported.
"""

import dataclasses
import importlib
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro

from rlhf_jax import kernels
from rlhf_jax.core.types import Sequences
from rlhf_jax.kernels import returns
from rlhf_jax.losses import PairLogps, policy, policy_ratios, policy_surrogates, preference, value
from rlhf_jax.models import dense_config, init_params, make_logprob_fn

Section = Literal["logprobs", "returns", "losses"]
Calls = dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]


@dataclasses.dataclass(frozen=True)
class LogprobSizes:
    """Sizes of the log-prob section.

    Attributes:
      batch: rows.
      time: tokens a row.
      width: of the hidden states.
      vocab: vocabularies to compile and analyse.
      run_up_to: largest vocabulary that is also timed.
      chunk_size: tokens whose logits are held at once.
    """

    batch: int = 8
    time: int = 1024
    width: int = 1024
    vocab: tuple[int, ...] = (32_768, 131_072)
    run_up_to: int = 32_768
    chunk_size: int = 512


@dataclasses.dataclass(frozen=True)
class ReturnSizes:
    """Rows and lengths of the returns section."""

    batch: int = 8
    time: tuple[int, ...] = (128, 2_048, 65_536)


@dataclasses.dataclass(frozen=True)
class LossSizes:
    """Rows and tokens of the losses section, and the tiny decoder it is measured against."""

    batch: int = 16
    time: int = 256
    width: int = 128
    num_layers: int = 4
    vocab: int = 512


@dataclasses.dataclass(frozen=True)
class Bench:
    """What to run.

    Attributes:
      sections: which tables.
      repeats: rounds; the least time of each row counts.
      bandwidth: memory bandwidth of the device in GB/s; adds the share of it that inputs and outputs alone
        would need.
    """

    sections: tuple[Section, ...] = ("logprobs", "returns", "losses")
    repeats: int = 5
    bandwidth: float | None = None
    logprobs: LogprobSizes = LogprobSizes()
    returns: ReturnSizes = ReturnSizes()
    losses: LossSizes = LossSizes()


def least_times(calls: Calls, repeats: int) -> dict[str, float]:
    """Seconds of each call, compiled and warm: the least over rounds in which all take turns."""
    compiled = {name: (jax.jit(function), arguments) for name, (function, arguments) in calls.items()}
    times = {name: float("inf") for name in calls}
    for round_ in range(repeats + 1):
        for name, (function, arguments) in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            if round_ > 0:
                times[name] = min(times[name], time.perf_counter() - start)
    return times


def traffic_bytes(function: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
    """Bytes of inputs and outputs: what a perfect kernel moves."""
    leaves = jax.tree.leaves((arguments, jax.eval_shape(function, *arguments)))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A Markdown table."""
    print(f"\n### {title}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}", flush=True)
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def print_times(title: str, calls: Calls, bench: Bench, *, against: str) -> None:
    """Times of the calls, each as a ratio to the call named `against`."""
    times = least_times(calls, bench.repeats)
    header = ["", "ms", f"time / {against}"] + ["share of bandwidth"] * (bench.bandwidth is not None)
    rows = []
    for name, (function, arguments) in calls.items():
        row = [name, f"{1e3 * times[name]:.3f}", f"{times[name] / times[against]:.3f}"]
        if bench.bandwidth is not None:
            limit = traffic_bytes(function, arguments) / (1e9 * bench.bandwidth)
            row.append(f"{limit / times[name]:.1%}")
        rows.append(row)
    print_table(title, header, rows)


# Log-probs ----------------------------------------------------------------------------------------------


def logprob_calls(sizes: LogprobSizes, vocab: int) -> Calls:
    """Chunked and dense, forward, and forward with backward; arguments are shapes."""
    hidden = jax.ShapeDtypeStruct((sizes.batch, sizes.time, sizes.width), jnp.float32)
    unembedding = jax.ShapeDtypeStruct((vocab, sizes.width), jnp.float32)
    targets = jax.ShapeDtypeStruct((sizes.batch, sizes.time), jnp.int32)

    def chunked(h: jax.Array, w: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        return kernels.token_logprobs(h, w, y, chunk_size=sizes.chunk_size)

    def with_backward(function: Callable[..., Any]) -> Callable[..., Any]:
        def total(h: jax.Array, w: jax.Array, y: jax.Array) -> jax.Array:
            logp, entropy = function(h, w, y)
            return jnp.sum(logp) + 0.01 * jnp.sum(entropy)

        return jax.grad(total, argnums=(0, 1))

    shapes = (hidden, unembedding, targets)
    return {
        "dense forward": (kernels.dense_token_logprobs, shapes),
        "chunked forward": (chunked, shapes),
        "dense forward + backward": (with_backward(kernels.dense_token_logprobs), shapes),
        "chunked forward + backward": (with_backward(chunked), shapes),
    }


def bench_logprobs(bench: Bench) -> None:
    """One table for each vocabulary."""
    sizes = bench.logprobs
    for vocab in sizes.vocab:
        calls = logprob_calls(sizes, vocab)
        temporary = {}
        for name, (function, shapes) in calls.items():
            analysis = jax.jit(function).lower(*shapes).compile().memory_analysis()
            temporary[name] = analysis.temp_size_in_bytes if analysis else float("nan")
        times: dict[str, float] = {}
        if vocab <= sizes.run_up_to:
            keys = jax.random.split(jax.random.key(0), 3)
            hidden, unembedding, targets = next(iter(calls.values()))[1]
            arguments = (
                jax.random.normal(keys[0], hidden.shape),
                jax.random.normal(keys[1], unembedding.shape) * sizes.width**-0.5,
                jax.random.randint(keys[2], targets.shape, 0, vocab),
            )
            filled = {name: (function, arguments) for name, (function, _) in calls.items()}
            times = least_times(filled, bench.repeats)
        rows = []
        for name in calls:
            dense = name.replace("chunked", "dense")
            rows.append(
                [
                    name,
                    f"{1e3 * times[name]:.0f}" if times else "not run",
                    f"{times[name] / times[dense]:.2f}" if times else "not run",
                    f"{temporary[name] / 2**20:.0f}",
                    f"1/{temporary[dense] / temporary[name]:.1f}",
                ]
            )
        title = f"[{sizes.batch}, {sizes.time}] tokens x width {sizes.width} x vocabulary {vocab}"
        print_table(title, ["", "ms", "time / dense", "temporary MiB", "memory / dense"], rows)


# Returns ------------------------------------------------------------------------------------------------


def plain_gae(rewards: Any, values: Any, discounts: Any, last: Any) -> jax.Array:
    """GAE as one writes it by hand: one scan over both carries, no masks."""

    def step(carry: Any, now: Any) -> Any:
        next_value, next_advantage = carry
        reward, value_, discount = now
        advantage = reward + discount * next_value - value_ + discount * 0.95 * next_advantage
        return (value_, advantage), advantage

    start = (last, jnp.zeros_like(last))
    return jax.lax.scan(step, start, (rewards.T, values.T, discounts.T), reverse=True)[1].T


def plain_vtrace(log_rhos: Any, rewards: Any, values: Any, discounts: Any, last: Any) -> Any:
    """V-trace as one writes it by hand: one scan, no masks."""
    rho = jnp.minimum(1, jnp.exp(log_rhos))
    following = jnp.concatenate([values[:, 1:], last[:, None]], axis=1)
    deltas = rho * (rewards + discounts * following - values)

    def step(carry: Any, now: Any) -> Any:
        delta, weight = now
        correction = delta + weight * carry
        return correction, correction

    xs = (deltas.T, (discounts * rho).T)
    targets = values + jax.lax.scan(step, jnp.zeros_like(last), xs, reverse=True)[1].T
    after = jnp.concatenate([targets[:, 1:], last[:, None]], axis=1)
    return targets, rho * (rewards + discounts * after - values)


def associative_gae(rewards: Any, values: Any, discounts: Any, last: Any) -> jax.Array:
    """Our GAE by the associative scan, no masks."""
    offsets = 0.05 * values + 0.95 * rewards
    return rewards + discounts * kernels.associative_following(0.95 * discounts, offsets, last) - values


def rlax_calls(rewards: Any, values: Any, discounts: Any, last: Any, log_rhos: Any) -> tuple[Calls, Calls]:
    """rlax's GAE and V-trace, where it is installed."""
    try:
        rlax = importlib.import_module("rlax")
    except ImportError:
        print("\nrlax is not installed: its rows are left out (pip install rlax).")
        return {}, {}

    def gae(r: Any, v: Any, d: Any, end: Any) -> Any:
        padded = jnp.concatenate([v, end[:, None]], axis=1)
        return jax.vmap(lambda *x: rlax.truncated_generalized_advantage_estimation(x[0], x[1], 0.95, x[2]))(
            r, d, padded
        )

    def vtrace(rho: Any, r: Any, v: Any, d: Any, end: Any) -> Any:
        following = jnp.concatenate([v[:, 1:], end[:, None]], axis=1)
        return jax.vmap(rlax.vtrace_td_error_and_advantage)(v, following, r, d, jnp.exp(rho))

    base = (rewards, values, discounts, last)
    return {"rlax": (gae, base)}, {"rlax": (vtrace, (log_rhos, *base))}


def bench_returns(bench: Bench) -> None:
    """Two tables for each length."""
    for length in bench.returns.time:
        shape = (bench.returns.batch, length)
        keys = jax.random.split(jax.random.key(0), 4)
        rewards, values, log_rhos = (jax.random.normal(key, shape) for key in keys[:3])
        discounts = jnp.where(jax.random.uniform(keys[3], shape) < 0.01, 0.0, 0.99)
        last, mask = jnp.zeros(shape[0]), jnp.ones(shape, bool)
        base = (rewards, values, discounts, last)
        rlax_gae, rlax_vtrace = rlax_calls(rewards, values, discounts, last, log_rhos)
        gae = {
            "plain scan": (plain_gae, base),
            "ours": (returns.generalized_advantage_estimation, (*base, mask)),
            "associative scan": (associative_gae, base),
        }
        vtrace = {
            "plain scan": (plain_vtrace, (log_rhos, *base)),
            "ours": (kernels.vtrace, (log_rhos, *base, mask)),
        }
        print_times(f"GAE, {list(shape)}", gae | rlax_gae, bench, against="plain scan")
        print_times(f"V-trace, {list(shape)}", vtrace | rlax_vtrace, bench, against="plain scan")


# Losses -------------------------------------------------------------------------------------------------


def loss_calls(shape: tuple[int, int]) -> Calls:
    """Value and gradient of each loss on random arrays."""
    keys = jax.random.split(jax.random.key(0), 5)
    logp, old_logp, ref_logp, returns_ = (jax.random.normal(key, shape) for key in keys[:4])
    advantages, mask = jax.random.normal(keys[4], shape), jnp.ones(shape, bool)
    rows = [jnp.sum(x, axis=1) for x in (logp, old_logp, ref_logp, returns_)]

    def grad(loss: Callable[..., Any]) -> Callable[..., Any]:
        return jax.value_and_grad(loss, has_aux=True)

    def grpo(**options: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        def loss(*arrays: Any) -> Any:
            return policy.grpo_loss(*arrays, kl_coef=0.04, **options)

        return grad(loss), (logp, old_logp, ref_logp, advantages, mask)

    sampled = (logp, old_logp, advantages, mask)
    return {
        "reinforce": (grad(policy.reinforce_loss), sampled),
        "ppo_clip": (grad(policy.ppo_clip_loss), sampled),
        "grpo": grpo(),
        "gspo": grpo(ratio_fn=policy_ratios.sequence_log_ratio),
        "cispo": grpo(surrogate_fn=policy_surrogates.cispo_surrogate),
        "sapo": grpo(surrogate_fn=policy_surrogates.sapo_surrogate),
        "gmpo": grpo(surrogate_fn=policy_surrogates.geometric_mean_surrogate),
        "vespo": grpo(surrogate_fn=policy_surrogates.vespo_surrogate),
        "clipped value": (grad(value.clipped_value_loss), (logp, old_logp, returns_, mask)),
        "huber value": (grad(value.huber_value_loss), (logp, returns_, mask)),
        "dpo": (grad(preference.dpo_loss), (PairLogps(*rows),)),
        "GAE": (kernels.generalized_advantage_estimation, (logp, ref_logp, returns_, rows[0], mask)),
        "whiten": (kernels.whiten, (logp, mask)),
    }


def bench_losses(bench: Bench) -> None:
    """Each loss as a share of one forward pass of the tiny decoder."""
    sizes = bench.losses
    shape = (sizes.batch, sizes.time)
    config = dense_config(vocab_size=sizes.vocab, width=sizes.width, num_layers=sizes.num_layers, num_heads=4)
    params = init_params(config, jax.random.key(0))
    ones = jnp.ones(shape, jnp.int32)
    sequences = Sequences(ones, jnp.cumsum(ones, axis=1) - 1, ones, ones.astype(bool))
    decoder: Calls = {"decoder forward": (make_logprob_fn(config), (params, sequences))}
    title = f"{list(shape)} tokens; decoder of {sizes.num_layers} layers of width {sizes.width}"
    print_times(title, decoder | loss_calls(shape), bench, against="decoder forward")


def main(bench: Bench) -> None:
    """Runs the chosen sections."""
    device = jax.devices()[0]
    print(
        f"jax {jax.__version__} on {device.platform} ({device.device_kind}); least of {bench.repeats} rounds"
    )
    run = {"logprobs": bench_logprobs, "returns": bench_returns, "losses": bench_losses}
    for section in bench.sections:
        run[section](bench)


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
