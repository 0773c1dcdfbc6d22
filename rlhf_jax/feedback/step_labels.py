"""Labels of steps that nobody judged: a step is good where the right answer can still be reached from it."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import Rollout
from rlhf_jax.data.chat import encode_prompt
from rlhf_jax.data.examples import PromptExample
from rlhf_jax.data.process_rewards import STEP_END
from rlhf_jax.data.sources import Row
from rlhf_jax.metrics.progress import Progress
from rlhf_jax.models import Policy
from rlhf_jax.rollout.sampler import make_generate_fn


def label_by_rollouts(
    rows: Sequence[Row],
    policy: Policy,
    reward_fn: Callable[[Rollout, Sequence[PromptExample]], np.ndarray],
    *,
    rollouts: int,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    quiet: bool = False,
) -> list[Row]:
    """Labels steps by what follows from them (Math-Shepherd, Wang et al. 2024: hard estimation).

        label(step) = 1[some of `rollouts` continuations by the policy comes out right]

    The last step, which ends the solution, leaves nothing to continue and is not judged. With few rollouts,
    good steps are missed; with many, a policy that mends mistakes makes bad ones good.

    Args:
      rows: with `prompt`, `completions` (the steps) and what `reward_fn` needs, such as `answer`.
      reward_fn: of continuations, as `rollouts.make_reward_fn` makes it; right is above 0.5.
      batch_size: steps that are continued at a time.

    Returns:
      The rows with `labels`: true, false, and null for the last step.

    Raises:
      UserError: a row has no step to continue.
    """
    steps = [step for row in rows for step in _unfinished(row, policy)]
    generate = make_generate_fn(
        policy,
        prompt_length=max(len(step.ids) for step in steps),
        max_new_tokens=max_new_tokens,
        group_size=rollouts,
    )
    starts, labels = range(0, len(steps), batch_size), []
    with Progress("label", len(starts), quiet=quiet) as progress:
        for number, start in enumerate(starts):
            part = steps[start : start + batch_size]
            full = part + part[-1:] * (batch_size - len(part))  # one shape, one program
            prompts = [step for step in full for _ in range(rollouts)]
            rollout = generate(policy.params, prompts, jax.random.fold_in(jax.random.key(seed), number))
            rewards = np.asarray(reward_fn(rollout, prompts)).reshape(-1, rollouts)
            labels += np.any(rewards > 0.5, axis=1)[: len(part)].tolist()
            progress.update(number + 1)
    found = iter(labels)
    return [
        Row(row.fields | {"labels": [next(found) for _ in row.fields["completions"][1:]] + [None]}, row.where)
        for row in rows
    ]


def _unfinished(row: Row, policy: Policy) -> list[PromptExample]:
    """The solution up to the end of each step but the last, as prompts."""
    prompt, steps = row.fields["prompt"], row.fields["completions"]
    if len(steps) < 2:
        raise UserError(f"{row.where}: a solution of one step has none to continue: remove the row")
    fields = {name: row.fields[name] for name in row.fields.keys() - {"completions", "labels"}}
    ids, found = encode_prompt(policy.tokenizer, prompt), []
    for step in steps[:-1]:
        ids = ids + policy.tokenizer.encode(step + STEP_END)
        found.append(PromptExample(np.asarray(ids, np.int32), prompt, fields, row.where))
    return found
