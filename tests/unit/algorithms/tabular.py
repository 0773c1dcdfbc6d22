"""A model small enough to check by hand: a table of logits, one row for each preceding token."""

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.core.types import Rollout, Sequences, TokenLogprobs

VOCAB = 5


def init(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    tables = {"logits": rng.normal(size=(VOCAB, VOCAB)), "value": rng.normal(size=VOCAB)}
    return {name: jnp.asarray(table, dtype) for name, table in tables.items()}


@jax.jit
def distribution(params, sequences):
    """Log-probs of all tokens at t given the one at t-1; NaN where nothing counts."""
    logp = jax.nn.log_softmax(params["logits"])[jnp.roll(sequences.tokens, 1, axis=1)]
    sound = sequences.mask & (sequences.positions >= 0)
    return jnp.where(sound[..., None], logp, jnp.nan)


@jax.jit
def score(params, sequences):
    """The token at t given the one at t-1; NaN where nothing counts, and at negative positions."""
    before = jnp.roll(sequences.tokens, 1, axis=1)
    logits = jax.nn.log_softmax(params["logits"])[before]
    logp = jnp.take_along_axis(logits, sequences.tokens[..., None], axis=-1)[..., 0]
    entropy = -jnp.sum(jnp.exp(logits) * logits, axis=-1)
    value = params["value"][before]
    collision = jnp.sum(jnp.exp(2 * logits), axis=-1)
    sound = sequences.mask & (sequences.positions >= 0)
    arrays = (jnp.where(sound, x, jnp.nan) for x in (logp, entropy, value))
    return TokenLogprobs(*arrays, collision=jnp.where(sound, collision, jnp.nan))


@jax.jit
def reward(params, sequences):
    """Sum over the row of the value of each token there is; NaN if it has a negative position."""
    values = jnp.where(sequences.positions < 0, jnp.nan, params["value"][sequences.tokens])
    return jnp.sum(jnp.where(sequences.segment_ids > 0, values, 0), axis=1)


def rows(seed, lengths, width=6):
    """A prompt token, then answers of the given lengths, then padding."""
    tokens = np.random.default_rng(seed).integers(0, VOCAB, (len(lengths), width)).astype(np.int32)
    time, lengths = np.arange(width), np.asarray(lengths)[:, None]
    valid = time <= lengths
    arrays = (tokens, np.where(valid, time, 0), valid.astype(np.int32), valid & (time >= 1))
    return Sequences(*map(jnp.asarray, arrays))


def rollout(params, sequences, finished):
    """As if `sequences` had been sampled from `params`."""
    return Rollout(sequences, jnp.where(sequences.mask, score(params, sequences).logp, 0), finished)
