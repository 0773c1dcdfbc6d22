"""The one log-prob path: hidden states and the unembedding matrix -> log-probs and entropies of tokens.

The [N, V] logits of all tokens never exist at once. Tokens are taken `chunk_size` at a time, forward and
backward; the backward pass computes each chunk's logits again instead of keeping them.
"""

import functools

import jax
import jax.numpy as jnp

from rlhf_jax.core.types import Array, Float, Int, Scalar


def token_logprobs(
    hidden: Float[Array, "*batch D"],
    unembedding: Float[Array, "V D"],
    targets: Int[Array, "*batch"],
    *,
    temperature: Scalar = 1.0,
    softcap: float | None = None,
    chunk_size: int = 512,
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
      chunk_size: tokens whose logits are held at once; memory is chunk_size x V floats.

    Returns:
      (logp, entropy), each in the shape of `targets`.
    """
    shape, width = targets.shape, unembedding.shape[1]
    count = targets.size
    chunk = min(chunk_size, count)
    padded = -(-count // chunk) * chunk
    flat = jnp.pad(hidden.reshape(count, width), ((0, padded - count), (0, 0)))
    ids = jnp.pad(targets.reshape(count), (0, padded - count))
    logp, entropy = _chunked(  # pyright: ignore[reportGeneralTypeIssues] (custom_vjp hides the type)
        softcap,
        flat.reshape(-1, chunk, width),
        unembedding,
        ids.reshape(-1, chunk),
        jnp.asarray(temperature, _wide(flat.dtype)),
    )
    return logp.reshape(-1)[:count].reshape(shape), entropy.reshape(-1)[:count].reshape(shape)


def dense_token_logprobs(
    hidden: Float[Array, "*batch D"],
    unembedding: Float[Array, "V D"],
    targets: Int[Array, "*batch"],
    *,
    temperature: Scalar = 1.0,
    softcap: float | None = None,
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """The same numbers with all logits in memory: the oracle of `token_logprobs`, and its benchmark."""
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(softcap, hidden, unembedding, targets, temperature):
    return _forward(softcap, hidden, unembedding, targets, temperature)[0]


def _forward(softcap, hidden, unembedding, targets, temperature):
    def one(chunk):
        states, ids = chunk
        logits = softcapped(_logits(states, unembedding), softcap) / temperature
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        probs = jnp.exp(logits - normaliser[:, None])
        entropy = normaliser - jnp.sum(probs * logits, axis=-1)
        taken = jnp.take_along_axis(logits, ids[:, None], axis=-1)[:, 0]
        return taken - normaliser, entropy, normaliser

    logp, entropy, normaliser = _map_chunks(one, (hidden, targets))
    return (logp, entropy), (hidden, unembedding, targets, temperature, entropy, normaliser)


def _backward(softcap, residuals, cotangents):
    hidden, unembedding, targets, temperature, entropy, normaliser = residuals
    vocabulary = jnp.arange(unembedding.shape[0])

    def one(chunk):
        states, ids, chunk_entropy, chunk_normaliser, d_logp, d_entropy = chunk
        capped = softcapped(_logits(states, unembedding), softcap)
        logp = capped / temperature - chunk_normaliser[:, None]
        probs = jnp.exp(logp)
        # d logp_i / dz_v = [v = i] - p_v  and  d H / dz_v = -p_v (log p_v + H)
        d_scaled = jnp.where(vocabulary == ids[:, None], d_logp[:, None], 0) - probs * (
            d_logp[:, None] + d_entropy[:, None] * (logp + chunk_entropy[:, None])
        )
        d_logits = d_scaled / temperature
        if softcap is not None:
            d_logits *= 1 - (capped / softcap) ** 2
        d_logits = d_logits.astype(hidden.dtype)
        d_states = jnp.einsum("nv,vd->nd", d_logits, unembedding)
        d_unembedding = jnp.einsum("nv,nd->vd", d_logits, states, preferred_element_type=normaliser.dtype)
        return d_states, d_unembedding

    chunks = (hidden, targets, entropy, normaliser, *cotangents)
    if hidden.shape[0] == 1:
        d_states, d_unembedding = one(jax.tree.map(lambda x: x[0], chunks))
        d_hidden = d_states[None]
    else:

        def step(total, chunk):
            d_states, d_unembedding = one(chunk)
            return total + d_unembedding, d_states

        d_unembedding, d_hidden = jax.lax.scan(step, jnp.zeros(unembedding.shape, normaliser.dtype), chunks)
    return (
        d_hidden.astype(hidden.dtype),
        d_unembedding.astype(unembedding.dtype),
        None,
        jnp.zeros_like(temperature),
    )


_chunked.defvjp(_forward, _backward)


def _map_chunks(function, chunks):
    """`lax.map`, without the loop where there is one chunk only."""
    if chunks[0].shape[0] == 1:
        return jax.tree.map(lambda x: x[None], function(jax.tree.map(lambda x: x[0], chunks)))
    return jax.lax.map(function, chunks)
