"""Constitutional AI on a model and data of one's own.

The model revises its answers to red-team prompts by the constitution and learns from that, mixed with
conversations that people wrote; it labels pairs of answers to the same prompts; a preference model learns
from these and from pairs that people labelled; and RL against it starts from the revised policy. DPO, PPO and
GRPO from the model as it is stand beside that. Rules need ranked answers and propositions, which are
`rlhf rule-rewards`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import own_data
import pipeline_stages
from constitutional_stages import Data, Stages, policy_folder

from rlhf_jax.core.errors import UserError
from rlhf_jax.feedback.constitution import read_constitution
from rlhf_jax.stages import option_checks

if TYPE_CHECKING:
    from constitutional import Options as Job

LabelsOf = Literal["start", "sl_cai"]


def check(job: "Job") -> None:
    """Raises: UserError where the data do not go together, or the constitution holds none."""
    own = job.own
    if not own_data.is_given(own):
        for name in ("constitution", "red_team"):
            if getattr(job, name):
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} is of a model of your own: give --model, or leave it out")
        return
    if not (job.constitution and own.prompts):
        raise UserError("--model learns by a constitution: give --constitution, and the --prompts it answers")
    if not own.preference_data:
        raise UserError(
            "--preference-data is missing: give pairs that people labelled for helpfulness, or a policy that "
            "never helps is the most harmless one"
        )
    read_constitution(job.constitution)
    option_checks.check_divides("--group-size", own.group_size, "--batch-size", own.batch_size)


def data_of(job: "Job", folder: Path) -> Data:
    """What the stages read, with a tenth of prompts and pairs held out."""
    own = job.own
    prompts, held_out = own_data.split_prompts(job)
    pairs, held_out_pairs = own_data.split(job, "preference_data")
    red_team = job.red_team or prompts
    kl: dict[str, Any] = {} if own.kl_coef is None else {"kl_coef": own.kl_coef}

    def settings(
        learning_rate: float | None, batch_size: int = own.batch_size, **more: Any
    ) -> dict[str, Any]:
        return {"learning_rate": learning_rate, "batch_size": batch_size, **more}

    return Data(
        start=own.model,
        constitution=job.constitution,
        red_team=red_team,
        red_team_held_out="" if job.red_team else held_out,
        labelled=red_team,
        prompts=prompts,
        held_out=held_out,
        demonstrations=own.sft_data,
        pairs=pairs,
        held_out_pairs=held_out_pairs,
        ratings=(str(folder / "sl_cai" / "judge.json"),),
        max_new_tokens=own.max_new_tokens,
        settings={
            "sft": settings(own.sft_learning_rate),
            "reward": settings(own.reward_learning_rate),
            "ppo": settings(own.ppo_learning_rate, **kl),
            "dpo": settings(own.dpo_learning_rate, beta=own.beta),
            "grpo": settings(own.grpo_learning_rate, **kl)
            | {"batch_size": own.batch_size // own.group_size, "group_size": own.group_size},
        },
        helpful=own.rewards[0] if own.rewards else "",
        report=True,
    )


def run_seed(job: "Job", seed: int) -> pipeline_stages.Results:
    """Trains and measures the stages of one seed."""
    folder = job.out / f"seed_{seed}"
    stages = {"start": lambda: None, **Stages(job, data_of(job, folder), folder, seed).in_order()}
    return own_data.run_and_measure(job, folder, stages, "start", policy_folder)
