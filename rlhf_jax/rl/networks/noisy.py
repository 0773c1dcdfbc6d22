"""Noisy networks: a distribution of parameters, whose spread is learned, in place of random actions."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Float, Params, PRNGKeyArray, Scalar


@pytree_dataclass
class NoisyParams:
    """Parameters of a noisy network.

    Attributes:
      mean: of the parameters; alone they are those of the plain network.
      sigma: of the parameters of dense layers, at the same places; None elsewhere.
    """

    mean: Params
    sigma: Params


def init_noisy(params: Params, *, sigma: Scalar) -> NoisyParams:
    """Sigmas of every dense layer: sigma / sqrt(p) of p inputs (Fortunato et al. 2018, section 3.2)."""

    def spread(layer: Any) -> Any:
        if not isinstance(layer, dict):
            return None
        if not _is_dense(layer):
            return {name: spread(part) for name, part in layer.items()}
        scale = sigma / math.sqrt(layer["kernel"].shape[0])
        return {name: jnp.full(x.shape, scale, x.dtype) for name, x in layer.items()}

    return NoisyParams(params, spread(params))


def sample_params(noisy: NoisyParams, key: PRNGKeyArray) -> Params:
    """A draw of parameters, with factorized Gaussian noise (Fortunato et al. 2018, eq. 10 and 11).

        w_ij = mu_ij + sigma_ij f(e_i) f(e_j),  b_j = mu_j + sigma_j f(e_j),  f(x) = sign(x) sqrt|x|

    with e ~ N(0, 1) of each input and each output of a layer. Gradients reach mu and sigma.
    """
    count = 0

    def drawn(mean: Any, sigma: Any) -> Any:
        nonlocal count
        if not isinstance(mean, dict):
            return mean
        if not _is_dense(mean):
            # Sorted, as jit sorts dictionaries: a layer has the same key on either side of it.
            return {name: drawn(mean[name], sigma[name]) for name in sorted(mean)}
        count += 1
        noise = _layer_noise(jax.random.fold_in(key, count), mean["kernel"])
        return {name: x + sigma[name] * noise[name] for name, x in mean.items()}

    return drawn(noisy.mean, noisy.sigma)


def _is_dense(layer: dict[str, Any]) -> bool:
    return "kernel" in layer and layer["kernel"].ndim == 2


def _layer_noise(key: PRNGKeyArray, kernel: Float[Array, "I O"]) -> dict[str, Array]:
    inputs, outputs = kernel.shape
    raw = jax.random.normal(key, (inputs + outputs,), kernel.dtype)
    rooted = jnp.sign(raw) * jnp.sqrt(jnp.abs(raw))
    return {"kernel": jnp.outer(rooted[:inputs], rooted[inputs:]), "bias": rooted[inputs:]}
