"""Reward models: Bradley-Terry on preference pairs; Plackett-Luce or all pairs on rankings of K answers."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.importing import is_import_path, load_function, nearest_name
from rlhf_jax.core.train_state import TrainState, accumulate_gradients, apply_gradients, init_train_state
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Int, Metrics, Params, PRNGKeyArray, Scalar, Sequences
from rlhf_jax.losses import reward as losses
from rlhf_jax.losses.reward import bradley_terry_loss, ranked_pairs

RewardFn = Callable[[Params, Sequences], Float[Array, "B"]]
RewardLossFn = Callable[..., tuple[Float[Array, ""], Metrics]]
"""A loss `(rewards, ranks, mask, *, margin, centring, denominator) -> (loss, metrics)` on rankings [B, K],
such as `losses.all_pairs_loss`; or one on pairs, whose first parameters have the names `chosen_reward` and
`rejected_reward`, and which takes `label_smoothing` where there are soft labels."""


def reward_losses() -> dict[str, RewardLossFn]:
    """Losses of reward models by their short names: `bradley_terry`, `all_pairs`, `plackett_luce`.

    They are the functions of `losses.reward` that take the numbers of `Hyper`, `margin` and `centring`: a new
    one is in the table, and so among the choices of the command, once it is written.
    """
    return {
        name.removesuffix("_loss"): function
        for name, function in vars(losses).items()
        if name.endswith("_loss") and {"margin", "centring"} <= inspect.signature(function).parameters.keys()
    }


def learns_from_pairs(loss_fn: RewardLossFn) -> bool:
    """True if the loss takes chosen and rejected rewards, rather than rankings."""
    return "chosen_reward" in inspect.signature(loss_fn).parameters


def find_reward_loss(loss: str | RewardLossFn) -> RewardLossFn:
    """A loss by its short name, by a path `module:function`, or itself.

    Raises:
      UserError: no such name or path; with the nearest name.
    """
    if not isinstance(loss, str):
        return loss
    table = reward_losses()
    if loss in table:
        return table[loss]
    if is_import_path(loss):
        return load_function(loss, kind="loss", example="my_losses:ranking_loss")
    raise UserError(
        f"loss '{loss}' is neither one of {', '.join(table)} nor a path module:function"
        + nearest_name(loss, table)
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices.

    Attributes:
      micro_batches: parts in which a batch is computed; changes memory, not the result.
      loss_fn: of rewards, of `losses` or of your own; one on pairs takes `Pairs`, the others `Rankings`.
    """

    micro_batches: int = 1
    loss_fn: RewardLossFn = bradley_terry_loss


@pytree_dataclass
class Hyper:
    """Hyperparameters of reward models that a sweep may vary (array leaves).

    Attributes:
      margin: by how much the chosen score must lead.
      centring: weight of (chosen + rejected)^2, which keeps scores near 0.
      margin_scale: factor of the rows' own margins (Llama 2, Touvron et al. 2023, eq. 2), which add to
        `margin`.
    """

    learning_rate: Scalar = 3e-4
    margin: Scalar = 0.0
    centring: Scalar = 0.01
    margin_scale: Scalar = 1.0


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
      margin: by how much each chosen one is better, beside `Hyper.margin`; None for nothing.
    """

    chosen: Sequences
    rejected: Sequences
    preference: Float[Array, "B"] | None = None
    margin: Float[Array, "B"] | None = None


@pytree_dataclass
class Rankings:
    """Prompts with K ranked answers each, one sample a row.

    Attributes:
      answers: K times a prompt with an answer; those of one prompt stand in the same row.
      ranks: the smaller the better; answers of equal rank are not compared.
      mask: answers there are; of the others neither tokens nor ranks count.
      margin: by how much a better one is better, beside `Hyper.margin`; None for nothing.
    """

    answers: tuple[Sequences, ...]
    ranks: Int[Array, "B K"]
    mask: Bool[Array, "B K"]
    margin: Float[Array, "B"] | None = None


def init(params: Params, tx: optax.GradientTransformation, key: PRNGKeyArray, frozen: Params = None) -> State:
    """The state at step 0; `frozen` is the part of the model that does not train."""
    return State(init_train_state(params, tx, frozen), key)


def score_answers(
    reward_fn: RewardFn, params: Params, answers: Sequence[Sequences]
) -> list[Float[Array, "B"]]:
    """Rewards of K answers to each prompt, in one forward pass."""
    together = jax.tree.map(lambda *rows: jnp.concatenate(rows), *answers)
    return jnp.split(reward_fn(params, together), len(answers))


def score_pairs(
    reward_fn: RewardFn, params: Params, pairs: Pairs
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Rewards of the chosen and the rejected responses, in one forward pass."""
    chosen, rejected = score_answers(reward_fn, params, (pairs.chosen, pairs.rejected))
    return chosen, rejected


def make_update(
    config: Config, reward_fn: RewardFn, tx: optax.GradientTransformation
) -> Callable[[State, Hyper, Any], tuple[State, Metrics]]:
    """`update(state, hyper, batch) -> (state, metrics)`: one optimizer step on `Pairs` or `Rankings`."""

    def update(state: State, hyper: Hyper, batch: Pairs | Rankings) -> tuple[State, Metrics]:
        count = _count(batch)

        def loss_fn(params: Params, part: Pairs | Rankings):
            own = part.margin
            shared: dict[str, Any] = {
                "margin": hyper.margin if own is None else hyper.margin + hyper.margin_scale * own,
                "centring": hyper.centring,
                "denominator": count,
            }
            if isinstance(part, Rankings):
                rewards = jnp.stack(score_answers(reward_fn, params, part.answers), axis=1)
                return config.loss_fn(rewards, part.ranks, part.mask, **shared)
            if part.preference is not None:
                shared["label_smoothing"] = 1 - part.preference
            return config.loss_fn(*score_pairs(reward_fn, params, part), **shared)

        gradients, loss, metrics = accumulate_gradients(
            loss_fn, state.learner, batch, micro_batches=config.micro_batches
        )
        learner, guard = apply_gradients(
            state.learner, gradients, tx, learning_rate=hyper.learning_rate, loss=loss
        )
        return dataclasses.replace(state, learner=learner), {**metrics, **guard}

    return update


def _count(batch: Pairs | Rankings) -> int | Int[Array, ""]:
    """Pairs, or prompts with answers of different rank: what the sum over a batch is divided by."""
    if isinstance(batch, Pairs):
        return batch.chosen.tokens.shape[0]
    return jnp.sum(jnp.any(ranked_pairs(batch.ranks, batch.mask), axis=(1, 2)))
