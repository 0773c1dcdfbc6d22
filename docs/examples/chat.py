"""A chat answer: python chat.py MODEL."""

import sys

import rlhf_jax as rj

policy = rj.load(sys.argv[1])
print(policy.chat([{"role": "user", "content": "What is the capital of France?"}], max_new_tokens=16))
