"""A whole post-training run as one pure function: prompts, answers, scores, updates, evaluation.

    train = make_train(task_setup, grpo_algorithm(task_setup, grpo_variants.grpo(group_size=4)), steps=60)
    state, history = jax.jit(train)(SeedState(key, params), hyper)

Traced from end to end, so that `sweep` can run seeds x hyperparameters in one program. The algorithms are in
`jitted.algorithms`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.core.protocols import DecodeFn, LogprobFn, PrefillFn
from rlhf_jax.core.trees import pytree_dataclass
from rlhf_jax.core.types import Array, Float, Metrics, Params, PRNGKeyArray, Rollout, Scalar
from rlhf_jax.generation import Sampling, generate
from rlhf_jax.kernels.kl import reverse_kl
from rlhf_jax.models import Policy
from rlhf_jax.tasks.base import Prompts, Task

RewardFn = Callable[[Rollout, Prompts], Float[Array, " B"]]


@pytree_dataclass
class SeedState:
    """Seed state: the key and the initial policy of one seed.

    Attributes:
      params: the policy to start from, which is also the reference.
    """

    key: PRNGKeyArray
    params: Params


@dataclasses.dataclass(frozen=True, eq=False)
class TaskSetup:
    """A task, a model for it, and how much is sampled in a step.

    Attributes:
      policy: the model's callables; parameters come with each seed's `SeedState`.
      num_prompts: prompts a step.
      num_samples: answers to each of them.
      temperature: of sampling and of the scorer.
      heldout: prompts of the evaluation, at most.
      reward_fn: what training sees in place of the task's own score, such as a reward model; may close over
        traced parameters, in a world that is made inside the run.
    """

    task: Task
    policy: Policy
    num_prompts: int = 16
    num_samples: int = 4
    temperature: float = 1.0
    heldout: int = 128
    reward_fn: RewardFn | None = None

    @property
    def logprob_fn(self) -> LogprobFn:
        """Log-probs of the policy."""
        return self.policy.make_logprob_fn(temperature=self.temperature)

    def answer(
        self,
        params: Params,
        prompts: Prompts,
        key: PRNGKeyArray,
        *,
        temperature: Scalar | None = None,
        decode_fns: tuple[PrefillFn, DecodeFn] | None = None,
    ) -> Rollout:
        """Answers of a policy, one a prompt."""
        prefill, decode = decode_fns or (self.policy.prefill, self.policy.decode)
        return generate(
            prefill,
            decode,
            params,
            jnp.asarray(prompts.tokens),
            jnp.asarray(prompts.mask),
            key,
            max_new_tokens=self.task.completion_length,
            eos_id=self.task.tokenizer.eos_id,
            pad_id=self.task.tokenizer.pad_id,
            sampling=Sampling(self.temperature if temperature is None else temperature),
            early_end=False,  # whole runs are there to be vmapped
            tool_fn=self.task.tool_fn,
        )

    def rewards(self, rollout: Rollout, prompts: Prompts) -> Float[Array, " B"]:
        """Training rewards of answers: those of `reward_fn`, or the task's own."""
        return self.gold(rollout, prompts) if self.reward_fn is None else self.reward_fn(rollout, prompts)

    def gold(self, rollout: Rollout, prompts: Prompts) -> Float[Array, " B"]:
        """Gold rewards of answers: the task's own."""
        return self.task.score(rollout.sequences.tokens, rollout.sequences.mask, prompts.truth)

    def draw(
        self, key: PRNGKeyArray, *, num_prompts: int | None = None, num_samples: int | None = None
    ) -> Prompts:
        """Training prompts, each `num_samples` times in a row."""
        drawn = self.task.draw(key, num_prompts or self.num_prompts)
        count = num_samples or self.num_samples
        return jax.tree.map(lambda leaf: jnp.repeat(leaf, count, axis=0), drawn)


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """An algorithm as a whole run needs it.

    Attributes:
      init: (params, key, hyper) -> agent.
      step: (agent, hyper, ref_params, key) -> (agent, metrics): samples, and learns; `tokens` among the
        metrics are those generated.
      policy: agent -> parameters of the policy.
    """

    init: Callable[[Params, PRNGKeyArray, Any], Any]
    step: Callable[[Any, Any, Params, PRNGKeyArray], tuple[Any, Metrics]]
    policy: Callable[[Any], Params] = lambda agent: agent.learner.all_params


