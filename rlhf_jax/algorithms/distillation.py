"""Distillation: a student learns the distribution of a teacher, on whatever sequences it is shown.

soft labels                 sequences of data,            `forward_kl_loss`
sequence level              what the teacher wrote,       `sft` on it (Kim and Rush 2016)
on policy (GKD)             what the student wrote,       `generalized_js_loss` or `reverse_kl_loss`
on policy, sampled tokens   what the student wrote,       `sampled_reverse_kl_loss` on [B, T] log-probs
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from rlhf_jax.core.train_state import TrainState, accumulate_gradients, apply_gradients, init_train_state
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Float, Metrics, Params, PRNGKeyArray, Scalar, Sequences
from rlhf_jax.losses.distillation import forward_kl_loss
from rlhf_jax.losses.reductions import Reduction, token_mean

DivergenceFn = Callable[..., tuple[Float[Array, ""], Metrics]]
LogpFn = Callable[[Params, Sequences], Float[Array, "B T *V"]]


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices.

    Attributes:
      micro_batches: parts in which a batch is computed; changes memory, not the result.
      loss_fn: a loss of `losses.distillation`.
      reduce: how tokens become one number.
    """

    micro_batches: int = 1
    loss_fn: DivergenceFn = forward_kl_loss
    reduce: Reduction = token_mean


@pytree_dataclass
class Hyper:
    """Hyperparameters of distillation that a sweep may vary (array leaves)."""

    learning_rate: Scalar = 1e-4


@pytree_dataclass
class State:
    """All that a resume needs; the teacher is not in it."""

    learner: TrainState
    key: PRNGKeyArray


@pytree_dataclass
class Batch:
    """Sequences with what the teacher says of them.

    Attributes:
      sequences: `mask` marks the tokens that count.
      teacher_logp: [B, T, V] log-probs of every token, or [B, T] of those that stand there.
    """

    sequences: Sequences
    teacher_logp: Float[Array, "B T *V"]


def init(params: Params, tx: optax.GradientTransformation, key: PRNGKeyArray, frozen: Params = None) -> State:
    """The state at step 0; `frozen` is the part of the model that does not train."""
    return State(init_train_state(params, tx, frozen), key)


def make_update(
    config: Config, logp_fn: LogpFn, tx: optax.GradientTransformation
) -> Callable[[State, Hyper, Batch], tuple[State, Metrics]]:
    """`update(state, hyper, batch) -> (state, metrics)`: one optimizer step.

    Args:
      logp_fn: (params, sequences) -> the student's log-probs, of the teacher's shape.
    """

    def update(state: State, hyper: Hyper, batch: Batch) -> tuple[State, Metrics]:
        denominator = config.reduce.total(batch.sequences.mask)

        def loss_fn(params: Params, part: Batch) -> Any:
            return config.loss_fn(
                logp_fn(params, part.sequences),
                part.teacher_logp,
                part.sequences.mask,
                reduce=config.reduce,
                denominator=denominator,
            )

        gradients, loss, metrics = accumulate_gradients(
            loss_fn, state.learner, batch, micro_batches=config.micro_batches
        )
        learner, guard = apply_gradients(
            state.learner, gradients, tx, learning_rate=hyper.learning_rate, loss=loss
        )
        metrics = {**metrics, **guard, "tokens": jnp.sum(batch.sequences.mask)}
        return dataclasses.replace(state, learner=learner), metrics

    return update
