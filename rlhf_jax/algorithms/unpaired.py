"""Kahneman-Tversky optimization (KTO) and BCO: a policy from single responses, each desirable or not."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import optax

from rlhf_jax.core.masks import masked_sum
from rlhf_jax.core.protocols import LogprobFn
from rlhf_jax.core.train_state import TrainState, accumulate_gradients, apply_gradients, init_train_state
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import (
    Array,
    Bool,
    Float,
    Metrics,
    Params,
    PRNGKeyArray,
    Scalar,
    Sequences,
)
from rlhf_jax.losses.unpaired import bco_loss, class_mean_shift, kto_kl, kto_loss


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices.

    Attributes:
      micro_batches: parts in which a batch is computed; changes memory, not the result.
      shift_decay: decay of the running mean reward that BCO shifts by; None for KTO, which has none.
      shift_fn: metrics of a batch -> what the running mean is of: `class_mean_shift`, the mean of the mean
        rewards of both classes as in the paper, or `row_mean_shift`, the mean over all rows as in TRL. They
        differ where the classes are not as frequent. A batch where it is not finite, such as one that lacks
        a class, leaves the running mean as it is.
    """

    micro_batches: int = 1
    shift_decay: float | None = None
    shift_fn: Callable[[Metrics], Float[Array, ""]] = class_mean_shift


UNPAIRED_LOSSES: dict[str, Config] = {"kto": Config(), "bco": Config(shift_decay=0.9)}
"""Losses on single responses by their short names."""


@pytree_dataclass
class Hyper:
    """Hyperparameters of unpaired preference optimization that a sweep may vary (array leaves).

    Attributes:
      beta: strength of the KL constraint, per nat.
      desirable_weight: of the desirable responses.
      undesirable_weight: of the others.
    """

    learning_rate: Scalar = 1e-4
    beta: Scalar = 0.1
    desirable_weight: Scalar = 1.0
    undesirable_weight: Scalar = 1.0


@pytree_dataclass
class State:
    """All that a resume needs.

    Attributes:
      shift: BCO's running mean reward; 0 throughout for KTO.
    """

    learner: TrainState
    key: PRNGKeyArray
    shift: Float[Array, ""]


@pytree_dataclass
class Batch:
    """Responses with the reference's log-probs, in nats summed over the response.

    Attributes:
      desirable: which responses are.
      mismatched: prompts with responses to other prompts, for KTO's reference point; None for BCO.
      ref_mismatched_logp: the reference's of those.
    """

    responses: Sequences
    desirable: Bool[Array, "B"]
    ref_logp: Float[Array, "B"]
    mismatched: Sequences | None = None
    ref_mismatched_logp: Float[Array, "B"] | None = None


def init(params: Params, tx: optax.GradientTransformation, key: PRNGKeyArray, frozen: Params = None) -> State:
    """The state at step 0; `frozen` is the part of the model that does not train."""
    return State(init_train_state(params, tx, frozen), key, jnp.float32(0))


def response_logp(logprob_fn: LogprobFn, params: Params, responses: Sequences) -> Float[Array, "B"]:
    """Log-probs of responses, in nats."""
    return masked_sum(logprob_fn(params, responses).logp, responses.mask, axis=-1)


def make_batch(
    logprob_fn: LogprobFn,
    ref_params: Params,
    responses: Sequences,
    desirable: Bool[Array, "B"],
    mismatched: Sequences | None = None,
) -> Batch:
    """Responses with reference log-probs computed on the fly."""
    ref_logp = response_logp(logprob_fn, ref_params, responses)
    ref_mismatched = None if mismatched is None else response_logp(logprob_fn, ref_params, mismatched)
    return Batch(responses, desirable, ref_logp, mismatched, ref_mismatched)


def make_update(
    config: Config, logprob_fn: LogprobFn, tx: optax.GradientTransformation
) -> Callable[[State, Hyper, Batch], tuple[State, Metrics]]:
    """`update(state, hyper, batch) -> (state, metrics)`: one optimizer step.

    KTO's reference point is taken over the whole batch before the gradients, so that micro-batches sum.
    """

    def update(state: State, hyper: Hyper, batch: Batch) -> tuple[State, Metrics]:
        count = batch.ref_logp.shape[0]
        kl = jnp.float32(0)
        if batch.mismatched is not None and batch.ref_mismatched_logp is not None:
            policy = response_logp(logprob_fn, state.learner.all_params, batch.mismatched)
            kl = kto_kl(policy, batch.ref_mismatched_logp)
        elif config.shift_decay is None:
            raise ValueError("KTO needs mismatched pairs for its reference point: make_batch(mismatched=)")

        def loss_fn(params: Params, part: Batch):
            logp = response_logp(logprob_fn, params, part.responses)
            common = {"beta": hyper.beta, "denominator": count}
            if config.shift_decay is not None:
                weights = jnp.where(part.desirable, hyper.desirable_weight, hyper.undesirable_weight)
                return bco_loss(
                    logp, part.ref_logp, part.desirable, shift=state.shift, weights=weights, **common
                )
            return kto_loss(
                logp,
                part.ref_logp,
                part.desirable,
                kl,
                desirable_weight=hyper.desirable_weight,
                undesirable_weight=hyper.undesirable_weight,
                **common,
            )

        gradients, loss, metrics = accumulate_gradients(
            loss_fn, state.learner, batch, micro_batches=config.micro_batches
        )
        learner, guard = apply_gradients(
            state.learner, gradients, tx, learning_rate=hyper.learning_rate, loss=loss
        )
        shift = state.shift
        if config.shift_decay is not None:
            moved = config.shift_decay * shift + (1 - config.shift_decay) * config.shift_fn(metrics)
            shift = jnp.where(jnp.isfinite(moved), moved, shift).astype(shift.dtype)
        return dataclasses.replace(state, learner=learner, shift=shift), {**metrics, **guard}

    return update


def mismatch(prompt_width: int, responses: Sequences, *, shift: int = 1) -> Sequences:
    """Each prompt with the response `shift` rows before it.

    Args:
      prompt_width: P, the columns of the left-padded prompts.
      shift: the number of responses to one prompt, where they stand together.
    """

    def joined(own: Array) -> Array:
        prompt, response = own[:, :prompt_width], own[:, prompt_width:]
        return jnp.concatenate([prompt, jnp.roll(response, shift, axis=0)], axis=1)

    tokens, segment_ids, mask = map(joined, (responses.tokens, responses.segment_ids, responses.mask))
    positions = jnp.maximum(jnp.cumsum(segment_ids > 0, axis=1) - 1, 0)
    return Sequences(tokens, positions, segment_ids, mask, images=responses.images)
