"""Rule-based rewards: weights of graded propositions, fitted to ranked answers (Mu et al. 2024)."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.core.masks import clean
from rlhf_jax.core.train_state import TrainState, accumulate_gradients, apply_gradients, init_train_state
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Int, Metrics, Params, Scalar
from rlhf_jax.losses.reward import hinge_ranking_loss, ranked_pairs


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices.

    Attributes:
      micro_batches: parts in which the rankings are computed; changes memory, not the result.
      steps: optimizer steps of `make_train`, each on all rankings; the problem is convex.
    """

    micro_batches: int = 1
    steps: int = 1000


@pytree_dataclass
class Hyper:
    """Hyperparameters of rule-based rewards that a sweep may vary (array leaves).

    Attributes:
      margin: by how much the total score of the better answer must lead, in its units.
    """

    learning_rate: Scalar = 0.05
    margin: Scalar = 1.0


@pytree_dataclass
class State:
    """All that a resume needs; the weights are `learner.params["weights"]`, one per proposition."""

    learner: TrainState


@pytree_dataclass
class Rankings:
    """Ranked answers to prompts.

    Attributes:
      features: what a grader says of each answer, one number per proposition, such as a probability.
      base: scores that the rules are added to, as of a reward model; zeros for rules alone.
      ranks: the smaller the better; equal ranks are not compared.
      mask: answers there are; the others may hold anything.
    """

    features: Float[Array, "B K F"]
    base: Float[Array, "B K"]
    ranks: Int[Array, "B K"]
    mask: Bool[Array, "B K"]


def init(count: int, tx: optax.GradientTransformation) -> State:
    """The state at step 0: `count` propositions that weigh nothing."""
    return State(init_train_state({"weights": jnp.zeros(count)}, tx))


def total_scores(params: Params, rankings: Rankings) -> Float[Array, "B K"]:
    """R(x, y) = R_base(x, y) + sum_i w_i phi_i(x, y), the base plus the rules; 0 where masked."""
    features = clean(rankings.features, rankings.mask[..., None])
    return clean(rankings.base, rankings.mask) + features @ params["weights"]


def evaluate(params: Params, rankings: Rankings, hyper: Hyper) -> Metrics:
    """The loss, and the share of ranked pairs that total scores put in order; equal scores do not."""
    scores = total_scores(params, rankings)
    return hinge_ranking_loss(scores, rankings.ranks, rankings.mask, margin=hyper.margin)[1]


def make_update(
    config: Config, tx: optax.GradientTransformation
) -> Callable[[State, Hyper, Rankings], tuple[State, Metrics]]:
    """`update(state, hyper, rankings) -> (state, metrics)`: one optimizer step."""

    def update(state: State, hyper: Hyper, rankings: Rankings) -> tuple[State, Metrics]:
        count = jnp.sum(ranked_pairs(rankings.ranks, rankings.mask))

        def loss_fn(params: Params, part: Rankings):
            scores = total_scores(params, part)
            return hinge_ranking_loss(scores, part.ranks, part.mask, margin=hyper.margin, denominator=count)

        gradients, loss, metrics = accumulate_gradients(
            loss_fn, state.learner, rankings, micro_batches=config.micro_batches
        )
        learner, guard = apply_gradients(
            state.learner, gradients, tx, learning_rate=hyper.learning_rate, loss=loss
        )
        return State(learner), {**metrics, **guard}

    return update


def make_train(
    config: Config, tx: optax.GradientTransformation
) -> Callable[[Rankings, Hyper], tuple[State, Metrics]]:
    """`train(rankings, hyper) -> (state, history)`: the whole fit, traceable."""
    update = make_update(config, tx)

    def train(rankings: Rankings, hyper: Hyper) -> tuple[State, Metrics]:
        def step(state: State, _: None) -> tuple[State, Metrics]:
            return update(state, hyper, rankings)

        return jax.lax.scan(step, init(rankings.features.shape[-1], tx), length=config.steps)

    return train
