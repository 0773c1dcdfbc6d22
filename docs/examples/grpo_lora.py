"""GRPO with LoRA and a reward of one's own: python grpo_lora.py MODEL OUT."""

import sys

import rlhf_jax as rj


def brevity(prompts, completions, **_):
    return [1 / (1 + len(text)) for text in completions]


policy = rj.load(sys.argv[1])
rows = [{"prompt": f"Name a fruit that begins with {letter}."} for letter in "abcdefgh"]
sizes = {"batch_size": 2, "group_size": 4, "max_new_tokens": 8, "steps": 3}
run = rj.grpo(policy, rows, rewards=[brevity], adapter=rj.lora(rank=16), out=sys.argv[2] + "/run", **sizes)
run.policy.save(sys.argv[2] + "/merged")
