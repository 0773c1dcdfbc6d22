"""rlhf_jax: RLHF, and the reinforcement learning beneath it, as pure functions in JAX.

    import rlhf_jax as rj

    policy = rj.load(path)  # a run folder, a Hugging Face folder, a GGUF file, a name in the hub cache
    run = rj.grpo(policy, rows, rewards=[my_function], adapter=rj.lora(rank=16), steps=3, out="runs/mine")
    run.policy.save("out")

The functions are those of `rlhf_jax.stages.api`; each is loaded when it is first used. Beneath them stand
pure functions: `from rlhf_jax import losses`, `from rlhf_jax.algorithms import ppo`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_jax.models.wrap import wrap
    from rlhf_jax.stages.api import (
        distill,
        dpo,
        evaluate,
        grpo,
        lora,
        online_dpo,
        ppo,
        process_reward,
        reward_model,
        rounds,
        sft,
    )
    from rlhf_jax.training.loading import load

__version__ = "0.1.0"
__all__ = [
    "distill",
    "dpo",
    "evaluate",
    "grpo",
    "load",
    "lora",
    "online_dpo",
    "ppo",
    "process_reward",
    "reward_model",
    "rounds",
    "sft",
    "wrap",
]
_ELSEWHERE = {"load": "rlhf_jax.training.loading", "wrap": "rlhf_jax.models.wrap"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'rlhf_jax' has no attribute '{name}'")
    return getattr(importlib.import_module(_ELSEWHERE.get(name, "rlhf_jax.stages.api")), name)
