"""Optimizers by name, out of optax and its contrib: gradients to updates for a learning rate of 1.

Not here: schedule-free optimizers, whose gradients and whose answers belong to different parameters, while a
policy that samples must be the one that learns; and moments in 8 bits, which optax does not have.
"""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax.numpy as jnp
import optax
from optax import contrib

from rlhf_jax.core.trees import map_named
from rlhf_jax.core.types import Array, Params

Optimizer = Literal["adamw", "lion", "adafactor", "sgd", "muon"]
"""`adamw` (Loshchilov & Hutter 2019); `lion` (Chen et al. 2023, wants a tenth of AdamW's learning rate);
`adafactor` (Shazeer & Stern 2018, without momentum, steps relative to the size of each parameter); `sgd` with
momentum `b1`; `muon` (Jordan et al. 2024) for matrices inside the layers, with updates of AdamW's size (Liu
et al. 2025), and AdamW for all else."""

MUON_MOMENTUM = 0.95
MUON_RMS = 0.2
"""As published: of the momentum, and the root mean square of an update, which is about that of AdamW."""


def _adamw(b1: float, b2: float, epsilon: float) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1, b2, epsilon)


def _lion(b1: float, b2: float, epsilon: float) -> optax.GradientTransformation:
    del epsilon
    return optax.scale_by_lion(b1, b2)


def _adafactor(b1: float, b2: float, epsilon: float) -> optax.GradientTransformation:
    del b1, b2, epsilon
    return optax.chain(
        optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms()
    )


def _sgd(b1: float, b2: float, epsilon: float) -> optax.GradientTransformation:
    del b2, epsilon
    return optax.trace(b1)


def _muon(b1: float, b2: float, epsilon: float) -> optax.GradientTransformation:
    of_matrices = functools.partial(map_named, _dimensions)
    orthogonal = optax.chain(
        contrib.scale_by_muon(beta=MUON_MOMENTUM, eps=epsilon, weight_dimension_numbers=of_matrices),
        optax.stateless_with_tree_map(lambda u, _: u * (MUON_RMS * max(jnp.shape(u)[-2:]) ** 0.5)),
    )
    return optax.partition({"muon": orthogonal, "adam": _adamw(b1, b2, epsilon)}, _labels)


def _labels(params: Params) -> Any:
    return map_named(
        lambda name, leaf: "muon" if is_matrix(name, leaf) and "embedding" not in name else "adam", params
    )


def _dimensions(name: str, leaf: Array) -> contrib.MuonDimensionNumbers:
    del name, leaf  # layers that are scanned, and experts, stack matrices along axes in front
    return contrib.MuonDimensionNumbers(-2, -1)


OPTIMIZERS: Mapping[Optimizer, Callable[[float, float, float], optax.GradientTransformation]] = (
    MappingProxyType({"adamw": _adamw, "lion": _lion, "adafactor": _adafactor, "sgd": _sgd, "muon": _muon})
)
"""Optimizer -> its transformation from `b1`, `b2` and `epsilon`, of which some need fewer."""


def is_matrix(name: str, leaf: Array) -> bool:
    """True if a parameter is a matrix, or a stack of matrices, by shape and name.

    By name too: layers that are scanned stack their scales and biases into arrays of two axes.
    """
    word = name.rpartition("/")[2].rpartition("_")[2]
    return leaf.ndim > 1 and word not in ("scale", "bias", "magnitude", "singular")
