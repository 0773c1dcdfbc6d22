"""PPO at step 0: policy, value and a reward model on what they share, and the training step over them."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from rlhf_jax import models
from rlhf_jax.algorithms import ppo, selection
from rlhf_jax.core.train_state import TrainState
from rlhf_jax.core.trees import merge, partition
from rlhf_jax.core.types import Metrics, Params, Sequences, TokenLogprobs
from rlhf_jax.models import Policy, adapters
from rlhf_jax.rollout.step import make_ppo_train_step
from rlhf_jax.stages import adapting, starting
from rlhf_jax.stages.session import Session
from rlhf_jax.training.run_folder import load_reward_model, load_unmerged_reward_model

if TYPE_CHECKING:
    from rlhf_jax.stages.ppo import Options

FILTERS = {
    "none": None,
    "best": selection.best_of_n_weights,
    "best_random": selection.best_random_weights,
    "best_worst": selection.best_worst_weights,
}


def reward_on_base(options: "Options", policy: Policy, split: adapting.TrainableSplit) -> Params | None:
    """Reward model's own leaves, where it is an adapter beside the same base; else None."""
    if len(options.reward_model) != 1 or split.adaptation is None:
        return None
    (folder,) = options.reward_model
    model, theirs = load_unmerged_reward_model(Path(folder), shapes_only=bool(options.run.plan))
    models.check_same_architecture(policy.architecture, model.architecture, folder)
    ours = split.adaptation
    if theirs is None or theirs.base is None or ours.base is None:
        return None
    if theirs.base.digest != ours.base.digest or theirs.quantization != ours.quantization:
        return None
    if isinstance(theirs.adapter, adapters.Partial) or isinstance(ours.adapter, adapters.Partial):
        return None
    own = partition(model.params["decoder"], lambda name, leaf: adapters.is_adapter_leaf(name))[0]
    return {"decoder": own, "head": model.params["head"]}


def value_start(
    options: "Options", policy: Policy, split: adapting.TrainableSplit, reward: Params | None
) -> Params | None:
    """Initial value model: the reward model where both are whole or on one base; None for the
    policy.
    """
    if options.value == "shared" or reward is not None or split.adaptation is not None:
        return reward
    if not options.reward_model:
        return None
    folder = options.reward_model[0]
    reward_model = load_reward_model(Path(folder), shapes_only=bool(options.run.plan))
    models.check_same_architecture(policy.architecture, reward_model.architecture, folder)
    return reward_model.params


def initial_params(
    options: "Options",
    policy: Policy,
    split: adapting.TrainableSplit,
    reward: Params | None,
    start: Params | None,
    key: jax.Array,
) -> tuple[Params, Params]:
    """(trained, frozen) of policy and value, and of a reward model on the same base.

    Args:
      start: of `value_start`.
    """
    adapter_key, head_key = jax.random.split(key)
    if options.value == "shared":
        value = {"head": policy.init_scalar_head(head_key)}
    elif start is not None:
        value = starting.copied(start)
    else:
        head = policy.init_scalar_head(head_key)
        value = {"decoder": split.fresh_unshared_params(adapter_key), "head": head}
    params = {"policy": split.unshared_params, "value": value}
    if split.adaptation is None:
        return params, None
    rest = {} if reward is None else {"reward": reward}
    trained, held = partition(params, split.trains)
    return trained, merge(held, {"base": split.base, **rest})


def make_hyper(options: "Options") -> ppo.Hyper:
    """The numbers of `options` that a sweep could vary."""
    return ppo.Hyper(
        learning_rate=jnp.float32(options.learning_rate),
        epsilon_low=options.epsilon,
        epsilon_high=options.epsilon,
        penalty_coef=options.penalty_coef,
        cliprange_value=options.cliprange_value,
        value_coef=options.value_coef,
        entropy_coef=options.entropy_coef,
        gamma=options.gamma,
        gae_lambda=options.gae_lambda,
        kl_coef=options.kl_coef,
        kl_target=options.kl_target,
        kl_horizon=options.kl_horizon,
        missing_eos_penalty=options.missing_eos_penalty,
        target_kl=options.target_kl,
        critic_gae_lambda=options.critic_gae_lambda,
        gae_alpha=options.gae_alpha,
        ptx_coef=options.ptx.ptx_coef,
        positive_lm_coef=options.positive_lm_coef or None,
        positive_threshold=options.positive_threshold,
        sync=options.sync.hyper(),
    )


def make_config(options: "Options") -> ppo.Config:
    """The static choices of `options`."""
    return ppo.Config(
        num_ppo_epochs=options.num_ppo_epochs,
        num_minibatches=options.num_minibatches,
        micro_batches=options.micro_batches,
        whiten_advantages=options.whiten_advantages,
        adaptive_kl=options.adaptive_kl,
        scale_rewards=options.scale_rewards,
        group_size=options.group_size,
        filter_fn=FILTERS[options.policy_filter],
        policy_loss_fn=ppo.penalized if options.policy_loss == "penalty" else ppo.clipped,
    )


@dataclasses.dataclass(frozen=True)
class Start:
    """PPO at step 0.

    Attributes:
      state: with the value model, and with a reward model on the same base.
      learn: (state, original, rollout, rewards, ...) -> (state, metrics); to be compiled.
      split: of the policy.
      reward: what a reward model has of its own beside the base; None where it does not stand on it.
    """

    state: ppo.State
    learn: Callable[..., tuple[ppo.State, Metrics]]
    split: adapting.TrainableSplit
    reward: Params | None


def make_start(session: Session) -> Start:
    """Policy, value and reward on their base, and the training step; of a plan, in shapes."""
    options, model, split = session.options, session.policy, session.split_trainable(session.options.updates)
    reward = reward_on_base(options, model, split)
    value_key, state_key = jax.random.split(jax.random.key(session.run.seed))

    def init_params(
        policy: Policy, split: adapting.TrainableSplit, reward: Params | None, start: Params | None
    ) -> tuple[Params, Params]:
        return initial_params(options, policy, split, reward, start, value_key)

    make_params = init_params
    if session.run.plan:
        make_params = functools.partial(adapting.shapes_from_split, init_params)
    params, frozen = make_params(model, split, reward, value_start(options, model, split, reward))
    hyper, moving = make_hyper(options), options.sync.ref_model_sync_steps > 0
    state = session.init_state(
        lambda *x: ppo.init(x[0], split.tx, x[1], hyper, moving_reference=moving), params, frozen, state_key
    )
    train_step = make_train_step(options, model, split)
    return Start(state, lambda state, *data: train_step(state, hyper, *data), split, reward)


def make_train_step(options: "Options", model: Policy, split: adapting.TrainableSplit) -> Callable[..., Any]:
    """The training step with policy, value and reference on what they share."""
    make_logprob_fn = (
        model.make_shared_trunk_actor_critic_fn if options.value == "shared" else model.make_actor_critic_fn
    )
    plain_logprob_fn = model.make_logprob_fn()

    def reference(learner: TrainState, original: Params) -> Params:
        return models.reference_params(learner.all_params, original)

    def text_logprobs(params: Params, rows: Sequences) -> TokenLogprobs:
        return plain_logprob_fn(models.merge_with_base(params, "policy"), rows)

    return make_ppo_train_step(
        make_config(options),
        make_logprob_fn(temperature=options.temperature),
        model.make_logprob_fn(temperature=options.temperature),
        split.tx,
        reference,
        text_logprobs,
        describes_rows=True,
    )
