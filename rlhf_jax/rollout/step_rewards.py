"""Process rewards of rollouts: what a process reward model says of every step of an answer."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlhf_jax.core.axes import constrain
from rlhf_jax.core.types import Params, Rollout, Scalar, Sequences, StepRewards
from rlhf_jax.data.process_rewards import step_tokens
from rlhf_jax.kernels.steps import step_ends
from rlhf_jax.models import ScalarModel


def make_step_reward_fn(model: ScalarModel, *, coef: Scalar = 1.0) -> Callable[[Rollout], StepRewards]:
    """`step_rewards(rollout) -> StepRewards`: the probability that each step is right, times `coef`.

    Args:
      model: a process reward model, whose tokenizer is the policy's.
    """
    score = model.body.make_process_reward_fn()
    closing, blank = map(jnp.asarray, step_tokens(model.tokenizer))

    @jax.jit
    def judge(params: Params, sequences: Sequences) -> StepRewards:
        ends = step_ends(sequences.tokens, sequences.mask, closing, blank)
        rewards = coef * jax.nn.sigmoid(score(params, sequences))
        return jax.tree.map(lambda x: constrain(x, "batch", None), StepRewards(rewards, ends))

    return lambda rollout: judge(model.params, rollout.sequences)
