"""Direct preference optimization (DPO) and its family: a policy from pairs, without a reward model."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

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
from rlhf_jax.losses.pair_logps import PairLogps, PairLossFn, check_loss_params, takes_weights, traits_of
from rlhf_jax.losses.preference import dpo_loss
from rlhf_jax.losses.preference_modifiers import length_desensitized_logp, wpo_weight

_LOSS_MODULES = with_reference, preference_reference_free, preference_online


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
      loss_fn: a loss on `PairLogps`, of `losses` or of your own, or one of `with_divergence`, `with_nll` and
        `mixed_loss`; its numbers are in `Hyper.loss_params`.
      half_temperature_logprob_fn: the policy at half the temperature of `logprob_fn`, for the weights of WPO
        (Zhou et al. 2024), as of `Policy.make_logprob_fn(temperature=0.5)`; None for no weights.
    """

    micro_batches: int = 1
    loss_fn: PairLossFn = dpo_loss
    half_temperature_logprob_fn: LogprobFn | None = None

    def __post_init__(self) -> None:
        """Refuses micro-batches and weights where the loss compares all pairs of a batch."""
        if self.micro_batches > 1 and traits_of(self.loss_fn).uses_batch_sort:
            raise UserError("the loss compares pairs with each other: it needs micro_batches 1")
        if self.half_temperature_logprob_fn is not None and not takes_weights(self.loss_fn):
            raise UserError("the loss has no weights of pairs, which WPO needs: take another loss_fn")


@pytree_dataclass
class Hyper:
    """Hyperparameters of preference optimization that a sweep may vary (array leaves).

    Attributes:
      beta: strength of the KL constraint, per nat.
      loss_params: the numbers of the loss beside beta, by its own keywords, such as `label_smoothing` or
        `gamma`; those left out have the defaults of the loss.
      ld_alpha: LD-DPO's weight of the tokens beyond the shorter response of a pair (Liu et al. 2024); None
        for the plain sum. `make_batch` must be given the same.
    """

    learning_rate: Scalar = 1e-4
    beta: Scalar = 0.1
    loss_params: Mapping[str, Scalar] = dataclasses.field(default_factory=dict)
    ld_alpha: Scalar | None = None


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


def token_logps(
    logprob_fn: LogprobFn, params: Params, chosen: Sequences, rejected: Sequences
) -> tuple[Float[Array, "N T"], Bool[Array, "N T"]]:
    """(log-probs of the tokens of chosen, then of rejected responses, which count), in one forward pass."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), chosen, rejected)
    return logprob_fn(params, both).logp, both.mask


def summed(
    logp: Float[Array, "N T"], mask: Bool[Array, "N T"], ld_alpha: Scalar | None
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Log-probs of chosen and rejected responses from those of their tokens, as LD-DPO where it is asked."""
    if ld_alpha is None:
        of_both = masked_sum(logp, mask, axis=-1)
    else:
        shorter = jnp.min(jnp.sum(mask, axis=-1).reshape(2, -1), axis=0)
        of_both = length_desensitized_logp(logp, mask, jnp.tile(shorter, 2), alpha=ld_alpha)
    chosen_logp, rejected_logp = jnp.split(of_both, 2)
    return chosen_logp, rejected_logp


def response_logp(
    logprob_fn: LogprobFn,
    params: Params,
    chosen: Sequences,
    rejected: Sequences,
    ld_alpha: Scalar | None = None,
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Log-probs of chosen and rejected responses, in one forward pass; `ld_alpha` as in `Hyper`."""
    return summed(*token_logps(logprob_fn, params, chosen, rejected), ld_alpha)


def make_batch(
    logprob_fn: LogprobFn,
    ref_params: Params,
    chosen: Sequences,
    rejected: Sequences,
    mask: Bool[Array, "B"] | None = None,
    ld_alpha: Scalar | None = None,
) -> Batch:
    """Pairs with reference log-probs computed on the fly; `ld_alpha` as in `Hyper`."""
    ref = response_logp(logprob_fn, ref_params, chosen, rejected, ld_alpha)
    return Batch(chosen, rejected, *ref, mask)


def _wpo_weights(
    half_temperature_logprob_fn: LogprobFn, params: Params, part: Batch, logp: Any, mask: Any
) -> Float[Array, "B"]:
    """The product of the weights of both responses of a pair, without gradient."""
    params, logp = jax.lax.stop_gradient((params, logp))
    half, _ = token_logps(half_temperature_logprob_fn, params, part.chosen, part.rejected)
    return jnp.prod(wpo_weight(logp, 2 * logp - half, mask).reshape(2, -1), axis=0)


def make_update(
    config: Config, logprob_fn: LogprobFn, tx: optax.GradientTransformation
) -> Callable[[State, Hyper, Batch], tuple[State, Metrics]]:
    """`update(state, hyper, batch) -> (state, metrics)`: one optimizer step.

    Raises:
      UserError: `hyper.loss_params` has a number that the loss does not have.
    """

    def update(state: State, hyper: Hyper, batch: Batch) -> tuple[State, Metrics]:
        check_loss_params(config.loss_fn, hyper.loss_params)
        mask = jnp.ones(batch.ref_chosen_logp.shape, bool) if batch.mask is None else batch.mask
        count = jnp.sum(mask)

        def loss_fn(params: Params, rows: tuple[Batch, Bool[Array, "B"]]):
            part, part_mask = rows
            logp, counted = token_logps(logprob_fn, params, part.chosen, part.rejected)
            options: dict[str, Any] = dict(hyper.loss_params)
            if config.half_temperature_logprob_fn is not None:
                half = config.half_temperature_logprob_fn
                options["weights"] = _wpo_weights(half, params, part, logp, counted)
            pairs = PairLogps(
                *summed(logp, counted, hyper.ld_alpha),
                part.ref_chosen_logp,
                part.ref_rejected_logp,
                chosen_length=jnp.sum(part.chosen.mask, axis=-1),
                rejected_length=jnp.sum(part.rejected.mask, axis=-1),
                chosen_from_ref=part.chosen_from_ref,
                preference=part.preference,
            )
            return config.loss_fn(pairs, beta=hyper.beta, mask=part_mask, denominator=count, **options)

        gradients, loss, metrics = accumulate_gradients(
            loss_fn, state.learner, (batch, mask), micro_batches=config.micro_batches
        )
        learner, guard = apply_gradients(
            state.learner, gradients, tx, learning_rate=hyper.learning_rate, loss=loss
        )
        return dataclasses.replace(state, learner=learner), {**metrics, **guard}

    return update
