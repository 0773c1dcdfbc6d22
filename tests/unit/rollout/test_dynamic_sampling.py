"""Dynamic sampling: draws until enough groups differ, whatever the order in which they come."""

import json
import socket
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.core.types import Rollout, Sequences
from rlhf_jax.rewards.functions import Scored
from rlhf_jax.rollout.dynamic_sampling import Answers, filter_zero_std_groups, term_means

# Three prompts with two answers each, in each of four draws; group 1 of draw 0 is the first that differs.
REWARDS = np.float32(
    [
        [[0, 0], [0, 1], [1, 1]],
        [[1, 1], [0, 0], [0, 0]],
        [[1, 0], [0.5, 0.25], [1, 0]],
        [[1, 0], [1, 0], [1, 0]],
    ]
)


POOL = [types.SimpleNamespace(name=(number, group)) for number in range(4) for group in range(3)]


def draw(number):
    rewards = REWARDS[number].reshape(-1)
    tokens = jnp.arange(6)[:, None] + 10 * number
    rows = Sequences(tokens, tokens, tokens, tokens > 0)
    prompts = [POOL[3 * number + group] for group in range(3) for _ in range(2)]
    rollout = Rollout(rows, jnp.float32(tokens), tokens[:, 0] > 0)
    terms = {"right": rewards, "kind": np.where(rewards > 0.25, rewards, np.nan)}
    return Answers(prompts, rollout, Scored(rewards, rewards == 0.25, terms))


def drawn(most):
    seen = []

    def watched(number):
        seen.append(number)
        return draw(number)

    answers, metrics = filter_zero_std_groups(watched, groups=3, group_size=2, most=most, prompts=POOL)
    return answers, metrics, seen


def test_it_draws_until_enough_groups_differ():
    answers, metrics, seen = drawn(4)
    assert seen == [0, 1, 2]
    # Of (0.5, 0.25) the second has no score, so nothing differs from the first.
    assert [prompt.name for prompt in answers.prompts[::2]] == [(0, 1), (2, 0), (2, 2)]
    assert answers.rewards.tolist() == [0, 1, 1, 0, 1, 0]
    assert answers.rollout.sequences.tokens[:, 0].tolist() == [2, 3, 20, 21, 24, 25]
    assert answers.scored.terms["right"].tolist() == answers.rewards.tolist()
    assert metrics == {
        "draws": 3,
        "drawn_reward": pytest.approx(float(REWARDS[:3][REWARDS[:3] != 0.25].mean())),
        "drawn_frac_reward_zero_std": pytest.approx(6 / 9),
    }


def test_what_no_reward_could_score_stays_marked():
    answers, _ = filter_zero_std_groups(lambda _: draw(2), groups=3, group_size=2, most=1, prompts=POOL)
    assert [prompt.name for prompt in answers.prompts[::2]] == [(2, 0), (2, 2), (2, 1)]
    assert answers.scored.unscorable.tolist() == [False] * 5 + [True]
    assert answers.mean_reward() == pytest.approx((1 + 0 + 1 + 0 + 0.5) / 5)


def test_with_too_few_tries_idle_groups_fill_the_batch():
    answers, metrics, seen = drawn(2)
    assert seen == [0, 1]
    assert [prompt.name for prompt in answers.prompts[::2]] == [(0, 1), (0, 0), (0, 2)]
    assert metrics["draws"] == 2


def test_one_draw_of_groups_that_all_differ_stays_as_it_is():
    answers, metrics = filter_zero_std_groups(lambda _: draw(3), groups=3, group_size=2, most=8, prompts=POOL)
    assert metrics["draws"] == 1
    assert answers.rollout.sequences.tokens[:, 0].tolist() == list(range(30, 36))


PROCESS = """
import json, sys, types, jax
index, port = int(sys.argv[1]), sys.argv[2]
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, index, initialization_timeout=60)
import numpy as np
from rlhf_jax import distributed
from rlhf_jax.core.types import Rollout, Sequences
from rlhf_jax.rewards.functions import Scored
from rlhf_jax.rollout.dynamic_sampling import Answers, filter_zero_std_groups

# Four groups of two answers in each of three draws. The first process has groups 0 and 1 of every draw.
REWARDS = np.float32([[[0, 1], [1, 0], [1, 1], [0, 0]], [[1, 0], [2, 2], [0.5, 0.25], [0, 3]], [[1, 0]] * 4])
PROMPTS = [types.SimpleNamespace(name=number) for number in range(12)]
assert distributed.any_process(index == 1)

def draw(number):
    mine = distributed.local_rows(8)
    rewards = REWARDS[number].reshape(-1)[mine]
    tokens = np.arange(8)[mine][:, None] + 10 * number
    tokens = distributed.shard_batch(tokens)
    rollout = Rollout(Sequences(tokens, tokens, tokens, tokens > 0), tokens * 0.5, tokens[:, 0] > 0)
    prompts = [PROMPTS[4 * number + row // 2] for row in mine]
    return Answers(prompts, rollout, Scored(rewards, rewards == 0.25, {"one": rewards, "two": -rewards}))

with jax.set_mesh(distributed.make_mesh("fsdp=4")):
    answers, metrics = filter_zero_std_groups(draw, groups=4, group_size=2, most=3, prompts=PROMPTS)
    tokens = answers.rollout.sequences.tokens
    assert tokens.sharding.is_equivalent_to(distributed.shard_batch(np.zeros((4, 1))).sharding, 2)
    print(json.dumps({
        "prompts": [prompt.name for prompt in answers.prompts],
        "rewards": answers.rewards.tolist(),
        "unscorable": answers.scored.unscorable.tolist(),
        "two": answers.scored.terms["two"].tolist(),
        "tokens": distributed.local_values(tokens)[:, 0].tolist(),
        **metrics,
    }))
"""


@pytest.mark.slow
def test_two_processes_keep_the_groups_that_one_would():
    """Groups that differ are unequally spread over the processes, and move."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(index), port],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in (0, 1)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    first, second = (json.loads(output.splitlines()[-1]) for output, _ in outputs)  # gloo greets
    numbers = {"draws": 2, "drawn_reward": 12.5 / 15, "drawn_frac_reward_zero_std": 0.5}
    assert {name: first[name] for name in numbers} == pytest.approx(numbers)
    assert {name: second[name] for name in numbers} == pytest.approx(numbers)
    assert (first["prompts"], second["prompts"]) == ([0, 0, 1, 1], [4, 4, 7, 7])
    assert (first["tokens"], second["tokens"]) == ([0, 1, 2, 3], [10, 11, 16, 17])
    assert (first["rewards"], second["rewards"]) == ([0, 1, 1, 0], [1, 0, 0, 3])
    assert (first["two"], second["two"]) == ([0, -1, -1, 0], [-1, 0, 0, -3])
    assert not any(first["unscorable"] + second["unscorable"])


def test_means_of_terms_are_over_the_rows_they_are_meant_for():
    scored = Scored(
        np.float32([2, 1]),
        np.zeros(2, bool),
        {"all": np.float32([1, 0]), "some": np.float32([np.nan, 1]), "none": np.float32([np.nan] * 2)},
    )
    assert term_means(scored) == {"reward/all": 0.5, "reward/some": 1.0}
    assert term_means(Scored(np.float32([2]), np.zeros(1, bool), {"all": np.float32([2])})) == {}
