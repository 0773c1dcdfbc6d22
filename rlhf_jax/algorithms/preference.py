"""Direct preference optimization (DPO) and its family: a policy from pairs, without a reward model."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.importing import is_import_path, load_function, nearest_name
from rlhf_jax.core.masks import masked_sum
from rlhf_jax.core.protocols import LogprobFn
from rlhf_jax.core.train_state import TrainState, accumulate_gradients, apply_gradients, init_train_state
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Metrics, Params, PRNGKeyArray, Scalar, Sequences
from rlhf_jax.losses import preference as with_reference, preference_online, preference_reference_free
from rlhf_jax.losses.pair_logps import PairLogps, traits_of
from rlhf_jax.losses.preference import dpo_loss

_LOSS_MODULES = with_reference, preference_reference_free, preference_online


@runtime_checkable
class PairLossFn(Protocol):
    """A loss on preference pairs, such as `losses.dpo_loss`."""

    def __call__(
        self, pairs: PairLogps, /, *, beta: Scalar, mask: Bool[Array, "B"], denominator: Scalar
    ) -> tuple[Float[Array, ""], Metrics]:
        """(loss, metrics) of the pairs under the mask, sums divided by `denominator`."""
        ...


def pair_losses() -> dict[str, PairLossFn]:
    """Losses on preference pairs by their short names: `dpo`, `ipo`, `simpo`, ...

    They are the public functions of `losses.preference*` that take one `PairLogps`: a new one is in the
    table, and so in the choices of every command, once it is written. XPO, which needs pairs of its own kind,
    is not.
    """
    functions: list[Any] = [
        value for module in _LOSS_MODULES for value in vars(module).values() if callable(value)
    ]
    modules = {module.__name__ for module in _LOSS_MODULES}
    return {
        function.__name__.removesuffix("_loss").removesuffix("_dpo"): function
        for function in functions
        if getattr(function, "__module__", "") in modules
        and not function.__name__.startswith("_")
        and _takes_pairs(function)
        and not traits_of(function).needs_chosen_from_ref
    }


def _takes_pairs(function: Callable[..., Any]) -> bool:
    parameters = list(inspect.signature(function).parameters.values())
    return bool(parameters) and parameters[0].annotation is PairLogps


def find_pair_loss(loss: str | PairLossFn) -> PairLossFn:
    """A loss by its short name, by a path `module:function`, or itself.

    Raises:
      UserError: no such name or path; with the nearest name.
    """
    if not isinstance(loss, str):
        return loss
    table = pair_losses()
    if loss in table:
        return table[loss]
    if is_import_path(loss):
        return load_function(loss, kind="loss", example="my_losses:margin_loss")
    raise UserError(
        f"loss '{loss}' is neither one of {', '.join(table)} nor a path module:function"
        + nearest_name(loss, table)
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices.

    Attributes:
      micro_batches: parts in which a batch is computed; changes memory, not the result.
      loss_fn: a loss on `PairLogps`, of `losses` or of your own; options by `functools.partial`, as in
        `partial(simpo_loss, gamma=0.5)`.
    """

    micro_batches: int = 1
    loss_fn: PairLossFn = dpo_loss

    def __post_init__(self) -> None:
        """Refuses micro-batches where the loss compares all pairs of a batch."""
        if self.micro_batches > 1 and traits_of(self.loss_fn).uses_batch_sort:
            raise UserError("the loss compares pairs with each other: it needs micro_batches 1")


@pytree_dataclass
class Hyper:
    """Hyperparameters of preference optimization that a sweep may vary (array leaves).

    Attributes:
      beta: strength of the KL constraint, per nat.
    """

    learning_rate: Scalar = 1e-4
    beta: Scalar = 0.1


@pytree_dataclass
class State:
    """All that a resume needs. The reference is not in it: its log-probs are in the batch."""

    learner: TrainState
    key: PRNGKeyArray


@pytree_dataclass
class Batch:
    """Pairs with the reference's log-probs, in nats summed over the response.

    The log-probs may come from a stored pass over the data set or from `make_batch` on the fly.

    Attributes:
      mask: pairs that count; None for all. Ties of a judge do not.
      chosen_from_ref: see `PairLogps`.
      preference: see `PairLogps`; `dpo_loss` minds it.
    """

    chosen: Sequences
    rejected: Sequences
    ref_chosen_logp: Float[Array, "B"]
    ref_rejected_logp: Float[Array, "B"]
    mask: Bool[Array, "B"] | None = None
    chosen_from_ref: Bool[Array, "B"] | None = None
    preference: Float[Array, "B"] | None = None


def init(params: Params, tx: optax.GradientTransformation, key: PRNGKeyArray, frozen: Params = None) -> State:
    """The state at step 0; `frozen` is the part of the model that does not train."""
    return State(init_train_state(params, tx, frozen), key)


def response_logp(
    logprob_fn: LogprobFn, params: Params, chosen: Sequences, rejected: Sequences
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Log-probs of chosen and rejected responses, in one forward pass."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), chosen, rejected)
    summed = masked_sum(logprob_fn(params, both).logp, both.mask, axis=-1)
    chosen_logp, rejected_logp = jnp.split(summed, 2)
    return chosen_logp, rejected_logp


def make_batch(
    logprob_fn: LogprobFn,
    ref_params: Params,
    chosen: Sequences,
    rejected: Sequences,
    mask: Bool[Array, "B"] | None = None,
) -> Batch:
    """Pairs with reference log-probs computed on the fly."""
    return Batch(chosen, rejected, *response_logp(logprob_fn, ref_params, chosen, rejected), mask)


def make_update(
    config: Config, logprob_fn: LogprobFn, tx: optax.GradientTransformation
) -> Callable[[State, Hyper, Batch], tuple[State, Metrics]]:
    """`update(state, hyper, batch) -> (state, metrics)`: one optimizer step."""

    def update(state: State, hyper: Hyper, batch: Batch) -> tuple[State, Metrics]:
        mask = jnp.ones(batch.ref_chosen_logp.shape, bool) if batch.mask is None else batch.mask
        count = jnp.sum(mask)

        def loss_fn(params: Params, rows: tuple[Batch, Bool[Array, "B"]]):
            part, part_mask = rows
            chosen, rejected = response_logp(logprob_fn, params, part.chosen, part.rejected)
            pairs = PairLogps(
                chosen,
                rejected,
                part.ref_chosen_logp,
                part.ref_rejected_logp,
                chosen_length=jnp.sum(part.chosen.mask, axis=-1),
                rejected_length=jnp.sum(part.rejected.mask, axis=-1),
                chosen_from_ref=part.chosen_from_ref,
                preference=part.preference,
            )
            return config.loss_fn(pairs, beta=hyper.beta, mask=part_mask, denominator=count)

        gradients, loss, metrics = accumulate_gradients(
            loss_fn, state.learner, (batch, mask), micro_batches=config.micro_batches
        )
        learner, guard = apply_gradients(
            state.learner, gradients, tx, learning_rate=hyper.learning_rate, loss=loss
        )
        return dataclasses.replace(state, learner=learner), {**metrics, **guard}

    return update
