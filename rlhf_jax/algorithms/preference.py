"""Direct preference optimisation and its family: a policy from pairs, without a reward model."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.core.masks import masked_sum
from rlhf_jax.core.optimization import Learner, accumulate_gradients, apply_gradients, init_learner
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Float, Metrics, Params, PRNGKeyArray, Scalar, ScoreFn, Sequences
from rlhf_jax.losses.preference import dpo_loss

PairLossFn = Callable[..., tuple[Float[Array, ""], Metrics]]


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices.

    Attributes:
      micro_batches: parts in which a batch is computed; changes memory, not the result.
      loss_fn: a loss of `losses.preference` that takes (policy chosen, policy rejected, reference chosen,
        reference rejected) log-probs, `beta=` and `denominator=`.
    """

    micro_batches: int = 1
    loss_fn: PairLossFn = dpo_loss


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

    The log-probs may come from a stored pass over the data set or from `reference_logp` on the fly.
    """

    chosen: Sequences
    rejected: Sequences
    ref_chosen_logp: Float[Array, "B"]
    ref_rejected_logp: Float[Array, "B"]


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


def make_batch(score_fn: ScoreFn, ref_params: Params, chosen: Sequences, rejected: Sequences) -> Batch:
    """Pairs with reference log-probs computed on the fly."""
    return Batch(chosen, rejected, *response_logp(score_fn, ref_params, chosen, rejected))


def make_update(
    config: Config, score_fn: ScoreFn, tx: optax.GradientTransformation
) -> Callable[[State, Hyper, Batch], tuple[State, Metrics]]:
    """`update(state, hyper, batch) -> (state, metrics)`: one optimizer step."""

    def update(state: State, hyper: Hyper, batch: Batch) -> tuple[State, Metrics]:
        count = batch.ref_chosen_logp.shape[0]

        def loss_fn(params: Params, part: Batch):
            chosen, rejected = response_logp(score_fn, params, part.chosen, part.rejected)
            return config.loss_fn(
                chosen,
                rejected,
                part.ref_chosen_logp,
                part.ref_rejected_logp,
                beta=hyper.beta,
                denominator=count,
            )

        gradients, loss, metrics = accumulate_gradients(
            loss_fn, state.learner, batch, micro_batches=config.micro_batches
        )
        learner, guard = apply_gradients(
            state.learner, gradients, tx, learning_rate=hyper.learning_rate, loss=loss
        )
        return dataclasses.replace(state, learner=learner), {**metrics, **guard}

    return update
