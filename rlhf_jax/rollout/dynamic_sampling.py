"""Answers of a step with what they are worth, and dynamic sampling: drawing until enough groups differ."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import distributed
from rlhf_jax.algorithms.selection import groups_that_differ
from rlhf_jax.core.axes import constrain
from rlhf_jax.core.types import Array, Bool, Float, Int, Rollout
from rlhf_jax.data.examples import PromptExample
from rlhf_jax.kernels.advantages import reward_spread
from rlhf_jax.rewards.functions import Scored

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Answers:
    """Sampled answers; those to one prompt stand together.

    Attributes:
      prompts: one a row.
      rollout: the answers.
      scored: what they are worth, and which could not be scored.
    """

    prompts: Sequence[PromptExample]
    rollout: Rollout
    scored: Scored

    @property
    def rewards(self) -> np.ndarray:
        """[B] float32."""
        return self.scored.rewards

    def mean_reward(self) -> float:
        """Over the answers that could be scored; 0 where there are none."""
        counted = self.rewards[~self.scored.unscorable]
        return float(np.mean(counted)) if counted.size else 0.0


def without_failed(scored: Scored, failed: np.ndarray) -> Scored:
    """Rewards in which rows without an answer, [B] bool, are unscorable."""
    return dataclasses.replace(scored, unscorable=scored.unscorable | failed)


def term_means(scored: Scored) -> dict[str, float]:
    """`reward/NAME`: the mean of each term, without its weight, over all scored rows that it is meant for.

    Empty where there is one term only, which is the reward.
    """
    if len(scored.terms) < 2:
        return {}
    found = {
        name: distributed.all_rows(np.where(scored.unscorable, np.nan, values))
        for name, values in scored.terms.items()
    }
    return {
        f"reward/{name}": float(np.nanmean(values))
        for name, values in found.items()
        if not np.isnan(values).all()
    }


def filter_zero_std_groups(
    draw: Callable[[int], Answers],
    *,
    groups: int,
    group_size: int,
    most: int,
    prompts: Sequence[PromptExample],
) -> tuple[Answers, dict[str, float]]:
    """Dynamic sampling (DAPO, Yu et al. 2025): draws until `groups` prompts have answers of unequal reward.

    What is drawn is a function of the number of the draw, and how many draws there are of their rewards: a
    step that is taken again draws the same. Several processes look at the groups of all of them: they draw as
    often, and keep the same groups, as one process would, and an answer may move from one to another.

    Args:
      draw: number -> `groups` prompts with `group_size` answers each, counted from 0; of several processes,
        each has its own rows.
      most: draws at most; what is missing then is filled with groups whose rewards are equal.
      prompts: all that there are, the same in every process.

    Returns:
      (answers to `groups` prompts, metrics): `draws`, and of all that was drawn `drawn_reward`, the mean,
      and `drawn_frac_reward_zero_std`, the share of groups that teach nothing.
    """
    numbers = {id(prompt): number for number, prompt in enumerate(prompts)}
    whole = _of_all_processes(draw(0), prompts, numbers)
    draws = 1
    while jnp.sum(reward_spread(*_grouped(whole, group_size)) > 0) < groups and draws < most:
        whole = concatenate([whole, _of_all_processes(draw(draws), prompts, numbers)])
        draws += 1
    chosen = np.asarray(groups_that_differ(*_grouped(whole, group_size), keep=groups)[0])
    rows = (chosen[:, None] * group_size + np.arange(group_size)).reshape(-1)
    metrics = {
        "draws": draws,
        "drawn_reward": whole.mean_reward(),
        "drawn_frac_reward_zero_std": float(np.mean(reward_spread(*_grouped(whole, group_size)) == 0)),
    }
    rollout, own = _take_answers(whole.rollout, rows), rows[distributed.local_rows(len(rows))]
    return Answers([whole.prompts[row] for row in own], rollout, take(whole.scored, own)), metrics


def _of_all_processes(
    answers: Answers, prompts: Sequence[PromptExample], numbers: Mapping[int, int]
) -> Answers:
    """Answers with the prompts and rewards of all rows: a rollout holds all of them already.

    Args:
      numbers: of prompts, by their identity.
    """
    asked = distributed.all_rows(np.array([numbers[id(prompt)] for prompt in answers.prompts], np.int32))
    scored = answers.scored
    terms = {name: distributed.all_rows(values) for name, values in scored.terms.items()}
    rewards, unscorable = map(distributed.all_rows, (scored.rewards, scored.unscorable))
    return Answers([prompts[number] for number in asked], answers.rollout, Scored(rewards, unscorable, terms))


def _grouped(answers: Answers, group_size: int) -> tuple[Float[Array, "N G"], Bool[Array, "N G"]]:
    """Rewards, and which answers have one."""
    shape = (-1, group_size)
    scored = ~answers.scored.unscorable
    return jnp.asarray(answers.rewards.reshape(shape)), jnp.asarray(scored.reshape(shape))


def concatenate(parts: Sequence[Answers]) -> Answers:
    """Answers of several draws, one after the other."""
    rollout = _join([part.rollout for part in parts])
    rewards, unscorable = (
        np.concatenate([getattr(part.scored, name) for part in parts]) for name in ("rewards", "unscorable")
    )
    terms = {
        name: np.concatenate([part.scored.terms[name] for part in parts]) for name in parts[0].scored.terms
    }
    prompts = [prompt for part in parts for prompt in part.prompts]
    return Answers(prompts, rollout, Scored(rewards, unscorable, terms))


@jax.jit
def _join(parts: Sequence[Rollout]) -> Rollout:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def take(scored: Scored, rows: np.ndarray) -> Scored:
    """Some of them."""
    terms = {name: values[rows] for name, values in scored.terms.items()}
    return Scored(scored.rewards[rows], scored.unscorable[rows], terms)


def take_rows(batch: T, rows: Int[Array, " B"]) -> T:
    """Rows of a batch by their numbers, split over the mesh as a batch is."""
    return jax.tree.map(lambda x: constrain(x[rows], "batch", *(None,) * (x.ndim - 1)), batch)


_take_answers = jax.jit(take_rows)
