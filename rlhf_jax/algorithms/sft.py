"""Supervised fine-tuning: cross-entropy on the tokens of the response."""

import dataclasses
from collections.abc import Callable

import optax

from rlhf_jax.core.optimization import Learner, accumulate_gradients, apply_gradients, init_learner
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Metrics, Params, PRNGKeyArray, Scalar, ScoreFn, Sequences
from rlhf_jax.losses.reductions import Reduction, token_mean
from rlhf_jax.losses.supervised import cross_entropy_loss


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices.

    Attributes:
      micro_batches: parts in which a batch is computed; changes memory, not the result.
      reduce: how tokens become one number.
    """

    micro_batches: int = 1
    reduce: Reduction = token_mean


@pytree_dataclass
class Hyper:
    """What a sweep may vary."""

    learning_rate: Scalar = 1e-3


@pytree_dataclass
class State:
    """All that a resume needs."""

    learner: Learner
    key: PRNGKeyArray


def init(params: Params, tx: optax.GradientTransformation, key: PRNGKeyArray, frozen: Params = None) -> State:
    """The state at step 0; `frozen` is the part of the model that does not train."""
    return State(init_learner(params, tx, frozen), key)


def make_update(
    config: Config, score_fn: ScoreFn, tx: optax.GradientTransformation
) -> Callable[[State, Hyper, Sequences], tuple[State, Metrics]]:
    """`update(state, hyper, sequences) -> (state, metrics)`: one optimizer step."""

    def update(state: State, hyper: Hyper, batch: Sequences) -> tuple[State, Metrics]:
        denominator = config.reduce.total(batch.mask)

        def loss_fn(params: Params, part: Sequences):
            logp = score_fn(params, part).logp
            return cross_entropy_loss(logp, part.mask, reduce=config.reduce, denominator=denominator)

        gradients, loss, metrics = accumulate_gradients(
            loss_fn, state.learner, batch, micro_batches=config.micro_batches
        )
        learner, guard = apply_gradients(
            state.learner, gradients, tx, learning_rate=hyper.learning_rate, loss=loss
        )
        return dataclasses.replace(state, learner=learner), {**metrics, **guard, "tokens": batch.mask.sum()}

    return update