def make_train(
    task_setup: TaskSetup, algorithm: Algorithm, *, steps: int
) -> Callable[[SeedState, Any], tuple[Any, dict[str, Array]]]:
    """`train(start, hyper) -> (agent, history)`.

    The history holds what a step reports, [steps], and the evaluation on held-out prompts at the end:
    `score` (greedy) and `sampled_score` as shares of the best there is, `kl` to the reference in nats an
    answer, `length` in tokens, and `generated`, the tokens that training sampled.
    """

    def train(start: SeedState, hyper: Any) -> tuple[Any, dict[str, Array]]:
        init_key, step_key, evaluation_key = jax.random.split(start.key, 3)

        def step(agent: Any, number: Array) -> tuple[Any, Metrics]:
            return algorithm.step(agent, hyper, start.params, jax.random.fold_in(step_key, number))

        agent = algorithm.init(start.params, init_key, hyper)
        agent, history = jax.lax.scan(step, agent, jnp.arange(steps))
        history = {name: history[name] for name in ("reward", "length", "tokens") if name in history}
        generated = {"generated": jnp.sum(history["tokens"])} if "tokens" in history else {}
        final = evaluate(task_setup, algorithm.policy(agent), start.params, evaluation_key)
        return agent, {**{f"train_{name}": values for name, values in history.items()}, **final, **generated}

    return train


def evaluate(
    task_setup: TaskSetup, params: Params, ref_params: Params, key: PRNGKeyArray
) -> dict[str, Array]:
    """Held-out scores of a policy."""
    prompts = _heldout(task_setup)
    greedy = task_setup.answer(params, prompts, key, temperature=0.0)
    sampled = task_setup.answer(params, prompts, key)
    logp, ref_logp = (task_setup.logprob_fn(side, sampled.sequences).logp for side in (params, ref_params))
    mask = sampled.sequences.mask
    return {
        "score": jnp.mean(task_setup.gold(greedy, prompts)) / task_setup.task.best,
        "sampled_score": jnp.mean(task_setup.gold(sampled, prompts)) / task_setup.task.best,
        "kl": jnp.mean(jnp.sum(jnp.where(mask, logp - ref_logp, 0), axis=1)),
        "length": jnp.mean(jnp.sum(mask, axis=1)),
    }


def _heldout(task_setup: TaskSetup) -> Prompts:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf[: task_setup.heldout]), task_setup.task.heldout)


# Runs with evaluation on the way --------------------------------------------------------------------


def make_train_with_eval(
    task_setup: TaskSetup, algorithm: Algorithm, *, steps: int, eval_every: int
) -> Callable[[SeedState, Any], tuple[Any, dict[str, Array]]]:
    """`train(start, hyper) -> (agent, history)` that looks at the policy before training and every few steps.

    Args:
      eval_every: steps between two looks; divides `steps`.

    Returns:
      A run whose history is that of `evaluate_rewards`, [1 + steps / eval_every] each.

    Raises:
      ValueError: `eval_every` does not divide `steps`.
    """
    if steps % eval_every:
        raise ValueError(f"{steps} steps cannot be looked at every {eval_every}")

    def train(start: SeedState, hyper: Any) -> tuple[Any, dict[str, Array]]:
        init_key, step_key, watch_key = jax.random.split(start.key, 3)

        def step(agent: Any, number: Array) -> tuple[Any, None]:
            return algorithm.step(agent, hyper, start.params, jax.random.fold_in(step_key, number))[0], None

        def look(agent: Any, number: Array) -> dict[str, Array]:
            return evaluate_rewards(
                task_setup, algorithm.policy(agent), start.params, jax.random.fold_in(watch_key, number)
            )

        def part(agent: Any, first: Array) -> tuple[Any, dict[str, Array]]:
            seen = look(agent, first)
            return jax.lax.scan(step, agent, first + jnp.arange(eval_every))[0], seen

        agent = algorithm.init(start.params, init_key, hyper)
        agent, history = jax.lax.scan(part, agent, jnp.arange(0, steps, eval_every))
        last = look(agent, jnp.int32(steps))
        return agent, jax.tree.map(lambda seen, end: jnp.append(seen, end), history, last)

    return train


def evaluate_rewards(
    task_setup: TaskSetup, params: Params, ref_params: Params, key: PRNGKeyArray
) -> dict[str, Array]:
    """Means over one sampled answer to each held-out prompt, in the rewards' own units.

    `gold` is the task's score, `proxy` what training sees, `length` in tokens, `kl` that to the reference in
    nats an answer, exact over the vocabulary at each token: never negative, of less variance than log-ratios.
    """
    prompts = _heldout(task_setup)
    sampled = task_setup.answer(params, prompts, key)
    distribution = task_setup.policy.make_distribution_fn(temperature=task_setup.temperature)
    logp, ref_logp = (distribution(side, sampled.sequences) for side in (params, ref_params))
    mask = sampled.sequences.mask
    kl = jnp.sum(jnp.where(mask, reverse_kl(logp, ref_logp), 0), axis=1)
    return {
        "gold": jnp.mean(task_setup.gold(sampled, prompts)),
        "proxy": jnp.mean(task_setup.rewards(sampled, prompts)),
        "kl": jnp.mean(kl),
        "length": jnp.mean(jnp.sum(mask, axis=1)),
    }
