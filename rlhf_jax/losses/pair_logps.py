"""`PairLogps`, the one argument of every loss on preference pairs, and what those losses share.

Notation of their docstrings: c and r are the policy-minus-reference log-ratios of the chosen and the rejected
response, D = c - r, s the logistic function, b beta; a bar is per token. Shared arguments:

  pairs: log-probs in nats, summed over the response's tokens. Those of the reference are constants to the
    caller: pass them through `stop_gradient` if they depend on what is differentiated.
  mask: pairs that count (all by default); the others may hold NaN.
  weights: factor of each pair's loss and metrics (1 by default), such as `wpo_weight`.
  denominator: what the sum over pairs is divided by (their number by default); give the number of the whole
    batch when this is one micro-batch or shard of it.

All return `(loss, metrics)`. The metrics are `loss`, the implicit rewards `chosen_reward` and
`rejected_reward` (b c and b r, or per token where the loss compares them so), their `margin` and `accuracy`
(a tie counts as wrong), all reduced as the loss is. All compute in float32 at least, and stay finite in value
and gradient at log-ratios of +-1e4.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.shapes import check_shapes
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Int, Metrics, Scalar
from rlhf_jax.kernels.prepare import cleaned, mask_or_all
from rlhf_jax.losses.reductions import RowMean, row_mean


@pytree_dataclass
class PairLogps:
    """Log-probs of preference pairs under policy and reference, in nats, summed over each response.

    Attributes:
      policy_chosen: of the preferred responses under the policy; gradient flows.
      policy_rejected: of the others.
      ref_chosen: the reference's of the preferred ones; None for losses without a reference.
      ref_rejected: the reference's of the others.
      chosen_length: tokens that were summed; None for losses that do not look at lengths.
      rejected_length: the same for the rejected ones.
      chosen_from_ref: where one response of each pair was sampled from the reference: whether it won (XPO).
      preference: probability that the chosen response is the better one, of a judge; None for 1.
    """

    policy_chosen: Float[Array, "B"]
    policy_rejected: Float[Array, "B"]
    ref_chosen: Float[Array, "B"] | None = None
    ref_rejected: Float[Array, "B"] | None = None
    chosen_length: Int[Array, "B"] | None = None
    rejected_length: Int[Array, "B"] | None = None
    chosen_from_ref: Bool[Array, "B"] | None = None
    preference: Float[Array, "B"] | None = None


@dataclasses.dataclass(frozen=True)
class PairLossTraits:
    """Properties of a pair loss that its callers mind; declared at the loss with `@pair_loss_traits`.

    Attributes:
      uses_batch_sort: it compares pairs with each other, so a batch cannot be computed in micro-batches.
      uses_soft_labels: it reads `PairLogps.preference`.
      needs_chosen_from_ref: one response of each pair must have been sampled from the reference.
      uses_plain_logps: it reads log-probs otherwise than as log-ratios of each response to the reference,
        so that another f-divergence has no place in it.
    """

    uses_batch_sort: bool = False
    uses_soft_labels: bool = False
    needs_chosen_from_ref: bool = False
    uses_plain_logps: bool = False


LossFn = TypeVar("LossFn", bound=Callable[..., Any])


def pair_loss_traits(**traits: bool) -> Callable[[LossFn], LossFn]:
    """Decorator that declares `PairLossTraits` of a loss."""

    def declared(loss_fn: LossFn) -> LossFn:
        setattr(loss_fn, "traits", PairLossTraits(**traits))  # noqa: B010 (functions declare no attributes)
        return loss_fn

    return declared


def traits_of(loss_fn: Callable[..., Any]) -> PairLossTraits:
    """Declared traits of a loss, also through `functools.partial`; the usual ones where it declares none."""
    return getattr(_unwrapped(loss_fn), "traits", PairLossTraits())


def _unwrapped(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    while hasattr(loss_fn, "func"):
        loss_fn = getattr(loss_fn, "func")  # noqa: B009 (only partials have it)
    return loss_fn


@runtime_checkable
class PairLossFn(Protocol):
    """A loss on preference pairs, such as `losses.dpo_loss`."""

    def __call__(
        self, pairs: PairLogps, /, *, beta: Scalar, mask: Bool[Array, "B"], denominator: Scalar
    ) -> tuple[Float[Array, ""], Metrics]:
        """(loss, metrics) of the pairs under the mask, sums divided by `denominator`."""
        ...


_SHARED = {*inspect.signature(PairLossFn.__call__).parameters, "weights"}


def loss_parameters(loss_fn: Callable[..., Any]) -> dict[str, Any]:
    """The numbers of a loss that are its own, with their defaults, by its keywords.

    They are what its signature has beside what all losses are called with: `label_smoothing`, `gamma`, ... A
    default of `inspect.Parameter.empty` is none.
    """
    return {
        name: parameter.default
        for name, parameter in inspect.signature(loss_fn).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in _SHARED
    }


def takes_weights(loss_fn: Callable[..., Any]) -> bool:
    """True if a loss has `weights`, one for each pair."""
    return "weights" in inspect.signature(loss_fn).parameters


def check_loss_params(loss_fn: Callable[..., Any], given: Iterable[str]) -> None:
    """Raises: UserError where a loss is given a number that it does not have, or lacks one that it needs."""
    own, given = loss_parameters(loss_fn), list(given)
    name = getattr(_unwrapped(loss_fn), "__name__", str(loss_fn))
    unknown = [parameter for parameter in given if parameter not in own]
    if unknown:
        raise UserError(f"{name} has no parameter {unknown[0]}: it has {', '.join(own) or 'none but beta'}")
    needed = [n for n, default in own.items() if default is inspect.Parameter.empty and n not in given]
    if needed:
        raise UserError(f"{name} needs {needed[0]}: give a number")


REFERENCED = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")
"""The fields of losses with a reference."""


# Preparation ---------------------------------------------------------------------------------------


def pair_rows(
    name: str,
    pairs: PairLogps,
    fields: tuple[str, ...],
    mask: Bool[Array, "B"] | None,
    weights: Float[Array, "B"] | None = None,
    denominator: Scalar | None = None,
) -> tuple[Bool[Array, "B"], RowMean, tuple[Float[Array, "B"], ...]]:
    """(mask, mean over pairs, `fields` of the pairs in full precision, 0 where masked).

    Args:
      name: of the loss, for messages.
    Raises:
      UserError: no `PairLogps`, one without a field that the loss needs, or arrays that are not [B] each.
    """
    if not isinstance(pairs, PairLogps):
        raise UserError(
            f"{name}: pairs has type {type(pairs).__name__}, expected one PairLogps(policy_chosen, "
            "policy_rejected, ref_chosen, ref_rejected, ...) of arrays [B]"
        )
    missing = [field for field in fields if getattr(pairs, field) is None]
    if missing:
        raise UserError(f"{name}: pairs.{missing[0]} is None, and this loss needs it: give an array [B]")
    checks = {f"pairs.{field}": (getattr(pairs, field), "B") for field in fields}
    *rows, mask, weights = check_shapes(name, **checks, mask=(mask, "B"), weights=(weights, "B"))
    mask = mask_or_all(mask, rows[0])
    return mask, row_mean(mask, weights, denominator), tuple(cleaned(row, mask) for row in rows)


def log_ratios(
    name: str,
    pairs: PairLogps,
    mask: Bool[Array, "B"] | None,
    weights: Float[Array, "B"] | None,
    denominator: Scalar | None,
) -> tuple[Float[Array, "B"], Float[Array, "B"], RowMean]:
    """Policy-minus-reference log-ratios of chosen and rejected, 0 where masked, and the mean over pairs."""
    _, mean, rows = pair_rows(name, pairs, REFERENCED, mask, weights, denominator)
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = rows
    return policy_chosen - ref_chosen, policy_rejected - ref_rejected, mean


def policy_logps(
    name: str,
    pairs: PairLogps,
    mask: Bool[Array, "B"] | None,
    weights: Float[Array, "B"] | None,
    denominator: Scalar | None,
) -> tuple[Float[Array, "B"], Float[Array, "B"], RowMean]:
    """The policy's log-probs of chosen and rejected, 0 where masked, and the mean over pairs."""
    fields = ("policy_chosen", "policy_rejected")
    _, mean, (chosen, rejected) = pair_rows(name, pairs, fields, mask, weights, denominator)
    return chosen, rejected, mean


