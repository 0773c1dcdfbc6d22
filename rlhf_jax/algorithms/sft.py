"""Learning by likelihood: cross-entropy on the tokens that count, of responses or of plain text.

Where the log-prob function tells more (`TokenLogprobs.mtp_logp`, `TokenLogprobs.routing`), losses on
further tokens and on the load of experts come with it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.core.masks import masked_sum
from rlhf_jax.core.protocols import LogprobFn
from rlhf_jax.core.train_state import (
    TrainState,
    accumulate_gradients,
    apply_gradients,
    init_train_state,
    sum_over_parts,
)
from rlhf_jax.core.trees import pytree_dataclass, tree_where
from rlhf_jax.core.types import (
    Array,
    Bool,
    Int,
    Metrics,
    Params,
    PRNGKeyArray,
    Routing,
    Scalar,
    Sequences,
    TokenLogprobs,
)
from rlhf_jax.losses.moe import load_balance_loss, load_violation, router_z_loss
from rlhf_jax.losses.reductions import Reduction, token_mean
from rlhf_jax.losses.supervised import cross_entropy_loss, mtp_loss, mtp_masks


@dataclasses.dataclass(frozen=True)
class Config:
    """Static choices.

    Attributes:
      micro_batches: parts in which a batch is computed; changes memory, not the result.
      reduce: how tokens become one number.
      sources: names of where rows come from; each has a loss of its own among the metrics.
    """

    micro_batches: int = 1
    reduce: Reduction = token_mean
    sources: tuple[str, ...] = ()


@pytree_dataclass
class Auxiliary:
    """Weights of what is learned beside the next token, where the score function tells of it.

    Attributes:
      mtp_loss_coef: weight of the loss on further tokens; DeepSeek-V3 began with 0.3 and ended with 0.1.
      router_aux_loss_coef: weight of the load-balance loss.
      router_z_loss_coef: weight of the routers' z-loss.
      router_bias_update_rate: by how much the biases of routers move in a step.
    """

    mtp_loss_coef: Scalar = 0.3
    router_aux_loss_coef: Scalar = 0.01
    router_z_loss_coef: Scalar = 0.001
    router_bias_update_rate: Scalar = 0.001


@pytree_dataclass
class Hyper:
    """Hyperparameters of supervised fine-tuning that a sweep may vary (array leaves).

    Attributes:
      auxiliary: None for the weights by default, and for models without anything to weigh.
    """

    learning_rate: Scalar = 1e-3
    auxiliary: Auxiliary | None = None


@pytree_dataclass
class State:
    """All that a resume needs."""

    learner: TrainState
    key: PRNGKeyArray


def init(params: Params, tx: optax.GradientTransformation, key: PRNGKeyArray, frozen: Params = None) -> State:
    """The state at step 0; `frozen` is the part of the model that does not train."""
    return State(init_train_state(params, tx, frozen), key)


RebalanceFn = Callable[[Params, dict[str, Routing], Scalar], Params]


def make_update(
    config: Config,
    logprob_fn: LogprobFn,
    tx: optax.GradientTransformation,
    rebalance_fn: RebalanceFn | None = None,
) -> Callable[..., tuple[State, Metrics]]:
    """`update(state, hyper, sequences) -> (state, metrics)`: one optimizer step.

    With routing and micro-batches, the load of the whole batch is found by a pass of its own before the
    gradient, so that the balance loss is that of the batch however it is split.

    With `config.sources`, `update(state, hyper, sequences, sources)`, where `sources` [B] numbers each row's;
    the metric `loss/NAME` is the mean over the tokens of that source, NaN in a batch that has none.

    Args:
      rebalance_fn: `rebalance_fn(params, routing, rate) -> params` moves the biases of routers after the
        step, without a loss (`models.rebalance`); left out, as the step is, where the step is not finite.
    """

    def update(
        state: State, hyper: Hyper, batch: Sequences, sources: Int[Array, "B"] | None = None
    ) -> tuple[State, Metrics]:
        params, weights = state.learner.all_params, hyper.auxiliary or Auxiliary()
        routed = jax.eval_shape(logprob_fn, params, batch).routing is not None
        whole = None
        if routed and config.micro_batches > 1:
            whole = sum_over_parts(
                lambda part: logprob_fn(params, part).routing, batch, micro_batches=config.micro_batches
            )

        def loss_fn(
            params: Params, part_and_sources: tuple[Sequences, Int[Array, "B"] | None]
        ) -> tuple[Array, Any]:
            part, of_rows = part_and_sources
            score = logprob_fn(params, part)
            loss, metrics = _token_losses(config, weights, score, part, batch)
            if sources is not None:
                metrics |= _source_losses(config, score, (part, of_rows), (batch, sources))
            if score.routing is None:
                return loss, (metrics, None)
            balance, z = load_balance_loss(score.routing, whole), router_z_loss(score.routing, whole)
            metrics |= jax.lax.stop_gradient({"balance_loss": balance, "router_z_loss": z})
            return loss + weights.router_aux_loss_coef * balance + weights.router_z_loss_coef * z, (
                metrics,
                score.routing,
            )

        gradients, loss, (metrics, routing) = accumulate_gradients(
            loss_fn, state.learner, (batch, sources), micro_batches=config.micro_batches
        )
        learner, guard = apply_gradients(
            state.learner, gradients, tx, learning_rate=hyper.learning_rate, loss=loss
        )
        if routed:
            metrics["load_violation"] = load_violation(routing)
            if rebalance_fn is not None:
                moved = rebalance_fn(learner.params, routing, weights.router_bias_update_rate)
                applied = learner.steps > state.learner.steps
                learner = dataclasses.replace(learner, params=tree_where(applied, moved, learner.params))
        return dataclasses.replace(state, learner=learner), {**metrics, **guard, "tokens": batch.mask.sum()}

    return update


def _source_losses(
    config: Config, score: TokenLogprobs, part: tuple[Sequences, Any], batch: tuple[Sequences, Any]
) -> Metrics:
    """The part's share of the loss of each source, rows and the numbers of their sources given."""

    def mask_of(number: int, rows: Sequences, sources: Int[Array, "B"]) -> Bool[Array, "B T"]:
        return rows.mask & (sources == number)[:, None]

    losses = {
        f"loss/{name}": -masked_sum(score.logp, mask_of(number, *part)) / jnp.sum(mask_of(number, *batch))
        for number, name in enumerate(config.sources)
    }
    return jax.lax.stop_gradient(losses)


def _token_losses(
    config: Config, weights: Auxiliary, score: TokenLogprobs, part: Sequences, batch: Sequences
) -> tuple[Array, Metrics]:
    """The loss on next tokens, and on further ones where they were foreseen, of a part of a batch."""
    total = config.reduce.total(batch.mask)
    loss, metrics = cross_entropy_loss(score.logp, part.mask, reduce=config.reduce, denominator=total)
    if score.mtp_logp is None:
        return loss, metrics
    depth = score.mtp_logp.shape[0]
    masks, all_masks = (mtp_masks(rows.mask, rows.segment_ids, depth) for rows in (part, batch))
    further, more = mtp_loss(
        score.mtp_logp, masks, reduce=config.reduce, denominators=[*map(config.reduce.total, all_masks)]
    )
    return loss + weights.mtp_loss_coef * further, {**metrics, **more}
