"""How SmolLM2 is post-trained: every method as a stage, from the same SFT, with as many sampled answers.

A method that samples gets `rollouts` times `ANSWERS` answers of its prompts, and so do those that learn from
answers of the start: DPO and the reward model from the best and the worst of `GROUP`, RAFT from the best.
PPO by a reward model has its own answers besides those of the pairs, and distillation has GRPO's teacher. All
train an adapter (LoRA), but for those that end in `_full`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pipeline_stages

from rlhf_jax.core import files
from rlhf_jax.core.train_state import OptimizerConfig
from rlhf_jax.stages import (
    adapting,
    distill,
    dpo,
    grpo,
    online_dpo,
    option_checks,
    option_groups,
    ppo,
    preferences,
    reward_model,
    rounds,
    sft,
)

ANSWERS = 32
"""Of a rollout."""
GROUP = 8
PROMPTS_OF_PAIRS = ANSWERS // GROUP
"""That are answered for each rollout of the other methods."""
ROLLOUTS_A_ROUND = 5
REWARD = "smollm2_tasks:mixture_reward"
ADAPTER = adapting.AdapterOptions("lora", rank=8, alpha=16.0)
WARM = OptimizerConfig(schedule="cosine", warmup_steps=5, end_lr_ratio=0.1)
# Chosen by rule of thumb for some tens of steps, not searched.
PACKED = {"packing": True, "max_length": 256, "overlength": "drop", "batch_size": 4}
SFT: dict[str, Any] = {"optimizer": WARM, "learning_rate": 2e-4, **PACKED}
DPO: dict[str, Any] = {"optimizer": WARM, "learning_rate": 5e-5, "beta": 0.1}
REWARD_MODEL: dict[str, Any] = {"optimizer": WARM, "learning_rate": 1e-4}
ONLINE: dict[str, Any] = {"optimizer": pipeline_stages.SAMPLED, "learning_rate": 1e-4}
GRPO: dict[str, Any] = {**ONLINE, "kl_coef": 0.0, "batch_size": ANSWERS // GROUP, "group_size": GROUP}
PPO: dict[str, Any] = {
    **ONLINE,
    "batch_size": ANSWERS,
    "kl_coef": 0.02,
    "num_ppo_epochs": 1,
    "value": "shared",
    "missing_eos_penalty": 0.0,  # the verifiers give nothing for it already
}
FULL: dict[str, Any] = {"adapter": adapting.AdapterOptions(), "learning_rate": 1e-5}
"""Instead of an adapter, and of its rate."""


@dataclasses.dataclass(frozen=True)
class Start:
    """What every method of a seed is given.

    Attributes:
      folder: of the seed's runs; the policy to start from is in `sft`.
      data: files of prompts, and of those that are answered for pairs.
      rollouts: of `ANSWERS` answers each.
      dpo_steps: optimizer steps on pairs.
      max_new_tokens: of an answer.
      run_options: (name, steps) -> how a stage runs.
    """

    folder: Path
    data: Mapping[str, Path]
    rollouts: int
    dpo_steps: int
    max_new_tokens: int
    run_options: Callable[[str, int], option_groups.RunOptions]

    @property
    def model(self) -> str:
        """The policy to start from."""
        return str(self.folder / "sft")

    @property
    def pairs(self) -> Path:
        """Best and worst answers of the start."""
        return self.folder / "pairs" / "pairs.jsonl"

    def prompts(self, name: str = "prompts", **changes: Any) -> option_groups.PromptOptions:
        """Prompts and what their answers are worth."""
        settings = {"rewards": (REWARD,), "max_new_tokens": self.max_new_tokens, **changes}
        return option_groups.PromptOptions(data=str(self.data[name]), **settings)


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to post-train.

    Attributes:
      train: (start, name) -> runs the stage in the folder of that name.
      needs: stages before it.
    """

    train: Callable[[Start, str], Any]
    needs: tuple[str, ...] = ()


def train_sft(start: Start, model: str, steps: int) -> None:
    """The short SFT that teaches the form of the answers."""
    source = {"model": model, "data": str(start.data["demonstrations"])}
    run = start.run_options("sft", steps)
    sft.run(option_checks.brief(sft.Options(run=run, adapter=ADAPTER, **source, **SFT)))


def make_pairs(start: Start, name: str) -> None:
    """The best and the worst of several answers of the start."""
    run = start.run_options(name, 1)
    asked = {"samples_per_prompt": GROUP, "batch_size": PROMPTS_OF_PAIRS, "held_out_share": 0.0}
    settings = {"out": run.out, "model": start.model, "quiet": run.quiet, "seed": run.seed, **asked}
    preferences.run(preferences.Options(prompts=start.prompts("pair_prompts"), **settings))


def train_reward_model(start: Start, name: str) -> None:
    """On the pairs, from the start's body."""
    options = reward_model.Options(
        run=start.run_options(name, start.dpo_steps),
        model=start.model,
        adapter=ADAPTER,
        **of_pairs(start),
        **REWARD_MODEL,
    )
    reward_model.run(option_checks.brief(options))


