"""Process and outcome reward models: is this step right? (Uesato et al. 2022; Lightman et al. 2023)."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import optax

from rlhf_jax.core.train_state import TrainState, accumulate_gradients, apply_gradients, init_train_state
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Float, Metrics, Params, PRNGKeyArray, Scalar, Sequences
from rlhf_jax.losses.reward import process_reward_loss

StepRewardFn = Callable[[Params, Sequences], Float[Array, "B T"]]


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices.

    Attributes:
      micro_batches: parts in which a batch is computed; changes memory, not the result.
    """

    micro_batches: int = 1


@pytree_dataclass
class Hyper:
    """Hyperparameters of process reward models that a sweep may vary (array leaves)."""

    learning_rate: Scalar = 3e-4


@pytree_dataclass
class State:
    """All that a resume needs."""

    learner: TrainState
    key: PRNGKeyArray


@pytree_dataclass
class Batch:
    """Solutions, one a row.

    Attributes:
      sequences: `mask` marks the last token of each step that is judged.
      labels: there, whether the step is right, in [0, 1].
    """

    sequences: Sequences
    labels: Float[Array, "B T"]


def init(params: Params, tx: optax.GradientTransformation, key: PRNGKeyArray, frozen: Params = None) -> State:
    """The state at step 0; `frozen` is the part of the model that does not train."""
    return State(init_train_state(params, tx, frozen), key)


def make_update(
    config: Config, step_reward_fn: StepRewardFn, tx: optax.GradientTransformation
) -> Callable[[State, Hyper, Batch], tuple[State, Metrics]]:
    """`update(state, hyper, batch) -> (state, metrics)`: one optimizer step, a mean over judged steps.

    Args:
      step_reward_fn: (params, sequences) -> log-odds after each token.
    """

    def update(state: State, hyper: Hyper, batch: Batch) -> tuple[State, Metrics]:
        judged = jnp.sum(batch.sequences.mask)

        def loss_fn(params: Params, part: Batch):
            logits = step_reward_fn(params, part.sequences)
            return process_reward_loss(logits, part.labels, part.sequences.mask, denominator=judged)

        gradients, loss, metrics = accumulate_gradients(
            loss_fn, state.learner, batch, micro_batches=config.micro_batches
        )
        learner, guard = apply_gradients(
            state.learner, gradients, tx, learning_rate=hyper.learning_rate, loss=loss
        )
        metrics = {**metrics, **guard, "steps": judged}
        return dataclasses.replace(state, learner=learner), metrics

    return update
