"""One run of a stage, from the policy that it starts from to the finished run folder."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from rlhf_jax.core.arguments import told
from rlhf_jax.core.errors import UserError
from rlhf_jax.core.types import Params, PRNGKeyArray
from rlhf_jax.metrics import Thresholds
from rlhf_jax.models import Policy, ScalarModel
from rlhf_jax.rollout.completions import LastCompletions
from rlhf_jax.rollout.dynamic_sampling import Answers
from rlhf_jax.rollout.sampler import RolloutFns
from rlhf_jax.stages import adapting, edges, inputs, option_checks
from rlhf_jax.stages.entry import Given, Trained
from rlhf_jax.stages.option_groups import RunOptions
from rlhf_jax.training import Meter, run_loop
from rlhf_jax.training.run_folder import Adaptation, Kind


@dataclasses.dataclass(eq=False)
class Session:
    """One run of a stage: its options, the objects given in the place of names, and the policy.

    Attributes:
      options: of the stage, with `run`.
      given: what takes the place of names in them.
      stage: its name in the run folder.
      start: the policy; None for the given one, or the one that `options.model` names.
      policy: to start from.
    """

    options: Any
    given: Given
    stage: str
    start: dataclasses.InitVar[Policy | None] = None
    policy: Policy = dataclasses.field(init=False)

    def __post_init__(self, start: Policy | None) -> None:
        """Loads the policy."""
        policy = self.given.policy if start is None else start
        self.policy = self.run.load(self.options.model) if policy is None else policy

    @property
    def run(self) -> RunOptions:
        """The options that all stages share."""
        return self.options.run

    def decide_steps(self, rows: int) -> None:
        """Puts the steps of the run into the options, from passes over `rows` where they are not given."""
        self.options = option_checks.with_steps(self.options, rows, self.options.batch_size)

    @property
    def rewards(self) -> list[Any]:
        """Reward functions, as given or by name."""
        return inputs.rewards_of(self.options.prompts, self.given)

    def load_prompts(self, rollout_fns: RolloutFns | None = None, *, eval_reward: str = "") -> inputs.Prompts:
        """The prompts that the options name, or that were given.

        Args:
          rollout_fns: how they are answered; None for by one completion each.
          eval_reward: the reward of the evaluation where the options name none; empty for their first reward.
        """
        options = self.options.prompts
        options = dataclasses.replace(options, eval_reward=options.eval_reward or eval_reward)
        if self.run.plan:  # nothing is scored, and no reward model is read
            options = dataclasses.replace(options, rewards=(), eval_reward="")
        return inputs.load_prompts(options, self.policy, self.run.seed, self.given, rollout_fns)

    def make_answer_fn(
        self, prompts: inputs.Prompts, policy: Policy | None = None, **sampler: Any
    ) -> Callable[[Params, int], Answers]:
        """`answer(params, number) -> Answers` to the prompts of one draw: see `inputs.make_answer_fn`.

        Args:
          policy: who answers; None for the policy of the run.
        """
        shared: dict[str, Any] = {"seed": self.run.seed, "folder": self.run.out, "given": self.given}
        return inputs.make_answer_fn(
            self.options.prompts, policy or self.policy, prompts, **shared, **sampler
        )

    def announce(self, data: str) -> None:
        """Says what is about to run."""
        edges.announce(self.run, self.policy, data)

    def split_trainable(self, updates_per_step: int = 1) -> adapting.TrainableSplit:
        """Split of the policy into trained and frozen, with the optimizer.

        Args:
          updates_per_step: optimizer steps in one step of the run.
        """

        def split(policy: Policy) -> adapting.TrainableSplit:
            return adapting.split_trainable(
                self.options.adapter,
                self.options.optimizer,
                policy,
                seed=self.run.seed,
                steps=self.run.num_steps * updates_per_step,
                brought=self.given.policy is not None,
            )

        if self.run.plan:
            return adapting.split_shapes(split, self.policy)
        adapting.check_sparse(self.options.adapter, self.policy)
        return split(self.policy)

    def init_state(
        self, init: Callable[..., Any], trained: Params, frozen: Params, *keys: PRNGKeyArray
    ) -> Any:
        """`init(trained, *keys)`, every leaf made where it lives, beside what is frozen; shapes in a plan.

        Args:
          keys: none for the one of the seed.
        """
        keys = keys or (jax.random.key(self.run.seed),)
        make_state = adapting.state_shapes if self.run.plan else adapting.init_sharded_state
        state = make_state(init, trained, frozen, *keys)
        adapting.print_trainable_parameters(self.run, state.learner)
        return state

    def train(
        self,
        state: Any,
        step: Callable[..., Any],
        *,
        meter: Meter,
        data_fingerprint: str,
        kind: Kind = "policy",
        adaptation: Adaptation | None = None,
        evaluate: Callable[[Any, int], Mapping[str, Any]] | None = None,
        thresholds: Thresholds = Thresholds(),
        completions: LastCompletions | None = None,
    ) -> Any:
        """The training loop, in the run folder; returns the last state.

        Args:
          kind: of what is trained.
          adaptation: how it was adapted; None where everything is trained.
          evaluate: the stage's own evaluation, (state, step) -> numbers.
          completions: what was written in the last step, of a stage whose options hold `completions`.
        """
        edges.start(self.options, self.run, self.stage, self.policy, kind, adaptation)
        return run_loop(
            state,
            step,
            self.run.loop(thresholds, self.options.completions if completions else None),
            stage=self.stage,
            folder=self.run.out,
            resume=self.run.resume,
            run_config=option_checks.to_json(self.options),
            loggers=[*edges.loggers(self.options, self.stage), *self.given.loggers],
            data_fingerprint=data_fingerprint,
            eval_fn=_both(evaluate, self.given.eval_fn and _of_numbers(self.given.eval_fn)),
            on_step=self.given.on_step,
            meter=meter,
            completions_fn=completions,
        )

    def finish(self, params: Params, state: Any, samples: Sequence[Mapping[str, Any]] = ()) -> Trained:
        """Writes samples and report; what a stage that trains a policy leaves.

        Args:
          params: of the whole policy, as it ended.
        """
        edges.finish(self.run, samples)
        after = self.policy.with_params(params)
        is_rslora = self.options.adapter.kind == "rslora"
        return Trained(Path(self.run.out), dataclasses.replace(after, rank_stabilized=is_rslora), state)

    def finish_reward_model(self, state: Any) -> Trained:
        """Writes the report; what a stage that trains a decoder with a scalar head leaves."""
        edges.finish(self.run, kind="process_reward" if self.stage == "process_reward" else "reward_model")
        params = state.learner.all_params
        body = self.policy.with_params(params["decoder"])
        return Trained(Path(self.run.out), body, state, ScalarModel(body, params["head"]))


def _both(*functions: Callable[[Any, int], Mapping[str, Any]] | None) -> Callable[..., Any] | None:
    present = [function for function in functions if function is not None]
    if not present:
        return None
    return lambda state, step: {k: v for function in present for k, v in function(state, step).items()}


def _of_numbers(
    eval_fn: Callable[[Any, int], Mapping[str, Any]],
) -> Callable[[Any, int], Mapping[str, Any]]:
    """The evaluation of a user's; refuses what is no dict of numbers."""

    def evaluate(state: Any, step: int) -> Mapping[str, Any]:
        found: Any = eval_fn(state, step)
        if not isinstance(found, Mapping):
            raise UserError(f"eval_fn returned {told(found)} at step {step}: give a dict of numbers by name")
        for name, value in found.items():
            if not _is_number(value):
                raise UserError(f"eval_fn returned {told(value)} for {name} at step {step}: give a number")
        return found

    return evaluate


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, str)