def of_pairs(start: Start) -> dict[str, Any]:
    """The pairs, some at a time."""
    size = min(GROUP, len(files.read_lines(start.pairs)))
    return {"pairs": option_groups.PairOptions(data=str(start.pairs)), "batch_size": size}


def train_dpo(start: Start, name: str, **changes: Any) -> None:
    """DPO on the start's own pairs."""
    run = start.run_options(name, start.dpo_steps)
    settings = {"adapter": ADAPTER, **DPO, **of_pairs(start), **changes}
    dpo.run(option_checks.brief(dpo.Options(run=run, model=start.model, **settings)))


def train_group(start: Start, name: str, **changes: Any) -> None:
    """GRPO's family."""
    run = start.run_options(name, start.rollouts)
    settings = {"adapter": ADAPTER, **GRPO, **changes}
    grpo.run(
        option_checks.brief(grpo.Options(run=run, model=start.model, prompts=start.prompts(), **settings))
    )


def train_ppo(start: Start, name: str, *, learned_reward: bool = False) -> None:
    """PPO, whose reward is the verifiers', or a reward model."""
    folders = (str(start.folder / "reward_model"),) if learned_reward else ()
    prompts = start.prompts(**({"rewards": (), "eval_reward": REWARD} if learned_reward else {}))
    options = ppo.Options(
        run=start.run_options(name, start.rollouts),
        model=start.model,
        prompts=prompts,
        adapter=ADAPTER,
        reward_model=folders,
        **PPO,
    )
    ppo.run(option_checks.brief(options))


def train_online_dpo(start: Start, name: str) -> None:
    """Online DPO: two answers to each prompt, of which the verifiers prefer one."""
    options = online_dpo.Options(
        run=start.run_options(name, start.rollouts),
        model=start.model,
        prompts=start.prompts(),
        adapter=ADAPTER,
        batch_size=ANSWERS // 2,
        beta=0.1,
        **ONLINE,
    )
    online_dpo.run(option_checks.brief(options))


def train_raft(start: Start, name: str) -> None:
    """Rounds of SFT on the best answer to each prompt."""
    number = max(start.rollouts // ROLLOUTS_A_ROUND, 1)
    options = rounds.Options(
        run=start.run_options(name, 2 * ROLLOUTS_A_ROUND),  # two passes over the best answers
        model=start.model,
        prompts=start.prompts(),
        adapter=ADAPTER,
        method="raft",
        rounds=number,
        prompts_per_round=PROMPTS_OF_PAIRS * start.rollouts // number,
        samples_per_prompt=GROUP,
        batch_size=PROMPTS_OF_PAIRS,
        optimizer=WARM,
        learning_rate=1e-4,
    )
    rounds.run(option_checks.brief(options))


def train_distillation(start: Start, name: str) -> None:
    """On-policy distillation from what GRPO made."""
    options = distill.Options(
        run=start.run_options(name, start.rollouts),
        model=start.model,
        teacher=(str(start.folder / "grpo"),),
        prompts=start.prompts(),
        adapter=ADAPTER,
        loss="reverse_kl",
        lmbda=1.0,
        batch_size=ANSWERS,
        **ONLINE,
    )
    distill.run(option_checks.brief(options))


METHODS: dict[str, Method] = {
    "raft": Method(train_raft),
    "dpo": Method(train_dpo, ("pairs",)),
    "grpo": Method(train_group),
    "dr_grpo": Method(functools.partial(train_group, algorithm="dr_grpo")),
    "rloo": Method(functools.partial(train_group, algorithm="rloo")),
    "reinforce++": Method(functools.partial(train_group, algorithm="reinforce++")),
    "ppo": Method(train_ppo),
    "reward_model_ppo": Method(functools.partial(train_ppo, learned_reward=True), ("pairs", "reward_model")),
    "online_dpo": Method(train_online_dpo),
    "distillation": Method(train_distillation, ("grpo",)),
    "grpo_full": Method(functools.partial(train_group, **FULL)),
    "dpo_full": Method(functools.partial(train_dpo, **FULL), ("pairs",)),
}
AHEAD: dict[str, Method] = {"pairs": Method(make_pairs), "reward_model": Method(train_reward_model)}
"""What leaves no policy, but what some methods need."""


def policy_folder(folder: Path, name: str) -> Path:
    """Where the policy of a method is."""
    if name != "raft":
        return folder / name
    numbers = (int(path.name.removeprefix("round_")) for path in (folder / name).glob("round_*"))
    return folder / name / f"round_{max(numbers)}"


def stages_of(methods: tuple[str, ...]) -> list[str]:
    """The methods in order, each behind what it needs."""
    wanted = {need for name in methods for need in METHODS[name].needs} | set(methods)
    return [name for name in (*AHEAD, *METHODS) if name in wanted]