def per_token(
    name: str, pairs: PairLogps, chosen: Float[Array, "B"], rejected: Float[Array, "B"]
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Sums over responses / their numbers of tokens; a masked row may say 0 tokens."""
    if pairs.chosen_length is None or pairs.rejected_length is None:
        raise UserError(f"{name}: pairs.chosen_length and rejected_length are needed: give arrays [B]")
    _, *lengths = check_shapes(
        name,
        **{
            "pairs.policy_chosen": (chosen, "B"),
            "pairs.chosen_length": (pairs.chosen_length, "B"),
            "pairs.rejected_length": (pairs.rejected_length, "B"),
        },
    )
    of_chosen, of_rejected = (jnp.where(length >= 1, length, 1).astype(chosen.dtype) for length in lengths)
    return chosen / of_chosen, rejected / of_rejected


def row_values(
    name: str,
    option: str,
    value: Scalar | Float[Array, "B"],
    like: Float[Array, "B"],
    mask: Bool[Array, "B"] | None,
) -> Float[Array, "B"]:
    """An option that is one number, or one for each pair, as one for each pair; 0 where masked."""
    _, value = check_shapes(name, pairs=(like, "B"), **{option: (value, "|B")})
    return cleaned(jnp.broadcast_to(jnp.asarray(value, like.dtype), like.shape), mask_or_all(mask, like))


# Pieces of losses ----------------------------------------------------------------------------------


def smoothed_logistic(
    logits: Float[Array, "B"], label_smoothing: Scalar | Float[Array, "B"]
) -> Float[Array, "B"]:
    """-(1 - e) log s(x) - e log s(-x)."""
    log_sigmoid = jax.nn.log_sigmoid
    return -(1 - label_smoothing) * log_sigmoid(logits) - label_smoothing * log_sigmoid(-logits)


def paired(
    losses: Float[Array, "*B"],
    chosen_reward: Float[Array, "*B"],
    rejected_reward: Float[Array, "*B"],
    mean: RowMean,
    **extra: Float[Array, "*B"],
) -> tuple[Float[Array, ""], Metrics]:
    """Mean loss over pairs, and the metrics of a paired loss as means over the same pairs.

    Args:
      chosen_reward: implicit reward of the chosen response, as the loss compares it.
      rejected_reward: the same of the rejected one.
      extra: further quantities, one per pair, to report as means.
    """
    rows = {
        "loss": losses,
        "chosen_reward": chosen_reward,
        "rejected_reward": rejected_reward,
        "margin": chosen_reward - rejected_reward,
        "accuracy": (chosen_reward > rejected_reward).astype(losses.dtype),
        **extra,
    }
    return mean(losses), {name: mean(jax.lax.stop_gradient(row)) for name, row in rows.items()}


def power_score(log_ratio: Float[Array, "B"], alpha: Scalar) -> Float[Array, "B"]:
    """(1 - u^-alpha) / alpha for u = exp(log_ratio); log u for alpha = 0.

    Above an exponent of 30 the exponential goes on along its tangent: float32 would overflow, and a
    clamp would leave exactly the worst responses without a gradient.
    """
    alpha = jnp.asarray(alpha, log_ratio.dtype)
    near_zero = jnp.abs(alpha) < 1e-6
    safe_alpha = jnp.where(near_zero, 1, alpha)
    exponent = -safe_alpha * log_ratio
    limit = 30.0
    tangent = jnp.exp(jnp.asarray(limit, log_ratio.dtype)) * jnp.maximum(exponent - limit, 0)
    power = -(jnp.expm1(jnp.minimum(exponent, limit)) + tangent) / safe_alpha
    return jnp.where(near_zero, log_ratio, power)
