"""Nash-MD: a policy that no other is preferred to, by playing against its mixture with the reference."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.core.masks import masked_sum
from rlhf_jax.core.protocols import DecodeFn, LogprobFn, PrefillFn
from rlhf_jax.core.train_state import TrainState, accumulate_gradients, apply_gradients, init_train_state
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Bool, Float, Metrics, Params, PRNGKeyArray, Scalar, Sequences
from rlhf_jax.losses.preference_online import nash_md_loss


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices.

    Attributes:
      micro_batches: parts in which a batch is computed; changes memory, not the result.
    """

    micro_batches: int = 1


@pytree_dataclass
class Hyper:
    """Hyperparameters of Nash-MD that a sweep may vary (array leaves).

    Attributes:
      beta: strength of the KL constraint, per nat (the paper's tau).
      mixture_coef: share of the reference in the opponent (the paper's beta).
    """

    learning_rate: Scalar = 1e-4
    beta: Scalar = 0.1
    mixture_coef: Scalar = 0.125


@pytree_dataclass
class State:
    """All that a resume needs."""

    learner: TrainState
    key: PRNGKeyArray


@pytree_dataclass
class Batch:
    """Answers of the policy, and how they fared.

    Attributes:
      ref_logp: the reference's, in nats summed over the answer.
      preference: probability that the answer is preferred to its opponent's.
      mask: answers that count; None for all.
    """

    answers: Sequences
    ref_logp: Float[Array, "B"]
    preference: Float[Array, "B"]
    mask: Bool[Array, "B"] | None = None


def init(params: Params, tx: optax.GradientTransformation, key: PRNGKeyArray, frozen: Params = None) -> State:
    """The state at step 0; `frozen` is the part of the model that does not train."""
    return State(init_train_state(params, tx, frozen), key)


def make_update(
    config: Config, logprob_fn: LogprobFn, tx: optax.GradientTransformation
) -> Callable[[State, Hyper, Batch], tuple[State, Metrics]]:
    """`update(state, hyper, batch) -> (state, metrics)`: one optimizer step."""

    def update(state: State, hyper: Hyper, batch: Batch) -> tuple[State, Metrics]:
        count = batch.ref_logp.shape[0] if batch.mask is None else jnp.sum(batch.mask)

        def loss_fn(params: Params, part: Batch) -> Any:
            logp = masked_sum(logprob_fn(params, part.answers).logp, part.answers.mask, axis=-1)
            return nash_md_loss(
                logp, part.ref_logp, part.preference, beta=hyper.beta, mask=part.mask, denominator=count
            )

        gradients, loss, metrics = accumulate_gradients(
            loss_fn, state.learner, batch, micro_batches=config.micro_batches
        )
        learner, guard = apply_gradients(
            state.learner, gradients, tx, learning_rate=hyper.learning_rate, loss=loss
        )
        return dataclasses.replace(state, learner=learner), {**metrics, **guard}

    return update


def mixture_fns(prefill: PrefillFn, decode: DecodeFn, *, mixture_coef: Scalar) -> tuple[PrefillFn, DecodeFn]:
    """(prefill, decode) of the opponent: the geometric mixture p^(1-m) ref^m, one token at a time.

    Their params are the pair (policy's, reference's), their cache the pair of caches.
    """

    def mixed(policy: Float[Array, "B V"], ref: Float[Array, "B V"]) -> Float[Array, "B V"]:
        return (1 - mixture_coef) * jax.nn.log_softmax(policy) + mixture_coef * jax.nn.log_softmax(ref)

    def prefill_both(params: tuple[Params, Params], *prompt: Any) -> tuple[Array, Any]:
        (policy, policy_cache), (ref, ref_cache) = (prefill(side, *prompt) for side in params)
        return mixed(policy, ref), (policy_cache, ref_cache)

    def decode_both(params: tuple[Params, Params], caches: Any, token: Array, position: Array) -> Any:
        both = zip(params, caches, strict=True)
        (policy, policy_cache), (ref, ref_cache) = (
            decode(side, kept, token, position) for side, kept in both
        )
        return mixed(policy, ref), (policy_cache, ref_cache)

    return prefill_both, decode_both


def win_probability(
    rewards: Float[Array, "B"], opponent_rewards: Float[Array, "B"], *, noise: Scalar
) -> Float[Array, "B"]:
    """Bradley-Terry preference of one answer over another, from rewards."""
    return jax.nn.sigmoid((rewards - opponent_rewards) / jnp.asarray(noise, rewards.dtype))
