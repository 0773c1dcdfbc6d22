"""Batch normalization in small networks: running statistics beside the parameters, and two modes.

Statistics are over all rows of a batch, on a mesh over those of all devices; under `vmap` each run has its
own.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from rlhf_jax.core.types import Array, Float, Params
from rlhf_jax.rl.networks.networks import ROOT_2, Activation, linear

BatchStats = Any
"""Running means and variances, a tree beside the parameters'."""


class BatchNormMLP(nn.Module):
    """Dense layers behind normed inputs, each followed by the activation and batch normalization.

    y = scale (x - mean) / sqrt(var + epsilon) + bias (Ioffe & Szegedy 2015, Algorithm 1); in training the
    mean and variance are the batch's, and running averages of them are kept; else those averages are taken.

    Attributes:
      widths: of the layers.
      activation: after each.
      momentum: what the running averages keep of themselves at each batch.
      epsilon: added to variances.
    """

    widths: tuple[int, ...] = (256, 256)
    activation: Activation = nn.relu
    momentum: float = 0.99
    epsilon: float = 1e-3

    @nn.compact
    def __call__(self, inputs: Float[Array, "N ..."], *, train: bool = False) -> Float[Array, "N D"]:
        """Features."""

        def norm(hidden: Array) -> Array:
            layer = nn.BatchNorm(not train, momentum=self.momentum, epsilon=self.epsilon, dtype=jnp.float32)
            return layer(hidden)

        hidden = norm(inputs.reshape(inputs.shape[0], -1))
        for width in self.widths:
            hidden = norm(self.activation(linear(width, ROOT_2)(hidden)))
        return hidden


def split_stats(variables: Any) -> tuple[Params, BatchStats]:
    """(parameters, running statistics) of what a network's `init` gives."""
    return variables["params"], variables["batch_stats"]


def apply_train(
    network: nn.Module, params: Params, stats: BatchStats, *inputs: Array
) -> tuple[Any, BatchStats]:
    """Outputs with the batch's own statistics, and the running ones after it."""
    variables = {"params": params, "batch_stats": stats}
    outputs, updated = network.apply(variables, *inputs, train=True, mutable=["batch_stats"])
    return outputs, updated["batch_stats"]


def apply_eval(network: nn.Module, params: Params, stats: BatchStats, *inputs: Array) -> Any:
    """Outputs with the running statistics."""
    return network.apply({"params": params, "batch_stats": stats}, *inputs)
