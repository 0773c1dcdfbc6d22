"""Group-relative policy optimization (GRPO) and its family: the baseline is the other answers to the prompt.

The variants (`algorithms.grpo_variants`) differ in small functions (advantage scale, ratio, surrogate, KL,
reduction), all of them fields of `Config`; Shao et al. 2024 (GRPO) are the defaults. The batch is made in
`algorithms.grpo_batch`, its loss is in `algorithms.grpo_loss`.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.algorithms.grpo_batch import compute_advantages as compute_advantages, make_batch as make_batch
from rlhf_jax.algorithms.grpo_config import (
    Batch as Batch,
    Config as Config,
    Hyper as Hyper,
    Replay as Replay,
    State as State,
)
from rlhf_jax.algorithms.grpo_control import init_control
from rlhf_jax.algorithms.grpo_loss import batch_loss as batch_loss, per_token
from rlhf_jax.algorithms.moving_reference import init_reference
from rlhf_jax.core.minibatches import scan_minibatches
from rlhf_jax.core.protocols import LogprobFn
from rlhf_jax.core.train_state import TrainState, accumulate_gradients, apply_gradients, init_train_state
from rlhf_jax.core.types import Metrics, Params, PRNGKeyArray, Sequences, TokenLogprobs


def init(
    params: Params,
    tx: optax.GradientTransformation,
    key: PRNGKeyArray,
    frozen: Params = None,
    *,
    one_step_off_policy: bool = False,
    moving_reference: bool = False,
    hyper: Hyper | None = None,
    replay: Replay | None = None,
) -> State:
    """The state at step 0.

    Args:
      frozen: the part of the model that does not train.
      one_step_off_policy: answers are those of the policy one update before, as by a sampler beside the
        trainer (asynchronous rollouts); give the configuration a `correction` to make up for it.
      moving_reference: the reference follows the policy, as `Hyper.sync` says.
      hyper: needed where it has a `target_entropy` or a `kl_target`.
      replay: an empty buffer (`replay.init_replay`), where groups are replayed.
    """
    stale = jax.tree.map(jnp.copy, params) if one_step_off_policy else None
    reference = init_reference(params) if moving_reference else None
    control = None if hyper is None else init_control(hyper)
    return State(init_train_state(params, tx, frozen), key, stale, reference, control, replay)


def make_update(
    config: Config, logprob_fn: LogprobFn, tx: optax.GradientTransformation
) -> Callable[[State, Hyper, Batch], tuple[State, Metrics]]:
    """`update(state, hyper, batch) -> (state, metrics)`: all epochs over one batch."""

    def update(state: State, hyper: Hyper, batch: Batch) -> tuple[State, Metrics]:
        key, shuffle_key = jax.random.split(state.key)

        def step(learner: TrainState, part: Batch):
            mask = part.sequences.mask
            denominator = config.reduce.total(mask)

            def loss_fn(params: Params, rows: Batch):
                return batch_loss(config, hyper, logprob_fn(params, rows.sequences), rows, denominator)

            gradients, loss, metrics = accumulate_gradients(
                loss_fn, learner, part, micro_batches=config.micro_batches
            )
            metrics = per_token(config, metrics, mask, denominator)
            learner, guard = apply_gradients(
                learner, gradients, tx, learning_rate=hyper.learning_rate, loss=loss
            )
            return learner, {**metrics, **guard}, jnp.bool_(False)

        learner, metrics = scan_minibatches(
            step,
            state.learner,
            batch,
            shuffle_key,
            epochs=config.num_iterations,
            minibatches=config.num_minibatches,
        )
        stale = None if state.stale_params is None else state.learner.params
        return dataclasses.replace(state, learner=learner, key=key, stale_params=stale), metrics

    return update


BatchFn = Callable[[State, TokenLogprobs], tuple[State, Hyper, Batch, Metrics]]
"""(state, old log-probs of all answers, constants) -> (state, hyper, batch, metrics)."""


def make_one_pass_update(
    config: Config, logprob_fn: LogprobFn, tx: optax.GradientTransformation
) -> Callable[[State, Sequences, BatchFn], tuple[State, Hyper, Metrics]]:
    """`update(state, answers, batch_fn) -> (state, hyper, metrics)` for a `config.one_pass`.

    It is that of `make_update` on the batch that `batch_fn` makes of the log-probs in the loss, which spares
    a forward pass for the old ones.
    """

    def update(state: State, answers: Sequences, batch_fn: BatchFn) -> tuple[State, Hyper, Metrics]:
        def loss_fn(params: Params, rows: Sequences):
            score = logprob_fn(params, rows)
            held, hyper, batch, described = batch_fn(state, jax.lax.stop_gradient(score))
            denominator = config.reduce.total(batch.sequences.mask)
            loss, metrics = batch_loss(config, hyper, score, batch, denominator)
            metrics = per_token(config, metrics, batch.sequences.mask, denominator)
            return loss, (held.control, held.key, hyper, {**described, **metrics})

        gradients, loss, (control, key, hyper, metrics) = accumulate_gradients(
            loss_fn, state.learner, answers
        )
        learner, guard = apply_gradients(
            state.learner, gradients, tx, learning_rate=hyper.learning_rate, loss=loss
        )
        state = dataclasses.replace(
            state,
            learner=learner,
            control=control,
            key=jax.random.split(key)[0],
            stale_params=None if state.stale_params is None else state.learner.params,
        )
        return state, hyper, {**metrics, **guard, "epochs_done": jnp.ones(())}

    return update
