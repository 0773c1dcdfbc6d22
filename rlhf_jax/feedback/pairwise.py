"""Pairwise preferences between two answers: by their rewards, or by a judge who sees both."""

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from rlhf_jax.algorithms.nash_md import win_probability
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import Rollout
from rlhf_jax.data.examples import PromptExample
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.evaluation.win_rate import both_orders, order_bias
from rlhf_jax.rewards.functions import RewardFn, Scored, load_reward, score_rows
from rlhf_jax.rollout.dynamic_sampling import Answers
from rlhf_jax.rollout.rewards import RolloutReward, reward_fields
from rlhf_jax.rollout.sampler import completion_texts


@dataclasses.dataclass(frozen=True)
class PairwiseResult:
    """Two answers to each prompt.

    Attributes:
      preference: [N] float32, probability that the first is preferred; 1/2 is a tie, and what could not be
        judged.
      scored: [N] bool, pairs of which both sides could be judged.
      metrics: what is known of the answers.
      position_bias: [N] a judge's advantage for what it sees first, from -1 to 1: what the probabilities that
        it gives in the two orders sum to, minus 1; zeros where nobody was asked twice.
      first: what the first answers are worth; None where a judge compares.
    """

    preference: np.ndarray
    scored: np.ndarray
    metrics: dict[str, float]
    position_bias: np.ndarray
    first: Scored | None = None


CompareFn = Callable[[Sequence[PromptExample], Rollout, Rollout], PairwiseResult]


def compare_by_rewards(reward_fn: RolloutReward, *, noise: float) -> CompareFn:
    """Bradley-Terry preferences, sigmoid(difference of rewards / noise)."""

    def compare(prompts: Sequence[PromptExample], first: Rollout, second: Rollout) -> PairwiseResult:
        sides = [Answers(prompts, side, reward_fn.score(side, prompts)) for side in (first, second)]
        ours, theirs = (jnp.asarray(side.rewards) for side in sides)
        scored = ~np.any([side.scored.unscorable for side in sides], axis=0)
        metrics = {
            "reward": sides[0].mean_reward(),
            "opponent_reward": sides[1].mean_reward(),
            "unscorable": int(sum(side.scored.unscorable.sum() for side in sides)),
        }
        preference = np.where(scored, win_probability(ours, theirs, noise=noise), 0.5).astype(np.float32)
        return PairwiseResult(preference, scored, metrics, np.zeros_like(preference), sides[0].scored)

    return compare


def compare_by_judge(judge: str | RewardFn, tokenizer: Tokenizer) -> CompareFn:
    """Asks a judge function, in both orders, so that which answer comes first does not matter.

    Args:
      judge: a reward function, or `module:function` of one, that also takes `opponents`, the other answers,
        and returns for each completion the probability that it is preferred to its opponent; None where it
        cannot tell.

    Raises:
      UserError: there is no such function; when called, it returns something else.
    """
    judge_fn, name = (load_reward(judge), judge) if isinstance(judge, str) else (judge, "of the model")

    def ask(
        prompts: Sequence[PromptExample], rollout: Rollout, others: Rollout
    ) -> tuple[np.ndarray, np.ndarray]:
        fields = reward_fields(rollout, prompts) | {"opponents": completion_texts(tokenizer, others)}
        texts, where = [prompt.text for prompt in prompts], [prompt.where for prompt in prompts]
        scored = score_rows(judge_fn, texts, completion_texts(tokenizer, rollout), fields, where=where)
        said = np.where(scored.unscorable, 0.5, scored.rewards)
        if said.min() < 0 or said.max() > 1:
            row = int(np.argmax(np.abs(said - 0.5)))
            raise UserError(
                f"judge {name} returned {said[row]:g} for row {row} ({where[row]}): expected a probability, "
                "from 0 to 1: that the completion is preferred to its opponent"
            )
        return said, ~scored.unscorable

    def compare(prompts: Sequence[PromptExample], first: Rollout, second: Rollout) -> PairwiseResult:
        (forth, judged), (back, judged_back) = ask(prompts, first, second), ask(prompts, second, first)
        scored = judged & judged_back
        preference = np.where(scored, both_orders(forth, back), 0.5).astype(np.float32)
        gap = np.where(scored, forth + back - 1, 0).astype(np.float32)
        bias = order_bias(forth[scored], back[scored]) if scored.any() else 0.0
        metrics = {
            "order_bias": bias,
            "unscorable": int(np.sum(~scored)),
            "unscorable_share": float(np.mean(~scored)),
        }
        return PairwiseResult(preference, scored, metrics, gap)

    return compare
