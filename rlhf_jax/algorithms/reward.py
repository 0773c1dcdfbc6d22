"""Reward models from preference pairs, by the Bradley-Terry likelihood."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.core.train_state import TrainState, accumulate_gradients, apply_gradients, init_train_state
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Float, Metrics, Params, PRNGKeyArray, Scalar, Sequences
from rlhf_jax.losses.reward import bradley_terry_loss

RewardFn = Callable[[Params, Sequences], Float[Array, "B"]]


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices.

    Attributes:
      micro_batches: parts in which a batch is computed; changes memory, not the result.
    """

    micro_batches: int = 1


@pytree_dataclass
class Hyper:
    """Hyperparameters of reward models that a sweep may vary (array leaves).

    Attributes:
      margin: by how much the chosen score must lead.
      centring: weight of (chosen + rejected)^2, which keeps scores near 0.
    """

    learning_rate: Scalar = 3e-4
    margin: Scalar = 0.0
    centring: Scalar = 0.01


@pytree_dataclass
class State:
    """All that a resume needs."""

    learner: TrainState
    key: PRNGKeyArray


@pytree_dataclass
class Pairs:
    """Prompts with a chosen and a rejected response, one sample a row.

    Attributes:
      preference: probability that the chosen response is the better one, of a judge; None for 1.
    """

    chosen: Sequences
    rejected: Sequences
    preference: Float[Array, "B"] | None = None


def init(params: Params, tx: optax.GradientTransformation, key: PRNGKeyArray, frozen: Params = None) -> State:
    """The state at step 0; `frozen` is the part of the model that does not train."""
    return State(init_train_state(params, tx, frozen), key)


def score_pairs(
    reward_fn: RewardFn, params: Params, pairs: Pairs
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Rewards of the chosen and the rejected responses, in one forward pass."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), pairs.chosen, pairs.rejected)
    chosen, rejected = jnp.split(reward_fn(params, both), 2)
    return chosen, rejected


def make_update(
    config: Config, reward_fn: RewardFn, tx: optax.GradientTransformation
) -> Callable[[State, Hyper, Pairs], tuple[State, Metrics]]:
    """`update(state, hyper, pairs) -> (state, metrics)`: one optimizer step."""

    def update(state: State, hyper: Hyper, batch: Pairs) -> tuple[State, Metrics]:
        count = batch.chosen.tokens.shape[0]

        def loss_fn(params: Params, part: Pairs):
            chosen, rejected = score_pairs(reward_fn, params, part)
            return bradley_terry_loss(
                chosen,
                rejected,
                margin=hyper.margin,
                centring=hyper.centring,
                label_smoothing=0.0 if part.preference is None else 1 - part.preference,
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
