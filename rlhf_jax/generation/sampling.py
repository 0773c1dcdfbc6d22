"""From logits to the next token, with the log-prob that training needs."""

import jax
import jax.numpy as jnp

from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Int, PRNGKeyArray, Scalar


@pytree_dataclass
class Sampling:
    """How tokens are drawn. Every field may be traced; `None` turns a filter off.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token.
      top_k: keep the k most likely tokens.
      top_p: keep the fewest most likely tokens whose probability reaches p (Holtzman et al. 2020).
    """

    temperature: Scalar = 1.0
    top_k: Int[Array, ""] | int | None = None
    top_p: Scalar | None = None


def sample_token(
    key: PRNGKeyArray, logits: Float[Array, "B V"], sampling: Sampling
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Draws one token a row.

    Returns:
      (token, logp): `logp` is of the full support at the sampling temperature, in nats, whatever the
      filters kept, so that ratios against a rescoring are ratios of one distribution. At temperature 0
      it is the log-prob at temperature 1.
    """
    temperature = jnp.asarray(sampling.temperature, logits.dtype)
    greedy = temperature <= 0
    logp = jax.nn.log_softmax(logits / jnp.where(greedy, 1, temperature))
    kept = jnp.where(_kept(logp, sampling), logp, -jnp.inf)
    token = jnp.where(greedy, jnp.argmax(logp, axis=-1), jax.random.categorical(key, kept))
    return token, jnp.take_along_axis(logp, token[:, None], axis=-1)[:, 0]


def _kept(logp: Float[Array, "B V"], sampling: Sampling) -> Bool[Array, "B V"]:
    kept = jnp.ones(logp.shape, bool)
    if sampling.top_k is None and sampling.top_p is None:
        return kept
    order = jnp.argsort(-logp, axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)
    if sampling.top_k is not None:
        kept &= rank < sampling.top_k
    if sampling.top_p is not None:
        ordered = jnp.take_along_axis(jnp.exp(logp), order, axis=-1)
        before = jnp.cumsum(ordered, axis=-1) - ordered
        kept &= (jnp.take_along_axis(before, rank, axis=-1) < sampling.top_p) | (rank == 0)
    return kept
