# %% [markdown]
# # PPO, from CartPole to language
#
# The same update trains both: `algorithms.ppo`. What differs is who brings the experience.
#
# First a pole, four seeds in one program:

# %%
import jax
import numpy as np

from rlhf_jax.rl.algorithms import ppo
from rlhf_jax.rl.envs import environments

env, env_params = environments.make("CartPole-v1")
train = ppo.make_train(ppo.Config(total_steps=102_400), env, env_params)
state, history = jax.jit(jax.vmap(train, (0, None)))(
    jax.random.split(jax.random.key(0), 4), ppo.default_hyper()
)
returns = np.asarray(history["episode_return_sum"] / np.maximum(history["episodes"], 1))
print(
    f"return of training episodes: {returns[:, 0].mean():.0f} at first, {returns[:, -1].mean():.0f} at the end"
)

# %%
import matplotlib.pyplot as plt

_, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.plot(returns.T, color="C0", alpha=0.3)
axes.plot(returns.mean(axis=0), color="C0")
_ = axes.set(xlabel="update", ylabel="return of training episodes", title="PPO on CartPole-v1, four seeds")

# %% [markdown]
# Then language. A completion is an episode: a token is an action, the reward comes at the last one, less a penalty for leaving the reference at each; the value
# model is a second decoder. A small decoder over bytes learns to write digits.

# %%
import rlhf_jax as rj
from rlhf_jax import models
from rlhf_jax.data.tokenizers import byte_tokenizer

tokenizer = byte_tokenizer()
config = models.dense_config(vocab_size=tokenizer.vocab_size, width=32, num_layers=1, num_heads=2)
policy = models.make_policy(config, models.init_params(config, jax.random.key(0)), tokenizer)


def digits(prompts, completions, **fields):
    return [sum(c.isdigit() for c in text) / 4 for text in completions]


rows = [{"prompt": f"{n}?"} for n in range(32)]
run = rj.ppo(
    policy,
    rows,
    rewards=[digits],
    batch_size=32,
    max_new_tokens=4,
    steps=30,
    learning_rate=3e-3,
    missing_eos_penalty=0.0,
    quiet=True,
)
found = [line["reward"] for line in run.metrics if "reward" in line]
print(f"share of digits: {found[0]:.2f} at first, {found[-1]:.2f} at the end")
