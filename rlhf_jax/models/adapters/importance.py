"""AdaLoRA's budget as an optax transformation: ranks that matter least lose their singular value."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Int, Params, Scalar
from rlhf_jax.models.adapters.config import AdaLoRA
from rlhf_jax.models.adapters.trees import map_nodes


@pytree_dataclass
class BudgetState:
    """State of the rank budget: moving averages of importance and its uncertainty.

    Attributes:
      steps: optimizer steps so far.
      importance: smoothed |w dL/dw| of every entry of every factor.
      uncertainty: smoothed distance of it from its average.
      inner: the state of the optimizer.
    """

    steps: Int[Array, ""]
    importance: Params
    uncertainty: Params
    inner: Any


def budget_at(config: AdaLoRA, step: Int[Array, ""], matrices: int) -> Float[Array, ""]:
    """Ranks of all matrices together after `step` steps: a cubic fall from `rank` to `target_rank` each
    (Zhang et al. 2023, eq. 12)."""
    falling = config.total_steps - config.warmup_steps - config.final_steps
    left = 1 - jnp.clip((step - config.warmup_steps) / falling, 0, 1)
    return jnp.round(matrices * (config.target_rank + (config.rank - config.target_rank) * left**3))


def with_rank_budget(config: AdaLoRA, tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` for parameters among which are AdaLoRA's; needs `learning_rate` as an extra argument.

    Adds the gradient of the orthogonality penalty, scores every triplet (column of A, singular value, row of
    B) by sensitivity times uncertainty (eq. 8 to 10), and sets the singular values of all but the best, over
    all matrices together, to zero (eq. 6), to rounding. A triplet that gets important again comes back.
    """

    tx = optax.with_extra_args_support(tx)

    def init(params: Params) -> Any:
        importance, uncertainty = (jax.tree.map(jnp.zeros_like, _triplets(params)) for _ in range(2))
        return BudgetState(jnp.int32(0), importance, uncertainty, tx.init(params))

    def update(updates: Params, state: Any, params: Params = None, *, learning_rate: Scalar, **_: Any):
        gradients = _add_penalty(config, updates, params)
        sensitivity = jax.tree.map(lambda p, g: jnp.abs(p * g), _triplets(params), _triplets(gradients))
        keep = config.smoothing
        importance = jax.tree.map(lambda i, s: keep * i + (1 - keep) * s, state.importance, sensitivity)
        uncertainty = jax.tree.map(
            lambda u, i, s: keep * u + (1 - keep) * jnp.abs(s - i), state.uncertainty, importance, sensitivity
        )
        updates, inner = tx.update(gradients, state.inner, params, learning_rate=learning_rate)
        scores = jax.tree.map(jnp.multiply, importance, uncertainty)
        updates = _prune(config, updates, params, scores, state.steps + 1, learning_rate)
        return updates, BudgetState(state.steps + 1, importance, uncertainty, inner)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _is_triplets(path: str, node: Params) -> bool:
    del path
    return "lora_singular" in node


def _triplets(tree: Params) -> dict[str, Params]:
    """The three factors of each adapted layer, by its path."""
    found: dict[str, Params] = {}

    def note(path: str, node: Params) -> Params:
        found[path] = {name: node[name] for name in ("lora_a", "lora_b", "lora_singular")}
        return node

    map_nodes(_is_triplets, note, tree)
    return found


def _add_penalty(config: AdaLoRA, gradients: Params, params: Params) -> Params:
    def penalty(factors: dict[str, Params]) -> Float[Array, ""]:
        total = jnp.float32(0)
        for node in factors.values():
            a, b = node["lora_a"], node["lora_b"]
            identity = jnp.eye(a.shape[-1], dtype=a.dtype)
            for gram in (jnp.swapaxes(a, -1, -2) @ a, b @ jnp.swapaxes(b, -1, -2)):
                total += jnp.sum((gram - identity) ** 2)
        return config.orthogonality * total

    added = jax.grad(penalty)(_triplets(params))

    def add(path: str, node: Params) -> Params:
        return {
            name: leaf + added[path][name] if name in added[path] else leaf for name, leaf in node.items()
        }

    return map_nodes(_is_triplets, add, gradients)


def _prune(
    config: AdaLoRA,
    updates: Params,
    params: Params,
    scores: dict[str, Params],
    step: Int[Array, ""],
    learning_rate: Scalar,
) -> Params:
    values = {path: node["lora_singular"] for path, node in _triplets(params).items()}
    kept = _kept(config, scores, step)

    def change(path: str, node: Params) -> Params:
        # An update of value / learning rate is one that takes the whole value away.
        rate = jnp.where(learning_rate == 0, 1, learning_rate)
        gone = (values[path] / rate).astype(values[path].dtype)
        return {**node, "lora_singular": jnp.where(kept[path], node["lora_singular"], gone)}

    return map_nodes(_is_triplets, change, updates)


def _kept(config: AdaLoRA, scores: dict[str, Params], step: Int[Array, ""]) -> dict[str, Bool[Array, "*L r"]]:
    """Mask of the triplets within the budget."""
    importance = {
        path: node["lora_singular"] + jnp.mean(node["lora_a"], axis=-2) + jnp.mean(node["lora_b"], axis=-1)
        for path, node in scores.items()
    }
    flat, unravel = ravel_pytree(importance)
    places = jnp.argsort(jnp.argsort(-flat, stable=True), stable=True)
    budget = budget_at(config, step, flat.size // config.rank)
    kept = (places < budget) | (step <= config.warmup_steps)
    return jax.tree.map(lambda x: x > 0.5, unravel(kept.astype(flat.dtype)))
