"""Losses on what the routers of a mixture of experts did, from sums over tokens.

`whole` is what the routers did in the whole batch, which is needed beside the part at hand because balance is
a product of two means: with it, losses of parts sum to that of the batch, and so do their gradients.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlhf_jax.core.types import Array, Float, Routing


def load_balance_loss(
    routing: dict[str, Routing], whole: dict[str, Routing] | None = None
) -> Float[Array, ""]:
    """Load balance (Shazeer et al. 2017; Fedus et al. 2021, eq. 4-6), a mean over layers.

        E sum_e f_e P_e

    f_e is the share of assignments that expert e got, which has no gradient, and P_e its mean probability.
    The least value is 1, at uniform routing. Fedus et al. multiply it with 0.01 and add it up over layers.

    Args:
      routing: of the rows at hand, by layer.
      whole: of the whole batch; of the rows at hand by default.
    """

    def of_layers(part: Routing, total: Routing) -> Float[Array, "*R"]:
        assigned = jax.lax.stop_gradient(total.assignments)
        share = assigned / jnp.maximum(jnp.sum(assigned, axis=-1, keepdims=True), 1)
        mean = part.probabilities / jnp.maximum(jax.lax.stop_gradient(total.tokens), 1)
        return share.shape[-1] * jnp.sum(share * mean, axis=-1)

    return _mean_over_layers(of_layers, routing, whole)


def router_z_loss(routing: dict[str, Routing], whole: dict[str, Routing] | None = None) -> Float[Array, ""]:
    """Mean over tokens and layers of (log sum exp of the router's logits)^2 (Zoph et al. 2022, eq. 5)."""

    def of_layers(part: Routing, total: Routing) -> Float[Array, "*R"]:
        return part.squared_normaliser / jnp.maximum(jax.lax.stop_gradient(total.tokens), 1)

    return _mean_over_layers(of_layers, routing, whole)


def load_violation(routing: dict[str, Routing]) -> Float[Array, ""]:
    """Maximal load violation (MaxVio, Wang et al. 2024), the busiest expert above the mean load, a mean over
    layers: max_e load_e / mean load - 1. 0 where all get the same, E - 1 where one gets everything of top-1
    routing.
    """

    def of_layers(part: Routing, _: Routing) -> Float[Array, "*R"]:
        mean = jnp.maximum(jnp.mean(part.assignments, axis=-1), jnp.finfo(part.assignments.dtype).tiny)
        return jnp.max(part.assignments, axis=-1) / mean - 1

    return _mean_over_layers(of_layers, routing, None)


def _mean_over_layers(
    of_layers: Callable[[Routing, Routing], Array],
    routing: dict[str, Routing],
    whole: dict[str, Routing] | None,
) -> Float[Array, ""]:
    whole = routing if whole is None else whole
    return jnp.mean(
        jnp.concatenate([of_layers(routing[path], whole[path]).reshape(-1) for path in sorted(routing)])
    )
