"""Settings with which a variant would learn nothing from any rewards: each is refused, and no other is."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algorithms import grpo, grpo_variants
from rlhf_jax.core.errors import UserError

LENGTHS = (3, 1, 2, 4, 2, 3)
LONE = ("reinforce", "reinforce_without_baseline", "reinforce++", "remax", "a_star_po")
PRUNING = ("gfpo", "cppo", "grpo", "rloo")
SIZES = (1, 3)


def settings():
    """(name, group size, changes), of all variants."""
    for name, size in itertools.product(grpo_variants.grpo_variants(), SIZES):
        kept = [{"num_kept": kept} for kept in range(size + 1)] if name in PRUNING else [{}]
        yield from (
            (name, size, change)
            for change in ([{"k": k} for k in range(1, size + 1)] if name == "pass_at_k" else kept)
        )


def is_idle(name, size, change):
    """By what the papers compare: other answers of a group, those that are kept, other sets of k."""
    compares = name not in LONE
    return (compares and size == 1) or change.get("k") == size or (name == "gfpo" and change["num_kept"] == 1)


def largest_advantage(variant, prompts):
    """Of answers of which one alone is right."""
    rows = prompts * variant.config.group_size
    mask = jnp.asarray(np.arange(5) < np.asarray(LENGTHS[:rows])[:, None])
    rewards = np.resize(np.float32([1.0, 0.0, -0.5]), rows)
    advantages, _ = grpo.compute_advantages(
        variant.config,
        jnp.asarray(rewards),
        mask,
        greedy_rewards=jnp.full(prompts, 0.3),
        terms=jnp.asarray(np.stack([rewards, rewards**2], axis=1)),
        term_weights=jnp.ones(2),
        values=jnp.full(prompts, 0.3),
        old_logp=jnp.full(mask.shape, -1.0),
        collision=jnp.full(mask.shape, 0.5),
    )
    return np.abs(advantages).max()


@pytest.mark.slow
def test_each_variant_learns_with_every_setting_that_it_takes():
    taken = 0
    for name, size, change in settings():
        options = {"group_size": size, "max_completion_length": 5, "changes": change}
        if is_idle(name, size, change):
            with pytest.raises(UserError, match="compare"):
                grpo_variants.make_variant(name, **options)
            continue
        variant = grpo_variants.make_variant(name, **options)
        alone = size == 1 and name in ("reinforce", "reinforce++")
        assert largest_advantage(variant, 2 if alone else 1) > 1e-3, (name, size, change)
        taken += 1
    assert taken > len(grpo_variants.grpo_variants())


@pytest.mark.parametrize("name", ["reinforce", "reinforce++"])
def test_a_batch_of_one_answer_has_no_baseline(name):
    variant = grpo_variants.make_variant(name, group_size=1)
    with pytest.raises(UserError, match="a batch of one answer"):
        largest_advantage(variant, 1)


def test_answers_are_not_pruned_by_advantages_of_tokens():
    for name in ("reinforce++", "otb"):
        with pytest.raises(UserError, match="num_kept: answers are pruned by one advantage each"):
            grpo_variants.make_variant(name, group_size=3, changes={"num_kept": 2})
