"""DoLa: what the last layers add to the prediction of an earlier one."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.core.protocols import DecodeFn, PrefillFn
from rlhf_jax.core.types import Array, Float, Int, Params


def contrast_layers(logits: Float[Array, "L B V"], *, relative_top: float = 0.1) -> Float[Array, "B V"]:
    """Decoding by contrasting layers (Chuang et al. 2024).

        log p_last(v) - log p_early(v)   where p_last(v) >= relative_top max p_last, else -inf

    In each row the early layer is the one of the greatest Jensen-Shannon divergence from the last.

    Args:
      logits: of each layer, the last one last.
    """
    logp = jax.nn.log_softmax(logits, axis=-1)
    last, early = logp[-1], logp[:-1]
    mixed = jnp.logaddexp(last, early) - math.log(2)

    def divergence(logp: Array) -> Array:
        return jnp.sum(jnp.exp(logp) * (logp - mixed), axis=-1)

    chosen = jnp.argmax((divergence(last) + divergence(early)) / 2, axis=0)
    contrast = last - early[chosen, jnp.arange(chosen.shape[0])]
    plausible = last >= jnp.max(last, axis=-1, keepdims=True) + math.log(relative_top)
    return jnp.where(plausible, contrast, -jnp.inf)


def dola_fns(
    prefill: PrefillFn, decode: DecodeFn, *, relative_top: float = 0.1
) -> tuple[PrefillFn, DecodeFn]:
    """(prefill, decode) of contrasted logits, for `generate` and the others.

    Args:
      prefill: like that of a model, with logits [L, B, V] of several layers (`models.make_layer_decode_fns`).
      decode: the same.
    """

    def contrasted_prefill(
        params: Params, tokens: Int[Array, "B P"], *rest: Any
    ) -> tuple[Float[Array, "B V"], Any]:
        logits, cache = prefill(params, tokens, *rest)
        return contrast_layers(logits, relative_top=relative_top), cache

    def contrasted_decode(
        params: Params, cache: Any, token: Int[Array, "B"], position: Int[Array, "B"]
    ) -> tuple[Float[Array, "B V"], Any]:
        logits, cache = decode(params, cache, token, position)
        return contrast_layers(logits, relative_top=relative_top), cache

    return contrasted_prefill, contrasted_decode
