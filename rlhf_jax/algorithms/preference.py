"""Direct preference optimisation and its family: a policy from pairs, without a reward model."""

import dataclasses
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.core.masks import masked_sum
from rlhf_jax.core.train_state import Learner, accumulate_gradients, apply_gradients, init_learner
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import (
    Array,
    Bool,
    Float,
    Int,
    Metrics,
    Params,
    PRNGKeyArray,
    Scalar,
    ScoreFn,
    Sequences,
)
from rlhf_jax.losses.preference import dpo_loss


@pytree_dataclass
class PairLogps:
    """What is known of pairs: log-probs in nats summed over responses, and lengths in tokens.

    Attributes:
      chosen_from_ref: where one response of each pair was sampled from the reference: whether it won (XPO).
      preference: probability that the chosen response is the better one, of a judge; None for 1.
    """

    policy_chosen: Float[Array, "B"]
    policy_rejected: Float[Array, "B"]
    ref_chosen: Float[Array, "B"]
    ref_rejected: Float[Array, "B"]
    chosen_length: Int[Array, "B"]
    rejected_length: Int[Array, "B"]
    chosen_from_ref: Bool[Array, "B"] | None = None
    preference: Float[Array, "B"] | None = None


@runtime_checkable
class PairLossFn(Protocol):
    """A loss on pairs; `algorithms.preference_members` has the family's."""

    def __call__(
        self, pairs: PairLogps, /, *, beta: Scalar, mask: Bool[Array, "B"], denominator: Scalar
    ) -> tuple[Float[Array, ""], Metrics]:
        """(loss, metrics) of the pairs under the mask, sums divided by `denominator`."""
        ...


def dpo(
    pairs: PairLogps, /, *, beta: Scalar, mask: Bool[Array, "B"], denominator: Scalar
) -> tuple[Float[Array, ""], Metrics]:
    """`losses.preference.dpo_loss`, by soft labels where there are any."""
    return dpo_loss(
        pairs.policy_chosen,
        pairs.policy_rejected,
        pairs.ref_chosen,
        pairs.ref_rejected,
        beta=beta,
        label_smoothing=0.0 if pairs.preference is None else 1 - pairs.preference,
        mask=mask,
        denominator=denominator,
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices.

    Attributes:
      micro_batches: parts in which a batch is computed; changes memory, not the result.
      loss_fn: what is made of the pairs.
    """

    micro_batches: int = 1
    loss_fn: PairLossFn = dpo


@pytree_dataclass
class Hyper:
    """What a sweep may vary.

    Attributes:
      beta: strength of the KL constraint, per nat.
    """

    learning_rate: Scalar = 1e-4
    beta: Scalar = 0.1


@pytree_dataclass
class State:
    """All that a resume needs. The reference is not in it: its log-probs are in the batch."""

    learner: Learner
    key: PRNGKeyArray


@pytree_dataclass
class Batch:
    """Pairs with the reference's log-probs, in nats summed over the response.

    The log-probs may come from a stored pass over the data set or from `make_batch` on the fly.

    Attributes:
      mask: pairs that count; None for all. Ties of a judge do not.
      chosen_from_ref: see `PairLogps`.
      preference: see `PairLogps`; the loss `dpo` minds it.
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
    return State(init_learner(params, tx, frozen), key)


def response_logp(
    score_fn: ScoreFn, params: Params, chosen: Sequences, rejected: Sequences
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Log-probs of chosen and rejected responses, in one forward pass."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), chosen, rejected)
    summed = masked_sum(score_fn(params, both).logp, both.mask, axis=-1)
    chosen_logp, rejected_logp = jnp.split(summed, 2)
    return chosen_logp, rejected_logp


def make_batch(
    score_fn: ScoreFn,
    ref_params: Params,
    chosen: Sequences,
    rejected: Sequences,
    mask: Bool[Array, "B"] | None = None,
) -> Batch:
    """Pairs with reference log-probs computed on the fly."""
    return Batch(chosen, rejected, *response_logp(score_fn, ref_params, chosen, rejected), mask)


def make_update(
    config: Config, score_fn: ScoreFn, tx: optax.GradientTransformation
) -> Callable[[State, Hyper, Batch], tuple[State, Metrics]]:
    """`update(state, hyper, batch) -> (state, metrics)`: one optimizer step."""

    def update(state: State, hyper: Hyper, batch: Batch) -> tuple[State, Metrics]:
        mask = jnp.ones(batch.ref_chosen_logp.shape, bool) if batch.mask is None else batch.mask
        count = jnp.sum(mask)

        def loss_fn(params: Params, rows: tuple[Batch, Bool[Array, "B"]]):
            part, part_mask = rows
            chosen, rejected = response_logp(score_fn, params, part.chosen, part.rejected)
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
