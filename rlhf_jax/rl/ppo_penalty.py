"""PPO with an adaptive KL penalty instead of the clip (Schulman et al. 2017, section 4), on control.

Configs, rollouts and batches are those of `rl.ppo`; the coefficient lives in `State.kl_coef`, starts at
`Hyper.kl_coef` and holds KL(pi_old || pi) near `Hyper.kl_target`, in nats per action.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.algorithms import ppo as shared
from rlhf_jax.core.masks import masked_mean
from rlhf_jax.core.minibatches import scan_minibatches
from rlhf_jax.core.optimization import Learner, accumulate_gradients, apply_gradients
from rlhf_jax.core.types import Array, Float, Metrics, Params, Scalar, Score, ScoreFn
from rlhf_jax.kernels.kl import k3
from rlhf_jax.losses.policy import ppo_penalty_loss
from rlhf_jax.losses.value import clipped_value_loss
from rlhf_jax.rl import ppo
from rlhf_jax.rl.environments import Environment
from rlhf_jax.rl.ppo import Batch, Config, Hyper, State, init
from rlhf_jax.rl.runs import Run, Train, whole

__all__ = [
    "Batch",
    "Config",
    "Hyper",
    "State",
    "default_hyper",
    "init",
    "make_run",
    "make_train",
    "make_update",
    "next_penalty",
]


PENALTY_RANGE = (1e-4, 1e4)


def default_hyper(**changes: Any) -> Hyper:
    """The numbers usual on CartPole, as float32 scalars, with `changes`."""
    return ppo.default_hyper(**{"kl_coef": 1.0, "kl_target": 0.01, **changes})


def next_penalty(coef: Scalar, kl: Scalar, *, target: Scalar) -> Float[Array, ""]:
    """The rule of Schulman et al. 2017, section 4: double beyond 1.5 target, halve below target / 1.5.

    A KL that is not finite leaves the coefficient as it was. It stays within 1e-4 and 1e4, from where it
    finds back soon: a policy that has stopped moving would halve it to nothing.
    """
    factor = jnp.where(kl > 1.5 * target, 2.0, jnp.where(kl < target / 1.5, 0.5, 1.0))
    return jnp.clip(jnp.asarray(coef) * jnp.where(jnp.isfinite(kl), factor, 1.0), *PENALTY_RANGE)


def make_update(
    config: shared.Config, score_fn: ScoreFn, tx: optax.GradientTransformation
) -> Callable[[State, Hyper, Batch], tuple[State, Metrics]]:
    """`update(state, hyper, batch) -> (state, metrics)`: all epochs over one batch, then the coefficient."""

    def update(state: State, hyper: Hyper, batch: Batch) -> tuple[State, Metrics]:
        key, shuffle_key = jax.random.split(state.key)

        def step(learner: Learner, part: Batch):
            denominator = config.reduce.total(part.mask)

            def loss_fn(params: Params, rows: Batch):
                score = score_fn(params, rows.inputs)
                return _loss(config, hyper, state.kl_coef, score, rows, denominator)

            gradients, loss, metrics = accumulate_gradients(
                loss_fn, learner, part, micro_batches=config.micro_batches
            )
            learner, guard = apply_gradients(
                learner, gradients, tx, learning_rate=hyper.learning_rate, loss=loss
            )
            return learner, {**metrics, **guard}, metrics["approx_kl"] > hyper.max_kl

        learner, metrics = scan_minibatches(
            step, state.learner, batch, shuffle_key, epochs=config.epochs, minibatches=config.minibatches
        )
        # The whole batch under the new policy: what the mini-batches saw was still moving.
        after = score_fn(learner.all_params, batch.inputs).logp
        kl = masked_mean(k3(batch.old_logp, after), batch.mask)
        kl_coef = next_penalty(state.kl_coef, kl, target=hyper.kl_target)
        metrics = {**metrics, "kl": kl, "kl_coef": state.kl_coef}
        return dataclasses.replace(state, learner=learner, key=key, kl_coef=kl_coef), metrics

    return update


def _loss(
    config: shared.Config, hyper: Hyper, kl_coef: Scalar, score: Score, rows: Batch, denominator: Scalar
) -> tuple[Float[Array, ""], Metrics]:
    """Penalised policy loss + value loss - entropy bonus (Schulman et al. 2017, eq. 8 in eq. 9)."""
    reduction = {"reduce": config.reduce, "denominator": denominator}
    policy_loss, policy_metrics = ppo_penalty_loss(
        score.logp, rows.old_logp, rows.advantages, rows.mask, kl_coef=kl_coef, **reduction
    )
    value_loss, value_metrics = clipped_value_loss(
        score.value, rows.old_values, rows.returns, rows.mask, clip=hyper.value_clip, **reduction
    )
    entropy = config.reduce(score.entropy, rows.mask, denominator=denominator)
    loss = policy_loss + hyper.value_coef * value_loss - hyper.entropy_coef * entropy
    return loss, {"loss": loss, "entropy": entropy, **policy_metrics, **value_metrics}


def make_run(config: Config, env: Environment, env_params: Any) -> Run:
    """A run as `init` and `step`."""
    return ppo.make_run(config, env, env_params, make_update=make_update)


def make_train(config: Config, env: Environment, env_params: Any) -> Train:
    """`train(key, hyper) -> (state, history)`: a whole run, pure; jit it, vmap it over keys and `Hyper`."""
    return whole(make_run(config, env, env_params))
