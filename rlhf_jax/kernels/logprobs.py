"""The one log-prob path: hidden states and the unembedding matrix -> log-probs and entropies of tokens.

The [N, V] logits of all tokens never exist at once. Tokens are taken `chunk_size` at a time, forward and
backward; the backward pass computes each chunk's logits again instead of keeping them.

On a mesh every device takes its own tokens, `chunk_size` at a time, against its own part of the vocabulary:
sums over the vocabulary travel, logits do not.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.core.axes import constrain, shards
from rlhf_jax.core.shapes import check_shapes
from rlhf_jax.core.types import Array, Bool, Float, Int, Scalar

LARGE_VOCABULARY = 2048
"""From here on, logits cost more than to sort out those that nobody asked for, on one device.

On several, a loop that ends early costs memory: compiled for 64 chips, an update of a model of 1B needs
7.1 GiB on each with it, 4.6 without.
"""


def token_logprobs(
    hidden: Float[Array, "*batch D"],
    unembedding: Float[Array, "V D"],
    targets: Int[Array, "*batch"],
    *,
    temperature: Scalar = 1.0,
    softcap: float | None = None,
    chunk_size: int = 512,
    counted: Bool[Array, "*batch"] | None = None,
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """Log-probability of each target and entropy of its distribution, in nats.

        z = hidden W^T,  z <- c tanh(z / c) if softcap,  logp = log softmax(z / temperature)[target]

    Logits, sums and results are float32 (float64 for float64 inputs) whatever the dtype of `hidden`.
    Differentiable in `hidden` and `unembedding`; `temperature` and `targets` get no gradient.

    Args:
      hidden: final hidden states, one for each token to be scored.
      unembedding: one row for each token of the vocabulary.
      targets: ids in [0, V).
      temperature: may be traced; must be positive.
      softcap: the bound c of tanh soft-capping, None for none.
      chunk_size: tokens whose logits a device holds at once; memory is chunk_size x V floats.
      counted: tokens that are asked for, None for all; both results are 0 for the others, whose logits are
        not computed where that saves whole chunks of a large vocabulary on one device.

    Returns:
      (logp, entropy), each in the shape of `targets`.
    """
    hidden, unembedding, targets = check_shapes(
        "token_logprobs", hidden=(hidden, "*S D"), unembedding=(unembedding, "V D"), targets=(targets, "*S")
    )
    chunked, restored = _chunking(targets.shape, chunk_size)
    states, ids, todo, ordered_back = chunked(hidden), chunked(targets), None, None
    is_worth_it = states.shape[0] > 1 == states.shape[1] and len(unembedding) >= LARGE_VOCABULARY
    if counted is not None and is_worth_it:
        ordered, ordered_back, todo = _counted_first(chunked(counted))
        states, ids = ordered(states), ordered(ids)
    found = _chunked(  # pyright: ignore[reportGeneralTypeIssues] (custom_vjp hides the type)
        softcap, states, unembedding, ids, jnp.asarray(temperature, _wide(hidden.dtype)), todo
    )
    if ordered_back is not None:
        found = jax.tree.map(ordered_back, found)
    logp, entropy = jax.tree.map(restored, found)
    if counted is not None:
        logp, entropy = jnp.where(counted, logp, 0), jnp.where(counted, entropy, 0)
    return logp, entropy


def _counted_first(
    counted: Bool[Array, "chunks 1 tokens"],
) -> tuple[Callable[[Array], Array], Callable[[Array], Array], Int[Array, ""]]:
    """(order, its inverse, chunks to do): what is asked for stands in the first chunks."""
    flat, size = counted.reshape(-1), counted.shape[-1]
    order = jnp.argsort(~flat, stable=True)
    todo = -(-jnp.sum(flat) // size)

    def taken(array: Array, places: Array) -> Array:
        return array.reshape(-1, *array.shape[3:])[places].reshape(array.shape)

    back = jnp.argsort(order)
    return lambda array: taken(array, order), lambda array: taken(array, back), todo


def _chunking(shape: tuple[int, ...], chunk_size: int) -> tuple[Callable[[Array], Array], ...]:
    """[*shape, ...] -> [chunks, devices, tokens, ...], where every device finds its own tokens in its row of
    each chunk; and the inverse.
    """
    parts = [shards(name, size) for name, size in zip(("batch", "time"), shape, strict=False)]
    parts += [1] * (len(shape) - len(parts))
    split = [part for size, count in zip(shape, parts, strict=True) for part in (count, size // count)]
    order = [*range(0, len(split), 2), *range(1, len(split), 2)]  # which part of each axis, then where in it
    devices, own = math.prod(parts), math.prod(shape) // math.prod(parts)
    size = min(chunk_size, own)
    count = -(-own // size)

    def chunked(array: Array) -> Array:
        rest = array.shape[len(shape) :]
        array = array.reshape(*split, *rest)
        array = array.transpose(*order, *range(len(split), array.ndim)).reshape(devices, own, *rest)
        array = jnp.pad(array, ((0, 0), (0, count * size - own), *[(0, 0)] * len(rest)))
        array = array.reshape(devices, count, size, *rest).swapaxes(0, 1)
        return constrain(array, None, "tokens", *(None,) * (1 + len(rest)))

    def restored(array: Array) -> Array:
        rest = array.shape[3:]
        array = array.swapaxes(0, 1).reshape(devices, -1, *rest)[:, :own]
        array = array.reshape(*[split[axis] for axis in order], *rest)
        return array.transpose(*np.argsort(order), *range(len(split), array.ndim)).reshape(*shape, *rest)

    return chunked, restored


def top_k_logprobs(
    hidden: Float[Array, "*batch D"],
    unembedding: Float[Array, "V D"],
    k: int,
    *,
    temperature: Scalar = 1.0,
    softcap: float | None = None,
    chunk_size: int = 512,
) -> tuple[Float[Array, "*batch K"], Int[Array, "*batch K"]]:
    """The k likeliest tokens: (log-probabilities in nats, ids), the likeliest first, over the full softmax.

    In chunks, as `token_logprobs`, whose arguments the others are; without gradient.
    """
    chunked, restored = _chunking(hidden.shape[:-1], chunk_size)
    hidden, unembedding = jax.lax.stop_gradient((hidden, unembedding))

    def one(states: Float[Array, "S N D"]) -> tuple[Array, Array]:
        logits = _chunk_logits(states, unembedding, softcap) / temperature
        top, ids = jax.lax.top_k(logits, k)
        return top - jax.nn.logsumexp(logits, axis=-1, keepdims=True), ids

    return jax.tree.map(restored, _map_chunks(one, chunked(hidden)))


def collision_probabilities(
    hidden: Float[Array, "*batch D"],
    unembedding: Float[Array, "V D"],
    *,
    temperature: Scalar = 1.0,
    softcap: float | None = None,
    chunk_size: int = 512,
) -> Float[Array, "*batch"]:
    """Collision probability, that two draws agree: sum_v pi(v)^2.

    In chunks, as `token_logprobs`, whose arguments the others are; without gradient.
    """
    chunked, restored = _chunking(hidden.shape[:-1], chunk_size)
    hidden, unembedding = jax.lax.stop_gradient((hidden, unembedding))

    def one(states: Float[Array, "S N D"]) -> Array:
        logits = _chunk_logits(states, unembedding, softcap) / temperature
        return jnp.exp(jax.nn.logsumexp(2 * logits, axis=-1) - 2 * jax.nn.logsumexp(logits, axis=-1))

    return restored(_map_chunks(one, chunked(hidden)))


def candidate_logprobs(
    hidden: Float[Array, "*batch D"],
    unembedding: Float[Array, "V D"],
    targets: Int[Array, "*batch"],
    candidates: Int[Array, "*batch K"],
    *,
    temperature: Scalar = 1.0,
    softcap: float | None = None,
    chunk_size: int = 512,
) -> tuple[Float[Array, "*batch K"], Float[Array, "*batch"]]:
    """Log-probabilities of K candidates at a temperature, and of each target at temperature 1, in nats.

    In chunks, as `token_logprobs`, whose arguments the others are; the backward pass computes each chunk's
    logits again. Differentiable in `hidden` and `unembedding`.

    Args:
      candidates: ids in [0, V), K for each hidden state.
      temperature: of the candidates alone.
    """
    hidden, unembedding, targets, candidates = check_shapes(
        "candidate_logprobs",
        hidden=(hidden, "*S D"),
        unembedding=(unembedding, "V D"),
        targets=(targets, "*S"),
        candidates=(candidates, "*S K"),
    )
    chunked, restored = _chunking(targets.shape, chunk_size)
    # Sums over chunks of the unembedding's gradient are then wide, too.
    wide = unembedding.astype(_wide(unembedding.dtype))

    @jax.checkpoint
    def one(chunk: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        states, ids, others = chunk
        logits = _chunk_logits(states, wide.astype(unembedding.dtype), softcap)
        tempered = logits / temperature
        normalizers = [jax.nn.logsumexp(x, axis=-1) for x in (tempered, logits)]
        taken = jax.vmap(functools.partial(_taken, tempered), -1, -1)(others)
        return taken - normalizers[0][..., None], _taken(logits, ids) - normalizers[1]

    return jax.tree.map(restored, _map_chunks(one, (chunked(hidden), chunked(targets), chunked(candidates))))


def dense_token_logprobs(
    hidden: Float[Array, "*batch D"],
    unembedding: Float[Array, "V D"],
    targets: Int[Array, "*batch"],
    *,
    temperature: Scalar = 1.0,
    softcap: float | None = None,
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """The same numbers with all logits in memory: the oracle of `token_logprobs`, and its benchmark."""
    hidden, unembedding, targets = check_shapes(
        "dense_token_logprobs",
        hidden=(hidden, "*S D"),
        unembedding=(unembedding, "V D"),
        targets=(targets, "*S"),
    )
    logits = softcapped(_logits(hidden, unembedding), softcap) / temperature
    logp = jax.nn.log_softmax(logits)
    taken = jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
    return taken, -jnp.sum(jnp.exp(logp) * logp, axis=-1)


def softcapped(logits: Float[Array, "..."], softcap: float | None) -> Float[Array, "..."]:
    """c tanh(logits / c), or the logits as they are (Gemma 2 report, section 2, "Logit soft-capping")."""
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _wide(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)


def _logits(hidden: Float[Array, "... D"], unembedding: Float[Array, "V D"]) -> Float[Array, "... V"]:
    return jnp.einsum("...d,vd->...v", hidden, unembedding, preferred_element_type=_wide(hidden.dtype))


def _chunk_logits(states, unembedding, softcap):
    return softcapped(constrain(_logits(states, unembedding), "tokens", None, "vocab"), softcap)


def _taken(logits, ids):
    """logits[..., ids]. As a sum: a look-up would gather a vocabulary that is split."""
    if shards("vocab", logits.shape[-1]) == 1:
        return jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(jnp.arange(logits.shape[-1]) == ids[..., None], logits, 0), axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(softcap, hidden, unembedding, targets, temperature, todo):
    """Of chunks of tokens; of the first `todo` of them, where it is not None, and 0 for the others."""
    return _forward(softcap, hidden, unembedding, targets, temperature, todo)[0]


def _forward(softcap, hidden, unembedding, targets, temperature, todo):
    def one(chunk):
        states, ids = chunk
        logits = _chunk_logits(states, unembedding, softcap) / temperature
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        probs = jnp.exp(logits - normaliser[..., None])
        entropy = normaliser - jnp.sum(probs * logits, axis=-1)
        taken = _taken(logits, ids)
        return taken - normaliser, entropy, normaliser

    logp, entropy, normaliser = _map_chunks(one, (hidden, targets), todo)
    return (logp, entropy), (hidden, unembedding, targets, temperature, todo, entropy, normaliser)


def _backward(softcap, residuals, cotangents):
    hidden, unembedding, targets, temperature, todo, entropy, normaliser = residuals
    vocabulary = jnp.arange(unembedding.shape[0])

    def one(chunk):
        states, ids, chunk_entropy, chunk_normaliser, d_logp, d_entropy = chunk
        capped = _chunk_logits(states, unembedding, softcap)
        logp = capped / temperature - chunk_normaliser[..., None]
        probs = jnp.exp(logp)
        # d logp_i / dz_v = [v = i] - p_v  and  d H / dz_v = -p_v (log p_v + H)
        d_scaled = jnp.where(vocabulary == ids[..., None], d_logp[..., None], 0) - probs * (
            d_logp[..., None] + d_entropy[..., None] * (logp + chunk_entropy[..., None])
        )
        d_logits = d_scaled / temperature
        if softcap is not None:
            d_logits *= 1 - (capped / softcap) ** 2
        d_logits = d_logits.astype(hidden.dtype)
        d_states = jnp.einsum("snv,vd->snd", d_logits, unembedding)
        # One sum for each device, so that they meet once, after the last chunk.
        d_unembedding = jnp.einsum("snv,snd->svd", d_logits, states, preferred_element_type=normaliser.dtype)
        return d_states, constrain(d_unembedding, "tokens", "vocab", None)

    chunks = (hidden, targets, entropy, normaliser, *cotangents)
    if hidden.shape[0] == 1:
        d_states, d_unembedding = one(jax.tree.map(lambda x: x[0], chunks))
        d_hidden = d_states[None]
    else:

        def step(total, chunk):
            d_states, d_unembedding = one(chunk)
            return total + d_unembedding, d_states

        zeros = jnp.zeros((hidden.shape[1], *unembedding.shape), normaliser.dtype)
        zeros = constrain(zeros, "tokens", "vocab", None)
        d_unembedding, d_hidden = _scan_chunks(step, zeros, chunks, todo)
    return (
        d_hidden.astype(hidden.dtype),
        jnp.sum(d_unembedding, axis=0).astype(unembedding.dtype),
        None,
        jnp.zeros_like(temperature),
        None,
    )


_chunked.defvjp(_forward, _backward)


def _map_chunks(function, chunks, todo=None):
    """`lax.map` over the first `todo` chunks, all for None; without the loop where there is one only."""
    if jax.tree.leaves(chunks)[0].shape[0] == 1:
        return jax.tree.map(lambda x: x[None], function(jax.tree.map(lambda x: x[0], chunks)))
    return _scan_chunks(lambda _, chunk: (None, function(chunk)), None, chunks, todo)[1]


def _scan_chunks(step, total, chunks, todo):
    """`lax.scan` over the first `todo` chunks, whose others give zeros; all for None.

    A loop that ends early, where a `cond` in a scan may hold a second copy of the total.
    """
    if todo is None:
        return jax.lax.scan(step, total, chunks)
    count = jax.tree.leaves(chunks)[0].shape[0]
    shapes = jax.eval_shape(step, total, jax.tree.map(lambda x: x[0], chunks))[1]

    def one(index, held):
        total, found = held
        total, of_chunk = step(total, jax.tree.map(lambda x: x[index], chunks))
        return total, jax.tree.map(lambda all_, new: all_.at[index].set(new), found, of_chunk)

    nothing = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), shapes)
    return jax.lax.fori_loop(0, todo, one, (total, nothing))
